"""From a stored cost as the caller gave it to the reduced problem that solvers take, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stochproc.ot._form import bounded
from stochproc.ot._inputs import DenseInputs
from stochproc.ot._memory import free_bytes
from stochproc.ot._newton import newton
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import Problem
from stochproc.ot._sinkhorn import sinkhorn
from stochproc.ot._sns import sns
from stochproc.ot._ssns import ssns
from stochproc.solvers import Status

__all__ = ["METHODS", "choose_method", "solve_dense"]

Solver = Callable[[Problem, Tracker, "Tensor | None"], Outcome]
METHODS: dict[str, Solver] = {"newton": newton, "sns": sns, "sinkhorn": sinkhorn, "ssns": ssns}
# Up to this many regularisations Sinkhorn needs a few passes, each cheaper than a Newton step.
EASY = 10.0


class _Reduced(NamedTuple):
    """A reduced problem and what it takes to undo the reduction."""

    problem: Problem
    rows: Tensor | None
    columns: Tensor | None
    shift: Tensor
    flipped: bool
    unit: float


def choose_method(method: str, span: float, reg: float, *, forbidden: bool = False) -> str:
    """Return the solver that "auto" stands for."""
    if method != "auto":
        return method
    # Around forbidden pairs Sinkhorn may slow down without end, at any reg.
    return "sinkhorn" if span <= EASY * reg and not forbidden else "newton"


@torch.no_grad()
def solve_dense(
    inputs: DenseInputs,
    tracker: Tracker,
    *,
    method: str = "auto",
    start: tuple[Tensor, Tensor] | None = None,
    storage: str = "auto",
) -> tuple[Outcome, str]:
    """Solve a balanced problem; the outcome has potentials of the caller's shape, mass and gauge."""
    M, a, b = (t.detach() for t in inputs[1:4])
    eps = float(inputs.reg)
    reduced = _reduce(M, a.double(), b.double(), eps)
    problem = reduced.problem
    name = choose_method(method, problem.span, problem.eps, forbidden=not bool(problem.cost.amax() < math.inf))
    g0 = None if start is None else _start(start, reduced)
    tracker.unit = reduced.unit
    solver = partial(newton, storage=storage) if name == "newton" else METHODS[name]
    try:
        if problem.cost.dtype == torch.float32:
            outcome = _single(solver, problem, tracker, g0)
        else:
            outcome = solver(problem, tracker, g0)
    finally:
        tracker.close()
    f, g = (t / reduced.unit for t in ((outcome.g, outcome.f) if reduced.flipped else (outcome.f, outcome.g)))
    f, g = _expand(f, g, M, a.double(), b.double(), eps, reduced)
    return outcome._replace(f=f, g=g), name


def _reduce(M: Tensor, a: Tensor, b: Tensor, eps: float) -> _Reduced:
    """Drop weights of 0, scale masses to 1, put the smaller side in the columns and remove row minima."""
    rows, columns = (None if bool((w > 0).all()) else (w > 0).nonzero().squeeze(1) for w in (a, b))
    if rows is not None:
        M, a = M[rows], a[rows]
    if columns is not None:
        M, b = M[:, columns], b[columns]
    low, high = M.amin(), M.amax()
    if not bool(high < math.inf):
        high = torch.where(M < math.inf, M, -math.inf).amax()
    # Huge costs of opposite sign could overflow their own dtype.
    span = float(high.double() - low.double())
    flipped = M.shape[1] > M.shape[0]
    if flipped:
        M, a, b = M.T, b, a
    shift = M.amin(1)
    if bool((shift != 0).any()) or not M.is_contiguous():
        M = torch.sub(M, shift.unsqueeze(1), out=M.new_empty(M.shape))
    unit = _unit(span, M.dtype)
    if unit != 1:
        M, eps, span = M * unit, eps * unit, span * unit
    problem = Problem(M, a / a.sum(), b / b.sum(), eps, span)
    return _Reduced(problem, rows, columns, shift.double(), flipped, unit)


def _unit(span: float, dtype: torch.dtype) -> float:
    """Return the power of two that brings costs near the limits of their dtype to a range of about 1."""
    small, large = (1e-15, 1e15) if dtype == torch.float32 else (1e-100, 1e100)
    if not 0 < span < math.inf or small < span < large:
        return 1.0
    return 2.0 ** -math.frexp(span)[1]


def _start(start: tuple[Tensor, Tensor], reduced: _Reduced) -> Tensor:
    """Return the potential of the columns of the reduced problem to start from."""
    g = start[0] if reduced.flipped else start[1]
    kept = reduced.rows if reduced.flipped else reduced.columns
    g = g.detach().double() * reduced.unit
    return g if kept is None else g[kept]


def _single(solver: Solver, problem: Problem, tracker: Tracker, g0: Tensor | None) -> Outcome:
    """Solve in float32 as far as that goes, then in float64 where memory allows."""
    out_of_reach = tracker.tol < 1e-8 * problem.span / problem.eps
    fits = 3 * 8 * problem.cost.numel() < free_bytes(problem.cost.device) / 2
    if not (out_of_reach and fits):
        outcome = solver(problem, tracker, g0)
        if outcome.status is not Status.STAGNATED or not fits:
            return outcome
        g0 = outcome.g if bool(outcome.g.isfinite().all()) else None
    return solver(problem.double(), tracker, g0)


def _expand(
    f: Tensor, g: Tensor, M: Tensor, a: Tensor, b: Tensor, eps: float, reduced: _Reduced
) -> tuple[Tensor, Tensor]:
    """Undo the reduction: shift, mass, weights of 0 and gauge."""
    if reduced.flipped:
        g = g + reduced.shift
    else:
        f = f + reduced.shift
    # The plan of mass s has a_i b_j of mass s^2.
    f = f - eps * a.sum().log()
    rows, columns = reduced.rows, reduced.columns
    if rows is not None:
        f = a.new_zeros(a.shape).index_copy_(0, rows, f)
    if columns is not None:
        g = b.new_zeros(b.shape).index_copy_(0, columns, g)
    # Points without weight get the transform of the other side: what they would pay if they had some.
    if rows is not None:
        idle = (a == 0).nonzero().squeeze(1)
        f[idle] = bounded(-eps * torch.logsumexp((g - M[idle]) / eps + b.log(), 1))
    if columns is not None:
        idle = (b == 0).nonzero().squeeze(1)
        g[idle] = bounded(-eps * torch.logsumexp((f.unsqueeze(1) - M[:, idle]) / eps + a.log().unsqueeze(1), 0))
    constant = (b @ g) / b.sum()
    return f + constant, g - constant
