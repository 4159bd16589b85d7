"""Slow, obvious formulas for functional decompositions."""

import itertools
import math

import numpy as np
import torch

from stochproc.kernels import Matern
from stochproc.tensor._packed import pack
from stochproc.tensor._priors import DiscretePrior, MarkovPrior


def random_messages(n, rank, gen, scale=1.0):
    """Precisions of full rank, packed, and linear parts."""
    root = scale * torch.randn(n, rank, rank + 1, generator=gen)
    return pack(root @ root.mT), torch.randn(n, rank, generator=gen)


def dense_posterior(prior_cov, Lam, eta, at):
    """Condition functions with covariance (m, r, m, r) at all points on messages at the first n; moments at ``at``.

    Also log Z, all by dense matrices.
    """
    m, r = prior_cov.shape[:2]
    n = len(eta)
    K = prior_cov.reshape(m * r, m * r)
    big = torch.zeros(m * r, m * r)
    for i in range(n):
        big[i * r : (i + 1) * r, i * r : (i + 1) * r] = Lam[i]
    linear = torch.zeros(m * r)
    linear[: n * r] = eta.flatten()
    inner = torch.eye(m * r) + big @ K
    cov = K @ torch.linalg.inv(inner)
    mean = cov @ linear
    log_z = 0.5 * linear @ mean - 0.5 * torch.linalg.slogdet(inner)[1]
    return mean.reshape(m, r)[at], cov.reshape(m, r, m, r)[at][:, :, at], log_z


def prior_covariance(prior, points):
    """Covariance (m, r, m, r) of the functions of a mode at points."""
    m, r = len(points), prior.rank
    out = torch.zeros(m, r, m, r)
    for j in range(r):
        if isinstance(prior, DiscretePrior):
            K = prior.variance[j] * (points[:, None] == points)
        else:
            part = prior.parts[0 if prior.shared else j]
            K = prior.variance[j] * part.kernel(points[:, None], points[:, None])
        out[:, j, :, j] = K.detach()
    return out


def brute_force_regressors(core_mean, core_second, k, means, seconds):
    """E z and E z z' of one row by sums over all index tuples; core_second is (R_1, .., R_K, R_1, .., R_K)."""
    ranks = core_mean.shape
    first = torch.zeros(ranks[k])
    second = torch.zeros(ranks[k], ranks[k])
    tuples = list(itertools.product(*(range(r) for r in ranks)))
    for p in tuples:
        term = core_mean[p]
        for j in range(len(ranks)):
            if j != k:
                term = term * means[j][p[j]]
        first[p[k]] += term
        for q in tuples:
            term = core_second[p + q]
            for j in range(len(ranks)):
                if j != k:
                    term = term * seconds[j][p[j], q[j]]
            second[p[k], q[k]] += term
    return first, second


def markov(lengthscale=0.4, nu=1.5, variance=(0.5, 1.0), shared=True):
    return MarkovPrior(Matern(lengthscale, nu=nu).double(), torch.tensor(list(variance)), shared=shared, method="auto")


def smooth_products(rank, seed, n=600, noise=0.05):
    """Sums of products of two smooth functions each, of unit variance, with noise; and the truth on a grid."""
    rng = np.random.default_rng(seed)
    phases, sizes = rng.uniform(0, 2 * math.pi, (rank, 2, 6)), rng.normal(size=(rank, 2, 6)) / (1 + np.arange(6))

    def f(X):
        waves = np.cos(math.pi * np.arange(6) * X[:, None, :, None] + phases) * sizes
        functions = waves.sum(-1)
        return functions.prod(-1).sum(-1)

    grid = rng.uniform(0, 1, (2000, 2))
    unit, X = f(grid).std(), rng.uniform(0, 1, (n, 2))
    return X, f(X) / unit + noise * rng.normal(size=n), grid, f(grid) / unit
