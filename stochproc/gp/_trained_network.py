"""What describes a network to be trained: a network of ``gp.arch``, its name, or its kernels."""

import copy
from typing import Any

import torch
from torch import Tensor

from stochproc._persistence import encode
from stochproc.gp._arch_base import Layer
from stochproc.gp._arch_networks import by_name
from stochproc.kernels import KERNEL_NAMES, as_kernel

__all__ = ["KernelPair", "as_network", "network_parts"]


class KernelPair(torch.nn.Module):
    """A network given by its two kernels.

    Parameters
    ----------
    kernel : Kernel, str, gpytorch.kernels.Kernel or callable
        Covariance K of the untrained outputs; anything that :func:`stochproc.kernels.as_kernel` takes.
    tangent : Kernel, str, gpytorch.kernels.Kernel, callable or None, default=None
        Tangent kernel Th; None where only the last layer will be trained.

    Examples
    --------
    One hidden layer of rectifiers without biases has arc-cosine kernels:

    >>> import torch
    >>> from stochproc.gp import KernelPair
    >>> from stochproc.kernels import ArcCosine, Linear
    >>> net = KernelPair(ArcCosine(1), ArcCosine(1) + ArcCosine(0) * Linear(bias=1e-9))
    >>> net.nngp(torch.ones(3, 2)).shape
    torch.Size([3, 3])
    """

    def __init__(self, kernel: Any, tangent: Any = None) -> None:
        super().__init__()
        self.covariance = as_kernel(kernel)
        self.tangent = None if tangent is None else as_kernel(tangent)

    def config(self) -> dict[str, Any]:
        """Return both kernels as names and numbers; TypeError if one is not of this library."""
        return {"kernel": encode("kernel", self.covariance), "tangent": encode("tangent", self.tangent)}

    def nngp(self, X1: Tensor, X2: "Tensor | None" = None) -> Tensor:
        """Covariance of the outputs, (n, m)."""
        return self.covariance.dense(X1, X2)

    def ntk(self, X1: Tensor, X2: "Tensor | None" = None) -> Tensor:
        """Tangent kernel, (n, m)."""
        if self.tangent is None:
            raise ValueError("a tangent kernel must be given to train all layers; got a covariance alone.")
        return self.tangent.dense(X1, X2)

    def nngp_ntk(self, X1: Tensor, X2: "Tensor | None" = None) -> tuple[Tensor, Tensor]:
        """Both kernels."""
        return self.nngp(X1, X2), self.ntk(X1, X2)

    def diag(self, X: Tensor) -> Tensor:
        """Variances of the outputs, (n,)."""
        return self.covariance.diag(X)


def as_network(net: Any, n_columns: int, *, tangent: bool) -> "Layer | KernelPair":
    """Return a copy of the network that a parameter describes, in float64.

    Raises
    ------
    TypeError
        If it describes none.
    ValueError
        If its name is unknown, a pair has not two entries, or a tangent kernel is wanted and there is none.
    """
    if isinstance(net, str):
        found = by_name(net)
        if found is None and net not in KERNEL_NAMES:
            raise ValueError(
                f"net must be a network, its name such as 'mlp-relu-2' or 'resmlp-relu-3', or kernels; got {net!r}."
            )
        if found is not None:
            net = found
    if isinstance(net, Layer | KernelPair):
        made = copy.deepcopy(net)
    elif isinstance(net, tuple | list):
        if len(net) != 2:
            raise ValueError(f"net must be a pair of kernels (covariance, tangent kernel); got {len(net)} entries.")
        made = KernelPair(*(None if k is None else as_kernel(copy.deepcopy(k), n_columns=n_columns) for k in net))
    elif isinstance(net, str) or callable(net):
        made = KernelPair(as_kernel(copy.deepcopy(net), n_columns=n_columns))
    else:
        raise TypeError(f"net must be a network, its name or kernels; got {type(net).__name__}.")
    if tangent:
        if isinstance(made, Layer):
            made.check_tangent()
        elif made.tangent is None:
            raise ValueError('net must be a pair of kernels to train all layers; with one, use train="readout".')
    return made.double()


def network_parts(net: "Layer | KernelPair") -> Any:
    """Return what :func:`as_network` takes and a file can hold: the network, or its kernels as a list."""
    return net if isinstance(net, Layer) else [net.covariance, net.tangent]
