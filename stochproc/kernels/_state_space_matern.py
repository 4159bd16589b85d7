"""Matern processes in state-space form: closed forms whose every entry is accurate for short and long steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochproc.kernels._state_space import StateSpace

__all__ = ["MaternStateSpace"]

# exp(-2 x) would be subnormal, and polynomials times it inf * 0, beyond; A is then below 1e-149 and Q equal to P.
_X_MAX = 350.0

# Below, 1 - exp(-y) (1 + y + ...) loses digits to cancellation (1e-13 at the switch for five terms).
_SERIES_BELOW = 1.0

_DRIFT = {
    0.5: [[-1.0]],
    1.5: [[0.0, 1.0], [-1.0, -2.0]],
    2.5: [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, -3.0, -3.0]],
}
_P0 = {
    0.5: [[1.0]],
    1.5: [[1.0, 0.0], [0.0, 1.0]],
    2.5: [[1.0, 0.0, -1 / 3], [0.0, 1 / 3, 0.0], [-1 / 3, 0.0, 1.0]],
}
_DENSITY = {0.5: 2.0, 1.5: 4.0, 2.5: 16 / 3}


class MaternStateSpace(StateSpace):
    r"""Matern process of smoothness 1/2, 3/2 or 5/2; the state holds the derivatives :math:`f^{(j)} / \lambda^j`.

    With :math:`\lambda = \sqrt{2\nu}/\ell`, :math:`x = \lambda d`, :math:`y = 2x` and the regularised lower incomplete
    gamma function :math:`P_k(y) = 1 - e^{-y} \sum_{j<k} y^j / j!`, integration by parts leaves one :math:`P_k` and
    polynomials without cancellation:

    - 1/2: :math:`Q = P_1`.
    - 3/2: :math:`Q_{11} = P_3`, :math:`Q_{12} = e^{-y} y^2/2`, :math:`Q_{22} = P_3 + 2 y e^{-y}`.
    - 5/2: :math:`Q_{11} = P_5`, :math:`Q_{12} = e^{-y} y^4/24`, :math:`Q_{23} = e^{-y} y^2 (4-y)^2/24`,
      :math:`Q_{13} = e^{-y} y^3 (2-y)/18 - P_5/3`, :math:`Q_{22} = e^{-y} y^3 (8-y)/36 + P_5/3`,
      :math:`Q_{33} = P_5 + \tfrac23 e^{-y} y (4 - 2y + y^2)`.

    Parameters
    ----------
    lengthscale : Tensor of shape (*batch, 1)
    nu : {0.5, 1.5, 2.5}
    """

    def __init__(self, lengthscale: Tensor, nu: float) -> None:
        self.nu = nu
        self.rate = math.sqrt(2 * nu) / lengthscale
        rate = self.rate.unsqueeze(-1)
        D = len(_DRIFT[nu])
        eye = torch.eye(D, dtype=rate.dtype, device=rate.device)
        super().__init__(
            rate * rate.new_tensor(_DRIFT[nu]),
            eye[:, -1:],
            rate * _DENSITY[nu],
            eye[:1],
            rate.new_tensor(_P0[nu]),
            name=f"Matern(nu={nu})",
        )

    def _step(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        x = (self.rate.to(dt) * dt).clamp(max=_X_MAX)
        y = 2 * x
        a = torch.exp(-x)
        e = a * a
        if self.nu == 0.5:
            return a[..., None, None], lower_gamma(y, 1)[..., None, None]
        if self.nu == 1.5:
            g = lower_gamma(y, 3)
            q12 = y * y * e / 2
            return _matrix([a + x * a, x * a, -x * a, a - x * a]), _matrix([g, q12, q12, g + 2 * y * e])
        g, h, y2e = lower_gamma(y, 5), x * x / 2, y * y * e
        first = [1 + x + h, x + x * x, h]
        second = [-h, 1 + x - x * x, x - h]
        third = [h - x, x * x - 3 * x, 1 - 2 * x + h]
        q12, q23 = y2e * y * y / 24, y2e * (4 - y) ** 2 / 24
        q13, q22 = y2e * y * (2 - y) / 18 - g / 3, y2e * y * (8 - y) / 36 + g / 3
        q33 = g + y * e * (4 - 2 * y + y * y) * (2 / 3)
        A = _matrix([a * p for p in first + second + third])
        return A, _matrix([g, q12, q13, q12, q22, q23, q13, q23, q33])


def _matrix(entries: list[Tensor]) -> Tensor:
    """Return square matrices from their entries, row by row."""
    size = math.isqrt(len(entries))
    return torch.stack(entries, -1).unflatten(-1, (size, size))


class _LowerGamma(torch.autograd.Function):
    """Regularised lower incomplete gamma function of small integer order: its gradient is the gamma density."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: int) -> Tensor:
        ctx.save_for_backward(y)
        ctx.order = order
        if order == 1:
            return -torch.expm1(-y)
        small = y < _SERIES_BELOW
        if not bool(small.any()):
            return _by_closed_form(y, order)
        if bool(small.all()):
            return _by_series(y, order)
        return torch.where(small, _by_series(y.clamp(max=_SERIES_BELOW), order), _by_closed_form(y, order))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return grad * torch.exp(-y) * y ** (ctx.order - 1) / math.factorial(ctx.order - 1), None


def lower_gamma(y: Tensor, order: int) -> Tensor:
    """Return P(order, y) for y >= 0, to a relative 2e-13; ``torch.special.gammainc`` takes several times as long."""
    return _LowerGamma.apply(y, order)


def _by_closed_form(y: Tensor, order: int) -> Tensor:
    total = torch.full_like(y, 1 / math.factorial(order - 1))
    for j in reversed(range(order - 1)):
        total.mul_(y).add_(1 / math.factorial(j))
    return 1 - total.mul_(torch.exp(-y))


def _by_series(y: Tensor, order: int) -> Tensor:
    """Return exp(-y) y^k / k! (1 + y/(k+1) + y^2/((k+1)(k+2)) + ...): no term is negative."""
    # 16 terms: the next is below 3! / 19! = 5e-17 at y = 1.
    total = torch.ones_like(y)
    for j in reversed(range(1, 16)):
        total.mul_(y).mul_(1 / (order + j)).add_(1)
    return total.mul_(y**order).mul_(torch.exp(-y)).mul_(1 / math.factorial(order))
