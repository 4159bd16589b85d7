"""Networks as kernels of estimators: by name, such as "mlp-relu-4", and the ranges of their searches."""

from __future__ import annotations

from typing import Any

import torch

from stochproc.gp._arch_base import Layer
from stochproc.gp._arch_kernel import NetworkKernel
from stochproc.gp._arch_networks import by_name

__all__ = ["kernel_of_network", "network_ranges"]

# Outside these a network of some layers is constant or linear, or its variances overflow.
_RANGES = {"log_w_std": (0.1, 10.0), "log_b_std": (1e-3, 10.0)}


def kernel_of_network(kernel: Any, n_columns: int) -> NetworkKernel | None:
    """Return the covariance of a network or of its name, or None if ``kernel`` is neither.

    A name has one lengthscale a column, of 1: standardised columns then have inner products of about 1.
    """
    if isinstance(kernel, Layer):
        return NetworkKernel(kernel)
    net = by_name(kernel) if isinstance(kernel, str) else None
    return None if net is None else NetworkKernel(net, lengthscale=torch.ones(n_columns, dtype=torch.float64))


def network_ranges(kernel: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """Return the ranges in which standard deviations of weights and biases are searched, by name."""
    last = {name: name.rsplit(".", 1)[-1] for name, _ in kernel.named_parameters()}
    return {name: _RANGES[end] for name, end in last.items() if end in _RANGES}
