"""Convolution of images: a dense layer on the pixels of a window."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from stochproc._checks import check_choice
from stochproc.exceptions import ArchitectureError
from stochproc.gp._arch_base import DiagState, KernelState, PixelLayout, Shape
from stochproc.gp._arch_images import OnImages, two_numbers
from stochproc.gp._arch_layers import Dense
from stochproc.gp._arch_windows import Window, mean_over_windows, pair_over_windows

__all__ = ["Conv"]


class Conv(OnImages, Dense):
    r"""Convolution: :math:`K'[p, p'] = b^2 + w^2/|F| \sum_f K[p + f, p' + f]` over the filter offsets f.

    Parameters
    ----------
    w_std : float, default=1.0
        Standard deviation of the weights, times the square root of the number of inputs of a filter.
    b_std : float, default=0.0
        Standard deviation of the biases, non-negative; 0 means no bias and no parameter.
    size : int or (int, int), default=3
        Height and width of the filter.
    stride : int or (int, int), default=1
        Pixels from one filter position to the next.
    padding : {"zero", "same", "circular", "valid"}, default="zero"
        What lies beyond the edge: zeros ("same" is another name), or the pixels of the other edge; "valid" places the
        filter inside the image only. With padding, n pixels become ceil(n / stride), and where the number of added
        pixels is odd, the larger part comes last (as in TensorFlow and JAX).
    trainable : bool, default=True
        Whether fits learn w_std and b_std.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range.

    Notes
    -----
    A filter is a sum over its rows of sums over their pixels, so a layer costs O(n m P size) for equal pixels and
    O(n m P^2 size) for all pairs. Padding with zeros makes pixels at the edge smaller, as in a finite network.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import arch
    >>> net = arch.serial(arch.Conv(2.0, padding="circular"), arch.Flatten())
    >>> net.nngp(torch.ones(1, 4, 4, 2)).item()
    4.0
    """

    def __init__(
        self,
        w_std: float | int = 1.0,
        b_std: float | int = 0.0,
        *,
        size: int | tuple[int, int] | list[int] = 3,
        stride: int | tuple[int, int] | list[int] = 1,
        padding: str = "zero",
        trainable: bool = True,
    ) -> None:
        super().__init__(w_std, b_std, trainable=trainable)
        self.size, self.stride = two_numbers("size", size), two_numbers("stride", stride)
        check_choice("padding", padding, ("zero", "same", "circular", "valid"))
        self.padding = "zero" if padding == "same" else padding

    def check(self, shape: Shape) -> Shape:
        """See :meth:`Layer.check`."""
        height, width = (w.n_out for w in self.windows(super().check(shape)))
        return (height, width)

    def windows(self, shape: Shape) -> tuple[Window, Window]:
        """Return what goes into each pixel, along both axes, of images of this shape."""
        first, second = (
            self._window(n, size, stride) for n, size, stride in zip(shape, self.size, self.stride, strict=True)
        )
        return first, second

    def _window(self, n: int, size: int, stride: int) -> Window:
        if self.padding == "valid":
            if size > n:
                raise ArchitectureError(f"{self!r} does not fit into {n} pixels.")
            return Window(size, stride, 0, 0, False, (n - size) // stride + 1)
        n_out = -(-n // stride)
        added = max((n_out - 1) * stride + size - n, 0)
        before, after = added // 2, added - added // 2
        if self.padding == "circular" and after > n:
            raise ArchitectureError(f"{self!r} goes around {n} pixels more than once.")
        return Window(size, stride, before, after, self.padding == "circular", n_out)

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        pixels = self._pixels(state)
        windows = self.windows(pixels.shape)
        pair = pair_over_windows(state.pair, pixels, windows)
        ntk = None
        if state.ntk is not None:
            shape = torch.broadcast_shapes(*(t.shape for t in state.pair))
            ntk = mean_over_windows(state.ntk.expand(shape), pixels, windows)
        return super().kernel(KernelState(pair, ntk, _behind(pixels, windows)))

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        pixels = self._pixels(state)
        windows = self.windows(pixels.shape)
        single = dataclasses.replace(pixels, pairs=False)
        q = mean_over_windows(state.q, single, windows)
        pair = None if state.pair is None else pair_over_windows(state.pair, pixels, windows)
        ntk = None if state.ntk is None else mean_over_windows(state.ntk, pixels, windows)
        return super().diagonal(DiagState(q, ntk, _behind(pixels, windows), pair))

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        own = {"size": list(self.size), "stride": list(self.stride), "padding": self.padding}
        return {**Dense.own_config(self, write), **own}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}, stride={self.stride}, padding={self.padding!r}"


def _behind(pixels: PixelLayout, windows: tuple[Window, Window]) -> PixelLayout:
    return dataclasses.replace(pixels, height=windows[0].n_out, width=windows[1].n_out)
