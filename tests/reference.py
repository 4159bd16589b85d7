"""Slow, obvious dense formulas in float64, from explicit differences, to compare against."""

import math

import torch


def differences(x, y):
    """All x_i - y_j, shape (*batch, n, m, d), in float64."""
    return x.double().unsqueeze(-2) - y.double().unsqueeze(-3)


def distance(x, y, lengthscale=1.0):
    return (differences(x, y) / lengthscale).square().sum(-1).sqrt()


def rbf(x, y, lengthscale=1.0):
    return torch.exp(-(distance(x, y, lengthscale) ** 2) / 2)


def matern(x, y, lengthscale=1.0, nu=2.5):
    a = math.sqrt(2 * nu) * distance(x, y, lengthscale)
    poly = {0.5: 1.0, 1.5: 1 + a, 2.5: 1 + a + a**2 / 3}[nu]
    return poly * torch.exp(-a)


def rational_quadratic(x, y, lengthscale=1.0, alpha=1.0):
    return (1 + distance(x, y, lengthscale) ** 2 / (2 * alpha)) ** (-alpha)


def periodic(x, y, lengthscale=1.0, period=1.0):
    s = torch.sin(math.pi * differences(x, y) / period) / lengthscale
    return torch.exp(-2 * s.square().sum(-1))


def linear(x, y, variance=1.0, bias=1.0):
    return bias + variance * (x.double().unsqueeze(-2) * y.double().unsqueeze(-3)).sum(-1)


def polynomial(x, y, degree=2, offset=1.0):
    return (linear(x, y, 1.0, 0.0) + offset) ** degree


def arc_cosine(x, y, order=1):
    u, w = (t.double() / t.double().norm(dim=-1, keepdim=True) for t in (x, y))
    # Kahan's angle, exact to the last digits where acos is not.
    plus = u.unsqueeze(-2) + w.unsqueeze(-3)
    t = 2 * torch.atan2(differences(u, w).norm(dim=-1), plus.norm(dim=-1))
    norms = x.double().norm(dim=-1).unsqueeze(-1) * y.double().norm(dim=-1).unsqueeze(-2)
    if order == 0:
        return 1 - t / math.pi
    return norms * (torch.sin(t) + (math.pi - t) * torch.cos(t)) / math.pi


def cost(name, x, y):
    d = differences(x, y)
    return {
        "sqeuclidean": lambda: d.square().sum(-1),
        "euclidean": lambda: d.square().sum(-1).sqrt(),
        "cityblock": lambda: d.abs().sum(-1),
    }[name]()
