"""Slow references for the duals: covariances at 50 digits by the textbook formulas, and integrals in two dimensions."""

from collections.abc import Callable
from typing import NamedTuple

import mpmath as mp

mp.mp.dps = 50


class Cov(NamedTuple):
    """k(x, x), k(x, y), k(y, y) and the tangent kernel of the pair."""

    q11: mp.mpf
    q12: mp.mpf
    q22: mp.mpf
    ntk: mp.mpf = mp.mpf(0)

    @property
    def defect(self):
        return mp.sqrt(self.q11 * self.q22) - self.q12

    @property
    def sqdist(self):
        return self.q11 + self.q22 - 2 * self.q12


def from_points(x, y) -> Cov:
    """Exact covariances of two points given as floats."""
    x, y = ([mp.mpf(float(v)) for v in p] for p in (x, y))
    dot = lambda a, b: mp.fsum(s * t for s, t in zip(a, b, strict=True))  # noqa: E731
    return Cov(dot(x, x), dot(x, y), dot(y, y))


def dense(k: Cov, w2, b2) -> Cov:
    w2, b2 = mp.mpf(w2), mp.mpf(b2)
    q11, q12, q22 = (w2 * q + b2 for q in k[:3])
    return Cov(q11, q12, q22, w2 * k.ntk + q12)


def activate(k: Cov, value: Callable, slope: Callable) -> Cov:
    q11, q12, q22, ntk = k
    return Cov(value(q11, q11, q11), value(q11, q12, q22), value(q22, q22, q22), ntk * slope(q11, q12, q22))


def _angle(q11, q12, q22):
    n = mp.sqrt(q11 * q22)
    return mp.acos(max(-1, min(1, q12 / n))) if n else mp.mpf(0)


def ab_relu(a, b):
    a, b = mp.mpf(a), mp.mpf(b)
    c, g = (a * a + b * b) / 2, (a - b) ** 2 / (2 * mp.pi)

    def value(q11, q12, q22):
        t = _angle(q11, q12, q22)
        return c * q12 + g * mp.sqrt(q11 * q22) * (mp.sin(t) - t * mp.cos(t))

    return value, lambda *q: c - g * _angle(*q)


def erf():
    p = lambda q11, q22: (1 + 2 * q11) * (1 + 2 * q22)  # noqa: E731
    return (
        lambda q11, q12, q22: 2 / mp.pi * mp.asin(2 * q12 / mp.sqrt(p(q11, q22))),
        lambda q11, q12, q22: 4 / mp.pi / mp.sqrt(p(q11, q22) - 4 * q12**2),
    )


def gelu():
    def value(q11, q12, q22):
        P, p = q11 * q22, (1 + q11) * (1 + q22)
        D2 = p - q12**2
        D = mp.sqrt(D2)
        return q12 / 4 + ((q12**2 + P * D2) / (p * D) + q12 * mp.atan2(q12, D)) / (2 * mp.pi)

    def slope(q11, q12, q22):
        P, p = q11 * q22, (1 + q11) * (1 + q22)
        D2 = p - q12**2
        D = mp.sqrt(D2)
        rational = q12 / (2 * mp.pi * D) * (1 / D2 + (1 - P) / p + 1)
        return mp.mpf(1) / 4 + mp.atan2(q12, D) / (2 * mp.pi) + rational

    return value, slope


def sin(c):
    kappa = mp.cos(2 * mp.mpf(c))

    def parts(q11, q12, q22):
        return mp.exp(-(q11 + q22 - 2 * q12) / 2), kappa * mp.exp(-(q11 + q22 + 2 * q12) / 2)

    return (
        lambda *q: (parts(*q)[0] - parts(*q)[1]) / 2,
        lambda *q: (parts(*q)[0] + parts(*q)[1]) / 2,
    )


def cos():
    """Of the phase pi/2 exactly; math.pi / 2 differs from it."""
    return sin(mp.pi / 2)


def rbf(gamma):
    gamma = mp.mpf(gamma)
    value = lambda q11, q12, q22: mp.exp(-gamma * (q11 + q22 - 2 * q12))  # noqa: E731
    return value, lambda *q: 2 * gamma * value(*q)


def exp():
    value = lambda q11, q12, q22: mp.exp((q11 + q22) / 2 + q12)  # noqa: E731
    return value, value


def sign():
    return lambda *q: 1 - 2 * _angle(*q) / mp.pi, None


def deep(k: Cov, value, slope, depth, w2, b2) -> Cov:
    """Covariances and tangent kernel of ``depth`` times (dense, activation), and a last dense layer."""
    for _ in range(depth):
        k = activate(dense(k, w2, b2), value, slope)
    return dense(k, w2, b2)


def expectation(f: Callable, k: Cov, kinks=()) -> float:
    """E f(u) f(v) by nested Gauss-Legendre panels that break at the kinks, in double precision, some 1e-12."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(60)

    def panels(breaks):
        # Breaks of shape (..., K), sorted; returns nodes and weights of the standard normal on the panels.
        low, high = breaks[..., :-1, None], breaks[..., 1:, None]
        z = (low + high) / 2 + (high - low) / 2 * nodes
        w = (high - low) / 2 * weights * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
        return z.reshape(*breaks.shape[:-1], -1), w.reshape(*breaks.shape[:-1], -1)

    q11, q12, q22 = (float(q) for q in k[:3])
    r1 = q11**0.5
    slope, width = q12 / r1, max(q22 - q12**2 / q11, 0.0) ** 0.5
    fixed = np.linspace(-10, 10, 9)
    outer = [t / r1 for t in kinks] + [t / slope + s * width / abs(slope) for t in kinks for s in (-8, 0, 8)]
    z, w = panels(np.sort(np.clip(np.concatenate([fixed, outer]), -10, 10)))
    inner = np.stack([np.broadcast_to(v, z.shape) for v in fixed] + [(t - slope * z) / width for t in kinks], -1)
    y, v = panels(np.sort(np.clip(inner, -10, 10), -1))
    return float((w * f(r1 * z) * (v * f(slope * z[:, None] + width * y)).sum(-1)).sum())
