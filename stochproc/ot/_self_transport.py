"""From weighted points to their solved transport to themselves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochproc.kernels import logsumexp
from stochproc.ot._dense_form import DenseForm
from stochproc.ot._dist import cost_matrix
from stochproc.ot._form import Form
from stochproc.ot._inputs import DenseInputs, PointInputs, check_cost
from stochproc.ot._lazy_form import LazyForm
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import span_of_points
from stochproc.ot._symmetric import PointSweeps, StoredSweeps, Sweeps, symmetric
from stochproc.ot._unbalanced import Split, span_of
from stochproc.ot._unbalanced_form import UnbalancedForm
from stochproc.ot._unbalanced_points import UnbalancedPointForm

__all__ = ["solve_self"]

# Passes are cheap here, and their err counts in full where the other problem is close.
TOL = {True: 1e-12, False: 1e-8}
# What err rounding allows, relative to span / eps.
FLOOR = 1e-16
# Relative difference of the costs of (x, y) and of (y, x) that is put down to rounding.
ASYMMETRY = 1e-9
# Points of a sample on which a user's metric is looked at.
SAMPLE = 64


def solve_self(
    points: PointInputs, metric: Any, rho: Tensor | None, tracker: Tracker, *, stored: bool
) -> tuple[Form, Outcome]:
    """Solve the transport of a to itself, in float64; the two potentials of the form are the same."""
    M = cost_matrix(points.X, points.X, metric) if stored else None
    with torch.no_grad():
        X, a, eps = points.X.detach(), points.a.detach(), float(points.reg.detach())
        strength = math.inf if rho is None else float(rho.detach())
        active = (a > 0).nonzero().squeeze(1)
        whole = active.numel() == a.numel()
        weights = a if whole else a[active]
        mass = weights.sum() if math.isinf(strength) else 1.0
        sweeps: Sweeps
        if M is not None:
            cost = M.detach() if whole else M.detach()[active][:, active]
            check_cost("metric", cost)
            span = span_of(cost)
            _check_symmetric(cost, span)
            sweeps = StoredSweeps(cost, span)
        else:
            span = span_of_points(X, X, metric)
            sample = X[:: max(1, len(X) // SAMPLE)]
            if callable(metric):
                _check_symmetric(metric(sample, sample), span)
            sweeps = PointSweeps(X if whole else X[active], metric, span)
        tracker.tol = max(min(tracker.tol, TOL[stored]), FLOOR * span / eps)
        try:
            outcome = symmetric(sweeps, weights / mass, eps, strength, tracker)
        finally:
            tracker.close()
        f = outcome.f - 0.5 * eps * math.log(mass)
        full = f if whole else _extended(f, X, M, active, weights, eps, metric, strength)
    outcome = outcome._replace(f=full, g=full)
    if math.isinf(strength):
        if M is None:
            return LazyForm(points, metric, full, full), outcome
        return DenseForm(DenseInputs(points.given, M, points.a, points.a, points.reg), full, full), outcome
    both: Any = (rho, rho)
    if M is None:
        return UnbalancedPointForm(points, metric, both, (active, active), Split(f, f, 0.0), (full, full)), outcome
    inputs = DenseInputs(points.given, M, points.a, points.a, points.reg)
    return UnbalancedForm(inputs, both, active, active, Split(f, f, 0.0)), outcome


def _extended(
    f: Tensor, X: Tensor, M: Tensor | None, active: Tensor, a: Tensor, eps: float, metric: Any, strength: float
) -> Tensor:
    """Return the potential of all points; those without weight get what a small weight there would have."""
    height = f + eps * a.log()
    idle = torch.ones(X.shape[0], dtype=torch.bool, device=X.device).index_fill_(0, active, False)
    if M is not None:
        soft = torch.logsumexp((height - M.detach()[idle][:, active]) / eps, 1)
    else:
        soft = logsumexp(metric, X[idle], X[active], height, eps=eps)
    full = f.new_empty(X.shape[0])
    full[active] = f
    full[idle] = -eps / (1 + eps / strength) * soft
    return full


def _check_symmetric(cost: Tensor, span: float) -> None:
    off = float((cost - cost.T).abs().amax())
    if not off <= ASYMMETRY * span:
        raise ValueError(f"metric must give (x, y) and (y, x) the same cost; got costs that differ by {off:.3g}.")
