"""Priors of the scale s = sigma² that are known as laws of sigma: half-normal and half-Student-t."""

import math
from typing import ClassVar

import numpy as np
import torch
from scipy import special
from torch import Tensor

from stochproc.gp._scale_base import ClosedFormPrior, PositiveNumber
from stochproc.gp._special import log_gamma_ratio

__all__ = ["HalfNormal", "HalfStudentT"]

LOG_2PI = math.log(2 * math.pi)


class HalfNormal(ClosedFormPrior):
    r"""Half-normal prior of sigma, :math:`p(s) = e^{-s/(2t^2)} / (t \sqrt{2 \pi s})` with s = sigma².

    Parameters
    ----------
    t : float, default=1.0
        Root mean square of sigma, positive. Learned by fits.

    Examples
    --------
    >>> HalfNormal(t=0.5).mean
    0.25
    """

    t = PositiveNumber(learned=True, doc="Root mean square of sigma.")
    scale_name = "t"
    scale_power = 0.5

    def __init__(self, t: "float | int" = 1.0) -> None:
        super().__init__()
        self.t = t

    def _log_prob_u(self, u: Tensor) -> Tensor:
        x = u - 2 * self._number("t", u)
        return (x - x.exp() - LOG_2PI) / 2

    @property
    def tail_index(self) -> "float | int":
        """Infinite: every moment exists."""
        return math.inf

    @property
    def mean(self) -> "float | int":
        """The square of t."""
        return self.t.item() ** 2

    def _ppf(self, uniform: Tensor) -> Tensor:
        return (self.t * torch.special.ndtri(uniform / 2)).square()


class HalfStudentT(ClosedFormPrior):
    r"""Half-Student-t prior of sigma: :math:`s / t^2` has an F law with 1 and df degrees of freedom.

    Parameters
    ----------
    df : float, default=3.0
        Degrees of freedom, positive; 1 is ``HalfCauchy``, infinity ``HalfNormal``. Kept by fits.
    t : float, default=1.0
        Scale of sigma, positive. Learned by fits.

    Examples
    --------
    >>> prior = HalfStudentT(df=4.0, t=1.0)
    >>> round(prior.mean, 6), prior.tail_index
    (2.0, 2.0)
    """

    df = PositiveNumber(learned=False, doc="Degrees of freedom of sigma.")
    t = PositiveNumber(learned=True, doc="Scale of sigma.")
    scale_name = "t"
    search_ranges: ClassVar[dict[str, tuple[float, float]]] = {"log_df": (1.0, 2e3)}
    scale_power = 0.5

    def __init__(self, df: "float | int" = 3.0, t: "float | int" = 1.0) -> None:
        super().__init__()
        self.df = df
        self.t = t

    def _log_prob_u(self, u: Tensor) -> Tensor:
        log_df = self._number("df", u)
        df = log_df.exp()
        x = u - 2 * self._number("t", u)
        falling = torch.logaddexp(x - log_df, torch.zeros_like(x))
        return (x - LOG_2PI) / 2 + log_gamma_ratio(df / 2, 0.5) - (df + 1) / 2 * falling

    @property
    def tail_index(self) -> "float | int":
        """Half the degrees of freedom."""
        return self.df.item() / 2

    @property
    def mean(self) -> "float | int":
        """t² df/(df - 2), inf for df <= 2."""
        df = self.df.item()
        return self.t.item() ** 2 * df / (df - 2) if df > 2 else math.inf

    def _ppf(self, uniform: Tensor) -> Tensor:
        half = self.df.item() / 2
        p = uniform.cpu().numpy()
        # s / t² = df (1 - B) / B with B ~ Beta(df/2, 1/2); whichever of B and 1 - B is small is solved for.
        tail = np.maximum(special.betaincinv(half, 0.5, p), np.finfo(float).tiny)
        near = special.betaincinv(0.5, half, 1 - p)
        with np.errstate(divide="ignore"):
            ratio = np.where(tail < 0.5, (1 - tail) / tail, near / (1 - near))
        return self.df * self.t.square() * torch.as_tensor(ratio, dtype=uniform.dtype, device=uniform.device)
