r"""Newton systems of the semi-dual: the graph Laplacian of the columns, and what preconditions it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from stochproc.ot._problem import Problem
from stochproc.solvers import safe_cholesky, truncated_cg

__all__ = ["LaplacianSolver", "Point", "centred"]

# Iterations of one solve beyond which a factorisation pays for the next.
SLOW = 60
MAX_CG = 300
DENSE_UP_TO = 2000
# Column sums below this are taken for it.
LIGHTEST = 1e-300
# Part of a row's or column's mass above which an entry is kept: at first, and at least.
TRUNCATION, LOWEST = 1e-6, 1e-18


@runtime_checkable
class Point(Protocol):
    """What a sweep offers to the Newton system."""

    problem: Problem
    c: Tensor
    err: float

    def product(self, p: Tensor) -> Tensor: ...
    def self_mass(self) -> Tensor: ...
    def truncated(self, delta: float) -> Any: ...
    def gram(self) -> Tensor: ...


def centred(x: Tensor) -> Tensor:
    """Remove the mean: S is singular along the vector of ones."""
    return x - x.mean()


class LaplacianSolver:
    """Solves (S + Lam) d = rhs inexactly, and learns from one solve how to precondition the next."""

    def __init__(self) -> None:
        self.level: float | None = None
        """Entries of the plan that the factored preconditioner keeps; None while the diagonal is good enough."""
        self.crowded = False

    def solve(self, point: Point, rhs: Tensor, ridge: Tensor, rtol: float) -> tuple[Tensor, int]:
        """Return a direction and the iterations of conjugate gradients it took."""
        # In the variables sqrt(c) d, where the null direction is sqrt(c): a plain mean of residuals would put rounding
        # of the size of heavy columns on light ones, whose entries in the inverse are larger by as much.
        root = point.c.clamp(min=LIGHTEST).sqrt()
        null = root / torch.linalg.vector_norm(root)
        scaled, total = rhs / root, 0

        def product(q: Tensor) -> Tensor:
            p = q / root
            return (point.product(p) + ridge * p) / root

        def project(q: Tensor) -> Tensor:
            return q - (null @ q) * null

        for factor in (self._factored, diagonal):
            inverse = factor(point, ridge)
            if inverse is None:
                continue
            precond = partial(_rescaled, inverse, root)
            result = truncated_cg(product, scaled, precond=precond, project=project, rtol=rtol, max_iter=MAX_CG)
            direction, iterations = result.value / root, result.convergence.iterations
            total += iterations
            # A factor of a nearly singular matrix may have lost its sign to rounding; the diagonal cannot.
            if float(rhs @ direction) > 0:
                break
        if iterations > SLOW:
            self.level = TRUNCATION if self.level is None else max(self.level * 1e-3, LOWEST)
        return direction, total

    def _factored(self, point: Point, ridge: Tensor) -> Callable[[Tensor], Tensor] | None:
        if self.level is None:
            return None
        kept = None if self.crowded else point.truncated(self.level)
        if kept is not None:
            return sparse_factor(kept, ridge)
        self.crowded = True
        return dense_factor(point.gram(), ridge) if ridge.shape[0] <= DENSE_UP_TO else None


def _rescaled(inverse: Callable[[Tensor], Tensor], root: Tensor, q: Tensor) -> Tensor:
    return root * inverse(root * q)


def diagonal(point: Point, ridge: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the inverse of the diagonal of S, kept away from what cancels."""
    inverse = 1 / (torch.maximum(point.c - point.self_mass(), 0.01 * point.c) + ridge)
    return lambda p: inverse * p


def dense_factor(W: Tensor, ridge: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Factor the Laplacian of the links W; None where rounding makes it indefinite."""
    # The diagonal is the sum of the links, without the cancellation of c_j - W_jj.
    S = -W.fill_diagonal_(0.0)
    S.diagonal().copy_(W.sum(1) + ridge)
    factor = safe_cholesky(S, tries=0)
    if not factor.ok:
        return None
    return lambda p: torch.cholesky_solve(p.unsqueeze(1), factor.value).squeeze(1)


def sparse_factor(kept: sp.csr_array, ridge: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Factor the Laplacian of a truncated plan, its diagonal counting kept links alone; None where it is singular."""
    rows = np.asarray(kept.sum(1)).ravel()
    # Kept plans have a positive entry in every row.
    half = sp.diags_array(1 / np.sqrt(rows)) @ kept
    W = (half.T @ half).tocsc()
    degree = np.asarray(W.sum(1)).ravel()
    L = (sp.diags_array(degree + ridge.cpu().numpy()) - W).tocsc()
    try:
        factor = splu(L, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    except RuntimeError:
        # Exactly singular.
        return None

    def apply(p: Tensor) -> Tensor:
        return torch.from_numpy(factor.solve(p.cpu().numpy())).to(p)

    return apply
