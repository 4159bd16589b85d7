"""Layers one behind the other, and branches side by side that are added up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from stochproc.exceptions import ArchitectureError
from stochproc.gp._arch_base import DiagState, KernelState, Layer, Shape
from stochproc.gp._arch_images import Image
from stochproc.gp._arch_layers import Identity

__all__ = ["Branches", "Serial", "branches", "residual", "serial"]

# A composition is refused at construction if no input of one of these shapes fits it.
_TRIAL_SHAPES: tuple[Shape, ...] = ((), (32, 32), (28, 28), (24, 36), (512, 768))


class _Composite(Layer):
    """Layers inside a layer."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        given = list(layers)
        if not given:
            raise ArchitectureError(f"{self.name} needs at least one layer; got none.")
        for i, layer in enumerate(given):
            if not isinstance(layer, Layer):
                made = " It is a class: make an object of it." if isinstance(layer, type) else ""
                raise TypeError(f"argument {i} of {self.name} must be a layer; got {type(layer).__name__}.{made}")
        self.layers = torch.nn.ModuleList(given)
        self._check_some_shape()

    def _check_some_shape(self) -> None:
        """Raise what the check of the likeliest input says, unless an input of some shape fits."""
        shapes, errors = _TRIAL_SHAPES, []
        if any(isinstance(layer, Image) for layer in self.modules()):
            # The pixels are known.
            shapes = ((),)
        elif self.takes_images():
            shapes = _TRIAL_SHAPES[1:] + _TRIAL_SHAPES[:1]
        for shape in shapes:
            try:
                self.check(shape)
            except ArchitectureError as error:
                errors.append(error)
            else:
                return
        raise errors[0]

    @property
    def parts(self) -> list[Layer]:
        """The layers inside, in order."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        return {"layers": [write(layer) for layer in self.parts]}


class Serial(_Composite):
    """Layers one behind the other; made by :func:`serial`."""

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        for layer in self.parts:
            state = layer.kernel(state)
        return state

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        for layer in self.parts:
            state = layer.diagonal(state)
        return state

    def check(self, shape: Shape) -> Shape:
        """See :meth:`Layer.check`."""
        for layer in self.parts:
            shape = layer.check(shape)
        return shape


class Branches(_Composite):
    """Branches side by side, with independent weights, whose outputs are added; made by :func:`branches`."""

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        first, *rest = (layer.kernel(state) for layer in self.parts)
        pair, ntk = first.pair, first.ntk
        for other in rest:
            pair = pair.plus(other.pair)
            ntk = None if ntk is None or other.ntk is None else ntk + other.ntk
        return first._replace(pair=pair, ntk=ntk)

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        first, *rest = (layer.diagonal(state) for layer in self.parts)
        q, ntk, pair = first.q, first.ntk, first.pair
        for other in rest:
            q = q + other.q
            ntk = None if ntk is None or other.ntk is None else ntk + other.ntk
            pair = None if pair is None or other.pair is None else pair.plus(other.pair)
        return first._replace(q=q, ntk=ntk, pair=pair)

    def check(self, shape: Shape) -> Shape:
        """See :meth:`Layer.check`."""
        first, *rest = self.parts
        expected = first.check(shape)
        for layer in rest:
            found = layer.check(shape)
            if found != expected:
                raise ArchitectureError(
                    f"the branches of a sum must have the same pixels; got {_said(expected)} from {first.name} and "
                    f"{_said(found)} from {layer.name}."
                )
        return expected


def serial(*layers: Layer) -> Serial:
    """Put layers one behind the other.

    Parameters
    ----------
    *layers : Layer
        At least one. The same object may appear more than once: independent weights, shared parameters.

    Returns
    -------
    Serial

    Raises
    ------
    ArchitectureError
        If no input fits the layers, or there is none.
    TypeError
        If an argument is not a layer.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import arch
    >>> net = arch.serial(arch.Dense(1.4, 0.2), arch.Relu(), arch.Dense(1.0))
    >>> net.nngp(torch.zeros(3, 2)).shape
    torch.Size([3, 3])
    """
    return Serial(layers)


def branches(*layers: Layer) -> Branches:
    """Give each branch the same input and independent weights, and add their outputs.

    Parameters
    ----------
    *layers : Layer
        At least one.

    Returns
    -------
    Branches

    Raises
    ------
    ArchitectureError
        If the branches end with different pixels, or there is none.
    TypeError
        If an argument is not a layer.
    """
    return Branches(layers)


def residual(*layers: Layer) -> Branches:
    """Add the input to the output of ``serial(*layers)``: x + f(x).

    Parameters
    ----------
    *layers : Layer
        At least one; the last should have weights, so that f(x) is independent of x.

    Returns
    -------
    Branches

    Raises
    ------
    ArchitectureError
        If the layers change the pixels, or there is none.
    TypeError
        If an argument is not a layer.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import arch
    >>> arch.residual(arch.Relu(), arch.Dense(2.0)).nngp(torch.ones(1, 3)).item()
    3.0
    """
    return Branches([Identity(), layers[0] if len(layers) == 1 else Serial(layers)])


def _said(shape: Shape) -> str:
    return "x".join(map(str, shape)) if shape else "no pixels"
