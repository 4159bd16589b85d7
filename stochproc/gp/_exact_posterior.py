"""The exact posterior process: predictions in blocks of rows from one Cholesky factor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.gp._posterior import Posterior
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_evidence import log_evidence
from stochproc.gp._scale_posterior import ScalePosterior

__all__ = ["ExactPosterior"]

# Entries of one block of the cross-covariance: 4 MiB in float64.
BLOCK_ELEMENTS = 2**19


@dataclass(frozen=True)
class ExactPosterior(Posterior):
    r"""The process given data; ``ScaleMixtureGP.condition`` makes it.

    Parameters
    ----------
    kernel : torch.nn.Module
        A copy of the kernel.
    X : Tensor of shape (n, d)
        Training inputs.
    factor : Tensor of shape (n, n)
        Lower Cholesky factor of the kernel matrix plus noise.
    alpha : Tensor of shape (n, C)
        :math:`K_n^{-1}(y - m)`.
    constant : Tensor of shape (C,)
        Prior mean.
    noise : Tensor, 0-dim
        Noise variance relative to s.
    scale : ScalePosterior
        The law of s given the data.
    scale_prior : ScalePrior
        A copy of the prior of s.
    single_output : bool
        Whether y was given as (n,), so that predictions are too.
    """

    kernel: Any
    X: Float[Tensor, "n d"]
    factor: Float[Tensor, "n n"]
    alpha: Float[Tensor, "n C"]
    constant: Float[Tensor, " C"]
    noise: Float[Tensor, ""]
    scale: ScalePosterior
    scale_prior: ScalePrior
    single_output: bool

    @property
    def log_marginal_likelihood(self) -> float:
        """Return log p(y) of the data conditioned on, in nats; O(n) from the factor."""
        logdet = 2 * self.factor.diagonal().to(torch.float64).log().sum()
        evidence = log_evidence(self.scale_prior, self.scale.n_obs, self.scale.quad)
        return (evidence - self.alpha.shape[1] / 2 * logdet).item()

    def mean(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m *outputs"]:
        """Return the location at new inputs, m (n + d) operations an output and no variance.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.

        Returns
        -------
        Tensor of shape (m,) or (m, C)
            Mean where it exists, median always. Differentiable in ``X``.
        """
        return self._shape(torch.cat([self._cross(rows) @ self.alpha for rows in self._blocks(X)]))

    def variance(self, X: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """Return the variance of the latent function before the scale; no covariance of new points is formed.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.

        Returns
        -------
        Tensor of shape (m,)
            Multiply by s, or by ``scale.mean`` for the variance of the function. Differentiable in ``X``.

        Warns
        -----
        NumericalWarning
            If a variance is below -10 eps k(x, x): the factor is then too ill-conditioned for it, and 0 is
            returned.
        """
        return self._positive([self._variance_block(rows, self._cross(rows)) for rows in self._blocks(X)])

    def predict(self, X: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "m *outputs"], Float[Tensor, " m"]]:
        """Return ``mean`` and ``variance`` at new inputs, sharing the cross-covariance.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.
        """
        means, variances = [], []
        for rows in self._blocks(X):
            cross = self._cross(rows)
            means.append(cross @ self.alpha)
            variances.append(self._variance_block(rows, cross))
        return self._shape(torch.cat(means)), self._positive(variances)

    def covariance(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
        """Return the covariance of the latent function before the scale, (m, m).

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.
        """
        half = self._whiten(self._cross(X))
        total = self.kernel(X, X) - half @ half.mT
        # One triangle decides, so that the result is symmetric to the last bit.
        return total.tril() + total.tril(-1).mT

    @torch.no_grad()
    def loo(self) -> Float[Tensor, " n"]:
        """Return the leave-one-out log density of each training row, jointly over its outputs.

        The hyperparameters, the mean among them, are those of all rows.

        Notes
        -----
        With :math:`k_i = (K_n^{-1})_{ii}` removing row i leaves S less :math:`|\\alpha_i|^2/k_i` and log det
        plus log k_i, so that each density is a ratio of two evidences; 2n³/3 operations.
        """
        return self._loo(torch.cholesky_inverse(self.factor).diagonal().to(torch.float64))

    def _blocks(self, X: Tensor) -> Iterator[Tensor]:
        self._check_rows(X)
        yield from X.split(max(16, BLOCK_ELEMENTS // len(self.X)))

    def _whiten(self, cross: Tensor) -> Tensor:
        """Rows L⁻¹ k of a block (m, n)."""
        return torch.linalg.solve_triangular(self.factor.mT, cross, upper=True, left=False)

    def _variance_block(self, rows: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        prior = self.kernel.diag(rows)
        return prior, prior - self._whiten(cross).square().sum(1)

    def _positive(self, blocks: list[tuple[Tensor, Tensor]]) -> Tensor:
        prior, value = (torch.cat(part) for part in zip(*blocks, strict=True))
        return self._guarded(prior, value, "kernel matrix plus noise is too ill-conditioned")
