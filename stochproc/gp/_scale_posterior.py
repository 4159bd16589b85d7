r"""The posterior of the scale, and the standardised predictive law that it implies.

Densities here are those of m further scalars that, given s, are N(0, s I); location, covariance and its
determinant belong to ``Predictive``.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import optimize, special
from torch import Tensor

from stochproc._checks import check_integer
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_evidence import LOG_2PI, check_quad, inverse_gamma_evidence
from stochproc.gp._scale_quadrature import DEPTH, log_integral, log_terms, place_nodes, sample_log_scale

__all__ = [
    "InverseGammaScale",
    "MixtureScale",
    "PointScale",
    "ScalePosterior",
    "scale_posterior",
]

# Node weights beyond the ends of the range are negligible where those at the ends are: exp(-35) = 6e-16.
END_WEIGHT = 35.0
# Below this probability quantiles get nodes of their own, which reach further out.
FAR_TAIL = 1e-8
BLOCK_ELEMENTS = 2**21


@dataclass(frozen=True)
class ScalePosterior:
    """The posterior of the scale s = sigma², and what it does to predictions.

    ``scale_posterior`` makes one of three kinds: ``PointScale``, ``InverseGammaScale`` or ``MixtureScale``.

    Parameters
    ----------
    n_obs : int
        Number of observed scalars N.
    quad : Tensor, 0-dim, float64
        Their whitened square sum S.
    """

    n_obs: int
    quad: Float[Tensor, ""]

    @property
    def df(self) -> "float | None":
        """Degrees of freedom where the predictive law is Student-t (inf for Gaussian), else None."""
        return None

    @property
    def mean(self) -> "float | int":
        """E[s | y], inf where it does not exist."""
        raise NotImplementedError

    @property
    def inverse_mean(self) -> "float | int":
        """E[1/s | y]: the weight of the data term in the gradient of log p(y)."""
        raise NotImplementedError

    @property
    def has_location(self) -> bool:
        """Whether predictions have a mean: E[sqrt(s) | y] is finite."""
        return True

    @property
    def missing_variance(self) -> str:
        """Why predictions have no variance, in words; empty where they have one."""
        return "" if math.isfinite(self.mean) else "E[s | y] is infinite"

    def sample(self, n_samples: int, *, generator: "torch.Generator | None" = None) -> Float[Tensor, " n"]:
        """Draw s given y; float64, on the device of ``quad``."""
        raise NotImplementedError

    def log_density(self, quad: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
        """Log joint density, given y, of ``dim`` scalars that are N(0, s) given s, with square sum ``quad``."""
        raise NotImplementedError

    def cdf(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Distribution function of one such scalar."""
        raise NotImplementedError

    def quantile(self, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Quantiles of one such scalar at probabilities inside (0, 1); odd about q = 1/2."""
        flat = q.detach().to(torch.float64).reshape(-1).cpu()
        if not bool(((flat > 0) & (flat < 1)).all()):
            bad = flat[~((flat > 0) & (flat < 1))][0].item()
            raise ValueError(f"q must lie strictly between 0 and 1; got {bad}.")
        lower = flat.minimum(1 - flat)
        z = self._upper_quantile(lower.numpy())
        signed = torch.as_tensor(z, dtype=torch.float64) * (flat - 0.5).sign()
        return signed.reshape(q.shape).to(q.device)

    def _upper_quantile(self, p: np.ndarray) -> np.ndarray:
        """Return the z >= 0 with P(scalar > z) = p for p in (0, 1/2]."""
        raise NotImplementedError

    def sample_joint(
        self,
        loc: Float[Tensor, "n *outputs"],
        factor: Float[Tensor, "n n"],
        n_samples: int = 1,
        *,
        generator: "torch.Generator | None" = None,
    ) -> Float[Tensor, "samples n *outputs"]:
        """Draw functions: rows and outputs of one draw share one s.

        Parameters
        ----------
        loc : Tensor of shape (n,) or (n, C)
            Location.
        factor : Tensor of shape (n, n)
            Any square root L of the covariance before the scale, L Lᵀ.
        n_samples : int, default=1
            Number of draws.
        generator : torch.Generator or None, default=None
            Source of randomness, on the device of ``loc``.

        Returns
        -------
        Tensor of shape (n_samples, n) or (n_samples, n, C)
        """
        check_integer("n_samples", n_samples, 1)
        sigma = self.sample(n_samples, generator=generator).sqrt().to(loc)
        noise = torch.randn(n_samples, *loc.shape, dtype=loc.dtype, device=loc.device, generator=generator)
        noise = noise * sigma.reshape(-1, *[1] * loc.ndim)
        return loc + torch.einsum("ij,sj...->si...", factor, noise)


@dataclass(frozen=True)
class PointScale(ScalePosterior):
    """The scale is known: predictions are Gaussian."""

    value: float

    @property
    def df(self) -> "float | None":
        """Infinite: the predictive law is Gaussian."""
        return math.inf

    @property
    def mean(self) -> "float | int":
        """The value."""
        return self.value

    @property
    def inverse_mean(self) -> "float | int":
        """One over the value."""
        return 1 / self.value

    def sample(self, n_samples: int, *, generator: "torch.Generator | None" = None) -> Float[Tensor, " n"]:
        """Return the value ``n_samples`` times."""
        return self.quad.new_full((n_samples,), self.value)

    def log_density(self, quad: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
        """Gaussian log density; see :meth:`ScalePosterior.log_density`."""
        return -dim / 2 * (LOG_2PI + math.log(self.value)) - quad / (2 * self.value)

    def cdf(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Gaussian distribution function."""
        return torch.special.ndtr(z / math.sqrt(self.value))

    def _upper_quantile(self, p: np.ndarray) -> np.ndarray:
        return -special.ndtri(p) * math.sqrt(self.value)


@dataclass(frozen=True)
class InverseGammaScale(ScalePosterior):
    """The scale is InverseGamma(a, b) given y: predictions are Student-t with 2a degrees of freedom."""

    a: float
    b: float

    @property
    def df(self) -> "float | None":
        """Degrees of freedom, 2a = 2 a_prior + N."""
        return 2 * self.a

    @property
    def mean(self) -> "float | int":
        """b/(a - 1), inf for a <= 1."""
        return self.b / (self.a - 1) if self.a > 1 else math.inf

    @property
    def inverse_mean(self) -> "float | int":
        """The ratio a/b."""
        return self.a / self.b

    @property
    def has_location(self) -> bool:
        """Whether df > 1."""
        return self.a > 0.5

    @property
    def missing_variance(self) -> str:
        """Why predictions have no variance, in words; empty where they have one."""
        return "" if self.a > 1 else f"the predictive law is Student-t with df = {2 * self.a:g} <= 2"

    def sample(self, n_samples: int, *, generator: "torch.Generator | None" = None) -> Float[Tensor, " n"]:
        """Draw by inversion of the gamma distribution function."""
        like = self.quad
        uniform = torch.rand(n_samples, dtype=like.dtype, device=like.device, generator=generator)
        gamma = special.gammaincinv(self.a, uniform.clamp(min=2.0**-54).cpu().numpy())
        return self.b / torch.as_tensor(gamma, dtype=like.dtype, device=like.device)

    def log_density(self, quad: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
        """Multivariate Student-t log density; see :meth:`ScalePosterior.log_density`."""
        log_a, log_b = (quad.new_tensor(math.log(v), dtype=torch.float64) for v in (self.a, self.b))
        return inverse_gamma_evidence(log_a, log_b, dim / 2, quad.to(torch.float64)).to(quad.dtype)

    def cdf(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Student-t distribution function."""
        t = (z / math.sqrt(self.b / self.a)).detach().to(torch.float64).cpu().numpy()
        return torch.as_tensor(special.stdtr(2 * self.a, t)).to(z)

    def _upper_quantile(self, p: np.ndarray) -> np.ndarray:
        df = 2 * self.a
        t = -special.stdtrit(df, p)
        # Far out (1e-300 with df = 5) it gives -inf; the beta quantile, less exact elsewhere, does not.
        lost = (p < 0.5) & ~((t > 0) & np.isfinite(t))
        x = special.betaincinv(self.a, 0.5, 2 * p[lost])
        t[lost] = np.sqrt(df * (1 - x) / x)
        return t * math.sqrt(self.b / self.a)


@dataclass(frozen=True)
class MixtureScale(ScalePosterior):
    """The posterior of the scale as weights on nodes: predictions are a finite mixture of Gaussians.

    Parameters
    ----------
    prior : ScalePrior
        A copy of the prior; moments and far tails are integrals of their own.
    log_s : Tensor of shape (J,)
        Logarithms of the nodes.
    log_weights : Tensor of shape (J,)
        Their log weights, which sum to one after exp.
    """

    prior: Any
    log_s: Float[Tensor, " J"]
    log_weights: Float[Tensor, " J"]

    def _log_moment(self, order: "float | int") -> float:
        terms = self.log_weights + order * self.log_s
        value = torch.logsumexp(terms, 0)
        if max(terms[0].item(), terms[-1].item()) < value.item() - END_WEIGHT:
            return value.item()
        # The moment has its mass elsewhere than the posterior: a tail of few data.
        half = self.n_obs / 2
        with torch.no_grad():
            ratio = log_integral(self.prior, half - order, self.quad) - log_integral(self.prior, half, self.quad)
        return ratio.item()

    @property
    def mean(self) -> "float | int":
        """E[s | y], inf unless tail_index + N/2 > 1."""
        if self.prior.tail_index + self.n_obs / 2 <= 1 + 1e-9:
            return math.inf
        return math.exp(min(self._log_moment(1), 709.0))

    @property
    def inverse_mean(self) -> "float | int":
        """E[1/s | y]."""
        return math.exp(min(self._log_moment(-1), 709.0))

    @property
    def has_location(self) -> bool:
        """Whether tail_index + N/2 > 1/2."""
        return self.prior.tail_index + self.n_obs / 2 > 0.5 + 1e-9

    def sample(self, n_samples: int, *, generator: "torch.Generator | None" = None) -> Float[Tensor, " n"]:
        """Draw by inversion of the distribution function on 4097 nodes of log s; exact to about 1e-5."""
        return sample_log_scale(self.prior, self.n_obs / 2, self.quad, n_samples, generator).exp()

    def log_density(self, quad: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
        """Log density of the mixture; an outlier beyond the range of the nodes gets an integral of its own."""
        return self._in_blocks(lambda part: self._log_density_block(part, dim), quad)

    def _log_density_block(self, quad: Tensor, dim: int) -> Tensor:
        terms = self.log_weights - dim / 2 * (LOG_2PI + self.log_s) - quad[:, None] * (-self.log_s).exp() / 2
        value = torch.logsumexp(terms, 1)
        outside = torch.maximum(terms[:, 0], terms[:, -1]) >= value - END_WEIGHT
        if not bool(outside.any()):
            return value
        # p(y*, y) / p(y), with nodes placed for the numerator.
        half = self.n_obs / 2
        joint = log_integral(self.prior, half + dim / 2, self.quad + quad[outside])
        exact = joint - log_integral(self.prior, half, self.quad) - dim / 2 * LOG_2PI
        return value.masked_scatter(outside, exact)

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
        """Solve the mixture's upper tail for each p by Brent's method on log tail against log z."""
        log_s, log_weights = self.log_s, self.log_weights
        if len(p) and p.min() < FAR_TAIL:
            nodes = place_nodes(self.prior, self.n_obs / 2, self.quad[None], depth=DEPTH - math.log(p.min()))
            terms = log_terms(self.prior, self.n_obs / 2, self.quad[None], nodes)[0]
            log_s, log_weights = nodes.log_s[0], terms - torch.logsumexp(terms, 0)
        log_sigma = (log_s / 2).detach().cpu().numpy()
        weights = log_weights.detach().exp().cpu().numpy()

        def excess(log_z: float, log_p: float) -> float:
            tail = float(weights @ special.ndtr(-np.exp(np.minimum(log_z - log_sigma, 700.0))))
            return (math.log(tail) if tail > 0 else -800.0) - log_p

        # The density falls away from 0, so tail >= 1/2 - density(0) z: a lower bound of z for every p.
        log_density_0 = special.logsumexp(
            np.log(weights, where=weights > 0, out=np.full_like(weights, -800.0)) - log_sigma
        )
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


def scale_posterior(prior: ScalePrior, n_obs: int, quad: Float[Tensor, ""]) -> "ScalePosterior":
    """Return the posterior of the scale given N = ``n_obs`` scalars with whitened square sum S = ``quad``.

    Parameters and errors are those of ``log_evidence``. The result no longer depends on ``prior``.
    """
    with torch.no_grad():
        quad = check_quad(n_obs, quad.detach())
        if quad.ndim:
            raise ValueError(f"quad must be a 0-dim tensor; got shape {tuple(quad.shape)}.")
        if prior._conjugate == "point":
            return PointScale(n_obs, quad, float(prior.mean))
        if prior._conjugate == "inverse_gamma":
            a, b = (prior.get_parameter(name).exp().item() for name in ("log_a", "log_b"))
            return InverseGammaScale(n_obs, quad, a + n_obs / 2, b + quad.item() / 2)
        nodes = place_nodes(prior, n_obs / 2, quad[None])
        terms = log_terms(prior, n_obs / 2, quad[None], nodes)[0]
        return MixtureScale(n_obs, quad, copy.deepcopy(prior), nodes.log_s[0], terms - torch.logsumexp(terms, 0))
