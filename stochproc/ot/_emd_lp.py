"""Exact transport as a linear programme over the few pairs that an entropic solution leaves in question."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import linear_sum_assignment, linprog

from stochproc.ot._newton import newton
from stochproc.ot._outcome import Tracker
from stochproc.ot._problem import Problem

__all__ = ["ExactPlan", "assignment_duals", "solve_exact"]

# The regularisation whose potentials start the programme, relative to the range of the cost, and how well they are
# wanted: pricing mends what they miss.
EPS, TOL, MAX_PASSES = 1e-4, 1e-6, 500
# Pairs with reduced cost up to this many eps, and this many of every row and column, enter the first programme.
NEAR, FEWEST = 10.0, 3
# HiGHS's own tolerances of 1e-7 stop too early; 1e-10 is the least it takes. Costs are in units of eps and masses
# in units of 1/n for them.
OPTIONS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
# Reduced cost, in units of eps, below which a pair that is left out could lower the cost.
PRICED = -1e-9
MAX_ROUNDS = 100
# Up to so many pairs HiGHS solves the whole programme sooner than a support of it is found.
SMALL = 6_000
# Gap, relative to the potentials, that is rounding; where there is more, the unit of costs is made finer so often.
ROUNDING, FINER, MAX_FINER = 1e-14, 1e-4, 4
# Error of a marginal, of a mass of 1, that is rounding; and how often what is larger is solved for again.
EXACT, MAX_REFINED = 1e-15, 3


class ExactPlan(NamedTuple):
    """A vertex of the transport polytope with potentials that prove it optimal up to ``gap``."""

    rows: np.ndarray
    columns: np.ndarray
    masses: np.ndarray
    f: np.ndarray
    g: np.ndarray
    cost: float
    gap: float
    rounds: int


def solve_exact(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> ExactPlan:
    """Solve for positive weights of sum 1; ValueError where forbidden pairs leave no plan."""
    n, m = cost.shape
    if n == m and a.min() == a.max() and b.min() == b.max():
        return _assignment(cost, a, b)
    if m > n:
        # The Newton systems have the size of the columns.
        out = solve_exact(np.ascontiguousarray(cost.T), b, a)
        return out._replace(rows=out.columns, columns=out.rows, f=out.g, g=out.f)
    finite = np.isfinite(cost)
    span = float(np.ptp(cost[finite]))
    eps = EPS * span if span > 0 else 1.0
    best = _programme(cost, finite, a, b, _start(cost, a, b, eps, span), eps)
    for _ in range(MAX_FINER):
        if best.gap <= ROUNDING * float(a @ np.abs(best.f) + b @ np.abs(best.g)):
            break
        # A few huge costs, as of pairs meant to be forbidden, hide all others behind the tolerance.
        eps *= FINER
        finer = _programme(cost, finite, a, b, best.g, eps)
        if finer.gap >= best.gap:
            break
        best = finer
    return best


def _start(cost: np.ndarray, a: np.ndarray, b: np.ndarray, eps: float, span: float) -> np.ndarray:
    if cost.size <= SMALL:
        return np.zeros_like(b)
    lowest = torch.from_numpy(cost.min(1, keepdims=True))
    problem = Problem(torch.from_numpy(cost) - lowest, torch.from_numpy(a), torch.from_numpy(b), eps, span)
    g = newton(problem, Tracker(TOL, MAX_PASSES)).g.numpy()
    return g if np.isfinite(g).all() else np.zeros_like(b)


def _programme(
    cost: np.ndarray, finite: np.ndarray, a: np.ndarray, b: np.ndarray, g: np.ndarray, eps: float
) -> ExactPlan:
    f = (cost - g).min(1)
    support = finite.copy() if cost.size <= SMALL else _support(cost - f[:, None] - g, finite, eps, 1)
    size = 1
    for rounds in range(1, MAX_ROUNDS + 1):
        rows, columns = np.nonzero(support)
        # Where the potentials are optimal the objective is 0 but for what is in question: nothing cancels.
        reduced = (cost[rows, columns] - f[rows] - g[columns]) / eps
        found = _linear(rows, columns, reduced, a, b)
        if found.status == 2:
            if support.sum() == finite.sum():
                raise ValueError(_why_infeasible(finite, a, b))
            size *= 2
            support |= _support(cost - f[:, None] - g, finite, eps, size)
            continue
        if found.status != 0:
            raise RuntimeError(f"scipy.optimize.linprog ended with status {found.status}: {found.message}")
        # Duals are those of the reduced costs: the potentials they improve.
        duals = found.eqlin.marginals * eps
        f, g = f + duals[: len(a)], g + duals[len(a) :]
        priced = np.where(support, 0.0, (cost - f[:, None] - g) / eps)
        missed = _most_violated(priced)
        if not missed.any() or rounds == MAX_ROUNDS:
            break
        support |= missed
    masses = _refined(found.x / len(a), rows, columns, (cost[rows, columns] - f[rows] - g[columns]) / eps, a, b)
    kept = masses > 0
    return _certified(cost, a, b, rows[kept], columns[kept], masses[kept], g, rounds)


def _support(reduced: np.ndarray, finite: np.ndarray, eps: float, size: int) -> np.ndarray:
    """Return the pairs of small reduced cost, and some of every row and column."""
    support = reduced <= NEAR * size * eps
    for axis in (0, 1):
        k = min(FEWEST * size, reduced.shape[axis])
        np.put_along_axis(support, np.argpartition(reduced, k - 1, axis).take(range(k), axis), True, axis)
    return support & finite


def _most_violated(priced: np.ndarray) -> np.ndarray:
    """Return the pair of each row and each column that could lower the cost most."""
    missed = np.zeros(priced.shape, dtype=bool)
    for axis in (0, 1):
        np.put_along_axis(missed, priced.argmin(axis, keepdims=True), True, axis)
    return missed & (priced < PRICED)


def _linear(rows: np.ndarray, columns: np.ndarray, costs: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    """Solve the programme of the given pairs, masses in units of 1/n."""
    A = _incidence(rows, columns, len(a), len(b))
    masses = len(a) * np.concatenate([a, b])
    return linprog(costs, A_eq=A, b_eq=masses, bounds=(0, None), method="highs-ds", options=OPTIONS)


def _refined(
    masses: np.ndarray, rows: np.ndarray, columns: np.ndarray, costs: np.ndarray, a: np.ndarray, b: np.ndarray
) -> np.ndarray:
    """Solve again for what the tolerance left over, in its own unit: weights may span more decades than HiGHS sees."""
    masses = np.clip(masses, 0.0, None)
    # Sums of a and b differ by rounding, which in that unit is much: the heaviest column takes it.
    equations = np.delete(np.arange(len(a) + len(b)), len(a) + int(b.argmax()))
    A = _incidence(rows, columns, len(a), len(b)).tocsr()[equations]
    for _ in range(MAX_REFINED):
        left = np.concatenate([a, b])[equations] - A @ masses
        unit = float(np.abs(left).max(initial=0.0))
        if unit <= EXACT:
            break
        below = np.stack([-masses / unit, np.full_like(masses, np.inf)], 1)
        found = linprog(costs, A_eq=A, b_eq=left / unit, bounds=below, method="highs-ds", options=OPTIONS)
        if found.status != 0:
            break
        masses = np.clip(masses + unit * found.x, 0.0, None)
    return masses


def _incidence(rows: np.ndarray, columns: np.ndarray, n: int, m: int) -> sp.csc_array:
    pairs = np.arange(len(rows))
    where = np.concatenate([rows, n + columns]), np.concatenate([pairs, pairs])
    return sp.csc_array((np.ones(2 * len(rows)), where), shape=(n + m, len(rows)))


def _why_infeasible(finite: np.ndarray, a: np.ndarray, b: np.ndarray) -> str:
    """Name rows whose mass exceeds that of all columns open to them: the minimum cut of the flow (Hall)."""
    rows, columns = np.nonzero(finite)
    A = _incidence(rows, columns, len(a), len(b))
    limits = len(a) * np.concatenate([a, b])
    flow = linprog(-np.ones(len(rows)), A_ub=A, b_ub=limits, bounds=(0, None), method="highs-ds", options=OPTIONS)
    shut_in = flow.ineqlin.marginals[: len(a)] > -0.5
    reach = finite[shut_in].any(0)
    names = ", ".join(map(str, np.nonzero(shut_in)[0][:10])) + (", ..." if shut_in.sum() > 10 else "")
    return (
        f"M must leave a plan; the {shut_in.sum()} rows {names} of positive weight hold {a[shut_in].sum():.6g} of the "
        f"mass, but the columns without a forbidden pair (+inf) to all of them hold only {b[reach].sum():.6g}."
    )


def _assignment(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> ExactPlan:
    """Solve for uniform weights and equally many of them: some permutation is optimal."""
    try:
        rows, columns = linear_sum_assignment(cost)
    except ValueError:
        # Of finite and +inf costs alone this is the only cause.
        raise ValueError(_why_infeasible(np.isfinite(cost), a, b)) from None
    return _certified(cost, a, b, rows, columns, np.full(len(a), a[0]), assignment_duals(cost, columns), 0)


def assignment_duals(cost: np.ndarray, columns: np.ndarray) -> np.ndarray:
    r"""Return column potentials that prove an assignment optimal: shortest paths in its residual graph.

    With row i assigned to :math:`\sigma(i)`, potentials must have :math:`g_j - g_{\sigma(i)} \le C_{ij} - C_{i
    \sigma(i)}`: distances with these lengths do (Bellman and Ford).
    """
    own = cost[np.arange(len(columns)), columns]
    lengths = np.empty_like(cost)
    lengths[columns] = cost - own[:, None]
    g = np.zeros(len(columns))
    # Rounding may leave cycles of length -1e-17: steps of that size do not count.
    small = 1e-15 * max(1e-300, float(np.abs(own).max(initial=0.0)))
    for _ in range(len(columns)):
        shorter = (g[:, None] + lengths).min(0)
        if (shorter >= g - small).all():
            break
        g = np.minimum(g, shorter)
    return g


def _certified(
    cost: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    masses: np.ndarray,
    g: np.ndarray,
    rounds: int,
) -> ExactPlan:
    """Attach feasible potentials and the difference of cost and dual value that they prove."""
    # A conjugate is feasible whatever the tolerance that g was found with.
    f = (cost - g).min(1)
    g = (cost - f[:, None]).min(0)
    paid = cost[rows, columns] * masses
    # The gap as a sum of reduced costs: a difference of two values would be rounding.
    gap = float(((cost[rows, columns] - f[rows] - g[columns]) * masses).sum())
    return ExactPlan(rows, columns, masses, f, g, float(paid.sum()), max(gap, 0.0), rounds)
