"""Matrices of known spectrum and residuals, for the tests of linear solvers."""

import torch


def spd(gen, *shape, low=0.1, high=1.0, dtype=torch.float64):
    """Symmetric positive definite matrices (*batch, n, n) with eigenvalues spaced geometrically in [low, high]."""
    n = shape[-1]
    Q = torch.linalg.qr(torch.randn(*shape, n, generator=gen, dtype=torch.float64))[0]
    values = torch.logspace(torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), n, dtype=torch.float64)
    A = (Q * values) @ Q.mT
    return ((A + A.mT) / 2).to(dtype)


def relative_residual(A, x, b):
    """Worst ||b - A x|| / ||b|| over columns (*batch, n, k), in float64."""
    A, x, b = (t.double() for t in (A, x, b))
    return float(((b - A @ x).norm(dim=-2) / b.norm(dim=-2)).max())


def laplacian(n):
    """Dense Laplacian of a path of n nodes: singular, with the constant vector as its null space."""
    L = 2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)
    L[0, 0] = L[-1, -1] = 1.0
    return L


def centre(v):
    """Projection off the constant vector, of (n,) or (n, k)."""
    return v - v.mean(0)
