"""When the matrix of a network may be computed from plain covariances, at a quarter of the time of defects."""

from __future__ import annotations

import torch
from torch import Tensor

from stochproc.gp._arch_activations import Activation
from stochproc.gp._arch_base import DiagState, KernelState, Layer
from stochproc.gp._arch_compose import Branches, Serial
from stochproc.gp._arch_layers import Dense, Identity, LayerNorm, Scale
from stochproc.kernels._pair_plain import PlainPair

__all__ = ["plain_enough"]

# What the network may multiply a rounding by.
_MOST_GROWTH = 100.0

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
    others = {type(layer) for layer in net.modules() if isinstance(layer, Layer)} - {type(a) for a in activations}
    # By type: a convolution is a dense layer too. Angles lose half their digits, and tangent kernels show angles.
    if not others <= _KINDS or any(p.numel() != 1 for p in net.parameters()):
        return False
    if not activations or not all(PlainPair.takes(a.dual, gradient=gradient or tangent) for a in activations):
        return False
    with torch.no_grad():
        q = torch.cat([z.double().square().sum(-1) for z in (x, y)]) / x.shape[-1]
        if not bool((q > 0).all()):
            return False
        points = q.unsqueeze(-1)
        try:
            net.kernel(KernelState(PlainPair(points, points, points), None))  # type: ignore[arg-type]
        except OverflowError:
            return False
        # A layer passes on the errors of those below times the slope of its tangent kernel, and adds its own rounding:
        # the recursion of the tangent kernel.
        state = net.diagonal(DiagState(q, torch.zeros_like(q)))
        return state.ntk is not None and bool((state.ntk <= _MOST_GROWTH * state.q).all())
