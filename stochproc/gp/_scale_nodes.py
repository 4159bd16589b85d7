"""A law of the scale on finitely many values: predictions are then a finite mixture of Gaussians."""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from scipy import optimize, special
from torch import Tensor

from stochproc.gp._scale_evidence import LOG_2PI
from stochproc.gp._scale_law import ScalePosterior

__all__ = ["NodeScale", "node_upper_quantiles"]

BLOCK_ELEMENTS = 2**21


class NodeScale(ScalePosterior):
    """What weights on values of the scale answer; a subclass is a dataclass with the two fields below.

    Attributes
    ----------
    log_s : Tensor of shape (J,)
        Logarithms of the values.
    log_weights : Tensor of shape (J,)
        Their log weights, which sum to one after exp.
    """

    log_s: Float[Tensor, " J"]
    log_weights: Float[Tensor, " J"]

    def log_density(self, quad: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
        """Log density of the mixture; see :meth:`ScalePosterior.log_density`."""
        return self._in_blocks(lambda part: self._log_density_block(part, dim), quad)

    def _log_density_block(self, quad: Tensor, dim: int) -> Tensor:
        return torch.logsumexp(self._log_density_terms(quad, dim), 1)

    def _log_density_terms(self, quad: Tensor, dim: int) -> Tensor:
        return self.log_weights - dim / 2 * (LOG_2PI + self.log_s) - quad[:, None] * (-self.log_s).exp() / 2

    def cdf(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Distribution function of the mixture, absolute error below 1e-15."""
        weights, inverse_sigma = self.log_weights.exp(), (-self.log_s / 2).exp()

        def block(part: Tensor) -> Tensor:
            lower = torch.special.ndtr(-part.abs()[:, None] * inverse_sigma) @ weights
            return torch.where(part > 0, 1 - lower, lower)

        return self._in_blocks(block, z)

    def _in_blocks(self, function: "Callable[[Tensor], Tensor]", value: Tensor) -> Tensor:
        flat = value.to(torch.float64).reshape(-1)
        parts = [function(part) for part in flat.split(max(1, BLOCK_ELEMENTS // len(self.log_s)))]
        return (torch.cat(parts) if parts else flat).reshape(value.shape).to(value.dtype)

    def _upper_quantile(self, p: np.ndarray) -> np.ndarray:
        return node_upper_quantiles(*self._nodes(p.min() if len(p) else 1.0), p)

    def _nodes(self, smallest: float) -> tuple[Tensor, Tensor]:
        return self.log_s, self.log_weights


def node_upper_quantiles(log_s: Tensor, log_weights: Tensor, p: np.ndarray) -> np.ndarray:
    """Solve the mixture's upper tail for each p in (0, 1/2] by Brent's method on log tail against log z."""
    log_sigma = (log_s / 2).detach().cpu().numpy()
    weights = log_weights.detach().exp().cpu().numpy()

    def excess(log_z: float, log_p: float) -> float:
        tail = float(weights @ special.ndtr(-np.exp(np.minimum(log_z - log_sigma, 700.0))))
        return (math.log(tail) if tail > 0 else -800.0) - log_p

    # The density falls away from 0, so tail >= 1/2 - density(0) z: a lower bound of z for every p.
    log_density_0 = special.logsumexp(np.log(weights, where=weights > 0, out=np.full_like(weights, -800.0)) - log_sigma)
    out = np.zeros_like(p)
    for i in np.flatnonzero(p < 0.5):
        log_p = math.log(p[i])
        low = math.log(0.5 - p[i]) - (log_density_0 - LOG_2PI / 2) - 1e-6
        if excess(low, log_p) <= 0:
            # The bound is attained to rounding: p is next to 1/2.
            out[i] = math.exp(low)
            continue
        high, step = low + 1.0, 1.0
        while excess(high, log_p) > 0:
            low, high, step = high, high + step, 2 * step
        log_z = optimize.brentq(excess, low, high, args=(log_p,), xtol=1e-15, rtol=1e-15)
        out[i] = math.exp(log_z)
    return out
