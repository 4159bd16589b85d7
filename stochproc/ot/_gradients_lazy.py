r"""Differentiable results of a solved transport problem between point clouds, without a matrix of pairs.

Optimal potentials solve :math:`Q b = 1` and :math:`Q^\top a = 1` with
:math:`Q_{ij} = e^{(f_i + g_j - c(x_i, y_j))/\varepsilon}`. Added to them is a Newton step whose matrix is constant: it
is zero, and has the derivative of the solution in whatever the residuals depend on. What ordinary autograd makes of
the sum has exact first derivatives, and the value exact second ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.kernels import expsum, softmax_pass
from stochproc.ot import _gradients
from stochproc.ot._dist import cost_matrix
from stochproc.ot._gradients_systems import Adjoint, centred, gauge_fixed, once, positive_or_one, report, run_cg

__all__ = ["lazy_plan", "lazy_potentials", "lazy_value", "lazy_value_linear"]

Number = float | int | Tensor
Metric = str | Callable[[Tensor, Tensor], Tensor]
MAX_CG = 1000
FLOOR = 1e-14


class _Problem(NamedTuple):
    """Points, weights and eps in float64, on the graph or off it."""

    X: Tensor
    Y: Tensor
    a: Tensor
    b: Tensor
    eps: Tensor

    def transposed(self) -> _Problem:
        return _Problem(self.Y, self.X, self.b, self.a, self.eps)

    def detached(self) -> _Problem:
        return _Problem(*(t.detach() for t in self))


def lazy_potentials(
    metric: Metric,
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, " m"],
    eps: Number,
    f: Float[Tensor, " n"],
    g: Float[Tensor, " m"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    r"""Return the potentials in the gauge :math:`\sum_j b_j g_j = 0`, once differentiable.

    Parameters
    ----------
    metric : str or callable
        A cost of the kernel layer. Parameters of a module are differentiated too.
    X, Y : Tensor of shape (n, d) and (m, d)
    a, b : Tensor of shape (n,) and (m,)
        Weights of equal mass; may be zero.
    eps : float or 0-d Tensor
        Regularisation, in the unit of the cost.
    f, g : Tensor of shape (n,) and (m,)
        Solved potentials, detached, float64; at weights of zero the c-transform of the other side.

    Returns
    -------
    f, g : Tensor of shape (n,) and (m,)
        In the dtype of the points.

    Warns
    -----
    NumericalWarning
        In the backward, if its linear solve does not converge.

    Notes
    -----
    Memory O((n + m) d). The backward takes a sweep over the pairs for each iteration of conjugate gradients on the
    smaller side. A second derivative raises RuntimeError. Where weights of both sides are zero, the slope of the
    potential at one of them in the weight at another is left out.
    """
    p = _problem(X, Y, a, b, eps)
    found = _attached(metric, p, _gradients.finite_or_zero(f), _gradients.finite_or_zero(g))
    # A point of weight zero that nothing can reach has an infinite potential and no gradient.
    f, g = (torch.where(old.isinf(), old, new).to(X.dtype) for old, new in zip((f, g), found, strict=True))
    return f, g


def lazy_value(
    metric: Metric,
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, " m"],
    eps: Number,
    f: Float[Tensor, " n"],
    g: Float[Tensor, " m"],
) -> Float[Tensor, ""]:
    """Return the optimal value in the KL form, twice differentiable; the gradient needs no linear solve.

    Parameters
    ----------
    metric, X, Y, a, b, eps, f, g
        As in :func:`lazy_potentials`; gradients with respect to weights and eps as in ``value``.

    Returns
    -------
    0-d Tensor
        In the dtype of the points.
    """
    p = _problem(X, Y, a, b, eps)
    fixed = _gradients.finite_or_zero(f), _gradients.finite_or_zero(g)
    parameters = tuple(metric.parameters()) if isinstance(metric, torch.nn.Module) else ()
    return _Value.apply(metric, *fixed, *p, *parameters).to(X.dtype)


def lazy_value_linear(
    metric: Metric,
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, " m"],
    eps: Number,
    f: Float[Tensor, " n"],
    g: Float[Tensor, " m"],
) -> Float[Tensor, ""]:
    """Return the transport cost of the plan, <P, M>, once differentiable.

    Parameters
    ----------
    metric, X, Y, a, b, eps, f, g
        As in :func:`lazy_potentials`.

    Returns
    -------
    0-d Tensor
        In the dtype of the points.
    """
    p = _problem(X, Y, a, b, eps)
    f, g = _attached(metric, p, _gradients.finite_or_zero(f), _gradients.finite_or_zero(g))
    with torch.enable_grad():
        # A node of its own, as potentials and costs may depend on eps too.
        strength = p.eps.detach().requires_grad_() if not p.eps.requires_grad else p.eps.view_as(p.eps)
        total, left = _lagrangian(metric, p._replace(eps=strength), f, g)
        (slope,) = torch.autograd.grad(total, strength, create_graph=True)
    # value - eps dvalue/deps, in which unmet marginals have no part.
    out = total - p.eps * slope - left.detach()
    return (out if f.requires_grad else out.detach()).to(X.dtype)


def lazy_plan(
    metric: Metric,
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "m d"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, " m"],
    eps: Number,
    f: Float[Tensor, " n"],
    g: Float[Tensor, " m"],
) -> Float[Tensor, "n m"]:
    """Write out the plan, once differentiable, at the memory of its costs.

    Parameters
    ----------
    metric, X, Y, a, b, eps, f, g
        As in :func:`lazy_potentials`.

    Returns
    -------
    Tensor of shape (n, m)
    """
    return _gradients.plan(cost_matrix(X, Y, metric), a, b, eps, f, g)


def _problem(X: Tensor, Y: Tensor, a: Tensor, b: Tensor, eps: Number) -> _Problem:
    eps = eps if isinstance(eps, Tensor) else torch.tensor(eps, dtype=torch.float64, device=X.device)
    return _Problem(X.double(), Y.double(), a.double(), b.double(), eps.to(torch.float64))


class _Flipped(torch.nn.Module):
    """A cost with its sides exchanged; a module, so that parameters of the cost are found."""

    def __init__(self, metric: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.metric = metric

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.metric(x, y).mT


def _flipped(metric: Metric) -> Metric:
    return metric if isinstance(metric, str) else _Flipped(metric)


def _row_sums(metric: Metric, p: _Problem, f: Tensor, g: Tensor) -> Tensor:
    """Return Q b."""
    sums = partial(expsum, metric, v=p.b.unsqueeze(-1), eps=p.eps)
    heavy = p.a > 0
    if bool(heavy.all()) or bool((p.b > 0).all()):
        return sums(p.X, p.Y, f, g).squeeze(-1)
    # Nothing bounds Q between two weights of zero: its entries there could overflow, times weights that are 0.
    g_light = torch.where(p.b > 0, g, -math.inf)
    out = p.a.new_zeros(p.a.shape)
    for rows, height in ((heavy, g), (~heavy, g_light)):
        where = rows.nonzero().squeeze(-1)
        out = out.index_put((where,), sums(p.X[where], p.Y, f[where], height).squeeze(-1))
    return out


def _lagrangian(metric: Metric, p: _Problem, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function whose partial derivatives are those of the value, and <a - P 1, f> + <b - P^T 1, g>."""
    total = p.a * _row_sums(metric, p, f, g)
    out = (p.a * f).sum() + (p.b * g).sum() - p.eps * (total.sum() - p.a.sum())
    with torch.no_grad():
        columns = p.b * _row_sums(_flipped(metric), p.transposed(), g, f)
        left = ((p.a - total) * f).sum() + ((p.b - columns) * g).sum()
    return out, left


def _attached(metric: Metric, p: _Problem, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return solved potentials on the graph, in the gauge of section 1."""
    if torch.is_grad_enabled():
        residual = _row_sums(metric, p, f, g), _row_sums(_flipped(metric), p.transposed(), g, f)
        if any(r.requires_grad for r in residual):
            step = _NewtonStep.apply(metric, p.detached(), g, *residual)
            f, g = f + step[0], g + step[1]
    shift = (p.b * g).sum() / p.b.sum()
    return f + shift, g - shift


class _NewtonStep(torch.autograd.Function):
    """Zero, whose backward solves the transposed linearised equations."""

    @staticmethod
    def forward(
        ctx: Any, metric: Metric, p: _Problem, g: Tensor, on_rows: Tensor, on_columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.metric, ctx.p = metric, p
        ctx.save_for_backward(g, on_rows, on_columns)
        return torch.zeros_like(on_rows), torch.zeros_like(on_columns)

    @staticmethod
    def backward(ctx: Any, u_f: Tensor, u_g: Tensor) -> tuple:
        g, *residual = ctx.saved_tensors
        with torch.no_grad():
            # The potential of the rows that belongs to g makes their sums exact.
            x, y = _solve_adjoint(ctx.metric, ctx.p, g, u_f, u_g)
            grads = -ctx.p.eps * x, -ctx.p.eps * y
        return None, None, None, *once(grads, u_f, u_g, *residual)


def _solve_adjoint(metric: Metric, p: _Problem, g: Tensor, u_f: Tensor, u_g: Tensor) -> Adjoint:
    """Solve the system of :func:`solve_adjoint` by conjugate gradients, one sweep over the pairs an iteration."""
    if p.X.shape[0] < p.Y.shape[0]:
        f = -p.eps * _softmax(metric, p, g, p.a).lse
        y, x = _columns_eliminated(_flipped(metric), p.transposed(), f, u_g, u_f)
    else:
        x, y = _columns_eliminated(metric, p, g, u_f, u_g)
    return gauge_fixed(x, y, p.a, p.b)


def _columns_eliminated(metric: Metric, p: _Problem, g: Tensor, u_f: Tensor, u_g: Tensor) -> tuple[Tensor, Tensor]:
    beta = (p.b > 0).to(p.b)
    sweep = partial(_softmax, metric, p, g)
    first = sweep(p.a)
    f, c = -p.eps * first.lse, first.mass
    # A column of weight zero moves no row, so its equation stands alone.
    alone = (1 - beta) * u_g
    if bool((alone != 0).any()):
        light = (p.b == 0).nonzero().squeeze(-1)
        lifted = expsum(metric, p.X, p.Y[light], f, g[light], alone[light].unsqueeze(-1), eps=p.eps).squeeze(-1)
        u_f = u_f - torch.where(p.a > 0, p.a * lifted, 0.0)
    pulled = sweep(u_f).mass
    rhs = centred(beta * (u_g - pulled), beta)
    scale = torch.linalg.vector_norm(beta * u_g) + torch.linalg.vector_norm(pulled)

    def product(v: Tensor) -> Tensor:
        return c * v - sweep(p.a, v=v.unsqueeze(-1), gram=True).PtKv.squeeze(-1) + (1 - beta) * v

    # Squares of the softmax are a softmax at half of eps.
    own = expsum(_flipped(metric), p.Y, p.X, _height(p, g), f, p.a.unsqueeze(-1), eps=p.eps / 2).squeeze(-1)
    inverse = 1 / (torch.maximum(c - own, 0.01 * c) + (1 - beta))
    result = run_cg(product, rhs, lambda v: inverse * v, beta, FLOOR * float(scale), max_iter=MAX_CG)
    if not result.ok:
        report(result.convergence)
    mu = beta * result.value
    x = u_f - p.a * sweep(p.a, v=mu.unsqueeze(-1)).Kv.squeeze(-1)
    return x, p.b * mu + alone


def _softmax(metric: Metric, p: _Problem, g: Tensor, w: Tensor, **options: Any) -> Any:
    return softmax_pass(metric, p.X, p.Y, _height(p, g), w, eps=p.eps, **options)


def _height(p: _Problem, g: Tensor) -> Tensor:
    return torch.where(p.b > 0, g + p.eps * positive_or_one(p.b).log(), -math.inf)


class _Value(torch.autograd.Function):
    """The value; its backward takes partial derivatives at potentials that are on the graph only when it is itself."""

    @staticmethod
    def forward(ctx: Any, metric: Metric, f: Tensor, g: Tensor, *inputs: Tensor) -> Tensor:
        ctx.metric = metric
        ctx.save_for_backward(f, g, *inputs)
        a, b = inputs[2:4]
        return (a * f).sum() + (b * g).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        f, g, *inputs = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        gate = _Gate()
        with torch.enable_grad():
            if twice:
                p = _Problem(*inputs[:5])
                f, g = (_Gated.apply(gate, t) for t in _attached(ctx.metric, p, f, g))
                # Nodes of their own: one input may depend on another, or be the same tensor.
                own = [t.view_as(t) for t in inputs[:5]]
            else:
                own = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs[:5])]
            total, _ = _lagrangian(ctx.metric, _Problem(*own), f, g)
            own += inputs[5:]
            # The potentials are stationary: their part of the gradient is zero, and only its derivative is not.
            gate.closed = True
            found = torch.autograd.grad(
                total, [own[i] for i in wanted], upstream, create_graph=twice, allow_unused=True
            )
            gate.closed = False
        grads: list[Tensor | None] = [None] * len(inputs)
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = grad
        return None, None, None, *grads


class _Gate:
    """Says whether gradients pass."""

    closed = False


class _Gated(torch.autograd.Function):
    """Identity that hands no gradient on while its gate is closed."""

    @staticmethod
    def forward(ctx: Any, gate: _Gate, t: Tensor) -> Tensor:
        ctx.gate = gate
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        return None, None if ctx.gate.closed else grad
