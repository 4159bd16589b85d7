"""Processes without noise of their own, such as periodic ones: few functions with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.kernels import StateSpace
from stochproc.solvers import cholesky_or_raise

__all__ = ["SpannedPosterior", "features", "spanned_posterior"]


def features(ss: StateSpace, points: Float[Tensor, " n"], start: Tensor) -> Float[Tensor, "n q"]:
    """Functions phi with covariance phi(x)' phi(y) of a noiseless process of one output, from ``start`` on.

    Its state at one time determines it everywhere, f(x) = H A(x - start) s.
    """
    A, _ = ss.transition(points - start)
    # A semidefinite covariance of the start: its root by eigenvalues would not be differentiable where they vanish or
    # coincide, that by Cholesky with 1e-14 of the trace is, and changes the kernel by less than rounding of its sum.
    P = ss.prior(start)
    shift = 1e-14 * P.diagonal(dim1=-2, dim2=-1).sum().detach()
    root = cholesky_or_raise(P + shift * torch.eye(len(P), dtype=P.dtype, device=P.device), "the prior covariance")
    return (ss.H.to(A) @ A @ root)[:, 0]


class SpannedPosterior(NamedTuple):
    """Law of the weights z of all components, N(0, I) before the messages."""

    covariance: Float[Tensor, "R q R q"]
    linear: Float[Tensor, "*batch R q"]
    log_z: Float[Tensor, "*batch"]

    def mean(self, at: Sequence[Tensor]) -> Float[Tensor, "*batch m R"]:
        """Means of the functions with the features (m, q) of each component."""
        weights = torch.einsum("rasb,...sb->...ra", self.covariance, self.linear)
        return torch.stack([(weights[..., r, None, :] * phi).sum(-1) for r, phi in enumerate(at)], -1)

    def covariances(self, at: Sequence[Tensor], other: Sequence[Tensor] | None = None) -> Tensor:
        """Covariances (m, R, R) at the same points, or (m, k, R, R) with those of ``other``."""
        rank = len(at)
        how = "ia,ab,ib->i" if other is None else "ia,ab,jb->ij"
        second = at if other is None else other
        rows = [
            torch.stack([torch.einsum(how, at[r], self.covariance[r, :, s], second[s]) for s in range(rank)], -1)
            for r in range(rank)
        ]
        return torch.stack(rows, -2)


def spanned_posterior(
    at: Sequence[Float[Tensor, "n q"]], Lam: Float[Tensor, "n R R"], eta: Float[Tensor, "*batch n R"]
) -> SpannedPosterior:
    """Condition on messages exp(eta' f - f' Lam f / 2) at points with the features ``at``, one tensor a component.

    With B = I + sum_i Phi_i' Lam_i Phi_i and c = sum_i Phi_i' eta_i, log Z = (c' B^-1 c - log det B) / 2; O(n (R q)^2).
    """
    rank, q = len(at), at[0].shape[1]
    blocks = [[(Lam[:, r, s, None] * at[r]).mT @ at[s] for s in range(rank)] for r in range(rank)]
    B = torch.cat([torch.cat(row, 1) for row in blocks], 0)
    B = 0.5 * (B + B.mT) + torch.eye(rank * q, dtype=B.dtype, device=B.device)
    L = cholesky_or_raise(B, "the precision of the weights")
    covariance = torch.cholesky_inverse(L)
    c = torch.stack([(eta[..., r, None] * phi).sum(-2) for r, phi in enumerate(at)], -2)
    flat = c.flatten(-2)
    log_z = 0.5 * (flat * (flat @ covariance)).sum(-1) - L.diagonal().log().sum()
    return SpannedPosterior(covariance.reshape(rank, q, rank, q), c, log_z)
