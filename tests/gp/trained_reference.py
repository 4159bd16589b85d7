"""Slow references for trained networks: kernels of two hidden layers, and gradient flow integrated step by step."""

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp

from stochproc.gp import KernelPair
from stochproc.kernels import Pair, duals

WEIGHT, BIAS = 1.5, 0.1


def kernels(x, y):
    """NNGP and NTK of two hidden layers of rectifiers, layer by layer."""
    pair = Pair.from_points(x / math.sqrt(x.shape[-1]), y / math.sqrt(y.shape[-1])).affine(WEIGHT, BIAS)
    tangent = pair.q
    for _ in range(2):
        tangent = tangent * duals.Relu().derivative(pair)
        pair = duals.Relu()(pair).affine(WEIGHT, BIAS)
        tangent = WEIGHT * tangent + pair.q
    return pair.q, tangent


def covariance(x, y):
    return kernels(x, y)[0]


def tangent(x, y):
    return kernels(x, y)[1]


NET = KernelPair(covariance, tangent)


def integrated(X, y, X_new, *, scale, learning_rate, time, ridge=0.0, readout=False):
    """Mean and covariance at X_new of linearised networks of one scale, their parameters integrated in time.

    With parameters theta_0 + sqrt(s) J^T a the outputs are f_0 + s Th a, and the gradient of
    |f - y|^2/2 + ridge s |theta - theta_0|^2/2 is sqrt(s) J^T (f - y + ridge s a).
    """
    Z = torch.cat([X, X_new])
    K, Th = kernels(Z, Z)
    Th = K if readout else Th
    n = len(X)
    tangents = scale * Th[:, :n].numpy()
    # a is linear in (f_0(X), 1): its coefficients are the state.
    start = np.concatenate([np.eye(n), -y.numpy()[:, None]], 1)

    def slope(_, state):
        a = state.reshape(n, n + 1)
        return (-learning_rate * (tangents[:n] @ a + start + ridge * scale * a)).ravel()

    end = solve_ivp(slope, (0, time), np.zeros(n * (n + 1)), method="DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
    moved = torch.tensor(tangents[n:] @ end.reshape(n, n + 1))
    depends = torch.cat([moved[:, :n], torch.eye(len(X_new))], 1)
    return moved[:, n], scale * depends @ K @ depends.mT
