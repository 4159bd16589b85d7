r"""Likelihood of the scale where the noise is outside it, from one eigendecomposition of the kernel matrix.

With :math:`K = U \mathrm{diag}(\lambda) U^\top`, :math:`Z = U^\top R` and :math:`d_i(s) = s \lambda_i + \tau^2`, for C
outputs

.. math:: \log p(y \mid s) = -\tfrac12 \sum_i \left[ C \log(2 \pi d_i(s)) + |Z_i|^2 / d_i(s) \right],

so that each scale s costs O(n).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.exceptions import NotPositiveDefiniteError
from stochproc.gp._scale_evidence import LOG_2PI, log_evidence
from stochproc.gp._scale_quadrature import place_nodes

__all__ = ["NodeLikelihood", "ScaleDensity", "SpectralLikelihood", "Spectrum", "decompose"]

# Relative to the mean diagonal, as in ``safe_cholesky``: the first jitter, ten times more each time.
FIRST_JITTER = {torch.float32: 1e-6, torch.float64: 1e-10}
JITTERS = 5
# exp(690) times an eigenvalue stays finite; beyond, every term of the likelihood has its limiting slope.
LARGEST_LOG_SCALE = 690.0
# Below this relative change the likelihood is its limit at s = 0: exp(-37) = 1e-16.
NEGLIGIBLE = 37.0
# Nodes whose weight is below this share of the largest add nothing to a gradient in float64.
LEAST_WEIGHT = 1e-20
BLOCK_ELEMENTS = 2**20


class Spectrum(NamedTuple):
    """Eigenvalues (float64, those that rounding cannot tell from zero are zero) and eigenvectors of a matrix."""

    values: Float[Tensor, " n"]
    vectors: Float[Tensor, "n n"]
    jitter: float
    """What was added to every eigenvalue, relative to the mean diagonal; 0 where none was needed."""


@torch.no_grad()
def decompose(matrix: Float[Tensor, "n n"], *, noise_free: bool) -> Spectrum:
    """Decompose a symmetric positive semi-definite matrix; without noise it must come out positive definite.

    Raises
    ------
    NotPositiveDefiniteError
        If an eigenvalue is negative by more than the largest jitter, or an entry is not finite.
    """
    matrix = matrix.detach()
    if not bool(matrix.isfinite().all()):
        raise NotPositiveDefiniteError("the kernel matrix: holds NaN or infinite entries.")
    found, vectors = torch.linalg.eigh(matrix)
    values = found.to(torch.float64)
    level = float(matrix.diagonal().to(torch.float64).abs().mean())
    # The backward error of the decomposition and of the entries themselves.
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * float(values.abs().max())
    first = FIRST_JITTER[matrix.dtype]
    for amount in (0.0, *(first * 10**k for k in range(JITTERS))):
        shifted = values + amount * level
        lowest = float(shifted.min())
        if lowest > rounding or (not noise_free and lowest >= -rounding):
            # A direction that the matrix does not reach to rounding is one that it does not reach.
            return Spectrum(torch.where(shifted > rounding, shifted, 0.0), vectors, amount)
    raise NotPositiveDefiniteError(
        f"the kernel matrix: not positive {'definite' if noise_free else 'semi-definite'} with jitter up to "
        f"{amount:.3g} mean diagonals; eigenvalues from {float(values.min()):.3g} to {float(values.max()):.3g}."
    )


@dataclass(frozen=True)
class SpectralLikelihood:
    """log p(y | s) at any scale, O(n) each.

    Parameters
    ----------
    values : Tensor of shape (n,), float64
        Eigenvalues of the kernel matrix, non-negative.
    squares : Tensor of shape (n,), float64
        Squared rotated residuals, summed over the outputs.
    noise : Tensor, 0-dim, float64
        Variance of the noise. Zero only if every eigenvalue is positive.
    n_outputs : int
        Number of outputs C.
    """

    values: Float[Tensor, " n"]
    squares: Float[Tensor, " n"]
    noise: Float[Tensor, ""]
    n_outputs: int

    @property
    def rank(self) -> int:
        """Number of positive eigenvalues."""
        return int((self.values > 0).sum())

    def variances(self, log_s: Float[Tensor, " J"]) -> Float[Tensor, "J n"]:
        """Eigenvalues of s K + noise I at each scale."""
        scales = log_s.clamp(max=LARGEST_LOG_SCALE).exp()
        return (scales[:, None] * self.values + self.noise).clamp(min=torch.finfo(torch.float64).tiny)

    def gains(self, log_s: Float[Tensor, " J"]) -> Float[Tensor, "J n"]:
        """Share s / (s lambda + noise) of each direction, and 0 for those that the kernel does not reach."""
        scales = log_s.clamp(max=LARGEST_LOG_SCALE).exp()
        return torch.where(self.values > 0, scales[:, None] / self.variances(log_s), 0.0)

    def __call__(self, log_s: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return log p(y | s)."""
        flat = log_s.reshape(-1)
        # Far to the left the likelihood is that of noise alone; half of a scan over all scales lies there.
        log_growth = self.values.max().log() - self.noise.log()
        log_weight = (self.n_outputs * len(self.values) + (self.squares / self.noise).sum()).log()
        inside = flat > -(log_growth + log_weight + NEGLIGIBLE) if bool(self.noise > 0) else flat > -math.inf
        at_zero = flat.new_full((1,), -math.inf)
        parts = [self._block(u) for u in torch.cat([at_zero, flat[inside]]).split(self._rows())]
        found = torch.cat(parts)
        out = found[0].expand_as(flat).clone()
        out[inside] = found[1:]
        return out.reshape(log_s.shape)

    def _rows(self) -> int:
        return max(1, BLOCK_ELEMENTS // len(self.values))

    def _block(self, u: Tensor) -> Tensor:
        d = self.variances(u)
        value = self.n_outputs * (d.log().sum(1) + len(self.values) * LOG_2PI) + (self.squares / d).sum(1)
        beyond = (u - LARGEST_LOG_SCALE).clamp(min=0)
        return -(value + self.n_outputs * self.rank * beyond) / 2


@dataclass(frozen=True)
class ScaleDensity:
    """The density of the scale given the data, in the form in which the quadrature takes a prior.

    Parameters
    ----------
    prior : ScalePrior
        The prior of s.
    likelihood : SpectralLikelihood
        What the data say.
    log_evidence : float, default=0.0
        Logarithm of its integral; 0 before it is known, and the density is then not normalised.
    """

    prior: Any
    likelihood: SpectralLikelihood
    log_evidence: "float | int" = 0.0

    def _log_prob_u(self, u: Tensor) -> Tensor:
        return self.prior._log_prob_u(u) + self.likelihood(u) - self.log_evidence

    @property
    def _reach(self) -> "float | int":
        return self.prior._reach

    @property
    def tail_index(self) -> "float | int":
        """The exponent of the tail: half an observation more for each direction that the kernel reaches."""
        return self.prior.tail_index + self.likelihood.n_outputs * self.likelihood.rank / 2

    def __repr__(self) -> str:
        return f"{self.prior!r} given {len(self.likelihood.values)} rows"


class NodeLikelihood(torch.autograd.Function):
    r"""log p(y | s) at the nodes of the quadrature, with a gradient in closed form; see ``apply``'s arguments.

    ``apply(matrix, noise, residual, log_scale, prior)`` places the nodes for the prior, unless ``log_scale`` is the
    one scale that the prior allows, and returns the log likelihoods, the nodes in log s and the logarithm of their
    step. For weights :math:`w_j` (the gradient that comes in) and :math:`a_j = Z / d_j` the gradient in K is

    .. math:: \tfrac12 U \Big[ \sum_j w_j s_j \big( a_j a_j^\top - C\, \mathrm{diag}(1/d_j) \big) \Big] U^\top,

    formed once, O(n^3). Autograd through the decomposition would divide by differences of eigenvalues.
    """

    @staticmethod
    def forward(
        ctx: Any, matrix: Tensor, noise: Tensor, residual: Tensor, log_scale: "Tensor | None", prior: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        spectrum = decompose(matrix, noise_free=noise.item() == 0)
        rotated = (spectrum.vectors.mT @ residual).to(torch.float64)
        tau = noise.detach().to(spectrum.values)
        likelihood = SpectralLikelihood(spectrum.values, rotated.square().sum(1), tau, residual.shape[1])
        if tau.item() == 0 and likelihood.squares.sum().item() == 0:
            # Raises where the prior would make s zero.
            log_evidence(prior, residual.numel(), tau)
        if log_scale is None:
            nodes = place_nodes(ScaleDensity(prior, likelihood), 0.0, tau.new_zeros(1))
            log_s, log_step = nodes.log_s[0], nodes.log_step[0, 0]
        else:
            log_s, log_step = log_scale.detach().to(tau).reshape(1), tau.new_zeros(())
        ctx.save_for_backward(spectrum.vectors, rotated)
        ctx.likelihood, ctx.log_s = likelihood, log_s
        ctx.mark_non_differentiable(log_s, log_step)
        return likelihood(log_s), log_s, log_step

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        vectors, rotated = ctx.saved_tensors
        likelihood: SpectralLikelihood = ctx.likelihood
        needed = ctx.needs_input_grad
        keep = grad.abs() > LEAST_WEIGHT * grad.abs().max()
        weight, log_s = grad[keep], ctx.log_s[keep]
        scales, inverse = log_s.clamp(max=LARGEST_LOG_SCALE).exp(), 1 / likelihood.variances(log_s)
        outputs = likelihood.n_outputs

        g_matrix = g_noise = g_residual = g_scale = None
        if needed[0]:
            # The sum over nodes of a_j a_j^T is an outer product of the rotated residuals times one of the d_j.
            inner = (inverse.mT * (weight * scales)) @ inverse
            inner.mul_(rotated @ rotated.mT)
            inner.diagonal().sub_(outputs * ((weight * scales) @ inverse))
            half = inner.to(vectors) / 2
            g_matrix = vectors @ half @ vectors.mT
        slope = (likelihood.squares * inverse.square() - outputs * inverse) / 2
        if needed[1]:
            g_noise = weight @ slope.sum(1)
        if needed[2]:
            g_residual = -(vectors @ (rotated * (weight @ inverse)[:, None]).to(vectors))
        if needed[3]:
            g_scale = (weight * scales) @ (slope @ likelihood.values)
        return g_matrix, g_noise, g_residual, g_scale, None
