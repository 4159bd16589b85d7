"""Layers on images: rows as images, pooling, and the read-outs that end with vectors."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from stochproc._checks import check_integer
from stochproc.exceptions import ArchitectureError
from stochproc.gp._arch_average import mean_over_pixels
from stochproc.gp._arch_base import DiagState, KernelState, Layer, PixelLayout, Shape
from stochproc.gp._arch_pooling import equal_pixels, equal_pixels_diagonal, pooled, pooled_diagonal
from stochproc.kernels import Pair

__all__ = [
    "AvgPool",
    "Flatten",
    "GlobalAvgPool",
    "Image",
    "OnImages",
    "as_images",
    "two_numbers",
]


class OnImages(Layer):
    """A layer that acts on images only."""

    on_images = True

    def check(self, shape: Shape) -> Shape:
        """See :meth:`Layer.check`."""
        if len(shape) != 2:
            raise ArchitectureError(
                f"{self.name} acts on images; got vectors. Pass images (n, height, width, channels), or begin with "
                "Image(height, width, channels) for rows."
            )
        return shape

    def _pixels(self, state: KernelState | DiagState) -> PixelLayout:
        self.check(() if state.pixels is None else state.pixels.shape)
        # The check refuses vectors.
        return cast(PixelLayout, state.pixels)

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        return {}


class Image(Layer):
    """Rows as images: the first layer of a network that estimators and kernels of rows can take.

    Parameters
    ----------
    height, width : int
        Pixels, at least 1.
    channels : int, default=1
        Numbers a pixel. A row holds height * width * channels numbers, the channels of a pixel side by side.

    Raises
    ------
    TypeError, ValueError
        If a number is no integer or below 1.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import arch
    >>> net = arch.serial(arch.Image(4, 4), arch.Conv(), arch.Relu(), arch.Flatten(), arch.Dense())
    >>> net.nngp(torch.ones(3, 16)).shape
    torch.Size([3, 3])
    """

    on_images = True

    def __init__(self, height: int, width: int, channels: int = 1) -> None:
        super().__init__()
        for name, value in (("height", height), ("width", width), ("channels", channels)):
            check_integer(name, value, 1)
        self.height, self.width, self.channels = int(height), int(width), int(channels)

    def check(self, shape: Shape) -> Shape:
        """See :meth:`Layer.check`."""
        if shape not in ((), (self.height, self.width)):
            raise ArchitectureError(f"{self!r} got images of {_said(shape)} pixels.")
        return (self.height, self.width)

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        self._check_pixels(state)
        return state

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        self._check_pixels(state)
        return state

    def _check_pixels(self, state: KernelState | DiagState) -> None:
        if state.pixels is None:
            raise ArchitectureError(f"{self!r} must be the first layer: what comes out of layers has no pixels again.")
        self.check(state.pixels.shape)

    def images(self, X: Tensor) -> Tensor:
        """Return rows (*batch, n, height * width * channels) as images (*batch, n, height, width, channels)."""
        shape = (self.height, self.width, self.channels)
        if X.shape[-3:] == shape and X.ndim > 3:
            return X
        d = self.height * self.width * self.channels
        if X.ndim < 2 or X.shape[-1] != d:
            raise ArchitectureError(f"{self!r} needs rows of {d} numbers; got shape {tuple(X.shape)}.")
        return X.unflatten(-1, shape)

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        return {"height": self.height, "width": self.width, "channels": self.channels}

    def extra_repr(self) -> str:
        return f"{self.height}, {self.width}, {self.channels}"


class AvgPool(OnImages):
    """Mean over blocks of pixels, side by side; rows and columns left over at the end are cut.

    Parameters
    ----------
    size : int or (int, int), default=2
        Height and width of a block.

    Raises
    ------
    TypeError, ValueError
        If a size is no integer or below 1.

    Notes
    -----
    Means of pixels mix all pairs of them, so a network with this layer costs O(n m P^2), in blocks over n and m.
    Distances behind it are accurate to eps times the variance, not relative to themselves: kernels of pairs hold no
    more. That shows in the tangent kernel of images 1e-6 apart, if a rectifier follows: relative errors up to 1e-8.
    Pairs of pixels are float64 for this reason, also where images are float32.
    """

    needs_pixel_pairs = True

    def __init__(self, size: int | tuple[int, int] | list[int] = 2) -> None:
        super().__init__()
        self.size = two_numbers("size", size)

    def check(self, shape: Shape) -> Shape:
        """See :meth:`Layer.check`."""
        height, width = super().check(shape)
        if self.size[0] > height or self.size[1] > width:
            raise ArchitectureError(f"{self!r} does not fit into {_said(shape)} pixels.")
        return (height // self.size[0], width // self.size[1])

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        self._pixels(state)
        return pooled(state, self.size)

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        self._pixels(state)
        return pooled_diagonal(state, self.size)

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        return {"size": list(self.size)}

    def extra_repr(self) -> str:
        return f"size={self.size}"


class Flatten(OnImages):
    """Read-out of all pixels as one vector: the mean over p of K[p, p].

    Notes
    -----
    Only equal pixels of two images meet, so without a pooling layer in front a network costs O(n m P).
    """

    def check(self, shape: Shape) -> Shape:
        """See :meth:`Layer.check`."""
        super().check(shape)
        return ()

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        self._pixels(state)
        state = equal_pixels(state)
        return KernelState(mean_over_pixels(state.pair), None if state.ntk is None else state.ntk.mean(-1))

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        self._pixels(state)
        state = equal_pixels_diagonal(state)
        return DiagState(state.q.mean(-1), None if state.ntk is None else state.ntk.mean(-1))


class GlobalAvgPool(OnImages):
    """Read-out of the mean of all pixels: the mean over p and p' of K[p, p'].

    Notes
    -----
    All pairs of pixels meet, so a network with this layer costs O(n m P^2), in blocks over n and m. What is said of
    :class:`AvgPool` holds for nonlinearities that follow.
    """

    needs_pixel_pairs = True

    def check(self, shape: Shape) -> Shape:
        """See :meth:`Layer.check`."""
        super().check(shape)
        return ()

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        height, width = self._pixels(state).shape
        state = equal_pixels(pooled(state, (height, width)))
        return KernelState(Pair(*(t.squeeze(-1) for t in state.pair)), None if state.ntk is None else state.ntk[..., 0])

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        height, width = self._pixels(state).shape
        state = equal_pixels_diagonal(pooled_diagonal(state, (height, width)))
        return DiagState(state.q[..., 0], None if state.ntk is None else state.ntk[..., 0])


def as_images(net: Layer, X: Tensor) -> Tensor:
    """Return X as images (*batch, n, height, width, channels), or raise ArchitectureError naming what is missing."""
    rows = next((layer for layer in net.modules() if isinstance(layer, Image)), None)
    if rows is not None:
        return rows.images(X)
    if X.ndim < 4:
        raise ArchitectureError(
            f"a network on images takes images (n, height, width, channels); got shape {tuple(X.shape)}. For rows of "
            "numbers begin with Image(height, width, channels)."
        )
    return X


def two_numbers(name: str, value: Any) -> tuple[int, int]:
    given = list(value) if isinstance(value, (tuple, list)) else [value, value]
    if len(given) != 2:
        raise ValueError(f"{name} must be one integer or two, for height and width; got {value!r}.")
    for entry in given:
        check_integer(name, entry, 1)
    return (int(given[0]), int(given[1]))


def _said(shape: Shape) -> str:
    return "x".join(map(str, shape))
