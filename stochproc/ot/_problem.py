"""The balanced problem that solvers take: weights positive and of sum 1, costs shifted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Problem", "span_of_points"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A balanced dense problem, reduced to what solvers need; nothing in it requires a gradient.

    Parameters
    ----------
    cost : Tensor of shape (n, m)
        float32 or float64, entries finite or ``+inf``; the smallest entry of each row is near 0. Never written to.
    a : Tensor of shape (n,)
        float64, positive, of sum 1.
    b : Tensor of shape (m,)
        The same.
    eps : float
        Regularisation in the unit of the cost.
    span : float
        Largest minus smallest finite entry of the cost as the user gave it.
    """

    cost: Tensor
    a: Tensor
    b: Tensor
    eps: float
    span: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.cost.shape[0], self.cost.shape[1]

    def transposed(self) -> Problem:
        """Return the problem with rows and columns exchanged, in one contiguous copy of the cost."""
        return replace(self, cost=self.cost.T.contiguous(), a=self.b, b=self.a)

    def double(self) -> Problem:
        """Return the problem in float64."""
        return replace(self, cost=self.cost.to(torch.float64))


def span_of_points(X: Tensor, Y: Tensor, metric: Any) -> float:
    """Bound the range of the costs of points; a user's cost is looked at on a sample of them."""
    if isinstance(metric, str):
        extent = torch.maximum(X.amax(0), Y.amax(0)) - torch.minimum(X.amin(0), Y.amin(0))
        if metric == "cityblock":
            return float(extent.sum())
        square = float(extent.square().sum())
        return square if metric == "sqeuclidean" else math.sqrt(square)
    cost = metric(*(t[:: max(1, len(t) // 256)] for t in (X, Y)))
    finite = cost[cost.isfinite()].double()
    return float(finite.max() - finite.min()) if finite.numel() else 0.0
