"""What can be computed of a solved unbalanced problem with stored costs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc.ot._dense_form import DenseForm
from stochproc.ot._inputs import DenseInputs
from stochproc.ot._unbalanced import Split, unbalanced_value
from stochproc.ot._unbalanced_gradients import NewtonSystem, implicit, penalty_slope, plan_of, slopes

__all__ = ["UnbalancedForm"]


class _Numbers(NamedTuple):
    """Costs, weights and strengths in float64, of the rows and columns that take part."""

    M: Tensor
    a: Tensor
    b: Tensor
    eps: Tensor
    rho_a: Tensor
    rho_b: Tensor


class UnbalancedForm(DenseForm):
    r"""An unbalanced problem with stored costs.

    Rows and columns that can send or receive nothing, for want of weight or of a finite cost, do not take part. With
    weight they are destroyed whole: potential ``inf``, plan 0. Without, their potential is the one that a small weight
    there would have.

    Parameters
    ----------
    inputs : DenseInputs
        As the caller gave them, in the graph.
    rho : tuple of two Tensors
        Strengths of the penalties, 0-d in float64, ``inf`` for a hard side (not both).
    rows, columns : Tensor of int64
        What takes part.
    solved : Split
        Potentials of what takes part, float64, outside the graph.
    grad : {"implicit", "envelope"}
        What gradients outputs carry; "envelope" leaves them to the value.
    """

    def __init__(
        self,
        inputs: DenseInputs,
        rho: tuple[Tensor, Tensor],
        rows: Tensor,
        columns: Tensor,
        solved: Split,
        *,
        grad: str = "implicit",
    ) -> None:
        super().__init__(inputs, solved.f, solved.g, grad=grad)
        self.rho, self.gauge = rho, solved.gauge
        self.rows, self.columns = rows, columns
        self.whole = rows.numel() == self.M.shape[0] and columns.numel() == self.M.shape[1]
        if torch.is_grad_enabled() and any(t.requires_grad for t in rho):
            self.tracked = {"value": True, "plan": grad == "implicit"}

    @property
    def _inputs(self) -> tuple[Tensor, ...]:
        return self.M, self.a, self.b, self.reg, *self.rho

    @property
    def _strengths(self) -> tuple[float, float]:
        return float(self.rho[0].detach()), float(self.rho[1].detach())

    def _numbers(self, M: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho_a: Tensor, rho_b: Tensor) -> _Numbers:
        if not self.whole:
            M, a, b = M[self.rows][:, self.columns], a[self.rows], b[self.columns]
        return _Numbers(M.double(), a.double(), b.double(), eps.double(), rho_a.double(), rho_b.double())

    def _fixed(self) -> _Numbers:
        return self._numbers(*(t.detach() for t in self._inputs))

    def _on_graph(self, x: _Numbers) -> tuple[Tensor, Tensor]:
        """Return the potentials f and g, gauge apart, with the first derivatives of the solution."""
        with torch.no_grad():
            P = plan_of(*x[:4], self.f, self.g)[0]
            system = NewtonSystem(P, float(x.eps), float(x.rho_a), float(x.rho_b))
        plan = plan_of(*x[:4], self.f, self.g)[0]
        r = penalty_slope(self.f + self.gauge, x.a, x.rho_a) - plan.sum(1)
        s = penalty_slope(self.g - self.gauge, x.b, x.rho_b) - plan.sum(0)
        df, dg = implicit(system, r, s)
        return self.f + df, self.g + dg

    def _spread(self, plan: Tensor) -> Tensor:
        """Return a plan with the zeros of what takes no part."""
        if self.whole:
            return plan
        out = plan.new_zeros(self.M.shape)
        return out.index_put((self.rows.unsqueeze(1), self.columns), plan)

    def _plan(self) -> Tensor:
        return self._spread(plan_of(*self._fixed()[:4], self.f, self.g)[0])

    def plan(self) -> Tensor:
        if not self.tracked["plan"]:
            return self._plan().to(self.M.dtype)
        x = self._numbers(*self._inputs)
        return self._spread(plan_of(*x[:4], *self._on_graph(x))[0]).to(self.M.dtype)

    def potentials(self) -> tuple[Tensor, Tensor]:
        if not self.tracked["plan"]:
            f, g = self._full(tuple(t.detach() for t in self._inputs), self.f, self.g)
        else:
            f, g = self._full(self._inputs, *self._on_graph(self._numbers(*self._inputs)))
        return f.to(self.M.dtype), g.to(self.M.dtype)

    def _full(self, inputs: tuple[Tensor, ...], f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return potentials of all rows and columns, the gauge included."""
        if self.whole:
            return f + self.gauge, g - self.gauge
        M, a, b, eps, rho_a, rho_b = inputs
        out = []
        sides = (
            (M, a, b, f, g, self.rows, self.columns, rho_a, self.gauge),
            (M.T, b, a, g, f, self.columns, self.rows, rho_b, -self.gauge),
        )
        for cost, weights, others, own, other, mine, theirs, rho, gauge in sides:
            full = cost.new_full((cost.shape[0],), math.inf, dtype=torch.float64)
            # Where there is no weight: one sweep, the gauge included on both sides.
            light = ((weights == 0) & (cost[:, theirs] < math.inf).any(1)).nonzero().squeeze(1)
            if light.numel():
                z = (other - cost[light][:, theirs].double()) / eps + others[theirs].double().log()
                answer = gauge - eps * torch.logsumexp(z, 1)
                full = full.index_put(
                    (light,), answer if math.isinf(float(rho.detach())) else answer * rho / (rho + eps)
                )
            out.append(full.index_put((mine,), own + gauge))
        return out[0], out[1]

    def value(self) -> Tensor:
        if not self.tracked["value"]:
            return self.dual_value().to(self.M.dtype)
        return _Value.apply(self, *self._inputs)

    def value_linear(self) -> Tensor:
        if not self.tracked["plan"]:
            return self._linear(self._plan()).to(self.M.dtype)
        x = self._numbers(*self._inputs)
        plan = plan_of(*x[:4], *self._on_graph(x))[0]
        return (plan * torch.where(x.M < math.inf, x.M, 0.0)).sum().to(self.M.dtype)

    def dual_value(self) -> Tensor:
        a, b, eps = self.a.detach().double(), self.b.detach().double(), float(self.reg.detach())
        f, g = self._full(tuple(t.detach() for t in self._inputs), self.f, self.g)
        # What no weight stands behind counts nothing, however far off its potential is.
        f, g = torch.where(a > 0, f, 0.0), torch.where(b > 0, g, 0.0)
        return unbalanced_value(f, g, 0.0, a, b, eps, *self._strengths, self._plan().sum())

    def primal_value(self) -> Tensor:
        plan, a, b = self._plan(), self.a.detach().double(), self.b.detach().double()
        rho_a, rho_b = self._strengths
        # Of a hard side the sums are made exact; the other side takes what comes.
        if math.isinf(rho_a):
            plan = plan * torch.where(a > 0, a / plan.sum(1), 0.0).unsqueeze(1)
        if math.isinf(rho_b):
            plan = plan * torch.where(b > 0, b / plan.sum(0), 0.0)
        log_ab = torch.where(plan > 0, a.unsqueeze(1).log() + b.log(), 0.0)
        divergence = (torch.xlogy(plan, plan) - plan * log_ab - plan).sum() + a.sum() * b.sum()
        value = self._linear(plan) + float(self.reg.detach()) * divergence
        for weights, sums, rho in ((a, plan.sum(1), rho_a), (b, plan.sum(0), rho_b)):
            if math.isfinite(rho):
                ratio = torch.where(weights > 0, sums / weights, 1.0)
                value = value + rho * (torch.xlogy(sums, ratio) - sums + weights).sum()
        return value

    def lower_bound(self) -> Tensor:
        M, a, b = self.M.detach().double(), self.a.detach().double(), self.b.detach().double()
        g = self._full(tuple(t.detach() for t in self._inputs), self.f, self.g)[1]
        taking = b > 0
        f = (M[:, taking] - g[taking]).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).amin(1)
        f, g = torch.where(a > 0, f, 0.0), torch.where(taking, g, 0.0)
        nothing = M.new_zeros(())
        return unbalanced_value(f, g, 0.0, a, b, 0.0, *self._strengths, nothing)

    def value_gradients(self, inputs: tuple[Tensor, ...], *, on_graph: bool) -> tuple[Tensor, ...]:
        """Return the derivatives of the value in costs, weights, eps and strengths, by the envelope theorem.

        On the graph they carry the implicit derivative of the potentials, so that they can be differentiated once.
        """
        x = self._numbers(*inputs)
        f, g = self._on_graph(x) if on_graph else (self.f, self.g)
        plan, z = plan_of(*x[:4], f, g)
        a, b = inputs[1:3]
        mass_a, mass_b = a.double().sum(), b.double().sum()
        full = self._full(inputs, f, g)
        of_a, of_rho_a = slopes(full[0], a.double(), x.rho_a, x.eps, mass_b)
        of_b, of_rho_b = slopes(full[1], b.double(), x.rho_b, x.eps, mass_a)
        of_eps = mass_a * mass_b - plan.sum() + (plan * z).sum()
        return self._spread(plan), of_a, of_b, of_eps, of_rho_a, of_rho_b


class _Value(torch.autograd.Function):
    """The regularised cost; its backward is the envelope theorem, and differentiable."""

    @staticmethod
    def forward(ctx: Any, form: UnbalancedForm, *inputs: Tensor) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(*inputs)
        return form.dual_value().to(form.M.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        found = ctx.form.value_gradients(inputs, on_graph=torch.is_grad_enabled())
        return None, *((grad * t).to(x.dtype) for t, x in zip(found, inputs, strict=True))
