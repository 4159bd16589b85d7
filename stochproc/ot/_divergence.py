"""The Sinkhorn divergence: entropic transport without the bias that makes it positive between equal weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_choice
from stochproc._warnings import warn_caller
from stochproc.ot._dense_form import DenseForm
from stochproc.ot._dense_solve import solve_dense
from stochproc.ot._dist import cost_matrix
from stochproc.ot._inputs import DenseInputs, PointInputs, check_budget, check_cost, read, read_points
from stochproc.ot._inputs import _points as checked_points
from stochproc.ot._memory import free_bytes
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._point_form import LAYER_METRICS
from stochproc.ot._self_transport import FLOOR, solve_self
from stochproc.ot._solve_sample import _solve_lazy
from stochproc.ot._unbalanced import span_of
from stochproc.ot._unbalanced_points import solve_unbalanced_lazily
from stochproc.ot._unbalanced_solve import Rho, read_rho, solve_unbalanced

__all__ = ["sinkhorn_divergence"]

# The three terms nearly cancel: the one with two sides is solved at least this far.
CROSS_TOL = 1e-10


def sinkhorn_divergence(
    X: Any,
    Y: Any,
    reg: Any,
    a: Any = None,
    b: Any = None,
    *,
    metric: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
    unbalanced: Any = None,
    tol: float | int | None = None,
    max_iter: int | None = None,
    lazy: bool | str = "auto",
) -> Any:
    r"""Compute the Sinkhorn divergence between two clouds of weighted points.

    .. math:: S(a, b) = \mathrm{OT}(a, b) - \tfrac12 \mathrm{OT}(a, a) - \tfrac12 \mathrm{OT}(b, b)
              + \tfrac{\varepsilon}{2} (m_a - m_b)^2

    with OT the regularised cost of :func:`solve_sample` and m the total masses, whose term is there for unbalanced
    problems alone. For the named metrics S is positive, and 0 only between equal weights; it is a loss for fitting
    one cloud to another, between the transport cost (small reg) and a kernel distance (large reg) [1]_.

    Parameters
    ----------
    X, Y : array or Tensor of shape (n, d) and (m, d)
        Finite points.
    reg : float or 0-d Tensor
        Positive, in the unit of the metric.
    a, b : array or Tensor of shape (n,) and (m,), default=None
        Non-negative weights, of equal mass unless ``unbalanced``; None is uniform, of mass 1.
    metric : str or callable, default="sqeuclidean"
        As in :func:`solve_sample`; symmetric in its two points.
    unbalanced : float or pair of floats, default=None
        Price rho of mass that is created or destroyed, as in :func:`solve`. Of a pair, OT(a, a) takes the first for
        both of its sides and OT(b, b) the second, which keeps S positive [2]_.
    tol : float, default=None
        Largest err of each of the three problems, as in :func:`solve`; 1e-10 and above is run at 1e-10 where costs
        are stored, or at 1e-16 times the range of the costs over reg, which is rounding, where that is more. None is
        1e-6 where they are not stored.
    max_iter : int, default=None
        Passes over the pairs at most, in each problem; None is 2000.
    lazy : bool or "auto", default="auto"
        Whether costs are recomputed in every pass instead of being stored. "auto" decides for each of the three
        problems, by the rule of :func:`solve_sample`.

    Returns
    -------
    float or 0-d Tensor
        ``numpy.floating`` for NumPy; for torch a number in the autograd graph of X, Y, a, b, reg and unbalanced.

    Raises
    ------
    ValueError
        If an argument is out of its range, shapes do not fit, masses differ in a balanced problem, or the metric is not
        symmetric or not finite.
    TypeError
        If NumPy and torch, or devices, are mixed, or a dtype is neither integer, float32 nor float64.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If one of the problems did not reach its tolerance.

    Notes
    -----
    Computed in float64 whatever the dtype of the points, since the terms nearly cancel. OT(a, a) has one potential for
    both sides, which some 10 to 30 passes find. Gradients come from the optimal potentials, at about the cost of one
    pass a problem; with stored costs second derivatives are exact too. Derivatives in a and b refer to changes that
    keep the masses equal, unless ``unbalanced``. Equal arguments return 0 at once.

    References
    ----------
    .. [1] J. Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", AISTATS 2019.
    .. [2] T. Séjourné et al., "Sinkhorn divergences for unbalanced optimal transport", arXiv:1910.12958.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc import ot
    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> float(ot.sinkhorn_divergence(x, x, reg=0.5))
    0.0
    >>> round(float(ot.sinkhorn_divergence(x, x + 3.0, reg=0.5)), 6)
    9.0
    """
    check_choice("lazy", lazy, (True, False, "auto"))
    _check_points(X, Y)
    points = read_points(X, Y, a, b, reg, balanced=unbalanced is None)
    known = callable(metric) or metric in LAYER_METRICS
    if lazy is True and not known:
        named = ", ".join(map(repr, LAYER_METRICS))
        raise ValueError(f"metric must be {named} or a function for a lazy problem; got {metric!r}.")
    rho = read_rho(unbalanced, points.X)
    if unbalanced is not None and rho is None:
        # Infinite on both sides: balanced after all, and the masses have to agree.
        points = read_points(X, Y, a, b, reg)
    dtype = points.X.dtype
    if _same(points) and (rho is None or float(rho[0].detach()) == float(rho[1].detach())):
        value = _Nothing.apply(*points[1:], *(rho or ()))
    else:
        value = _Terms(points, metric, rho, tol, max_iter, lazy if known else False).value()
    value = points.given.back(value.to(dtype))
    return value if points.given.is_torch else value[()]


def _check_points(X: Any, Y: Any) -> None:
    """Refuse points by the names that they have here."""
    found = read(X=X, Y=Y)[1]
    x, y = (checked_points(name, found[name]) for name in ("X", "Y"))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"X and Y must have the same number of columns; got {x.shape[1]} and {y.shape[1]}.")


def _same(points: PointInputs) -> bool:
    pairs = ((points.X, points.Y), (points.a, points.b))
    return all(x.shape == y.shape and torch.equal(x.detach(), y.detach()) for x, y in pairs)


class _Terms:
    """The three problems, in float64."""

    def __init__(
        self, points: PointInputs, metric: Any, rho: Rho | None, tol: Any, max_iter: Any, lazy: bool | str
    ) -> None:
        self.points = PointInputs(points.given, *(t.double() for t in points[1:]))
        self.metric = in_double(metric, points.X.dtype)
        self.rho, self.lazy = rho, lazy
        self.tol = {lazily: check_budget(tol, max_iter, torch.float64, lazy=lazily) for lazily in (False, True)}
        self.unmet: list[Outcome] = []

    def value(self) -> Tensor:
        p = self.points
        first, f = self._own(p.X, p.a, None if self.rho is None else self.rho[0])
        second, g = self._own(p.Y, p.b, None if self.rho is None else self.rho[1])
        value = self._cross((f, g)) - 0.5 * (first + second)
        if self.rho is not None:
            value = value + 0.5 * p.reg * (p.a.sum() - p.b.sum()).square()
        if self.unmet:
            _warn(max(self.unmet, key=lambda outcome: outcome.err))
        if not bool(value.detach().isfinite()):
            raise ValueError("metric must give finite costs; got a divergence that is not.")
        if self.metric in LAYER_METRICS:
            # Proven for these; what is below 0 is rounding, or the err of the larger term.
            value = value + (value.detach().clamp(min=0.0) - value.detach())
        return value

    def _stored(self, n: int, m: int) -> bool:
        if self.lazy != "auto":
            return not self.lazy
        return 3 * n * m * self.points.X.element_size() <= free_bytes(self.points.X.device) / 4

    def _tracker(self, stored: bool) -> Tracker:
        tol, max_iter = self.tol[not stored]
        return Tracker(min(tol, CROSS_TOL) if stored else tol, max_iter)

    def _own(self, X: Tensor, a: Tensor, rho: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return OT(a, a) and its potential."""
        stored = self._stored(len(a), len(a))
        points = PointInputs(self.points.given, X, X, a, a, self.points.reg)
        form, outcome = solve_self(points, self.metric, rho, self._tracker(stored), stored=stored)
        self._note(outcome)
        value = form.value()
        if self.rho is not None and rho is not None and math.isinf(float(rho.detach())):
            # A hard side beside a soft one: its divergence has mass terms too.
            value = value + points.reg * (a.sum().square() - a.sum())
        return value, outcome.f

    def _cross(self, start: tuple[Tensor, Tensor]) -> Tensor:
        """Return OT(a, b), from a start that is right where the clouds are close."""
        p, stored = self.points, self._stored(len(self.points.a), len(self.points.b))
        tracker = self._tracker(stored)
        start = start if all(bool(t.isfinite().all()) for t in start) else None  # type: ignore[assignment]
        form: Any
        if not stored and self.rho is None:
            form, outcome = _solve_lazy(p, self.metric, tracker, "implicit", start)
        elif not stored and self.rho is not None:
            form, outcome = solve_unbalanced_lazily(p, self.metric, self.rho, tracker)
        else:
            inputs = DenseInputs(p.given, cost_matrix(p.X, p.Y, self.metric), p.a, p.b, p.reg)
            check_cost("metric", inputs.M)
            if self.rho is None:
                # As for the other two terms: what rounding leaves is no failure.
                tracker.tol = max(tracker.tol, FLOOR * span_of(inputs.M.detach()) / float(p.reg.detach()))
                outcome = solve_dense(inputs, tracker, start=start)[0]
                form = DenseForm(inputs, outcome.f, outcome.g)
            else:
                form, outcome = solve_unbalanced(inputs, self.rho, tracker, start=start)
        self._note(outcome)
        return form.value()

    def _note(self, outcome: Outcome) -> None:
        if outcome.message:
            self.unmet.append(outcome)


def in_double(metric: Any, dtype: torch.dtype) -> Any:
    """Return a metric that takes float64; a user's function gets the dtype that the user's points have."""
    if isinstance(metric, str) or dtype == torch.float64:
        return metric
    return lambda x, y: metric(x.to(dtype), y.to(dtype)).double()


def _warn(outcome: Outcome) -> None:
    from sklearn.exceptions import ConvergenceWarning

    warn_caller(
        f"a transport problem of the divergence did not converge (status '{outcome.status.value}'): {outcome.message}",
        ConvergenceWarning,
    )


class _Nothing(torch.autograd.Function):
    """The divergence between equal arguments: 0, as is its gradient; its second derivative is neither."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        zeros = tuple(torch.zeros_like(t) for t in inputs)
        if not torch.is_grad_enabled():
            return zeros
        return tuple(_Once.apply(zero, grad, *inputs) for zero in zeros)


class _Once(torch.autograd.Function):
    """Identity on its first argument; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *_: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(
            "second derivatives of the divergence between equal arguments are not available; move one of them."
        )
