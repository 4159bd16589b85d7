"""Means over windows of pixels: of pairs, behind a convolution, and of plain numbers of pairs, also behind pooling."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc.gp._arch_average import average, differentiable, root
from stochproc.gp._arch_base import PixelLayout
from stochproc.kernels import Pair

__all__ = ["Window", "mean_over_blocks", "mean_over_windows", "pair_over_windows"]


class Window(NamedTuple):
    """Which pixels along one axis of an image go into each pixel behind a convolution.

    Parameters
    ----------
    size, stride : int
        Pixels of a window, and from one window to the next.
    before, after : int
        Pixels added at the two ends.
    circular : bool
        Whether the added pixels are those of the other end (else they are zero).
    n_out : int
        Number of windows.
    """

    size: int
    stride: int
    before: int
    after: int
    circular: bool
    n_out: int


def pair_over_windows(pair: Pair, pixels: PixelLayout, windows: tuple[Window, Window]) -> Pair:
    """Return the pairs under the mean over windows."""
    r1, r2 = pair.r1, pair.r2
    if pixels.pairs:
        r1 = r1.squeeze(-1)
    single = dataclasses.replace(pixels, pairs=False)
    squares = (mean_over_windows(r.double().square(), single, windows) for r in (r1, r2))
    r1, r2 = (root(square).to(r.dtype) for square, r in zip(squares, (r1, r2), strict=True))
    if pixels.pairs:
        r1 = r1.unsqueeze(-1)
    with torch.no_grad():
        D, A = _defects_over_windows(pair, pixels, windows)
    return differentiable(r1, r2, D, A, pair, lambda q: mean_over_windows(q, pixels, windows))


def _defects_over_windows(pair: Pair, pixels: PixelLayout, windows: tuple[Window, Window]) -> tuple[Tensor, Tensor]:
    # Axis by axis: the mean over a window is the mean over the rows of it of means within rows.
    first, second = ([-4], [-2]) if pixels.pairs else ([-2], [-2])
    fields = [_grid(t, pixels) for t in (pair.r1, pair.r2, *_whole(pair))]
    for axis, window in enumerate(windows):
        a, b = ([axis + i for i in axes] for axes in (first, second))
        both = sorted({*a, *b})
        fields = _pad_pair(fields, a, b, window)
        parts = [
            Pair(*(_cut(t, axes, window, i) for t, axes in zip(fields, (a, b, both, both), strict=True)))
            for i in range(window.size)
        ]
        fields = list(average(parts) if window.size > 1 else parts[0])
    D, A = (_rows(t, pixels) for t in fields[2:])
    return D, A


def mean_over_windows(t: Tensor, pixels: PixelLayout, windows: tuple[Window, Window]) -> Tensor:
    """Return the mean over windows of a plain number of every pair of pixels (tangent kernel, variance)."""
    out = _grid(t, pixels)
    for axis, window in enumerate(windows):
        axes = [axis - 4, axis - 2] if pixels.pairs else [axis - 2]
        out = _pad(out, axes, window)
        total = _cut(out, axes, window, 0)
        if window.size > 1:
            total = total / window.size
            for i in range(1, window.size):
                total.add_(_cut(out, axes, window, i), alpha=1 / window.size)
        out = total
    return _rows(out, pixels)


def mean_over_blocks(t: Tensor, pixels: PixelLayout, size: tuple[int, int]) -> Tensor:
    """Return the mean over blocks of ``size`` pixels, of each image by itself; rows and columns left over are cut."""
    out = _grid(t, pixels)
    blocks: list[int] = []
    axes = range(-4 if pixels.pairs else -2, 0)
    for axis in axes:
        k = size[axis % 2]
        n_blocks = out.shape[axis] // k
        out = out.narrow(axis, 0, n_blocks * k)
        blocks += [n_blocks, k]
    out = out.reshape(*out.shape[: axes[0]], *blocks).mean([2 * axis + 1 for axis in axes])
    return _rows(out, pixels)


def _whole(pair: Pair) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(*(t.shape for t in pair))
    return pair.D.expand(shape), pair.A.expand(shape)


def _grid(t: Tensor, pixels: PixelLayout) -> Tensor:
    """Unflatten the pixel axes; an axis of one entry, which broadcasts, becomes two."""
    for dim in (-1, -3) if pixels.pairs else (-1,):
        t = t.unflatten(dim, pixels.shape) if t.shape[dim] > 1 else t.unflatten(dim, (1, 1))
    return t


def _rows(t: Tensor, pixels: PixelLayout) -> Tensor:
    t = t.flatten(-2)
    return t.flatten(-3, -2) if pixels.pairs else t


def _pad(t: Tensor, axes: Sequence[int], window: Window) -> Tensor:
    before, after = window.before, window.after
    if before == after == 0:
        return t
    for axis in axes:
        if window.circular:
            t = torch.cat([t.narrow(axis, t.shape[axis] - before, before), t, t.narrow(axis, 0, after)], axis)
        else:
            t = torch.nn.functional.pad(t, [0, 0] * (-axis - 1) + [before, after])
    return t


def _pad_pair(fields: list[Tensor], first: list[int], second: list[int], window: Window) -> list[Tensor]:
    if window.before == window.after == 0:
        return fields
    both = sorted({*first, *second})
    r1, r2 = _pad(fields[0], first, window), _pad(fields[1], second, window)
    D, A = (_pad(t, both, window) for t in fields[2:])
    if first != second and not window.circular:
        # A pixel of one image against the void around the other: the difference of the norms is the norm.
        inside = [_pad(torch.ones_like(t), a, window) for t, a in ((fields[0], first), (fields[1], second))]
        D = D + (r1 * (1 - inside[1]) - r2 * (1 - inside[0]))
    return [r1, r2, D, A]


def _cut(t: Tensor, axes: Sequence[int], window: Window, start: int) -> Tensor:
    for axis in axes:
        stop = start + (window.n_out - 1) * window.stride + 1
        index: tuple[Any, ...] = (..., slice(start, stop, window.stride), *[slice(None)] * (-axis - 1))
        t = t[index]
    return t
