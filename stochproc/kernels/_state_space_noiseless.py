"""Processes without noise in state-space form: the linear trend, and the periodic kernel as a Fourier series."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_integer
from stochproc.exceptions import NumericalWarning
from stochproc.kernels._state_space import StateSpace

__all__ = ["LinearStateSpace", "PeriodicStateSpace", "scaled_bessel"]

DEFAULT_PERIODIC_ORDER = 7

# scipy's ive gives NaN from about 1e10. No truncated series is of use long before that.
_ARGUMENT_MAX = 1e8

# Share of the variance that may be missing before a warning.
_MISSING_MAX = 0.01


class LinearStateSpace(StateSpace):
    """The line a + b t of the linear kernel, with independent intercept and slope: state (f, f'), from t = 0.

    Parameters
    ----------
    variance, bias : Tensor of shape (*batch, 1)
        Prior variances of slope and intercept.
    """

    def __init__(self, variance: Tensor, bias: Tensor) -> None:
        zero = variance.new_zeros(2, 1)
        super().__init__(
            variance.new_tensor([[0.0, 1.0], [0.0, 0.0]]),
            zero,
            zero[:1],
            variance.new_tensor([[1.0, 0.0]]),
            torch.diag_embed(torch.cat([bias, variance], -1)),
            t0=0.0,
            name="Linear",
        )

    noiseless = True  # type: ignore[assignment]

    def _step(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        one, zero = torch.ones_like(dt), torch.zeros_like(dt)
        A = torch.stack([one, dt, zero, one], -1).unflatten(-1, (2, 2))
        return A, torch.zeros_like(A)


class PeriodicStateSpace(StateSpace):
    r"""Truncated Fourier series of the periodic kernel: a constant and ``order`` undamped oscillators.

    With :math:`z = 1/\ell^2`,
    :math:`e^{z(\cos\theta - 1)} = e^{-z} I_0(z) + 2 \sum_{j\ge1} e^{-z} I_j(z) \cos j\theta`.
    The series is cut, not rescaled. All its terms are positive, so the largest error is that of the variance.

    Parameters
    ----------
    lengthscale, period : Tensor of shape (*batch, 1)
    order : int, default=None
        Number J of harmonics, 1 to 1000; None means 7. The state has 2 J + 1 entries.
    """

    noiseless = True  # type: ignore[assignment]

    def __init__(self, lengthscale: Tensor, period: Tensor, order: int | None = None) -> None:
        order = DEFAULT_PERIODIC_ORDER if order is None else order
        check_integer("order", order, 1, 1000)
        self.order, self.period = order, period
        z = (lengthscale**-2).clamp(max=_ARGUMENT_MAX)
        weights = scaled_bessel(z, order) * torch.tensor([1.0] + [2.0] * order).to(z)
        missing = 1 - weights.detach().sum(-1).min().item()
        if missing > _MISSING_MAX:
            warnings.warn(
                f"the Fourier series of order {order} leaves out {missing:.2g} of the variance of the periodic kernel, "
                "whose lengthscale is too short for it; ask for a higher order, state_space(order=...).",
                NumericalWarning,
                stacklevel=3,
            )
        D = 2 * order + 1
        # Where the harmonics stand in a flattened D x D matrix: both entries of the diagonal, both off it.
        j = torch.arange(1, D, 2, device=z.device)
        self._cos = torch.cat([j * D + j, (j + 1) * D + j + 1])
        self._sin = torch.cat([(j + 1) * D + j, j * D + j + 1])
        speed = 2 * math.pi / period * torch.arange(1, order + 1).to(z)
        F = z.new_zeros(*speed.shape[:-1], D * D).index_copy(-1, self._sin, torch.cat([speed, -speed], -1))
        H = z.new_zeros(1, D)
        H[0, 0] = 1.0
        H[0, 1::2] = 1.0
        zero = z.new_zeros(D, 1)
        super().__init__(
            F.unflatten(-1, (D, D)),
            zero,
            zero[:1],
            H,
            torch.diag_embed(torch.cat([weights[..., :1], weights[..., 1:].repeat_interleave(2, -1)], -1)),
            name="Periodic",
        )

    def _step(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        period = self.period.to(dt)
        D = self.state_dim
        # Whole periods are taken off exactly; their number still counts in the gradient of the period.
        angle = 2 * math.pi / period * torch.remainder(dt, period)
        angles = angle.unsqueeze(-1) * torch.arange(1, self.order + 1).to(dt)
        cos, sin = angles.cos(), angles.sin()
        A = dt.new_zeros(*angles.shape[:-1], D * D)
        A[..., 0] = 1.0
        A = A.index_copy(-1, self._cos.to(dt.device), torch.cat([cos, cos], -1))
        A = A.index_copy(-1, self._sin.to(dt.device), torch.cat([sin, -sin], -1)).unflatten(-1, (D, D))
        return A, torch.zeros_like(A)


class _ScaledBessel(torch.autograd.Function):
    """exp(-z) I_j(z) for j = 0..order, by scipy, on the CPU."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, order: int) -> Tensor:
        from scipy.special import ive

        orders = torch.arange(order + 2)
        values = torch.as_tensor(ive(orders.numpy(), z.detach().cpu().double().numpy())).to(z)
        ctx.save_for_backward(values)
        return values[..., :-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        # I_j' = (I_{j-1} + I_{j+1}) / 2 with I_{-1} = I_1, and the factor exp(-z).
        below = torch.cat([values[..., 1:2], values[..., :-2]], -1)
        slope = (below + values[..., 1:]) / 2 - values[..., :-1]
        return (grad * slope).sum(-1, keepdim=True), None


def scaled_bessel(z: Tensor, order: int) -> Tensor:
    """Return exp(-z) I_j(z) for j = 0..order, shape (*batch, order + 1), from z of shape (*batch, 1), z >= 0."""
    return _ScaledBessel.apply(z, order)
