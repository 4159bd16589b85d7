"""Dense formulas for what the smoother computes, and data with everything that is awkward about time series."""

import math
from typing import NamedTuple

import torch

from stochproc.kernels import Linear, Matern, StateSpace


class Dense(NamedTuple):
    state_mean: torch.Tensor
    state_cov: torch.Tensor
    mean: torch.Tensor
    cov: torch.Tensor
    log_z: torch.Tensor


def joint_prior(ss, times):
    """Covariances (n, D, n, D) of all pairs of states, by transitions between them."""
    n = len(times)
    rows = []
    for i in range(n):
        A, _ = ss.transition(times[i:] - times[i])
        later = A @ ss.prior(times[i])  # Cov(x_j, x_i) for j >= i
        rows.append(torch.cat([torch.zeros(i, *later.shape[1:]), later]).permute(2, 0, 1))
    upper = torch.stack(rows)  # (n, D, n, D)
    full = upper + upper.permute(2, 3, 0, 1)
    same = torch.arange(n)
    full[same, :, same] /= 2
    return full


def dense_posterior(ss, times, Lam, eta, offset=None, prior=None):
    """Condition the joint normal distribution of all states in one solve."""
    n, D, r = len(times), ss.state_dim, ss.n_outputs
    S = (joint_prior(ss, times) if prior is None else prior).reshape(n * D, n * D)
    H = torch.kron(torch.eye(n), ss.H)
    big = torch.block_diag(*Lam)
    flat = eta.reshape(-1)
    constant = torch.zeros(())
    if offset is not None:
        o = offset.reshape(-1)
        constant = -(flat @ o) - 0.5 * o @ big @ o
        flat = flat + big @ o
    G = H @ S @ H.T
    system = torch.eye(n * r) + G @ big
    mean = S @ H.T @ torch.linalg.solve(system.T, flat)
    cov = S - S @ H.T @ big @ torch.linalg.solve(system, H @ S)
    log_z = 0.5 * flat @ torch.linalg.solve(system, G @ flat) - 0.5 * torch.linalg.slogdet(system)[1] + constant
    cov = cov.reshape(n, D, n, D)
    same = torch.arange(n)
    outputs = torch.einsum("ad,nde,be->nab", ss.H, cov[same, :, same], ss.H)
    mean = mean.reshape(n, D)
    return Dense(mean, cov, mean @ ss.H.T, outputs, log_z)


def dense_gp(K, K_star, prior_variance, y, noise):
    """Posterior mean and variance and log p(y) of a Gaussian process from its covariance matrices."""
    L = torch.linalg.cholesky(K + torch.diag(noise))
    white = torch.linalg.solve_triangular(L, K_star.T, upper=False)
    z = torch.linalg.solve_triangular(L, y[:, None], upper=False)
    log_p = -0.5 * z.square().sum() - L.diagonal().log().sum() - 0.5 * len(y) * math.log(2 * math.pi)
    return (white.T @ z)[:, 0], prior_variance - white.square().sum(0), log_p


def awkward_series(gen, n=200):
    """Times with gaps, ties and steps of 1e-9, values, unequal noise, and which values are missing."""
    times = (torch.rand(n, generator=gen) * 5).sort().values
    times[n // 2 :] += 4.0
    times[20] = times[21]
    times[40:43] = times[40]
    times[50] = times[51] - 1e-9
    y = torch.sin(2 * times) + 0.3 * torch.randn(n, generator=gen)
    noise = 0.02 + 0.3 * torch.rand(n, generator=gen)
    missing = torch.rand(n, generator=gen) < 0.15
    return times, y, noise, missing


def random_messages(gen, *shape, rank=None):
    """Precisions (*shape, r, r) of a given rank, and linear parts in their range."""
    r = shape[-1]
    root = torch.randn(*shape, r if rank is None else rank, generator=gen)
    Lam = root @ root.mT
    return Lam, (Lam @ torch.randn(*shape, 1, generator=gen)).squeeze(-1)


def matern(nu, lengthscale=0.4):
    return Matern(lengthscale=lengthscale, nu=nu)


def state_spaces():
    """Every kind of prior: orders 1 to 3, sums, products, a trend without noise, a known start, several outputs."""
    walk = StateSpace(*(torch.tensor([[v]]) for v in (0.0, 1.0, 0.7, 1.0, 0.0)), t0=-1.0)
    return {
        "Matern 1/2": matern(0.5).state_space(),
        "Matern 3/2": matern(1.5).state_space(),
        "Matern 5/2": matern(2.5).state_space(),
        "sum": (matern(0.5, 0.1) + 2.0 * matern(2.5, 1.5)).state_space(),
        "product": (matern(0.5, 2.0) * matern(1.5)).state_space(),
        "trend": Linear(0.5, 1e-3).state_space(),
        "trend and Matern": (Linear(0.5, 1.0) + matern(1.5)).state_space(),
        "walk from a known point": walk,
        "two functions": StateSpace.stack([matern(1.5).state_space(), matern(0.5, 2.0).state_space()]),
        "many states": StateSpace.stack([matern(2.5, 0.3 + k).state_space() for k in range(3)]),
    }
