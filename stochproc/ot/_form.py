"""The torch side of a solved problem: what can be computed from its inputs and potentials."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochproc.ot._gradients import negentropy

__all__ = ["Form"]


class Form:
    """A solved problem in the caller's dtype, device and autograd graph; ``OTResult`` caches and converts.

    Values are in the KL form of the regularisation and refer to the masses that the caller gave. Subclasses, one
    for each way of storing a problem, say how things are computed; a batch has its axis in front of everything.
    """

    a: Tensor
    b: Tensor
    reg: Tensor

    def potentials(self) -> tuple[Tensor, Tensor]:
        """Return f (n) and g (m), with sum_j b_j g_j = 0."""
        raise NotImplementedError

    def plan(self) -> Tensor:
        """Return the plan (n, m), differentiable."""
        raise NotImplementedError

    def sparse_plan(self) -> Tensor:
        """Return the plan as a sparse COO tensor, without the graph."""
        raise NotImplementedError

    def lazy_plan(self) -> Any:
        """Return an operator that multiplies by the plan."""
        raise NotImplementedError

    def value(self) -> Tensor:
        """Return the regularised cost, differentiable."""
        raise NotImplementedError

    def value_linear(self) -> Tensor:
        """Return <P, M>, differentiable."""
        raise NotImplementedError

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Return the sums of the rows and of the columns of the plan."""
        raise NotImplementedError

    def dual_value(self) -> Tensor:
        """Return the dual objective at the potentials, a lower bound of the regularised cost, in float64."""
        raise NotImplementedError

    def primal_value(self) -> Tensor:
        """Return the primal objective at the plan rounded to exact marginals, an upper bound, in float64.

        Infinite where rounding would need a forbidden pair.
        """
        raise NotImplementedError

    def lower_bound(self) -> Tensor:
        """Return a lower bound of the cost without regularisation, from hard c-transforms, in float64."""
        raise NotImplementedError

    def images(self, points: Any, values: Any, *, forward: bool) -> Tensor:
        """Return barycentric images of rows (forward) or columns; see ``OTResult.a_to_b``."""
        raise NotImplementedError

    def entropy_shift(self) -> Tensor:
        """Return what the entropy form of the value exceeds the KL form by, differentiable."""
        return self.reg * (negentropy(self.a.double()) + negentropy(self.b.double()))


def log_plan(M: Tensor, a: Tensor, b: Tensor, eps: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """Return the logarithm of a plan in float64: -inf at weights of 0 and at forbidden pairs."""
    # In place, in one array of the size of M; differences first, as potentials and costs may be large and close.
    out = f.unsqueeze(-1) - M
    out += g.unsqueeze(-2)
    out *= 1 / eps.double()[..., None, None]
    out += a.double().log().unsqueeze(-1)
    out += b.double().log().unsqueeze(-2)
    return out


def bounded(x: Tensor) -> Tensor:
    """Return potentials in which a point without any partner, whose potential is infinite, has 0."""
    return torch.where(x.abs() < math.inf, x, 0.0)
