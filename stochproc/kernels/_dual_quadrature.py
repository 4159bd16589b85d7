"""The dual of any elementwise function, by quadrature over the two Gaussian inputs."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from stochproc._checks import check_integer
from stochproc.kernels._distance import inverse_or_zero
from stochproc.kernels._dual_base import Dual
from stochproc.kernels._pair import Pair
from stochproc.kernels._pair_points import clamp_defect

__all__ = ["Numeric"]

# Beyond ten standard deviations lies a mass of 1e-23.
_RANGE, _N_PANELS = 10.0, 8
# Weights below this change no sum of double precision, unless f grows like the inverse of a Gaussian density.
_SMALLEST_WEIGHT = 1e-40
_EVALUATIONS_AT_ONCE = 2**21
# d/dq E f(u)^2 = E f f' z / sqrt(q) needs no second derivative of f, but a positive q; wrong by O(q) there.
_SMALLEST_NORM = 1e-5


class _Moments(NamedTuple):
    """Expectations over a pair (u, v); the last three are empty unless asked for."""

    sqdist: Tensor  # E (f(u) - f(v))^2
    kdot: Tensor  # E f'(u) f'(v)
    by_r1: Tensor  # E f'(u) f(v) u / r1
    by_r2: Tensor  # E f(u) f'(v) v / r2


@dataclass(frozen=True)
class Numeric(Dual):
    r"""Dual of any elementwise torch function by tensorised quadrature.

    Parameters
    ----------
    f : callable
        Elementwise function of a float64 tensor of any shape. Parameters inside it receive no gradient.
    slope : callable, optional
        Its derivative, in the same form; by default autograd of f.
    kinks : tuple of float, default=()
        Points where f or its derivatives jump. Both integrals are split there, in panels of Gauss-Legendre nodes.
    nodes : int, optional
        Without kinks the number of Gauss-Hermite nodes in each direction, default 180; with kinks the number of
        nodes in each of the panels, default 32. From 2 to 400.

    Raises
    ------
    TypeError
        If f or slope is not callable, or nodes no integer.
    ValueError
        If a kink is not finite, nodes out of range, or (on a call) f changes the shape of its argument.

    Notes
    -----
    O(nodes^2) evaluations a pair (1e4, and 1e5 with one kink), in float64: for validation and for functions without
    a closed form. Measured for norms below 1: ReLU without its kink 4e-4, with it 1e-14; erf, GELU, sine 1e-15.
    Steep functions and large norms need the panels: erf at norm 3 is 1e-7 with plain nodes, 1e-15 with the
    harmless kink 0.
    Squared distances are means of (f(u) - f(v))^2, accurate relative to themselves to 1e-16 over the distance.
    Where f jumps (a step), f' is not its derivative: the value is right and :meth:`derivative` is not.
    Only first derivatives.
    """

    f: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | None = None
    kinks: "tuple[float | int, ...]" = ()
    nodes: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise TypeError(f"f must be callable; got {type(self.f).__name__}.")
        if self.slope is not None and not callable(self.slope):
            raise TypeError(f"slope must be callable; got {type(self.slope).__name__}.")
        kinks = tuple(sorted(float(k) for k in self.kinks))
        if not all(map(math.isfinite, kinks)):
            raise ValueError(f"kinks must be finite; got {kinks}.")
        if self.nodes is not None:
            check_integer("nodes", self.nodes, 2, 400)
        object.__setattr__(self, "kinks", kinks)

    def __call__(self, pair: Pair) -> Pair:
        """See :meth:`Dual.__call__`; first derivatives only."""
        inputs = (pair.r1, pair.r2, pair.A)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        r1, r2 = self._norm(pair.r1), self._norm(pair.r2)
        with torch.no_grad():
            moments = self._moments(pair, slopes=needs_grad)
            n = r1 * r2
            D = self._variance_gap(pair) * inverse_or_zero(r1 + r2)
            A = clamp_defect((moments.sqdist - D * D) / 2, n)
        if not needs_grad:
            return Pair(r1, r2, D, A)
        kdot, m1, m2 = moments.kdot, moments.by_r1, moments.by_r2
        # k' has derivatives kdot in k and m - kdot cos r in each norm; here k = r1 r2 - A.
        turn = (1 - pair.cos).detach()
        partials = (m1 + kdot * pair.r2.detach() * turn, m2 + kdot * pair.r1.detach() * turn, -kdot)
        q = _WithPartials.apply((r1 * r2).detach() - A, *inputs, *partials)
        exact = _WithPartials.apply(A, r1 * r2, q, torch.ones_like(A), -torch.ones_like(A))
        gap = _WithPartials.apply(D, r1, r2, torch.ones_like(D), -torch.ones_like(D))
        return Pair(r1, r2, gap, exact)

    @torch.no_grad()
    def derivative(self, pair: Pair) -> Tensor:
        """See :meth:`Dual.derivative`; constant to autograd, since it would need f''."""
        return self._moments(pair, slopes=True).kdot

    def _variance(self, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        with torch.no_grad():
            r = q.double().sqrt()
            value, by_q = torch.empty_like(r).flatten(), torch.empty_like(r).flatten()
            size = _EVALUATIONS_AT_ONCE // 1000
            for i, part in enumerate(r.flatten().split(size)):
                at = slice(i * size, i * size + part.numel())
                z, w = self._rule(part, [k / part for k in self.kinks])
                f = self._f(part[:, None] * z)
                value[at] = (w * f * f).sum(-1)
                if q.requires_grad:
                    floored = part.clamp(min=_SMALLEST_NORM)
                    z, w = self._rule(floored, [k / floored for k in self.kinks])
                    u = floored[:, None] * z
                    by_q[at] = (w * self._f(u) * self._slope(u) * z).sum(-1) / floored
            value, by_q = value.view_as(r).to(q.dtype), by_q.view_as(r).to(q.dtype)
        return _WithPartials.apply(value, q, by_q) if q.requires_grad and torch.is_grad_enabled() else value

    def _variance_gap(self, pair: Pair) -> Tensor:
        """E f(u)^2 - E f(v)^2 from differences of f at common nodes."""
        r1, r2 = torch.broadcast_tensors(pair.r1, pair.r2)
        out = torch.empty(r1.shape, dtype=torch.float64, device=r1.device).flatten()
        size = _EVALUATIONS_AT_ONCE // 1000
        parts = zip(r1.double().flatten().split(size), r2.double().flatten().split(size), strict=True)
        for i, (s, t) in enumerate(parts):
            z, w = self._rule(s, [k / r for k in self.kinks for r in (s, t)])
            f, g = self._f(s[:, None] * z), self._f(t[:, None] * z)
            out[i * size : i * size + s.numel()] = (w * (f - g) * (f + g)).sum(-1)
        return out.view(r1.shape).to(pair.r1.dtype)

    def _moments(self, pair: Pair, *, slopes: bool) -> _Moments:
        fields = torch.broadcast_tensors(*(t.detach() for t in (pair.r1, pair.r2, pair.cos, pair.A)))
        shape, dtype = fields[0].shape, fields[0].dtype
        r1, r2, cos, A = (t.double().flatten() for t in fields)
        half = (A * inverse_or_zero(2 * r1 * r2)).clamp(0, 1)
        sin = torch.where(r1 * r2 > 0, 2 * (half * (1 - half)).sqrt(), (1 - cos * cos).clamp(min=0).sqrt())
        columns = torch.stack([r1, r2, cos, sin], -1)
        block = max(1, _EVALUATIONS_AT_ONCE // self._evaluations)
        rows = torch.cat([self._moments_of(c, slopes) for c in columns.split(block)], -1).to(dtype)
        none = rows.new_empty(0)
        return _Moments(*(row.view(shape) for row in rows), *([] if slopes else 3 * [none]))

    def _moments_of(self, columns: Tensor, slopes: bool) -> Tensor:
        """Expectations of a few pairs, stacked."""
        r1, r2, cos, sin = columns.unbind(-1)
        # As a function of u the inner integral changes within 8 tan(angle) of the kinks of v.
        breaks = [k / r1 for k in self.kinks]
        breaks += [(k / r2 + s * sin) / cos for k in self.kinks for s in (-8, 0, 8)]
        z, wz = self._rule(r1, breaks)
        r1, r2, cos, sin = (t[:, None] for t in (r1, r2, cos, sin))
        x, wx = self._rule(z, [(k / r2 - cos * z) / sin for k in self.kinks])
        z2 = cos[..., None] * z[..., None] + sin[..., None] * x
        u, v = r1 * z, r2[..., None] * z2
        f, g = self._f(u), self._f(v)

        def mean(outer: Tensor | float, inner: Tensor) -> Tensor:
            return (wz * outer * (wx * inner).sum(-1)).sum(-1)

        out = [mean(1.0, (f[..., None] - g).square())]
        if slopes:
            df, dg = self._slope(u), self._slope(v)
            out += [mean(df, dg), mean(df * z, g), mean(f, z2 * dg)]
        return torch.stack(out)

    @property
    def _evaluations(self) -> int:
        if not self.kinks:
            return _hermite(self.nodes or 180)[0].size ** 2
        nodes, n_kinks = self.nodes or 32, len(self.kinks)
        return nodes**2 * (_N_PANELS + 4 * n_kinks) * (_N_PANELS + n_kinks)

    def _rule(self, like: Tensor, breaks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Nodes and weights of the standard normal on a new last axis, split at breaks of the shape of ``like``."""
        as_tensor = functools.partial(torch.as_tensor, dtype=torch.float64, device=like.device)
        if not self.kinks:
            z, w = map(as_tensor, _hermite(self.nodes or 180))
            return z.expand(*like.shape, -1), w
        z, w = map(as_tensor, np.polynomial.legendre.leggauss(self.nodes or 32))
        fixed = torch.linspace(-_RANGE, _RANGE, _N_PANELS + 1, dtype=torch.float64, device=like.device)
        # A break that is 0/0 belongs to an integrand that does not vary.
        own = torch.stack(breaks, -1).nan_to_num(0.0, _RANGE, -_RANGE).clamp(-_RANGE, _RANGE)
        edges = torch.cat([fixed.expand(*like.shape, -1), own], -1).sort(-1).values
        centre, half = (edges[..., 1:] + edges[..., :-1]) / 2, edges.diff(dim=-1) / 2
        nodes = (centre[..., None] + half[..., None] * z).flatten(-2)
        density = (-nodes * nodes / 2).exp() / math.sqrt(2 * math.pi)
        return nodes, (half[..., None] * w).flatten(-2) * density

    def _f(self, u: Tensor) -> Tensor:
        return _same_shape("f", self.f(u), u)

    def _slope(self, u: Tensor) -> Tensor:
        if self.slope is not None:
            return _same_shape("slope", self.slope(u), u)
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            out = _same_shape("f", self.f(u), u)
            return torch.autograd.grad(out.sum(), u)[0] if out.requires_grad else torch.zeros_like(u)


class _WithPartials(torch.autograd.Function):
    """A value with given partial derivatives; second derivatives raise instead of being wrong."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs_and_partials: Tensor) -> Tensor:
        half = len(inputs_and_partials) // 2
        ctx.shapes = [t.shape for t in inputs_and_partials[:half]]
        ctx.save_for_backward(*inputs_and_partials[half:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        partials = ctx.saved_tensors
        grads = ((grad * p).sum_to_size(s) for p, s in zip(partials, ctx.shapes, strict=True))
        return None, *grads, *(None for _ in partials)


@functools.lru_cache(maxsize=16)
def _hermite(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    from scipy.special import roots_hermitenorm

    z, w = roots_hermitenorm(nodes)
    w = w / w.sum()
    keep = w > _SMALLEST_WEIGHT
    return z[keep], w[keep]


def _same_shape(name: str, value: Any, argument: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != argument.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be elementwise: shape {tuple(argument.shape)} in and out; got {got}.")
    return value.detach() if not torch.is_grad_enabled() else value
