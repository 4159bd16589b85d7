"""Truncated Newton on the semi-dual, annealed and guarded by Sinkhorn steps: the default solver."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from stochproc.ot._dense_pass import DensePasses
from stochproc.ot._laplacian import LaplacianSolver
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import Problem
from stochproc.ot._sinkhorn import Doubt
from stochproc.ot._sparse_pass import SparsePasses
from stochproc.solvers import LineSearch, Trial

__all__ = ["Ladder", "Passes", "newton", "outcome_of"]

# Largest |log(b / c)| at which a Newton step is tried: beyond, (b / c - 1) is no stand-in for the logarithm.
GUARD = 1.0
MAX_GUARDS = 5
ANNEAL_FROM, ANNEAL_BY, ANNEAL_TOL = 8.0, 3.0, 1e-2
# A warm start whose first pass is worse than this costs more than a cold one.
WARM_ERR = 0.5
# Largest move of a potential in one step, in units of eps.
LONGEST = 20.0
# Late truncation: from how many pairs on, at which err, and which entries of the plan stay, relative to the smaller
# weight of their pair.
SPARSE_FROM, SPARSE_ERR, SPARSE_LEVEL, SPARSE_ROUNDS = 1_000_000, 0.1, 1e-12, 3
# Sweeps over one support; what needs more is better done on all pairs.
SPARSE_PASSES = 200
# Last resorts in a row at the final eps after which nothing is expected any more.
MAX_SWEEPS = 3


@runtime_checkable
class Passes(Protocol):
    """Where sweeps over the pairs come from."""

    @property
    def problem(self) -> Any: ...
    def at(self, g: Tensor, eps: float) -> Any: ...
    def release(self, old: Any) -> None: ...


def newton(problem: Problem, tracker: Tracker, g0: Tensor | None = None, *, storage: str = "dense") -> Outcome:
    """Solve a reduced problem; ``g0`` is a potential of the columns to start from."""
    n, m = problem.shape
    sparse = storage == "sparse" or (storage == "auto" and n * m >= SPARSE_FROM)
    # SciPy's sparse products run on the CPU, and are worth it in float64 alone.
    sparse = sparse and problem.cost.device.type == "cpu" and problem.cost.element_size() == 8
    passes = DensePasses(problem)
    ladder = Ladder(passes, tracker)
    if not bool(problem.cost.amax() < math.inf):
        ladder.doubt = Doubt(problem, tracker)
    point = ladder.warm(g0) if g0 is not None else None
    tol = max(tracker.tol, SPARSE_ERR) if sparse else tracker.tol
    point = ladder.anneal(tol) if point is None else ladder.climb(point, tol)
    if sparse and point.err > tracker.tol and not ladder.over:
        point = _finish_on_support(ladder, passes, point)
    return outcome_of(point, tracker, ladder.doubt.why if ladder.doubt else "")


def _finish_on_support(ladder: Ladder, passes: DensePasses, point: Any) -> Any:
    """Go on where the plan is not negligible; a full pass has the last word."""
    tracker = ladder.tracker
    for _ in range(SPARSE_ROUNDS):
        # The support takes the place of the buffers in memory.
        passes.free.clear()
        kept = point.truncated(SPARSE_LEVEL)
        if kept is None:
            break
        problem, g, eps, err = point.problem, point.g, point.eps, point.err
        passes.forget(point)
        part = Ladder(SparsePasses(problem, kept), tracker, what="sparse_passes")
        part.solver.level = ladder.solver.level
        # A support without a plan would use up what full sweeps need.
        part.until = len(tracker.log) + SPARSE_PASSES
        best = part.climb(part.at(g, eps), 0.5 * tracker.tol)
        ladder.solver.level = part.solver.level
        found = best.g
        del kept, part, best
        point = ladder.at(found, eps)
        if point.err <= tracker.tol or tracker.ended is not None:
            return point
        if point.err >= err:
            passes.release(point)
            point = ladder.at(g, eps)
            break
    return ladder.climb(point, tracker.tol)


def outcome_of(point: Any, tracker: Tracker, why: str = "") -> Outcome:
    """Return the end of a climb."""
    status = tracker.status_of(point.err)
    return Outcome(point.f, point.g, point.err, status, tracker.message_of(point.err, why or floor_of(point)))


def floor_of(point: Any) -> str:
    """Say what err rounding allows."""
    problem = point.problem
    single = problem.cost.element_size() == 4
    floor = (5e-9 if single else 1e-17) * problem.span / problem.eps
    return (
        f"rounding in {'float32' if single else 'float64'} allows about {floor:.1e} at this reg; a pattern of "
        "forbidden pairs (+inf) that leaves no plan ends like this too."
    )


class Ladder:
    """Climbs the dual at falling eps, carrying g and what is known about preconditioning."""

    def __init__(self, passes: Passes, tracker: Tracker, what: str = "passes") -> None:
        self.passes, self.tracker, self.what = passes, tracker, what
        self.solver = LaplacianSolver()
        self.until = math.inf
        """Number of recorded passes at which to end."""
        self.doubt: Doubt | None = None
        """Whether there is a plan at all, where that is in question."""

    @property
    def over(self) -> bool:
        """Whether nothing more is to be done, whatever err is."""
        if self.tracker.ended is not None or len(self.tracker.log) >= self.until:
            return True
        return self.doubt is not None and self.doubt.confirmed()

    def warm(self, g0: Tensor) -> Any | None:
        point = self.at(g0, self.passes.problem.eps)
        if point.err <= WARM_ERR or self.tracker.ended is not None:
            return point
        self.passes.release(point)
        return None

    def anneal(self, tol: float) -> Any:
        problem = self.passes.problem
        # Of one column the first pass is exact at any eps.
        eps = problem.eps if problem.shape[1] == 1 else max(problem.eps, problem.span / ANNEAL_FROM)
        g = problem.b.new_zeros(problem.shape[1])
        while True:
            last = eps <= problem.eps
            point = self.climb(self.at(g, eps), tol if last else ANNEAL_TOL)
            if last:
                return point
            g, eps = point.g, max(problem.eps, eps / ANNEAL_BY)
            self.passes.release(point)
            if self.over:
                # It ended early: the potentials that fit the eps asked for.
                return self.at(g, problem.eps, counted=False)

    def climb(self, point: Any, tol: float) -> Any:
        """Improve a point until its err is at most tol, the tracker ends, or no step helps."""
        guards = sweeps = 0
        while point.err > tol and not self.over and math.isfinite(point.err):
            ratio, swept = point.log_ratio()
            if swept:
                self.tracker.count(self.what)
            if guards < MAX_GUARDS and float(ratio.abs().max()) > GUARD:
                guards += 1
                self.tracker.count("sinkhorn")
                point = self._move(point, self.at(point.g + point.eps * ratio, point.eps))
                continue
            guards = 0
            trial = self._newton_step(point)
            if trial is not None:
                point, sweeps = self._move(point, trial), 0
                continue
            sweeps += 1
            if sweeps > MAX_SWEEPS or self.tracker.ended is not None:
                break
            self.tracker.count("sinkhorn")
            point = self._move(point, self.at(point.g + point.eps * ratio, point.eps))
        return point

    def _newton_step(self, point: Any) -> Any | None:
        """Return the pass at an accepted step along the truncated Newton direction."""
        problem, eps, tracker = point.problem, point.eps, self.tracker
        gradient = problem.b - point.c
        ridge = 1e-3 * min(1.0, point.err) * problem.b
        rtol = min(0.1, math.sqrt(point.err))
        direction, iterations = self.solver.solve(point, eps * gradient, ridge, rtol)
        tracker.count("newton")
        tracker.count("cg", iterations)
        slope = float(gradient @ direction)
        if not (slope > 0 and math.isfinite(slope)):
            return None
        held: list[Any] = []

        def phi(step: float) -> tuple[float, Any]:
            if held:
                self.passes.release(held.pop())
            trial = self.at(point.g + step * direction, eps)
            held.append(trial)
            tracker.count("line_search")
            return -trial.phi, trial

        def accept(t: Trial) -> bool:
            if tracker.ended is not None:
                return True
            gain = -t.value - point.phi
            enough = gain >= 1e-4 * t.step * slope
            return enough or (t.payload.err < point.err and gain >= -1e-13 * abs(point.phi))

        # Between nearly separate parts of a plan Newton asks for moves of thousands of eps, of which few are taken.
        longest = min(1.0, LONGEST * eps / max(float(direction.abs().max()), 1e-300))
        for first, shrink, steps in ((longest, 0.5, 3), (longest / 16, 0.25, 12)):
            search = LineSearch(shrink=shrink, max_steps=steps)
            found = search(phi, -point.phi, -slope, first, accept)
            if found.accepted:
                # A search cut short returns what it has, unless that is worse.
                if tracker.ended is None or found.payload.err < point.err:
                    return found.payload
                break
        if held:
            self.passes.release(held.pop())
        return None

    def at(self, g: Tensor, eps: float, counted: bool = True) -> Any:
        # The plan does not depend on a constant, and far-off means would cost digits.
        g = g - self.passes.problem.b @ g
        point = self.passes.at(g, eps)
        if counted:
            self.tracker.record(eps, point.err, point.phi, what=self.what)
        return point

    def _move(self, old: Any, new: Any) -> Any:
        self.passes.release(old)
        return new
