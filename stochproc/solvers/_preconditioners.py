"""Preconditioners of the form low rank plus diagonal, and how they are built from a matrix."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_floating, check_integer, check_positive
from stochproc._random import make_generator
from stochproc.solvers._linear_problem import is_linear_operator

__all__ = [
    "Jacobi",
    "Nystrom",
    "PivotedCholesky",
    "Preconditioner",
    "PreconditionerOption",
]

# Diagonals below this share of trace(L Lᵀ) would leave P⁻¹ indefinite by rounding: eps of float64 times a
# margin for the orthogonality of Q.
RELATIVE_FLOOR = 1e-14


@dataclass(frozen=True, eq=False)
class Preconditioner:
    r"""The matrix :math:`P = L L^\top + \mathrm{diag}(d)`, its inverse, determinant and Gaussian draws.

    Parameters
    ----------
    name : str
        How it was made.
    factor : Tensor of shape (\*batch, n, r)
        L; r may be 0.
    diagonal : Tensor of shape (\*batch, n)
        d, positive.

    Attributes
    ----------
    logdet : Tensor of shape (\*batch,), float64
        Logarithm of the determinant of P.
    rank : int
        Columns of L.

    Notes
    -----
    Detached from any graph. Whatever the dtype of the data, the factors are kept and applied in float64: with
    top eigenvalue a and diagonal d the inverse stays positive definite up to a / d = 1e14, not just 1e6. Setting
    up takes O(n r²), applying to k vectors O(n r k).

    Examples
    --------
    >>> import torch
    >>> P = Preconditioner("mine", torch.ones(3, 1), torch.ones(3))
    >>> P.logdet.exp().item(), P.apply(torch.ones(3))
    (4.0..., tensor([0.2500, 0.2500, 0.2500]))
    """

    name: str
    factor: Float[Tensor, "*batch n r"]
    diagonal: Float[Tensor, "*batch n"]
    logdet: Tensor = field(init=False, repr=False)
    _Q: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_floating(factor=self.factor, diagonal=self.diagonal)
        check_positive("diagonal", self.diagonal)
        if self.factor.shape[:-1] != self.diagonal.shape:
            raise ValueError(
                f"factor must have shape (*batch, n, r) for a diagonal of shape {tuple(self.diagonal.shape)}; "
                f"got {tuple(self.factor.shape)}."
            )
        L, d = self.factor.detach().double(), self.diagonal.detach().double()
        # [D^-1/2 L; I] = Q R: Woodbury's identity becomes P⁻¹ = D^-1/2 (I - Q₁Q₁ᵀ) D^-1/2, whose inner matrix is
        # never inverted, and |P| = |D| |R|².
        r = L.shape[-1]
        eye = torch.eye(r, dtype=L.dtype, device=L.device).expand(*L.shape[:-2], r, r)
        Q, R = torch.linalg.qr(torch.cat([L / d.sqrt().unsqueeze(-1), eye], -2))
        logdet = d.log().sum(-1) + 2 * R.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        for name, value in (("factor", L), ("diagonal", d), ("logdet", logdet), ("_Q", Q[..., : d.shape[-1], :])):
            object.__setattr__(self, name, value)

    @property
    def rank(self) -> int:
        """Columns of the factor."""
        return self.factor.shape[-1]

    def apply(self, v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        r"""Return :math:`P^{-1} v`.

        Parameters
        ----------
        v : Tensor of shape (\*batch, n) or (\*batch, n, k)
            One vector a matrix, or columns; told apart by the number of dimensions.

        Returns
        -------
        Tensor
            Of the shape and dtype of ``v``.

        Raises
        ------
        ValueError
            If the shape does not fit.
        """
        vector = v.ndim == self.diagonal.ndim
        V = v.unsqueeze(-1) if vector else v
        if V.ndim < 2 or V.shape[-2] != self.diagonal.shape[-1]:
            raise ValueError(f"v must have {self.diagonal.shape[-1]} rows; got shape {tuple(v.shape)}.")
        s = self.diagonal.sqrt().unsqueeze(-1)
        w = V.double() / s
        if self.rank:
            w = w - self._Q @ (self._Q.mT @ w)
        out = (w / s).to(v.dtype)
        return out.squeeze(-1) if vector else out

    def sample(self, k: int, generator: "torch.Generator | None" = None) -> Float[Tensor, "*batch n k"]:
        """Draw ``k`` Gaussian vectors with mean 0 and covariance P.

        Parameters
        ----------
        k : int
            Number of draws.
        generator : torch.Generator or None, default=None
            Source of randomness; None takes a fresh seed. The draws are made on its device.

        Returns
        -------
        Tensor of shape (*batch, n, k), float64
        """
        check_integer("k", k, 0)
        gen = make_generator(generator)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=gen, dtype=torch.float64, device=gen.device)
            return drawn.to(self.diagonal.device)

        *batch, n = self.diagonal.shape
        out = self.diagonal.sqrt().unsqueeze(-1) * normal(*batch, n, k)
        return out + self.factor @ normal(*batch, self.rank, k)


@runtime_checkable
class PreconditionerOption(Protocol):
    """An option object: ``PivotedCholesky``, ``Nystrom``, ``Jacobi`` or anything with their ``build``."""

    def build(self, A: Any, noise: Any = 0.0) -> Preconditioner:
        """Return the preconditioner of A plus ``noise`` on its diagonal."""
        ...


@dataclass(frozen=True)
class Jacobi:
    """The diagonal of A plus noise.

    Entries that are not positive, which no positive definite matrix has, count as 1.

    Examples
    --------
    >>> import torch
    >>> Jacobi().build(torch.tensor([[2.0, 1.0], [1.0, 4.0]]), noise=1.0).diagonal
    tensor([3., 5.], dtype=torch.float64)
    """

    def build(self, A: Any, noise: "Tensor | float | int" = 0.0) -> Preconditioner:
        r"""Return the preconditioner.

        Parameters
        ----------
        A : Tensor or LinearOperator of shape (\*batch, n, n)
            Without the noise.
        noise : float or Tensor, default=0.0
            Non-negative diagonal to be added: a number, (\*batch, 1) or (\*batch, n).

        Returns
        -------
        Preconditioner
            Of rank 0.
        """
        A, noise = _checked(A, noise)
        d = A.diagonal(dim1=-2, dim2=-1).detach().double() + noise
        d = torch.where((d > 0) & d.isfinite(), d, 1.0)
        return Preconditioner("Jacobi", d.new_zeros(*d.shape, 0), d)


@dataclass(frozen=True)
class PivotedCholesky:
    """Columns of A at greedily chosen pivots, plus noise.

    Parameters
    ----------
    rank : int, default=100
        Most columns; fewer where A is of lower rank to rounding.

    Notes
    -----
    By linear_operator: O(n rank²) and ``rank`` rows of A. Columns after the first whose pivot is lost in
    rounding are left out, so a matrix that is rank deficient is safe.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import RBF
    >>> K = RBF().operator(torch.linspace(0, 1, 50, dtype=torch.float64).unsqueeze(-1))
    >>> PivotedCholesky(rank=5).build(K, noise=0.1)
    Preconditioner(name='PivotedCholesky', ...
    """

    rank: int = 100

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)

    @torch.no_grad()
    def build(self, A: Any, noise: "Tensor | float | int" = 0.0) -> Preconditioner:
        r"""Return the preconditioner :math:`L L^\top + \mathrm{noise}`, where :math:`L L^\top` approximates A.

        Parameters
        ----------
        A : Tensor or LinearOperator of shape (\*batch, n, n)
            Symmetric positive semi-definite, without the noise.
        noise : float or Tensor, default=0.0
            Non-negative diagonal to be added: a number, (\*batch, 1) or (\*batch, n). It is raised to 1e-14
            times the trace of :math:`L L^\top` where it is below that, and to the mean of what
            :math:`L L^\top` leaves of the diagonal where there is no noise at all.

        Returns
        -------
        Preconditioner
        """
        from linear_operator import to_linear_operator

        A, noise = _checked(A, noise)
        eps = torch.finfo(A.dtype).eps
        n = A.shape[-1]
        operator = to_linear_operator(A)
        diagonal = A.diagonal(dim1=-2, dim2=-1).detach().double()
        L, order = operator.pivoted_cholesky(rank=self.rank, error_tol=n * eps, return_pivots=True)
        L = L.detach().double()
        pivots = _pivots(L, order)
        # What is left of a rank deficient matrix is rounding, and dividing by the root of that is noise, or NaN.
        good = L.isfinite().all(-2) & (pivots.square() > 8 * eps * diagonal.amax(-1, keepdim=True))
        good = good.long().cumprod(-1).bool()
        L = torch.where(good.unsqueeze(-2), L, 0.0)
        L = L[..., : int(good.sum(-1).max())]
        left = (diagonal - L.square().sum(-1)).clamp_min(0).mean(-1, keepdim=True)
        return _low_rank("PivotedCholesky", L, noise, left)


@dataclass(frozen=True)
class Nystrom:
    r"""A randomised low-rank approximation of A, plus noise; needs nothing but products with A.

    Parameters
    ----------
    rank : int, default=100
        Vectors in the sketch.
    seed : int, default=0
        Seed of the sketch.

    Notes
    -----
    One product of A with ``rank`` vectors and O(n rank²).

    References
    ----------
    .. [1] Z. Frangella, J. A. Tropp and M. Udell, "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl.
       44, 2023, algorithm 2.1; arXiv:2110.02820.

    Examples
    --------
    >>> import torch
    >>> Nystrom(rank=2).build(torch.diag(torch.tensor([4.0, 2.0, 0.0])), noise=1.0).rank
    2
    """

    rank: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        check_integer("seed", self.seed, 0)

    @torch.no_grad()
    def build(self, A: Any, noise: "Tensor | float | int" = 0.0) -> Preconditioner:
        r"""Return the preconditioner :math:`L L^\top + \mathrm{noise}`, where :math:`L L^\top` approximates A.

        Parameters
        ----------
        A : Tensor or LinearOperator of shape (\*batch, n, n)
            Symmetric positive semi-definite, without the noise.
        noise : float or Tensor, default=0.0
            Non-negative diagonal to be added: a number, (\*batch, 1) or (\*batch, n). It is raised to 1e-14
            times the trace of :math:`L L^\top` where it is below that, and to the smallest eigenvalue of the
            sketch where there is no noise at all.

        Returns
        -------
        Preconditioner
        """
        A, noise = _checked(A, noise)
        n, eps = A.shape[-1], torch.finfo(A.dtype).eps
        drawn = torch.randn(n, min(self.rank, n), generator=make_generator(self.seed), dtype=torch.float64)
        sketch = torch.linalg.qr(drawn)[0].to(A.device)
        Y = (A @ sketch.to(A.dtype)).double()
        if not bool(Y.isfinite().all()):
            Y = torch.zeros_like(Y)
        # A shift of the size of rounding keeps the core positive definite; it is taken off the eigenvalues again.
        shift = math.sqrt(n) * eps * torch.linalg.matrix_norm(Y)[..., None, None]
        Y = Y + shift * sketch
        core = sketch.mT @ Y
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        # eigh in place of a Cholesky factor: directions lost in rounding drop out instead of failing.
        keep = values > eps * values[..., -1:].clamp_min(0)
        root = torch.where(keep, values, 1.0).rsqrt() * keep
        U, S, _ = torch.linalg.svd(Y @ (vectors * root.unsqueeze(-2)), full_matrices=False)
        values = (S.square() - shift.squeeze(-1)).clamp_min(0)
        return _low_rank("Nystrom", U * values.sqrt().unsqueeze(-2), noise, values[..., -1:])


def _checked(A: Any, noise: Any) -> tuple[Any, Tensor]:
    """Check a matrix and its noise; return both, the noise float64 and broadcast to (*batch, n)."""
    if isinstance(A, Tensor):
        check_floating(A=A)
    elif not is_linear_operator(A):
        raise TypeError(f"A must be a tensor or a LinearOperator; got {type(A).__name__}.")
    if len(A.shape) < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be square, (*batch, n, n); got shape {tuple(A.shape)}.")
    check_positive("noise", noise, zero=True)
    value = torch.as_tensor(noise, dtype=torch.float64, device=A.device).detach()
    try:
        return A, value.expand(A.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"noise must broadcast to the diagonal of A, {tuple(A.shape[:-1])}; got shape {tuple(value.shape)}."
        ) from None


def _pivots(L: Tensor, order: Tensor) -> Tensor:
    """Diagonal of the factor in the order of its pivots."""
    r = L.shape[-1]
    return L.gather(-2, order[..., :r].unsqueeze(-1).expand(*L.shape[:-2], r, r)).diagonal(dim1=-2, dim2=-1)


def _low_rank(name: str, L: Tensor, noise: Tensor, tail: Tensor) -> Preconditioner:
    """Return L Lᵀ plus the noise, or the tail where there is none, with a floor against rounding."""
    trace = L.square().sum((-2, -1)).unsqueeze(-1)
    floor = RELATIVE_FLOOR * trace
    floor = torch.where((noise == 0).all(-1, keepdim=True), torch.maximum(floor, tail), floor)
    diagonal = torch.maximum(noise, floor)
    # Nothing at all is known of a zero matrix without noise.
    return Preconditioner(name, L, torch.where(diagonal > 0, diagonal, 1.0))
