"""Unbalanced transport: row and column sums tied to the weights by Kullback-Leibler penalties."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc.ot._newton import floor_of
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import Problem
from stochproc.ot._unbalanced_pass import Penalties, UnbalancedPasses, UnbalancedSolver, ascend, tilt

__all__ = ["Split", "separated", "span_of", "split", "unbalanced", "unbalanced_value"]


class Split(NamedTuple):
    """Potentials with the gauge kept apart: (f + gauge, g - gauge) are those of the penalties.

    For large rho and unequal masses the gauge is of the size of rho, and added to f or g would swamp digits that the
    plan, which depends on f + g alone, needs.
    """

    f: Tensor
    g: Tensor
    gauge: float


def unbalanced(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    rho_a: float,
    rho_b: float,
    tracker: Tracker,
    init: Tensor | None = None,
) -> Outcome:
    """Solve an unbalanced problem with a stored cost.

    Parameters
    ----------
    cost : Tensor of shape (n, m)
        float64, finite or ``+inf``, with a finite entry in every row and column.
    a, b : Tensor of shape (n,) and (m,)
        Positive, float64, of any masses.
    eps : float
        Regularisation, in the unit of the cost.
    rho_a, rho_b : float
        Strength of the penalties of the row and of the column sums, in (0, inf]. Two infinite ones make the problem
        balanced, and the masses must then agree.
    tracker : Tracker
    init : Tensor of shape (m,), default=None
        Potential of the columns to start from, in any gauge.

    Returns
    -------
    Outcome
        ``f`` and ``g`` are the two parts of :class:`Split`; :func:`split` gives the gauge. ``err`` is relative to the
        transported mass.
    """
    n, m = cost.shape
    penalties = Penalties(rho_a, rho_b)
    problem = Problem(cost, a / a.sum(), b / b.sum(), eps, span_of(cost))
    # The smaller side keeps its potential as the unknown.
    turned = m > n
    if turned:
        problem, penalties = problem.transposed(), penalties.transposed()
        init = None if init is None else _rows_of(cost, b, init, eps, rho_a)
    point = ascend(UnbalancedPasses(problem, penalties), UnbalancedSolver(), tracker, init)
    masses = (b.sum(), a.sum()) if turned else (a.sum(), b.sum())
    f, g = separated(point.f, point.g, problem, masses, penalties)
    if turned:
        f, g = g, f
    status = tracker.status_of(point.err)
    return Outcome(f, g, point.err, status, tracker.message_of(point.err, floor_of(point)))


def separated(
    f: Tensor, g: Tensor, problem: Any, masses: tuple[Tensor, Tensor], penalties: Penalties
) -> tuple[Tensor, Tensor]:
    """Return the potentials with the gauge apart, from balanced ones for weights of mass one."""
    eps, rho_a, rho_b = problem.eps, penalties.rho_a, penalties.rho_b
    log_a, log_b = (math.log(float(mass)) for mass in masses)
    soft = penalties.row_softening(eps)
    if math.isinf(rho_a) and math.isinf(rho_b):
        return f - eps * log_b, g
    # The total mass of u, which moves with the gauge, equals that of v.
    rows = tilt(-f, problem.a, rho_a + eps)[0]
    columns = tilt(-g, problem.b, rho_b)[0]
    gap = log_a - log_b + (eps * log_b + rows) / (rho_a + eps) - columns / rho_b
    gauge = gap / (1 / (rho_a + eps) + 1 / rho_b)
    return (1 - soft) * (f - eps * log_b) - soft * gauge, g


def split(f: Tensor, g: Tensor, a: Tensor, b: Tensor, rho_a: float, rho_b: float) -> Split:
    """Return potentials with the gauge that maximises the dual: the two penalised masses are then equal."""
    if a.numel() == 0:
        return Split(f, g, 0.0)
    if math.isinf(rho_a) and math.isinf(rho_b):
        return Split(f, g, 0.0)
    mass_a, mass_b = float(a.sum()), float(b.sum())
    rows, columns = tilt(-f, a / mass_a, rho_a)[0], tilt(-g, b / mass_b, rho_b)[0]
    gap = math.log(mass_a / mass_b) + rows / rho_a - columns / rho_b
    return Split(f, g, gap / (1 / rho_a + 1 / rho_b))


def unbalanced_value(
    f: Tensor, g: Tensor, gauge: float, a: Tensor, b: Tensor, eps: float, rho_a: float, rho_b: float, mass: Tensor
) -> Tensor:
    """Return the dual objective for potentials whose plan has the given mass; KL forms have their mass terms."""
    penalties = _penalty(f + gauge, a, rho_a) + _penalty(g - gauge, b, rho_b)
    return penalties - eps * (mass - a.sum() * b.sum())


def _penalty(f: Tensor, a: Tensor, rho: float) -> Tensor:
    """Return -rho <a, exp(-f / rho) - 1>, which is <a, f> for an infinite rho."""
    return (a * f).sum() if math.isinf(rho) else -rho * (a * torch.expm1(-f / rho)).sum()


def span_of(cost: Tensor) -> float:
    """Return the largest minus the smallest finite entry."""
    low, high = float(cost.amin()), float(cost.amax())
    if math.isinf(high):
        high = float(torch.where(cost < math.inf, cost, low).amax())
    return high - low


def _rows_of(cost: Tensor, b: Tensor, g: Tensor, eps: float, rho_a: float) -> Tensor:
    """Return the potential of the rows that answers g."""
    f = -eps * torch.logsumexp((g - cost) / eps + (b / b.sum()).log(), 1)
    return f if math.isinf(rho_a) else f * rho_a / (rho_a + eps)
