"""When the matrix of a network may be computed from plain covariances, at a quarter of the time of defects."""

from __future__ import annotations

import torch
from torch import Tensor

from stochproc.gp._arch_activations import Activation
from stochproc.gp._arch_base import KernelState, Layer
from stochproc.gp._arch_compose import Branches, Serial
from stochproc.gp._arch_layers import Dense, Identity, LayerNorm, Scale
from stochproc.kernels import PlainPair, Rounding

__all__ = ["plain_enough"]

# Roundings that the result may be wrong by.
_MOST_ROUNDINGS = 300.0

_KINDS = {Serial, Branches, Identity, Dense, Scale, LayerNorm}


def plain_enough(net: Layer, x: Tensor, y: Tensor, *, tangent: bool, gradient: bool) -> bool:
    """Whether the matrices of two sets of points, (n, d) and (m, d), keep 13 digits of their diagonal that way.

    Parameters
    ----------
    net : Layer
    x, y : Tensor of shape (n, d) and (m, d)
    tangent : bool
        Whether the tangent kernel is wanted too.
    gradient : bool
        Whether the matrices will be differentiated.
    """
    if x.ndim != 2 or y.ndim != 2 or x.device.type != "cpu" or not (len(x) and len(y)):
        return False
    activations = [layer for layer in net.modules() if isinstance(layer, Activation)]
    others = {type(layer) for layer in net.modules() if isinstance(layer, Layer) and not isinstance(layer, Activation)}
    # By type: a convolution is a dense layer too.
    if not others <= _KINDS or any(p.numel() != 1 for p in net.parameters()) or not activations:
        return False
    # Angles lose half their digits, and tangent kernels and gradients show angles.
    if not all(a.acts_by_dual and PlainPair.takes(a.dual, gradient=gradient or tangent) for a in activations):
        return False
    with torch.no_grad():
        q = torch.cat([z.double().square().sum(-1) for z in (x, y)]) / x.shape[-1]
        if not bool((q > 0).all()):
            return False
        end = net.kernel(KernelState(Rounding.of_variances(q.unsqueeze(-1)), None)).pair  # type: ignore[arg-type]
        return bool((end.error <= _MOST_ROUNDINGS * end.q).all())  # type: ignore[attr-defined]
