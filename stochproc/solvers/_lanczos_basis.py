"""Lanczos bases of many vectors at once, and Gauss quadratures of the logarithm from them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["ROUNDINGS", "Basis", "lanczos", "log_quadrature", "truncation_error", "unit_solution"]

# What is below this many roundings of the largest Ritz value cannot be told from zero.
ROUNDINGS = 8
# Ritz values lose condition * eps: smaller relative changes between numbers of steps show no rate.
NO_RATE = 1e-9


class Basis(NamedTuple):
    """Krylov bases of all probes; in terms of q, orthonormal, W = P^-1/2 q and ``first`` = P^1/2 q_0."""

    W: Float[Tensor, "*batch p k n"]
    first: Float[Tensor, "*batch p n"]
    T: Float[Tensor, "*batch p k k"]
    """Tridiagonal, float64; beyond the steps that were done a diagonal of no weight."""
    last: Float[Tensor, "*batch p"]
    """What sticks out of the space of the last step; zero where the space is invariant."""
    sizes: Int[Tensor, "*batch p"]
    nonfinite: Bool[Tensor, "*batch p"]
    asymmetric: Bool[Tensor, "*batch p"]


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Float[Tensor, "*batch n p"],
    steps: int,
    apply: "Callable[[Tensor], Tensor] | None" = None,
) -> Basis:
    """Lanczos recursion in the inner product of P^-1, with full reorthogonalisation and scalars in float64."""
    *batch, n, p = start.shape
    k = min(steps, n)
    eps = torch.finfo(start.dtype).eps
    # With a preconditioner the residuals of products are made orthogonal along U = P^1/2 q.
    W = start.new_zeros(*batch, p, k, n)
    U = W if apply is None else torch.zeros_like(W)
    T = torch.eye(k, dtype=torch.float64, device=start.device).repeat(*batch, p, 1, 1)
    r = start.mT
    s = r if apply is None else apply(start).mT
    squared = _inner(r, s)
    nonfinite = ~squared.isfinite()
    asymmetric = squared <= 0
    alive = ~nonfinite & ~asymmetric
    beta = squared.clamp_min(0).sqrt()
    before = torch.zeros_like(beta)
    norm = torch.zeros_like(beta)
    sizes = torch.zeros_like(beta, dtype=torch.int64)
    for j in range(k):
        scale = torch.where(alive, 1 / beta, 0.0).to(start.dtype).unsqueeze(-1)
        W[..., j, :] = torch.where(alive.unsqueeze(-1), s * scale, 0.0)
        if apply is not None:
            U[..., j, :] = torch.where(alive.unsqueeze(-1), r * scale, 0.0)
        r = product(W[..., j, :].mT).mT
        alpha = _inner(W[..., j, :], r)
        norm = torch.maximum(norm, before + alpha.abs())
        # Twice is enough for orthogonality to rounding, and tells when a vector is nothing else (Daniel et al. 1976).
        overlaps = (W[..., : j + 1, :] @ r.unsqueeze(-1)).squeeze(-1)
        r = r - (overlaps.unsqueeze(-2) @ U[..., : j + 1, :]).squeeze(-2)
        s = r if apply is None else apply(r.mT).mT
        once = _length(r, s, norm)
        again = (W[..., : j + 1, :] @ r.unsqueeze(-1)).mT
        r = r - (again @ U[..., : j + 1, :]).squeeze(-2)
        s = r if apply is None else s - (again @ W[..., : j + 1, :]).squeeze(-2)
        after = _length(r, s, norm)
        bad = alive & ~(alpha + after).isfinite()
        nonfinite = nonfinite | bad
        if j > 0:
            # A symmetric matrix maps q_j to no earlier direction but the last, and there with the same beta.
            overlaps[..., j - 1] -= before.to(start.dtype)
            stray = overlaps[..., :j].abs().amax(-1).double()
            asymmetric = asymmetric | (alive & (stray > eps**0.25 * norm))
        alive = alive & ~bad
        if j == 0:
            # Where a probe stops early its first entry, which is within the spectrum, stands in.
            T = T * torch.where(alive, alpha, 1.0)[..., None, None]
        T[..., j, j] = torch.where(alive, alpha, T[..., j, j])
        if j > 0:
            T[..., j, j - 1] = T[..., j - 1, j] = torch.where(alive, before, 0.0)
        sizes = sizes + alive
        norm = torch.maximum(norm, before + alpha.abs() + after)
        alive = alive & (after > ROUNDINGS * eps * norm) & (after > 0.5 * once)
        before = beta = after
        if not bool(alive.any()):
            break
    last = torch.where(alive, beta, 0.0) if k < n else torch.zeros_like(beta)
    first = (W if apply is None else U)[..., 0, :]
    return Basis(W, first, T, last, sizes, nonfinite, asymmetric)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(-1)


def _length(r: Tensor, s: Tensor, norm: Tensor) -> Float[Tensor, "*batch p"]:
    """Root of r's, in units of the matrix: squares of its entries may overflow, or vanish and pass for no length."""
    unit = torch.where(norm > 0, norm, 1.0)
    return _inner(r / unit.unsqueeze(-1), s / unit.unsqueeze(-1)).clamp_min(0).sqrt() * unit


def log_quadrature(ritz: Tensor, vectors: Tensor, absolute: bool = False) -> Float[Tensor, "*batch p"]:
    """First entry of log T (or its absolute value) of every probe; what is not positive is looked at elsewhere."""
    logs = ritz.clamp_min(torch.finfo(ritz.dtype).tiny).log()
    return (vectors[..., 0, :].square() * (logs.abs() if absolute else logs)).sum(-1)


def unit_solution(ritz: Tensor, vectors: Tensor) -> Float[Tensor, "*batch p k"]:
    scaled = vectors[..., 0, :] / torch.where(ritz > 0, ritz, 1.0)
    return (vectors @ scaled.unsqueeze(-1)).squeeze(-1)


def truncation_error(basis: Basis, full: Tensor, n: int, size: Tensor) -> Float[Tensor, "*batch"]:
    """Error of stopping after k steps, from the values after k, 4k/5 and 3k/5 on the assumption of a fixed rate.

    Gauss quadratures of the logarithm fall to their limit. On RBF, Matern and exponential kernels with noise 1e-1
    to 1e-4 this was between 0.6 and 2.5 times the true error wherever that exceeded 1e-9. It is no bound: where a bulk
    of eigenvalues settles before far smaller ones are seen, it was as little as 1e-7 of the true error.
    """
    k = basis.T.shape[-1]
    exact = (basis.last == 0).all(-1)
    if k < 3:
        return torch.where(exact, 0.0, math.inf)
    gap = max(1, k // 5)
    earlier = [n * log_quadrature(*torch.linalg.eigh(basis.T[..., :m, :m])).mean(-1) for m in (k - gap, k - 2 * gap)]
    late, early = (earlier[0] - full).abs(), (earlier[1] - earlier[0]).abs()
    rate = late / early
    error = torch.where(rate < 1, late * rate / (1 - rate), math.inf)
    error = torch.where(late <= NO_RATE * size, late, error)
    return torch.where(exact, 0.0, error)
