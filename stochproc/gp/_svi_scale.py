r"""The variational law q(s) of the scale: quantiles that can be differentiated, moments, and its divergence.

Every family maps a standard normal number z to a scale, increasing in z and with the derivatives of the quantile
function (implicit reparameterisation). Random draws, quasi-random ones and the trapezoid rule in z, which converges
exponentially, all go through that one map.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from stochproc._checks import check_choice, check_integer
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_priors import InverseGamma

__all__ = [
    "Coupled",
    "InverseGammaFamily",
    "LogNormalFamily",
    "PointFamily",
    "ScaleFamily",
    "ScaleNodes",
    "scale_family",
]

# Beyond this many standard deviations a normal law has 1e-17 of its mass.
_NORMAL_RANGE = 8.5
# Nodes of expectations under q(s) that have no closed form.
_KL_NODES = 64
# Relative step of the derivative of a gamma quantile in its shape: a five-point formula then errs by 1e-11.
_STEP = 2e-3
_STENCIL = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))


class ScaleFamily(torch.nn.Module):
    """What every q(s) can do."""

    def log_quantile(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return log s at the standard normal quantile z, differentiable in the parameters."""
        raise NotImplementedError

    def inverse_moment(self, power: float) -> Float[Tensor, ""]:
        """Return E[s^-power]."""
        raise NotImplementedError

    def mean_log(self) -> Float[Tensor, ""]:
        """Return E[log s]."""
        raise NotImplementedError

    def kl(self, prior: ScalePrior) -> Float[Tensor, ""]:
        """Return KL(q(s) || p(s)) in nats: in closed form for an inverse gamma prior, else by 64 nodes."""
        if prior._conjugate == "inverse_gamma" and isinstance(prior, InverseGamma):
            return self._kl_inverse_gamma(prior)
        z, weight = normal_nodes(_KL_NODES, self.mean_log())
        u = self.log_quantile(z)
        return self._negative_entropy() - weight @ prior._log_prob_u(u)

    def match(self, log_centre: float, log_spread: float) -> None:
        """Set q in place to a law whose median is about exp(log_centre) and whose log s spreads by log_spread."""
        raise NotImplementedError

    def rescale(self, factor: float) -> None:
        """Make q in place the law of ``factor * s``."""
        raise NotImplementedError

    def _negative_entropy(self) -> Tensor:
        """E[log density of log s]."""
        raise NotImplementedError

    def _kl_inverse_gamma(self, prior: InverseGamma) -> Tensor:
        log_a, log_b = prior.get_parameter("log_a"), prior.get_parameter("log_b")
        a = log_a.exp()
        cross = a * log_b - torch.lgamma(a) - a * self.mean_log() - log_b.exp() * self.inverse_moment(1.0)
        return self._negative_entropy() - cross


class InverseGammaFamily(ScaleFamily):
    """q(s) = InverseGamma(a, b)."""

    log_a: Tensor
    log_b: Tensor

    def __init__(self, a: "float | int" = 2.0, b: "float | int" = 2.0) -> None:
        super().__init__()
        self.log_a = torch.nn.Parameter(torch.tensor(math.log(a), dtype=torch.float64))
        self.log_b = torch.nn.Parameter(torch.tensor(math.log(b), dtype=torch.float64))

    def log_quantile(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Take s = b / x with x a gamma quantile."""
        return self.log_b - _LogGammaUpperQuantile.apply(self.log_a, z.detach())

    def inverse_moment(self, power: float) -> Float[Tensor, ""]:
        """Closed form: a ratio of gamma functions over b^power."""
        a = self.log_a.exp()
        return (torch.lgamma(a + power) - torch.lgamma(a) - power * self.log_b).exp()

    def mean_log(self) -> Float[Tensor, ""]:
        """Closed form: log b - psi(a)."""
        return self.log_b - torch.digamma(self.log_a.exp())

    def match(self, log_centre: float, log_spread: float) -> None:
        """See ``ScaleFamily.match``: the variance of log s is psi'(a), about 1/a + 1/(2 a^2)."""
        variance = log_spread**2
        a = (1 + math.sqrt(1 + 2 * variance)) / (2 * variance)
        with torch.no_grad():
            self.log_a.fill_(math.log(a))
            self.log_b.fill_(log_centre + math.log(special.gammaincinv(a, 0.5)))

    def rescale(self, factor: float) -> None:
        """See ``ScaleFamily.rescale``."""
        with torch.no_grad():
            self.log_b.add_(math.log(factor))

    def _negative_entropy(self) -> Tensor:
        a = self.log_a.exp()
        return a * torch.digamma(a) - a - torch.lgamma(a)


class LogNormalFamily(ScaleFamily):
    """log s is N(mean, variance)."""

    def __init__(self, mean: "float | int" = 0.0, variance: "float | int" = 1.0) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(float(mean), dtype=torch.float64))
        self.log_variance = torch.nn.Parameter(torch.tensor(math.log(variance), dtype=torch.float64))

    def log_quantile(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Affine in z."""
        return self.mean + (self.log_variance / 2).exp() * z

    def inverse_moment(self, power: float) -> Float[Tensor, ""]:
        """Closed form."""
        return (-power * self.mean + power**2 * self.log_variance.exp() / 2).exp()

    def mean_log(self) -> Float[Tensor, ""]:
        """Return the mean."""
        return self.mean

    def match(self, log_centre: float, log_spread: float) -> None:
        """See ``ScaleFamily.match``."""
        with torch.no_grad():
            self.mean.fill_(log_centre)
            self.log_variance.fill_(2 * math.log(log_spread))

    def rescale(self, factor: float) -> None:
        """See ``ScaleFamily.rescale``."""
        with torch.no_grad():
            self.mean.add_(math.log(factor))

    def _negative_entropy(self) -> Tensor:
        return -(self.log_variance + math.log(2 * math.pi) + 1) / 2


class PointFamily(ScaleFamily):
    """The scale is known, as under the prior ``Delta``, whose value it shares."""

    def __init__(self, prior: ScalePrior) -> None:
        super().__init__()
        # Not registered a second time: the prior owns its parameter.
        self.__dict__["_prior"] = prior

    def log_quantile(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the same number for every z."""
        return self._log_value().expand(z.shape)

    def inverse_moment(self, power: float) -> Float[Tensor, ""]:
        """Return a power of the value."""
        return (-power * self._log_value()).exp()

    def mean_log(self) -> Float[Tensor, ""]:
        """Return the logarithm of the value."""
        return self._log_value()

    def kl(self, prior: ScalePrior) -> Float[Tensor, ""]:
        """Zero: q is the prior."""
        return torch.zeros_like(self._log_value())

    def match(self, log_centre: float, log_spread: float) -> None:
        """Nothing to set."""

    def rescale(self, factor: float) -> None:
        """Nothing to do: the prior is rescaled itself."""

    def _log_value(self) -> Tensor:
        return self.__dict__["_prior"].log_value


def scale_family(name: str, prior: ScalePrior) -> ScaleFamily:
    """Return q(s) of the named family, where it starts: near the prior's median, no wider than a factor of two.

    Parameters
    ----------
    name : {"inverse_gamma", "lognormal"}
        Ignored under ``Delta``, whose posterior is the same point.
    prior : ScalePrior
        Its median sets the start.
    """
    check_choice("scale_family", name, ("inverse_gamma", "lognormal"))
    if prior._conjugate == "point":
        return PointFamily(prior)
    family = InverseGammaFamily() if name == "inverse_gamma" else LogNormalFamily()
    draws = prior.sample(4001, generator=torch.Generator(device=prior._device()).manual_seed(0))
    family.match(draws.clamp(1e-100, 1e100).log().median().item(), 0.7)
    return family.to(prior._device())


class ScaleNodes(NamedTuple):
    """Scales s_j with weights: f given s_j is N(location_j m, spread_j^2 v) where m and v do not depend on s."""

    location: Float[Tensor, " s"]
    spread: Float[Tensor, " s"]
    weight: Float[Tensor, " s"]


class Coupled:
    """q(s) together with how the mean of the latent functions follows s: g(s) = sqrt(s) or 1.

    Parameters
    ----------
    family : ScaleFamily
    coupling : {"scaled", "fixed"}
    """

    def __init__(self, family: ScaleFamily, coupling: str) -> None:
        self.family, self.scaled = family, coupling == "scaled"

    def mean_square(self) -> Float[Tensor, ""]:
        """Return e = E[g(s)^2 / s]."""
        return torch.ones_like(self.family.mean_log()) if self.scaled else self.family.inverse_moment(1.0)

    def at(self, z: Float[Tensor, " s"], weight: Float[Tensor, " s"]) -> ScaleNodes:
        """Return the scales at standard normal quantiles."""
        spread = (self.family.log_quantile(z) / 2).exp()
        return ScaleNodes(spread if self.scaled else torch.ones_like(spread), spread, weight)

    def nodes(self, n: int) -> ScaleNodes:
        """Return an n-point rule for expectations under q(s)."""
        if isinstance(self.family, PointFamily):
            one = torch.ones(1, dtype=torch.float64, device=self.family.mean_log().device)
            return self.at(torch.zeros_like(one), one)
        return self.at(*normal_nodes(n, self.family.mean_log()))

    def draws(self, n: int, generator: "torch.Generator | None") -> ScaleNodes:
        """Return n draws, one in each of n strata of equal probability: averages are unbiased and vary less."""
        like = self.family.mean_log()
        uniform = torch.rand(n, dtype=torch.float64, generator=generator)
        strata = (torch.arange(n, dtype=torch.float64) + uniform.clamp(1e-12, 1 - 1e-12)) / n
        weight = torch.full((n,), 1 / n, dtype=torch.float64)
        return self.at(torch.special.ndtri(strata).to(like.device), weight.to(like.device))


def normal_nodes(n: int, like: Tensor) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Nodes and weights of the trapezoid rule under a standard normal law, float64.

    Step and cut-off err alike: some 1e-7 for n = 15, 1e-8 for n = 21, 1e-15 for n = 64 and integrands such as log s or
    1/s. Gauss-Hermite nodes reach further out than they need to, which growing integrands punish.
    """
    check_integer("n", n, 2)
    reach = min(_NORMAL_RANGE, 3.0 + n / 8)
    z = torch.linspace(-reach, reach, n, dtype=torch.float64, device=like.device)
    return z, torch.softmax(-z.square() / 2, 0)


class _LogGammaUpperQuantile(torch.autograd.Function):
    """log x with P(X > x) = Phi(z), X gamma of shape a and unit rate; differentiable in log a."""

    @staticmethod
    def forward(ctx: Any, log_a: Tensor, z: Tensor) -> Tensor:
        a, upper = math.exp(log_a.item()), z.detach().double().cpu().numpy()
        if ctx.needs_input_grad[0]:
            # The quantile itself is differentiated: the derivative of the distribution function in its shape has no
            # closed form either, and torch's own approximation errs by 1e-3.
            shapes = a * np.exp(_STEP * np.array([0, *(k for k, _ in _STENCIL)]))
            value, *near = _log_gamma_quantile(shapes[:, None], upper.reshape(1, -1))
            slope = sum(c * v for (_, c), v in zip(_STENCIL, near, strict=True)) / _STEP
            ctx.save_for_backward(torch.as_tensor(slope, device=log_a.device).reshape(z.shape))
        else:
            value = _log_gamma_quantile(np.array([[a]]), upper.reshape(1, -1))[0]
        return torch.as_tensor(value, device=log_a.device).reshape(z.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (slope,) = ctx.saved_tensors
        return (grad * slope).sum(), None


def _log_gamma_quantile(a: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Find log x with P(X > x) = Phi(z) for shapes (k, 1) and z (1, n), each half from the tail that is the smaller."""
    tail = special.ndtr(-np.abs(z))
    x = np.empty((len(a), z.shape[1]))
    for half, inverse in ((z[0] < 0, special.gammainccinv), (z[0] >= 0, special.gammaincinv)):
        x[:, half] = inverse(a, tail[:, half])
    # Where x underflows, P(X < x) is x^a / Gamma(a + 1) to rounding.
    below = (special.log_ndtr(-z) + special.gammaln(a + 1)) / a
    return np.where(x > 1e-290, np.log(np.maximum(x, 1e-300)), below)
