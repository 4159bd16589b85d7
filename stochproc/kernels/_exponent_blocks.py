"""Blocks of exponents (g_j - c_ij) / eps in base 2, made once for a sweep that needs no gradient.

Each set of rows is centred, with its columns, on its own mean, and its largest potential is taken out; both go to a
term by row that stays in float64. So a float32 block holds small numbers where it matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stochproc._checks import check_finite
from stochproc.kernels._chunked import block_rows
from stochproc.kernels._costs import CityBlock, Cost, Euclidean, SqEuclidean, UserCost
from stochproc.kernels._dispatch import THRESHOLDS
from stochproc.kernels._distance import LOG2E
from stochproc.kernels._evaluate import DROPPED, scaled
from stochproc.kernels._ranges import Group, Ranges

__all__ = ["ExponentBlock", "Exponents"]

# float32 rounds an exponent of this size to 0.1, so passes beyond it run in float64.
_FLOAT32_MAX_EXPONENT = 2.0**20


class ExponentBlock(NamedTuple):
    """Exponents of some rows and their columns.

    Parameters
    ----------
    rows : slice
    columns : Tensor of int64 or None
        None means all.
    z : Tensor of shape (*batch, rows, columns)
        Exponents in base 2 without ``offset``; free to be overwritten. Less than half of ``DROPPED``, or -inf, for
        a pair that is left out.
    offset : Tensor of shape (*batch, rows, 1), float64
        To be added to each row of ``z``.
    cost : Tensor or None
        The block of costs, where it is a user's function.
    """

    rows: slice
    columns: Tensor | None
    z: Tensor
    offset: Tensor
    cost: Tensor | None


class Exponents:
    """Exponents of all pairs, or of a pattern of blocks, to be iterated over once.

    Parameters
    ----------
    cost : Cost
    x, y : Tensor of shape (*batch, n, d) and (*batch, m, d)
    g : Tensor of shape (*batch, m)
        Of the dtype of the points, or float64.
    inverse : float
        1 / eps.
    ranges : Ranges or None
    """

    def __init__(self, cost: Cost, x: Tensor, y: Tensor, g: Tensor, inverse: float, ranges: Ranges | None) -> None:
        self.cost, self.x, self.y, self.ranges = cost, x, y, ranges
        self.scale = inverse * LOG2E
        self.dtype = self._working_dtype(g)
        lowest = DROPPED[self.dtype]
        self.weight = scaled(g.double(), self.scale, lowest).clamp(min=lowest).unsqueeze(-1)

    def _working_dtype(self, g: Tensor) -> torch.dtype:
        """Return float64 where float32 points have exponents that float32 does not hold."""
        x, y = self.x, self.y
        check_finite("x", x)
        check_finite("y", y)
        if 0 in (x.numel(), y.numel()):
            return x.dtype
        centre = y.double().mean(-2, keepdim=True)
        radius = max(float((t.double() - centre).square().sum(-1).max()) for t in (x, y)) ** 0.5
        spread = 0.0
        if isinstance(self.cost, SqEuclidean):
            spread = 4 * radius**2 if radius < 1e150 else math.inf
        elif isinstance(self.cost, Euclidean | CityBlock):
            spread = 2 * radius * (x.shape[-1] ** 0.5 if isinstance(self.cost, CityBlock) else 1.0)
        height = float(torch.where(g == -math.inf, 0.0, g).double().abs().max())
        largest = (spread + height) * self.scale
        if not largest < -0.1 * DROPPED[torch.float64]:
            raise OverflowError(f"costs and g must be less than 1e299 eps; got {largest / LOG2E:g} eps.")
        # A pattern is there to keep local exponents small, so it counts against the range of float32 alone.
        limit = -0.1 * DROPPED[torch.float32] if self.ranges is not None else _FLOAT32_MAX_EXPONENT
        exact = torch.get_float32_matmul_precision() == "highest"
        if spread * self.scale > limit or largest > -0.1 * DROPPED[torch.float32] or not exact:
            return torch.float64
        return x.dtype

    def blocks(self, *, whole: bool = False, block_bytes: int | None = None) -> Iterator[ExponentBlock]:
        """Yield blocks that cover all rows in order, as few as may be if ``whole``."""
        groups: Iterator[Group | None] = iter([None])
        if self.ranges is not None:
            groups = self.ranges.groups(self.x.device, whole=whole)
        for group in groups:
            begin, end = (0, self.x.shape[-2]) if group is None else (group.start, group.stop)
            if begin == end:
                continue
            columns = None if group is None else group.columns
            m = self.y.shape[-2] if columns is None else len(columns)
            evaluate = self._evaluator(slice(begin, end), columns)
            # No more rows than a float32 sum over them may have terms.
            step = min(end - begin, THRESHOLDS["float32_max_terms"])
            if not whole:
                step = min(step, block_rows((self.x, self.y, self.weight), max(m, 1), self.dtype, block_bytes))
            for start in range(begin, end, step):
                stop = min(start + step, end)
                z, offset, cost = evaluate(slice(start - begin, stop - begin))
                if group is not None:
                    z = group.drop(z, start, stop)
                yield ExponentBlock(slice(start, stop), columns, z, offset, cost)

    def _evaluator(
        self, rows: slice, columns: Tensor | None
    ) -> Callable[[slice], tuple[Tensor, Tensor, Tensor | None]]:
        weight = _at(self.weight, columns)
        if isinstance(self.cost, SqEuclidean):
            return self._squared(self.x[..., rows, :].double(), _at(self.y, columns).double(), weight)
        return self._general(self.x[..., rows, :], _at(self.y, columns), weight)

    def _squared(self, x: Tensor, y: Tensor, weight: Tensor) -> Callable[[slice], tuple[Tensor, Tensor, None]]:
        """Exponents in one matrix product, [2u, 1] times [w, (g - |w|^2)], with the scale in it."""
        centre = x.mean(-2, keepdim=True)
        u, w = x - centre, y - centre
        last = weight - self.scale * (w * w).sum(-1, keepdim=True)
        shift = self._shift(last)
        a = torch.cat([u * (2 * self.scale), torch.ones_like(u[..., :1])], -1).to(self.dtype)
        last = last - shift
        b = torch.cat([w.expand(*last.shape[:-1], w.shape[-1]), last], -1).to(self.dtype).mT
        offset = shift - self.scale * (u * u).sum(-1, keepdim=True)
        return lambda at: (a[..., at, :] @ b, offset[..., at, :], None)

    def _general(self, x: Tensor, y: Tensor, weight: Tensor) -> Callable[[slice], tuple[Tensor, Tensor, Tensor | None]]:
        user = isinstance(self.cost, UserCost)
        inner = self.cost.prepare(x, y) if user else self.cost.prepare(x.to(self.dtype), y.to(self.dtype))
        shift = self._shift(weight)
        term = (weight - shift).to(self.dtype).mT
        offset = shift.expand(*shift.shape[:-2], x.shape[-2], 1)

        def evaluate(at: slice) -> tuple[Tensor, Tensor, Tensor | None]:
            c = inner.block(tuple(t[..., at, :] for t in inner.rows), inner.cols, inner.shared)
            return torch.add(term, c.to(self.dtype), alpha=-self.scale), offset[..., at, :], c if user else None

        return evaluate

    def _shift(self, exponent: Tensor) -> Tensor:
        """Return the largest entry of a column, 0 where all of it is dropped."""
        if exponent.shape[-2] == 0:
            return exponent.new_zeros(*exponent.shape[:-2], 1, 1)
        top = exponent.amax(-2, keepdim=True)
        return torch.where(top < 0.5 * DROPPED[self.dtype], 0.0, top)


def _at(t: Tensor, columns: Tensor | None) -> Tensor:
    return t if columns is None else t.index_select(-2, columns)
