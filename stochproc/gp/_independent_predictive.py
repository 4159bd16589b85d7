"""Predictive distributions that are mixtures over scales of Gaussians with their own means and variances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_finite, check_same_kind
from stochproc.gp._independent_quantiles import gaussian_tail, mixture_quantile
from stochproc.gp._independent_scale import GivenScale, gaussian_log_density, is_negligible_at_ends
from stochproc.gp._scale_quadrature import log_integral

__all__ = ["MixturePredictive"]


@dataclass(frozen=True)
class MixturePredictive:
    r"""The law of each row of predictions, :math:`\sum_j w_j N(\mu_j, v_j)` over the nodes of the scale.

    The outputs of a row share the scale, so they are not independent. Every method runs in blocks of rows, so that
    memory does not grow with their number; it computes the cross-covariances of the rows, n² operations a row.

    Parameters
    ----------
    posterior : IndependentPosterior
        The process given data.
    X : Tensor of shape (m, d)
        New inputs.
    noise : bool
        Whether rows are observations rather than values of the latent function.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import IndependentNoiseGP
    >>> from stochproc.kernels import RBF
    >>> X = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    >>> law = IndependentNoiseGP(RBF(0.3), noise=0.01).condition(X, torch.sin(6 * X[:, 0])).predictive(X[:2])
    >>> law.quantile([0.05, 0.95]).shape
    torch.Size([2, 2])
    """

    posterior: Any
    X: Float[Tensor, "m d"]
    noise: bool

    @property
    def mean(self) -> Float[Tensor, "m *outputs"]:
        """Mean of each entry.

        Raises
        ------
        ValueError
            If it does not exist: E[sqrt(s) | y] is infinite; ``quantile(0.5)`` always does.
        """
        if not self.posterior.scale.has_location:
            raise ValueError("the predictive mean does not exist; use quantile(0.5) (predict_quantiles).")
        return self.posterior.mean(self.X)

    @property
    def variance(self) -> Float[Tensor, "m *outputs"]:
        """Variance of each entry: mean of the variances over the scale plus variance of the means.

        Raises
        ------
        ValueError
            If it does not exist: E[s | y] is infinite.
        """
        if self.posterior.scale.missing_variance:
            raise ValueError(
                f"the predictive variance does not exist: {self.posterior.scale.missing_variance}; use quantile "
                "(predict_quantiles), which always exists."
            )
        weights = self.posterior.nodes[1].exp()

        def block(rotated: Tensor, prior: Tensor) -> Tensor:
            means, variances = self._at(rotated, prior, self.posterior.nodes[0])
            spread = (means - (means @ weights)[..., None]).square()
            return (spread + variances[:, None]) @ weights

        return self.posterior._shape(self._in_blocks(block)).to(self.X.dtype)

    @property
    def std(self) -> Float[Tensor, "m *outputs"]:
        """Standard deviation of each entry; raises as ``variance`` does."""
        return self.variance.sqrt()

    def log_prob(self, y: Float[Tensor, "m *outputs"]) -> Float[Tensor, " m"]:
        """Log density of each row, jointly over its outputs, in nats.

        Parameters
        ----------
        y : Tensor of shape (m,) or (m, C)
            Finite. Where the variance is zero the density is inf at the mean and -inf elsewhere.

        Notes
        -----
        A row that would move the posterior of s beyond its nodes has an integral of its own.
        """
        log_s, log_weights = self.posterior.nodes

        def block(rotated: Tensor, prior: Tensor, value: Tensor) -> Tensor:
            density, known, hit = self._density(rotated, prior, value, log_s)
            terms = log_weights + density
            total = torch.logsumexp(terms, 1)
            if isinstance(self.posterior.scale, GivenScale):
                beyond = ~is_negligible_at_ends(terms, total) & ~known
                for i in beyond.nonzero()[:, 0].tolist():
                    row = slice(i, i + 1)
                    law = _WithRow(self, self.posterior.scale.prior, rotated[row], prior[row], value[row])
                    total = torch.cat([total[:i], log_integral(law, 0.0, log_s.new_zeros(1)), total[i + 1 :]])
            at_point = torch.where(hit, torch.inf, -torch.inf).to(total)
            return torch.where(known, at_point, total)

        return self._in_blocks(block, self._columns(y)).to(self.X.dtype)

    def cdf(self, y: Float[Tensor, "m *outputs"]) -> Float[Tensor, "m *outputs"]:
        """Distribution function of each entry at ``y``, to 1e-12 of itself; a step at zero variance."""
        log_s, log_weights = self.posterior.nodes
        weights = log_weights.exp()

        def block(rotated: Tensor, prior: Tensor, value: Tensor) -> Tensor:
            means, variances = self._at(rotated, prior, log_s)
            deviation, sigma = value[..., None] - means, variances.sqrt()[:, None].expand_as(means)
            known = sigma == 0
            inside = gaussian_tail(-deviation / torch.where(known, torch.ones_like(sigma), sigma))
            return torch.where(known, (deviation >= 0).to(inside), inside) @ weights

        return self.posterior._shape(self._in_blocks(block, self._columns(y))).to(self.X.dtype)

    def quantile(self, q: float | Sequence[float] | Float[Tensor, "*levels"]) -> Float[Tensor, "..."]:
        """Quantiles of each entry; they exist for every law of s.

        Parameters
        ----------
        q : float, sequence of float or Tensor
            Probabilities strictly between 0 and 1.

        Returns
        -------
        Tensor of shape (*shape, *q.shape)
            With the shape (m,) or (m, C) of ``mean``; one more axis for a sequence of q.

        Raises
        ------
        ValueError
            If a probability is not inside (0, 1).

        Notes
        -----
        Each is solved to 1e-13 of the probability of the smaller tail. Nodes of the scale that are left out have a
        probability of 1e-20, so tails are exact to ten digits down to 1e-10. Quantiles do not decrease in q.
        """
        level = torch.as_tensor(q, dtype=torch.float64, device=self.X.device)
        flat = level.reshape(-1)
        good = (flat > 0) & (flat < 1)
        if not bool(good.all()):
            raise ValueError(f"q must lie strictly between 0 and 1; got {flat[~good][0].item()}.")
        log_s, log_weights = self.posterior.nodes
        weights = log_weights.exp()
        order = flat.argsort()

        def block(rotated: Tensor, prior: Tensor) -> Tensor:
            means, variances = self._at(rotated, prior, log_s)
            m, outputs, n_nodes = means.shape
            loc = means.reshape(-1, n_nodes)
            sigma = variances.sqrt()[:, None].expand_as(means).reshape(-1, n_nodes)
            found = [mixture_quantile(weights, loc, sigma, p.expand(len(loc))) for p in flat[order]]
            # Two levels closer than the tolerance must not come out in the wrong order.
            sorted_ = torch.stack(found, -1).cummax(-1).values if len(found) else loc.new_zeros(len(loc), 0)
            out = torch.empty_like(sorted_)
            out[:, order] = sorted_
            return out.reshape(m, outputs, len(flat))

        found = self._in_blocks(block)
        found = found[:, 0] if self.posterior.single_output else found
        return found.reshape(*found.shape[:-1], *level.shape).to(self.X.dtype)

    def _at(self, rotated: Tensor, prior: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
        """Means (rows, C, J) and variances (rows, J) at given scales."""
        means, variances = self.posterior.at_scales(rotated, prior, log_s)
        return means, variances + self.posterior.likelihood.noise if self.noise else variances

    def _density(self, rotated: Tensor, prior: Tensor, value: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log density of rows given each scale, which rows are known exactly, and whether ``value`` is that."""
        means, variances = self._at(rotated, prior, log_s)
        square = (value[..., None] - means).square().sum(1)
        known = (variances == 0).all(1)
        safe = variances.clamp(min=torch.finfo(variances.dtype).tiny)
        return gaussian_log_density(square, safe, value.shape[1]), known, (square == 0).all(1)

    def _in_blocks(self, function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
        rows = self.posterior.rows_at_once
        parts = [
            function(*self.posterior.rotate(x), *rest)
            for x, *rest in zip(self.X.split(rows), *(c.split(rows) for c in columns), strict=True)
        ]
        return torch.cat(parts)

    def _columns(self, y: Tensor) -> Tensor:
        check_same_kind(y=y, X=self.X)
        shape = (len(self.X),) if self.posterior.single_output else (len(self.X), len(self.posterior.constant))
        if y.shape != shape:
            raise ValueError(f"y must have shape {tuple(shape)}; got {tuple(y.shape)}.")
        check_finite("y", y)
        return y.reshape(len(self.X), len(self.posterior.constant)).to(torch.float64)


class _WithRow:
    """Density of s given all data times that of one new row."""

    def __init__(self, law: MixturePredictive, density: Any, rotated: Tensor, prior: Tensor, value: Tensor) -> None:
        self.law, self.density, self.row = law, density, (rotated, prior, value)
        self._reach = density._reach

    def __repr__(self) -> str:
        return f"{self.density!r} and one new row"

    def _log_prob_u(self, u: Tensor) -> Tensor:
        given = self.law._density(*self.row, u.reshape(-1))[0][0]
        return self.density._log_prob_u(u) + given.reshape(u.shape)
