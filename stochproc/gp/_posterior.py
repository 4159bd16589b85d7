"""What every posterior process does once it has a mean and a covariance: predictive laws and joint draws."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_same_kind
from stochproc._warnings import warn_caller
from stochproc.exceptions import NumericalWarning
from stochproc.gp._cross import cross_covariance
from stochproc.gp._predictive import Predictive
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_evidence import log_evidence
from stochproc.gp._scale_posterior import ScalePosterior
from stochproc.solvers import cholesky_or_raise

__all__ = ["Posterior"]


class Posterior:
    """A process given data, y | s ~ N(m, s (K + noise I)); a subclass writes mean, predict and covariance."""

    kernel: Any
    X: Float[Tensor, "n d"]
    alpha: Float[Tensor, "n C"]
    constant: Float[Tensor, " C"]
    noise: Float[Tensor, ""]
    scale: ScalePosterior
    scale_prior: ScalePrior
    single_output: bool

    def mean(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m *outputs"]:
        """Return the location at new inputs."""
        raise NotImplementedError

    def predict(self, X: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "m *outputs"], Float[Tensor, " m"]]:
        """Return location and variance before the scale at new inputs."""
        raise NotImplementedError

    def covariance(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
        """Return the covariance of the latent function before the scale."""
        raise NotImplementedError

    def predictive(self, X: Float[Tensor, "m d"], *, noise: bool = True) -> Predictive:
        """Return the law of each row of new observations (``noise=True``) or of the latent function."""
        mean, variance = self.predict(X)
        return Predictive(mean, variance + self.noise if noise else variance, self.scale)

    def sample(
        self,
        X: Float[Tensor, "m d"],
        n_samples: int = 1,
        *,
        noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "samples m *outputs"]:
        """Draw functions jointly over new inputs; rows and outputs of one draw share one s.

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
        """
        total = self.covariance(X)
        if not len(X):
            return self.scale.sample_joint(self.mean(X), total, n_samples, generator=generator)
        if noise:
            total.diagonal().add_(self.noise)
        # A posterior covariance of nearby or known points is singular to rounding of the prior variances that
        # cancelled in it, so the first jitter, relative to those, is part of the drawing.
        level = 1e-10 if total.dtype == torch.float64 else 1e-6
        prior = torch.cat([self.kernel.diag(X), self.kernel.diag(self.X)]).mean()
        first = (level * prior).clamp(min=torch.finfo(total.dtype).tiny)
        if bool(total.diagonal().abs().mean() < first):
            total.diagonal().add_(first)
        jitter = float(first / total.diagonal().abs().mean())
        root = cholesky_or_raise(total, "the posterior covariance", jitter=jitter, points=X)
        return self.scale.sample_joint(self.mean(X), root, n_samples, generator=generator)

    def _loo(self, precision: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Leave-one-out log densities from the diagonal of the inverse.

        Removing row i leaves S less |alpha_i|² / k_i and log det plus log k_i, so each is a ratio of two evidences.
        """
        n_outputs = self.alpha.shape[1]
        removed = self.alpha.to(torch.float64).square().sum(1) / precision
        n_obs, quad = self.scale.n_obs, self.scale.quad
        # Known to rounding of S, not to more: with 0 a prior with mass near s = 0 would have no proper posterior.
        rest = (quad - removed).clamp(min=torch.finfo(self.X.dtype).eps * quad.item())
        if n_obs == n_outputs:
            rest = torch.zeros_like(rest)
        joint = log_evidence(self.scale_prior, n_obs, quad)
        without = log_evidence(self.scale_prior, n_obs - n_outputs, rest)
        return (joint - without + n_outputs / 2 * precision.log()).to(self.X.dtype)

    def _cross(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
        return cross_covariance(self.kernel, X, self.X)

    def _check_rows(self, X: Tensor) -> None:
        check_same_kind(X=X, X_train=self.X)
        if X.ndim != 2 or X.shape[1] != self.X.shape[1]:
            raise ValueError(f"X must have shape (m, {self.X.shape[1]}); got {tuple(X.shape)}.")

    def _shape(self, product: Tensor) -> Tensor:
        mean = product + self.constant
        return mean[:, 0] if self.single_output else mean

    def _guarded(self, prior: Tensor, value: Tensor, why: str) -> Tensor:
        """Return variances, 0 where they are negative; below -10 eps k(x, x) that is an error, and reported."""
        bad = (value < -10 * torch.finfo(value.dtype).eps * prior).detach()
        if bool(bad.any()):
            worst = (value.detach() / prior.detach())[bad].min()
            warn_caller(
                f"{int(bad.sum())} of {len(value)} predictive variances came out negative, down to "
                f"{float(worst):.2g} of the prior variance, and are set to 0: {why}; more noise would help.",
                NumericalWarning,
            )
        return value.clamp(min=0)
