"""Kernels of infinitely wide networks as formulas of KeOps: the same layers, run on symbolic pairs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stochproc.gp._arch_activations import Activation
from stochproc.gp._arch_base import KernelState, Layer
from stochproc.gp._arch_compose import Branches, Serial
from stochproc.gp._arch_layers import Dense, Identity, LayerNorm, Scale
from stochproc.kernels import KeopsPair

__all__ = ["formula_of", "has_formula"]


def has_formula(net: Layer, kind: str) -> bool:
    """Whether a network on vectors is made of dense layers, normalisations, sums and closed-form activations alone."""
    # Without weights the tangent kernel is 0.
    return _layer_has(net) and (kind == "nngp" or any(isinstance(layer, Dense) for layer in net.modules()))


def _layer_has(layer: Layer) -> bool:
    if isinstance(layer, (Serial, Branches)):
        return all(map(_layer_has, layer.parts))
    if isinstance(layer, Activation):
        return type(layer).kernel is Activation.kernel and layer.dual.has_formula
    # By exact type: a subclass may do what symbolic pairs cannot.
    return type(layer) in (Dense, Identity, LayerNorm, Scale) and all(p.numel() == 1 for p in layer.parameters())


def formula_of(net: Layer, kind: str, x: Tensor, y: Tensor) -> Any:
    """Return the matrix of points x (*batch, n, d) and y (*batch, m, d), every pair taken as different points."""
    pair: Any = KeopsPair.from_points(x, y).affine(1 / x.shape[-1], 0.0)
    state = net.kernel(KernelState(pair, pair.zero if kind == "ntk" else None))
    value: Any = state.pair.q if kind == "nngp" else state.ntk
    return value.lazy()
