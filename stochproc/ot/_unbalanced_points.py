"""Unbalanced problems between points whose costs are never stored: from arguments to values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochproc.kernels import logsumexp
from stochproc.ot._form import Form
from stochproc.ot._inputs import PointInputs
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._point_form import flipped
from stochproc.ot._problem import span_of_points
from stochproc.ot._unbalanced import Split, split, unbalanced_value
from stochproc.ot._unbalanced_gradients import slopes
from stochproc.ot._unbalanced_lazy import unbalanced_points

__all__ = ["UnbalancedPointForm", "solve_unbalanced_lazily"]

Pair = tuple[Tensor, Tensor]


class UnbalancedPointForm(Form):
    """The value of a solved problem, with its gradient; plans are not offered.

    Parameters
    ----------
    points : PointInputs
        In float64 and in the graph.
    metric : str or callable
        A cost of the kernel layer.
    rho : tuple of two Tensors
        Strengths of the penalties, 0-d in float64.
    active : tuple of two Tensors of int64
        Rows and columns with weight.
    solved : Split
        Their potentials.
    full : tuple of two Tensors
        Potentials of all rows and columns, the gauge included.
    """

    def __init__(self, points: PointInputs, metric: Any, rho: Pair, active: Pair, solved: Split, full: Pair) -> None:
        self.points, self.metric, self.rho, self.active, self.solved, self.full = (
            points,
            metric,
            rho,
            active,
            solved,
            full,
        )
        self.a, self.b, self.reg = points.a, points.b, points.reg

    def potentials(self) -> tuple[Tensor, Tensor]:
        return self.full

    def value(self) -> Tensor:
        return _PointValue.apply(self, *self.points[1:], *self.rho)

    def response(self, X: Tensor, Y: Tensor, eps: Tensor) -> Tensor:
        """Return the balanced potential of the rows that answers g, differentiable in points and eps."""
        rows, columns = self.active
        height = self.solved.g + eps * self.b.detach()[columns].log()
        return -eps * logsumexp(self.metric, X[rows], Y[columns], height, eps=eps)

    def sums(self, response: Tensor) -> Tensor:
        """Return the sums of the rows of the plan."""
        return self.a.detach()[self.active[0]] * ((self.solved.f - response) / self.reg.detach()).exp()

    def dual_value(self) -> Tensor:
        X, Y, a, b, eps = _constants(self.points)
        f, g = (torch.where(w > 0, t, 0.0) for w, t in zip((a, b), self.full, strict=True))
        with torch.no_grad():
            mass = self.sums(self.response(X, Y, eps)).sum()
        rho_a, rho_b = (float(rho.detach()) for rho in self.rho)
        return unbalanced_value(f, g, 0.0, a, b, float(eps), rho_a, rho_b, mass)


class _PointValue(torch.autograd.Function):
    """The regularised cost; its backward is the envelope theorem."""

    @staticmethod
    def forward(ctx: Any, form: UnbalancedPointForm, *inputs: Tensor) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(*inputs)
        return form.dual_value()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        form, inputs = ctx.form, ctx.saved_tensors
        X, Y, eps = (inputs[i].detach().requires_grad_() for i in (0, 1, 4))
        a, b, rho_a, rho_b = (inputs[i].detach() for i in (2, 3, 5, 6))
        with torch.enable_grad():
            response = form.response(X, Y, eps)
            sums = form.sums(response.detach())
            of_X, of_Y, of_eps = torch.autograd.grad((sums * response).sum(), (X, Y, eps))
        # The derivative of the response in eps is the divergence of the rows of the plan from b; the rest is that of
        # its row sums from a.
        of_eps = of_eps + (sums * (form.solved.f - response.detach())).sum() / eps.detach()
        of_eps = of_eps + a.sum() * b.sum() - sums.sum()
        of_a, of_rho_a = slopes(form.full[0], a, rho_a, eps.detach(), b.sum())
        of_b, of_rho_b = slopes(form.full[1], b, rho_b, eps.detach(), a.sum())
        found = tuple(grad.detach() * t for t in (of_X, of_Y, of_a, of_b, of_eps, of_rho_a, of_rho_b))
        if torch.is_grad_enabled():
            found = tuple(_NotTwice.apply(t, grad, *inputs) for t in found)
        return None, *found


class _NotTwice(torch.autograd.Function):
    """Identity on its first argument; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *_: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError("second derivatives of an unbalanced problem need stored costs: set lazy=False.")


def solve_unbalanced_lazily(
    points: PointInputs, metric: Any, rho: Pair, tracker: Tracker
) -> tuple[UnbalancedPointForm, Outcome]:
    """Solve a checked problem in float64."""
    with torch.no_grad():
        X, Y, a, b, reg = _constants(points)
        eps, strengths = float(reg), (float(rho[0].detach()), float(rho[1].detach()))
        rows, columns = ((w > 0).nonzero().squeeze(1) for w in (a, b))
        sides = (X[rows], Y[columns], a[rows], b[columns])
        try:
            outcome = unbalanced_points(*sides, eps, metric, *strengths, tracker, span_of_points(X, Y, metric))
        finally:
            tracker.close()
        solved = split(outcome.f, outcome.g, a[rows], b[columns], *strengths)
        f, g = a.new_empty(a.shape), b.new_empty(b.shape)
        f[rows], g[columns] = solved.f + solved.gauge, solved.g - solved.gauge
        for full, weights, own, other, height, gauge, cost, strength in (
            (f, a, X, Y[columns], solved.g + eps * b[columns].log(), solved.gauge, metric, strengths[0]),
            (g, b, Y, X[rows], solved.f + eps * a[rows].log(), -solved.gauge, flipped(metric), strengths[1]),
        ):
            idle = weights == 0
            if bool(idle.any()):
                answer = gauge - eps * logsumexp(cost, own[idle], other, height, eps=eps)
                full[idle] = answer / (1 + eps / strength)
    form = UnbalancedPointForm(points, metric, rho, (rows, columns), solved, (f, g))
    return form, outcome._replace(f=f, g=g)


def _constants(points: PointInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = points
    return p.X.detach(), p.Y.detach(), p.a.detach(), p.b.detach(), p.reg.detach()
