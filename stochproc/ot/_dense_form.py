"""What can be computed of a solved problem whose costs are stored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochproc.ot import _gradients as gradients
from stochproc.ot._form import Form, log_plan
from stochproc.ot._gradients_unrolled import Unrolled
from stochproc.ot._inputs import DenseInputs
from stochproc.ot._rounding import round_plan

__all__ = ["DenseForm"]

# Entries of a sparse plan are kept above this part of the smaller of the two weights.
SPARSE_LEVEL = 1e-12


class DenseForm(Form):
    """A balanced problem with stored costs.

    Parameters
    ----------
    inputs : DenseInputs
        As the caller gave them, in the graph.
    f, g : Tensor of shape (n,) and (m,)
        Solved potentials, float64, for the masses of the caller, outside the graph.
    grad : {"implicit", "envelope"}
        What gradients outputs carry; "envelope" leaves them to the value.
    rounded : bool
        Whether the plan is rounded to exact marginals.
    run : Unrolled, default=None
        Iterations whose graph takes the place of implicit gradients.
    """

    def __init__(
        self,
        inputs: DenseInputs,
        f: Tensor,
        g: Tensor,
        *,
        grad: str = "implicit",
        rounded: bool = False,
        run: Unrolled | None = None,
    ) -> None:
        self.given, self.M, self.a, self.b, self.reg = inputs
        self.f, self.g = f, g
        self.rounded, self.run = rounded, run
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in inputs[1:])
        self.tracked = {"value": tracked, "plan": tracked and grad == "implicit"}

    @property
    def _arguments(self) -> tuple[Tensor, ...]:
        return self.M, self.a, self.b, self.reg, self.f, self.g

    def _constants(self) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in self._arguments)

    def potentials(self) -> tuple[Tensor, Tensor]:
        if self.run is not None:
            return self.run.f.to(self.M.dtype), self.run.g.to(self.M.dtype)
        if self.tracked["plan"]:
            return gradients.potentials(*self._arguments)
        return self.f.to(self.M.dtype), self.g.to(self.M.dtype)

    def plan(self) -> Tensor:
        if self.run is not None:
            plan = self.run.plan.to(self.M.dtype)
        else:
            plan = gradients.plan(*self._arguments) if self.tracked["plan"] else self._plan().to(self.M.dtype)
        if not self.rounded:
            return plan
        exact = round_plan(plan, self.a, self.b, forbidden=self._forbidden())
        return plan if exact is None else _Rounded.apply(plan, exact)

    def _plan(self) -> Tensor:
        return log_plan(*self._constants()).exp_()

    def _forbidden(self) -> Tensor | None:
        M = self.M.detach()
        return None if bool(M.amax() < math.inf) else M == math.inf

    def sparse_plan(self) -> Tensor:
        plan, a, b = self._plan(), self.a.detach(), self.b.detach()
        level = SPARSE_LEVEL * torch.minimum(a.unsqueeze(-1), b.unsqueeze(-2))
        kept = plan > level
        # A row or column all of whose entries are small keeps its largest.
        kept |= (plan == plan.amax(-1, keepdim=True)) & (plan > 0)
        kept |= (plan == plan.amax(-2, keepdim=True)) & (plan > 0)
        where = kept.nonzero().T
        values = plan[tuple(where)].to(self.M.dtype)
        return torch.sparse_coo_tensor(where, values, plan.shape, is_coalesced=True, check_invariants=True)

    def lazy_plan(self) -> Any:
        return self.plan()

    def value(self) -> Tensor:
        if self.run is not None:
            return ((self.a * self.run.f).sum() + (self.b * self.run.g).sum()).to(self.M.dtype)
        if self.tracked["value"]:
            return gradients.value(*self._arguments)
        return self.dual_value().to(self.M.dtype)

    def value_linear(self) -> Tensor:
        if self.run is not None:
            return (self.run.plan * torch.where(self.M < math.inf, self.M, 0.0)).sum().to(self.M.dtype)
        if self.tracked["plan"]:
            return gradients.value_linear(*self._arguments)
        return self._linear(self._plan()).to(self.M.dtype)

    def _linear(self, plan: Tensor) -> Tensor:
        M = self.M.detach()
        # 0 * inf is no cost.
        return (plan * torch.where(plan > 0, M, 0.0)).sum((-1, -2))

    def marginals(self) -> tuple[Tensor, Tensor]:
        plan = self.plan()
        return plan.sum(-1), plan.sum(-2)

    def dual_value(self) -> Tensor:
        a, b = self.a.detach().double(), self.b.detach().double()
        return (a * self.f).sum(-1) + (b * self.g).sum(-1)

    def primal_value(self) -> Tensor:
        a, b, reg = self._constants()[1:4]
        a, b = a.double(), b.double()
        plan = round_plan(self._plan(), a, b, forbidden=self._forbidden())
        if plan is None:
            return reg.new_tensor(math.inf)
        log_ab = torch.where(plan > 0, a.unsqueeze(-1).log() + b.unsqueeze(-2).log(), 0.0)
        divergence = (torch.xlogy(plan, plan) - plan * log_ab).sum((-1, -2))
        return self._linear(plan) + reg * divergence

    def lower_bound(self) -> Tensor:
        M, a, b = self._constants()[:3]
        reduced = torch.where((b > 0).unsqueeze(-2), M - self.g.unsqueeze(-2), math.inf)
        f = torch.where(a > 0, reduced.amin(-1), 0.0)
        return (a.double() * f).sum(-1) + (b.double() * self.g).sum(-1)

    def images(self, points: Any, values: Any, *, forward: bool) -> Tensor:
        if points is not None:
            raise ValueError(
                f"{'X' if forward else 'Y'} must be None for a problem given by its costs M; new points need "
                "solve_sample, which knows the metric."
            )
        plan = self.plan() if forward else self.plan().mT
        shares = plan / plan.sum(-1, keepdim=True).clamp(min=torch.finfo(plan.dtype).tiny)
        return shares if values is None else shares @ values.to(shares)


class _Rounded(torch.autograd.Function):
    """The rounded plan with the gradient of the plan: at the optimum, where nothing is left to round, they agree."""

    @staticmethod
    def forward(ctx: Any, plan: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
