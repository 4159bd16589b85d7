"""Transport problems with known difficulty: random assignment, images, clouds, uneven and missing weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import zoom
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

Array = NDArray[np.float64]
# Pairs of scikit-learn's digits by their place in the data set; the first belongs to the anchors.
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


@dataclass(frozen=True, eq=False)
class Transport:
    """A cost and the weights of both sides, each of sum 1."""

    name: str
    M: Array
    a: Array
    b: Array

    def err(self, plan: Any) -> float:
        """L1 distance of both marginals of a plan from the weights, recomputed."""
        plan = np.asarray(plan)
        return float(np.abs(plan.sum(1) - self.a).sum() + np.abs(plan.sum(0) - self.b).sum())

    def linear(self, plan: Any) -> float:
        """<P, M>."""
        return float(np.vdot(np.asarray(plan), self.M))


def assignment(n: int, m: int | None = None, *, seed: int = 0) -> Transport:
    """LAP(n): costs uniform in [0, 1], independent; uniform weights."""
    m = n if m is None else m
    name = f"LAP({n})" if n == m else f"LAP({n}, {m})"
    cost = np.random.default_rng(seed).random((n, m))
    return Transport(name, cost, np.full(n, 1 / n), np.full(m, 1 / m))


def digit(index: int, side: int = 28) -> Array:
    """One digit of 8 x 8, zoomed bilinearly, with a background of 1e-3 of the maximum, as weights."""
    image = zoom(load_digits().images[index], side / 8, order=1).clip(0)
    image = image + 1e-3 * image.max()
    return (image / image.sum()).ravel()


def images(metric: str = "sqeuclidean", *, side: int = 28, seed: int = 0) -> Transport:
    """Two digits on a grid of side x side; the cost between pixels is scaled to a maximum of 1."""
    rows, columns = np.divmod(np.arange(side * side, dtype=np.float64), side)
    points = np.stack([rows, columns], 1)
    cost = cdist(points, points, metric)
    label = {"sqeuclidean": "sq-L2", "cityblock": "L1"}[metric]
    first, second = PAIRS[seed]
    name = f"IMG {label} {side * side}"
    return Transport(name, cost / cost.max(), digit(first, side), digit(second, side))


def cloud(n: int, m: int | None = None, *, d: int = 2, seed: int = 0, scale: bool = False) -> Transport:
    """CLOUD(n): uniform against cubed uniform points in the unit cube, squared distances, random weights."""
    m = n if m is None else m
    rng = np.random.default_rng(seed)
    x, y = rng.random((n, d)), rng.random((m, d)) ** 3
    cost = cdist(x, y, "sqeuclidean")
    name = f"CLOUD({n})" if d == 2 else f"CLOUD({n}) d={d}"
    return Transport(name, cost / cost.max() if scale else cost, weights(n, rng), weights(m, rng))


def weights(n: int, rng: np.random.Generator) -> Array:
    """Uniform random numbers over their sum."""
    w = rng.random(n)
    return w / w.sum()


def skewed(n: int, *, seed: int = 0) -> Transport:
    """A cloud with weights exp(-30 u): over 13 decades."""
    base, rng = cloud(n, seed=seed, scale=True), np.random.default_rng(seed + 1)
    a, b = np.exp(-30 * rng.random(n)), np.exp(-30 * rng.random(n))
    return Transport(f"skewed weights {n}", base.M, a / a.sum(), b / b.sum())


def with_zeros(n: int, *, seed: int = 0) -> Transport:
    """A cloud of which 30 % of the weights are exactly zero on both sides."""
    base, rng = cloud(n, seed=seed, scale=True), np.random.default_rng(seed + 1)
    a, b = (w * (rng.permutation(n) >= round(0.3 * n)) for w in (base.a, base.b))
    return Transport(f"30 % zero weights {n}", base.M, a / a.sum(), b / b.sum())


# The four problems that the targets at eta = 1200 speak of, as functions of the seed.
MAIN: dict[str, Callable[[int], Transport]] = {
    "LAP(500)": lambda seed: assignment(500, seed=seed),
    "IMG sq-L2 784": lambda seed: images("sqeuclidean", seed=seed),
    "IMG L1 784": lambda seed: images("cityblock", seed=seed),
    "CLOUD(1000)": lambda seed: cloud(1000, seed=seed),
}


def many() -> Iterator[Transport]:
    """18 problems of n = 100 to 400; at eta = 50, 1e3, 1e4 and 1e5 they make 72."""
    for n in (200, 400):
        yield assignment(n)
    for n, m in ((300, 200), (150, 400)):
        yield assignment(n, m)
    for d in (1, 2, 5, 20):
        yield cloud(200, d=d, scale=True)
        yield cloud(400, 300, d=d, seed=1, scale=True)
    for metric in ("cityblock", "sqeuclidean"):
        yield images(metric, side=20)
        yield images(metric, side=14, seed=1)
    yield skewed(200)
    yield with_zeros(300)
