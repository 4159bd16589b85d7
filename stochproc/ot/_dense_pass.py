"""One sweep over a stored cost: the plan with exact rows that belongs to a potential of the columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn.functional import threshold

from stochproc.ot._problem import Problem

__all__ = ["DensePass", "DensePasses", "RowUpdate", "row_blocks"]

LOG2E = math.log2(math.e)
# exp2 of what is nearly subnormal costs ten times an ordinary one, and exp2(-inf) = 0 does not: what lies below the
# floor becomes -inf.
EXP2_FLOOR = {torch.float32: -120.0, torch.float64: -1000.0}
# Column sums below this may have lost terms to the floor; their logarithms come from a log-sum-exp.
TINY = {torch.float32: 1e-35, torch.float64: 1e-300}
# A sparse factorisation of a truncated plan with more than this part of all entries has no advantage.
CROWDED = 0.2
# A block of rows and the few operations on it stay in the cache of one core.
BLOCK_BYTES = {"cpu": 1 << 18, "cuda": 1 << 26}


class RowUpdate:
    """What one sweep at a potential g of the columns finds: the potential of the rows, and the column sums.

    Parameters
    ----------
    problem : Problem
    g : Tensor of shape (m,)
    eps : float
    room : callable
        Where to write the exponentials of a slice of rows: kept by a pass that multiplies by its plan, overwritten by
        the next slice otherwise.
    """

    def __init__(self, problem: Problem, g: Tensor, eps: float, room: Callable[[slice], Tensor]) -> None:
        self.problem, self.eps, self.g = problem, eps, g
        cost, a = problem.cost, problem.a
        scale, floor = LOG2E / eps, EXP2_FLOOR[cost.dtype]
        h = ((g + eps * problem.b.log()) * scale).to(cost.dtype)
        total, top, c = torch.empty_like(a), torch.empty_like(a), torch.zeros_like(g)
        for rows in row_blocks(cost):
            z = room(rows)
            torch.sub(h, cost[rows], alpha=scale, out=z)
            high = z.amax(1, keepdim=True)
            threshold(z.sub_(high), floor, -math.inf, inplace=True).exp2_()
            total[rows], top[rows] = z.sum(1).double(), high.squeeze(1).double()
            # The same exponentials, scaled to exact rows, give the columns: one a pair in a whole sweep.
            c += ((a[rows] / total[rows]).to(z.dtype) @ z).double()
        self.total, self.c = total, c
        self.f = -eps * (total.log2() + top) / LOG2E
        self.phi = float(a @ self.f + problem.b @ g)
        self.err = float((c - problem.b).abs().sum())

    def log_ratio(self) -> tuple[Tensor, bool]:
        """Return log b - log c, finite however small c is, and whether that took another sweep."""
        problem, eps = self.problem, self.eps
        ratio = problem.b.log() - self.c.log()
        lost = (self.c < TINY[problem.cost.dtype]).nonzero().squeeze(1)
        lift = (self.f / eps + problem.a.log()).unsqueeze(1)
        # As many columns at a time as make a block of four million bytes.
        for columns in lost.split(max(1, (1 << 19) // problem.shape[0])):
            cost = problem.cost.index_select(1, columns).double()
            ratio[columns] = -torch.logsumexp(lift - cost / eps, 0) - self.g[columns] / eps
        return ratio, lost.numel() > 0


class DensePass(RowUpdate):
    r"""A sweep that keeps its exponentials K, to multiply by the plan :math:`P = \mathrm{diag}(a / t) K`."""

    def __init__(self, passes: DensePasses, g: Tensor, eps: float, K: Tensor) -> None:
        self.K = K
        super().__init__(passes.problem, g, eps, K.__getitem__)

    def product(self, p: Tensor) -> Tensor:
        r"""Multiply by S = diag(c) - P^T diag(1/a) P."""
        K = self.K
        if K.dtype == torch.float64:
            return self.c * p - (self._link_weights * (K @ p)) @ K
        return self.c * p - ((self._link_weights * (K @ p.to(K.dtype))) @ K).double()

    @cached_property
    def _link_weights(self) -> Tensor:
        return (self.problem.a / self.total**2).to(self.K.dtype)

    def rows(self, p: Tensor) -> Tensor:
        """Return diag(1/a) P p."""
        return (self.K @ p.to(self.K.dtype)).double() / self.total

    def columns(self, q: Tensor) -> Tensor:
        """Return P^T diag(1/a) q."""
        return ((q / self.total).to(self.K.dtype) @ self.K).double()

    def self_mass(self) -> Tensor:
        """Return sum_i P_ij^2 / a_i."""
        weights = (self.problem.a / self.total**2).to(self.K.dtype)
        out = torch.zeros_like(self.c)
        for rows in self.blocks():
            out += (weights[rows] @ self.K[rows].square()).double()
        return out

    def blocks(self) -> list[slice]:
        """Return the slices of rows that a sweep takes."""
        return row_blocks(self.K)

    def gram(self) -> Tensor:
        """Return P^T diag(1/a) P in float64."""
        m = self.K.shape[1]
        out = self.c.new_zeros(m, m)
        weights = (self.problem.a.sqrt() / self.total).unsqueeze(1)
        for rows in row_blocks(self.K, 1 << 23):
            half = self.K[rows] * weights[rows]
            out.addmm_(half.T, half)
        return out

    def truncated(self, delta: float) -> sp.csr_array | None:
        """Return the entries of P above delta min(a_i, b_j), or None where they are too many to be worth it.

        The largest entry of every row and column is kept.
        """
        n, m = self.K.shape
        weights = (self.problem.a / self.total).unsqueeze(1)
        high = torch.zeros_like(self.c)
        for rows in self.blocks():
            high = torch.maximum(high, (self.K[rows] * weights[rows]).amax(0))
        counts = np.zeros(n + 1, dtype=np.int64)
        for rows in self.blocks():
            counts[1:][rows] = self._kept(rows, delta, high, weights).sum(1).cpu().numpy()
        starts = counts.cumsum()
        if starts[-1] > CROWDED * n * m:
            return None
        # Filled in place: many small arrays would leave the heap in pieces as large as the matrix.
        columns, values = np.empty(starts[-1], dtype=np.int32), np.empty(starts[-1])
        for rows in self.blocks():
            i, j = self._kept(rows, delta, high, weights).nonzero(as_tuple=True)
            part = slice(starts[rows.start], starts[rows.stop])
            columns[part] = j.cpu().numpy()
            values[part] = (self.K[rows][i, j].double() * weights[rows, 0][i]).cpu().numpy()
        return sp.csr_array((values, columns, starts.astype(np.int32)), shape=(n, m))

    def _kept(self, rows: slice, delta: float, high: Tensor, weights: Tensor) -> Tensor:
        """Return which entries of a block are large, or the largest of their row or column."""
        level = delta * torch.minimum(self.problem.a[rows].unsqueeze(1), self.problem.b)
        # In the scale of K the largest entry of a row is 1.
        level = torch.minimum(torch.minimum(level, high) / weights[rows], level.new_tensor(1.0))
        return self.K[rows] >= (level * (1 - 1e-6)).to(self.K.dtype)


class DensePasses:
    """Sweeps over one stored cost; two buffers, so that a trial never destroys the point it starts from."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.cost = problem, problem.cost
        self.free: list[Tensor] = []

    def at(self, g: Tensor, eps: float) -> DensePass:
        """Sweep at g; at most one other pass may be in use, see :meth:`release`."""
        return DensePass(self, g, eps, self.buffer())

    def buffer(self) -> Tensor:
        """Return room for a pass."""
        return self.free.pop() if self.free else torch.empty_like(self.cost)

    def release(self, old: DensePass) -> None:
        """Take the buffer of a pass back; the pass is of no use afterwards."""
        self.free.append(old.K)

    def forget(self, old: DensePass) -> None:
        """Give the memory of a pass and of all free buffers back."""
        self.free.clear()
        old.K = old.K.new_empty(0)


def row_blocks(x: Tensor, block_bytes: int | None = None) -> list[slice]:
    """Return slices of rows that each fill a block."""
    n, m = x.shape
    step = max(1, (block_bytes or BLOCK_BYTES.get(x.device.type, 1 << 26)) // max(1, m * x.element_size()))
    # A last block of a few rows costs as much overhead as a full one.
    step = math.ceil(n / max(1, round(n / step)))
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]
