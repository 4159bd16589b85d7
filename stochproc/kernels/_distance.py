"""Squared distances from one matrix product, and the elementwise functions whose gradients stay finite.

A block of squared distances is ``a @ b.mT`` with ``a = [-2u, |u|^2, 1]`` and ``b = [w, 1, |w|^2]``. The
augmented inputs are made once, outside the loop over blocks, and differentiate by plain matrix products.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)

# Subnormal results make exp2 ten times slower than the rest of a pass, so the exponent stops above them.
EXP2_FLOOR = {torch.float32: -120.0, torch.float64: -1000.0}

# The product form is wrong by about eps |u|^2. In float32 that passes the 2e-5 asked of a kernel once |u|^2
# exceeds about 100 (measured: tests/kernels/test_distance.py), so the product is then done in float64 and
# rounded: 1.3 ns a pair against 7 to 37 ns for explicit differences (d = 3 to 50, one core).
FLOAT32_MAX_SQNORM = 100.0

# In float64 the same happens once |u|^2 exceeds about 1e3 (1e-12 asked), and at any norm where a profile
# behaves like sqrt(sq) near 0, since eps |u|^2 in sq is then sqrt(eps) |u| in the value. Entries with sq below
# this share of |u|^2 + |w|^2 are computed again from explicit differences; larger ones keep 12 digits.
_FLOAT64_MAX_SQNORM = 1e3
_REFINE_BELOW = {torch.float32: 1e-3, torch.float64: 1e-4}


def is_lazy(z: Any) -> bool:
    """Whether ``z`` is a symbolic KeOps matrix rather than a tensor."""
    return not isinstance(z, Tensor)


def stable_exp(z: Any, factor: float = 1.0) -> Any:
    """Return ``exp(factor z)`` where that is at most 1: in base 2, clamped above the subnormal range."""
    if is_lazy(z):
        return (z * factor).exp()
    z = z * (factor * LOG2E)
    floor = EXP2_FLOOR[z.dtype]
    if torch.is_grad_enabled() and z.requires_grad:
        return z.clamp(min=floor).exp2()
    return z.clamp_(min=floor).exp2_()


def stable_exp_(z: Tensor, factor: float) -> Tensor:
    """In-place :func:`stable_exp`, outside autograd."""
    return z.mul_(factor * LOG2E).clamp_(min=EXP2_FLOOR[z.dtype]).exp2_()


class _SafeSqrt(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.clamp(min=0).sqrt_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grad * inverse_or_zero(2 * root)


def safe_sqrt(z: Any) -> Any:
    """Square root whose gradient at 0 is 0; takes a tensor or a LazyTensor."""
    return z.sqrt() if is_lazy(z) else _SafeSqrt.apply(z)


def inverse_or_zero(z: Tensor) -> Tensor:
    """Return 1/z, and 0 where z is 0, with finite derivatives of every order (double-where)."""
    zero = z == 0
    return torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, z))


def augment(
    x: Tensor,
    y: Tensor,
    embed: Callable[[Tensor], Tensor] | None = None,
    *,
    max_sqnorm: float = FLOAT32_MAX_SQNORM,
) -> tuple[Tensor, Tensor, bool]:
    """Return ``a, b`` with ``a @ b.mT`` equal to the squared distances of the rows of ``x`` and ``y``.

    Both sets are centred on the mean of ``y``, then mapped by ``embed``, in float64; the result has the dtype of the
    points, or float64 where float32 would lose digits. The third value says whether near pairs need to be refined
    whatever the profile.
    """
    low = x.dtype == torch.float32
    u, w = x.double(), y.double()
    if y.shape[-2]:
        centre = w.detach().mean(dim=-2, keepdim=True)
        u, w = u - centre, w - centre
    if embed is not None:
        u, w = embed(u), embed(w)
    uu, ww = (u * u).sum(-1, keepdim=True), (w * w).sum(-1, keepdim=True)
    largest = torch.stack([t.detach().max() for t in (uu, ww) if t.numel()] or [uu.new_zeros(())]).max().item()
    if not math.isfinite(largest):
        if not bool(x.detach().isfinite().all() and y.detach().isfinite().all()):
            raise ValueError("x and y must be finite; got NaN or infinity.")
        # Not a ValueError: a search that tries a tiny lengthscale shall back off from it.
        raise OverflowError(
            "x and y must be less than 1e154 lengthscales apart, so that squares fit; got a largest squared norm of "
            f"{largest}. The lengthscale is too small for these points."
        )
    a = torch.cat([-2 * u, uu, torch.ones_like(uu)], -1)
    b = torch.cat([w, torch.ones_like(ww), ww], -1)
    # Reduced-precision matrix products (TF32, bfloat16) would ruin a difference of large numbers.
    if low and largest <= max_sqnorm and torch.get_float32_matmul_precision() == "highest":
        return a.float(), b.float(), False
    return a, b, largest > _FLOAT64_MAX_SQNORM


def sqdist_block(a: Tensor, b: Tensor, dtype: torch.dtype, *, refine: bool = False) -> Tensor:
    """Return the block of squared distances of augmented inputs, clamped at 0, in ``dtype``.

    With ``refine``, nearly coincident pairs are computed again from explicit differences.
    """
    product = (a @ b.mT).to(dtype)
    if not (torch.is_grad_enabled() and product.requires_grad):
        sq = product.clamp_(min=0)
        better = _refined(sq, a, b) if refine and sq.numel() else None
        return sq if better is None else better
    with torch.no_grad():
        exact = product.clamp(min=0)
        better = _refined(exact, a, b) if refine and exact.numel() else None
    # The derivative of the product is exact even where rounding took its value below 0 or refinement replaced it.
    return product + ((exact if better is None else better) - product).detach()


def _refined(sq: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    """Return a copy of ``sq`` with its nearly coincident pairs recomputed, or None if there are none."""
    limit = _REFINE_BELOW[sq.dtype] * (a[..., -2].amax() + b[..., -1].amax())
    if not sq.amin() < limit:
        return None
    near = sq < limit
    if near.sum() > near.numel() // 4:
        # Clustered far from each other: one pass over all pairs beats gathering a quarter of them.
        u, w = a[..., :-2] / -2, b[..., :-2]
        return torch.cdist(u, w, compute_mode="donot_use_mm_for_euclid_dist").square_().to(sq.dtype)
    at = near.nonzero(as_tuple=True)
    a_full = a.expand(*sq.shape[:-2], *a.shape[-2:])
    b_full = b.expand(*sq.shape[:-2], *b.shape[-2:])
    diff = a_full[..., :-2][at[:-1]] / -2 - b_full[..., :-2][(*at[:-2], at[-1])]
    out = sq.clone()
    out[at] = diff.square().sum(-1).to(sq.dtype)
    return out


class RadialProfile(NamedTuple):
    """A function of squared distances in the forms that a block needs.

    Parameters
    ----------
    value : callable
        ``value(sq)``, differentiable; takes a tensor.
    value_ : callable
        The same outside autograd; may overwrite its argument, since a fresh array costs as much as an exponential.
    slope : callable or None
        ``slope(sq, value)`` times ``factor`` is d value / d sq. ``sq`` is a function, so that a profile whose
        slope follows from its value pays for no second product. None means autograd.
    factor : float
        Constant of the slope, applied to the thin matrices instead of the block.
    rate : float or None
        Set where the value is ``exp(rate * sq)`` with a negative rate: it then goes into the product that makes
        sq, and two of the five passes over the block are spared.
    """

    value: Callable[[Tensor], Tensor]
    value_: Callable[[Tensor], Tensor]
    slope: Callable[[Callable[[], Tensor], Tensor], Tensor] | None
    factor: float = 1.0
    rate: float | None = None


def _exp_block(a: Tensor, b: Tensor, dtype: torch.dtype, rate: float) -> Tensor:
    """Return ``exp(rate * sq)`` of augmented inputs, outside autograd: product, one clamp at both ends, exp2."""
    z = ((a * (rate * LOG2E)) @ b.mT).to(dtype)
    return z.clamp_(min=EXP2_FLOOR[dtype], max=0.0).exp2_()


class _RadialBlock(torch.autograd.Function):
    """``profile(|u - w|^2)`` with the gradient in closed form: one product W = g * slope, two thin products."""

    @staticmethod
    def forward(
        ctx: Any, profile: RadialProfile, refine: bool, dtype: torch.dtype, a: Tensor, b: Tensor, *used: Tensor
    ) -> Tensor:
        if profile.rate is not None and not refine:
            value = _exp_block(a, b, dtype, profile.rate)
        else:
            value = profile.value_(sqdist_block(a, b, dtype, refine=refine))
        # The hyperparameters are saved for autograd's check alone that none is changed before the backward.
        ctx.save_for_backward(a, b, value, *used)
        ctx.profile, ctx.refine, ctx.dtype = profile, refine, dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        a, b, value, *used = ctx.saved_tensors
        slope, factor = ctx.profile.slope, ctx.profile.factor
        weight = grad * slope(lambda: sqdist_block(a, b, ctx.dtype, refine=ctx.refine), value)
        weight = weight.to(a.dtype)
        # Thin matrix on the left: with it on the right the same product took 2 to 6 times as long at d = 3 (n =
        # 1000, one core).
        grad_a = ((b * factor).mT @ weight.mT).mT.sum_to_size(a.shape) if ctx.needs_input_grad[3] else None
        grad_b = ((a * factor).mT @ weight).mT.sum_to_size(b.shape) if ctx.needs_input_grad[4] else None
        return None, None, None, grad_a, grad_b, *([None] * len(used))


def radial_block(
    a: Tensor, b: Tensor, dtype: torch.dtype, profile: RadialProfile, used: Sequence[Tensor] = (), *, refine: bool
) -> Tensor:
    """Return ``profile`` of the squared distances, with a closed-form gradient where the profile has a slope."""
    if profile.slope is None:
        return profile.value(sqdist_block(a, b, dtype, refine=refine))
    return _RadialBlock.apply(profile, refine, dtype, a, b, *used)
