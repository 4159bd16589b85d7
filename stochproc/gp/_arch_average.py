"""The mean of several kernels in terms of the states of pairs, without cancellation.

A convolution or a read-out averages kernels over shifted pixels. In terms of the state of a pair the features of an
average are the joined features of its summands, so norms add in squares, and with U, V the vectors of the norms of
the summands, D their differences and R the norm of each vector, the defect of the average is the average of the
defects plus

    |U||V| - U.V = (R1 + R2)^2 / (8 R1 R2) sum_f (D_f - (U_f + V_f) (R1 - R2)/(R1 + R2))^2,

R1 R2 times half the squared distance of U/R1 and V/R2: a sum of squares, each base accurate to a few roundings of D_f.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from stochproc.kernels import Pair

__all__ = ["average", "differentiable", "mean_over_pixels", "root"]


def average(parts: Sequence[Pair]) -> Pair:
    """Return the pairs under the mean of several kernels; D and the squared distance keep their relative accuracy."""
    k = len(parts)
    r1, r2 = (_root_mean_square([p[i] for p in parts]) for i in (0, 1))
    total = _total(r1, r2)
    D = _sum_of_products((p.D, p.r1 + p.r2) for p in parts) / (total * k)
    defect = parts[0].A.clone()
    for p in parts[1:]:
        defect += p.A
    slope = D / total
    turned = _sum_of_products((e, e) for e in (_turned(p, slope) for p in parts))
    return Pair(r1, r2, D, (defect + turned * _ratio(r1, r2, total)) / k)


def mean_over_pixels(pair: Pair) -> Pair:
    """Return the pairs under the mean over the last axis: :func:`average` as a reduction."""
    r1, r2 = (root(r.double().square().mean(-1)).to(r.dtype) for r in (pair.r1, pair.r2))
    with torch.no_grad():
        total = _total(r1, r2)
        D = (pair.D * (pair.r1 + pair.r2)).mean(-1) / total
        turned = _turned(pair, (D / total).unsqueeze(-1)).square().mean(-1)
        A = pair.A.mean(-1) + turned * _ratio(r1, r2, total)
    return differentiable(r1, r2, D, A, pair, lambda q: q.mean(-1))


def differentiable(
    r1: Tensor, r2: Tensor, D: Tensor, A: Tensor, before: Pair, mean: Callable[[Tensor], Tensor]
) -> Pair:
    """Give D and A the derivatives of the plain formulas, which keep no large tensor for the backward pass."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in before):
        D, A = _WithGradientOf.apply(D, r1 - r2), _WithGradientOf.apply(A, r1 * r2 - mean(before.n - before.A))
    return Pair(r1, r2, D, A)


class _WithGradientOf(torch.autograd.Function):
    """The first argument with the derivatives of the second, which is the same number computed less accurately."""

    @staticmethod
    def forward(value: Tensor, formula: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.shape = inputs[1].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.sum_to_size(ctx.shape)


def _turned(pair: Pair, slope: Tensor) -> Tensor:
    return torch.addcmul(pair.D, pair.r1 + pair.r2, slope, value=-1)


def _ratio(r1: Tensor, r2: Tensor, total: Tensor) -> Tensor:
    """Return (r1 + r2)^2 / (8 r1 r2)."""
    return (total * _inverse(r1)) * (total * _inverse(r2)) / 8


def _total(r1: Tensor, r2: Tensor) -> Tensor:
    """Return r1 + r2, and 1 where both are 0, since what is divided by it is 0 there."""
    total = r1 + r2
    none = [r == 0 for r in (r1, r2)]
    return total + (none[0] & none[1]) if all(bool(z.any()) for z in none) else total


def _sum_of_products(factors: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    pairs = iter(factors)
    a, b = next(pairs)
    out = a * b
    for a, b in pairs:
        out.addcmul_(a, b)
    return out


def _root_mean_square(norms: Sequence[Tensor]) -> Tensor:
    # Norms are small beside the pairs, so the float64 of float32 data is cheap here.
    square = torch.stack([r.double() for r in norms]).square().mean(0)
    return root(square).to(norms[0].dtype)


def root(square: Tensor) -> Tensor:
    """Square root with derivative 0 at 0."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _inverse(r: Tensor) -> Tensor:
    zero = r == 0
    return torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, r))
