"""Log-sum-exps over pairs of two sets of points, and transport plans times vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_same_kind
from stochproc.kernels._base import Prepared, Tensors
from stochproc.kernels._costs import Cost, CostLike, as_cost
from stochproc.kernels._dispatch import resolve
from stochproc.kernels._distance import LOG2E
from stochproc.kernels._evaluate import (
    DROPPED,
    accurate_product,
    exponent,
    logsumexp2,
    row_max,
    run,
    scaled,
    shifted_exp2,
    split,
)
from stochproc.kernels._range_map import Outputs, Piece, map_ranges
from stochproc.kernels._ranges import Ranges, RangesLike, as_ranges
from stochproc.kernels._reduction_checks import check_potential, check_soft, check_vectors

__all__ = ["expsum", "logsumexp"]


def logsumexp(
    cost: CostLike,
    x: Float[Tensor, "*#batch n d"],
    y: Float[Tensor, "*#batch m d"],
    g: Float[Tensor, "*#batch m"],
    *,
    eps: float | int | Tensor = 1.0,
    ranges: RangesLike | None = None,
    backend: str = "auto",
    block_bytes: int | None = None,
    strict: bool = False,
) -> Float[Tensor, "*batch n"]:
    r"""Soft maximum over columns, :math:`\log \sum_j \exp((g_j - c_{ij}) / \varepsilon)`.

    Parameters
    ----------
    cost : {"sqeuclidean", "euclidean", "cityblock"} or callable
        Cost of a pair of points (the squared distance, not half of it), or a function of two blocks of
        points, (*batch, n, d) and (*batch, m, d), that returns (*batch, n, m).
    x : Tensor of shape (*batch, n, d)
    y : Tensor of shape (*batch, m, d)
    g : Tensor of shape (*batch, m)
        In the unit of the cost; weights b enter as g + eps log b. ``-inf`` drops the column.
    eps : float or 0-dim Tensor, default=1.0
        Positive, in the unit of the cost.
    ranges : tuple of four integer Tensors, default=None
        Restricts the pairs to blocks, as in :func:`softmax_pass`; not with batch axes.
    backend, block_bytes, strict
        As in :func:`matvec`.

    Returns
    -------
    Tensor of shape (*batch, n)
        ``-inf`` for a row without a finite column; a cost of ``+inf`` drops the pair.

    Raises
    ------
    ValueError
        If shapes do not fit, eps is not positive, ranges is malformed, or the cost or backend is unknown.
    TypeError
        If dtypes or devices are mixed, or a dtype is neither float32 nor float64.

    Notes
    -----
    Time O(n m d), memory O((n + m) d) plus one block. x, y, g and a tensor eps may require gradients.
    """
    scale = check_soft(cost, x, y, g, eps)
    found = as_cost(cost)
    pattern = as_ranges(ranges, x, y, g)
    name = resolve(found.has_formula, x, y, 1, backend, strict=strict)
    if name == "keops":
        from stochproc.kernels._keops import column_of, constant_of

        # KeOps would make NaN of a row in which all is -inf, so a dropped column gets a very small value.
        lowest = DROPPED[x.dtype]
        z = (column_of(g.clamp(min=lowest).unsqueeze(-1)) - found.formula(x, y)) * constant_of(scale, x)
        empty = x.new_zeros((), dtype=torch.bool)
        if pattern is not None:
            z.ranges, empty = pattern.keops(x.device), pattern.rows_without_columns(x.device)
        out = z.logsumexp(z.nbatchdims + 1).squeeze(-1)
        return torch.where(empty | (out <= 0.5 * lowest * scale), -math.inf, out)
    if pattern is not None and x.shape[0] and y.shape[0]:

        def soft_of(piece: Piece, rows: Tensors, cols: Tensors, shared: Tensors) -> Outputs:
            z, row_term = _restricted(found, piece, rows[0], cols[0], cols[1], shared)
            return ((logsumexp2(z) + row_term) / LOG2E,), (), ()

        return _map(soft_of, found, pattern, (x,), (y, g.unsqueeze(-1)), scale, name, block_bytes).squeeze(-1)
    prepared = exponent(found, x, y, g, scale * LOG2E)

    def soft(rows: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
        cols, own, _ = split(prepared, shared)
        return ((logsumexp2(prepared.block(rows, cols, own)) + rows[-1]) / LOG2E,), ()

    return run(soft, prepared, (), name, y, x.dtype, block_bytes)[0].squeeze(-1)


def expsum(
    cost: CostLike,
    x: Float[Tensor, "*#batch n d"],
    y: Float[Tensor, "*#batch m d"],
    f: Float[Tensor, "*#batch n"],
    g: Float[Tensor, "*#batch m"],
    v: Float[Tensor, "*#batch m p"],
    *,
    eps: float | int | Tensor = 1.0,
    ranges: RangesLike | None = None,
    backend: str = "auto",
    block_bytes: int | None = None,
    strict: bool = False,
) -> Float[Tensor, "*batch n p"]:
    r"""Multiply a transport plan with vectors: :math:`\sum_j \exp((f_i + g_j - c_{ij})/\varepsilon)\, v_j`.

    Swap (x, f) and (y, g) for the transposed plan.

    Parameters
    ----------
    cost, x, y, g, eps, ranges, backend, block_bytes, strict
        As in :func:`logsumexp`.
    f : Tensor of shape (*batch, n)
        In the unit of the cost; ``-inf`` drops the row.
    v : Tensor of shape (*batch, m, p)

    Returns
    -------
    Tensor of shape (*batch, n, p)

    Raises
    ------
    ValueError
        If shapes do not fit, eps is not positive, ranges is malformed, or the cost or backend is unknown.
    TypeError
        If dtypes or devices are mixed, or a dtype is neither float32 nor float64.

    Notes
    -----
    Time O(n m (d + p)), memory O((n + m)(d + p)) plus one block. The exponent is shifted by its row maximum,
    so the result overflows only where the sum itself does.
    """
    scale = check_soft(cost, x, y, g, eps)
    check_same_kind(x=x, f=f, v=v)
    check_potential("f", f, x, "x")
    check_vectors("v", v, y)
    found = as_cost(cost)
    pattern = as_ranges(ranges, x, y, f, g, v)
    name = resolve(found.has_formula, x, y, v.shape[-1], backend, strict=strict)
    if name == "keops":
        from stochproc.kernels._keops import column_of, constant_of, row_of, total_of

        factor = constant_of(scale, x)
        z = (row_of(f.unsqueeze(-1)) + column_of(g.unsqueeze(-1)) - found.formula(x, y)) * factor
        blocks = None if pattern is None else pattern.keops(x.device)
        out = total_of(z.exp() * column_of(v), x, y.shape[-2], ranges=blocks)
        if pattern is None:
            return out
        return torch.where(pattern.rows_without_columns(x.device).unsqueeze(-1), 0.0, out)
    if pattern is not None and x.shape[0] and y.shape[0]:

        def plan_of(piece: Piece, rows: Tensors, cols: Tensors, shared: Tensors) -> Outputs:
            z, row_term = _restricted(found, piece, rows[0], cols[0], cols[1], shared)
            left = scaled(rows[1], shared[-1], -math.inf)
            return (_plan_times(z, row_term + left, cols[2]),), (), ()

        rows, cols = (x, f.unsqueeze(-1)), (y, g.unsqueeze(-1), v)
        return _map(plan_of, found, pattern, rows, cols, scale, name, block_bytes)
    prepared = exponent(found, x, y, g, scale * LOG2E)
    left = Prepared(
        (*prepared.rows, scaled(f, scale * LOG2E, -math.inf).unsqueeze(-1)),
        prepared.cols,
        prepared.shared,
        prepared.block,
    )

    def plan(rows: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
        cols, own, (w,) = split(prepared, shared)
        return (_plan_times(prepared.block(rows[:-1], cols, own), rows[-2] + rows[-1], w),), ()

    return run(plan, left, (v,), name, y, x.dtype, block_bytes)[0]


def _plan_times(z: Tensor, row_term: Tensor, v: Tensor) -> Tensor:
    """Return 2^(z + row_term) times v; may overwrite z outside autograd."""
    top, dropped = row_max(z)
    mass = shifted_exp2(z, top)
    return accurate_product(mass, v) * (torch.where(dropped, -math.inf, top) + row_term).exp2()


def _restricted(cost: Cost, piece: Piece, x: Tensor, y: Tensor, g: Tensor, shared: Tensors) -> tuple[Tensor, Tensor]:
    """Return the exponents of a piece in base 2, dropped where a pair is not in the pattern, and their row term."""
    *own, scale = shared
    # Made for the piece, so that both sides are centred on its own columns.
    prepared = exponent(cost, x, y, g.squeeze(-1), scale)
    return piece.drop(prepared.block(prepared.rows, prepared.cols, (*own, scale))), prepared.rows[-1]


def _map(
    function: Any,
    cost: Cost,
    pattern: Ranges,
    rows: Tensors,
    cols: Tensors,
    scale: Any,
    name: str,
    block_bytes: int | None,
) -> Tensor:
    """Map over the blocks of a pattern, with the parameters of the cost and the scale as shared arguments."""
    x, y = rows[0], cols[0]
    factor = scale * LOG2E
    shared = (
        *cost.prepare(x[:1], y[:1]).shared,
        factor if isinstance(factor, Tensor) else x.new_tensor(factor),
    )
    return map_ranges(function, pattern, rows, cols, shared, whole=name == "dense", block_bytes=block_bytes)[0][0]
