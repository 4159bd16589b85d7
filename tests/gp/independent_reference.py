"""Slow references for noise outside the scale: dense Gaussian laws over a fine grid of scales, and 30 digits."""

import functools
import math

import mpmath as mp
import torch

from stochproc.gp import IndependentNoiseGP
from stochproc.kernels import RBF


def data(n=8, n_outputs=None, seed=0, size=1.0, d=2):
    """Inputs and targets; a small ``size`` leaves noise alone."""
    gen = torch.Generator().manual_seed(seed)
    X = torch.rand(n, d, generator=gen) * 3
    shape = (n,) if n_outputs is None else (n, n_outputs)
    signal = 0.5 + torch.sin(2 * X.sum(1)).reshape(-1, *[1] * (len(shape) - 1))
    return X, size * signal + 0.3 * torch.randn(shape, generator=gen)


def model(prior="inverse_gamma", *, n_outputs=1, noise=0.1, mean="constant", lengthscale=(0.8, 1.7)):
    gp = IndependentNoiseGP(RBF(list(lengthscale)), prior, noise=noise, mean=mean, n_outputs=n_outputs)
    if mean == "constant":
        with torch.no_grad():
            gp.constant_mean += torch.linspace(0.3, 0.6, n_outputs)
    return gp


class Brute:
    """Everything about one data set by dense Gaussian laws at equally spaced log s, many more than needed."""

    def __init__(self, gp, X, y, low=-170.0, high=60.0, n_nodes=9_000):
        self.gp, self.X, self.y = gp, X, y.reshape(len(X), -1)
        self.mean = 0.0 if gp.constant_mean is None else gp.constant_mean.detach()
        self.noise = gp.noise.item()
        self.K = gp.kernel(X, X).detach()
        self.u = torch.linspace(low, high, n_nodes)
        total = self.u.exp()[:, None, None] * self.K + self.noise * torch.eye(len(X))
        self.factor = torch.linalg.cholesky(total)
        residual = (self.y - self.mean).expand(n_nodes, *self.y.shape)
        white = torch.linalg.solve_triangular(self.factor, residual, upper=False)
        self.alpha = torch.linalg.solve_triangular(self.factor.mT, white, upper=True)
        n_outputs = self.y.shape[1]
        logdet = 2 * self.factor.diagonal(dim1=1, dim2=2).log().sum(1)
        ll = -(white.square().sum((1, 2)) + n_outputs * (logdet + len(X) * math.log(2 * math.pi))) / 2
        with torch.no_grad():
            terms = gp.scale_prior._log_prob_u(self.u) + ll + math.log((high - low) / (n_nodes - 1))
        self.log_evidence = torch.logsumexp(terms, 0).item()
        self.weights = (terms - self.log_evidence).exp()

    def at(self, X_new):
        """Means (J, m, C) and latent covariances (J, m, m) at each node."""
        s = self.u.exp()[:, None, None]
        cross = self.gp.kernel(X_new, self.X).detach()
        white = torch.linalg.solve_triangular(self.factor, cross.mT.expand(len(s), *cross.mT.shape), upper=False)
        return self.mean + s * cross @ self.alpha, s * self.gp.kernel(X_new, X_new).detach() - s**2 * white.mT @ white

    def moments(self, X_new):
        """Mean (m, C) and latent covariance (m, m, C), the scale averaged over."""
        means, covariances = self.at(X_new)
        mean = torch.einsum("j,jmc->mc", self.weights, means)
        spread = means - mean
        inner = torch.einsum("j,jab->ab", self.weights, covariances)
        return mean, inner[..., None] + torch.einsum("j,jac,jbc->abc", self.weights, spread, spread)

    def tails(self, X_new, z, noise):
        """Lower and upper tail of each entry (m, C) at z."""
        means, covariances = self.at(X_new)
        sigma = (covariances.diagonal(dim1=1, dim2=2) + noise).sqrt()[..., None]
        x = (z.reshape(means.shape[1:]) - means) / sigma
        return tuple(
            torch.einsum("j,jmc->mc", self.weights, torch.special.erfc(-sign * x / math.sqrt(2)) / 2)
            for sign in (1, -1)
        )


@functools.cache
def log_evidence_mp(density, values, squares, noise, n_outputs=1):
    """log of the integral over log s of p(s) p(y | s), 30 digits: the trapezoid rule with a step of 1/16.

    The integrand is analytic for an imaginary part of u below pi, so that its error is exp(-2 pi² 16).
    """
    with mp.workdps(30):
        # The floats as they are.
        values, squares, noise = [mp.mpf(v) for v in values], [mp.mpf(v) for v in squares], mp.mpf(noise)

        def target(u):
            s = mp.exp(u)
            terms = [
                n_outputs * mp.log(2 * mp.pi * (s * v + noise)) + r / (s * v + noise)
                for v, r in zip(values, squares, strict=True)
            ]
            return density(u) - mp.fsum(terms) / 2

        coarse = [(target(mp.mpf(k)), k) for k in range(-320, 120)]
        top = max(coarse)[0]
        inside = [k for value, k in coarse if value > top - 75]
        grid = range(16 * (inside[0] - 1), 16 * (inside[-1] + 1) + 1)
        return mp.log(mp.fsum(mp.exp(target(mp.mpf(k) / 16) - top) for k in grid) / 16) + top


def rotated_mp(gp, X, y):
    """Eigenvalues and squared rotated residuals by a 40-digit decomposition, as tuples."""
    with mp.workdps(40):
        K = mp.matrix(gp.kernel(X, X).detach().tolist())
        values, vectors = mp.eigsy(K)
        constant = [0.0] * gp.n_outputs if gp.constant_mean is None else gp.constant_mean.tolist()
        columns = y.reshape(len(X), -1)
        squares = [mp.mpf(0)] * len(X)
        for c in range(columns.shape[1]):
            residual = mp.matrix([mp.mpf(v) - mp.mpf(constant[c]) for v in columns[:, c].tolist()])
            rotated = vectors.T * residual
            squares = [a + b**2 for a, b in zip(squares, rotated, strict=True)]
        return tuple(values), tuple(squares)
