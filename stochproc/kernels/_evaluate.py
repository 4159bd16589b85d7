"""How a reduction over pairs is evaluated: on the whole matrix or block by block, and the exponents it takes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochproc.kernels._base import Prepared, Tensors
from stochproc.kernels._chunked import block_rows, map_rows
from stochproc.kernels._costs import Cost, SqEuclidean
from stochproc.kernels._dispatch import THRESHOLDS
from stochproc.kernels._distance import EXP2_FLOOR

# What a dropped column weighs, in log2: finite, so that no product makes NaN of it.
DROPPED = {torch.float32: -1e30, torch.float64: -1e300}


def smallest(
    prepared: Prepared,
    g: Tensor | None,
    k: int,
    name: str,
    y: Tensor,
    dtype: torch.dtype,
    block_bytes: int | None,
) -> Tensor:
    def nearest(rows: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
        cols, own, _ = split(prepared, shared)
        c = prepared.block(rows, cols, own)
        c = c if g is None else c - g.unsqueeze(-2)
        found = c.argmin(-1, keepdim=True) if k == 1 else c.topk(k, largest=False, sorted=True).indices
        return (found,), ()

    return run(nearest, prepared, (), name, y, dtype, block_bytes)[0]


def gathered(cost: Any, x: Tensor, y: Tensor, g: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_ij - g_j at the given columns, sorted, as a differentiable function of x, y and g."""
    batch, (n, k) = indices.shape[:-2], indices.shape[-2:]
    flat = indices.reshape(*batch, n * k, 1)
    near = y.expand(*batch, *y.shape[-2:]).gather(-2, flat.expand(*batch, n * k, y.shape[-1]))
    near = near.reshape(*batch, n, k, y.shape[-1])
    values = cost.prepare(x.expand(*batch, *x.shape[-2:]).unsqueeze(-2), near)().squeeze(-2)
    if g is not None:
        values = values - g.expand(*batch, g.shape[-1]).gather(-1, flat.squeeze(-1)).reshape(*batch, n, k)
    # The gathered values may differ from the block's in the last digit, hence in order.
    order = values.detach().argsort(dim=-1, stable=True)
    return values.gather(-1, order), indices.gather(-1, order)


def run(
    function: Any,
    prepared: Prepared,
    extra: Tensors,
    name: str,
    y: Tensor,
    dtype: torch.dtype,
    block_bytes: int | None,
) -> Tensors:
    shared = (*prepared.cols, *prepared.shared, *extra)
    if name == "dense":
        return function(prepared.rows, shared)[0]
    step = block_rows((*prepared.rows, *prepared.cols), y.shape[-2], dtype, block_bytes)
    return map_rows(function, prepared.rows, shared, step)[0]


def split(prepared: Prepared, shared: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    i = len(prepared.cols)
    j = i + len(prepared.shared)
    return shared[:i], shared[i:j], shared[j:]


def accurate_product(matrix: Tensor, v: Tensor) -> Tensor:
    """Multiply; a long float32 sum is taken in float64."""
    if matrix.dtype == torch.float64 or matrix.shape[-1] <= THRESHOLDS["float32_max_terms"]:
        return matrix @ v
    return (matrix.double() @ v.double()).to(matrix.dtype)


def exponent(cost: Cost, x: Tensor, y: Tensor, g: Tensor, scale: Any) -> Prepared:
    """Return (g_j - c_ij) * scale in prepared form, up to the last of the rows, which is to be added.

    For squared distances the scale, g and the norm of y are columns of one matrix product, so the block is
    that product alone; the norm of x is the row term.
    """
    inner = cost.prepare(x, y)
    # A tensor scale is an argument of the block, so that it gets its gradient.
    scale = scale if isinstance(scale, Tensor) else x.new_tensor(scale)
    weight = scaled(g, scale, DROPPED[x.dtype]).clamp(min=DROPPED[x.dtype]).unsqueeze(-1)
    if isinstance(cost, SqEuclidean):
        a, b = inner.rows[0], inner.cols[0]
        # a = [-2u, |u|^2, 1] and b = [w, 1, |w|^2]: the last column of b takes g as well.
        norms = a[..., -2:-1]
        a = torch.cat([a[..., :-2] * -scale, a[..., -1:]], -1)
        last = weight.to(b.dtype) - b[..., -1:] * scale
        b = torch.cat([b[..., :-2].expand(*last.shape[:-1], b.shape[-1] - 2), last], -1)
        row_term = (-norms * scale).to(x.dtype)
        return Prepared((a, row_term), (b,), (), lambda rows, cols, own: (rows[0] @ cols[0].mT).to(x.dtype))

    def block(rows: Tensors, cols: Tensors, own: Tensors) -> Tensor:
        return cols[-1].mT - inner.block(rows[:-1], cols[:-1], own[:-1]) * own[-1]

    zero = x.new_zeros(x.shape[-2], 1)
    return Prepared((*inner.rows, zero), (*inner.cols, weight), (*inner.shared, scale), block)


def scaled(g: Tensor, scale: Any, dropped: float) -> Tensor:
    """Return ``g * scale``, and the constant ``dropped`` where g is -inf: -inf * scale has no gradient in scale."""
    out = g.detach() == -math.inf
    return torch.where(out, dropped, torch.where(out, 0.0, g) * scale)


def row_max(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row maximum as a constant shift, and which rows have no column left (their shift is 0)."""
    if z.shape[-1] == 0:
        zero = z.new_zeros(*z.shape[:-1], 1)
        return zero, zero == 0
    top = z.detach().amax(-1, keepdim=True)
    dropped = top < 0.5 * DROPPED[z.dtype]
    return torch.where(dropped, 0.0, top), dropped


def shifted_exp2(z: Tensor, top: Tensor) -> Tensor:
    # Clamped entries count 2^-120 instead of less, nothing beside the row's largest, 1.
    floor = EXP2_FLOOR[z.dtype]
    if torch.is_grad_enabled() and z.requires_grad:
        return (z - top).clamp(min=floor).exp2()
    return z.sub_(top).clamp_(min=floor).exp2_()


def logsumexp2(z: Tensor) -> Tensor:
    """Return log2 of the row sums of 2^z, with shape (..., rows, 1); may overwrite z outside autograd."""
    top, dropped = row_max(z)
    wide = torch.float64 if z.shape[-1] > THRESHOLDS["float32_max_terms"] else z.dtype
    total = shifted_exp2(z, top).sum(-1, keepdim=True, dtype=wide).to(z.dtype)
    return torch.where(dropped, -math.inf, torch.where(dropped, 1.0, total).log2() + top)
