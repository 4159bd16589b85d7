"""Ready-made convolutional networks."""

from __future__ import annotations

import math

from stochproc._checks import check_integer
from stochproc.gp._arch_base import Layer
from stochproc.gp._arch_compose import Branches, Serial, residual
from stochproc.gp._arch_conv import Conv
from stochproc.gp._arch_images import Flatten, GlobalAvgPool, Image
from stochproc.gp._arch_layers import Dense
from stochproc.gp._arch_networks import _activation

__all__ = ["cnn", "wide_resnet"]

_W_STD, _B_STD = math.sqrt(2), 0.2

ImageShape = tuple[int, int, int]


def cnn(
    depth: int,
    pool: bool = False,
    *,
    activation: str | Layer = "relu",
    size: int | tuple[int, int] = 3,
    padding: str = "zero",
    w_std: float | int = _W_STD,
    b_std: float | int = _B_STD,
    w_last: float | int = 1.0,
    tie: bool = True,
    image_shape: ImageShape | None = None,
) -> Serial:
    """Convolutional network: ``depth`` times (Conv, activation), a read-out, and a last Dense without bias.

    Parameters
    ----------
    depth : int
        Number of convolutions, at least 1.
    pool : bool, default=False
        Whether the mean over pixels is read out (:class:`GlobalAvgPool`, cost O(n m P^2) for P pixels: the kernel does
        not change when both images are shifted, with circular padding) or all pixels (:class:`Flatten`, O(n m P)).
    activation : str or Layer, default="relu"
        As in :func:`mlp`.
    size : int or (int, int), default=3
        Height and width of the filters.
    padding : {"zero", "same", "circular", "valid"}, default="zero"
        As in :class:`Conv`.
    w_std, b_std : float, default=sqrt(2), 0.2
        Standard deviations of weights and biases of the convolutions.
    w_last : float, default=1.0
        Standard deviation of the weights of the last layer.
    tie : bool, default=True
        Whether the convolutions share one w_std and one b_std; else each learns its own.
    image_shape : (height, width, channels), default=None
        Given, the network takes rows of height * width * channels numbers, as estimators pass them (:class:`Image`).

    Returns
    -------
    Serial

    Raises
    ------
    ArchitectureError
        If the name of the activation is unknown or the images are too small.
    TypeError, ValueError
        If an argument is out of range.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import arch
    >>> net = arch.cnn(2, pool=True, padding="circular")
    >>> x, y = torch.rand(2, 1, 6, 6, 3, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(net.nngp(x, y), net.nngp(x, y.roll(2, 1)))
    True
    """
    check_integer("depth", depth, 1)
    between = _activation(activation)
    convs = [Conv(w_std, b_std, size=size, padding=padding) for _ in range(1 if tie else depth)] * (depth if tie else 1)
    layers = [layer for conv in convs for layer in (conv, between)]
    return Serial([*_front(image_shape), *layers, _read_out(pool), Dense(w_last)])


def wide_resnet(
    block_size: int,
    *,
    pool: bool = True,
    activation: str | Layer = "relu",
    padding: str = "zero",
    w_std: float | int = _W_STD,
    b_std: float | int = _B_STD,
    w_last: float | int = 1.0,
    tie: bool = True,
    image_shape: ImageShape | None = None,
) -> Serial:
    """Wide residual network: Conv, three groups of ``block_size`` blocks, activation, a read-out and a last Dense.

    A block adds its input to (activation, Conv, activation, Conv) of it. The second and third group halve height and
    width in their first convolution; the first block of every group has a 1x1 convolution, with the same stride, in
    the place of its input.

    Parameters
    ----------
    block_size : int
        Blocks in a group, at least 1.
    pool, activation, padding, w_std, b_std, w_last, image_shape
        As in :func:`cnn`, but that ``pool`` is True by default.
    tie : bool, default=True
        Whether convolutions of one filter size and stride share one w_std and one b_std; else each learns its own.

    Returns
    -------
    Serial

    Raises
    ------
    ArchitectureError, TypeError, ValueError
        As in :func:`cnn`.

    References
    ----------
    .. [1] S. Zagoruyko, N. Komodakis, "Wide Residual Networks", BMVC 2016.
    """
    check_integer("block_size", block_size, 1)
    between = _activation(activation)
    made: dict[tuple[int, int], Conv] = {}

    def conv(size: int = 3, stride: int = 1) -> Conv:
        if not tie or (size, stride) not in made:
            made[size, stride] = Conv(w_std, b_std, size=size, stride=stride, padding=padding)
        return made[size, stride]

    layers: list[Layer] = [conv()]
    for stride in (1, 2, 2):
        layers.append(Branches([conv(1, stride), Serial([between, conv(3, stride), between, conv()])]))
        layers += [residual(between, conv(), between, conv()) for _ in range(block_size - 1)]
    return Serial([*_front(image_shape), *layers, between, _read_out(pool), Dense(w_last)])


def _front(image_shape: ImageShape | None) -> list[Layer]:
    return [] if image_shape is None else [Image(*image_shape)]


def _read_out(pool: bool) -> Layer:
    return GlobalAvgPool() if pool else Flatten()
