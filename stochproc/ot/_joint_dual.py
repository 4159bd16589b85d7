"""The dual over rows and columns jointly, in the entropy form of the published Newton methods."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import threshold

from stochproc.ot._dense_pass import EXP2_FLOOR, LOG2E, row_blocks
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import Problem
from stochproc.ot._sinkhorn import Scaling, floor_of

__all__ = ["JointDual", "JointPoint", "centred"]

# Exponents of trial steps, in powers of two, are cut here: the dual value is then so low that no step is accepted, and
# sums of a million such terms are still finite.
EXP2_CEILING = {torch.float32: 90.0, torch.float64: 900.0}


class JointPoint:
    r"""A value of F(x, y) and what comes with it.

    :math:`F = -\varepsilon \sum_{ij} P_{ij} + \langle a, x \rangle + \langle b, y \rangle` with
    :math:`P_{ij} = \exp((x_i + y_j - M_{ij}) / \varepsilon - 1)`.
    """

    def __init__(self, problem: Problem, x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> None:
        self.x, self.y = x, y
        self.rows, self.columns = rows, columns
        """Row and column sums of P."""
        a, b = problem.a, problem.b
        self.value = float(a @ x + b @ y - problem.eps * rows.sum())
        self.gradient = torch.cat([a - rows, b - columns])
        self.err = float(self.gradient.abs().sum())


class JointDual:
    """Evaluates F; the plan of the last evaluation stays in its one buffer."""

    def __init__(self, problem: Problem, tracker: Tracker) -> None:
        self.problem, self.tracker = problem, tracker
        self.plan = torch.empty_like(problem.cost)
        # x + y = f + g + eps (log a + log b + 1): half of the 1 goes to either side.
        self.lift_x = problem.eps * (problem.a.log() + 0.5)
        self.lift_y = problem.eps * (problem.b.log() + 0.5)
        # F in the entropy form less this is the dual value of the KL form.
        self.entropy = problem.eps * float(problem.a @ problem.a.log() + problem.b @ problem.b.log())

    def at(self, x: Tensor, y: Tensor) -> JointPoint:
        """Evaluate, in one pass."""
        problem, cost, plan = self.problem, self.problem.cost, self.plan
        scale, dtype = LOG2E / problem.eps, cost.dtype
        row = (x * scale - LOG2E).to(dtype).unsqueeze(1)
        column = (y * scale).to(dtype)
        rows, columns = torch.empty_like(problem.a), torch.zeros_like(problem.b)
        ones = plan.new_ones(plan.shape[0])
        for part in row_blocks(cost):
            z = plan[part]
            torch.sub(column, cost[part], alpha=scale, out=z).add_(row[part])
            threshold(z, EXP2_FLOOR[dtype], -math.inf, inplace=True).clamp_(max=EXP2_CEILING[dtype]).exp2_()
            rows[part] = z.sum(1).double()
            columns += (ones[part] @ z).double()
        point = JointPoint(problem, x, y, rows, columns)
        self.tracker.record(problem.eps, point.err, point.value - self.entropy)
        return point

    def rounding(self, point: JointPoint) -> float:
        """Return how far rounding may move F: that of an exponent moves it by eps times the mass of its entry."""
        unit = torch.finfo(self.plan.dtype).eps / 2
        return 4 * unit * max(abs(point.value), self.problem.span)

    def step(self, point: JointPoint, length: float, direction: Tensor) -> JointPoint:
        """Evaluate at a step along a direction of both sides."""
        n = point.x.shape[0]
        return self.at(point.x + length * direction[:n], point.y + length * direction[n:])

    def start(self, g0: Tensor | None, sweeps: int, anneal: bool = False) -> JointPoint:
        """Evaluate after so many Sinkhorn sweeps from g0; None stands for y = 0, where papers start.

        With ``anneal`` a start from None goes through falling eps, with at most so many sweeps at each.
        """
        problem, tracker = self.problem, self.tracker
        if sweeps == 0:
            g = -self.lift_y if g0 is None else g0.to(problem.b)
            return self.at(torch.zeros_like(problem.a), g + self.lift_y)
        scaling = Scaling(problem, tracker)
        if g0 is not None:
            g = g0.to(problem.b)
        else:
            g = scaling.anneal(torch.zeros_like(problem.b), sweeps) if anneal else -self.lift_y
        if tracker.ended is not None:
            last = scaling.at(g, problem.eps, False)
        else:
            last = scaling.run(g, problem.eps, tracker.tol, sweeps)
        x = last.f + self.lift_x
        if last.err <= tracker.tol or tracker.ended is not None or not math.isfinite(last.err):
            return JointPoint(problem, x, last.g + self.lift_y, problem.a, last.c)
        return self.at(x, scaling.after(last) + self.lift_y)

    def outcome(self, point: JointPoint, why: str = "") -> Outcome:
        """Return the end of a solve, in the KL form and its gauge."""
        problem, tracker = self.problem, self.tracker
        f, g = point.x - self.lift_x, point.y - self.lift_y
        constant = problem.b @ g
        message = tracker.message_of(point.err, f"{why}; {floor_of(problem)}" if why else floor_of(problem))
        return Outcome(f + constant, g - constant, point.err, tracker.status_of(point.err), message)


def centred(d: Tensor, n: int) -> Tensor:
    """Remove the part of d along (1, -1), which changes no plan."""
    constant = (d[:n].sum() - d[n:].sum()) / d.shape[0]
    return torch.cat([d[:n] - constant, d[n:] + constant])
