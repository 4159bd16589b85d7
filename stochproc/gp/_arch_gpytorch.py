"""Kernels of infinitely wide networks for models of GPyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_integer
from stochproc.gp._arch_base import Layer
from stochproc.gp._arch_kernel import NetworkKernel
from stochproc.kernels import as_gpytorch

__all__ = ["NNGPKernel", "NTKKernel"]

# The adapter of the kernel layer sets what GPyTorch's own imports read, so it comes first.
_Adapter: Any = type(as_gpytorch("rbf"))


class _NetworkAdapter(_Adapter):  # type: ignore[misc]
    """What the two kernels have in common."""

    _kind = "nngp"

    def __init__(
        self, net: Layer, ard_num_dims: int | None = None, batch_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> None:
        lengthscale = None
        if ard_num_dims is not None:
            check_integer("ard_num_dims", ard_num_dims, 1)
            lengthscale = torch.ones(*batch_shape, ard_num_dims, dtype=torch.float64)
        elif batch_shape:
            lengthscale = torch.ones(*batch_shape, 1, dtype=torch.float64)
        kernel = NetworkKernel(net, self._kind, lengthscale=lengthscale, batch_shape=tuple(batch_shape))
        super().__init__(kernel, **kwargs)

    @property
    def net(self) -> Layer:
        """The network, whose parameters the kernel shares."""
        return self.kernel.net  # type: ignore[no-any-return]

    @property
    def input_lengthscale(self) -> Tensor | None:
        """What columns are divided by, of shape (*batch_shape, d); None without ``ard_num_dims``."""
        return self.kernel.lengthscale  # type: ignore[no-any-return]


class NNGPKernel(_NetworkAdapter):
    """Covariance of an infinitely wide network as a ``gpytorch.kernels.Kernel``.

    Parameters
    ----------
    net : Layer
        The network; its parameters are shared, not copied.
    ard_num_dims : int, default=None
        Number of columns, each of which gets a lengthscale of its own, 1 at first; None scales no column.
    batch_shape : torch.Size, default=()
        Batch shape of the lengthscales; without ``ard_num_dims`` one a batch for all columns.
    active_dims : tuple of int, default=None
        Columns to act on.

    Raises
    ------
    TypeError
        If net is not a layer.

    Notes
    -----
    Works in ``ExactGP`` and ``ApproximateGP``, in ``ScaleKernel``, sums and products. Large matrices stay a
    :class:`stochproc.kernels.KernelOperator`.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import arch
    >>> arch.NNGPKernel(arch.mlp(2), ard_num_dims=3)(torch.zeros(4, 3)).to_dense().shape
    torch.Size([4, 4])
    """


class NTKKernel(_NetworkAdapter):
    """Tangent kernel of an infinitely wide network as a ``gpytorch.kernels.Kernel``.

    Parameters and notes are those of :class:`NNGPKernel`.

    Raises
    ------
    ArchitectureError
        If a layer has no tangent kernel.
    TypeError
        If net is not a layer.
    """

    _kind = "ntk"
