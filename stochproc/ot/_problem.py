"""The balanced problem that solvers take: weights positive and of sum 1, costs shifted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Problem"]


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
