"""The posterior process where the noise is outside the scale: a mixture over nodes of Gaussian processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_integer, check_same_kind
from stochproc._warnings import warn_caller
from stochproc.exceptions import NumericalWarning
from stochproc.gp._cross import cross_covariance
from stochproc.gp._independent_predictive import MixturePredictive
from stochproc.gp._independent_scale import GivenScale, gaussian_log_density, is_negligible_at_ends
from stochproc.gp._independent_spectrum import ScaleDensity, SpectralLikelihood
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_posterior import ScalePosterior
from stochproc.gp._scale_quadrature import log_integral
from stochproc.solvers import cholesky_or_raise

__all__ = ["IndependentPosterior"]

# Entries of one block of the cross-covariance, or of rows times nodes: 4 MiB in float64.
BLOCK_ELEMENTS = 2**19


@dataclass(frozen=True)
class IndependentPosterior:
    r"""The process given data, the noise outside the scale; ``IndependentNoiseGP.condition`` makes it.

    Given s and y it is a Gaussian process, with :math:`K = U \mathrm{diag}(\lambda) U^\top`, :math:`q = U^\top k_*`
    and :math:`g_i = s / (s \lambda_i + \tau^2)` of mean :math:`m + q^\top \mathrm{diag}(g)\, U^\top (y - m)` and
    variance :math:`s\, (k_{**} - q^\top \mathrm{diag}(g)\, q)`; s has the weights of its posterior.

    Parameters
    ----------
    kernel : torch.nn.Module
        A copy of the kernel.
    X : Tensor of shape (n, d)
        Training inputs.
    vectors : Tensor of shape (n, n)
        Eigenvectors U of the kernel matrix.
    rotated : Tensor of shape (n, C), float64
        :math:`U^\top (y - m)`.
    likelihood : SpectralLikelihood
        log p(y | s), with the eigenvalues and the noise.
    constant : Tensor of shape (C,)
        Prior mean.
    noise : Tensor, 0-dim
        Variance of the noise.
    scale : ScalePosterior
        The law of s given the data.
    scale_prior : ScalePrior
        A copy of the prior of s.
    log_evidence : float
        log p(y), in nats.
    single_output : bool
        Whether y was given as (n,), so that predictions are too.
    """

    kernel: Any
    X: Float[Tensor, "n d"]
    vectors: Float[Tensor, "n n"]
    rotated: Float[Tensor, "n C"]
    likelihood: SpectralLikelihood
    constant: Float[Tensor, " C"]
    noise: Float[Tensor, ""]
    scale: ScalePosterior
    scale_prior: ScalePrior
    log_evidence: "float | int"
    single_output: bool

    @property
    def log_marginal_likelihood(self) -> float:
        """Return log p(y) of the data conditioned on, in nats."""
        return float(self.log_evidence)

    @property
    def nodes(self) -> tuple[Float[Tensor, " J"], Float[Tensor, " J"]]:
        """Nodes in log s and their log weights: one node for a known scale."""
        if isinstance(self.scale, GivenScale):
            return self.scale.log_s, self.scale.log_weights
        log_s = self.likelihood.values.new_tensor([self.scale.mean]).log()
        return log_s, torch.zeros_like(log_s)

    @property
    def typical_scale(self) -> float:
        """Geometric mean of s over its posterior, which every law has that kept some distance from 0."""
        log_s, log_weights = self.nodes
        return float((log_weights.exp() @ log_s).exp())

    @property
    def rows_at_once(self) -> int:
        """How many rows fit one block of memory, with their predictions at all nodes and their covariances."""
        return max(1, BLOCK_ELEMENTS // max(len(self.nodes[0]) * self.rotated.shape[1], len(self.X)))

    def mean(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m *outputs"]:
        """Return the mean at new inputs, m (n + d) operations an output and no variance.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.

        Returns
        -------
        Tensor of shape (m,) or (m, C)
            Average of the means over the posterior of s. Differentiable in ``X``.
        """
        log_s, log_weights = self.nodes
        gain = log_weights.exp() @ self.likelihood.gains(log_s)
        alpha = self.vectors @ (gain[:, None] * self.rotated).to(self.vectors)
        blocks = [cross_covariance(self.kernel, rows, self.X) @ alpha for rows in self._blocks(X)]
        return self._shape(torch.cat(blocks) + self.constant)

    def variance(self, X: Float[Tensor, "m d"], *, noise: bool = False) -> Float[Tensor, "m *outputs"]:
        """Return the variance at new inputs, the scale averaged over; no covariance of new points is formed.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.
        noise : bool, default=False
            Whether to give that of observations instead of the latent function.

        Returns
        -------
        Tensor of shape (m,) or (m, C)
            It differs between outputs, whose means differ between scales. Differentiable in ``X``.

        Raises
        ------
        ValueError
            If E[s | y] is infinite.

        Warns
        -----
        NumericalWarning
            If a variance is negative beyond rounding; 0 is then returned.
        """
        return self.predictive(X, noise=noise).variance

    def predictive(self, X: Float[Tensor, "m d"], *, noise: bool = True) -> MixturePredictive:
        """Return the law of each row of new observations (``noise=True``) or of the latent function.

        Nothing is computed before the law is asked; it then runs in blocks of rows.
        """
        self._check(X)
        return MixturePredictive(self, X, noise)

    def rotate(self, X: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "m n"], Float[Tensor, " m"]]:
        """Return the rotated cross-covariances q and the prior variances of new rows, m n² operations."""
        prior = self.kernel.diag(X).to(torch.float64)
        rotated = (cross_covariance(self.kernel, X, self.X) @ self.vectors).to(torch.float64)
        # Of a positive semi-definite joint covariance; beyond it there is only rounding.
        bound = (prior.detach().clamp(min=0)[:, None] * self.likelihood.values).sqrt()
        return rotated.clamp(min=-bound, max=bound), prior

    def at_scales(
        self, rotated: Float[Tensor, "m n"], prior: Float[Tensor, " m"], log_s: Float[Tensor, " J"]
    ) -> tuple[Float[Tensor, "m C J"], Float[Tensor, "m J"]]:
        """Return means and variances of the latent function at given scales, O(n) an entry, float64."""
        gains = self.likelihood.gains(log_s)
        means = torch.stack([rotated @ (gains * column).mT for column in self.rotated.unbind(1)], 1)
        explained = rotated.square() @ gains.mT
        value = prior[:, None] - explained
        rounding = 10 * torch.finfo(self.vectors.dtype).eps * len(self.X)
        bad = (value < -rounding * prior[:, None]).any(1).detach()
        if bool(bad.any()):
            worst = (value.detach() / prior.detach()[:, None])[bad].min()
            warn_caller(
                f"{int(bad.sum())} of {len(value)} predictive variances came out negative, down to "
                f"{float(worst):.2g} of the prior variance, and are set to 0: kernel matrix plus noise is too "
                "ill-conditioned; more noise would help.",
                NumericalWarning,
            )
        return means + self.constant.to(means)[:, None], value.clamp(min=0) * log_s.clamp(max=700.0).exp()

    def covariance(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m m *outputs"]:
        """Return the covariance of the latent function, the scale averaged over.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.

        Returns
        -------
        Tensor of shape (m, m) or (m, m, C)
            Mean covariance over the posterior of s, plus the covariance of the means.

        Raises
        ------
        ValueError
            If E[s | y] is infinite.
        """
        self._check(X)
        if self.scale.missing_variance:
            raise ValueError(f"the predictive covariance does not exist: {self.scale.missing_variance}.")
        log_s, log_weights = self.nodes
        rotated, prior = self.rotate(X)
        gains, weights = self.likelihood.gains(log_s), log_weights.exp()
        of_scale = weights * log_s.exp()
        inner = self.kernel(X, X).to(rotated) * of_scale.sum() - (rotated * (of_scale @ gains)) @ rotated.mT
        means, _ = self.at_scales(rotated, prior, log_s)
        spread = (means - (means @ weights)[..., None]) * weights.sqrt()
        total = inner[..., None] + torch.einsum("acj,bcj->abc", spread, spread)
        # One triangle decides, so that the result is symmetric to the last bit.
        total = (total.movedim(-1, 0).tril() + total.movedim(-1, 0).tril(-1).mT).movedim(0, -1).to(X)
        return total[..., 0] if self.single_output else total

    def sample(
        self,
        X: Float[Tensor, "m d"],
        n_samples: int = 1,
        *,
        noise: bool = False,
        generator: "torch.Generator | None" = None,
    ) -> Float[Tensor, "samples m *outputs"]:
        r"""Draw functions jointly over new inputs; rows and outputs of one draw share one s.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.
        n_samples : int, default=1
            Number of draws.
        noise : bool, default=False
            Whether to draw observations instead of the latent function.
        generator : torch.Generator or None, default=None
            Source of randomness, on the device of ``X``.

        Returns
        -------
        Tensor of shape (n_samples, m) or (n_samples, m, C)

        Warns
        -----
        NumericalWarning
            If the covariance needed more jitter than 1e-10 (float32: 1e-6) of the mean prior variance of new
            and training points; that much is added silently where rounding asks for it.

        Notes
        -----
        One factor, m³/3 operations, serves all draws. With :math:`\tau_j^2 = \tau^2 / s_j` and the smallest of
        them :math:`\tau_0^2`, the covariance over s_j is that for :math:`\tau_0^2` plus
        :math:`q^\top \mathrm{diag}[(\tau_j^2 - \tau_0^2) / ((\lambda + \tau_0^2)(\lambda + \tau_j^2))]\, q`: a
        draw from the first plus, at m n operations, one from the second.
        """
        check_integer("n_samples", n_samples, 1)
        self._check(X)
        log_s = self.scale.sample(n_samples, generator=generator).log()
        rotated, prior = self.rotate(X)
        tau = self.likelihood.noise * (-log_s).exp()
        first = log_s.argmax()
        gains = self.likelihood.gains(log_s)
        smallest = gains[first]
        total = self.kernel(X, X).to(rotated) - (rotated * smallest) @ rotated.mT
        total = total.tril() + total.tril(-1).mT
        if noise:
            total.diagonal().add_(tau[first])
        root = self._root(total, prior, X)

        def draw(size: int) -> Tensor:
            shape = (n_samples, size, self.rotated.shape[1])
            return torch.randn(shape, dtype=torch.float64, device=X.device, generator=generator)

        extra = ((tau - tau[first])[:, None] * gains * smallest).clamp(min=0).sqrt()
        sigma = (log_s / 2).exp()[:, None, None]
        inner = gains[..., None] * self.rotated + sigma * extra[..., None] * draw(len(self.X))
        out = torch.einsum("mn,jnc->jmc", rotated, inner) + sigma * torch.einsum("ab,jbc->jac", root, draw(len(X)))
        if noise:
            rest = (self.likelihood.noise - log_s.exp() * tau[first]).clamp(min=0).sqrt()
            out = out + rest[:, None, None] * draw(len(X))
        return self._shape((out + self.constant.to(out)).to(X))

    def _root(self, total: Tensor, prior: Tensor, X: Tensor) -> Tensor:
        # A posterior covariance of nearby or known points is singular to rounding of the prior variances that
        # cancelled in it, so the first jitter, relative to those, is part of the drawing.
        if not len(total):
            return total
        level = 1e-10 if self.X.dtype == torch.float64 else 1e-6
        both = torch.cat([prior, self.kernel.diag(self.X).to(prior)]).mean()
        first = (level * both).clamp(min=torch.finfo(total.dtype).tiny)
        if bool(total.diagonal().abs().mean() < first):
            total.diagonal().add_(first)
        jitter = float(first / total.diagonal().abs().mean())
        return cholesky_or_raise(total, "the posterior covariance", jitter=jitter, points=X.to(total))

    @torch.no_grad()
    def loo(self) -> Float[Tensor, " n"]:
        r"""Return the leave-one-out log density of each training row, jointly over its outputs.

        The hyperparameters, the mean among them, are those of all rows.

        Notes
        -----
        Given s the density of row i follows from :math:`\alpha_i(s)` and the diagonal of the inverse of
        s K + noise I; its reciprocal, averaged over the posterior of s, is that of the mixture. O(n² J) time for J
        nodes; a row that moves the posterior of s beyond its nodes has an integral of its own, O(n) a node.
        """
        log_s, log_weights = self.nodes
        squared = self.vectors.to(torch.float64).square()
        value = torch.empty(len(self.X), dtype=torch.float64, device=self.X.device)
        for rows in torch.arange(len(self.X), device=self.X.device).split(self.rows_at_once):
            density = self._density_of_left_out(rows, squared[rows], log_s)
            terms = log_weights - density
            total = torch.logsumexp(terms, 1)
            value[rows] = -total
            if not isinstance(self.scale, GivenScale):
                continue
            # Every second node gives the same where the rule has converged.
            halves = [torch.logsumexp(log_weights[k::2] - density[:, k::2], 1) for k in (0, 1)]
            settled = is_negligible_at_ends(terms, total) & ((halves[0] - halves[1]).abs() < 1e-9)
            for i in rows[~settled].tolist():
                one = torch.tensor([i], device=self.X.device)
                law = _WithoutRow(self, self.scale.prior, one, squared[one])
                value[i] = -log_integral(law, 0.0, log_s.new_zeros(())).item()
        return value.to(self.vectors.dtype)

    def _density_of_left_out(self, rows: Tensor, squared: Tensor, log_s: Tensor) -> Tensor:
        """Log density of each of some training rows given the others and s, (rows, J)."""
        inverse = 1 / self.likelihood.variances(log_s)
        precision = squared @ inverse.mT
        vectors = self.vectors[rows].to(torch.float64)
        alpha = torch.stack([(vectors * column) @ inverse.mT for column in self.rotated.unbind(1)])
        return gaussian_log_density((alpha / precision).square().sum(0), 1 / precision, len(alpha))

    def _check(self, X: Tensor) -> None:
        check_same_kind(X=X, X_train=self.X)
        if X.ndim != 2 or X.shape[1] != self.X.shape[1]:
            raise ValueError(f"X must have shape (m, {self.X.shape[1]}); got {tuple(X.shape)}.")

    def _blocks(self, X: Tensor) -> Iterator[Tensor]:
        self._check(X)
        yield from X.split(max(16, BLOCK_ELEMENTS // len(self.X)))

    def _shape(self, value: Tensor) -> Tensor:
        return value[..., 0] if self.single_output else value


class _WithoutRow:
    """Density of s given all data, over the density of one row given the others: that of s given the others."""

    def __init__(self, posterior: IndependentPosterior, density: ScaleDensity, row: Tensor, squared: Tensor) -> None:
        self.density, self.posterior, self.row, self.squared = density, posterior, row, squared
        self._reach = density._reach

    def __repr__(self) -> str:
        return f"{self.density!r}, without row {self.row.item()}"

    def _log_prob_u(self, u: Tensor) -> Tensor:
        # Without noise every density is 0 long before s = exp(-300), and would be 0 / 0 below 1e-308.
        flat = u.reshape(-1) if bool(self.density.likelihood.noise > 0) else u.reshape(-1).clamp(min=-300.0)
        removed = self.posterior._density_of_left_out(self.row, self.squared, flat)[0]
        return self.density._log_prob_u(u) - removed.reshape(u.shape)
