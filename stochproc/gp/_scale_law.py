r"""What a posterior of the scale answers, and the two laws that need no nodes for it: point and inverse gamma.

Densities here are those of m further scalars that, given s, are N(0, s I); location, covariance and its
determinant belong to ``Predictive``.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from stochproc._checks import check_integer
from stochproc.gp._scale_evidence import LOG_2PI, inverse_gamma_evidence
from stochproc.gp._scale_priors import InverseGamma
from stochproc.gp._scale_quadrature import DEPTH, log_terms, place_nodes

__all__ = ["InverseGammaScale", "PointScale", "ScalePosterior", "prior_nodes"]


# Largest distance of nodes in log s of a prior without data, whose own integral may need fewer nodes than those of the
# Gaussian densities that are averaged over it: these are analytic up to pi/2 off the line, so that the rule errs by
# exp(-2 pi (pi / 2) / 0.2) = 1e-21 of them.
LARGEST_STEP = 0.2


@dataclass(frozen=True)
class ScalePosterior:
    """The posterior of the scale s = sigma², and what it does to predictions.

    ``scale_posterior`` makes the exact one, ``importance_posterior`` one of weighted draws.

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

    def _nodes(self, smallest: float) -> tuple[Tensor, Tensor]:
        """Values of log s and log weights that stand for the law, down to upper tails of ``smallest``."""
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

    def _nodes(self, smallest: float) -> tuple[Tensor, Tensor]:
        return self.quad.new_tensor([math.log(self.value)]), self.quad.new_zeros(1)


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

    def _nodes(self, smallest: float) -> tuple[Tensor, Tensor]:
        law = InverseGamma(self.a, self.b).to(self.quad.device)
        return prior_nodes(law, 0.0, torch.zeros_like(self.quad), smallest)


@torch.no_grad()
def prior_nodes(prior: Any, power: float, quad: Tensor, smallest: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log nodes and normalised log weights of the rule for p(s) s^-power exp(-quad/(2s)).

    They reach as far as probabilities down to ``smallest`` ask for.
    """
    nodes = place_nodes(prior, power, quad[None], depth=DEPTH - math.log(smallest))
    log_s, terms = nodes.log_s[0], log_terms(prior, power, quad[None], nodes)[0]
    if power == 0 and nodes.log_step.exp().item() > LARGEST_STEP:
        intervals = math.ceil((log_s[-1] - log_s[0]).item() / LARGEST_STEP)
        log_s = torch.linspace(log_s[0].item(), log_s[-1].item(), intervals + 1, dtype=log_s.dtype, device=log_s.device)
        terms = prior._log_prob_u(log_s)
    return log_s, terms - torch.logsumexp(terms, 0)
