"""What can be computed of a solved problem between point clouds without ever storing its costs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochproc.kernels import logsumexp, softmax_pass, support
from stochproc.ot import _gradients_lazy as gradients
from stochproc.ot._dense_form import SPARSE_LEVEL
from stochproc.ot._dist import cost_matrix
from stochproc.ot._form import Form
from stochproc.ot._inputs import PointInputs
from stochproc.ot._lazy import scaled_points
from stochproc.ot._lazy_plan import LazyPlan
from stochproc.ot._point_form import barycentric_map, flipped

__all__ = ["LazyForm"]

# Entries beyond which a plan is not written out.
MAX_ENTRIES = 1e8
# Entries of a block of costs.
BLOCK_ENTRIES = 1 << 18
# Hard minima are taken as soft ones at this part of reg: off by at most that times log m, on the safe side.
HARD = 1e-3


class LazyForm(Form):
    """A balanced problem between point clouds whose costs are recomputed wherever they are needed.

    Parameters
    ----------
    points : PointInputs
        As the caller gave them, in the graph.
    metric : str or callable
        A cost of the kernel layer.
    f, g : Tensor of shape (n,) and (m,)
        Solved potentials, float64, for the masses of the caller, outside the graph.
    grad : {"implicit", "envelope"}
        What gradients outputs carry; "envelope" leaves them to the value.
    """

    def __init__(self, points: PointInputs, metric: Any, f: Tensor, g: Tensor, *, grad: str = "implicit") -> None:
        self.points, self.metric = points, metric
        self.a, self.b, self.reg = points.a, points.b, points.reg
        self.f, self.g = f, g
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in points[1:])
        self.tracked = {"value": tracked, "plan": tracked and grad == "implicit"}

    @property
    def _arguments(self) -> tuple[Any, ...]:
        p = self.points
        return self.metric, p.X, p.Y, p.a, p.b, p.reg, self.f, self.g

    @property
    def eps(self) -> float:
        return float(self.reg.detach())

    def _clouds(self) -> tuple[Tensor, Tensor]:
        return self.points.X.detach(), self.points.Y.detach()

    def potentials(self) -> tuple[Tensor, Tensor]:
        if self.tracked["plan"]:
            return gradients.lazy_potentials(*self._arguments)
        return self.f.to(self.a.dtype), self.g.to(self.a.dtype)

    def lazy_plan(self) -> LazyPlan:
        X, Y = self._clouds()
        a, b = self.a.detach().double(), self.b.detach().double()
        return LazyPlan(X, Y, a, b, self.f, self.g, self.eps, self.metric, self.points.given)

    def plan(self) -> Tensor:
        n, m = len(self.f), len(self.g)
        if n * m > MAX_ENTRIES:
            raise ValueError(
                f"plan must have at most {MAX_ENTRIES:.0e} entries to be written out; this one has {n * m:.1e}. Use "
                "lazy_plan, which multiplies by it, or sparse_plan."
            )
        if self.tracked["plan"]:
            return gradients.lazy_plan(*self._arguments)
        X, Y = self._clouds()
        rows, columns, c = support(
            self.metric, X, Y, self._row_height(), self._column_height(), -math.inf, eps=self.eps
        )
        plan = X.new_zeros(n, m)
        plan[rows, columns] = self._entries(rows, columns, c)
        return plan

    def sparse_plan(self) -> Tensor:
        X, Y = self._clouds()
        a, b = self.a.detach().double(), self.b.detach().double()
        found = []
        # Above the part of its row's weight, and above that of its column's: two searches, one each way.
        for flip, weights in ((False, a), (True, b)):
            level = torch.where(weights > 0, (SPARSE_LEVEL * weights).log(), math.inf)
            sides = (
                (Y, X, self._column_height(), self._row_height())
                if flip
                else (X, Y, self._row_height(), self._column_height())
            )
            rows, columns, c = support(flipped(self.metric) if flip else self.metric, *sides, level, eps=self.eps)
            rows, columns = (columns, rows) if flip else (rows, columns)
            found.append((rows, columns, self._entries(rows, columns, c)))
        where = torch.cat([torch.stack(pair[:2]) for pair in found], 1)
        key, first = _first_of_each(where[0] * len(self.g) + where[1])
        values = torch.cat([pair[2] for pair in found])[first]
        index = torch.stack([key // len(self.g), key % len(self.g)])
        shape = (len(self.f), len(self.g))
        return torch.sparse_coo_tensor(index, values, shape, is_coalesced=True, check_invariants=True)

    def _entries(self, rows: Tensor, columns: Tensor, c: Tensor) -> Tensor:
        # One exponential: products of two small or two large weights leave the range of their dtype.
        log_ab = self.a.detach().double().log()[rows] + self.b.detach().double().log()[columns]
        return ((self.f[rows] + self.g[columns] - c) / self.eps + log_ab).exp().to(self.a.dtype)

    def _row_height(self) -> Tensor:
        return self.f + self.eps * self.a.detach().double().log()

    def _column_height(self) -> Tensor:
        return self.g + self.eps * self.b.detach().double().log()

    def value(self) -> Tensor:
        if self.tracked["value"]:
            return gradients.lazy_value(*self._arguments)
        return self.dual_value().to(self.a.dtype)

    def value_linear(self) -> Tensor:
        if self.tracked["plan"]:
            return gradients.lazy_value_linear(*self._arguments)
        return self._linear(self.f, self.g).to(self.a.dtype)

    def _linear(self, f: Tensor, g: Tensor) -> Tensor:
        """Return <P, M> of the plan of two potentials, from the derivative of the soft maxima in eps."""
        # In a unit in which squares of the costs do not leave the range of floats.
        X, Y = (t.double() for t in self._clouds())
        X, Y, unit = scaled_points(X, Y, self.metric)
        f, g, strength = f / unit, g / unit, self.eps / unit
        a, b = self.a.detach().double(), self.b.detach().double()
        height = torch.where(b > 0, g + strength * b.log(), -math.inf)
        with torch.inference_mode(False), torch.enable_grad():
            # What comes from inference mode may not be kept for a backward; a copy may.
            X, Y, height = (t.clone() if t.is_inference() else t for t in (X, Y, height))
            eps = torch.tensor(strength, dtype=torch.float64, device=X.device, requires_grad=True)
            soft = logsumexp(self.metric, X, Y, height, eps=eps)
            # Row sums of the plan; the row softmax times these is the plan.
            sums = torch.where(a > 0, a * (f / strength + soft.detach()).exp(), 0.0)
            (slope,) = torch.autograd.grad((sums * soft).sum(), eps)
        product = softmax_pass(self.metric, X, Y, height, sums, eps=strength)
        finite = torch.where(b > 0, height, 0.0)
        # d soft_i / d eps = -sum_j K_ij (height_j - c_ij) / eps^2
        return unit * ((product.mass * finite).sum() + strength**2 * slope)

    def _plan_sums(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        X, Y = (t.double() for t in self._clouds())
        a, b = self.a.detach().double(), self.b.detach().double()
        height = torch.where(b > 0, g + self.eps * b.log(), -math.inf)
        rows = []

        def weights(soft: Tensor, block: slice) -> Tensor:
            rows.append(torch.where(a[block] > 0, a[block] * (f[block] / self.eps + soft).exp(), 0.0))
            return rows[-1]

        swept = softmax_pass(self.metric, X, Y, height, weights, eps=self.eps)
        return torch.cat(rows), swept.mass

    def marginals(self) -> tuple[Tensor, Tensor]:
        rows, columns = self._plan_sums(self.f, self.g)
        return rows.to(self.a.dtype), columns.to(self.a.dtype)

    def dual_value(self) -> Tensor:
        return self.a.detach().double() @ self.f + self.b.detach().double() @ self.g

    def primal_value(self) -> Tensor:
        """Return an upper bound from the rounded plan Q + R, R of rank one, by convexity of the divergence."""
        a, b, eps = self.a.detach().double(), self.b.detach().double(), self.eps
        mass = a.sum()
        rows, _ = self._plan_sums(self.f, self.g)
        log_u = torch.where(rows > a, (a / rows).log(), 0.0)
        f = self.f + eps * log_u
        _, columns = self._plan_sums(f, self.g)
        g = self.g + eps * torch.where(columns > b, (b / columns).log(), 0.0)
        rows, columns = self._plan_sums(f, g)
        left, right = (a - rows).clamp(min=0), (b - columns).clamp(min=0)
        linear, share = self._linear(f, g), rows.sum() / mass
        # KL of the part with the potentials' form, scaled up to the whole mass, from its logarithm.
        whole = (rows @ f + columns @ g - linear) / eps / share - mass * share.log()
        theta = left.sum() / mass
        if float(theta) <= 0:
            return linear + eps * whole
        X, Y = (t.double() for t in self._clouds())
        rest = left / left.sum()
        cost = self._mean_cost(X, Y, rest, right / right.sum()) * left.sum()
        # The same of the rank-one part, mass times the product of two distributions.
        kl = mass * (
            torch.xlogy(rest, rest).sum()
            + torch.xlogy(right / right.sum(), right / right.sum()).sum()
            - (rest * torch.where(rest > 0, a, 1.0).log()).sum()
            - (right / right.sum() * torch.where(right > 0, b, 1.0).log()).sum()
            + mass.log()
        )
        return linear + cost + eps * ((1 - theta) * whole + theta * kl)

    def _mean_cost(self, X: Tensor, Y: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """Return sum_ij p_i q_j c_ij."""
        total = p.new_zeros(())
        step = max(1, BLOCK_ENTRIES // len(Y))
        for i in range(0, len(X), step):
            cost = cost_matrix(X[i : i + step], Y, self.metric)
            total += p[i : i + step] @ (torch.where(cost < math.inf, cost, 0.0) @ q)
        return total

    def lower_bound(self) -> Tensor:
        X, Y = (t.double() for t in self._clouds())
        a, b = self.a.detach().double(), self.b.detach().double()
        eps = HARD * self.eps
        height = torch.where(b > 0, self.g, -math.inf)
        f = -eps * logsumexp(self.metric, X, Y, height, eps=eps)
        return (a * torch.where(a > 0, f, 0.0)).sum() + b @ self.g

    def images(self, points: Any, values: Any, *, forward: bool) -> Tensor:
        f, g = self.potentials()
        return barycentric_map(self.points, self.metric, f, g, points, values, forward=forward)


def _first_of_each(key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct entries, ascending, and where each comes first."""
    order = key.argsort(stable=True)
    ascending = key[order]
    new = torch.ones_like(ascending, dtype=torch.bool)
    new[1:] = ascending[1:] != ascending[:-1]
    return ascending[new], order[new]
