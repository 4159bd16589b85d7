"""A solved transport between two clouds of points, with all that its maps need and nothing of size n x m."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stochproc._base import Given
from stochproc.kernels import argmin
from stochproc.ot._dist import cost_matrix
from stochproc.ot._form import log_plan
from stochproc.ot._inputs import PointInputs
from stochproc.ot._lazy_plan import LazyPlan
from stochproc.ot._point_form import LAYER_METRICS, barycentric_map

__all__ = ["LogCost", "Transport", "cost_scale"]

# Entries of a block of costs.
BLOCK_ENTRIES = 1 << 20
# The median of the costs is that of at most this many points a side.
MEDIAN_POINTS = 4096


@dataclass(frozen=True)
class LogCost:
    """The logarithm of 1 plus a cost, once or twice; a class and no closure, so that it can be pickled."""

    metric: Any
    times: int

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        cost = cost_matrix(x, y, self.metric)
        for _ in range(self.times):
            cost = cost.log1p()
        return cost


def cost_scale(how: str | None, metric: Any, X: Float[Tensor, "n d"], Y: Float[Tensor, "m d"]) -> float:
    """Return the largest, mean or median cost of all pairs, by blocks; 1 for no scale and where all costs are 0."""
    if how not in ("max", "mean", "median"):
        return 1.0
    if how == "median":
        # Evenly spaced points: nothing is drawn at random, and small problems are exact.
        X, Y = (points[:: -(-len(points) // MEDIAN_POINTS)] for points in (X, Y))
    blocks = (cost_matrix(rows, Y, metric) for rows in X.split(max(1, BLOCK_ENTRIES // len(Y))))
    found = [c.max() if how == "max" else c.sum() if how == "mean" else c for c in blocks]
    values = torch.cat([v.reshape(-1) for v in found]).cpu().numpy()
    scale = values.max() if how == "max" else values.sum() / (len(X) * len(Y)) if how == "mean" else np.median(values)
    if scale > 0 and np.isfinite(scale):
        return float(scale)
    if scale == 0 and not bool(cost_matrix(X, Y[:1], metric).any()) and not bool(cost_matrix(X[:1], Y, metric).any()):
        return 1.0
    raise ValueError(f"norm must divide costs by a positive number; got {how!r}, which is {scale:.6g} for these data.")


class Transport:
    r"""Potentials of a solved problem between points: :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij})/\varepsilon)`.

    Parameters
    ----------
    X, Y : Tensor of shape (n, d) and (m, d)
        float64.
    a, b : Tensor of shape (n,) and (m,)
        Masses, of sum 1 each.
    f, g : Tensor of shape (n,) and (m,)
        Potentials, in the unit of the metric.
    eps : float
        In the unit of the metric.
    metric : str or callable
    lazy : bool
        Whether the plan is an operator.
    rows, columns : Tensor of int64 of shape (n,) and (m,), default=None
        Labels of the points, -1 where unknown; pairs of two different known labels are forbidden. None forbids nothing.
    """

    def __init__(
        self,
        X: Float[Tensor, "n d"],
        Y: Float[Tensor, "m d"],
        a: Float[Tensor, " n"],
        b: Float[Tensor, " m"],
        f: Float[Tensor, " n"],
        g: Float[Tensor, " m"],
        eps: float,
        metric: Any,
        *,
        lazy: bool = False,
        rows: Int[Tensor, " n"] | None = None,
        columns: Int[Tensor, " m"] | None = None,
    ) -> None:
        self.X, self.Y, self.a, self.b, self.f, self.g = X, Y, a, b, f, g
        self.eps, self.metric, self.lazy = eps, metric, lazy
        self.rows, self.columns = rows, columns
        self._moved: dict[bool, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What is computed on demand need not travel.
        return {**vars(self), "_moved": {}}

    def cost(self) -> Float[Tensor, "n m"]:
        """Return the costs, infinite at forbidden pairs."""
        return stored_cost(self.metric, self.X, self.Y, self.rows, self.columns)

    def plan(self) -> Float[Tensor, "n m"]:
        """Return the plan."""
        reg = self.X.new_tensor(self.eps)
        return log_plan(self.cost(), self.a, self.b, reg, self.f, self.g).exp_()

    def lazy_plan(self, dtype: torch.dtype, *, as_torch: bool) -> LazyPlan:
        """Return an operator that multiplies by the plan, for torch or NumPy."""
        clouds = self.X.to(dtype), self.Y.to(dtype)
        given = Given(as_torch, dtype, self.X.device)
        return LazyPlan(*clouds, self.a, self.b, self.f, self.g, self.eps, self.metric, given)

    @torch.no_grad()
    def images(
        self,
        points: Float[Tensor, "k d"],
        values: Float[Tensor, "_ p"] | None = None,
        *,
        forward: bool,
        labels: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "k p"]:
        """Return means of ``values``, by default the points of the other side, over the partners of points.

        The partners are those of the plan, continued to new points; with labels, those that they allow.
        """
        if labels is None and (callable(self.metric) or self.metric in LAYER_METRICS):
            problem: Any = PointInputs(None, self.X, self.Y, self.a, self.b, self.X.new_tensor(self.eps))  # type: ignore[arg-type]
            return barycentric_map(problem, self.metric, self.f, self.g, points, values, forward=forward)
        other, weights, potential = (self.Y, self.b, self.g) if forward else (self.X, self.a, self.f)
        theirs = self.columns if forward else self.rows
        values = other if values is None else values
        height = torch.where(weights > 0, potential + self.eps * weights.log(), -torch.inf)
        out = []
        step = max(1, BLOCK_ENTRIES // len(other))
        for i in range(0, len(points), step):
            block, mine = points[i : i + step], None if labels is None else labels[i : i + step]
            # The cost of a source and a target, in this order.
            pair = (block, other, mine, theirs) if forward else (other, block, theirs, mine)
            cost = stored_cost(self.metric, *pair)
            exponents = (height - (cost if forward else cost.mT)) / self.eps
            if bool((exponents == -torch.inf).all(-1).any()):
                names = ("ys", "target") if forward else ("yt", "source")
                raise ValueError(f"{names[0]} must leave every point a partner; no {names[1]} with weight may be one.")
            out.append(torch.softmax(exponents, -1) @ values)
        return torch.cat(out)

    def own_images(self, values: Tensor | None = None, *, forward: bool) -> Tensor:
        """Return the images of the points of the problem, which are means over rows (or columns) of the plan."""
        points, labels = (self.X, self.rows) if forward else (self.Y, self.columns)
        return self.images(points, values, forward=forward, labels=labels)

    def moved_with_nearest(self, points: Float[Tensor, "k d"], *, forward: bool) -> Float[Tensor, "k d"]:
        """Return points moved by as much as the nearest point of the problem with weight."""
        own, used = (self.X, self.a > 0) if forward else (self.Y, self.b > 0)
        if forward not in self._moved:
            self._moved[forward] = self.own_images(forward=forward)
        nearest = argmin("sqeuclidean", points, own[used])[1]
        return self._moved[forward][used][nearest] + points - own[used][nearest]


def stored_cost(metric: Any, X: Tensor, Y: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """Return the costs of all pairs, infinite where both labels are known and differ."""
    cost = cost_matrix(X, Y, metric)
    if rows is None or columns is None:
        return cost
    forbidden = (rows[:, None] >= 0) & (columns >= 0) & (rows[:, None] != columns)
    return cost.masked_fill(forbidden, torch.inf)
