"""Defects and differences of norms behind a nonlinearity, written without cancellation (outside autograd).

Every function takes the state of a pair before a nonlinearity and returns numbers of the state after it. The
formulas start from half the squared distance of the images and subtract only what is of second order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc.kernels._distance import inverse_or_zero
from stochproc.kernels._pair import Pair
from stochproc.kernels._pair_points import clamp_defect, row_slices

# Odd series of sin t - t cos t and of t - sin t: coefficients of t^3, t^5, ...
H_SERIES = [(-1) ** (k + 1) * 2 * k / math.factorial(2 * k + 1) for k in range(1, 10)]
EXCESS_SERIES = [(-1) ** (k + 1) / math.factorial(2 * k + 1) for k in range(1, 10)]
# Terms after which the next is below half a unit in the last place, at t = 1/2 and at t = 1.
TERMS_TO_HALF = {torch.float32: 4, torch.float64: 7}
TERMS_TO_ONE = {torch.float32: 5, torch.float64: 9}


def by_rows(step: Callable[..., tuple[Tensor, Tensor]], *fields: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``step(*fields)``, elementwise in fields that broadcast, block of rows by block of rows on the CPU."""
    shape = torch.broadcast_shapes(*(f.shape for f in fields))
    if len(shape) < 2:
        return step(*fields)
    first, second = fields[0].new_empty(shape), fields[0].new_empty(shape)
    for rows in row_slices(shape, first.device):
        block = (f if f.ndim < 2 or f.shape[-2] == 1 else f[..., rows, :] for f in fields)
        first[..., rows, :], second[..., rows, :] = step(*block)
    return first, second


def _cube_series(t: Tensor, coefficients: list[float]) -> Tensor:
    y = t * t
    out = y * coefficients[-1]
    for c in reversed(coefficients[1:-1]):
        out = out.add_(c).mul_(y)
    return out.add_(coefficients[0]).mul_(y).mul_(t)


def sine_minus_chord(t: Tensor) -> Tensor:
    """Return h(t) = sin t - t cos t for t in [0, pi], accurate relative to itself."""
    series = _cube_series(t, H_SERIES[: TERMS_TO_HALF[t.dtype]])
    return torch.where(t < 0.5, series, t.sin().sub_(t.cos().mul_(t)))


def angle_minus_sine(t: Tensor) -> Tensor:
    """Return t - sin t for t in [0, pi], accurate relative to itself."""
    return torch.where(t < 1, _cube_series(t, EXCESS_SERIES[: TERMS_TO_ONE[t.dtype]]), t - t.sin())


def rectified_step(pair: Pair, c: float, g: float) -> tuple[Tensor, Tensor]:
    """D and A behind a two-slope rectifier: sqrt(c) D and c A - g n h(t)."""
    n = pair.n
    return math.sqrt(c) * pair.D, _rectified_defect(pair.A, n, pair.angle, c, g)


def _rectified_defect(A: Tensor, n: Tensor, angle: Tensor, c: float, g: float) -> Tensor:
    return clamp_defect(sine_minus_chord(angle).mul_(n).mul_(-g).add_(A, alpha=c), c * n)


class RectifiedDefect(torch.autograd.Function):
    """Defect c A - g n h(t) behind a two-slope rectifier, with first derivatives finite everywhere."""

    @staticmethod
    def forward(A: Tensor, n: Tensor, angle: Tensor, c: float, g: float) -> Tensor:
        return _rectified_defect(A, n, angle, c, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.c, ctx.g = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (angle,) = ctx.saved_tensors
        # t (1 - cos t) - h(t) = t - sin t. The angle is kept in the graph for second derivatives.
        excess = angle_minus_sine(angle.detach())
        if torch.is_grad_enabled() and angle.requires_grad:
            excess = angle - angle.sin()
        return grad * (ctx.c - ctx.g * angle), grad * ctx.g * excess, None, None, None


def sine_step(pair: Pair, r1: Tensor, r2: Tensor, kappa: float, one_plus: float) -> tuple[Tensor, Tensor]:
    """D and A behind sin(u + c), with kappa = cos(2c) and one_plus = 1 + kappa.

    With s, t half the squared norms of difference and sum, the squared distance of the images is
    (1 - e^-s)(1 + kappa e^-t) - kappa/2 (e^-q11 - e^-q22)^2. For kappa < 0 all terms are non-negative; for
    kappa > 0 the second takes at most a quarter of the first for close points.
    """
    s = pair.sqdist / 2
    q1, q2 = pair.r1 * pair.r1, pair.r2 * pair.r2
    t = (q1 + q2 - s).clamp(min=0)
    low, size, sign = torch.minimum(q1, q2), pair.difference.abs(), pair.difference.sign()
    spread = (-low).exp() * torch.expm1(-size)
    factor = 1 + kappa * (-t).exp() if kappa > 0 else one_plus + kappa * torch.expm1(-t)
    sqdist = -torch.expm1(-s) * factor - kappa / 2 * spread * spread
    D = -kappa / 2 * (-2 * low).exp() * torch.expm1(-2 * size) * sign * inverse_or_zero(r1 + r2)
    return D, (sqdist - D * D) / 2


def exponential_step(pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
    """D and A behind exp(u)."""
    difference = pair.difference
    D = -torch.maximum(r1, r2) * torch.expm1(-difference.abs()) * difference.sign()
    return D, -r1 * r2 * torch.expm1(-pair.sqdist / 2)


class _Arcs(NamedTuple):
    r"""Arcs :math:`\alpha_{ij} = \arcsin(t_{ij} / \sqrt{(1 + t_{11})(1 + t_{22})})` of a pair with t = scale q."""

    c1: Tensor  # sqrt(1 + 2 t_11): alpha_11 = 2 arctan(c1) - pi/2
    c2: Tensor
    dc: Tensor  # c1 - c2
    pc: Tensor  # c1 c2
    pc_minus_1: Tensor
    g: Tensor  # sqrt(1 + t_11 + t_22), the cosine side of the collinear arc
    root: Tensor  # sqrt(g^2 + det), that of the arc itself
    collinear: Tensor  # arc of the collinear pair with the same norms, tan = n / g
    bend: Tensor  # (alpha_11 + alpha_22) / 2 - collinear >= 0, of second order
    tilt: Tensor  # (alpha_11 - alpha_22) / 2
    turn: Tensor  # collinear - alpha_12 >= 0, of first order in the defect
    sine: Tensor  # sin(turn) where t_12 >= 0


def _arcs(pair: Pair, scale: float, A: Tensor) -> _Arcs:
    """Arcs of a pair whose defect is replaced by A."""
    t1, t2 = scale * pair.r1 * pair.r1, scale * pair.r2 * pair.r2
    n, A = scale * pair.n, scale * A
    det = A * (2 * n - A)
    q = n - A
    c1, c2 = (1 + 2 * t1).sqrt(), (1 + 2 * t2).sqrt()
    total = c1 + c2
    dc = 2 * scale * pair.difference / total
    pc = c1 * c2
    pc_minus_1 = 2 * (t1 + t2 + 2 * t1 * t2) / (pc + 1)
    g = (1 + (t1 + t2)).sqrt()  # in this order, so that swapping the points changes no bit
    root = (g * g + det).sqrt()
    # tan(bend) = ((pc - 1) g - n total) / (total g + n (pc - 1)); the numerator times its conjugate is
    # dc^2 ((pc + 1)^2 + dc^2) / 4, found by writing everything in c1 and c2.
    dc2 = dc * dc
    numerator = dc2 * ((pc + 1) ** 2 + dc2) / 4 * inverse_or_zero(pc_minus_1 * g + n * total)
    bend = (numerator / (total * g + n * pc_minus_1)).atan()
    tilt = (dc / (1 + pc)).atan()
    # Sine and cosine of turn are (n root -+ q g) / p and (g root + n q) / p; where q > 0 the sine times its
    # conjugate is det / p.
    p = (1 + t1) * (1 + t2)
    sine = det * inverse_or_zero(n * root + q.abs() * g)
    turn = torch.atan2(torch.where(q >= 0, sine * p, n * root - q * g), g * root + n * q)
    return _Arcs(c1, c2, dc, pc, pc_minus_1, g, root, (n / g).atan(), bend, tilt, turn, sine)


def erf_step(pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
    """D and A behind erf(u): the images have inner product (2/pi) alpha_12 with t = 2 q."""
    arcs = _arcs(pair, 2.0, pair.A)
    D = 4 / math.pi * arcs.tilt * inverse_or_zero(r1 + r2)
    return D, 2 / math.pi * (arcs.bend + arcs.turn) - D * D / 2


def gelu_step(pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
    r"""D and A behind u Phi(u) = u/2 + (an even function), which adds a quarter of the squared distance.

    The even part has 2 pi times inner product (q^2 + P R^2)/(p R) + q alpha_12, an even function of q = q12. Its
    squared distance is that of the collinear pair with the same norms, twice its drop from n to \|q\| added.
    """
    n, difference = pair.n, pair.difference
    A = torch.minimum(pair.A, 2 * n - pair.A)
    arcs = _arcs(pair, 1.0, A)
    q1, q2 = pair.r1 * pair.r1, pair.r2 * pair.r2
    q, det, g, root = n - A, A * (2 * n - A), arcs.g, arcs.root
    p, share = (1 + q1) * (1 + q2), (q1 / (1 + q1)) * (q2 / (1 + q2))
    c_sum = arcs.c1 + arcs.c2
    dc2 = arcs.dc * arcs.dc

    # e(c1) + e(c2) - 2 e(collinear), e the rational part; with g^2 = (c1^2 + c2^2)/2 each bracket is dc^2 times this.
    rational = dc2 * (
        (3 * arcs.pc + dc2 / 2) / (arcs.pc * g * (g * c_sum + 2 * arcs.pc))
        + c_sum * ((c_sum * g + 2 * g * g + arcs.pc + 1) / p) / (2 * (arcs.c1 + g) * (arcs.c2 + g))
        - 1 / (c_sum + 2 * g)
    )
    radial = (q1 + q2) * arcs.bend + difference * arcs.tilt + pair.D * pair.D * arcs.collinear + rational

    # The drop: n alpha - q alpha' is A alpha + q (turn - sin turn) + q sin turn, whose last term the rational
    # part nearly cancels for large norms: joined.
    spread = root + g
    joined = (1 / p + share / (g * spread)) / root
    joined += (q * (g * g / p) - share * (root / spread) * A) * inverse_or_zero(n * root + q * g)
    drop = A * arcs.collinear + q * angle_minus_sine(arcs.turn) + det * joined

    sqdist = pair.sqdist / 4 + (radial + 2 * drop) / (2 * math.pi)
    even = (
        arcs.dc * arcs.pc_minus_1 * (1 / arcs.pc + 1 / p)
        + difference * (arcs.collinear + arcs.bend)
        + (q1 + q2) * arcs.tilt
    )
    D = (difference / 4 + even / (2 * math.pi)) * inverse_or_zero(r1 + r2)
    return D, (sqdist - D * D) / 2
