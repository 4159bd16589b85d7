"""Points cut into the occupied cells of a grid, in Morton order: the coarse side of the lazy path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Cells", "cells_of_points", "cut"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Cells:
    """Weighted points grouped into k cells; arrays are NumPy's, on the CPU.

    Parameters
    ----------
    order : ndarray of shape (n,), int32 or int64
        ``points[order]`` are sorted by cell, near cells near each other.
    starts : ndarray of shape (k + 1,)
        Where each cell starts among the sorted points.
    mass : ndarray of shape (k,)
        Weight of each cell, positive.
    centre : Tensor of shape (k, d), float64
        Weighted mean of the points of each cell, or the point next to it.
    """

    order: Array
    starts: Array
    mass: Array
    centre: Tensor

    def __len__(self) -> int:
        return len(self.mass)

    def sums(self, sorted_values: Array) -> Array:
        """Add up values of sorted points by cell."""
        return np.add.reduceat(sorted_values, self.starts[:-1])

    def owner(self) -> Array:
        """Return the cell of each sorted point."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))


def cut(points: Array, weights: Array, side: float, *, central: bool = False) -> Cells:
    """Cut points (n, d) into cells of a grid; only cells with points in them exist.

    ``central`` takes a point of the cell instead of its mean, for a cost that is defined on the given points alone.
    """
    place = np.floor((points - points.min(0)).astype(np.float64) / side)
    # A far outlier makes indices of any size; ranks keep their order and fit the key.
    ranks = [np.unique(column, return_inverse=True)[1].reshape(-1) for column in place.T]
    key = _morton(np.stack(ranks, 1).astype(np.int64))
    order = np.argsort(key, kind="stable")
    key = key[order]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(key)) + 1, [len(key)]])
    w, p = weights[order], points[order]
    mass = np.add.reduceat(w, starts[:-1])
    centre = np.add.reduceat(p * w[:, None], starts[:-1], axis=0) / mass[:, None]
    if central:
        owner = np.repeat(np.arange(len(mass)), np.diff(starts))
        away = np.square(p - centre[owner]).sum(1)
        # The first of each cell, sorted by distance within it.
        centre = p[np.lexsort((away, owner))[starts[:-1]]]
    return Cells(order.astype(np.int32), starts, mass, torch.from_numpy(centre))


def cells_of_points(points: Array, weights: Array, side: float) -> Cells:
    """Return one cell a point, in the order that cells of this side would have."""
    order = cut(points, weights, side).order
    starts = np.arange(len(points) + 1)
    return Cells(order, starts, weights[order], torch.from_numpy(points[order]))


def _morton(place: Array) -> Array:
    """Interleave the bits of up to three small non-negative integers a row."""
    n_bits = max(1, int(place.max()).bit_length())
    key = np.zeros(len(place), dtype=np.int64)
    d = place.shape[1]
    for bit in range(n_bits):
        for k in range(d):
            key |= ((place[:, k] >> bit) & 1) << (bit * d + k)
    return key
