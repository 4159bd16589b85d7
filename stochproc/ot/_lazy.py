"""Entropic transport between point clouds whose cost matrix is never formed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc.ot import _two_grid
from stochproc.ot._lazy_climb import LazyClimb
from stochproc.ot._lazy_pass import LazyPasses, LazyPoint, Mode
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import span_of_points

__all__ = ["scaled_points", "solve_lazy"]

# Costs that span less than this many eps are left to Sinkhorn.
EASY = 10.0
ANNEAL_FROM, ANNEAL_BY, ANNEAL_TOL = 8.0, 4.0, 1e-2
WARM_ERR = 0.5
# Ratio of err from one step to the next above which Newton takes over: half a step, or half ten Sinkhorn sweeps.
SLOW_PLAIN, SLOW_SINKHORN = 0.5, 0.5**0.1
# From how many pairs on single precision and patterns are worth their certificate.
LARGE = 4e6
# Denser patterns cost more than all pairs.
MAX_DENSITY = 0.3
FIRST_THRESHOLD = 1e-12
# What err float32 reaches, relative to span / eps; on a pattern exponents are small.
SINGLE_FLOOR, SINGLE_FLOOR_NEAR = 1e-8, 1e-9
# Part of tol at which the certificate is taken.
MARGIN = 0.8
ROUNDS = 8


def solve_lazy(
    X: Tensor,
    Y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    metric: Any,
    tracker: Tracker,
    g0: Tensor | None = None,
) -> Outcome:
    """Solve a balanced problem between weighted points; memory grows with n + m.

    Parameters
    ----------
    X, Y : Tensor of shape (n, d) and (m, d)
        float32 or float64, finite, without gradients.
    a, b : Tensor of shape (n,) and (m,)
        float64, positive, of sum 1.
    eps : float
        Positive, in the unit of the cost.
    metric : {"sqeuclidean", "euclidean", "cityblock"} or callable
        As the cost of :func:`stochproc.kernels.softmax_pass`.
    tracker : Tracker
        Says when to stop; ``stats`` gets "rule", and of the levels "cells", "levels", "coarse_passes",
        "coarse_cg", "coarse_err", "density" and "products".
    g0 : Tensor of shape (m,), default=None
        Potential of the columns to start from.

    Returns
    -------
    Outcome
        Its err is that of a sweep over all pairs in float64, and f is the exact row potential of g.
    """
    X, Y, unit = scaled_points(X, Y, metric)
    solver = _Lazy(X, Y, a, b, eps / unit, metric, tracker)
    point = solver.run(None if g0 is None else g0.double() / unit)
    g = point.g[solver.back_y] if solver.back_y is not None else point.g
    f = point.f[solver.back_x] if solver.back_x is not None else point.f
    status = tracker.status_of(point.err)
    return Outcome(f * unit, g * unit, point.err, status, tracker.message_of(point.err, solver.floor()))


class _Lazy:
    """One problem on its way from a first potential to a certified one."""

    def __init__(self, X: Tensor, Y: Tensor, a: Tensor, b: Tensor, eps: float, metric: Any, tracker: Tracker) -> None:
        self.X, self.Y, self.a, self.b, self.eps, self.metric, self.tracker = X, Y, a, b, eps, metric, tracker
        self.span = span_of_points(X, Y, metric)
        self.back_x: Tensor | None = None
        self.back_y: Tensor | None = None
        self.grid: _two_grid.TwoGrid | None = None
        self.patterns: tuple[Any, Any] | None = None
        self.threshold = FIRST_THRESHOLD
        large = len(X) * len(Y) >= LARGE
        self.masked = large
        # A user's function gets points of the dtype that the user gave.
        self.single = large and isinstance(metric, str)

    def run(self, g0: Tensor | None) -> LazyPoint:
        """Return the last point: exact, whatever the status."""
        stats, easy = self.tracker.stats, self.span <= EASY * self.eps
        if not easy:
            self.grid = self._build()
        self.corrected = self.grid is not None and self.grid.laplacian is not None
        stats["rule"] = "two-grid" if self.corrected else "sinkhorn" if easy else "newton"
        if self.grid is None:
            self.masked = False
            self.passes = LazyPasses(self.X, self.Y, self.a, self.b, self.metric)
            return self._annealed(g0)
        x, y = (torch.from_numpy(t.order.astype(np.int64)).to(self.X.device) for t in (self.grid.x, self.grid.y))
        self.back_x, self.back_y = x.argsort(), y.argsort()
        self.passes = LazyPasses(self.X[x], self.Y[y], self.a[x], self.b[y], self.metric)
        self._mask()
        point = None if g0 is None else self._warm(g0[y])
        if point is None:
            point = self._at(self.grid.start(self.passes.Y), self.eps)
        return self._certified(point, self._climb())

    def _build(self) -> _two_grid.TwoGrid | None:
        X, Y, user = self.X, self.Y, not isinstance(self.metric, str)
        if X.shape[1] > 3 or (user and X.is_cuda):
            return None
        clouds = [t.cpu().numpy() for t in (X, Y, self.a, self.b)]
        x, y, a, b = clouds
        return _two_grid.build(x, y, a, b, self.eps, self.metric, self.tracker.stats, self.tracker.tol)

    def _mask(self) -> None:
        """Find the pattern of blocks at the present threshold, if it leaves out enough."""
        if self.grid is None or not self.masked:
            return
        forward, back, density = self.grid.pattern(self.threshold)
        self.tracker.stats["density"] = density
        self.masked = density < MAX_DENSITY
        self.patterns = (forward, back) if self.masked else None

    def _annealed(self, g0: Tensor | None) -> LazyPoint:
        point: Any = None if g0 is None else self._warm(g0)
        if point is not None:
            return self._certified(point, self._climb())
        eps = max(self.eps, self.span / ANNEAL_FROM)
        point = self._at(torch.zeros_like(self.b), eps)
        while eps > self.eps:
            point = self._climb().climb(point, ANNEAL_TOL, self._mode)
            if self.tracker.ended is not None:
                self.tracker.count("passes")
                return self.passes.at(point.g, self.eps, Mode())
            eps = max(self.eps, eps / ANNEAL_BY)
            point = self._at(point.g, eps)
        return self._certified(point, self._climb())

    def _climb(self) -> LazyClimb:
        if self.corrected:
            return LazyClimb(self.passes, self.tracker, self._correction, SLOW_PLAIN, self.span)
        return LazyClimb(self.passes, self.tracker, None, SLOW_SINKHORN, self.span)

    def _correction(self, point: LazyPoint, r: Tensor) -> Tensor:
        back = self.patterns[1] if self.patterns is not None and point.mode.ranges is not None else None
        grid: Any = self.grid
        return grid.correction(self.passes.points(point.mode)[1], r, back)

    def _warm(self, g: Tensor) -> LazyPoint | None:
        point = self._at(g, self.eps)
        return point if point.err <= WARM_ERR or self.tracker.ended is not None else None

    def _certified(self, point: LazyPoint, climb: LazyClimb) -> LazyPoint:
        """Climb, and end with a sweep over all pairs in float64; what that finds wanting is made exact step by step."""
        tol, tracker = self.tracker.tol, self.tracker
        while True:
            exact = not (self.single or self.masked)
            target = tol if exact else MARGIN * tol
            point = climb.climb(point, target, self._mode)
            if point.mode.exact and (point.err <= tol or exact or tracker.ended is not None):
                return point
            stuck = point.err > target
            if tracker.ended is None:
                point = self._at(point.g, self.eps, Mode())
            else:
                tracker.count("passes")
                point = self.passes.at(point.g, self.eps, Mode())
            if point.err <= tol or tracker.ended is not None:
                return point
            if stuck:
                self.single = self.masked = False
                self.patterns = None
            else:
                self._refine()

    def _refine(self) -> None:
        """Leave out less: the threshold first, then single precision."""
        if self.masked:
            self.single = self.single and self.threshold == FIRST_THRESHOLD
            self.threshold /= 100
            self.masked = self.threshold > 1e-30
            self._mask()
            if not self.masked:
                self.patterns = None
        else:
            self.single = False

    def _mode(self, point: LazyPoint | None = None) -> Mode:
        """Return how to sweep after this point."""
        ranges = None if self.patterns is None else self.patterns[0]
        floor = (SINGLE_FLOOR if ranges is None else SINGLE_FLOOR_NEAR) * self.span / self.eps
        enough = self.tracker.tol >= floor or point is None or point.err > 100 * floor
        return Mode(self.single and enough, ranges)

    def _at(self, g: Tensor, eps: float, mode: Mode | None = None) -> LazyPoint:
        point = self.passes.at(g, eps, mode or self._mode())
        self.tracker.record(eps, point.err, point.phi)
        return point

    def floor(self) -> str:
        """Say what err rounding allows."""
        single = self.X.dtype == torch.float32 and not isinstance(self.metric, str)
        floor = (5e-9 if single else 1e-17) * self.span / self.eps
        return f"rounding in {'float32' if single else 'float64'} allows about {floor:.1e} at this reg."


def scaled_points(X: Tensor, Y: Tensor, metric: Any) -> tuple[Tensor, Tensor, float]:
    """Centre and scale both clouds in float64, by a power of two; costs are in ``unit`` times the new ones."""
    if not isinstance(metric, str):
        return X, Y, 1.0
    X, Y = X.double(), Y.double()
    low = torch.minimum(X.amin(0), Y.amin(0))
    high = torch.maximum(X.amax(0), Y.amax(0))
    centre, size = low + 0.5 * (high - low), float((high - low).max())
    scale = 2.0 ** round(math.log2(size)) if size > 0 else 1.0
    return (X - centre) / scale, (Y - centre) / scale, scale**2 if metric == "sqeuclidean" else scale
