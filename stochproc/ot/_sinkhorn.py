"""Sinkhorn iterations in the log domain: alternating exact maximisation of the dual over rows and columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochproc.ot._dense_pass import RowUpdate, row_blocks
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import Problem

__all__ = ["Scaling", "sinkhorn"]

ANNEAL_FROM, ANNEAL_BY, ANNEAL_TOL = 8.0, 4.0, 1e-2
# Sweeps without progress in err or dual value, beyond their rounding, after which none is expected.
PATIENCE = 100
# Rounding of err is about this times span / eps, and of the dual value about this times the span.
ROUNDING = {torch.float32: 5e-9, torch.float64: 1e-17}
# Sweeps at which a pattern of forbidden pairs is first suspected to leave no plan; then at every doubling.
SUSPECT = 50


class Scaling:
    """Runs sweeps of one problem, counts them and sees when they lead nowhere."""

    def __init__(self, problem: Problem, tracker: Tracker) -> None:
        self.problem, self.tracker = problem, tracker
        blocks = row_blocks(problem.cost)
        self.scratch = problem.cost.new_empty(blocks[0].stop, problem.shape[1])
        self.why = ""
        """Why the last run ended above its tolerance, where something is known."""

    def at(self, g: Tensor, eps: float, counted: bool = True) -> RowUpdate:
        """RowUpdate at g."""
        # The plan does not depend on a constant in g, and far-off means would cost digits.
        g = g - self.problem.b @ g
        point = RowUpdate(self.problem, g, eps, lambda rows: self.scratch[: rows.stop - rows.start])
        if counted:
            self.tracker.record(eps, point.err, point.phi)
        return point

    def ratio(self, point: RowUpdate) -> Tensor:
        """Return log b - log c of a sweep."""
        ratio, swept = point.log_ratio()
        if swept:
            self.tracker.count("passes")
        return ratio

    def after(self, point: RowUpdate, ratio: Tensor | None = None) -> Tensor:
        """Return the g whose columns are exact for the f of a sweep."""
        self.tracker.count("sinkhorn")
        return point.g + point.eps * (self.ratio(point) if ratio is None else ratio)

    def anneal(self, g: Tensor, sweeps: int | None = None) -> Tensor:
        """Return the g that sweeps at an eps falling to that of the problem lead to, so many sweeps at each."""
        eps = self.problem.span / ANNEAL_FROM
        while eps > self.problem.eps and self.tracker.ended is None:
            g = self.run(g, eps, ANNEAL_TOL, sweeps).g
            eps /= ANNEAL_BY
        return g

    def run(self, g: Tensor, eps: float, tol: float, sweeps: int | None = None) -> RowUpdate:
        """RowUpdate until err is at most tol, the tracker ends, nothing moves any more, or so many sweeps are done."""
        problem = self.problem
        digits = ROUNDING[problem.cost.dtype] * problem.span
        # Beyond the rounding of the exponents there is that of the sums.
        least_err = 0.01 * max(digits / eps, 100 * ROUNDING[problem.cost.dtype])
        least_phi = 10 * digits
        low, high, idle, done = math.inf, -math.inf, 0, 0
        while True:
            point = self.at(g, eps)
            done += 1
            if point.err <= tol or self.tracker.ended is not None or done == sweeps:
                return point
            if not math.isfinite(point.err):
                return point
            idle += 1
            # On the plateaus of small eps err stands still for long while the dual value goes on rising.
            if point.err < low - least_err or point.phi > high + least_phi:
                low, high, idle = min(low, point.err), max(high, point.phi), 0
            if idle >= PATIENCE:
                self.why = f"sweeps stopped changing err and the dual value; {floor_of(problem)}"
                return point
            ratio = self.ratio(point)
            if done >= SUSPECT and done % SUSPECT == 0 and (done // SUSPECT).bit_count() == 1:
                shortage = hall_shortage(problem, ratio)
                # Exact rows make the columns miss at least that much, and others get it in excess.
                if 2 * shortage > tol:
                    self.why = short_of(shortage)
                    return point
            g = self.after(point, ratio)


def sinkhorn(problem: Problem, tracker: Tracker, g0: Tensor | None = None, *, anneal: bool = False) -> Outcome:
    """Solve a reduced problem by Sinkhorn iterations; ``anneal`` starts them at a large eps that falls."""
    scaling = Scaling(problem, tracker)
    g = torch.zeros_like(problem.b) if g0 is None else g0.to(problem.b)
    if anneal:
        g = scaling.anneal(g)
    # What ended the annealing early gets the f of the eps asked for, at no pass of its own.
    point = scaling.run(g, problem.eps, tracker.tol) if tracker.ended is None else scaling.at(g, problem.eps, False)
    message = tracker.message_of(point.err, scaling.why)
    return Outcome(point.f, point.g, point.err, tracker.status_of(point.err), message)


def floor_of(problem: Problem) -> str:
    """Say what err rounding allows."""
    name = str(problem.cost.dtype).removeprefix("torch.")
    floor = ROUNDING[problem.cost.dtype] * problem.span / problem.eps
    return f"rounding in {name} allows about {floor:.1e} at this reg."


class Doubt:
    """Looks, ever more seldom, whether forbidden pairs leave no plan: by sweeps at an eps at which that shows soon."""

    def __init__(self, problem: Problem, tracker: Tracker) -> None:
        self.problem, self.tracker = problem, tracker
        self.next, self.sweeps = SUSPECT, SUSPECT
        self.eps = max(problem.span, problem.eps)
        self.g = torch.zeros_like(problem.b)
        self.why = ""
        """What was found, once something was."""

    def confirmed(self) -> bool:
        """Return whether there is no plan, as far as is known after the passes done."""
        if not self.why and len(self.tracker.log) >= self.next:
            self.next = 2 * len(self.tracker.log)
            scaling = Scaling(self.problem, self.tracker)
            for _ in range(self.sweeps):
                point = scaling.at(self.g, self.eps, counted=False)
                ratio = scaling.ratio(point)
                self.g = scaling.after(point, ratio)
            self.tracker.count("passes", self.sweeps)
            shortage = hall_shortage(self.problem, ratio)
            if 2 * shortage > self.tracker.tol:
                self.why = short_of(shortage)
        return bool(self.why)


def short_of(shortage: float) -> str:
    """Say that there is no plan."""
    return (
        f"forbidden pairs (+inf) leave no plan: some columns ask for {shortage:.3g} more mass than the rows allowed to "
        "serve them have."
    )


def hall_shortage(problem: Problem, ratio: Tensor) -> float:
    """Return by how much some set of columns asks for more than all rows allowed to serve it have; 0 if none is seen.

    The sets tried are the columns above the largest gaps of log(b / c): where there is no plan, that ratio goes to
    different constants on the columns that are short of mass and on the others.
    """
    allowed = problem.cost.isfinite()
    if bool(allowed.all()):
        return 0.0
    values, order = ratio.sort(descending=True)
    gaps = values[:-1] - values[1:]
    worst = 0.0
    for cut in gaps.topk(min(3, gaps.numel())).indices.tolist():
        short = order[: cut + 1]
        serving = allowed[:, short].any(1)
        worst = max(worst, float(problem.b[short].sum() - problem.a[serving].sum()))
    return worst
