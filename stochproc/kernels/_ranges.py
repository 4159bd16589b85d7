"""Which blocks of pairs a restricted reduction visits: the pattern, its groups of rows, and its KeOps form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stochproc.kernels._evaluate import DROPPED

__all__ = ["Group", "Ranges", "RangesLike", "as_ranges"]

RangesLike = tuple[Tensor, Tensor, Tensor, Tensor]
Integers = NDArray[np.int64]

# A group of row cells gathers the union of their columns once. It takes in the next cell while that costs fewer
# additional pairs than a group of its own costs overhead, and never grows beyond this many rows.
MAX_GROUP_ROWS = 512
# benchmarks/bench_softmax_pass.py, table "group": overhead of one group, in pairs of points, on one x86 core.
GROUP_OVERHEAD_PAIRS = 80_000


@dataclass
class Group:
    """Consecutive row cells and the union of their columns.

    Parameters
    ----------
    start, stop : int
        Rows.
    columns : Tensor of int64, on the device of the points
        Ascending; those that any of the row cells interacts with.
    owner : Tensor of int64
        Row cell of each row, counted from the first of the group.
    cells : Tensor of int64
        Cell of each column, counted within the union.
    outside : Tensor of bool or None
        (row cells, cells of the union): blocks that are not in the pattern; None if there are none.
    """

    start: int
    stop: int
    columns: Tensor
    owner: Tensor
    cells: Tensor
    outside: Tensor | None
    _by_cell: Tensor | None = None

    def drop(self, z: Tensor, start: int, stop: int) -> Tensor:
        """Lower the exponents of the rows start:stop where a pair is not in the pattern; in place outside autograd."""
        if self.outside is None:
            return z
        if self._by_cell is None or self._by_cell.dtype != z.dtype:
            zero = torch.zeros_like(self.outside, dtype=z.dtype)
            self._by_cell = zero.masked_fill_(self.outside, DROPPED[z.dtype]).index_select(1, self.cells)
        # Copying whole rows and adding takes 0.25 ns a pair, filling by a mask 1.2 (4 rows a cell, one core).
        penalty = self._by_cell.index_select(0, self.owner[start - self.start : stop - self.start])
        return z + penalty if torch.is_grad_enabled() and z.requires_grad else z.add_(penalty)


class Ranges:
    """A checked block pattern; row cell I interacts with ``block_cols[block_ptr[I]:block_ptr[I + 1]]``, ascending."""

    def __init__(self, x_starts: Integers, y_starts: Integers, block_ptr: Integers, block_cols: Integers) -> None:
        self.x_starts, self.y_starts = x_starts, y_starts
        self.block_ptr, self.block_cols = block_ptr, block_cols

    def groups(self, device: torch.device, *, whole: bool = False) -> Iterator[Group]:
        """Yield groups of row cells that cover all rows, cells without columns included; one only if ``whole``."""
        sizes = np.diff(self.y_starts)
        # Plain numbers: indexing an array entry by entry is slow.
        x_starts, ptr, counts = self.x_starts.tolist(), self.block_ptr.tolist(), self._columns_by_cell().tolist()
        # Which group last took a column cell in: membership in the union without sorting.
        taken = np.full(len(sizes), -1)
        begin, union_columns, pairs, group = 0, 0, 0, 0
        for cell, count in enumerate(counts):
            rows, total = x_starts[cell + 1] - x_starts[cell], x_starts[cell + 1] - x_starts[begin]
            if rows == 0:
                continue
            new = mine = self.block_cols[ptr[cell] : ptr[cell + 1]]
            fits = whole or total <= MAX_GROUP_ROWS
            if fits and union_columns:
                new = mine[taken[mine] != group]
            grown = union_columns + int(sizes[new].sum()) if union_columns else count
            if begin < cell and not (whole or (fits and total * grown <= pairs + rows * count + GROUP_OVERHEAD_PAIRS)):
                yield self._group(begin, cell, taken == group, device)
                group += 1
                begin, new, grown, total = cell, mine, count, rows
            taken[new] = group
            union_columns, pairs = grown, total * grown
        if counts:
            yield self._group(begin, len(counts), taken == group, device)

    def _group(self, begin: int, end: int, inside: NDArray[np.bool_], device: torch.device) -> Group:
        union = np.flatnonzero(inside)
        sizes = np.diff(self.y_starts)[union]
        # Of each column: its cell, and its place in that plus where the cell starts.
        cells = np.repeat(np.arange(len(union)), sizes)
        columns = np.arange(len(cells)) + (self.y_starts[union] - (np.cumsum(sizes) - sizes))[cells]
        outside = None
        counts = np.diff(self.block_ptr[begin : end + 1])
        if (counts != len(union)).any():
            outside = np.ones((end - begin, len(union)), dtype=bool)
            mine = self.block_cols[self.block_ptr[begin] : self.block_ptr[end]]
            outside[np.repeat(np.arange(end - begin), counts), (np.cumsum(inside) - 1)[mine]] = False
        owner = np.repeat(np.arange(end - begin), np.diff(self.x_starts[begin : end + 1]))
        return Group(
            start=int(self.x_starts[begin]),
            stop=int(self.x_starts[end]),
            columns=torch.from_numpy(columns).to(device),
            owner=torch.from_numpy(owner).to(device),
            cells=torch.from_numpy(cells).to(device),
            outside=None if outside is None else torch.from_numpy(outside).to(device),
        )

    def _columns_by_cell(self) -> Integers:
        """Return how many columns each row cell interacts with."""
        before = np.concatenate([[0], np.cumsum(np.diff(self.y_starts)[self.block_cols])])
        return before[self.block_ptr[1:]] - before[self.block_ptr[:-1]]

    def rows_without_columns(self, device: torch.device) -> Tensor:
        """Return (n,) of bool."""
        empty = self._columns_by_cell() == 0
        return torch.from_numpy(np.repeat(empty, np.diff(self.x_starts))).to(device)

    def keops(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the six arrays that KeOps takes: the pattern by rows, then by columns."""
        owner = np.repeat(np.arange(len(self.x_starts) - 1), np.diff(self.block_ptr))
        by_column = np.lexsort((owner, self.block_cols))
        counts = np.bincount(self.block_cols, minlength=len(self.y_starts) - 1)
        x_spans = np.stack([self.x_starts[:-1], self.x_starts[1:]], 1)
        y_spans = np.stack([self.y_starts[:-1], self.y_starts[1:]], 1)
        parts = (
            x_spans,
            self.block_ptr[1:],
            y_spans[self.block_cols],
            y_spans,
            np.cumsum(counts),
            x_spans[owner[by_column]],
        )
        return tuple(torch.from_numpy(np.ascontiguousarray(p, dtype=np.int32)).to(device) for p in parts)


def as_ranges(ranges: Any, x: Tensor, y: Tensor, *others: Tensor | None) -> Ranges | None:
    """Check ``ranges`` against the points and sort it; None stays None."""
    if ranges is None:
        return None
    if not isinstance(ranges, tuple | list) or len(ranges) != 4:
        came = f"{len(ranges)} entries" if isinstance(ranges, tuple | list) else type(ranges).__name__
        raise ValueError(f"ranges must be a tuple (x_starts, y_starts, block_ptr, block_cols); got {came}.")
    if x.ndim > 2 or y.ndim > 2 or any(t is not None and t.ndim > d for t, d in zip(others, (1, 1, 2), strict=False)):
        raise ValueError("ranges must not be given together with batch axes; loop over the batch.")
    x_starts, y_starts, ptr, cols = (
        _integers(name, value)
        for name, value in zip(("x_starts", "y_starts", "block_ptr", "block_cols"), ranges, strict=True)
    )
    _check_offsets("x_starts", x_starts, x.shape[-2], "the number of rows of x")
    _check_offsets("y_starts", y_starts, y.shape[-2], "the number of rows of y")
    if len(ptr) != len(x_starts):
        raise ValueError(
            f"ranges: block_ptr must have one entry more than there are row cells, {len(x_starts)}; got {len(ptr)}."
        )
    _check_offsets("block_ptr", ptr, len(cols), "the length of block_cols")
    n_cols = len(y_starts) - 1
    if len(cols) and not (cols.min() >= 0 and cols.max() < n_cols):
        bad = cols[(cols < 0) | (cols >= n_cols)][0]
        raise ValueError(f"ranges: block_cols must be column cells between 0 and {n_cols - 1}; got {bad}.")
    # One number a block, ascending by row cell and column cell within it; a block listed twice counts once.
    keys = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr)) * max(n_cols, 1) + cols
    if (np.diff(keys) <= 0).any():
        keys = np.unique(keys)
        owner, cols = np.divmod(keys, max(n_cols, 1))
        ptr = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(ptr) - 1))])
    return Ranges(x_starts, y_starts, ptr, cols)


def _integers(name: str, value: Any) -> Integers:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim != 1:
        raise ValueError(f"ranges: {name} must be one-dimensional; got shape {array.shape}.")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"ranges: {name} must hold integers; got {array.dtype}.")
    return array.astype(np.int64)


def _check_offsets(name: str, starts: Integers, end: int, what: str) -> None:
    """Raise unless ``starts`` runs from 0 to ``end`` without a step back."""
    if not len(starts) or starts[0] != 0:
        came = starts[0] if len(starts) else "an empty array"
        raise ValueError(f"ranges: {name} must start at 0; got {came}.")
    if (np.diff(starts) < 0).any():
        i = int(np.flatnonzero(np.diff(starts) < 0)[0])
        raise ValueError(f"ranges: {name} must not decrease; got {starts[i]} before {starts[i + 1]} at index {i + 1}.")
    if starts[-1] != end:
        raise ValueError(f"ranges: {name} must end at {what}, {end}; got {starts[-1]}.")
