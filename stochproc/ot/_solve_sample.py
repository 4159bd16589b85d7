"""Solve a transport problem between two clouds of points, with stored costs or without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_choice
from stochproc.kernels import logsumexp
from stochproc.ot._dist import cost_matrix
from stochproc.ot._form import Form, bounded
from stochproc.ot._inputs import (
    DenseInputs,
    PointInputs,
    check_budget,
    check_cost,
    check_finite_pairs,
    read_points,
)
from stochproc.ot._lazy import solve_lazy
from stochproc.ot._lazy_form import LazyForm
from stochproc.ot._memory import free_bytes
from stochproc.ot._outcome import OTState, Outcome, Tracker
from stochproc.ot._point_form import LAYER_METRICS, PointForm, barycentric_map, flipped
from stochproc.ot._result import OTResult, warn_unless_converged
from stochproc.ot._solve import check_options, check_unbalanced, plain, read_start, solve_balanced
from stochproc.ot._unbalanced_solve import is_hard, read_rho, solve_unbalanced

__all__ = ["solve_sample"]


def solve_sample(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    metric: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
    reg: Any = None,
    *,
    lazy: bool | str = "auto",
    reg_type: str = "KL",
    unbalanced: Any = None,
    method: str = "auto",
    tol: float | int | None = None,
    max_iter: int | None = None,
    potentials_init: tuple[Any, Any] | None = None,
    grad: str = "implicit",
    round: bool = False,
    storage: str = "auto",
    callback: Callable[[OTState], bool | None] | None = None,
    verbose: bool | int = False,
) -> OTResult:
    r"""Solve entropic optimal transport between two clouds of weighted points.

    Parameters
    ----------
    X_a, X_b : array or Tensor of shape (n, d) and (m, d)
        Finite points.
    a, b : array or Tensor of shape (n,) and (m,), default=None
        As in :func:`solve`.
    metric : str or callable, default="sqeuclidean"
        Cost of a pair of points: "sqeuclidean" (the squared distance, not half of it), "euclidean", "cityblock", a
        function of two blocks of points, (n, d) and (m, d), that returns (n, m), or a metric of
        ``scipy.spatial.distance.cdist``, which is stored and has no gradient.
    reg : float or 0-d Tensor
        Positive, in the unit of the metric.
    lazy : bool or "auto", default="auto"
        Whether costs are recomputed in every pass instead of being stored, so that memory is O(n + m). "auto" does so
        where three arrays (n, m) would take more than a quarter of the free memory.
    reg_type, unbalanced, method, max_iter, potentials_init, grad, round, storage, callback, verbose
        As in :func:`solve`. Lazy problems are balanced and know the methods "auto" and "newton" only; their plan is
        not rounded.
    tol : float, default=None
        As in :func:`solve`; None is 1e-6 for a lazy problem.

    Returns
    -------
    OTResult
        Of a lazy problem ``lazy_plan`` is an operator, and ``plan`` is written out up to 1e8 entries.

    Raises
    ------
    ValueError, TypeError
        As :func:`solve`, for points of different dimension, and for options that a lazy problem does not have.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If err is above tol at the end.

    Notes
    -----
    A lazy problem of up to three dimensions is solved on a ladder of coarser problems, whose Newton steps are then
    carried to all points; the err it reports is that of a final pass over all pairs in float64. Where the points are
    too far apart for that, and in more dimensions, Newton steps use products over all pairs: each costs about as
    much as a Sinkhorn sweep. ``stats["rule"]`` says which ran.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc import ot
    >>> x, y = np.array([[0.0], [1.0]]), np.array([[0.1], [1.3]])
    >>> result = ot.solve_sample(x, y, reg=0.01)
    >>> result.a_to_b(np.array([[0.0], [1.0]])).round(3)
    array([[0.1],
           [1.3]])
    >>> round(float(result.value_linear), 4)
    0.05
    """
    check_options(reg_type=reg_type, method=method, grad=grad, storage=storage, callback=callback)
    check_choice("lazy", lazy, (True, False, "auto"))
    soft = unbalanced is not None and not is_hard(unbalanced)
    points = read_points(X_a, X_b, a, b, reg, balanced=not soft)
    known = callable(metric) or metric in LAYER_METRICS
    if lazy == "auto":
        size = 3 * len(points.a) * len(points.b) * points.X.element_size()
        lazy = known and not soft and size > free_bytes(points.X.device) / 4
    if lazy:
        if not known:
            named = ", ".join(map(repr, LAYER_METRICS))
            raise ValueError(f"metric must be {named} or a function for a lazy problem; got {metric!r}.")
        check_lazy(unbalanced=unbalanced if soft else None, method=method, grad=grad, round=round, storage=storage)
    budget = check_budget(tol, max_iter, points.X.dtype, lazy=bool(lazy))
    start = read_start(potentials_init, points.a, points.b)
    tracker = Tracker(*budget, callback, verbose)
    form: Form
    if lazy:
        form, outcome = _solve_lazy(points, metric, tracker, grad, start)
        name = "newton"
    else:
        inputs = DenseInputs(points.given, cost_matrix(points.X, points.Y, metric), points.a, points.b, points.reg)
        check_cost("metric", inputs.M)
        rho = read_rho(unbalanced, inputs.M)
        if rho is not None:
            check_unbalanced(reg_type=reg_type, method=method, grad=grad, round=round)
            form, outcome = solve_unbalanced(inputs, rho, tracker, grad=grad, start=start)
            form.images = partial(barycentric_map, points, metric, *form.potentials())  # type: ignore[method-assign]
            name = "newton"
        else:
            check_finite_pairs(inputs.M, inputs.a, inputs.b)
            outcome, name, run = solve_balanced(inputs, tracker, method=method, start=start, storage=storage, grad=grad)
            form = PointForm(points, metric, inputs.M, outcome.f, outcome.g, grad=grad, rounded=round, run=run)
    result = OTResult(form, outcome, tracker, given=points.given, reg=plain(reg), reg_type=reg_type, method=name)
    warn_unless_converged(result)
    return result


def check_lazy(*, unbalanced: Any, method: str, grad: str, round: bool, storage: str) -> None:
    """Raise ValueError for what a problem without stored costs has no version of."""
    if unbalanced is not None:
        raise ValueError(f"unbalanced must be None for a lazy problem; got {unbalanced}.")
    for name, value, allowed in (
        ("method", method, ("auto", "newton")),
        ("grad", grad, ("implicit", "envelope")),
        ("round", round, (False,)),
        ("storage", storage, ("auto",)),
    ):
        if value not in allowed:
            shown = " or ".join(map(repr, allowed))
            raise ValueError(f"{name} must be {shown} for a lazy problem; got {value!r}.")


def _solve_lazy(
    points: PointInputs, metric: Any, tracker: Tracker, grad: str, start: tuple[Tensor, Tensor] | None
) -> tuple[LazyForm, Outcome]:
    """Solve without storing costs: masses scaled to 1, points without weight left out and given potentials after."""
    with torch.no_grad():
        X, Y, a, b = (t.detach() for t in points[1:5])
        a, b, eps = a.double(), b.double(), float(points.reg)
        rows, columns = (w > 0 for w in (a, b))
        mass = a.sum()
        g0 = None if start is None else start[1].double()[columns]
        sides = (X[rows], Y[columns], a[rows] / mass, b[columns] / b.sum())
        try:
            outcome = solve_lazy(*sides, eps, metric, tracker, g0)
        finally:
            tracker.close()
        f, g = a.new_zeros(a.shape), b.new_zeros(b.shape)
        f[rows], g[columns] = outcome.f - eps * mass.log(), outcome.g
        # Points without weight: what they would pay if they had some.
        if not bool(rows.all()):
            height = g[columns] + eps * b[columns].log()
            f[~rows] = bounded(-eps * logsumexp(metric, X[~rows].double(), Y[columns].double(), height, eps=eps))
        if not bool(columns.all()):
            height = f[rows] + eps * a[rows].log()
            idle, active = Y[~columns].double(), X[rows].double()
            g[~columns] = bounded(-eps * logsumexp(flipped(metric), idle, active, height, eps=eps))
        constant = (b @ g) / b.sum()
        outcome = outcome._replace(f=f + constant, g=g - constant)
    return LazyForm(points, metric, outcome.f, outcome.g, grad=grad), outcome
