"""The priors of the scale s = sigma² that come with the library, and how to name them."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from stochproc.gp._scale_base import ClosedFormPrior, PositiveNumber, ScalePrior
from stochproc.gp._scale_gig import GIG
from stochproc.gp._scale_mixture import Mixture
from stochproc.gp._scale_priors_light import Gamma, LogNormal
from stochproc.gp._scale_priors_sigma import HalfNormal, HalfStudentT
from stochproc.gp._special import log_gamma_defect

__all__ = [
    "LIBRARY_CLASSES",
    "LIBRARY_PRIORS",
    "BurrXII",
    "Delta",
    "HalfCauchy",
    "InverseGamma",
    "as_scale_prior",
    "scale_prior_from_config",
]


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
    log_value: Tensor
    _conjugate = "point"

    def __init__(self, value: "float | int" = 1.0) -> None:
        super().__init__()
        self.value = value

    def _ranges(self, depth: float) -> list[tuple[float, float]]:
        return [(self.log_value.item(), self.log_value.item())]

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


class InverseGamma(ClosedFormPrior):
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
    search_ranges: ClassVar[dict[str, tuple[float, float]]] = {"log_a": (0.5, 1e3)}
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
        return a * (x - torch.expm1(x)) + log_gamma_defect(a)

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


class BurrXII(ClosedFormPrior):
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
    search_ranges: ClassVar[dict[str, tuple[float, float]]] = {"log_c": (0.1, 50.0), "log_d": (0.1, 1e3)}

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


class HalfCauchy(ClosedFormPrior):
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
    "gamma": Gamma,
    "gig": GIG,
    "half_cauchy": HalfCauchy,
    "half_normal": HalfNormal,
    "half_student_t": HalfStudentT,
    "inverse_gamma": InverseGamma,
    "log_normal": LogNormal,
}
# A mixture has no components of its own, hence no name.
LIBRARY_CLASSES: tuple[type[ScalePrior], ...] = (*LIBRARY_PRIORS.values(), Mixture)


def as_scale_prior(prior: "ScalePrior | str") -> ScalePrior:
    """Return a prior as it is, or a new one with default numbers from its name.

    Parameters
    ----------
    prior : ScalePrior or str
        The prior, or one of "burr_xii", "delta", "gamma", "gig", "half_cauchy", "half_normal", "half_student_t",
        "inverse_gamma" and "log_normal".

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
    if not isinstance(config, dict):
        raise ValueError(f"config must be what config() of a prior returned; got {config!r}.")
    numbers = dict(config)
    name = numbers.pop("class", None)
    classes = {c.__name__: c for c in LIBRARY_CLASSES}
    if name not in classes:
        raise ValueError(f"config must have a class among {', '.join(sorted(classes))}; got {name!r}.")
    try:
        return classes[name]._from_numbers(numbers)
    except TypeError as error:
        raise ValueError(f"config of {name} has numbers that are not its own: {error}") from error
