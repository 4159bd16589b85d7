"""Slow references for scale mixtures: integrals over log s to 25 digits, and priors that a user might write."""

import functools
import math

import mpmath as mp
import torch

from stochproc import gp
from stochproc.gp import GIG, BurrXII, Gamma, HalfCauchy, HalfNormal, HalfStudentT, InverseGamma, Mixture, ScalePrior


class LogNormal(ScalePrior):
    """log s is standard normal; nothing but the density is given."""

    def log_prob(self, s):
        return -0.5 * s.log().square() - s.log() - 0.5 * math.log(2 * math.pi)


class TwoPeaks(ScalePrior):
    """log s is 0.3 N(-2, 1/16) + 0.7 N(3, 1/16)."""

    def log_prob(self, s):
        u = s.log()
        constant = math.log(4) - 0.5 * math.log(2 * math.pi)
        low = math.log(0.3) - 8 * (u + 2).square()
        high = math.log(0.7) - 8 * (u - 3).square()
        return torch.logaddexp(low, high) + constant - u


class UserInverseGamma(ScalePrior):
    """InverseGamma(2, b) without its closed forms, so that it goes through the quadrature."""

    scale_name = "b"

    def __init__(self, b=2.0):
        super().__init__()
        self.b = b

    def log_prob(self, s):
        return 2 * math.log(self.b) - 3 * s.log() - self.b / s


def _inverse_gamma_2(u):
    return 2 * mp.log(2) - 2 * u - 2 * mp.exp(-u)


def _half_cauchy(u):
    t = mp.mpf(1.3)
    return mp.log(t / mp.pi) + u / 2 - mp.log(t**2 + mp.exp(u))


def _burr(c, d, scale):
    def density(u):
        x = mp.mpf(c) * (u - mp.log(mp.mpf(scale)))
        return mp.log(mp.mpf(c) * mp.mpf(d)) + x - (1 + mp.mpf(d)) * mp.log1p(mp.exp(x))

    return density


def _two_peaks(u):
    both = mp.mpf(0.3) * mp.exp(-8 * (u + 2) ** 2) + mp.mpf(0.7) * mp.exp(-8 * (u - 3) ** 2)
    # The floats 0.3 and 0.7 are what the class has too.
    return mp.log(both) + mp.log(4) - mp.log(2 * mp.pi) / 2


def _log_normal(m, v):
    m, v = mp.mpf(m), mp.mpf(v)
    return lambda u: -((u - m) ** 2) / (2 * v) - mp.log(2 * mp.pi * v) / 2


def _gamma(a, b):
    a, b = mp.mpf(a), mp.mpf(b)
    return lambda u: a * (mp.log(b) + u) - b * mp.exp(u) - mp.loggamma(a)


def _half_student_t(df, t):
    df, t = mp.mpf(df), mp.mpf(t)
    constant = mp.loggamma((df + 1) / 2) - mp.loggamma(df / 2) - mp.log(df * mp.pi) / 2

    def density(u):
        x = u - 2 * mp.log(t)
        return constant + x / 2 - (df + 1) / 2 * mp.log1p(mp.exp(x) / df)

    return density


def _gig(p, a, b):
    p, a, b = mp.mpf(p), mp.mpf(a), mp.mpf(b)
    constant = p / 2 * mp.log(a / b) - mp.log(2 * mp.besselk(p, mp.sqrt(a * b)))
    return lambda u: constant + p * u - (a * mp.exp(u) + b * mp.exp(-u)) / 2


def _mixture(weights, densities, scale):
    total, shift = sum(weights), mp.log(mp.mpf(scale))
    both = list(zip(weights, densities, strict=True))
    return lambda u: mp.log(sum(mp.mpf(w) / total * mp.exp(d(u - shift)) for w, d in both))


# Name -> (prior, the density of u = log s in mpmath).
PRIORS = {
    "inverse_gamma": (lambda: InverseGamma(2.0, 2.0), _inverse_gamma_2),
    "user_inverse_gamma": (UserInverseGamma, _inverse_gamma_2),
    "half_cauchy": (lambda: HalfCauchy(1.3), _half_cauchy),
    "burr_xii": (lambda: BurrXII(2.0, 1.0, 1.5), _burr(2, 1, 1.5)),
    "burr_xii_pole": (lambda: BurrXII(0.3, 2.0, 1.0), _burr(0.3, 2, 1)),
    "log_normal": (LogNormal, lambda u: -(u**2) / 2 - mp.log(2 * mp.pi) / 2),
    "two_peaks": (TwoPeaks, _two_peaks),
}

# The others of the library, likewise; lighter tails, so that the data must not be 1e300 times what the prior expects.
LIGHTER = {
    "gamma": (lambda: Gamma(1.5, 0.7), _gamma(1.5, 0.7)),
    "gig": (lambda: GIG(-0.7, 1.2, 0.8), _gig(-0.7, 1.2, 0.8)),
    "gig_near_gamma": (lambda: GIG(3.0, 2.0, 1e-3), _gig(3.0, 2.0, 1e-3)),
    "half_normal": (lambda: HalfNormal(1.3), lambda u: _gamma(0.5, 1 / (2 * mp.mpf(1.3) ** 2))(u)),
    "half_student_t": (lambda: HalfStudentT(3.5, 1.3), _half_student_t(3.5, 1.3)),
    "log_normal_of_the_library": (lambda: gp.LogNormal(0.4, 2.5), _log_normal(0.4, 2.5)),
    "mixture": (
        lambda: Mixture([HalfCauchy(1.3), gp.LogNormal(0.4, 2.5), GIG(-0.7, 1.2, 0.8)], [1, 2, 3], 1.5),
        _mixture([1, 2, 3], [_half_cauchy, _log_normal(0.4, 2.5), _gig(-0.7, 1.2, 0.8)], 1.5),
    ),
}


@functools.cache
def log_evidence_mp(density, n_obs, quad):
    """log of the integral of p(s) (2 pi s)^(-N/2) exp(-S/(2s)) by Gauss-Legendre panels in u, in 30 digits."""
    with mp.workdps(30):
        half, quad = mp.mpf(n_obs) / 2, mp.mpf(quad)

        def target(u):
            return density(u) - half * u - quad * mp.exp(-u) / 2

        centre = mp.log(quad / n_obs) if quad and n_obs else mp.mpf(0)
        ends = [int(min(centre, 0)) - 150, int(max(centre, 0)) + 150]
        grid = sorted(
            [mp.mpf(k) for k in range(ends[0], ends[1] + 1)] + [centre + mp.mpf(k) / 20 for k in range(-20, 21)]
        )
        value = [target(u) for u in grid]
        top = max(value)
        inside = [k for k, v in enumerate(value) if v > top - 80]
        low, high = grid[max(inside[0] - 1, 0)], grid[min(inside[-1] + 1, len(grid) - 1)]
        panels = max(12, int(high - low))
        ends = [low + (high - low) * k / panels for k in range(panels + 1)]
        total = mp.quad(lambda u: mp.exp(target(u) - top), ends, method="gauss-legendre", maxdegree=6)
        return mp.log(total) + top - half * mp.log(2 * mp.pi)
