"""Ascent of the dual by sweeps that recompute every cost: plain corrected steps, and Newton where those are slow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from stochproc.ot._lazy_pass import Mode
from stochproc.ot._outcome import Tracker
from stochproc.solvers import CG

__all__ = ["LazyClimb"]

# Largest |log(b / c)| at which a Newton step is tried: beyond, b / c - 1 is no stand-in for the logarithm.
GUARD = 1.0
MAX_GUARDS = 5
MAX_SWEEPS = 3
# The limit of products is doubled up to this where Newton steps that reach it do not halve err.
MOST_CG = 320
# Directions that are stored where the preconditioner is not symmetric.
MAX_STORED = 20
# Points in a row without err halving, after which it is at the rounding of the passes and only wanders.
PATIENCE = 60
STEPS = (1.0, 0.5, 0.25, 1 / 16, 1 / 64, 1 / 256, 1 / 4096, 1 / 65536, 1 / 2**20)


@runtime_checkable
class Point(Protocol):
    """What a sweep at a potential of the columns knows."""

    g: Tensor
    c: Tensor
    eps: float
    phi: float
    err: float
    mode: Mode

    def log_ratio(self) -> Tensor: ...
    def product(self, p: Tensor) -> Tensor: ...
    def diagonal(self) -> Tensor: ...


@runtime_checkable
class Passes(Protocol):
    """Where sweeps come from."""

    b: Tensor

    def at(self, g: Tensor, eps: float, mode: Mode) -> Any: ...


Correction = Callable[[Any, Tensor], Tensor]


@dataclass
class LazyClimb:
    """Steps from one potential to a better one, at a fixed eps.

    Parameters
    ----------
    passes : Passes
    tracker : Tracker
    correction : callable or None
        Maps a point and the excess r = b - c of its columns to the smooth part of S^-1 r.
    slow : float
        Ratio of err after and before a plain step above which Newton steps take over.
    span : float
        Size of the costs, for their rounding.
    max_cg : int
        Products of one Newton step at most, to begin with.
    newton : bool
        Whether to start with Newton steps.
    """

    passes: Passes
    tracker: Tracker
    correction: Correction | None
    slow: float
    span: float
    max_cg: int = 20
    newton: bool = False
    capped: bool = field(default=False, init=False)
    """Whether the last solve ended at ``max_cg``."""

    def climb(self, point: Any, tol: float, mode_of: Callable[[Any], Mode]) -> Any:
        """Improve a point until its err is at most tol, the tracker ends, or no step helps.

        ``mode_of`` gives the mode of the sweep after a point. The best point of the last mode is returned.
        """
        guards = sweeps = stale = 0
        best, milestone = point, point.err
        while point.err > tol and self.tracker.ended is None and math.isfinite(point.err):
            if point.err < best.err or not _alike(point.mode, best.mode):
                best = point
            if point.err <= 0.5 * milestone:
                milestone, stale = point.err, 0
            stale += 1
            if stale > PATIENCE:
                break
            mode, ratio = mode_of(point), point.log_ratio()
            if not self.newton:
                plain = self._plain_step(point, ratio, mode)
                self.newton = plain.err > self.slow * point.err
                if self._accepts(point, plain):
                    point = plain
                continue
            if guards < MAX_GUARDS and float(ratio.abs().max()) > GUARD:
                guards += 1
                self.tracker.count("sinkhorn")
                point = self._at(point.g + point.eps * ratio, point.eps, mode)
                continue
            guards = 0
            trial: Any = self._newton_step(point, tol, mode)
            if trial is None or trial.err > 0.5 * point.err:
                self._work_harder(trial is None)
            if trial is not None:
                point, sweeps = trial, 0
                continue
            sweeps += 1
            if sweeps > MAX_SWEEPS or self.tracker.ended is not None:
                break
            self.tracker.count("sinkhorn")
            point = self._at(point.g + point.eps * ratio, point.eps, mode)
        return best if best.err < point.err and _alike(best.mode, point.mode) else point

    def _work_harder(self, failed: bool) -> None:
        """Solve the next Newton system further; by its diagonal, where the coarse correction led nowhere."""
        if self.capped or failed:
            self.max_cg = min(2 * self.max_cg, MOST_CG)
        if failed:
            self.correction = None

    def _plain_step(self, point: Point, ratio: Tensor, mode: Mode) -> Point:
        self.tracker.count("sinkhorn")
        if self.correction is not None:
            ratio = ratio + self.correction(point, self.passes.b - point.c)
        return self._at(point.g + point.eps * ratio, point.eps, mode)

    def _newton_step(self, point: Point, tol: float, mode: Mode) -> Point | None:
        """Return the sweep at an accepted step along the truncated Newton direction."""
        b, tracker = self.passes.b, self.tracker
        gradient, ridge = b - point.c, 1e-3 * min(1.0, point.err) * b

        # Sinkhorn steps may have left columns with next to nothing.
        inverse = 1 / torch.maximum(point.diagonal() + ridge, 1e-3 * b)

        def precondition(r: Tensor) -> Tensor:
            z = inverse * r
            return z if self.correction is None else z + self.correction(point, r)

        def product(p: Tensor) -> Tensor:
            tracker.count("passes")
            return point.product(p) + ridge * p

        # No closer than this step can make use of, on the way to tol.
        rtol = min(max(0.03, 0.25 * tol / point.err), 0.3)
        if self.correction is None:
            rtol = min(0.1, math.sqrt(point.err))
        cg = CG(
            rtol=rtol,
            max_iter=self.max_cg,
            precond=precondition,
            project=lambda p: p - p.mean(),
            flexible=MAX_STORED if self.correction is not None else False,
            verify=False,
        )
        found = cg(product, gradient)
        self.capped = found.convergence.iterations >= self.max_cg
        tracker.count("newton")
        tracker.count("cg", found.convergence.iterations)
        direction = point.eps * found.value
        slope = float(gradient @ direction)
        if not (slope > 0 and math.isfinite(slope)):
            return None
        for step in STEPS:
            trial = self._at(point.g + step * direction, point.eps, mode)
            tracker.count("line_search")
            if trial.phi - point.phi >= 1e-4 * step * slope or self._accepts(point, trial):
                return trial
            if tracker.ended is not None:
                break
        return None

    def _accepts(self, point: Point, trial: Point) -> bool:
        """Whether err falls and the dual value does not, beyond rounding and what the modes leave out."""
        inexact = not (point.mode.exact and trial.mode.exact)
        noise = 1e-8 * self.span if inexact else 1e-15 * self.span + 1e-13 * abs(point.phi)
        return trial.err < point.err and trial.phi - point.phi >= -noise

    def _at(self, g: Tensor, eps: float, mode: Mode) -> Point:
        point = self.passes.at(g, eps, mode)
        self.tracker.record(eps, point.err, point.phi)
        return point


def _alike(one: Mode, other: Mode) -> bool:
    """Whether the errs of two sweeps can be compared: the same pairs in the same precision."""
    return one.single == other.single and one.ranges is other.ranges
