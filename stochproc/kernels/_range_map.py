"""Reductions over the blocks of a pattern, whose backward recomputes each block: memory O(n + m + block).

The map over row blocks of ``_chunked``, for a function that sees a group of rows and its own columns alone. What it
returns by row is joined, what it returns by column is added up at its columns, the rest is added up over the blocks.
Its backward is the same map over the vector-Jacobian product of the function, so it differentiates to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc.kernels._base import Tensors
from stochproc.kernels._chunked import block_rows, gradients_of
from stochproc.kernels._ranges import Group, Ranges

__all__ = ["Piece", "map_ranges"]


class Piece(NamedTuple):
    """Some rows of a group, whose block fits the memory of one block."""

    start: int
    stop: int
    group: Group

    @property
    def columns(self) -> Tensor:
        return self.group.columns

    def drop(self, z: Tensor) -> Tensor:
        """Lower the exponents of the pairs that are not in the pattern; in place outside autograd."""
        return self.group.drop(z, self.start, self.stop)


Outputs = tuple[Tensors, Tensors, Tensors]
PieceFunction = Callable[[Piece, Tensors, Tensors, Tensors], Outputs]


def map_ranges(
    function: PieceFunction,
    ranges: Ranges,
    rows: Tensors,
    cols: Tensors,
    shared: Tensors,
    *,
    whole: bool,
    block_bytes: int | None,
) -> Outputs:
    """Apply ``function(piece, rows, cols, shared)`` to the blocks of a pattern; there must be a row and a column.

    It returns outputs by row, by column and shared, each with its axis at -2.
    """
    pieces = partial(_pieces, ranges, rows[0], whole, block_bytes)
    return _mapped(function, pieces, rows, cols, shared)


def _pieces(ranges: Ranges, like: Tensor, whole: bool, block_bytes: int | None) -> Iterator[Piece]:
    # Made again on each pass: the columns of all groups together are as many as n m times the density.
    for group in ranges.groups(like.device, whole=whole):
        step = group.stop - group.start
        if not whole:
            step = block_rows((like,), max(len(group.columns), 1), like.dtype, block_bytes)
        for start in range(group.start, group.stop, max(step, 1)):
            yield Piece(start, min(start + step, group.stop), group)


def _mapped(function: PieceFunction, pieces: Any, rows: Tensors, cols: Tensors, shared: Tensors) -> Outputs:
    n_row_out, n_col_out, *out = _MapPieces.apply(function, pieces, len(rows), len(cols), *rows, *cols, *shared)
    split = n_row_out + n_col_out
    return tuple(out[:n_row_out]), tuple(out[n_row_out:split]), tuple(out[split:])


class _MapPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: PieceFunction, pieces: Any, k: int, q: int, *tensors: Tensor) -> tuple:
        rows, cols, shared = tensors[:k], tensors[k : k + q], tensors[k + q :]
        n, m = rows[0].shape[0], cols[0].shape[0]
        whole: Outputs | None = None
        dtypes: list[torch.dtype] = []
        for piece in pieces():
            at = slice(piece.start, piece.stop)
            mine = tuple(t[at] for t in rows), tuple(t[piece.columns] for t in cols)
            row_out, col_out, sum_out = function(piece, *mine, shared)
            if whole is None:
                # Sums over blocks are kept in float64, whatever the data.
                whole = (
                    tuple(t.new_empty((n, t.shape[-1])) for t in row_out),
                    tuple(t.new_zeros((m, t.shape[-1]), dtype=torch.float64) for t in col_out),
                    tuple(torch.zeros_like(t, dtype=torch.float64) for t in sum_out),
                )
                dtypes = [t.dtype for t in (*col_out, *sum_out)]
            for joined, part in zip(whole[0], row_out, strict=True):
                joined[at] = part
            for total, part in zip(whole[1], col_out, strict=True):
                total.index_add_(0, piece.columns, part.double())
            for total, part in zip(whole[2], sum_out, strict=True):
                total += part
        if whole is None:
            raise RuntimeError("a map over ranges needs at least one row.")
        ctx.function, ctx.pieces, ctx.k, ctx.q = function, pieces, k, q
        ctx.n_row_out, ctx.n_col_out = len(whole[0]), len(whole[1])
        ctx.save_for_backward(*tensors)
        summed = (t.to(d) for t, d in zip((*whole[1], *whole[2]), dtypes, strict=True))
        return (len(whole[0]), len(whole[1]), *whole[0], *summed)

    @staticmethod
    def backward(ctx: Any, _: Any, __: Any, *grads: Tensor) -> tuple:
        tensors, k, q = ctx.saved_tensors, ctx.k, ctx.q
        wanted = list(ctx.needs_input_grad[4:])
        i, j = ctx.n_row_out, ctx.n_row_out + ctx.n_col_out
        out = _mapped(
            _vjp(ctx.function, k, q, wanted),
            ctx.pieces,
            (*tensors[:k], *grads[:i]),
            (*tensors[k : k + q], *grads[i:j]),
            (*tensors[k + q :], *grads[j:]),
        )
        found = iter([t for part in out for t in part])
        return (None, None, None, None, *(next(found) if w else None for w in wanted))


def _vjp(function: PieceFunction, k: int, q: int, wanted: Sequence[bool]) -> PieceFunction:
    """Return the block function of the gradients of ``function`` in its wanted inputs."""

    def vjp(piece: Piece, rows: Tensors, cols: Tensors, shared: Tensors) -> Outputs:
        s = len(wanted) - k - q
        inputs = (*rows[:k], *cols[:q], *shared[:s])
        upstream = (*rows[k:], *cols[q:], *shared[s:])
        found = gradients_of(
            lambda leaves: [
                t for part in function(piece, leaves[:k], leaves[k : k + q], leaves[k + q :]) for t in part
            ],
            inputs,
            wanted,
            upstream,
        )
        i = sum(wanted[:k])
        j = i + sum(wanted[k : k + q])
        return tuple(found[:i]), tuple(found[i:j]), tuple(found[j:])

    return vjp
