"""How wide the kernel exp(-c / eps) is, in the unit of the points: what cells must be compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stochproc.ot._cells import cut
from stochproc.ot._dist import cost_matrix

__all__ = ["kernel_width"]

Array = NDArray[Any]
Width = Callable[[float], float]

# Sides looked at: the longest extent divided by powers of 2.
HALVINGS = 16
SAMPLED_CELLS = 64, 1024
# Of those of the second cloud, the nearest count for each of the first: they are what a plan links, and where a cost
# with a kink bends.
NEAREST = 4
# Of the mixed second difference of the squared distance, over eps, in cells of side 2 w: sqrt(d) / 6 each way.
ALLOWED = 0.4


def kernel_width(metric: Any, X: Array, Y: Array) -> Width:
    r"""Return the width w as a function of eps; :math:`\sqrt{\varepsilon / 2}` for the squared distance.

    For other costs w is half the largest side of cells within which the part of the cost that no potential can take
    up, :math:`c(x, y) - c(x', y) - c(x, y') + c(x', y')`, stays as small as for the squared distance in cells of 2 w.
    """
    if metric == "sqeuclidean":
        return lambda eps: math.sqrt(eps / 2)
    extent = float(max(np.ptp(X, axis=0).max(), np.ptp(Y, axis=0).max()))
    if extent == 0:
        return lambda eps: 1.0
    sides = extent / 2.0 ** np.arange(1, HALVINGS + 1)
    generator = np.random.default_rng(0)
    sizes = [_mixed_difference(metric, X, Y, side, generator) for side in sides]
    known = [(side, size) for side, size in zip(sides, sizes, strict=True) if size is not None and size > 0]
    if not known:
        return lambda eps: 0.5 * extent
    log_side, log_size = np.log(np.array(known)).T
    # Growing with the side but for chance.
    log_size = np.minimum.accumulate(log_size)

    def width(eps: float) -> float:
        level = math.log(ALLOWED * eps)
        found = np.interp(level, log_size[::-1], log_side[::-1])
        # Below the smallest distances seen, in proportion, as for a cost with a kink.
        return 0.5 * math.exp(found + min(0.0, level - log_size[-1]))

    return width


def _mixed_difference(metric: Any, X: Array, Y: Array, side: float, generator: np.random.Generator) -> float | None:
    """Return the root mean square of the mixed second difference within cells; None where points are too sparse."""
    x = _neighbours(X, side, SAMPLED_CELLS[0], generator)
    y = _neighbours(Y, side, SAMPLED_CELLS[1], generator)
    if x is None or y is None:
        return None
    c = [cost_matrix(torch.from_numpy(p), torch.from_numpy(q), metric).double() for p in x for q in y]
    near = c[0].topk(min(NEAREST, c[0].shape[1]), dim=1, largest=False).indices
    difference = (c[0] - c[1] - c[2] + c[3]).gather(1, near)
    finite = difference[difference.isfinite()]
    return float(finite.square().mean().sqrt()) if finite.numel() else None


def _neighbours(points: Array, side: float, most: int, generator: np.random.Generator) -> tuple[Array, Array] | None:
    """Return two points each of some cells."""
    cells = cut(points, np.ones(len(points)), side)
    counts = np.diff(cells.starts)
    usable = np.flatnonzero(counts > 1)
    if not len(usable):
        return None
    chosen = generator.choice(usable, min(most, len(usable)), replace=False)
    first = generator.integers(counts[chosen])
    second = (first + 1 + generator.integers(counts[chosen] - 1)) % counts[chosen]
    start = cells.starts[chosen]
    return points[cells.order[start + first]], points[cells.order[start + second]]
