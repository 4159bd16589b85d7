"""Priors of the scale whose tail falls faster than any power: log-normal and gamma."""

import math
from typing import ClassVar

import torch
from scipy import special
from torch import Tensor

from stochproc.gp._scale_base import ClosedFormPrior, PositiveNumber, plain_number
from stochproc.gp._special import log_gamma_defect

__all__ = ["Gamma", "LogNormal"]


class LogNormal(ClosedFormPrior):
    r"""Log-normal prior, :math:`\log s \sim N(m, v)`.

    Parameters
    ----------
    m : float, default=0.0
        Mean of log s, between -700 and 700. Learned by fits, as the median exp(m).
    v : float, default=1.0
        Variance of log s, positive. Kept by fits.

    Examples
    --------
    >>> prior = LogNormal(m=0.5, v=1.0)
    >>> prior, round(prior.mean, 6), prior.tail_index
    (LogNormal(m=0.5, v=1), 2.718282, inf)
    """

    median = PositiveNumber(learned=True, doc="Median of s, exp(m).")
    v = PositiveNumber(learned=False, doc="Variance of log s.")
    scale_name = "median"
    search_ranges: ClassVar[dict[str, tuple[float, float]]] = {"log_v": (1e-3, 1e2)}
    log_median: Tensor

    def __init__(self, m: "float | int" = 0.0, v: "float | int" = 1.0) -> None:
        super().__init__()
        self.median = 1.0
        self.m = m
        self.v = v

    @property
    def m(self) -> Tensor:
        """Mean of log s."""
        return self.log_median

    @m.setter
    def m(self, value: "float | int") -> None:
        number = plain_number("m", value)
        # Not its exponential: the logarithm of that would not be m to the last digit.
        if not abs(number) <= 700:
            raise ValueError(f"m must lie between -700 and 700; got {number}.")
        with torch.no_grad():
            self.log_median.fill_(number)

    def _log_prob_u(self, u: Tensor) -> Tensor:
        log_v = self._number("v", u)
        z = u - self._number("median", u)
        return -0.5 * (z.square() * (-log_v).exp() + log_v + math.log(2 * math.pi))

    @property
    def tail_index(self) -> "float | int":
        """Infinite: every moment exists."""
        return math.inf

    @property
    def mean(self) -> "float | int":
        """The mean, exp(m + v/2)."""
        return (self.log_median + self.v / 2).exp().item()

    def _ppf(self, uniform: Tensor) -> Tensor:
        return (self.log_median - self.v.sqrt() * torch.special.ndtri(uniform)).exp()

    def _numbers(self) -> dict[str, float]:
        return {"m": self.log_median.item(), "v": self.v.item()}


class Gamma(ClosedFormPrior):
    r"""Gamma prior, :math:`p(s) = b^a s^{a-1} e^{-b s} / \Gamma(a)`: a variance-gamma process.

    With ``a = 1`` each value of the process has a Laplace law.

    Parameters
    ----------
    a : float, default=1.0
        Shape, positive. Kept by fits.
    b : float, default=1.0
        Rate, positive: one over a scale of s. Learned by fits.

    Examples
    --------
    >>> prior = Gamma(a=3.0, b=2.0)
    >>> prior, round(prior.mean, 6), prior.tail_index
    (Gamma(a=3, b=2), 1.5, inf)
    """

    a = PositiveNumber(learned=False, doc="Shape.")
    b = PositiveNumber(learned=True, doc="Rate, one over a scale of s.")
    scale_name = "b"
    search_ranges: ClassVar[dict[str, tuple[float, float]]] = {"log_a": (0.5, 1e3)}
    scale_power = -1

    def __init__(self, a: "float | int" = 1.0, b: "float | int" = 1.0) -> None:
        super().__init__()
        self.a = a
        self.b = b

    def _log_prob_u(self, u: Tensor) -> Tensor:
        log_a = self._number("a", u)
        a = log_a.exp()
        # a log r - r - lgamma(a), r = b s, written relative to r = a: for large a its terms would cancel.
        x = self._number("b", u) + u - log_a
        return a * (x - torch.expm1(x)) + log_gamma_defect(a)

    @property
    def tail_index(self) -> "float | int":
        """Infinite: every moment exists."""
        return math.inf

    @property
    def mean(self) -> "float | int":
        """The ratio a/b."""
        return (self.a / self.b).item()

    def _ppf(self, uniform: Tensor) -> Tensor:
        gamma = special.gammainccinv(self.a.item(), uniform.cpu().numpy())
        return torch.as_tensor(gamma, dtype=uniform.dtype, device=uniform.device) / self.b
