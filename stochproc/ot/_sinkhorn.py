"""Sinkhorn iterations in the log domain: alternating exact maximisation of the dual over rows and columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import threshold

from stochproc.ot._dense_pass import EXP2_FLOOR, LOG2E, TINY, row_blocks
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import Problem

__all__ = ["Scaling", "Sweep", "sinkhorn"]

ANNEAL_FROM, ANNEAL_BY, ANNEAL_TOL = 8.0, 4.0, 1e-2
# Sweeps without progress in err or dual value, beyond their rounding, after which none is expected.
PATIENCE = 100
# Rounding of err is about this times span / eps, and of the dual value about this times the span.
ROUNDING = {torch.float32: 5e-9, torch.float64: 1e-17}
# Sweeps at which a pattern of forbidden pairs is first suspected to leave no plan; then at every doubling.
SUSPECT = 50


class Sweep:
    """The potentials and column sums one pass finds at g: the row update, and what the column update needs."""

    def __init__(self, problem: Problem, g: Tensor, eps: float, scratch: Tensor) -> None:
        self.problem, self.eps, self.g = problem, eps, g
        cost, a = problem.cost, problem.a
        scale, floor = LOG2E / eps, EXP2_FLOOR[cost.dtype]
        h = ((g + eps * problem.b.log()) * scale).to(cost.dtype)
        self.f, self.c = torch.empty_like(a), torch.zeros_like(g)
        for rows in row_blocks(cost):
            z = scratch[: rows.stop - rows.start]
            torch.sub(h, cost[rows], alpha=scale, out=z)
            top = z.amax(1, keepdim=True)
            threshold(z.sub_(top), floor, -math.inf, inplace=True).exp2_()
            total = z.sum(1).double()
            self.f[rows] = (total.log2() + top.squeeze(1)) / -scale
            # The same exponentials, scaled to exact rows, give the columns: one exponential a pair in a whole sweep.
            self.c += ((a[rows] / total).to(z.dtype) @ z).double()
        self.phi = float(a @ self.f + problem.b @ g)
        self.err = float((self.c - problem.b).abs().sum())

    def log_ratio(self) -> tuple[Tensor, bool]:
        """Return log b - log c, finite however small c is, and whether that took another pass."""
        problem, eps = self.problem, self.eps
        ratio = problem.b.log() - self.c.log()
        lost = (self.c < TINY[problem.cost.dtype]).nonzero().squeeze(1)
        lift = problem.a.log().unsqueeze(1) + self.f.unsqueeze(1) / eps
        # As many columns at a time as make a block of four million bytes.
        for columns in lost.split(max(1, (1 << 19) // problem.shape[0])):
            cost = problem.cost.index_select(1, columns).double()
            ratio[columns] = -torch.logsumexp(lift - cost / eps, 0) - self.g[columns] / eps
        return ratio, lost.numel() > 0


class Scaling:
    """Runs sweeps of one problem, counts them and sees when they lead nowhere."""

    def __init__(self, problem: Problem, tracker: Tracker) -> None:
        self.problem, self.tracker = problem, tracker
        blocks = row_blocks(problem.cost)
        self.scratch = problem.cost.new_empty(blocks[0].stop, problem.shape[1])
        self.why = ""
        """Why the last run ended above its tolerance, where something is known."""

    def at(self, g: Tensor, eps: float, counted: bool = True) -> Sweep:
        """Sweep at g."""
        # The plan does not depend on a constant in g, and far-off means would cost digits.
        g = g - self.problem.b @ g
        point = Sweep(self.problem, g, eps, self.scratch)
        if counted:
            self.tracker.record(eps, point.err, point.phi)
        return point

    def ratio(self, point: Sweep) -> Tensor:
        """Return log b - log c of a sweep."""
        ratio, swept = point.log_ratio()
        if swept:
            self.tracker.count("passes")
        return ratio

    def after(self, point: Sweep, ratio: Tensor | None = None) -> Tensor:
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

    def run(self, g: Tensor, eps: float, tol: float, sweeps: int | None = None) -> Sweep:
        """Sweep until err is at most tol, the tracker ends, nothing moves any more, or so many sweeps are done."""
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
                    self.why = (
                        f"forbidden pairs (+inf) leave no plan: some columns ask for {shortage:.3g} more mass "
                        "than the rows allowed to serve them have."
                    )
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
