"""The RBF kernel in state-space form: the best covariance that a linear SDE of given order attains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_integer
from stochproc.kernels._state_space import StateSpace
from stochproc.kernels._state_space_series import series_step

__all__ = ["RBFStateSpace"]

DEFAULT_RBF_ORDER = 6

# By order: couplings of neighbouring states, damping of the last, weights of states 3, 5, .. in the output relative
# to state 1. benchmarks/fit_rbf_state_space.py makes the table.
_TABLE: dict[int, tuple[list[float], float, list[float]]] = {
    2: ([1.254134454], 1.894242485, []),
    3: ([1.038594363, 2.103503914], 3.257768358, []),
    4: ([1.009599033, 1.543899644, 2.97153226], 4.723155396, []),
    5: ([1.123844383, 1.688711984, 2.463023177, 5.080236133], 8.472663551, [0.08270656]),
    6: ([1.109237288, 1.628053031, 2.175087282, 3.117720609, 6.519718238], 10.979520688, [0.073132583]),
    7: (
        [1.144841309, 1.667399401, 2.161250489, 2.807832633, 4.054888533, 8.632298095],
        14.665601539,
        [0.094355901, 0.008130393],
    ),
    8: (
        [1.136780548, 1.643517789, 2.089920798, 2.588387859, 3.3178583, 4.798508916, 10.277407159],
        17.5135333,
        [0.089679131, 0.006994592],
    ),
}

# A is below 1e-85 there (the slowest speed of order 2 is 0.95, of all others more), Q is P to rounding.
_X_MAX = 200.0


class RBFStateSpace(StateSpace):
    r"""Approximate RBF process, in states that are independent with variance one at any time.

    As P0 = I, the drift is skew-symmetric but for damping where the noise enters, and it can be rotated to
    tridiagonal form: a chain of coupled states, of which the exact kernel (couplings :math:`\sqrt j`, states
    Hermite functions of the derivatives) is the infinite case. Couplings, damping and output were chosen
    to minimise the largest error of the covariance over all lags:

    ====== ======= ====================================
    order  error   truncated exponential series [1]_
    ====== ======= ====================================
    2      2.8e-02 1.4e-01
    3      6.4e-03 4.5e-02
    4      1.7e-03 1.7e-02
    5      6.2e-05 7.0e-03
    6      9.0e-06 3.0e-03
    7      6.9e-07 1.3e-03
    8      1.2e-07 6.0e-04
    ====== ======= ====================================

    f has one mean-square derivative for order 2, at least two from order 3 on.

    Parameters
    ----------
    lengthscale : Tensor of shape (*batch, 1)
    order : int, default=None
        Size of the state, 2 to 8; None means 6.

    References
    ----------
    .. [1] J. Hartikainen and S. Särkkä, "Kalman filtering and smoothing solutions to temporal Gaussian process
       regression models", MLSP 2010.
    """

    def __init__(self, lengthscale: Tensor, order: int | None = None) -> None:
        order = DEFAULT_RBF_ORDER if order is None else order
        check_integer("order", order, min(_TABLE), max(_TABLE))
        couplings, damping, outputs = _TABLE[order]
        self.rate = 1 / lengthscale
        c = lengthscale.new_tensor(couplings)
        self._drift = torch.diag(c, 1) - torch.diag(c, -1)
        self._drift[-1, -1] = -damping
        h = lengthscale.new_zeros(order)
        h[0] = 1.0
        h[2 : 2 + 2 * len(outputs) : 2] = lengthscale.new_tensor(outputs)
        last = torch.eye(order, dtype=h.dtype, device=h.device)[:, -1:]
        self._noise = 2 * damping * last @ last.mT
        rate = self.rate.unsqueeze(-1)
        super().__init__(
            rate * self._drift,
            last,
            rate * (2 * damping),
            (h / h.norm()).unsqueeze(0),
            torch.eye(order, dtype=h.dtype, device=h.device),
            name="RBF",
        )

    def _step(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        x = (self.rate.to(dt) * dt).clamp(max=_X_MAX)
        return _ConstantStep.apply(x, self._drift.to(dt), self._noise.to(dt))


class _ConstantStep(torch.autograd.Function):
    """Transitions of an SDE with constant matrices; the gradient in the steps needs none of the doublings."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, F: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        A, Q = series_step(F, noise, x)
        ctx.save_for_backward(A, Q, F, noise)
        return A, Q

    @staticmethod
    def backward(ctx: Any, grad_A: Tensor, grad_Q: Tensor) -> tuple[Tensor, None, None]:
        # dA/dx = F A, dQ/dx = F Q + Q F' + N.
        A, Q, F, noise = ctx.saved_tensors
        FQ = F @ Q
        return (grad_A * (F @ A) + grad_Q * (FQ + FQ.mT + noise)).sum((-2, -1)), None, None
