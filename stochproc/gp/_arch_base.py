"""What a layer of an infinitely wide network is: a map of kernels, and by itself already a network.

A layer maps the state of all pairs of two sets of points (norms, defects and tangent kernel), and the state of single
points, which gives the diagonal. Networks are layers made of layers, so every layer has the functions that users call.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from stochproc.exceptions import ArchitectureError
from stochproc.kernels import Pair

if TYPE_CHECKING:
    from stochproc.kernels import KernelOperator

__all__ = ["DiagState", "KernelState", "Layer", "PixelLayout", "Shape"]

#: Pixels of a state: () for vectors, (height, width) for images.
Shape = tuple[int, ...]


@dataclass(frozen=True)
class PixelLayout:
    """Which pairs of pixels the last axes of a state hold.

    Parameters
    ----------
    height, width : int
        Pixels of an image, P = height * width of them.
    pairs : bool
        False: axis (P,), the same pixel in both images. True: axes (P, P), all pairs of pixels.
    """

    height: int
    width: int
    pairs: bool

    @property
    def shape(self) -> Shape:
        """Height and width."""
        return (self.height, self.width)


class KernelState(NamedTuple):
    """All pairs of two sets of points before or behind a layer.

    Parameters
    ----------
    pair : Pair
        Norms, their difference and defects, of shapes that broadcast to (*batch, n, m) and, with pixels, axes behind.
    ntk : Tensor or None
        Tangent kernel of the same shape (or broadcasting to it), None where only the covariance is wanted.
    pixels : PixelLayout or None
        What the axes behind (n, m) are; None for vectors.
    """

    pair: Pair
    ntk: Tensor | None = None
    pixels: PixelLayout | None = None


class DiagState(NamedTuple):
    """Single points before or behind a layer, each paired with itself.

    Parameters
    ----------
    q : Tensor
        Variances, of shape (*batch, n); with pixels and ``layout.pairs`` False (*batch, n, P).
    ntk : Tensor or None
        Diagonal of the tangent kernel, None where only the covariance is wanted.
    pixels : PixelLayout or None
        None for vectors.
    pair : Pair or None
        For images with ``layout.pairs`` True: the pairs of pixels within each image, fields (*batch, n, P, P); ``q``
        then is their covariance at equal pixels, (*batch, n, P), and ``ntk`` has shape (*batch, n, P, P).
    """

    q: Tensor
    ntk: Tensor | None = None
    pixels: PixelLayout | None = None
    pair: Pair | None = None


class Layer(torch.nn.Module):
    """A layer, or a network of layers, of infinite width; a network by itself.

    Subclasses write :meth:`kernel`, :meth:`diagonal` and :meth:`config`. Weights are in NTK parameterisation: the
    input kernel is x . y / d for d columns.

    Notes
    -----
    Parameters are stored as float64 logarithms and cast to the dtype of the points at use. A layer that appears at
    several places of a network has independent weights there, but one set of parameters.
    """

    #: Configs write a layer that appears twice once, so that files may hold shared parameters.
    config_says_sharing = True
    #: Whether a tangent kernel exists.
    has_tangent = True
    #: Whether the layer is made for images, (n, height, width, channels).
    on_images = False
    #: Whether the layer needs all pairs of pixels, not the equal ones alone.
    needs_pixel_pairs = False

    @abstractmethod
    def kernel(self, state: KernelState) -> KernelState:
        """Map the pairs of two different sets of points through the layer."""

    @abstractmethod
    def diagonal(self, state: DiagState) -> DiagState:
        """Map points, each paired with itself, through the layer."""

    def check(self, shape: Shape) -> Shape:
        """Return the pixels behind the layer, or raise ArchitectureError naming it if it can't act on ``shape``.

        Parameters
        ----------
        shape : tuple of int
            () for vectors, (height, width) for images.
        """
        return shape

    def config(self) -> dict[str, Any]:
        """Return the layer as nested names and numbers, from which :func:`stochproc.gp.arch.from_config` rebuilds it.

        Layers that appear more than once are written once and then referred to.

        Raises
        ------
        TypeError
            If a part, such as a function, can't be written so.
        """
        from stochproc.gp._arch_config import config_of

        return config_of(self)

    def own_config(self, write: Any) -> dict[str, Any]:
        """Return the arguments that rebuild this layer; ``write(layer)`` is the config of a layer inside it."""
        raise TypeError(f"{type(self).__name__} is not a layer of this library, so it cannot be saved as numbers.")

    @property
    def name(self) -> str:
        """Name for messages."""
        return type(self).__name__

    def nngp(self, X1: Tensor, X2: Tensor | None = None) -> Tensor:
        """Covariance of the outputs of the infinitely wide network.

        Parameters
        ----------
        X1 : Tensor of shape (*batch, n, d), or (n, height, width, channels) for networks on images
            Points, float32 (of at most 1e18 in size) or float64 (1e150).
        X2 : Tensor of shape (*batch, m, d), or (m, height, width, channels), default=None
            None means X1: then only one triangle is evaluated, and the diagonal is that of :meth:`diag` bit for bit.

        Returns
        -------
        Tensor of shape (*batch, n, m)
            Differentiable in points and parameters.

        Raises
        ------
        ArchitectureError
            If the network can't act on points of this shape.
        TypeError
            If dtypes or devices differ.
        ValueError
            If points are misshapen, too large or not finite.

        Notes
        -----
        O(n m (d + depth)), in blocks that fit the cache; the gradient evaluates each block again.
        """
        from stochproc.gp._arch_evaluate import dense_kernels

        return dense_kernels(self, X1, X2, ("nngp",))[0]

    def ntk(self, X1: Tensor, X2: Tensor | None = None) -> Tensor:
        """Neural tangent kernel of the infinitely wide network; arguments, result and errors as in :meth:`nngp`.

        Raises
        ------
        ArchitectureError
            If a layer has no tangent kernel (Sign).
        """
        from stochproc.gp._arch_evaluate import dense_kernels

        return dense_kernels(self, X1, X2, ("ntk",))[0]

    def nngp_ntk(self, X1: Tensor, X2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Covariance and tangent kernel at once; arguments and errors as in :meth:`nngp` and :meth:`ntk`."""
        from stochproc.gp._arch_evaluate import dense_kernels

        covariance, tangent = dense_kernels(self, X1, X2, ("nngp", "ntk"))
        return covariance, tangent

    def diag(self, X: Tensor) -> Tensor:
        """Variances of the outputs, the diagonal of :meth:`nngp`.

        Parameters
        ----------
        X : Tensor of shape (*batch, n, d), or (n, height, width, channels)

        Returns
        -------
        Tensor of shape (*batch, n)
            In O(n).
        """
        from stochproc.gp._arch_evaluate import diagonals

        return diagonals(self, X, ("nngp",))[0]

    def ntk_diag(self, X: Tensor) -> Tensor:
        """Diagonal of :meth:`ntk`; argument and result as in :meth:`diag`."""
        from stochproc.gp._arch_evaluate import diagonals

        return diagonals(self, X, ("ntk",))[0]

    def lazy(
        self, X1: Tensor, X2: Tensor | None = None, *, kind: str = "nngp", backend: str = "auto"
    ) -> KernelOperator:
        """Kernel matrix as an operator that is never formed unless asked.

        Parameters
        ----------
        X1 : Tensor of shape (*batch, n, d)
        X2 : Tensor of shape (*batch, m, d), default=None
            None means X1.
        kind : {"nngp", "ntk"}, default="nngp"
        backend : {"auto", "dense", "chunked", "keops", "torch"}, default="auto"
            As in :meth:`stochproc.kernels.Kernel.operator`; "torch" is another name of "chunked".

        Returns
        -------
        KernelOperator
            With ``@ v``, ``.diagonal()``, ``.T``, differentiable in points and parameters.

        Raises
        ------
        ArchitectureError
            If the network takes images and does not begin with :class:`~stochproc.gp.arch.Image`: an operator takes
            rows.
        """
        from stochproc.gp._arch_images import Image
        from stochproc.gp._arch_kernel import NetworkKernel

        if self.takes_images() and not any(isinstance(layer, Image) for layer in self.modules()):
            raise ArchitectureError(
                "an operator takes rows of numbers, where this network takes images; begin with "
                "Image(height, width, channels)."
            )
        backend = "chunked" if backend == "torch" else backend
        return NetworkKernel(self, kind=kind).operator(X1, X2, backend=backend)

    def sample_network(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Draw a finite network; see :func:`stochproc.gp.arch.sample_network`."""
        from stochproc.gp._arch_sample import sample_network

        return sample_network(self, *args, **kwargs)

    def check_tangent(self) -> None:
        """Raise ArchitectureError naming the layer, if there is one without a tangent kernel."""
        for layer in self.modules():
            if isinstance(layer, Layer) and not layer.has_tangent:
                raise ArchitectureError(
                    f"{layer.name} has no tangent kernel: its derivative is no function. Use Erf for a smooth sign."
                )

    def takes_images(self) -> bool:
        """Whether a layer inside is made for images."""
        return any(isinstance(layer, Layer) and layer.on_images for layer in self.modules())
