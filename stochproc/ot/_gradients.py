r"""Differentiable results of a solved transport problem with a stored cost, at no new solve in the forward.

Each function takes the tensors of the user's graph and the solved, detached potentials f and g, float64, in the KL
form :math:`P_{ij} = a_i b_j \exp((f_i + g_j - M_{ij})/\varepsilon)`. Any total mass is allowed: the formulas hold as
they are when f and g are those of the actual weights, so that :math:`P 1 = a`. Gradients with respect to a and b are
exact along changes that keep both masses equal (a pair of constants, t on a and -t on b, may be added).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.ot._gradients_systems import once, positive_or_one, solve_adjoint

__all__ = ["plan", "potentials", "value", "value_linear"]

Number = float | int | Tensor
# exp of what is nearly subnormal costs ten times an ordinary one; below exp(FLOOR) is 0.
FLOOR = -700.0
# Pairs of two weights of zero have no bound; beyond exp(CEILING) their products with others could overflow.
CEILING = 300.0


def plan(
    cost: Float[Tensor, "*#batch n m"],
    a: Float[Tensor, "*#batch n"],
    b: Float[Tensor, "*#batch m"],
    eps: Number,
    f: Float[Tensor, "*#batch n"],
    g: Float[Tensor, "*#batch m"],
) -> Float[Tensor, "*batch n m"]:
    """Return the plan, once differentiable in the cost, the weights and eps.

    Parameters
    ----------
    cost : Tensor of shape (*batch, n, m)
        Finite or ``+inf``.
    a, b : Tensor of shape (*batch, n) and (*batch, m)
        Weights of equal mass; may be zero.
    eps : float or Tensor of shape (*batch)
        Regularisation, in the unit of the cost.
    f, g : Tensor of shape (*batch, n) and (*batch, m)
        Solved potentials, detached, float64; at weights of zero the c-transform of the other side.

    Returns
    -------
    Tensor of shape (*batch, n, m)
        In the dtype of the cost; exactly 0 at weights of zero and infinite costs.

    Warns
    -----
    NumericalWarning
        In the backward, if its linear solve does not converge.

    Notes
    -----
    The backward takes O(n m) memory and one linear system of the smaller side: a factorisation up to 1000 and for
    batches, conjugate gradients beyond. A second derivative raises RuntimeError.
    """
    a, b, eps = _double(cost, a, b, eps)
    P, _, _ = _Solution.apply(True, cost, a, b, eps, f, g)
    return P.to(cost.dtype)


def potentials(
    cost: Float[Tensor, "*#batch n m"],
    a: Float[Tensor, "*#batch n"],
    b: Float[Tensor, "*#batch m"],
    eps: Number,
    f: Float[Tensor, "*#batch n"],
    g: Float[Tensor, "*#batch m"],
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch m"]]:
    r"""Return the potentials in the gauge :math:`\sum_j b_j g_j = 0`, once differentiable.

    Parameters
    ----------
    cost, a, b, eps, f, g
        As in :func:`plan`.

    Returns
    -------
    f, g : Tensor of shape (*batch, n) and (*batch, m)
        In the dtype of the cost.
    """
    a, b, eps = _double(cost, a, b, eps)
    _, *found = _Solution.apply(False, cost, a, b, eps, f, g)
    # A point of weight zero that nothing can reach has an infinite potential and no gradient.
    f, g = (torch.where(old.isinf(), old, new).to(cost.dtype) for old, new in zip((f, g), found, strict=True))
    return f, g


def value_linear(
    cost: Float[Tensor, "*#batch n m"],
    a: Float[Tensor, "*#batch n"],
    b: Float[Tensor, "*#batch m"],
    eps: Number,
    f: Float[Tensor, "*#batch n"],
    g: Float[Tensor, "*#batch m"],
) -> Float[Tensor, "*batch"]:
    """Return the transport cost of the plan, <P, M>, once differentiable.

    Parameters
    ----------
    cost, a, b, eps, f, g
        As in :func:`plan`.

    Returns
    -------
    Tensor of shape (*batch)
        In the dtype of the cost, summed in float64.
    """
    a, b, eps = _double(cost, a, b, eps)
    P, _, _ = _Solution.apply(True, cost, a, b, eps, f, g)
    # No mass goes where the cost is infinite, and 0 times infinity is no number.
    return (P * torch.where(cost == math.inf, 0.0, cost)).sum((-1, -2)).to(cost.dtype)


def value(
    cost: Float[Tensor, "*#batch n m"],
    a: Float[Tensor, "*#batch n"],
    b: Float[Tensor, "*#batch m"],
    eps: Number,
    f: Float[Tensor, "*#batch n"],
    g: Float[Tensor, "*#batch m"],
    *,
    reg_type: str = "KL",
) -> Float[Tensor, "*batch"]:
    r"""Return the optimal value, twice differentiable.

    The gradient is that of the envelope theorem and needs no linear solve: P with respect to the cost, f to a,
    :math:`g - \varepsilon` to b, :math:`\sum P \log(P / a b^\top)` to eps. The :math:`-\varepsilon` is the change of
    the value with the mass; along changes that keep the mass it is without effect.

    Parameters
    ----------
    cost, a, b, eps, f, g
        As in :func:`plan`.
    reg_type : {"KL", "entropy"}, default="KL"
        "entropy" adds :math:`\varepsilon (\langle a, \log a\rangle + \langle b, \log b\rangle)`. The slope of that at
        a weight of zero, minus infinity, is left out of the gradient.

    Returns
    -------
    Tensor of shape (*batch)
        In the dtype of the cost: :math:`\langle a, f\rangle + \langle b, g\rangle`.
    """
    a, b, eps = _double(cost, a, b, eps)
    out = _Value.apply(cost, a, b, eps, f, g)
    if reg_type == "entropy":
        out = out + eps * (negentropy(a) + negentropy(b))
    return out.to(cost.dtype)


def negentropy(weights: Tensor) -> Tensor:
    """Return <a, log a>, with a finite gradient at zero."""
    return (weights * positive_or_one(weights).log()).sum(-1)


class _Value(torch.autograd.Function):
    """The value, whose backward is differentiable by way of the plan and the potentials."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, f: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(cost, a, b, eps, f, g)
        return (a * finite_or_zero(f)).sum(-1) + (b * finite_or_zero(g)).sum(-1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        cost, a, b, eps, f, g = ctx.saved_tensors
        need = ctx.needs_input_grad
        # Potentials alone spare the sweep over the pairs.
        P, f, g = _Solution.apply(need[0] or need[3], cost, a, b, eps, f, g)
        each = upstream.unsqueeze(-1)
        grads: list[Tensor | None] = [None] * 6
        if need[0]:
            grads[0] = _like(each.unsqueeze(-1) * P, cost)
        if need[1]:
            grads[1] = _like(each * f, a)
        if need[2]:
            grads[2] = _like(each * (g - eps.unsqueeze(-1)), b)
        if need[3]:
            grads[3] = _like(upstream * (P * _gain(cost, f, g)).sum((-1, -2)) / eps, eps)
        return tuple(grads)


class _Solution(torch.autograd.Function):
    """Plan and gauge-fixed potentials as functions of the problem: the implicit function theorem."""

    @staticmethod
    def forward(
        ctx: Any, with_plan: bool, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, f: Tensor, g: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        f, g = finite_or_zero(f), finite_or_zero(g)
        shift = (b * g).sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
        f, g = f + shift, g - shift
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cost, a, b, eps, f, g)
        return _weighted(cost, a, b, eps, f, g, keep_zeros=True) if with_plan else None, f, g

    @staticmethod
    def backward(ctx: Any, U: Tensor | None, u_f: Tensor | None, u_g: Tensor | None) -> tuple:
        saved = ctx.saved_tensors
        if U is None and u_f is None and u_g is None:
            return (None,) * 7
        with torch.no_grad():
            grads = _pull_back(saved, U, u_f, u_g, ctx.needs_input_grad[1:5])
        return None, *once(grads, U, u_f, u_g, *saved[:4]), None, None


def _pull_back(
    saved: tuple[Tensor, ...],
    U: Tensor | None,
    u_f: Tensor | None,
    u_g: Tensor | None,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients with respect to cost, a, b and eps."""
    cost, a, b, eps, f, g = saved
    A = _weighted(cost, a, b, eps, f, g, keep_zeros=False)
    a, b = a.expand(A.shape[:-1]), b.expand(*A.shape[:-2], -1)
    alpha, beta = (a > 0).to(A), (b > 0).to(A)
    a_safe, b_safe, strength = positive_or_one(a), positive_or_one(b), eps.unsqueeze(-1)
    p = torch.zeros_like(a) if u_f is None else u_f.expand_as(a)
    q = torch.zeros_like(b) if u_g is None else u_g.expand_as(b)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    # The gauge takes <b, g> / sum b from g and gives it to f.
    total = b.sum(-1, keepdim=True)
    k = p.sum(-1, keepdim=True) - q.sum(-1, keepdim=True)
    grad_b, q = grad_b + k * g / total, q + k * b / total
    Z = None
    if U is not None:
        Z = U * A
        r, s = _times(Z, beta), _times(Z.mT, alpha)
        grad_a, grad_b = grad_a + r / a_safe, grad_b + s / b_safe
        p, q = p + alpha * r / strength, q + beta * s / strength
    x, y = solve_adjoint(A, a, b, p, q)
    left, right = x / a_safe, y / b_safe
    grad_a = grad_a - strength * _times(A, right) / a_safe
    grad_b = grad_b - strength * _times(A.mT, left) / b_safe
    grads = [None, _like(grad_a, saved[1]), _like(grad_b, saved[2]), None]
    if need[0] or need[3]:
        G = left.unsqueeze(-1) * beta.unsqueeze(-2)
        G.addcmul_(alpha.unsqueeze(-1), right.unsqueeze(-2)).mul_(A)
        if Z is not None:
            G.sub_(Z.mul_(alpha.unsqueeze(-1) * beta.unsqueeze(-2)).div_(strength.unsqueeze(-1)))
        del Z, A
        if need[3]:
            grads[3] = _like((G * _gain(cost, f, g)).sum((-1, -2)) / eps, eps)
        grads[0] = _like(G, cost)
    return tuple(t if wanted else None for t, wanted in zip(grads, need, strict=True))


def _weighted(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, f: Tensor, g: Tensor, *, keep_zeros: bool) -> Tensor:
    """Return the plan in float64; without ``keep_zeros`` weights of zero count as one."""
    a_safe, b_safe = positive_or_one(a), positive_or_one(b)
    z = f.unsqueeze(-1) - cost
    z.add_(g.unsqueeze(-2)).div_(eps[..., None, None])
    z.add_(a_safe.log().unsqueeze(-1)).add_(b_safe.log().unsqueeze(-2))
    torch.threshold_(z.clamp_(FLOOR, CEILING).exp_(), 2 * math.exp(FLOOR), 0.0)
    if keep_zeros and not bool((a > 0).all() and (b > 0).all()):
        z.mul_((a > 0).unsqueeze(-1)).mul_((b > 0).unsqueeze(-2))
    return z


def finite_or_zero(potential: Tensor) -> Tensor:
    """Replace the infinite potential of a point of weight zero that nothing can reach."""
    return potential.detach().double().nan_to_num(nan=math.nan, posinf=0.0, neginf=0.0)


def _gain(cost: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """Return f + g - M, 0 where the cost is infinite."""
    return (f.unsqueeze(-1) + g.unsqueeze(-2) - cost).masked_fill(cost == math.inf, 0.0)


def _double(cost: Tensor, a: Tensor, b: Tensor, eps: Number) -> tuple[Tensor, Tensor, Tensor]:
    eps = eps if isinstance(eps, Tensor) else torch.tensor(eps, dtype=torch.float64, device=cost.device)
    return a.double(), b.double(), eps.to(torch.float64)


def _like(grad: Tensor, source: Tensor) -> Tensor:
    """Undo broadcasting and promotion."""
    return grad.sum_to_size(source.shape).to(source.dtype)


def _times(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)
