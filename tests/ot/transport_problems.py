"""Families of transport problems, from smooth to nearly combinatorial; costs have range about 1."""

import math

import torch


def weights(n, gen, *, power=1.0, floor=0.1):
    w = torch.rand(n, generator=gen) ** power + floor
    return w / w.sum()


def uniform(n):
    return torch.full((n,), 1 / n)


def assignment(n, m, gen):
    return torch.rand(n, m, generator=gen), uniform(n), uniform(m)


def cloud(n, m, d, gen):
    x, y = torch.rand(n, d, generator=gen), torch.rand(m, d, generator=gen) ** 2
    M = torch.cdist(x, y).square()
    return M / M.max(), weights(n, gen), weights(m, gen)


def image(side, p, gen):
    grid = torch.stack(torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij"), -1).reshape(-1, 2)
    M = torch.cdist(grid, grid, p=1) if p == 1 else torch.cdist(grid, grid).square()
    return M / M.max(), weights(side**2, gen, power=4, floor=1e-3), weights(side**2, gen, power=4, floor=1e-3)


def skewed(n, gen):
    M, _, _ = cloud(n, n, 2, gen)
    a, b = ((-30 * torch.rand(n, generator=gen)).exp() for _ in range(2))
    return M, a / a.sum(), b / b.sum()


def with_zeros(n, gen):
    M, a, b = cloud(n, n, 2, gen)
    a, b = (w * (torch.rand(n, generator=gen) > 0.3) for w in (a, b))
    return M, a / a.sum(), b / b.sum()


def discrete(n, gen):
    M, a, _ = assignment(n, n, gen)
    return (10 * M).round() / 10, a, weights(n, gen)


FAMILIES = {
    "assignment": lambda gen, n=60: assignment(n, n, gen),
    "assignment, wide": lambda gen, n=60: assignment(n // 2, n, gen),
    "assignment, tall": lambda gen, n=60: assignment(n, n // 3, gen),
    "cloud on a line": lambda gen, n=60: cloud(n, n, 1, gen),
    "cloud in the plane": lambda gen, n=60: cloud(n, n, 2, gen),
    "cloud in 5 dimensions": lambda gen, n=60: cloud(n, n, 5, gen),
    "cloud in 20 dimensions": lambda gen, n=60: cloud(n, n, 20, gen),
    "image, city block": lambda gen, n=60: image(math.isqrt(n), 1, gen),
    "image, squared": lambda gen, n=60: image(math.isqrt(n), 2, gen),
    "weights over 12 decades": lambda gen, n=60: skewed(n, gen),
    "30 % zero weights": lambda gen, n=60: with_zeros(n, gen),
    "many equal costs": lambda gen, n=60: discrete(n, gen),
    "0/1 metric": lambda gen, n=60: (1 - torch.eye(n), weights(n, gen), weights(n, gen)),
}


def err_of(M, a, b, eps, f, g):
    """Recompute err from potentials, from scratch."""
    z = (f.unsqueeze(-1) + g.unsqueeze(-2) - M) / eps
    P = (z + a.log().unsqueeze(-1) + b.log().unsqueeze(-2)).exp()
    P = torch.where((a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2), P, 0.0)
    return float(((P.sum(-1) - a).abs().sum() + (P.sum(-2) - b).abs().sum()) / a.sum())
