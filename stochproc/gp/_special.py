"""Combinations of the logarithms of gamma functions that keep their digits for large arguments."""

import math

import torch
from torch import Tensor

__all__ = ["log1p_ratio", "log_gamma_defect", "log_gamma_ratio"]

# From here on Stirling's series with the terms below is exact to rounding: the first one left out is 0.18 /
# 20^15.
STIRLING_FROM = 20.0
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)


def _stirling_rest(x: Tensor) -> Tensor:
    """lgamma(x) less (x - 1/2) log x - x + log(2 pi)/2, for x >= 20."""
    inverse, total = 1 / x, torch.zeros_like(x)
    for k, coefficient in enumerate(STIRLING):
        total = total + coefficient * inverse ** (2 * k + 1)
    return total


def log_gamma_defect(a: Tensor) -> Tensor:
    """Return a log a - a - lgamma(a), without cancellation for large a."""
    if a.item() < STIRLING_FROM:
        return a * a.log() - a - torch.lgamma(a)
    return (a / (2 * math.pi)).log() / 2 - _stirling_rest(a)


def log_gamma_ratio(a: Tensor, half: float) -> Tensor:
    """lgamma(a + half) - lgamma(a) - half log a, without cancellation for large a."""
    if a.item() < STIRLING_FROM:
        return torch.lgamma(a + half) - torch.lgamma(a) - half * a.log()
    rest = _stirling_rest(a + half) - _stirling_rest(a)
    return (a + half - 0.5) * torch.log1p(half / a) - half + rest


def log1p_ratio(x: Tensor, log_y: Tensor) -> Tensor:
    """log(1 + x/y) for x >= 0, also where x/y is beyond 1e308; every branch stays finite for autograd."""
    large = x.detach().log() - log_y.detach() > 50
    small = torch.where(large, torch.zeros_like(x), x) * (-log_y).exp()
    huge = torch.where(large, x, torch.ones_like(x)).log() - log_y
    return torch.where(large, huge, torch.log1p(small))
