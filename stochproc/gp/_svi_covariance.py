r"""The covariances C_c of whitened inducing variables: full, diagonal, or of low rank in the precision.

Each family gives, for features A of points (m, B), the quadratic forms :math:`a_b^\top C_c a_b`, and the trace and
log determinant that the divergence from the prior needs, at a cost of O(C B m^2), O(C B m) and O(C B m r).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice, check_integer
from stochproc.solvers import cholesky_or_raise

__all__ = ["FULL_UP_TO", "CovarianceTerms", "covariance_family"]

# A full factor has m^2 / 2 numbers a class: beyond this size the diagonal is the default.
FULL_UP_TO = 256


class CovarianceTerms(NamedTuple):
    """Quadratic forms, and trace and log determinant summed over the classes."""

    quadratic: Float[Tensor, "classes points"]
    trace: Float[Tensor, ""]
    logdet: Float[Tensor, ""]


class FullCovariance(torch.nn.Module):
    r"""C = R^T R with R lower triangular, its diagonal positive.

    With this order the product of all factors with the features is one matrix product, and the inverse of a Cholesky
    factor of a precision is R itself.
    """

    def __init__(self, n_latent: int, m: int) -> None:
        super().__init__()
        self.lower = torch.nn.Parameter(torch.zeros(n_latent, m, m))
        self.log_diagonal = torch.nn.Parameter(torch.zeros(n_latent, m))

    def terms(self, A: Float[Tensor, "m points"]) -> CovarianceTerms:
        """Return the quadratic forms of the columns of A, the trace and the log determinant."""
        quadratic, trace = _RootTerms.apply(A, self.lower, self.log_diagonal)
        return CovarianceTerms(quadratic, trace, 2 * self.log_diagonal.sum())

    @torch.no_grad()
    def set_precision(self, H: Float[Tensor, "m m"]) -> None:
        """Make C the inverse of H for every class."""
        factor = cholesky_or_raise(H, "the precision of the inducing variables")
        eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
        R = torch.linalg.solve_triangular(factor, eye, upper=False)
        self.lower.copy_(R.tril(-1))
        self.log_diagonal.copy_(R.diagonal().log())


class DiagonalCovariance(torch.nn.Module):
    """C is diagonal."""

    def __init__(self, n_latent: int, m: int) -> None:
        super().__init__()
        self.log_diagonal = torch.nn.Parameter(torch.zeros(n_latent, m))

    def terms(self, A: Float[Tensor, "m points"]) -> CovarianceTerms:
        """Return the quadratic forms of the columns of A, the trace and the log determinant."""
        variance = (2 * self.log_diagonal).exp()
        return CovarianceTerms(variance @ A.square(), variance.sum(), 2 * self.log_diagonal.sum())

    @torch.no_grad()
    def set_precision(self, H: Float[Tensor, "m m"]) -> None:
        """Make C the diagonal matrix nearest to the inverse of H in the divergence from it."""
        self.log_diagonal.copy_(-H.diagonal().log() / 2)


class LowRankCovariance(torch.nn.Module):
    r"""C = D (I + U U^T)^-1 D with D diagonal and U of r columns.

    Data tell something about few directions and narrow those; all others keep the width of the prior. So it is the
    precision that differs from the identity by a low rank: a covariance that is diagonal plus low rank could only
    widen directions.
    """

    def __init__(self, n_latent: int, m: int, rank: int) -> None:
        super().__init__()
        self.log_diagonal = torch.nn.Parameter(torch.zeros(n_latent, m))
        self.columns = torch.nn.Parameter(torch.zeros(n_latent, m, rank))

    def terms(self, A: Float[Tensor, "m points"]) -> CovarianceTerms:
        """Return the quadratic forms of the columns of A, the trace and the log determinant."""
        d, U = self.log_diagonal.exp(), self.columns
        eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
        factor = cholesky_or_raise(eye + U.mT @ U, "the low-rank part of the precision")
        # (I + U U^T)^-1 = I - H^T H with H = factor^-1 U^T.
        half = torch.linalg.solve_triangular(factor, U.mT * d[:, None], upper=False)
        kept = d.square() @ A.square()
        quadratic = kept - (half @ A).square().sum(1)
        trace = d.square().sum() - half.square().sum()
        logdet = 2 * self.log_diagonal.sum() - 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum()
        return CovarianceTerms(quadratic, trace, logdet)

    @torch.no_grad()
    def set_precision(self, H: Float[Tensor, "m m"]) -> None:
        """Keep the directions in which H is largest; the others get the prior's width."""
        values, vectors = torch.linalg.eigh(H)
        rank = self.columns.shape[-1]
        excess = (values[-rank:] - 1).clamp(min=1e-6).sqrt()
        self.columns.copy_(vectors[:, -rank:] * excess)
        self.log_diagonal.zero_()


def covariance_family(name: str, n_latent: int, m: int, rank: int) -> Any:
    """Return the family of that name for C classes and m inducing points, at the prior's C = I.

    Parameters
    ----------
    name : {"auto", "full", "diag", "lowrank"}
        "auto" is full up to m = 256, diagonal above.
    n_latent, m : int
    rank : int
        Of "lowrank", at most m.
    """
    check_choice("covariance", name, ("auto", "full", "diag", "lowrank"))
    if name == "lowrank":
        check_integer("rank", rank, 1)
        return LowRankCovariance(n_latent, m, min(rank, m))
    full = name == "full" or (name == "auto" and m <= FULL_UP_TO)
    return FullCovariance(n_latent, m) if full else DiagonalCovariance(n_latent, m)


class _RootTerms(torch.autograd.Function):
    """Quadratic forms |R_c a_b|^2 and the trace of all R_c^T R_c: one matrix product, and two for the gradient."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, lower: Tensor, log_diagonal: Tensor) -> tuple[Tensor, Tensor]:
        R = lower.tril(-1)
        R.diagonal(dim1=1, dim2=2).copy_(log_diagonal.exp())
        product = (R.flatten(0, 1) @ A).unflatten(0, log_diagonal.shape)
        ctx.save_for_backward(A, R, product)
        return torch.linalg.vector_norm(product, dim=1).square_(), torch.linalg.vector_norm(R).square_()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_quadratic: Tensor, g_trace: Tensor) -> tuple[Any, ...]:
        A, R, product = ctx.saved_tensors
        G, rows = (product * (2 * g_quadratic[:, None])).flatten(0, 1), R.flatten(0, 1)
        # The trace's gradient rides along with the product: arrays of this size cost as much to walk as to multiply.
        g_R = torch.addmm(rows, G, A.mT, beta=2 * g_trace.item()).view_as(R)
        g_diagonal = R.diagonal(dim1=1, dim2=2) * g_R.diagonal(dim1=1, dim2=2)
        return rows.mT @ G if ctx.needs_input_grad[0] else None, g_R.tril_(-1), g_diagonal
