"""One sweep over all pairs that gives every sum a transport iteration needs: one exponential a pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import threshold

from stochproc._checks import check_finite
from stochproc.kernels._base import check_points
from stochproc.kernels._costs import Cost, CostLike, as_cost
from stochproc.kernels._dispatch import THRESHOLDS, resolve
from stochproc.kernels._distance import EXP2_FLOOR, LOG2E
from stochproc.kernels._evaluate import DROPPED
from stochproc.kernels._exponent_blocks import Exponents
from stochproc.kernels._ranges import Ranges, RangesLike, as_ranges
from stochproc.kernels._reduction_checks import check_inverse, check_potential, check_vectors, check_wide

__all__ = ["SoftmaxPass", "softmax_pass"]

RowWeights = Callable[[Tensor, slice], Tensor]


class SoftmaxPass(NamedTuple):
    r"""What :func:`softmax_pass` returns, with K the softmax by row and :math:`P = \mathrm{diag}(w) K`.

    Parameters
    ----------
    lse : Tensor of shape (*batch, n)
        Soft maximum of each row; ``-inf`` for a row without a finite column, whose row of K is 0.
    mass : Tensor of shape (*batch, m)
        :math:`P^T 1`.
    Kv : Tensor of shape (*batch, n, p) or None
        None where no v was given.
    PtKv : Tensor of shape (*batch, m, p) or None
        :math:`K^T \mathrm{diag}(w) K v`; None unless asked for.
    """

    lse: Tensor
    mass: Tensor
    Kv: Tensor | None = None
    PtKv: Tensor | None = None


def softmax_pass(
    cost: CostLike,
    x: Float[Tensor, "*#batch n d"],
    y: Float[Tensor, "*#batch m d"],
    g: Float[Tensor, "*#batch m"],
    w: Float[Tensor, "*#batch n"] | RowWeights,
    *,
    eps: float | int | Tensor = 1.0,
    v: Float[Tensor, "*#batch m p"] | None = None,
    gram: bool = False,
    ranges: RangesLike | None = None,
    backend: str = "auto",
    block_bytes: int | None = None,
    strict: bool = False,
) -> SoftmaxPass:
    r"""Take the softmax by row of :math:`(g_j - c_{ij}) / \varepsilon` and all its sums, in one sweep over the pairs.

    With K that softmax and :math:`P = \mathrm{diag}(w) K`: the log-sum-exp of the rows, the column sums of P, and
    the products :math:`K v` and :math:`P^T K v`. For g + eps log b and w = a, P is the transport plan whose rows are
    exact and ``-eps lse`` is its other potential.

    Parameters
    ----------
    cost : {"sqeuclidean", "euclidean", "cityblock"} or callable
        Cost of a pair of points (the squared distance, not half of it), or a function of two blocks of
        points, (*batch, n, d) and (*batch, m, d), that returns (*batch, n, m). ``+inf`` drops the pair.
    x : Tensor of shape (*batch, n, d)
    y : Tensor of shape (*batch, m, d)
    g : Tensor of shape (*batch, m)
        In the unit of the cost; ``-inf`` drops the column. g, w and v may be float64 where the points are float32:
        pairs are then still evaluated in float32, and the result is float64.
    w : Tensor of shape (*batch, n) or callable
        Weights of the rows, of any sign. A function ``w(lse, rows)`` gets the soft maxima of a block of rows,
        (*batch, rows) in float64, and the slice of rows they belong to, and returns weights of that shape. It is
        called once a block, in order; what it gives for a row without columns is ignored.
    eps : float or 0-dim Tensor, default=1.0
        Positive, in the unit of the cost.
    v : Tensor of shape (*batch, m, p), default=None
        Finite vectors for ``Kv``; None leaves it out.
    gram : bool, default=False
        Whether to return ``PtKv`` too; needs v.
    ranges : tuple of four integer Tensors, default=None
        Restricts the pairs to blocks: ``(x_starts, y_starts, block_ptr, block_cols)``, where x and y are sorted by
        cell, row cell I is ``x[x_starts[I]:x_starts[I + 1]]``, column cells alike, and row cell I interacts with the
        column cells ``block_cols[block_ptr[I]:block_ptr[I + 1]]``. Other pairs are left out exactly. Not with batch
        axes.
    backend : {"auto", "dense", "chunked", "keops"}, default="auto"
        See :func:`select_backend` for the rule.
    block_bytes : int, default=None
        Size of a block of rows of the chunked backend; None takes 1 MiB on a CPU and 64 MiB on CUDA.
    strict : bool, default=False
        With ``backend="keops"``: raise instead of falling back where KeOps cannot be used.

    Returns
    -------
    SoftmaxPass
        ``lse``, ``mass``, ``Kv`` and ``PtKv``, outside any autograd graph.

    Raises
    ------
    ValueError
        If shapes do not fit, eps is not positive, ranges is malformed, an argument holds NaN, ``gram`` lacks v, or
        the cost or backend is unknown.
    TypeError
        If dtypes or devices are mixed otherwise than said above, or a dtype is neither float32 nor float64.
    OverflowError
        If a cost or a product is too large for floating point.
    BackendError
        If ``strict`` and KeOps cannot be used.

    Notes
    -----
    Time O(n m (d + p)) and one exponential a pair on the dense and chunked backends (KeOps makes one reduction for
    each field), memory O((n + m)(d + p)) plus one block. Exponents below 2\ :sup:`-120` (float32) or 2\ :sup:`-1000`
    (float64) of the largest of their row count as 0, so that ``mass`` is 0 for a column that is that far from every
    row; its logarithm then has to come from a :func:`logsumexp` over the rows. Sums are kept in float64. float32
    points whose costs exceed 7e5 eps are evaluated in float64, unless ``ranges`` says that near pairs alone matter.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import softmax_pass
    >>> x, y = torch.zeros(2, 1), torch.tensor([[0.0], [1.0]])
    >>> out = softmax_pass("sqeuclidean", x, y, torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.75]))
    >>> out.mass.tolist()
    [0.5, 0.5]
    """
    x, y = check_points(x, y)
    _check_arguments(x, y, g, w, v, eps, gram)
    inverse = float(check_inverse(eps.detach() if isinstance(eps, Tensor) else eps))
    found = as_cost(cost)
    weights = w if isinstance(w, Tensor) else None
    pattern = as_ranges(ranges, x, y, g, weights, v)
    name = resolve(found.has_formula, x, y, 1 if v is None else v.shape[-1], backend, strict=strict)
    with torch.no_grad():
        if name == "keops":
            out = _by_keops(found, x, y, g, w, inverse, v, gram, pattern)
        else:
            options = {"whole": name == "dense", "block_bytes": block_bytes}
            out = _by_blocks(Exponents(found, x, y, g, inverse, pattern), w, v, gram, options)
        _check_result(out)
        kept = [t for t in (x, g, weights, v) if t is not None]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in kept) else x.dtype
        products = (None if t is None else t.to(dtype) for t in (out.Kv, out.PtKv))
        return SoftmaxPass(out.lse.to(dtype), out.mass.to(dtype), *products)


def _by_blocks(
    exponents: Exponents, w: Tensor | RowWeights, v: Tensor | None, gram: bool, options: dict
) -> SoftmaxPass:
    x, y, dtype = exponents.x, exponents.y, exponents.dtype
    n, m = x.shape[-2], y.shape[-2]
    batch = _batch_shape(x, y, exponents.weight[..., 0], w, v)
    p = 0 if v is None else v.shape[-1]
    # Allocated once: small results kept between large temporary blocks would fragment the heap.
    empty = partial(x.new_full, dtype=torch.float64)
    lse = empty((*batch, n), -math.inf)
    products = empty((*batch, p, n), 0.0)
    sums = empty((*batch, 1 + p if gram else 1, m), 0.0)
    weights = partial(_weights, w.double() if isinstance(w, Tensor) else w)
    thin = None if v is None else v.mT.to(dtype).contiguous()
    for block in exponents.blocks(**options):
        z, rows = block.z, block.rows
        if z.shape[-1] == 0:
            continue
        # The clamp makes the row maximum finite where all is dropped; every entry of the row is then 0.
        top = z.amax(-1, keepdim=True).clamp_(min=0.5 * DROPPED[dtype])
        _exp2_or_zero_(z.sub_(top))
        # Pairwise summation: a float32 sum is right to its last digits at any length.
        total = z.sum(-1).double()
        soft = (total.log2() + (top + block.offset).squeeze(-1)) / LOG2E
        lse[..., rows] = soft
        # At least 1, the largest entry, unless the row is empty.
        total = total.clamp(min=0.5)
        left = (weights(soft, rows) / total).unsqueeze(-2)
        if thin is not None:
            mine = thin if block.columns is None else thin.index_select(-1, block.columns)
            product = _times(mine, z) / total.unsqueeze(-2)
            products[..., rows] = product
            if gram:
                weighted = left * product
                left = torch.cat([left.expand(*weighted.shape[:-2], 1, -1), weighted], -2)
        part = left.to(dtype) @ z
        if block.columns is None:
            sums += part
        else:
            sums.index_add_(-1, block.columns, part.double())
    return SoftmaxPass(
        lse,
        sums[..., 0, :],
        None if v is None else products.mT.contiguous(),
        sums[..., 1:, :].mT.contiguous() if gram else None,
    )


def _exp2_or_zero_(z: Tensor) -> Tensor:
    """Exponentiate in place, with 0 instead of what is nearly subnormal: exp2 is fast at -inf, not below -126."""
    return threshold(z, EXP2_FLOOR[z.dtype], -math.inf, inplace=True).exp2_()


def _times(thin: Tensor, z: Tensor) -> Tensor:
    """Return ``thin @ z.mT`` in float64; a long float32 sum is taken in float64, by pieces that stay in the cache."""
    # The thin matrix stands on the left and is contiguous: on the right the same product took up to six times as long.
    step = THRESHOLDS["float32_max_terms"]
    if z.dtype == torch.float64 or z.shape[-1] <= step:
        return (thin @ z.mT).double()
    pieces = (slice(i, i + step) for i in range(0, z.shape[-1], step))
    first = next(pieces)
    out = thin[..., first].double() @ z[..., first].double().mT
    for piece in pieces:
        out += thin[..., piece].double() @ z[..., piece].double().mT
    return out


def _weights(w: Tensor | RowWeights, soft: Tensor, rows: slice) -> Tensor:
    """Return the weights of a block of rows in float64; those of a user's function are 0 where a row is empty."""
    if isinstance(w, Tensor):
        return w[..., rows].double()
    value = w(soft, rows)
    if not isinstance(value, Tensor) or value.shape != soft.shape:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"w must return one weight a row of the block, shape {tuple(soft.shape)}; got {came}.")
    return torch.where(soft == -math.inf, 0.0, value.double())


def _by_keops(
    cost: Cost,
    x: Tensor,
    y: Tensor,
    g: Tensor,
    w: Tensor | RowWeights,
    inverse: float,
    v: Tensor | None,
    gram: bool,
    pattern: Ranges | None,
) -> SoftmaxPass:
    """One symbolic reduction for each field."""
    from stochproc.kernels._keops import column_of, row_of, total_of

    n, m = x.shape[-2], y.shape[-2]
    batch = _batch_shape(x, y, g, w, v)
    x, y = x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])
    # KeOps would make NaN of a row in which all is -inf, so a dropped column gets a very small value.
    lowest = DROPPED[x.dtype]
    height = g.to(x.dtype).clamp(min=lowest).unsqueeze(-1)
    z = (column_of(height) - cost.formula(x, y)) * inverse
    blocks = None if pattern is None else pattern.keops(x.device)
    missing = x.new_zeros((), dtype=torch.bool) if pattern is None else pattern.rows_without_columns(x.device)

    z.ranges = blocks
    lse = z.logsumexp(z.nbatchdims + 1).squeeze(-1)
    empty = missing | (lse <= 0.5 * lowest * inverse)
    lse = torch.where(empty, -math.inf, lse).expand(*batch, n)
    soft = (z - row_of(torch.where(empty, 0.0, lse).unsqueeze(-1))).exp()
    weights = torch.where(empty, 0.0, _weights(w, lse.double(), slice(0, n)))
    weights = weights.expand(*batch, n).to(x.dtype).unsqueeze(-1)
    mass = total_of(soft * row_of(weights), x, n, over_rows=True, ranges=blocks).squeeze(-1)
    product = gram_product = None
    if v is not None:
        vectors = column_of(v.to(x.dtype).expand(*batch, *v.shape[-2:]))
        product = total_of(soft * vectors, x, m, ranges=blocks)
        product = torch.where(empty.unsqueeze(-1), 0.0, product)
        if gram:
            gram_product = total_of(soft * row_of(weights * product), x, n, over_rows=True, ranges=blocks)
    return SoftmaxPass(lse, mass, product, gram_product)


def _batch_shape(x: Tensor, y: Tensor, g: Tensor, w: Tensor | RowWeights, v: Tensor | None) -> torch.Size:
    shapes = [x.shape[:-2], y.shape[:-2], g.shape[:-1]]
    shapes += [w.shape[:-1]] if isinstance(w, Tensor) else []
    shapes += [] if v is None else [v.shape[:-2]]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(f"the batch shapes must broadcast; got {', '.join(str(tuple(s)) for s in shapes)}.") from None


def _check_arguments(
    x: Tensor, y: Tensor, g: Tensor, w: Tensor | RowWeights, v: Tensor | None, eps: Any, gram: bool
) -> None:
    check_wide(x, g=g, w=w if isinstance(w, Tensor) else None, v=v, eps=eps if isinstance(eps, Tensor) else None)
    check_potential("g", g, y, "y")
    if isinstance(w, Tensor):
        check_finite("w", w)
        if w.shape[-1:] != x.shape[-2:-1]:
            raise ValueError(f"w must have one entry a row of x, {x.shape[-2]}; got shape {tuple(w.shape)}.")
    elif not callable(w):
        raise TypeError(f"w must be a tensor or a function of (lse, rows); got {type(w).__name__}.")
    if v is not None:
        check_vectors("v", v, y)
        check_finite("v", v)
    elif gram:
        raise ValueError("gram must be False without v; got True.")
    _batch_shape(x, y, g, w, v)


def _check_result(out: SoftmaxPass) -> None:
    if bool((out.lse.isnan() | (out.lse == math.inf)).any()):
        raise ValueError("cost must return numbers or +inf; got NaN or -inf.")
    if not bool(out.mass.isfinite().all()):
        raise ValueError("w must return finite weights whose sums fit the dtype; got NaN or infinity.")
    if not all(t is None or bool(t.isfinite().all()) for t in (out.Kv, out.PtKv)):
        raise OverflowError("v must be small enough for its products to fit the dtype of the points.")
