"""The coarse half of the two-grid Newton: levels of cells at falling eps, and what the last one does for points.

A Sinkhorn half-step removes every error finer than the width w of the kernel; a Newton step between cells no larger
than 2 w removes the smoother ones, prolonged to points by the softmax over cells (a piecewise constant prolongation
diverges).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stochproc.kernels import logsumexp, softmax_pass
from stochproc.ot._cells import Cells, cells_of_points, cut
from stochproc.ot._coarse import (
    COARSE_TOL,
    CellLaplacian,
    CellPlan,
    CrowdedError,
    cell_support,
    solve_cells,
    solve_cells_densely,
)
from stochproc.ot._dist import cost_matrix
from stochproc.ot._outcome import Tracker
from stochproc.ot._point_form import flipped
from stochproc.ot._two_grid_width import kernel_width

__all__ = ["TwoGrid", "build"]

Array = NDArray[Any]
Pattern = tuple[Tensor, Tensor, Tensor, Tensor]
# The dense coarsest problem; levels above it are stored by their support.
DENSE_CELLS = 1100
# Sides of cells in kernel widths, tried in turn, and the number of cells up to which each is taken: a cell is linked to
# some 180 / side^2 others in the plane, to 1700 / side^3 in space.
SIDES = {
    1: ((1.0, 50_000), (2.0, 100_000)),
    2: ((1.0, 2000), (1.25, 7000), (1.6, 15_000), (2.0, 50_000)),
    3: ((1.25, 1000), (1.6, 2000), (2.0, 8000)),
}
# Cells of which there are more than this part of the points are single points, up to so many points.
SINGLE_PART = 0.7
MAX_SINGLE = {1: 200_000, 2: 100_000, 3: 10_000}
# Beyond, cells are wider than 2 w; they still give a start and a pattern, not a correction.
ROUGH_CELLS = 5000
# Cells along the longest side at least.
LEAST_CELLS = {1: 500, 2: 32, 3: 8}
LADDER = 4.0
MAX_COARSE_PASSES = 2000


class TwoGrid:
    """The last level of cells; points are taken in the order of their cells, see :attr:`x` and :attr:`y`.

    Where cells are too wide for a correction, :attr:`laplacian` is None.
    """

    def __init__(self, metric: Any, x: Cells, y: Cells, solved: CellPlan, eps: float, fine: bool) -> None:
        self.metric, self.x, self.y, self.solved, self.eps = metric, x, y, solved, eps
        self.laplacian = CellLaplacian(solved.plan, x.mass) if fine else None
        self.flipped = flipped(metric)
        self.height = solved.f + eps * torch.from_numpy(x.mass).log()

    def start(self, Y: Tensor) -> Tensor:
        """Return the potential of the sorted points Y that belongs to that of the row cells."""
        centre, height = self.x.centre.to(Y), self.height.to(Y)
        return -self.eps * logsumexp(self.flipped, Y, centre, height, eps=self.eps, backend="chunked").double()

    def correction(self, Y: Tensor, r: Tensor, ranges: Pattern | None) -> Tensor:
        """Return the smooth part of S^-1 r at the sorted points Y; ``ranges`` is the pattern of columns to rows."""
        if self.laplacian is None:
            raise RuntimeError("cells wider than 2 w give no correction.")
        d = self.laplacian.solve(self.y.sums(r.cpu().numpy()))
        u = torch.from_numpy(self.laplacian.spread(d)).to(Y.device)
        centre, height = self.x.centre.to(Y), self.height.to(Y.device)
        out = softmax_pass(
            self.flipped,
            Y,
            centre,
            height,
            torch.ones_like(r),
            eps=self.eps,
            v=u.unsqueeze(1),
            ranges=ranges,
            backend="chunked",
        )
        product: Any = out.Kv
        return product.squeeze(1).double()

    def pattern(self, threshold: float) -> tuple[Pattern, Pattern, float]:
        """Return the blocks of points whose cells are linked, those of columns to row cells, and their density."""
        x, y, plan = self.x, self.y, self.solved.plan
        if threshold < 1e-12:
            a, b = torch.from_numpy(x.mass), torch.from_numpy(y.mass)
            f, g = self.solved.f, self.solved.g
            plan = cell_support(self.metric, x.centre, y.centre, f, g, a, b, self.eps, threshold)
        rows, columns = np.diff(x.starts), np.diff(y.starts)
        links = plan.copy()
        links.data = np.ones(len(links.data))
        density = float(rows @ (links @ columns)) / float(rows.sum() * columns.sum())
        back = links.T.tocsr()
        forward = _ranges(x.starts, y.starts, plan)
        return forward, _ranges(y.starts, np.arange(len(x) + 1), back), density


def _ranges(x_starts: Array, y_starts: Array, links: Any) -> Pattern:
    parts = (x_starts, y_starts, links.indptr, links.indices)
    one, two, three, four = (torch.from_numpy(np.ascontiguousarray(t)) for t in parts)
    return one, two, three, four


def build(
    X: Array, Y: Array, a: Array, b: Array, eps: float, metric: Any, stats: dict[str, Any], tol: float
) -> TwoGrid | None:
    """Solve levels of cells down to eps; None if a user's cost is not finite between cells.

    Where a dense problem has one cell a point it is the problem itself, and is solved to ``tol``.
    """
    width = kernel_width(metric, X, Y)
    grids = _Grid(X, a, metric), _Grid(Y, b, metric)
    tracker = Tracker(COARSE_TOL, MAX_COARSE_PASSES)
    at = eps
    while max(len(grid.cut(width(at))[0]) for grid in grids) > DENSE_CELLS:
        at *= LADDER
    solved = old = None
    levels = 0
    while True:
        x, y, solved, fine = _level(
            grids, metric, width(at), at, old, solved, tracker, 0.1 * tol if at <= eps else COARSE_TOL
        )
        if solved is None:
            return None
        old, levels = x, levels + 1
        if at <= eps:
            break
        # Powers of 4 give eps back exactly.
        at = max(eps, at / LADDER)
    stats |= {"levels": levels, "cells": (len(x), len(y)), "coarse_err": solved.err}
    stats |= {"coarse_passes": tracker.stats["passes"], "coarse_cg": tracker.stats["cg"]}
    return TwoGrid(metric, x, y, solved, eps, fine)


def _level(
    grids: tuple[_Grid, _Grid],
    metric: Any,
    w: float,
    eps: float,
    old: Cells | None,
    before: CellPlan | None,
    tracker: Tracker,
    tol: float,
) -> tuple[Cells, Cells, CellPlan | None, bool]:
    """Solve one level, with cells wider than asked for where too many of them would be linked."""
    widen = 1.0
    while True:
        (x, fine_x), (y, fine_y) = (grid.cut(w, widen) for grid in grids)
        A, B = torch.from_numpy(x.mass), torch.from_numpy(y.mass)
        if old is None or before is None:
            cost = cost_matrix(x.centre, y.centre, metric).double()
            if not bool(cost.isfinite().all()):
                return x, y, None, False
            if len(x) == len(grids[0].X) and len(y) == len(grids[1].X):
                tracker.tol = min(tracker.tol, tol)
            solved = solve_cells_densely(cost, A, B, eps, tracker)
            return x, y, solved, fine_x and fine_y
        height = before.f + eps * torch.from_numpy(old.mass).log()
        g = -eps * logsumexp(flipped(metric), y.centre, old.centre, height.to(old.centre), eps=eps, backend="chunked")
        try:
            solved = solve_cells(metric, x.centre, y.centre, A, B, g.double(), eps, tracker)
        except CrowdedError:
            widen *= 1.4
            continue
        return x, y, solved, fine_x and fine_y


class _Grid:
    """Cuts one cloud into cells."""

    def __init__(self, X: Array, weights: Array, metric: Any) -> None:
        self.X, self.weights = X, weights
        # A user's function is asked about the points it was made for alone.
        self.central = not isinstance(metric, str)
        self.extent = float(np.ptp(X, axis=0).max())

    def cut(self, w: float, widen: float = 1.0) -> tuple[Cells, bool]:
        """Cut for a kernel of width w, and say whether cells are at most 2 w wide; ``widen`` more than else."""
        n, d = self.X.shape
        if self.extent == 0:
            return cut(self.X, self.weights, 1.0, central=self.central), True
        # Small cells cost little where there are few of them.
        most = self.extent / (LEAST_CELLS[d] - 1e-6)
        side = most
        for sides, allowed in SIDES[d]:
            side = widen * min(sides * w, most)
            cells = cut(self.X, self.weights, side, central=self.central)
            if len(cells) > SINGLE_PART * n and n <= MAX_SINGLE[d]:
                return cells_of_points(self.X, self.weights, side), True
            if len(cells) <= allowed:
                return cells, side <= 2 * w
        while len(cells) > ROUGH_CELLS:
            side *= 1.3
            cells = cut(self.X, self.weights, side, central=self.central)
        return cells, side <= 2 * w
