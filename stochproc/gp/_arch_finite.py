"""Finite layers in NTK parameterisation: standard normal parameters, scaled in the forward pass; channels come last."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from stochproc.gp._arch_windows import Window

__all__ = [
    "FiniteConv",
    "FiniteDense",
    "FinitePool",
    "FiniteSum",
    "Function",
    "flat_pixels",
    "mean_pixels",
    "root_mean_square",
]


class FiniteDense(torch.nn.Module):
    """w_std / sqrt(n_in) weight x + b_std bias.

    Parameters
    ----------
    weight : Tensor of shape (n_out, n_in)
    bias : Tensor of shape (n_out,) or None
    w_std, b_std : float
    """

    def __init__(self, weight: Tensor, bias: "Tensor | None", w_std: float, b_std: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.bias = None if bias is None else torch.nn.Parameter(bias)
        self.w_std, self.b_std = w_std, b_std

    def _scaled(self) -> "tuple[Tensor, Tensor | None]":
        n_in = self.weight[0].numel()
        return self.weight * (self.w_std / n_in**0.5), None if self.bias is None else self.bias * self.b_std

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate on the last axis."""
        return F.linear(x, *self._scaled())

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.weight.shape))
        return f"{shape}, w_std={self.w_std:.6g}, b_std={self.b_std:.6g}"


class FiniteConv(FiniteDense):
    """Convolution of images (n, height, width, channels) with weights (n_out, n_in, *size); see :class:`FiniteDense`.

    Parameters
    ----------
    weight, bias, w_std, b_std
        As there.
    windows : pair of Window
        What goes into each pixel along both axes.
    """

    def __init__(
        self, weight: Tensor, bias: "Tensor | None", w_std: float, b_std: float, windows: tuple[Window, Window]
    ) -> None:
        super().__init__(weight, bias, w_std, b_std)
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate on images."""
        rows, cols = self.windows
        added = (cols.before, cols.after, rows.before, rows.after)
        x = F.pad(x.movedim(-1, -3), added, mode="circular" if rows.circular else "constant")
        return F.conv2d(x, *self._scaled(), stride=(rows.stride, cols.stride)).movedim(-3, -1)


class FinitePool(torch.nn.Module):
    """Mean over blocks of pixels of images (n, height, width, channels).

    Parameters
    ----------
    size : (int, int)
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate on images."""
        return F.avg_pool2d(x.movedim(-1, -3), self.size).movedim(-3, -1)


class FiniteSum(torch.nn.Module):
    """Sum of branches.

    Parameters
    ----------
    parts : iterable of Module
    """

    def __init__(self, parts: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Add up the branches."""
        first, *rest = self.parts
        out: Tensor = first(x)
        for part in rest:
            out = out + part(x)
        return out


class Function(torch.nn.Module):
    """A function without weights as a module.

    Parameters
    ----------
    function : callable
    name : str
        For ``repr``.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str) -> None:
        super().__init__()
        self.function, self.name = function, name

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the function."""
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


def root_mean_square(x: Tensor, eps: float) -> Tensor:
    """Divide by the root of the mean square of the channels (plus eps)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def flat_pixels(x: Tensor) -> Tensor:
    """Join pixels and channels."""
    return x.flatten(-3)


def mean_pixels(x: Tensor) -> Tensor:
    """Average over pixels."""
    return x.mean((-3, -2))
