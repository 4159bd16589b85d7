"""Infinitely wide networks, composed of layers: their kernels, tangent kernels and finite relatives.

``from stochproc.gp import arch``. Every layer is a network, and a network has ``nngp``, ``ntk``, ``diag`` and ``lazy``.
"""

from typing import TYPE_CHECKING, Any

from stochproc.gp._arch_activations import (
    ABRelu,
    Abs,
    Activation,
    Cos,
    Erf,
    Exp,
    Gelu,
    LeakyRelu,
    Numeric,
    Rbf,
    Relu,
    Sign,
    Sin,
)
from stochproc.gp._arch_base import Layer
from stochproc.gp._arch_compose import Branches, Serial, branches, residual, serial
from stochproc.gp._arch_config import from_config
from stochproc.gp._arch_conv import Conv
from stochproc.gp._arch_image_networks import cnn, wide_resnet
from stochproc.gp._arch_images import AvgPool, Flatten, GlobalAvgPool, Image
from stochproc.gp._arch_kernel import NetworkKernel
from stochproc.gp._arch_layers import Dense, Dropout, Identity, LayerNorm, Scale
from stochproc.gp._arch_networks import ACTIVATION_NAMES, mlp, resmlp
from stochproc.gp._arch_sample import FiniteNetwork, sample_network

if TYPE_CHECKING:
    from stochproc.gp._arch_gpytorch import NNGPKernel, NTKKernel

__all__ = [
    "ACTIVATION_NAMES",
    "ABRelu",
    "Abs",
    "Activation",
    "AvgPool",
    "Branches",
    "Conv",
    "Cos",
    "Dense",
    "Dropout",
    "Erf",
    "Exp",
    "FiniteNetwork",
    "Flatten",
    "Gelu",
    "GlobalAvgPool",
    "Identity",
    "Image",
    "Layer",
    "LayerNorm",
    "LeakyRelu",
    "NNGPKernel",
    "NTKKernel",
    "NetworkKernel",
    "Numeric",
    "Rbf",
    "Relu",
    "Scale",
    "Serial",
    "Sign",
    "Sin",
    "branches",
    "cnn",
    "from_config",
    "mlp",
    "residual",
    "resmlp",
    "sample_network",
    "serial",
    "wide_resnet",
]


def __getattr__(name: str) -> Any:
    # GPyTorch takes seconds to import, and most uses do without.
    if name in ("NNGPKernel", "NTKKernel"):
        from stochproc.gp import _arch_gpytorch

        return getattr(_arch_gpytorch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
