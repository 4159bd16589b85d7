"""Predictive distributions of a scale mixture: location, variance before the scale, and a law of the scale."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_finite, check_same_kind
from stochproc.gp._scale_posterior import ScalePosterior

__all__ = ["Predictive"]

# Largest square sum that the integrals over the scale take.
LARGEST_QUAD = 1e300


@dataclass(frozen=True)
class Predictive:
    r"""The law of each row of predictions: given s, N(loc, s variance) for each of its C outputs.

    The outputs of a row share s, so they are uncorrelated but not independent. Joint draws over rows need their
    covariance: see ``ScalePosterior.sample_joint``.

    Parameters
    ----------
    loc : Tensor of shape (n,) or (n, C)
        Location; the mean where it exists, and always the median.
    variance_before_scale : Tensor of shape (n,)
        Variance divided by s, non-negative, with or without the noise.
    scale : ScalePosterior
        The law of s.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import InverseGamma, Predictive, scale_posterior
    >>> scale = scale_posterior(InverseGamma(2.0, 2.0), n_obs=1, quad=torch.tensor(3.0, dtype=torch.float64))
    >>> row = Predictive(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), scale)
    >>> scale.df, row.quantile([0.05, 0.95])
    (5.0, tensor([[-2.3842,  2.3842]], dtype=torch.float64))
    """

    loc: Float[Tensor, "n *outputs"]
    variance_before_scale: Float[Tensor, " n"]
    scale: ScalePosterior

    def __post_init__(self) -> None:
        loc, v = self.loc, self.variance_before_scale
        check_same_kind(loc=loc, variance_before_scale=v)
        if loc.ndim not in (1, 2) or v.shape != loc.shape[:1]:
            raise ValueError(
                "loc must have shape (n,) or (n, C) and variance_before_scale (n,); got "
                f"{tuple(loc.shape)} and {tuple(v.shape)}."
            )
        check_finite("loc", loc)
        if not bool((v >= 0).all()):
            raise ValueError(f"variance_before_scale must be non-negative; got {v.min().item()}.")

    @property
    def mean(self) -> Float[Tensor, "n *outputs"]:
        """Mean of each entry.

        Raises
        ------
        ValueError
            If it does not exist (Student-t with df <= 1); ``quantile(0.5)`` always does.
        """
        if not self.scale.has_location:
            raise ValueError("the predictive mean does not exist; use quantile(0.5) (predict_quantiles).")
        return self.loc

    @property
    def variance(self) -> Float[Tensor, "n *outputs"]:
        """Variance of each entry, E[s | y] times the variance before the scale.

        Raises
        ------
        ValueError
            If it does not exist: Student-t with df <= 2, or E[s | y] infinite.
        """
        if self.scale.missing_variance:
            raise ValueError(
                f"the predictive variance does not exist: {self.scale.missing_variance}; use quantile "
                "(predict_quantiles), which always exists."
            )
        return (self.scale.mean * self._per_entry()).expand(self.loc.shape)

    @property
    def std(self) -> Float[Tensor, "n *outputs"]:
        """Standard deviation of each entry; raises as ``variance`` does."""
        return self.variance.sqrt()

    def log_prob(self, y: Float[Tensor, "n *outputs"]) -> Float[Tensor, " n"]:
        """Log density of each row, jointly over its outputs, in nats.

        Parameters
        ----------
        y : Tensor of the shape of ``loc``
            Finite. Where the variance is zero the density is inf at ``loc`` and -inf elsewhere.

        Raises
        ------
        ValueError
            If a row is so far from ``loc`` that the square of its distance overflows.
        """
        # In float64, whose squares reach as far as the values of float32 do.
        residual = self._residual(y).to(torch.float64)
        v = self.variance_before_scale.to(torch.float64)
        dim = 1 if residual.ndim == 1 else residual.shape[1]
        known = v == 0
        safe = torch.where(known, torch.ones_like(v), v)
        square = residual.square() if residual.ndim == 1 else residual.square().sum(1)
        quad = square / safe
        far = (quad > LARGEST_QUAD) & ~known
        if bool(far.any()):
            raise ValueError(
                "y must lie within some 1e150 standard deviations of its prediction, so that squares fit; got "
                f"{y[far].abs().max().item():.3g}."
            )
        value = self.scale.log_density(quad, dim) - dim / 2 * safe.log()
        at_point = torch.where(square == 0, torch.inf, -torch.inf).to(value)
        return torch.where(known, at_point, value).to(self.loc.dtype)

    def cdf(self, y: Float[Tensor, "n *outputs"]) -> Float[Tensor, "n *outputs"]:
        """Distribution function of each entry at ``y``; a step where the variance is zero."""
        residual, sigma = self._residual(y), self._per_entry().sqrt()
        known = sigma == 0
        value = self.scale.cdf(residual / torch.where(known, torch.ones_like(sigma), sigma))
        return torch.where(known, (residual >= 0).to(value), value)

    def quantile(self, q: "float | Sequence[float] | Float[Tensor, '*levels']") -> Float[Tensor, "..."]:
        """Quantiles of each entry; they exist for every law of s.

        Parameters
        ----------
        q : float, sequence of float or Tensor
            Probabilities strictly between 0 and 1.

        Returns
        -------
        Tensor of shape (*loc.shape, *q.shape)
            One more axis for a sequence of q.

        Raises
        ------
        ValueError
            If a probability is not inside (0, 1).

        Notes
        -----
        The standardised quantile is solved once a probability, whatever the number of rows, to 1e-10 in
        probability or better; quantiles are symmetric about ``loc``.
        """
        level = torch.as_tensor(q, dtype=torch.float64, device=self.loc.device)
        z = self.scale.quantile(level).to(self.loc.dtype)
        extra = [1] * level.ndim
        sigma = self._per_entry().sqrt().expand(self.loc.shape).reshape(*self.loc.shape, *extra)
        return self.loc.reshape(*self.loc.shape, *extra) + sigma * z

    def _residual(self, y: Tensor) -> Tensor:
        check_same_kind(y=y, loc=self.loc)
        if y.shape != self.loc.shape:
            raise ValueError(f"y must have shape {tuple(self.loc.shape)}; got {tuple(y.shape)}.")
        check_finite("y", y)
        return y - self.loc

    def _per_entry(self) -> Tensor:
        """Variance before the scale with an axis for the outputs."""
        v = self.variance_before_scale
        return v if self.loc.ndim == 1 else v[:, None]
