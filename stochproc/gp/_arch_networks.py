"""Ready-made fully connected networks, and their names."""

from __future__ import annotations

import math
import re

from stochproc._checks import check_integer
from stochproc.exceptions import ArchitectureError
from stochproc.gp import _arch_activations as activations
from stochproc.gp._arch_base import Layer
from stochproc.gp._arch_compose import Serial, residual
from stochproc.gp._arch_layers import Dense

__all__ = ["ACTIVATION_NAMES", "by_name", "mlp", "resmlp"]

_BY_NAME: dict[str, type[Layer]] = {
    "abs": activations.Abs,
    "cos": activations.Cos,
    "erf": activations.Erf,
    "exp": activations.Exp,
    "gelu": activations.Gelu,
    "leakyrelu": activations.LeakyRelu,
    "rbf": activations.Rbf,
    "relu": activations.Relu,
    "sign": activations.Sign,
    "sin": activations.Sin,
}

#: Names of activations that :func:`mlp` and the estimators take.
ACTIVATION_NAMES: tuple[str, ...] = tuple(_BY_NAME)

_NAME = re.compile(r"(?P<kind>mlp|resmlp)(?:-(?P<activation>[a-z]+))?-(?P<depth>[0-9]+)")

# He initialisation keeps the variance of rectifiers through the layers; a small bias makes the kernel universal.
_W_STD, _B_STD = math.sqrt(2), 0.2


def _activation(activation: str | Layer) -> Layer:
    if isinstance(activation, Layer):
        return activation
    if not isinstance(activation, str):
        made = " It is a class: make an object of it." if isinstance(activation, type) else ""
        raise TypeError(f"activation must be a name or a layer; got {type(activation).__name__}.{made}")
    if activation not in _BY_NAME:
        valid = ", ".join(ACTIVATION_NAMES)
        raise ArchitectureError(f"unknown activation {activation!r}; valid: {valid}, or a layer.")
    return _BY_NAME[activation]()


def mlp(
    depth: int,
    activation: str | Layer = "relu",
    *,
    w_std: float | int = _W_STD,
    b_std: float | int = _B_STD,
    w_last: float | int = 1.0,
    tie: bool = True,
) -> Serial:
    """Multilayer perceptron: ``depth`` times (Dense, activation), and a last Dense without bias.

    Parameters
    ----------
    depth : int
        Number of hidden layers, at least 1.
    activation : str or Layer, default="relu"
        "abs", "cos", "erf", "exp", "gelu", "leakyrelu", "rbf", "relu", "sign", "sin", or a layer.
    w_std, b_std : float, default=sqrt(2), 0.2
        Standard deviations of weights and biases of the hidden layers.
    w_last : float, default=1.0
        Standard deviation of the weights of the last layer.
    tie : bool, default=True
        Whether the hidden layers share one w_std and one b_std; else each learns its own.

    Returns
    -------
    Serial

    Raises
    ------
    ArchitectureError
        If the name of the activation is unknown.
    TypeError, ValueError
        If depth is no integer or below 1, the activation neither name nor layer, or a standard deviation out of range.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import arch
    >>> K, T = arch.mlp(3).nngp_ntk(torch.eye(2))
    >>> K.shape, bool((T > K).all())
    (torch.Size([2, 2]), True)
    """
    check_integer("depth", depth, 1)
    between = _activation(activation)
    hidden = [Dense(w_std, b_std) for _ in range(1 if tie else depth)] * (depth if tie else 1)
    layers = [layer for dense in hidden for layer in (dense, between)]
    return Serial([*layers, Dense(w_last)])


def resmlp(
    depth: int,
    activation: str | Layer = "relu",
    *,
    w_std: float | int = _W_STD,
    b_std: float | int = _B_STD,
    w_last: float | int = 1.0,
    tie: bool = True,
) -> Serial:
    """Residual perceptron: Dense, ``depth`` blocks x + Dense(activation(x)), activation, Dense without bias.

    Parameters
    ----------
    depth : int
        Number of blocks, at least 1.
    activation, w_std, b_std, w_last, tie
        As in :func:`mlp`; the first Dense has the same standard deviations as those of the blocks.

    Returns
    -------
    Serial

    Raises
    ------
    ArchitectureError, TypeError, ValueError
        As in :func:`mlp`.
    """
    check_integer("depth", depth, 1)
    between = _activation(activation)
    dense = [Dense(w_std, b_std) for _ in range(1 if tie else depth + 1)] * (depth + 1 if tie else 1)
    blocks = [residual(between, d) for d in dense[1:]]
    return Serial([dense[0], *blocks, between, Dense(w_last)])


def by_name(name: str) -> Serial | None:
    """Return the network of a name such as "mlp-relu-4" or "resmlp-4", or None if it is no name of a network.

    Raises
    ------
    ArchitectureError
        If the name is of this form but the activation unknown.
    ValueError
        If the depth is 0.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    make = mlp if found["kind"] == "mlp" else resmlp
    return make(int(found["depth"]), found["activation"] or "relu")
