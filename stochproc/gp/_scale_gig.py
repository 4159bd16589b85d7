"""The generalised inverse Gaussian prior of the scale, conjugate as the inverse gamma is, and its integrals."""

import math
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from stochproc._checks import check_positive
from stochproc.gp._bessel import log_bessel_defect
from stochproc.gp._scale_base import ClosedFormPrior, PositiveNumber, plain_number
from stochproc.gp._scale_quadrature import sample_log_scale
from stochproc.gp._special import log1p_ratio

__all__ = ["GIG", "gig_log_integral", "gig_posterior"]

LARGEST_ORDER = 1e12
OMEGA_RANGE = (1e-100, 1e100)


class GIG(ClosedFormPrior):
    r"""Generalised inverse Gaussian prior, :math:`p(s) \propto s^{p-1} e^{-(a s + b/s)/2}`: a hyperbolic process.

    Parameters
    ----------
    p : float, default=-0.5
        Order, any real number up to 1e12 in size; -1/2 is the inverse Gaussian law. Kept by fits.
    a : float, default=1.0
        Rate of the upper tail, positive.
    b : float, default=1.0
        Rate of the fall towards s = 0, positive; b/a is the square of the ``scale`` that fits learn, and a b is
        kept, between 1e-200 and 1e200.

    Attributes
    ----------
    omega : Tensor
        Concentration, sqrt(a b).
    scale : Tensor
        Scale of s, sqrt(b/a).

    Notes
    -----
    The posterior given N scalars of square sum S is GIG(p - N/2, a, b + S), the predictive law generalised
    hyperbolic, both in closed form by Bessel functions K of any order. ``InverseGamma(-p, b/2)`` is the limit a
    -> 0 (p < 0) and ``Gamma(p, a/2)`` the limit b -> 0 (p > 0); at the limits themselves use those classes.

    References
    ----------
    .. [1] B. Jørgensen, "Statistical Properties of the Generalized Inverse Gaussian Distribution", Springer 1982.

    Examples
    --------
    >>> prior = GIG(p=-0.5, a=1.0, b=4.0)
    >>> prior, round(prior.mean, 6)
    (GIG(p=-0.5, a=1, b=4), 2.0)
    """

    omega = PositiveNumber(learned=False, doc="Concentration, sqrt(a b).")
    scale = PositiveNumber(learned=True, doc="Scale of s, sqrt(b/a).")
    scale_name = "scale"
    search_ranges: ClassVar[dict[str, tuple[float, float]]] = {"log_omega": (1e-3, 1e3), "p": (-1e3, 1e3)}
    log_omega: Tensor
    log_scale: Tensor
    _conjugate = "gig"

    def __init__(self, p: "float | int" = -0.5, a: "float | int" = 1.0, b: "float | int" = 1.0) -> None:
        super().__init__()
        order, rate, fall = plain_number("p", p), plain_number("a", a), plain_number("b", b)
        if not abs(order) <= LARGEST_ORDER:
            raise ValueError(f"p must be at most 1e12 in size; got {order}.")
        check_positive("a", rate)
        check_positive("b", fall)
        omega = math.sqrt(rate) * math.sqrt(fall)
        if not OMEGA_RANGE[0] <= omega <= OMEGA_RANGE[1]:
            raise ValueError(
                f"the product of a and b must lie between 1e-200 and 1e200; got a = {rate} and b = {fall}. "
                "For a = 0 use InverseGamma(-p, b/2), for b = 0 Gamma(p, a/2)."
            )
        self.p = torch.nn.Parameter(torch.tensor(order, dtype=torch.float64), requires_grad=False)
        self.omega = omega
        self.scale = math.sqrt(fall) / math.sqrt(rate)

    @property
    def a(self) -> Tensor:
        """Rate of the upper tail."""
        return (self.log_omega - self.log_scale).exp()

    @property
    def b(self) -> Tensor:
        """Rate of the fall towards s = 0."""
        return (self.log_omega + self.log_scale).exp()

    def _log_prob_u(self, u: Tensor) -> Tensor:
        # In float64 whatever u is: the Bessel function is the constant of the density.
        p, log_omega, log_scale = (getattr(self, n).to(u.device) for n in ("p", "log_omega", "log_scale"))
        r = torch.hypot(p, log_omega.exp())
        # Relative to the mode: p d less p sinh(d) + r (cosh(d) - 1), with d = u - mode.
        d = u - log_scale - torch.asinh(p * (-log_omega).exp())
        near = d.abs() < 1
        within = torch.where(near, d, torch.zeros_like(d))
        inner = p * (within - torch.sinh(within)) - 2 * r * torch.sinh(within / 2).square()
        # Far out the two hyperbolic functions nearly cancel on the side where p helps; their exponentials do not.
        large = r + p.abs()
        small = (2 * log_omega - large.log()).exp()
        plus, minus = torch.where(p >= 0, large, small), torch.where(p >= 0, small, large)
        outer = p * d - plus / 2 * torch.expm1(d) - minus / 2 * torch.expm1(-d)
        value = torch.where(near, inner, outer) - math.log(2) - log_bessel_defect(p, log_omega)
        return value.to(u.dtype)

    @property
    def tail_index(self) -> "float | int":
        """Infinite: every moment exists."""
        return math.inf

    @property
    def mean(self) -> "float | int":
        """The mean, scale K_{p+1}(omega) / K_p(omega)."""
        with torch.no_grad():
            return gig_log_integral(self.p, self.log_omega, self.log_scale, -1.0, self._zero()).exp().item()

    def sample(
        self, shape: "int | tuple[int, ...]" = (), *, generator: "torch.Generator | None" = None
    ) -> Float[Tensor, "..."]:
        """Draw independent scales by rejection (``scipy.stats.geninvgauss``); see :meth:`ScalePrior.sample`."""
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        return _draw(self, size, generator)

    def _numbers(self) -> dict[str, float]:
        return {name: getattr(self, name).item() for name in ("p", "a", "b")}


def gig_posterior(prior: GIG, n_obs: int, quad: Tensor) -> GIG:
    """Return GIG(p - N/2, a, b + S) with fixed numbers; its a b may be beyond what a prior may have."""
    law = GIG(0.0)
    with torch.no_grad():
        growth = log1p_ratio(quad.to(prior.p.device), prior.log_omega + prior.log_scale) / 2
        law.p.copy_(prior.p - n_obs / 2)
        law.log_omega.copy_(prior.log_omega + growth)
        law.log_scale.copy_(prior.log_scale + growth)
    return law.to(quad.device).requires_grad_(False)


def gig_log_integral(
    p: Tensor, log_omega: Tensor, log_scale: Tensor, power: float, quad: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""Return :math:`\log \int p(s) s^{-k} e^{-S/(2s)} ds` for a GIG density, k = ``power`` and S = ``quad``.

    It is log K_q(omega') - log K_p(omega) + q log(scale'/scale) - k log(scale) with q = p - k and the omega',
    scale' of b + S. Written by differences of the exponents of the two Bessel functions, since these can be of
    order 1e6 and nearly equal.
    """
    q = p - power
    growth = log1p_ratio(quad, log_omega + log_scale)
    log_argument = log_omega + growth / 2
    x, y = log_omega.exp(), log_argument.exp()
    r, r_post = torch.hypot(p, x), torch.hypot(q, y)
    mode = torch.asinh(q / y) + growth / 2
    # r_post² - r² = q² - p² + a S.
    longer = (quad * (log_omega - log_scale).exp() - power * (2 * p - power)) / (r_post + r)
    change = _mode_change(p, q, r, r_post, longer, growth, log_omega, log_argument)
    defects = log_bessel_defect(q, log_argument) - log_bessel_defect(p, log_omega)
    return p * change - power * (mode + log_scale) - longer + defects


def _mode_change(
    p: Tensor, q: Tensor, r: Tensor, r_post: Tensor, longer: Tensor, growth: Tensor, log_x: Tensor, log_y: Tensor
) -> Tensor:
    """How far the mode of log s moves, with the digits that p times it needs."""
    # From log((p + r) / x) to log((q + r_post) / x), where p + r = x² / (r - p).
    if p.item() >= 0 and q.item() >= 0:
        return _log_ratio(q + r_post, p + r, longer + (q - p))
    if p.item() < 0 and q.item() < 0:
        return growth - _log_ratio(r_post - q, r - p, longer - (q - p))
    if p.item() >= 0:
        return 2 * log_y - (r_post - q).log() - (p + r).log()
    return (q + r_post).log() + (r - p).log() - 2 * log_x


def _log_ratio(above: Tensor, below: Tensor, difference: Tensor) -> Tensor:
    """log(above / below), given their difference."""
    share = difference / below
    near = share.abs() < 0.5
    return torch.where(near, torch.log1p(torch.where(near, share, torch.zeros_like(share))), (above / below).log())


def _draw(prior: GIG, size: tuple[int, ...], generator: "torch.Generator | None") -> Float[Tensor, "..."]:
    """Draw from a GIG law, exactly where scipy's rejection sampler is known to work."""
    p, omega = prior.p.item(), prior.omega.item()
    if abs(p) <= 1e6 and 1e-6 <= omega <= 1e6:
        seed = int(torch.randint(2**62, (), device=prior.p.device, generator=generator))
        ratio = stats.geninvgauss.rvs(p, omega, size=size, random_state=np.random.default_rng(seed))
        return prior.scale.detach() * torch.as_tensor(ratio, dtype=torch.float64, device=prior.p.device)
    return sample_log_scale(prior, 0.0, prior._zero(), math.prod(size), generator).exp().reshape(size)
