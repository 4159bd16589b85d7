"""The pairs on which a transport plan is not negligible, found block by block."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stochproc.kernels._base import check_points
from stochproc.kernels._costs import CityBlock, CostLike, SqEuclidean, as_cost
from stochproc.kernels._distance import LOG2E
from stochproc.kernels._evaluate import DROPPED
from stochproc.kernels._exponent_blocks import ExponentBlock, Exponents
from stochproc.kernels._ranges import RangesLike, as_ranges
from stochproc.kernels._reduction_checks import check_inverse, check_potential, check_wide

__all__ = ["support"]

# Results are gathered in pieces of this many pairs: many small tensors kept between large temporary blocks would
# fragment the heap.
PIECE = 1 << 18


def support(
    cost: CostLike,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    f: Float[Tensor, " n"],
    g: Float[Tensor, " m"],
    level: float | int | Float[Tensor, " n"] | Float[Tensor, ""],
    *,
    eps: float | int | Tensor = 1.0,
    ranges: RangesLike | None = None,
    block_bytes: int | None = None,
) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"], Float[Tensor, " k"]]:
    r"""Find all pairs with :math:`(f_i + g_j - c_{ij}) / \varepsilon > \ell_i`.

    Parameters
    ----------
    cost, x, y, g, eps, ranges, block_bytes
        As in :func:`softmax_pass`, without batch axes; g and f may be float64 where the points are float32.
    f : Tensor of shape (n,)
        In the unit of the cost; ``-inf`` drops the row.
    level : float or Tensor of shape (n,)
        Logarithm of the smallest entry to keep, in units of eps; ``inf`` keeps nothing of a row, ``-inf`` all pairs
        that are not dropped.

    Returns
    -------
    rows, columns : Tensor of shape (k,), int64
        In the order of the rows, columns ascending within a row.
    c : Tensor of shape (k,)
        Costs of these pairs, from explicit differences, in the dtype of x.

    Raises
    ------
    ValueError
        If shapes do not fit, there are batch axes, eps is not positive, an argument holds NaN, ranges is malformed,
        or the cost is unknown.
    TypeError
        If dtypes or devices are mixed otherwise than said above, or a dtype is neither float32 nor float64.
    OverflowError
        If a cost is too large for floating point.

    Notes
    -----
    Time O(n m d), memory O((n + m) d + k) plus one block. Not differentiable. A pair within rounding of its level may
    fall on either side: float32 exponents of size z are rounded to about 1e-7 z.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import support
    >>> x, y = torch.zeros(1, 1), torch.tensor([[3.0], [1.0], [0.5]])
    >>> rows, columns, c = support("sqeuclidean", x, y, torch.zeros(1), torch.zeros(3), -2.0)
    >>> columns.tolist(), c.tolist()
    ([1, 2], [1.0, 0.25])
    """
    x, y = check_points(x, y)
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"x and y must have no batch axes; got shapes {tuple(x.shape)} and {tuple(y.shape)}.")
    check_wide(x, f=f, g=g)
    for name, t, points, of in (("f", f, x, "x"), ("g", g, y, "y")):
        if t.ndim != 1:
            raise ValueError(f"{name} must have no batch axes; got shape {tuple(t.shape)}.")
        check_potential(name, t, points, of)
    inverse = float(check_inverse(eps.detach() if isinstance(eps, Tensor) else eps))
    limit = _levels(level, x)
    found = as_cost(cost)
    pattern = as_ranges(ranges, x, y, f, g)
    with torch.no_grad():
        exponents = Exponents(found, x, y, g, inverse, pattern)
        # Compared in base 2, as the exponents come; a row with f = -inf has no pair above +inf.
        limit = limit.to(x.device) * LOG2E - f.double() * exponents.scale
        limit = torch.where(f == -math.inf, math.inf, limit)
        counts = torch.zeros(x.shape[-2], dtype=torch.int64, device=x.device)
        columns, costs = _Pieces(x, torch.int64), _Pieces(x, x.dtype)
        for block in exponents.blocks(block_bytes=block_bytes):
            row, column = _above(block, limit, DROPPED[exponents.dtype])
            counts[block.rows] = torch.bincount(row, minlength=block.z.shape[0])
            at = column if block.columns is None else block.columns[column]
            columns.add(at)
            if block.cost is not None:
                costs.add(block.cost[row, column].to(x.dtype))
            else:
                costs.add(_cost_of(found, x[block.rows].index_select(0, row), y.index_select(0, at)))
        rows = torch.arange(x.shape[-2], device=x.device).repeat_interleave(counts)
        return rows, columns.joined(), costs.joined()


class _Pieces:
    """Results of unknown number, appended into a few large tensors."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype = like, dtype
        self.full: list[Tensor] = []
        self.current = like.new_empty(PIECE, dtype=dtype)
        self.used = 0

    def add(self, values: Tensor) -> None:
        while len(values):
            take = min(len(values), PIECE - self.used)
            self.current[self.used : self.used + take] = values[:take]
            self.used += take
            values = values[take:]
            if self.used == PIECE:
                self.full.append(self.current)
                self.current, self.used = self.like.new_empty(PIECE, dtype=self.dtype), 0

    def joined(self) -> Tensor:
        return torch.cat([*self.full, self.current[: self.used]])


def _levels(level: float | int | Tensor, x: Tensor) -> Tensor:
    """Return the level as float64 that broadcasts with the rows, checked."""
    if isinstance(level, Tensor):
        check_wide(x, level=level)
    elif isinstance(level, bool) or not isinstance(level, int | float):
        raise TypeError(f"level must be a number or a tensor; got {type(level).__name__}.")
    out = torch.as_tensor(level, dtype=torch.float64)
    if out.ndim and out.shape != x.shape[:-1]:
        raise ValueError(f"level must be a number or have one entry a row of x, {len(x)}; got {tuple(out.shape)}.")
    if bool(out.isnan().any()):
        raise ValueError("level must not be NaN.")
    return out


def _above(block: ExponentBlock, limit: Tensor, lowest: float) -> tuple[Tensor, Tensor]:
    """Return rows (within the block) and columns (within its columns) of the exponents above their limit."""
    # A dropped pair is below any limit.
    least = (limit[block.rows, None] - block.offset).clamp(min=0.5 * lowest).to(block.z.dtype)
    if block.z.numel() and not bool((block.z.amax(-1) < math.inf).all()):
        raise ValueError("cost must return numbers or +inf; got NaN or -inf.")
    if block.z.is_cuda:
        row, column = (block.z > least).nonzero(as_tuple=True)
        return row, column
    # Comparing and looking for what is left takes torch 1.9 ns an entry and NumPy 0.4 (float32, one x86 core).
    above = block.z.numpy() > least.numpy()
    by_row = np.repeat(np.arange(len(above)), np.count_nonzero(above, axis=1))
    by_column = np.flatnonzero(above) - by_row * above.shape[1]
    return torch.from_numpy(by_row), torch.from_numpy(by_column)


def _cost_of(cost: object, x: Tensor, y: Tensor) -> Tensor:
    """Return the costs of pairs of rows, from explicit differences."""
    difference = x - y
    if isinstance(cost, CityBlock):
        return difference.abs_().sum(-1)
    value = difference.square_().sum(-1)
    return value if isinstance(cost, SqEuclidean) else value.sqrt_()
