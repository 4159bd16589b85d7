r"""Derivatives of an unbalanced solution by the implicit function theorem.

The potentials solve r = 0 with r the gradient of the dual, whose derivative in them is -H, the Newton matrix. One
Newton step with a constant inverse, z + H^{-1} r(z; inputs) at the solution z, changes nothing and has the derivative
of the solution in the inputs. What is computed from it by ordinary means therefore has exact first derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochproc.solvers import CG, safe_cholesky

__all__ = ["NewtonSystem", "implicit", "penalty_slope", "plan_of", "slopes"]

# Sizes up to which the reduced matrix is factored; beyond, products with the plan are cheaper.
DENSE_UP_TO = 512
# What the backward solves to, relative to the right-hand side.
RTOL = 1e-12
# Stands for marginals that have underflowed; their plan is 0.
TINY = 1e-280


def plan_of(M: Tensor, a: Tensor, b: Tensor, eps: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the plan and (f + g - M) / eps, in which forbidden pairs, whose plan is 0, are 0."""
    forbidden = M.numel() > 0 and bool(M.detach().amax() == math.inf)
    bounded = M < math.inf if forbidden else None
    if bounded is not None:
        M = torch.where(bounded, M, 0.0)
    z = (f.unsqueeze(1) + g - M) / eps
    plan = a.unsqueeze(1) * b * z.exp()
    if bounded is not None:
        plan, z = torch.where(bounded, plan, 0.0), torch.where(bounded, z, 0.0)
    return plan, z


def penalty_slope(f: Tensor, weights: Tensor, rho: Tensor) -> Tensor:
    """Return the derivative of a penalty in the potential: the marginal that it asks for."""
    return weights if math.isinf(float(rho.detach())) else weights * (-f / rho).exp()


def slopes(f: Tensor, weights: Tensor, rho: Tensor, eps: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the value in the weights of one side, of potential f, and in their penalty.

    ``other`` is the mass of the other side. An infinite f is that of weights that are destroyed.
    """
    if math.isinf(float(rho.detach())):
        return f - eps + eps * other, torch.zeros_like(rho)
    lost = f == math.inf
    ratio = torch.where(lost, 0.0, f) / rho
    kept = torch.where(lost, 0.0, (-ratio).exp())
    change = torch.where(lost, -1.0, torch.expm1(-ratio))
    return -rho * change - eps * kept + eps * other, -(weights * (change + ratio * kept)).sum()


class NewtonSystem:
    r"""The matrix H = [[diag(u / rho_a + P1 / eps), P / eps], [., diag(v / rho_b + P^T 1 / eps)]] and its inverse.

    The rows are eliminated. The reduced matrix is nearly singular along the vector of ones where rho is large, which
    is the gauge; that direction is solved for by itself.
    """

    def __init__(self, P: Tensor, eps: float, rho_a: float, rho_b: float) -> None:
        self.P, self.eps = P, eps
        # At the solution P 1 = u and P^T 1 = v; taken from P, the matrix is exactly that of a graph.
        self.u, self.c = P.sum(1).clamp(min=TINY), P.sum(0).clamp(min=TINY)
        self.soft = eps / (rho_a + eps)
        self.w = (self.soft + eps / rho_b) * self.c
        self.total = float(self.w.sum())
        self.factor: Tensor | None = None
        if P.shape[1] <= DENSE_UP_TO:
            self._factorise()

    def _factorise(self) -> None:
        half = self.P / self.u.sqrt().unsqueeze(1)
        S = (half.T @ half).mul_(self.soft - 1).fill_diagonal_(0.0)
        S.diagonal().copy_(self.w - S.sum(1))
        # w w^T / total makes ones a null vector; c c^T, which is positive there, does not touch the sum of c d.
        S += torch.outer(self.c, self.c) / self.c.sum()
        if self.total > 0:
            S -= torch.outer(self.w, self.w) / self.total
        found = safe_cholesky(S, tries=0)
        self.factor = found.value if found.ok else None

    def _product(self, p: Tensor) -> Tensor:
        out = (1 - self.soft) * (self.c * p - ((self.P @ p) / self.u) @ self.P) + self.w * p
        return out - self.w * ((self.w @ p) / self.total) if self.total > 0 else out

    def _reduced(self, h: Tensor) -> Tensor:
        """Solve the reduced system for a right-hand side of sum zero, up to a constant."""
        if self.factor is not None:
            return torch.cholesky_solve(h.unsqueeze(1), self.factor).squeeze(1)
        inverse = 1 / torch.maximum(self.c - (self.P.square() / self.u.unsqueeze(1)).sum(0), 0.01 * self.c)
        cg = CG(rtol=RTOL, max_iter=10_000, precond=lambda p: inverse * p, project=lambda p: p - p.mean(), verify=False)
        return cg(self._product, h - h.mean()).value

    def solve(self, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and y with H (x, y) = (r, s)."""
        weight = (1 - self.soft) / self.u
        h = self.eps * (s - (weight * r) @ self.P)
        mass = h.sum()
        if self.total > 0:
            y = self._reduced(h - self.w * (mass / self.total))
            y = y + (mass - self.w @ y) / self.total
        else:
            y = self._reduced(h - mass * self.c / self.c.sum())
        x = weight * (self.eps * r - self.P @ y)
        return x, y


def implicit(system: NewtonSystem, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return zeros whose derivative is H^{-1} times that of the residuals (r, s)."""
    return _Implicit.apply(system, r, s)


class _Implicit(torch.autograd.Function):
    """Zeros, whose backward solves with the symmetric matrix H."""

    @staticmethod
    def forward(ctx: Any, system: NewtonSystem, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        ctx.system = system
        ctx.save_for_backward(r, s)
        return torch.zeros_like(r), torch.zeros_like(s)

    @staticmethod
    def backward(ctx: Any, grad_f: Tensor, grad_g: Tensor) -> tuple[None, Tensor, Tensor]:
        with torch.no_grad():
            x, y = ctx.system.solve(grad_f, grad_g)
        if torch.is_grad_enabled():
            x, y = _NotTwice.apply(x, y, grad_f, grad_g, *ctx.saved_tensors)
        return None, x, y


class _NotTwice(torch.autograd.Function):
    """Identity on its first two arguments; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), y.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(
            "second derivatives are those of the value alone; those of the plan, of its cost and of the potentials are "
            "not available."
        )
