"""Sweeps over the pairs that carry a plan, once it is known roughly: every sum at the cost of its support."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from stochproc.ot._problem import Problem

__all__ = ["SparsePass", "SparsePasses"]

# Below exp of this, entries are of no weight and exp would slow down.
FLOOR = -700.0


class SparsePass:
    """A sweep at a potential g restricted to a support; what ``DensePass`` offers, from SciPy's CSR products."""

    def __init__(self, passes: SparsePasses, g: Tensor, eps: float) -> None:
        self.problem, self.eps, self.g = passes.problem, eps, g
        starts = passes.costs.indptr
        height = (g + eps * passes.log_b).numpy() / eps
        z = height[passes.costs.indices] - passes.costs.data / eps
        high = np.maximum.reduceat(z, starts[:-1])
        lengths = np.diff(starts)
        z -= np.repeat(high, lengths)
        np.exp(np.maximum(z, FLOOR, out=z), out=z)
        total = np.add.reduceat(z, starts[:-1])
        self.shares = sp.csr_array((z / np.repeat(total, lengths), passes.costs.indices, starts), passes.costs.shape)
        self.c = torch.from_numpy(self.problem.a.numpy() @ self.shares)
        self.f = torch.from_numpy(-eps * (np.log(total) + high))
        self.phi = float(self.problem.a @ self.f + self.problem.b @ g)
        self.err = float((self.c - self.problem.b).abs().sum())

    def log_ratio(self) -> tuple[Tensor, bool]:
        """Return log b - log c; a column that the floor has emptied counts as far off."""
        return self.problem.b.log() - self.c.clamp(min=1e-300).log(), False

    def product(self, p: Tensor) -> Tensor:
        """Multiply by S = diag(c) - P^T diag(1/a) P."""
        q = self.problem.a.numpy() * (self.shares @ p.numpy())
        return self.c * p - torch.from_numpy(q @ self.shares)

    def self_mass(self) -> Tensor:
        """Return sum_i P_ij^2 / a_i."""
        squared = sp.csr_array((self.shares.data**2, self.shares.indices, self.shares.indptr), self.shares.shape)
        return torch.from_numpy(self.problem.a.numpy() @ squared)

    def gram(self) -> Tensor:
        """Return P^T diag(1/a) P."""
        half = sp.diags_array(self.problem.a.sqrt().numpy()) @ self.shares
        return torch.from_numpy((half.T @ half).toarray())

    def truncated(self, delta: float) -> sp.csr_array | None:
        """Return the entries of P above delta min(a_i, b_j)."""
        a, b = self.problem.a.numpy(), self.problem.b.numpy()
        columns, starts = self.shares.indices, self.shares.indptr
        rows = np.repeat(np.arange(len(a)), np.diff(starts))
        plan, column_top = self.shares.data * a[rows], np.zeros(len(b))
        np.maximum.at(column_top, columns, plan)
        row_top = np.maximum.reduceat(plan, starts[:-1])
        level = np.minimum(delta * np.minimum(a[rows], b[columns]), np.minimum(column_top[columns], row_top[rows]))
        kept = plan >= level
        counts = np.add.reduceat(kept.astype(np.int64), starts[:-1])
        return sp.csr_array((plan[kept], columns[kept], np.concatenate([[0], counts.cumsum()])), self.shares.shape)


class SparsePasses:
    """Sweeps over the entries of a stored cost where a plan is not negligible; on the CPU, in float64."""

    def __init__(self, problem: Problem, plan: sp.csr_array) -> None:
        self.problem = problem
        self.log_b = problem.b.log()
        rows = torch.from_numpy(np.repeat(np.arange(plan.shape[0]), np.diff(plan.indptr)))
        costs = problem.cost[rows, torch.from_numpy(plan.indices.astype(np.int64))].double().numpy()
        # 32-bit indices where they suffice: half the memory to read.
        self.costs = sp.csr_array((costs, plan.indices.astype(np.int32), plan.indptr.astype(np.int32)), plan.shape)

    def at(self, g: Tensor, eps: float) -> SparsePass:
        """Sweep at g."""
        return SparsePass(self, g, eps)

    def release(self, old: SparsePass) -> None:
        """Nothing to take back."""

    def forget(self, old: SparsePass) -> None:
        """Nothing to give back."""
