"""Transport between cells: a plan stored on its support in CSR, and the Laplacian that corrects finer levels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from stochproc.kernels import logsumexp, softmax_pass, support
from stochproc.ot._lazy_climb import LazyClimb
from stochproc.ot._lazy_pass import Mode
from stochproc.ot._newton import newton
from stochproc.ot._outcome import Tracker
from stochproc.ot._problem import Problem
from stochproc.solvers import CG, safe_cholesky

__all__ = ["CellLaplacian", "CellPlan", "CrowdedError", "cell_support", "solve_cells", "solve_cells_densely"]

Array = NDArray[Any]
LOG2E = math.log2(math.e)
# A plan of cells is a model of the plan of points: solving it further than this gains nothing there.
COARSE_TOL = 1e-3
MAX_CG = 300
# Entries below this part of the lighter of the two weights are not stored.
NEGLIGIBLE = 1e-12
# Sizes up to which the Laplacian of the column cells is factored densely.
DENSE_UP_TO = 2000
# Relative damping of directions that the plan hardly links.
RIDGE = 1e-9
# Pairs of cells looked at in one search for the support.
SIFTED_PAIRS = 1 << 22
# Links of one level; a sweep takes some 60 bytes of each.
MAX_LINKS = 2_500_000


class CrowdedError(Exception):
    """More cells are linked than memory is meant for."""


@dataclass(frozen=True, eq=False)
class CellPlan:
    """A solved problem between cells; float64 on the CPU."""

    f: Tensor
    g: Tensor
    err: float
    plan: sp.csr_array
    """(row cells, column cells), rows exact, on the support alone."""


def solve_cells_densely(cost: Tensor, a: Tensor, b: Tensor, eps: float, tracker: Tracker) -> CellPlan:
    """Solve a problem of few cells from scratch."""
    low = cost.amin(1, keepdim=True)
    reduced = cost - low
    problem = Problem(reduced, a, b, eps, float(reduced.max()))
    found = newton(problem, tracker)
    plan = ((found.f[:, None] + found.g - reduced) / eps).exp_().mul_(a[:, None]).mul_(b)
    kept = plan > NEGLIGIBLE * torch.minimum(a[:, None], b)
    plan.masked_fill_(~kept, 0.0)
    return CellPlan(found.f + low.squeeze(1), found.g, found.err, sp.csr_array(plan.numpy()))


def solve_cells(
    metric: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, g: Tensor, eps: float, tracker: Tracker
) -> CellPlan:
    """Solve a problem of many cells from a good start, on the support of its plan."""
    f, g = _exact_rows(metric, x, y, a, b, g, eps)[:2]
    for _ in range(3):
        cost = cell_support(metric, x, y, f, _raised(metric, x, y, a, b, f, g, eps), a, b, eps, NEGLIGIBLE)
        passes = SupportPasses(cost, a, b)
        steps = LazyClimb(passes, tracker, None, 0.0, passes.span, max_cg=MAX_CG, newton=True)
        point: SupportPoint = steps.climb(passes.at(g, eps, Mode()), tracker.tol, lambda _: Mode())
        f, g, err = _exact_rows(metric, x, y, a, b, point.g, eps)
        # What lies outside the support shows here.
        if err <= 10 * COARSE_TOL or tracker.ended is not None:
            break
    return CellPlan(f, g, err, point.plan())


def _exact_rows(
    metric: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, g: Tensor, eps: float
) -> tuple[Tensor, Tensor, float]:
    out = softmax_pass(metric, x, y, g + eps * b.log(), a, eps=eps, backend="chunked")
    return -eps * out.lse, g, float((out.mass - b).abs().sum())


def _raised(metric: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """Raise g where a column has too little mass, so that the support leaves no column empty."""
    flipped = metric if isinstance(metric, str) else lambda q, p: metric(p, q).mT
    full = -eps * logsumexp(flipped, y, x, f + eps * a.log(), eps=eps, backend="chunked")
    return torch.maximum(g, full)


def cell_support(
    metric: Any, x: Tensor, y: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float, threshold: float
) -> sp.csr_array:
    """Return the costs of the pairs with P_ij > threshold min(a_i, b_j)."""
    log_a, log_b = a.log(), b.log()
    level = math.log(threshold) + torch.minimum(log_a, log_b.min())
    height_x, height_y = f + eps * log_a, g + eps * log_b
    counts, columns, costs, found = [], [], [], 0
    # What is found above the level of a row is more than what is kept, so it is sifted a few rows at a time.
    step = max(1, SIFTED_PAIRS // len(y))
    for start in range(0, len(x), step):
        at = slice(start, start + step)
        i, j, c = support(metric, x[at], y, height_x[at], height_y, level[at], eps=eps)
        c = c.double()
        # P_ij / min(a_i, b_j) = max(a_i, b_j) exp((f_i + g_j - c_ij) / eps).
        exponent = (f[at][i] + g[j] - c) / eps + torch.maximum(log_a[at][i], log_b[j])
        kept = exponent > math.log(threshold)
        counts.append(np.bincount(i[kept].numpy(), minlength=min(step, len(x) - start)))
        columns.append(j[kept].numpy().astype(np.int32))
        costs.append(c[kept].numpy())
        found += len(costs[-1])
        if found > MAX_LINKS:
            raise CrowdedError
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32)
    return sp.csr_array((np.concatenate(costs), np.concatenate(columns), starts), shape=(len(x), len(y)))


class SupportPoint:
    """One sweep over the support at a potential g of the columns."""

    def __init__(self, passes: SupportPasses, g: Tensor, eps: float) -> None:
        self.passes, self.eps, self.g, self.mode = passes, eps, g, Mode()
        cost, scale = passes.cost, LOG2E / eps
        h = (g + eps * passes.b.log()).numpy() * scale
        z = h[cost.indices]
        z -= scale * cost.data
        starts, counts = cost.indptr[:-1], np.diff(cost.indptr)
        top = np.maximum.reduceat(z, starts)
        z -= np.repeat(top, counts)
        np.maximum(z, -1000.0, out=z)
        np.exp2(z, out=z)
        total = np.add.reduceat(z, starts)
        z *= np.repeat(1 / total, counts)
        # The softmax by row.
        self.K = sp.csr_array((z, cost.indices, cost.indptr), shape=cost.shape)
        self.f = torch.from_numpy(-eps * (np.log2(total) + top) / LOG2E)
        self.c = self._columns(passes.a)
        self.phi = float(self.passes.a @ self.f + self.passes.b @ g)
        self.err = float((self.c - self.passes.b).abs().sum())

    def log_ratio(self) -> Tensor:
        """Return log b - log c, finite however small c is."""
        lost = self.c < 1e-280
        ratio = self.passes.b.log() - self.c.log()
        if bool(lost.any()):
            ratio[lost] = -self.passes.column_soft(self.f, self.eps)[lost] - self.g[lost] / self.eps
        return ratio

    def _columns(self, q: Tensor) -> Tensor:
        return torch.from_numpy(self.K.T @ q.numpy())

    def product(self, p: Tensor) -> Tensor:
        return self.c * p - self._columns(self.passes.a * torch.from_numpy(self.K @ p.numpy()))

    def diagonal(self) -> Tensor:
        """Return the diagonal of S, and a little more where it is next to nothing."""
        squared = sp.csr_array((np.square(self.K.data), self.K.indices, self.K.indptr), shape=self.K.shape)
        own = torch.from_numpy(squared.T @ self.passes.a.numpy())
        return torch.maximum(self.c - own, 0.01 * self.c)

    def plan(self) -> sp.csr_array:
        """Return P, with exact rows."""
        weights = np.repeat(self.passes.a.numpy(), np.diff(self.K.indptr))
        return sp.csr_array((self.K.data * weights, self.K.indices, self.K.indptr), shape=self.K.shape)


class SupportPasses:
    """Sweeps over the support of a plan between cells."""

    def __init__(self, cost: sp.csr_array, a: Tensor, b: Tensor) -> None:
        self.cost, self.a, self.b = cost, a, b
        self.span = float(cost.data.max() - cost.data.min())

    def at(self, g: Tensor, eps: float, mode: Mode) -> SupportPoint:
        """Sweep at g; there is one mode."""
        return SupportPoint(self, g - self.b @ g, eps)

    def column_soft(self, f: Tensor, eps: float) -> Tensor:
        """Return the log-sum-exp over the rows of each column."""
        owner = np.repeat(np.arange(self.cost.shape[0]), np.diff(self.cost.indptr))
        height = (f + eps * self.a.log()).numpy()[owner]
        z = sp.csr_array(((height - self.cost.data) / eps, self.cost.indices, self.cost.indptr), self.cost.shape)
        z = z.tocsc()
        starts, counts = z.indptr[:-1], np.diff(z.indptr)
        top = np.maximum.reduceat(z.data, starts)
        return torch.from_numpy(top + np.log(np.add.reduceat(np.exp(z.data - np.repeat(top, counts)), starts)))


class CellLaplacian:
    """Solves S d = r for S = diag(c) - P^T diag(1/a) P of a plan between cells."""

    def __init__(self, plan: sp.csr_array, a: Array) -> None:
        self.plan, self.a = plan, a
        self.c = np.asarray(plan.sum(0)).ravel()
        self.factor: Tensor | None = None
        self.iterations = 0
        if plan.shape[1] <= DENSE_UP_TO:
            # Scaled to a unit diagonal, so that light cells count like heavy ones.
            half = (sp.diags_array(1 / np.sqrt(a)) @ plan @ sp.diags_array(1 / np.sqrt(self.c))).tocsr()
            S = torch.from_numpy((half.T @ half).toarray()).neg_()
            root = torch.from_numpy(np.sqrt(self.c))
            S.fill_diagonal_(0.0)
            # From the links themselves: 1 minus the self-link would cancel.
            S.diagonal().copy_(RIDGE - (S @ root) / root)
            self.factor = safe_cholesky(S.addr_(root, root)).value

    def solve(self, r: Array) -> Array:
        """Return the solution of mean zero."""
        if self.factor is not None:
            root = np.sqrt(self.c)
            d = torch.cholesky_solve(torch.from_numpy(r / root).unsqueeze(1), self.factor).squeeze(1).numpy() / root
            return d - self.c @ d
        rhs = torch.from_numpy(r - r.mean())
        inverse = torch.from_numpy(1 / np.maximum(self.c - self._self_mass(), 0.01 * self.c))
        found = CG(
            rtol=1e-2,
            max_iter=500,
            precond=lambda p: inverse * p,
            project=lambda p: p - p.mean(),
            verify=False,
        )(self._product, rhs)
        self.iterations += found.convergence.iterations
        return found.value.numpy()

    def spread(self, d: Array) -> Array:
        """Return diag(1/a) P d."""
        return (self.plan @ d) / self.a

    def _product(self, p: Tensor) -> Tensor:
        v = p.numpy()
        return torch.from_numpy(self.c * v - self.plan.T @ self.spread(v))

    def _self_mass(self) -> Array:
        return np.asarray(self.plan.power(2).T @ (1 / self.a))
