"""Finite networks drawn from the prior whose limit of infinite width a network of layers describes."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_integer
from stochproc._random import make_generator
from stochproc.exceptions import ArchitectureError
from stochproc.gp._arch_activations import Activation
from stochproc.gp._arch_base import Layer, Shape
from stochproc.gp._arch_compose import Branches, Serial
from stochproc.gp._arch_conv import Conv
from stochproc.gp._arch_finite import (
    FiniteConv,
    FiniteDense,
    FinitePool,
    FiniteSum,
    Function,
    flat_pixels,
    mean_pixels,
    root_mean_square,
)
from stochproc.gp._arch_images import AvgPool, Flatten, GlobalAvgPool, Image, as_images
from stochproc.gp._arch_layers import Dense, Dropout, Identity, LayerNorm, Scale
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_priors import as_scale_prior

__all__ = ["FiniteNetwork", "sample_network"]


class FiniteNetwork(torch.nn.Module):
    r"""A network of finite width with random weights; made by :func:`sample_network`.

    Every weight and bias is a standard normal parameter, multiplied in the forward pass by its standard deviation,
    weights also by 1 / sqrt(number of inputs): the NTK parameterisation. Outputs are multiplied by sqrt(s).

    Attributes
    ----------
    scale : Tensor of shape ()
        The drawn scale s, a buffer; 1 without a prior.
    layers : torch.nn.Module
        The layers; missing until the number of inputs is known.
    """

    scale: Tensor

    def __init__(self, draw: _Draw) -> None:
        super().__init__()
        self._draw: _Draw | None = draw
        # In a tuple, so that the kernel's parameters do not become parameters of this network.
        self._net = (draw.net,)

    def materialise(
        self, shape: tuple[int, ...], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> FiniteNetwork:
        """Draw the weights for inputs of this shape without the axis of points, unless that has been done.

        Parameters
        ----------
        shape : tuple of int
            (d,), or (height, width, channels).
        dtype : torch.dtype, default=None
            Of the weights, unless one was asked for when the network was made; None is torch's default.
        device : torch.device, default=None
            None is the CPU.
        """
        if self._draw is not None:
            self.layers, scale = self._draw(shape)
            self.register_buffer("scale", scale)
            self.to(dtype=self._draw.dtype or dtype or torch.get_default_dtype(), device=device)
            self._draw = None
        return self

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate the network.

        Parameters
        ----------
        X : Tensor of shape (n, d), or (n, height, width, channels) for networks on images
            Of the dtype and on the device of the weights.

        Returns
        -------
        Tensor of shape (n, n_outputs)
        """
        (net,) = self._net
        if net.takes_images():
            X = as_images(net, X)
        if self._draw is not None:
            self.materialise(tuple(X.shape[1:]), X.dtype, X.device)
        return self.layers(X) * self.scale.sqrt()


def sample_network(
    net: Layer,
    width: int = 512,
    *,
    scale_prior: str | ScalePrior | None = None,
    seed: Any = None,
    n_outputs: int = 1,
    n_features: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> FiniteNetwork:
    r"""Draw a finite network from the prior whose limit of infinite width is ``net``.

    Over seeds the outputs have mean 0 and, as the width grows, covariance :math:`E[s] K` with K the covariance of
    ``net``; they become Gaussian given s, a scale mixture with it. Errors of the covariance are of order 1/width.

    Parameters
    ----------
    net : Layer
        A network whose nonlinearities act on sums of outputs of Dense and Conv: kernels compose in any order, but only
        such units become Gaussian, as each nonlinearity assumes. Of the branches of a sum all but one must have mean 0,
        as outputs of Dense and Conv have: kernels of sums have no mixed terms.
    width : int, default=512
        Units (channels) of every hidden layer.
    scale_prior : ScalePrior or str, default=None
        Prior of s; one s is drawn and multiplies all outputs by sqrt(s). None means s = 1.
    seed : None, int, numpy generator or torch.Generator, default=None
        Source of weights and scale; equal seeds give equal networks.
    n_outputs : int, default=1
        Number of outputs, which have independent weights in the last layer and share the scale.
    n_features : int, default=None
        Columns of the inputs. None: the weights are drawn at the first call, for the inputs that it gets.
    image_shape : (height, width, channels), default=None
        The same for networks on images; not needed if the network begins with :class:`Image`.
    dtype : torch.dtype, default=None
        Of the weights; they are drawn in float64. None: torch's default, where they are drawn at the first call that
        of the inputs.

    Returns
    -------
    FiniteNetwork
        A ``torch.nn.Module`` whose parameters, all standard normal, can be trained.

    Raises
    ------
    ArchitectureError
        If a nonlinearity acts on the inputs, on outputs of another one or on the pixels of Flatten, branches of a sum
        are not independent or not centred, or there is no layer whose number of outputs could be ``n_outputs``.
    TypeError, ValueError
        If an argument is out of range.

    Notes
    -----
    The standard deviations are those that ``net`` has now, also where the weights are drawn later. Dropout drops in
    training mode only, with torch's global generator.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import arch
    >>> model = arch.mlp(2).sample_network(width=64, n_features=3, seed=0)
    >>> model(torch.zeros(5, 3)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([5, 1]), 4480)
    """
    check_integer("width", width, 1)
    check_integer("n_outputs", n_outputs, 1)
    prior = None if scale_prior is None else as_scale_prior(scale_prior)
    network = FiniteNetwork(_Draw(copy.deepcopy(net), width, prior, make_generator(seed), n_outputs, dtype))
    rows = next((layer for layer in net.modules() if isinstance(layer, Image)), None)
    if image_shape is None and rows is not None:
        image_shape = (rows.height, rows.width, rows.channels)
    shape = image_shape if net.takes_images() else None if n_features is None else (n_features,)
    if shape is not None:
        for size in shape:
            check_integer("image_shape" if len(shape) == 3 else "n_features", size, 1)
        network.materialise(tuple(shape))
    return network


@dataclass(frozen=True)
class _Draw:
    """What a network is drawn from, once the shape of its inputs is known: with copies, so that it can wait."""

    net: Layer
    width: int
    prior: ScalePrior | None
    generator: torch.Generator
    n_outputs: int
    dtype: torch.dtype | None

    def __call__(self, shape: tuple[int, ...]) -> tuple[torch.nn.Module, Tensor]:
        """Return layers and scale, in float64."""
        self.net.check(shape[:-1])
        start = _Units(shape[-1], shape[:-1], gaussian=False, centred=False)
        layers, units = _Builder(self.width, self.generator).build(self.net, start, self.n_outputs)
        if units.channels != self.n_outputs:
            raise ArchitectureError(
                f"the network has {units.channels} outputs where n_outputs={self.n_outputs} are wanted; end with Dense."
            )
        if self.prior is None:
            return layers, torch.ones((), dtype=torch.float64)
        return layers, self.prior.sample(generator=self.generator).cpu()


@dataclass(frozen=True)
class _Units:
    """What goes into a layer: channels, pixels, and how units behave as width grows.

    Parameters
    ----------
    gaussian : bool
        Whether each unit tends to a Gaussian process, the same for all.
    centred : bool
        Whether each unit has mean 0 over the weights.
    """

    channels: int
    pixels: Shape
    gaussian: bool
    centred: bool


@dataclass(frozen=True)
class _Builder:
    width: int
    generator: torch.Generator

    def build(self, layer: Layer, units: _Units, n_out: int) -> tuple[torch.nn.Module, _Units]:
        """Return the finite layer and what comes out: ``n_out`` channels, if the layer has the weights for it."""
        if isinstance(layer, Serial):
            return self._serial(layer, units, n_out)
        if isinstance(layer, Branches):
            return self._branches(layer, units, n_out)
        channels, gaussian, centred = units.channels, units.gaussian, units.centred
        finite: torch.nn.Module
        if isinstance(layer, Dense):
            finite, channels, gaussian, centred = self._weights(layer, units, n_out), n_out, True, True
        elif isinstance(layer, Activation):
            if not gaussian:
                raise ArchitectureError(
                    f"{layer.name} acts on units that are not Gaussian with one law at any width (inputs, outputs of "
                    "another nonlinearity, or pixels joined by Flatten), so the network has no limit with this kernel; "
                    "put Dense or Conv in front of it."
                )
            finite, gaussian, centred = Function(layer.function, layer.name), False, _is_odd(layer)
        else:
            finite = _without_weights(layer)
            gaussian = gaussian and not isinstance(layer, Dropout)
        if isinstance(layer, Flatten):
            channels *= math.prod(units.pixels)
            # Pixels have variances and correlations of their own; the kernel behind is that of their mean.
            gaussian = gaussian and math.prod(units.pixels) == 1
        return finite, _Units(channels, layer.check(units.pixels), gaussian, centred)

    def _weights(self, layer: Dense, units: _Units, n_out: int) -> torch.nn.Module:
        size = layer.size if isinstance(layer, Conv) else ()
        weight, bias = self._normal(n_out, units.channels, *size), self._normal(n_out)
        w_std, b_std = layer.w_std.item(), layer.b_std.item()
        if isinstance(layer, Conv):
            return FiniteConv(weight, bias if b_std else None, w_std, b_std, layer.windows(units.pixels))
        return FiniteDense(weight, bias if b_std else None, w_std, b_std)

    def _normal(self, *shape: int) -> Tensor:
        # On the generator's device, in float64: equal seeds give equal weights in every dtype.
        return torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.float64).cpu()

    def _serial(self, layer: Serial, units: _Units, n_out: int) -> tuple[torch.nn.Module, _Units]:
        # Channels in front of a layer without weights are those behind it.
        wanted, outs = n_out, []
        for part in reversed(layer.parts):
            outs.append(wanted)
            if _sets_channels(part) or _flattens(part):
                wanted = self.width
        made = []
        for part, out in zip(layer.parts, reversed(outs), strict=True):
            finite, units = self.build(part, units, out)
            made.append(finite)
        return torch.nn.Sequential(*made), units

    def _branches(self, layer: Branches, units: _Units, n_out: int) -> tuple[torch.nn.Module, _Units]:
        fixed = [part for part in layer.parts if not _sets_channels(part)]
        if len(fixed) > 1:
            raise ArchitectureError(
                f"{fixed[0].name} and {fixed[1].name} are branches of one sum without weights of their own at the end: "
                "they are not independent, as the kernel takes them to be."
            )
        out = units.channels if fixed else n_out
        made, ends = zip(*(self.build(part, units, out) for part in layer.parts), strict=True)
        if len({end.channels for end in ends}) > 1:
            raise ArchitectureError(f"the branches of a sum end with {[end.channels for end in ends]} channels.")
        shifted = [part.name for part, end in zip(layer.parts, ends, strict=True) if not end.centred]
        if len(shifted) > 1:
            raise ArchitectureError(
                f"{shifted[0]} and {shifted[1]} are branches of one sum and both have a mean other than 0: the product "
                "of their means is missing in the kernel. End all branches but one with Dense or Conv."
            )
        gaussian, centred = all(end.gaussian for end in ends), all(end.centred for end in ends)
        return FiniteSum(made), _Units(ends[0].channels, ends[0].pixels, gaussian, centred)


def _is_odd(layer: Activation) -> bool:
    """Whether a nonlinearity changes its sign with its argument, so that it keeps the mean of 0."""
    t = torch.linspace(0.0625, 4.0, 64, dtype=torch.float64)
    up, down = layer.function(t), layer.function(-t)
    return torch.allclose(up, -down, rtol=1e-12, atol=1e-12)


def _sets_channels(layer: Layer) -> bool:
    """Whether the number of channels behind a layer is free, since it has weights at its end."""
    if isinstance(layer, Branches):
        return all(map(_sets_channels, layer.parts))
    if isinstance(layer, Serial):
        for part in reversed(layer.parts):
            if _sets_channels(part):
                return True
            if _flattens(part):
                return False
        return False
    return isinstance(layer, Dense)


def _flattens(layer: Layer) -> bool:
    return any(isinstance(part, Flatten) for part in layer.modules())


def _without_weights(layer: Layer) -> torch.nn.Module:
    if isinstance(layer, (Identity, Image)):
        return torch.nn.Identity()
    if isinstance(layer, Dropout):
        return torch.nn.Dropout(1 - layer.keep)
    if isinstance(layer, AvgPool):
        return FinitePool(layer.size)
    if isinstance(layer, Scale):
        return Function(partial(torch.mul, other=layer.s), layer.name)
    if isinstance(layer, LayerNorm):
        return Function(partial(root_mean_square, eps=layer.eps), layer.name)
    if isinstance(layer, (Flatten, GlobalAvgPool)):
        return Function(flat_pixels if isinstance(layer, Flatten) else mean_pixels, layer.name)
    raise ArchitectureError(f"{layer.name} has no finite form.")
