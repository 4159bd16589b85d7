"""Sweeps of unbalanced transport in the log domain, slow and obvious."""

import math

import torch

from tests.ot.transport_reference import plan_of, softmin


def swept(cost, a, b, eps, rho_a, rho_b, sweeps=20_000):
    """Potentials to rounding; every sweep contracts their distance by 1 / ((1 + eps / rho_a)(1 + eps / rho_b))."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(sweeps):
        before = f
        f = softmin(cost, g, b, eps) / (1 + eps / rho_a)
        g = softmin(cost.mT, f, a, eps) / (1 + eps / rho_b)
        if float((f - before).abs().max()) < 1e-15:
            break
    return f, g


def divergence(p, q):
    """KL(p | q) with its mass terms."""
    return (torch.xlogy(p, p) - torch.xlogy(p, torch.where(q > 0, q, 1.0)) - p + q).sum()


def primal(P, cost, a, b, eps, rho_a, rho_b):
    """Objective of a plan; a hard side is taken as met."""
    value = (P * torch.where(P > 0, cost, 0.0)).sum() + eps * divergence(P, torch.outer(a, b))
    value = value + (0.0 if math.isinf(rho_a) else rho_a * divergence(P.sum(1), a))
    return value + (0.0 if math.isinf(rho_b) else rho_b * divergence(P.sum(0), b))


def swept_plan(cost, a, b, eps, rho_a, rho_b):
    return plan_of(cost, a, b, eps, *swept(cost, a, b, eps, rho_a, rho_b))
