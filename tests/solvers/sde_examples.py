"""Equations with known solutions, shared by the tests of the SDE solver."""

import math

import torch
from torch import nn


class Equation:
    """An equation from two functions."""

    def __init__(self, drift, diffusion, noise_type="diagonal", sde_type="ito"):
        self.drift, self.diffusion = drift, diffusion
        self.noise_type, self.sde_type = noise_type, sde_type


def geometric(mu=0.5, sigma=0.8, noise_type="diagonal", sde_type="ito"):
    """dy = mu y dt + sigma y dW for each component; one Brownian motion for all if scalar."""

    def diffusion(t, y):
        g = sigma * y
        return {"diagonal": g, "scalar": g.unsqueeze(-1)}.get(noise_type, torch.diag_embed(g))

    return Equation(lambda t, y: mu * y, diffusion, noise_type, sde_type)


def geometric_solution(y0, w, t, mu=0.5, sigma=0.8, sde_type="ito"):
    """The solution of ``geometric`` where the Brownian motion is w at time t."""
    correction = sigma**2 / 2 if sde_type == "ito" else 0.0
    return y0 * torch.exp((mu - correction) * t + sigma * w)


class Neural(nn.Module):
    """A small net with every kind of noise: parameters, time and state in both terms."""

    sde_type = "ito"

    def __init__(self, d, noise_type="diagonal", sde_type="ito", m=2, seed=0):
        super().__init__()
        self.noise_type, self.sde_type = noise_type, sde_type
        self.m = {"scalar": 1, "diagonal": d}.get(noise_type, m)
        gen = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.randn(d, d, generator=gen) / math.sqrt(d))
        self.B = nn.Parameter(0.3 * torch.randn(d, self.m, generator=gen))

    def drift(self, t, y):
        return torch.tanh(y @ self.A + t)

    def diffusion(self, t, y):
        if self.noise_type == "diagonal":
            return (1 + 0.5 * torch.sin(y + t)) * self.B.diagonal()
        if self.noise_type == "additive":
            return ((1 + t).unsqueeze(-1) * self.B).expand(*y.shape, self.m)
        return torch.cos(y + t).unsqueeze(-1) * self.B


class ExactOrnsteinUhlenbeck:
    """dy = -theta y dt + sigma dW by its exact transition."""

    def __init__(self, d, theta=1.3, sigma=0.7):
        self.theta, self.sigma = theta, sigma
        self.noise_shape = (d,)

    def step(self, t, y, h, noise):
        decay = math.exp(-self.theta * h)
        std = self.sigma * math.sqrt(-math.expm1(-2 * self.theta * h) / (2 * self.theta))
        return decay * y + std * noise


def coarsen(increments, factor):
    """The same Brownian path on a grid with ``factor`` times fewer points."""
    return increments.unflatten(0, (-1, factor)).sum(1)


def slope(x, y):
    """Slope of the regression line of log y on log x."""
    x, y = (torch.as_tensor(v, dtype=torch.float64).log() for v in (x, y))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())
