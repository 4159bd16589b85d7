"""Squared distances from one matrix product, and the elementwise functions whose gradients stay finite.

A block of squared distances is ``a @ b.mT`` with ``a = [-2u, |u|^2, 1]`` and ``b = [w, 1, |w|^2]``. The
augmented inputs are made once, outside the loop over blocks, and differentiate by plain matrix products.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)

# Subnormal results make exp2 ten times slower than the rest of a pass, so the exponent stops above them.
EXP2_FLOOR = {torch.float32: -120.0, torch.float64: -1000.0}

# The product form is wrong by about eps |u|^2. In float32 that passes the 2e-5 asked of a kernel once |u|^2
# exceeds about 100 (measured: tests/kernels/test_distance.py), so the product is then done in float64 and
# rounded: 1.3 ns a pair against 7 to 37 ns for explicit differences (d = 3 to 50, one core).
_FLOAT32_MAX_SQNORM = 100.0

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


def augment(u: Tensor, w: Tensor, *, max_sqnorm: float = _FLOAT32_MAX_SQNORM) -> tuple[Tensor, Tensor, bool]:
    """Return ``a, b`` with ``a @ b.mT`` equal to the squared distances of the rows of ``u`` and ``w``.

    Both sets are centred on the mean of ``w`` first; the result is float64 where float32 would lose digits.
    The third value says whether near pairs need to be refined whatever the profile.
    """
    if w.shape[-2]:
        centre = w.detach().mean(dim=-2, keepdim=True)
        u, w = u - centre, w - centre
    uu, ww = (u * u).sum(-1, keepdim=True), (w * w).sum(-1, keepdim=True)
    largest = max((t.detach().max().item() for t in (uu, ww) if t.numel()), default=0.0)
    # Reduced-precision matrix products (TF32, bfloat16) would ruin a difference of large numbers.
    reduced = torch.get_float32_matmul_precision() != "highest"
    if u.dtype == torch.float32 and (reduced or largest > max_sqnorm):
        u, w = u.double(), w.double()
        uu, ww = (u * u).sum(-1, keepdim=True), (w * w).sum(-1, keepdim=True)
    a = torch.cat([-2 * u, uu, torch.ones_like(uu)], -1)
    b = torch.cat([w, torch.ones_like(ww), ww], -1)
    return a, b, a.dtype == torch.float64 and largest > _FLOAT64_MAX_SQNORM


def sqdist_block(a: Tensor, b: Tensor, dtype: torch.dtype, *, refine: bool = False) -> Tensor:
    """Return the block of squared distances of augmented inputs, clamped at 0, in ``dtype``.

    With ``refine``, nearly coincident pairs are computed again from explicit differences.
    """
    sq = (a @ b.mT).to(dtype).clamp(min=0) if torch.is_grad_enabled() else _sqdist_in_place(a, b, dtype)
    if refine and sq.numel():
        with torch.no_grad():
            better = _refined(sq.detach(), a.detach(), b.detach())
        if better is not None:
            # Same graph, better value: the derivative of the product form is exact where sq > 0.
            sq = sq + (better - sq).detach() if sq.requires_grad else better
    return sq


def _sqdist_in_place(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a @ b.mT).to(dtype).clamp_(min=0)


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
    """

    value: Callable[[Tensor], Tensor]
    value_: Callable[[Tensor], Tensor]
    slope: Callable[[Callable[[], Tensor], Tensor], Tensor] | None
    factor: float = 1.0


class _RadialBlock(torch.autograd.Function):
    """``profile(|u - w|^2)`` with the gradient in closed form: one product W = g * slope, two thin products."""

    @staticmethod
    def forward(ctx: Any, profile: RadialProfile, refine: bool, dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
        value = profile.value_(sqdist_block(a, b, dtype, refine=refine))
        ctx.save_for_backward(a, b, value)
        ctx.profile, ctx.refine, ctx.dtype = profile, refine, dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        a, b, value = ctx.saved_tensors
        slope, factor = ctx.profile.slope, ctx.profile.factor
        weight = grad * slope(lambda: sqdist_block(a, b, ctx.dtype, refine=ctx.refine), value)
        weight = weight.to(a.dtype)
        grad_a = (weight @ (b * factor)).sum_to_size(a.shape) if ctx.needs_input_grad[3] else None
        grad_b = (weight.mT @ (a * factor)).sum_to_size(b.shape) if ctx.needs_input_grad[4] else None
        return None, None, None, grad_a, grad_b


def radial_block(a: Tensor, b: Tensor, dtype: torch.dtype, profile: RadialProfile, *, refine: bool) -> Tensor:
    """Return ``profile`` of the squared distances, with a closed-form gradient where the profile has a slope."""
    if profile.slope is None:
        return profile.value(sqdist_block(a, b, dtype, refine=refine))
    return _RadialBlock.apply(profile, refine, dtype, a, b)
