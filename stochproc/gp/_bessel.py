r"""The modified Bessel function K of real order in the log domain, for any order and argument.

What is computed is the *defect* :math:`D_\nu(x) = \log K_\nu(x) - \nu \tau + r` with
:math:`r = \sqrt{\nu^2 + x^2}` and :math:`\tau = \operatorname{asinh}(\nu/x)`: what is left of log K once the
exponent of its saddle point, which can be of order 1e6 where the rest is of order 10, has been taken off.
"""

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

__all__ = ["log_bessel_defect"]

# From this r on the uniform series with the terms below is exact to rounding (measured: 1.1e-16 at 25).
SERIES_FROM = 25.0
SERIES_TERMS = 16
ORDER_NODES = 2049


def log_bessel_defect(order: Tensor, log_x: Tensor) -> Tensor:
    r"""Return D above, differentiable in both arguments.

    Parameters
    ----------
    order : Tensor
        Real order, float64.
    log_x : Tensor
        Logarithm of the argument, float64, between -300 and 700.

    Notes
    -----
    For r >= 25 Debye's uniform expansion, written in 1/r and :math:`(\nu/r)^2` so that it holds for any ratio of
    order and argument [1]_. Below, ``scipy.special.kve``, or its limit :math:`\Gamma(\nu) (2/x)^\nu / 2` where
    that overflows.

    References
    ----------
    .. [1] NIST Digital Library of Mathematical Functions, 10.41(ii).
    """
    order, log_x = torch.broadcast_tensors(order.abs(), log_x)
    far = torch.hypot(order.detach(), log_x.detach().exp()) >= SERIES_FROM
    if bool(far.all()):
        return _series(order, log_x)
    if not bool(far.any()):
        return _Direct.apply(order, log_x)
    # Each branch sees arguments of its own range only, so that neither makes a NaN in the other's gradient.
    one, zero = torch.ones_like(order), torch.zeros_like(log_x)
    series = _series(torch.where(far, order, 100 * one), torch.where(far, log_x, zero))
    direct = _Direct.apply(torch.where(far, one, order), torch.where(far, zero, log_x))
    return torch.where(far, series, direct)


def _series(order: Tensor, log_x: Tensor) -> Tensor:
    r = torch.hypot(order, log_x.exp())
    q = (order / r).square()
    exponents = torch.arange(SERIES_TERMS + 1, dtype=r.dtype, device=r.device)
    terms = (q[..., None] ** exponents) @ torch.as_tensor(_debye(), dtype=r.dtype, device=r.device).mT
    total = (terms * r[..., None] ** -exponents).sum(-1)
    return (math.log(math.pi / 2) - r.log()) / 2 + total.log()


@functools.cache
def _debye() -> np.ndarray:
    """Coefficients of (-1)^k V_k(q), a row each, where U_k(t) = t^k V_k(t²) are Debye's polynomials (DLMF 10.41.9)."""
    row = [Fraction(1)]
    table = np.zeros((SERIES_TERMS + 1, SERIES_TERMS + 1))
    for k in range(SERIES_TERMS + 1):
        table[k, : k + 1] = [float((-1) ** k * c) for c in row]
        new = [Fraction(0)] * (k + 2)
        for j, c in enumerate(row):
            n = k + 2 * j
            new[j] += c * (Fraction(n, 2) + Fraction(1, 8 * (n + 1)))
            new[j + 1] -= c * (Fraction(n, 2) + Fraction(5, 8 * (n + 3)))
        row = new
    return table


class _Direct(torch.autograd.Function):
    """D from scipy for r < 25 and order >= 0."""

    @staticmethod
    def forward(ctx: Any, order: Tensor, log_x: Tensor) -> Tensor:
        ctx.save_for_backward(order, log_x)
        nu, log_argument = _flat(order), _flat(log_x)
        x = np.exp(log_argument)
        value = _log_kve(nu, log_argument) - x - nu * np.arcsinh(nu / x) + np.hypot(nu, x)
        return torch.as_tensor(value, dtype=order.dtype, device=order.device).reshape(order.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        order, log_x = ctx.saved_tensors
        nu, log_argument = _flat(order), _flat(log_x)
        x = np.exp(log_argument)
        g_order = g_log_x = None
        if ctx.needs_input_grad[0]:
            slope = _order_slope(nu, log_argument) - np.arcsinh(nu / x)
            g_order = grad * torch.as_tensor(slope, dtype=grad.dtype, device=grad.device).reshape(grad.shape)
        if ctx.needs_input_grad[1]:
            # x K'/K with K' = -(K_(nu-1) + K_(nu+1))/2: a sum of numbers of one sign.
            middle = _log_kve(nu, log_argument)
            both = np.logaddexp(_log_kve(np.abs(nu - 1), log_argument), _log_kve(nu + 1, log_argument))
            slope = np.hypot(nu, x) - np.exp(log_argument + both - middle) / 2
            g_log_x = grad * torch.as_tensor(slope, dtype=grad.dtype, device=grad.device).reshape(grad.shape)
        return g_order, g_log_x


def _flat(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy().reshape(-1)


def _log_kve(nu: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """log(exp(x) K_nu(x)) for r up to about 26."""
    scaled = special.kve(nu, np.exp(log_x))
    # An overflow means x < 1e-9, where the leading term is exact to rounding.
    leading = special.gammaln(np.maximum(nu, 1.0)) + nu * (math.log(2) - log_x) - math.log(2)
    return np.where(np.isfinite(scaled), np.log(np.where(np.isfinite(scaled), scaled, 1.0)), leading)


def _order_slope(nu: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """Slope of log K_nu(x) in nu, by the trapezoid rule in K_nu(x) = int_0^inf exp(-x cosh t) cosh(nu t) dt."""
    x = np.exp(log_x)[..., None]
    order = nu[..., None]
    end = np.arcsinh((100 + 10 * order) / x)
    t = end * np.linspace(0, 1, ORDER_NODES)
    log_terms = order * t - x * np.cosh(t)
    log_terms -= log_terms.max(-1, keepdims=True)
    weights = np.exp(log_terms) * (1 + np.exp(-2 * order * t)) / 2
    weights[..., 0] /= 2
    return (weights * t * np.tanh(order * t)).sum(-1) / weights.sum(-1)
