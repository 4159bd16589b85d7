"""The posterior of the scale where the noise is outside it: weights on nodes, by quadrature."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._warnings import warn_caller
from stochproc.exceptions import NumericalWarning
from stochproc.gp._independent_spectrum import ScaleDensity, SpectralLikelihood
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_evidence import LOG_2PI
from stochproc.gp._scale_posterior import MixtureScale, PointScale, ScalePosterior
from stochproc.gp._scale_quadrature import (
    DEPTH,
    FIRST_INTERVALS,
    LAST_INTERVALS,
    TOLERANCE,
    ScaleNodes,
    find_range,
    log_integral,
    log_terms,
)

__all__ = ["GivenScale", "gaussian_log_density", "given_scale", "is_negligible_at_ends"]

# Nodes that matter to no mean, variance, density or quantile down to probabilities of 1e-10.
LEAST_LOG_WEIGHT = math.log(1e-20)
# A density at the ends of the nodes that is exp(-35) = 6e-16 of the sum has no mass beyond them.
END_WEIGHT = 35.0
# Where the slope of the left tail is read off.
FAR_LEFT = (-690.0, -640.0)


@dataclass(frozen=True)
class GivenScale(MixtureScale):
    """The posterior of the scale as weights on nodes, for noise outside the scale.

    Parameters
    ----------
    n_obs : int
        0: what the data say is part of ``prior``.
    quad : Tensor, 0-dim
        0, likewise.
    prior : ScaleDensity
        The normalised density of s given the data.
    log_s : Tensor of shape (J,)
        Logarithms of the nodes.
    log_weights : Tensor of shape (J,)
        Their log weights, which sum to one after exp. Nodes of weight below 1e-20 of the largest are left out,
        unless they carry that share of the mean of s.
    """

    @property
    def mean(self) -> "float | int":
        """E[s | y], inf where it does not exist or lies beyond the floating-point range."""
        try:
            return super().mean
        except ValueError:
            return math.inf

    @property
    def inverse_mean(self) -> "float | int":
        """E[1/s | y]; inf for a prior with too much mass at s = 0, where noise alone explains the data."""
        far = self.log_s.new_tensor(FAR_LEFT)
        with torch.no_grad():
            value = self.prior._log_prob_u(far)
            slope = ((value[1] - value[0]) / (far[1] - far[0])).item()
            if bool(value.isfinite().all()) and slope <= 1 + 1e-9:
                return math.inf
            zero = self.log_s.new_zeros(())
            return math.exp(min((log_integral(self.prior, 1.0, zero)).item(), 709.0))


def given_scale(prior: ScalePrior, likelihood: SpectralLikelihood) -> tuple[ScalePosterior, float]:
    """Return the posterior of the scale and the logarithm of the evidence.

    Warns
    -----
    NumericalWarning
        If the quadrature has not converged to 1e-12.
    """
    zero = likelihood.noise.new_zeros(())
    if prior._conjugate == "point":
        log_value = zero + math.log(prior.mean)
        at = likelihood(log_value.reshape(1))
        quad = prior.mean * (likelihood.squares / likelihood.variances(log_value.reshape(1))[0]).sum()
        n_obs = likelihood.n_outputs * len(likelihood.values)
        return PointScale(n_obs, quad, float(prior.mean)), at.item()
    orders, nodes, terms = _converged_nodes(ScaleDensity(prior, likelihood))
    log_evidence = torch.logsumexp(terms, 0)
    log_s, log_weights = nodes.log_s[0], terms - log_evidence
    kept = torch.zeros_like(log_s, dtype=torch.bool)
    # Both ends of what is kept matter to the weights or to the mean of s, which the variance is made of.
    for order in orders:
        share = log_weights + order * log_s
        kept |= share > share.max() + LEAST_LOG_WEIGHT
    density = ScaleDensity(prior, likelihood, log_evidence.item())
    return GivenScale(0, zero, density, log_s[kept], log_weights[kept]), log_evidence.item()


def _converged_nodes(density: ScaleDensity) -> tuple[list[float], ScaleNodes, Tensor]:
    """Nodes and logarithms of the terms at which the density and, if it has a mean, s times it have converged."""
    zero = density.likelihood.noise.new_zeros(1)
    low, centre, high = find_range(density, 0.0, zero, DEPTH)
    orders = [0.0]
    if density.tail_index > 1 + 1e-9:
        try:
            high = torch.maximum(high, find_range(density, -1.0, zero, DEPTH)[2])
            orders.append(1.0)
        except ValueError:
            # The mean exists, but not within the range of floating-point numbers.
            pass
    rounding = TOLERANCE + 8 * torch.finfo(torch.float64).eps * (1 + density.likelihood(centre).abs().item())
    intervals, before = FIRST_INTERVALS // 2, None
    while True:
        t = torch.linspace(0, 1, intervals + 1, dtype=low.dtype, device=low.device)
        offset = (low - centre)[:, None] + (high - low)[:, None] * t
        nodes = ScaleNodes(centre[:, None], offset, ((high - low) / intervals).log()[:, None])
        terms = log_terms(density, 0.0, zero, nodes)
        now = torch.stack([torch.logsumexp(terms + k * offset, 1) for k in orders])
        change = math.inf if before is None else (now - before).abs().max().item()
        if change > rounding and intervals == LAST_INTERVALS:
            warn_caller(
                f"the integral over the scale has not converged with {intervals + 1} nodes: two levels differ by "
                f"{change:.1e} in its logarithm.",
                NumericalWarning,
            )
        if change <= rounding or intervals == LAST_INTERVALS:
            return orders, nodes, terms[0]
        intervals, before = 2 * intervals, now


def is_negligible_at_ends(terms: Float[Tensor, "*batch J"], total: Float[Tensor, "*batch"]) -> Tensor:
    """Whether the logarithms of the terms of a rule fall off towards both ends, so that nothing lies beyond."""
    return torch.maximum(terms[..., 0], terms[..., -1]) < total - END_WEIGHT


def gaussian_log_density(square: Tensor, variance: Tensor, n_outputs: int) -> Tensor:
    """Log density of ``n_outputs`` independent Gaussian deviations with square sum ``square``."""
    return -(n_outputs * (LOG_2PI + variance.log()) + square / variance) / 2
