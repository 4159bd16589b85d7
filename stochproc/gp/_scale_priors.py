"""The priors of the scale s = sigma² that come with the library, and how to name them."""

import math
from typing import Any

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from stochproc.gp._scale_base import PositiveNumber, ScalePrior, plain_number

__all__ = [
    "LIBRARY_PRIORS",
    "BurrXII",
    "Delta",
    "HalfCauchy",
    "InverseGamma",
    "as_scale_prior",
    "log_gamma_ratio",
    "scale_prior_from_config",
]

# From here on Stirling's series with the terms below is exact to rounding: the first one left out is 0.18 /
# 20^15.
STIRLING_FROM = 20.0
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)


class Delta(ScalePrior):
    """The scale is known, s = value: an ordinary Gaussian process.

    Parameters
    ----------
    value : float, default=1.0
        The scale, positive; the ``outputscale`` of the Gaussian process. Learned by fits.

    Examples
    --------
    >>> Delta(2.0).mean
    2.0
    """

    value = PositiveNumber(learned=True, doc="The scale itself.")
    scale_name = "value"
    _conjugate = "point"

    def __init__(self, value: "float | int" = 1.0) -> None:
        super().__init__()
        self.value = value

    def _log_prob_u(self, u: Tensor) -> Tensor:
        raise TypeError("Delta is a point mass and has no density; use its value instead of log_prob.")

    def log_prob(self, s: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Raise TypeError: a point mass has no density.

        Any number returned here would be a probability, and wrong wherever it meets densities.
        """
        return self._log_prob_u(s)

    @property
    def tail_index(self) -> "float | int":
        """Infinite: there is no tail."""
        return math.inf

    @property
    def mean(self) -> "float | int":
        """The value."""
        return self.value.item()

    def sample(
        self, shape: "int | tuple[int, ...]" = (), *, generator: "torch.Generator | None" = None
    ) -> Float[Tensor, "..."]:
        """Return the value in the given shape; see :meth:`ScalePrior.sample`."""
        return self.value.detach().expand((shape,) if isinstance(shape, int) else tuple(shape)).clone()


class _ClosedFormPrior(ScalePrior):
    """A prior that defines ``_log_prob_u`` and ``_ppf``: exact also where exp(u) would overflow."""

    _reach = math.inf

    def _log_prob_u(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def _ppf(self, uniform: Tensor) -> Tensor:
        """Quantile function at 1 - uniform: the upper tail is resolved down to uniform = 1e-16."""
        raise NotImplementedError

    def log_prob(self, s: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return log p(s), -inf outside (0, inf); see :meth:`ScalePrior.log_prob`."""
        positive = s > 0
        u = torch.where(positive, s, torch.ones_like(s)).log()
        return torch.where(positive, self._log_prob_u(u) - u, torch.full_like(s, -math.inf))

    def sample(
        self, shape: "int | tuple[int, ...]" = (), *, generator: "torch.Generator | None" = None
    ) -> Float[Tensor, "..."]:
        """Draw by inversion of the distribution function; see :meth:`ScalePrior.sample`."""
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        uniform = torch.rand(size, dtype=torch.float64, device=self._device(), generator=generator)
        with torch.no_grad():
            return self._ppf(uniform.clamp(min=2.0**-54))

    def _number(self, name: str, like: Tensor) -> Tensor:
        """Logarithm of a number in the dtype and on the device of ``like``."""
        return getattr(self, f"log_{name}").to(like)


class InverseGamma(_ClosedFormPrior):
    r"""Inverse gamma prior, :math:`p(s) = b^a s^{-a-1} e^{-b/s} / \Gamma(a)`: a Student-t process.

    Parameters
    ----------
    a : float, default=2.0
        Shape, positive; the process has 2a degrees of freedom. Kept by fits.
    b : float, default=2.0
        Scale of s, positive. Learned by fits.

    Examples
    --------
    >>> prior = InverseGamma(a=2.0, b=4.0)
    >>> prior, prior.mean, prior.tail_index
    (InverseGamma(a=2, b=4), 4.0, 2.0)
    """

    a = PositiveNumber(learned=False, doc="Shape; half the degrees of freedom.")
    b = PositiveNumber(learned=True, doc="Scale of s.")
    scale_name = "b"
    _conjugate = "inverse_gamma"

    def __init__(self, a: "float | int" = 2.0, b: "float | int" = 2.0) -> None:
        super().__init__()
        self.a = a
        self.b = b

    def _log_prob_u(self, u: Tensor) -> Tensor:
        log_a = self._number("a", u)
        a = log_a.exp()
        # a log r - r - lgamma(a), r = b/s, written relative to r = a: for large a its terms would cancel.
        x = self._number("b", u) - u - log_a
        return a * (x - torch.expm1(x)) + _log_gamma_defect(a)

    @property
    def tail_index(self) -> "float | int":
        """The shape a."""
        return self.a.item()

    @property
    def mean(self) -> "float | int":
        """b/(a - 1), inf for a <= 1."""
        return (self.b / (self.a - 1)).item() if self.a.item() > 1 else math.inf

    def _ppf(self, uniform: Tensor) -> Tensor:
        gamma = special.gammaincinv(self.a.item(), uniform.cpu().numpy())
        return self.b / torch.as_tensor(gamma, dtype=uniform.dtype, device=uniform.device)


class BurrXII(_ClosedFormPrior):
    r"""Burr type XII prior of s = scale x, with x of density :math:`c d x^{c-1} (1 + x^c)^{-d-1}`.

    Parameters
    ----------
    c : float, default=2.0
        Shape near zero, positive: the density behaves as x^(c-1). Kept by fits.
    d : float, default=1.0
        Shape of the tail, positive: the density behaves as x^(-c d - 1). Kept by fits.
    scale : float, default=1.0
        Scale of s, positive. Learned by fits.

    Examples
    --------
    >>> BurrXII(c=2.0, d=1.0).tail_index
    2.0
    """

    c = PositiveNumber(learned=False, doc="Shape near zero.")
    d = PositiveNumber(learned=False, doc="Shape of the tail.")
    scale = PositiveNumber(learned=True, doc="Scale of s.")
    scale_name = "scale"

    def __init__(self, c: "float | int" = 2.0, d: "float | int" = 1.0, scale: "float | int" = 1.0) -> None:
        super().__init__()
        self.c = c
        self.d = d
        self.scale = scale

    def _log_prob_u(self, u: Tensor) -> Tensor:
        log_c, log_d = self._number("c", u), self._number("d", u)
        x = log_c.exp() * (u - self._number("scale", u))
        return log_c + log_d + x - (1 + log_d.exp()) * torch.logaddexp(x, torch.zeros_like(x))

    @property
    def tail_index(self) -> "float | int":
        """The product c d."""
        return self.c.item() * self.d.item()

    @property
    def mean(self) -> "float | int":
        """Mean: scale d B(d - 1/c, 1 + 1/c), inf for c d <= 1."""
        c, d = self.c.item(), self.d.item()
        return self.scale.item() * d * float(special.beta(d - 1 / c, 1 + 1 / c)) if c * d > 1 else math.inf

    def _ppf(self, uniform: Tensor) -> Tensor:
        return self.scale * torch.expm1(-uniform.log() / self.d) ** (1 / self.c)


class HalfCauchy(_ClosedFormPrior):
    r"""Half-Cauchy prior of sigma, :math:`p(s) = t / (\pi \sqrt s\,(t^2 + s))` with s = sigma².

    Parameters
    ----------
    t : float, default=1.0
        Median of sigma, positive. Learned by fits.

    Examples
    --------
    >>> HalfCauchy(t=0.5).tail_index
    0.5
    """

    t = PositiveNumber(learned=True, doc="Median of sigma.")
    scale_name = "t"
    scale_power = 0.5

    def __init__(self, t: "float | int" = 1.0) -> None:
        super().__init__()
        self.t = t

    def _log_prob_u(self, u: Tensor) -> Tensor:
        log_t = self._number("t", u)
        return log_t - math.log(math.pi) + u / 2 - torch.logaddexp(2 * log_t, u)

    @property
    def tail_index(self) -> "float | int":
        """One half: the mean of s does not exist."""
        return 0.5

    @property
    def mean(self) -> "float | int":
        """Infinite."""
        return math.inf

    def _ppf(self, uniform: Tensor) -> Tensor:
        return (self.t / torch.tan(math.pi / 2 * uniform)).square()


LIBRARY_PRIORS: dict[str, type[ScalePrior]] = {
    "burr_xii": BurrXII,
    "delta": Delta,
    "half_cauchy": HalfCauchy,
    "inverse_gamma": InverseGamma,
}


def as_scale_prior(prior: "ScalePrior | str") -> ScalePrior:
    """Return a prior as it is, or a new one with default numbers from its name.

    Parameters
    ----------
    prior : ScalePrior or {"burr_xii", "delta", "half_cauchy", "inverse_gamma"}
        The prior.

    Raises
    ------
    ValueError
        If the name is not known; the message lists those that are.
    TypeError
        If ``prior`` is neither a prior nor a string.

    Examples
    --------
    >>> as_scale_prior("inverse_gamma")
    InverseGamma(a=2, b=2)
    """
    if isinstance(prior, ScalePrior):
        return prior
    names = ", ".join(map(repr, LIBRARY_PRIORS))
    if not isinstance(prior, str):
        raise TypeError(f"scale_prior must be a ScalePrior or one of {names}; got {type(prior).__name__}.")
    if prior not in LIBRARY_PRIORS:
        raise ValueError(f"scale_prior must be a ScalePrior or one of {names}; got {prior!r}.")
    return LIBRARY_PRIORS[prior]()


def scale_prior_from_config(config: dict[str, Any]) -> ScalePrior:
    """Rebuild a prior from what its ``config`` returned.

    Raises
    ------
    ValueError
        If the class is not a prior of this library or the numbers are not its own.

    Examples
    --------
    >>> scale_prior_from_config(HalfCauchy(t=0.5).config())
    HalfCauchy(t=0.5)
    """
    numbers = dict(config)
    name = numbers.pop("class", None)
    classes = {c.__name__: c for c in LIBRARY_PRIORS.values()}
    if name not in classes:
        raise ValueError(f"config must have a class among {', '.join(sorted(classes))}; got {name!r}.")
    try:
        return classes[name](**{key: plain_number(key, value) for key, value in numbers.items()})
    except TypeError as error:
        raise ValueError(f"config of {name} has numbers that are not its own: {error}") from error


def _stirling_rest(x: Tensor) -> Tensor:
    """lgamma(x) less (x - 1/2) log x - x + log(2 pi)/2, for x >= 20."""
    inverse, total = 1 / x, torch.zeros_like(x)
    for k, coefficient in enumerate(STIRLING):
        total = total + coefficient * inverse ** (2 * k + 1)
    return total


def _log_gamma_defect(a: Tensor) -> Tensor:
    """Return a log a - a - lgamma(a), without cancellation for large a."""
    if a.item() < STIRLING_FROM:
        return a * a.log() - a - torch.lgamma(a)
    return (a / (2 * math.pi)).log() / 2 - _stirling_rest(a)


def log_gamma_ratio(a: Tensor, half: float) -> Tensor:
    """lgamma(a + half) - lgamma(a) - half log a, without cancellation for large a."""
    if a.item() < STIRLING_FROM:
        return torch.lgamma(a + half) - torch.lgamma(a) - half * a.log()
    rest = _stirling_rest(a + half) - _stirling_rest(a)
    return (a + half - 0.5) * torch.log1p(half / a) - half + rest
