"""Sweeps over all pairs of cells of a grid, one axis at a time, for a cost that is a sum over the axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stochproc.ot._newton import ANNEAL_BY, ANNEAL_FROM, ANNEAL_TOL
from stochproc.ot._outcome import Tracker
from stochproc.solvers import CG

__all__ = [
    "AxisCosts",
    "GridPass",
    "GridPasses",
    "GridProblem",
    "ScaledSolver",
    "Smoothing",
    "SymmetricPass",
    "self_transport",
]

# exp(-600) is far from the underflow of float64 at exp(-708), so that a product with the kernel of one axis loses
# nothing: a dropped weight is below exp(-745) times the largest, and every sum is above exp(-600) times it.
PRODUCT_SPAN = 600.0
# Entries of the explicit softmax of some lines.
BLOCK = 1 << 20
MAX_CG = 300


class AxisCosts:
    r"""The cost :math:`\sum_k |s_k (i_k - j_k)|^p` between cells i and j of a grid, as one matrix an axis.

    Parameters
    ----------
    shape : sequence of int
        Sides of the grid.
    spacing : sequence of float
        Distance of neighbouring cells along each axis.
    p : float
    device : torch.device
    """

    def __init__(self, shape: Sequence[int], spacing: Sequence[float], p: float, device: torch.device) -> None:
        self.shape = tuple(shape)
        self.matrices = []
        for side, step in zip(shape, spacing, strict=True):
            at = step * torch.arange(side, dtype=torch.float64, device=device)
            self.matrices.append((at.unsqueeze(1) - at).abs() ** p)
        self.span = float(sum(matrix[0, -1] for matrix in self.matrices))

    def conjugate(self, g: Tensor) -> Tensor:
        """Return the smallest of cost minus g over all cells, for each cell: one pass of minima along each axis."""
        out = -g
        for axis, matrix in enumerate(self.matrices):
            lines = out.movedim(axis, -1)
            flat = lines.reshape(-1, lines.shape[-1])
            blocks = flat.split(max(1, BLOCK // matrix.numel()))
            flat = torch.cat([(block.unsqueeze(1) + matrix).amin(-1) for block in blocks])
            out = flat.reshape(lines.shape).movedim(-1, axis)
        return out

    def between(self, row_mass: Tensor, column_mass: Tensor) -> float:
        """Return the cost of the independent coupling of two masses on the grid, over its total mass squared."""
        total = 0.0
        for axis, matrix in enumerate(self.matrices):
            rows, columns = (t.movedim(axis, 0).reshape(t.shape[axis], -1).sum(1) for t in (row_mass, column_mass))
            total += float(rows @ matrix @ columns)
        return total


class Smoothing:
    r"""The softmax weights :math:`\propto \exp(h_j - C_{ij} / \epsilon)` of cells j, for each cell i.

    A product along each axis is all it takes, since the weights given the first coordinates of i are again of this
    form. Where the kernel of an axis underflows, the weights of its lines are stored.

    Parameters
    ----------
    costs : AxisCosts
    h : Tensor of the shape of the grid
        float64; ``-inf`` leaves a cell out.
    eps : float
    """

    def __init__(self, costs: AxisCosts, h: Tensor, eps: float) -> None:
        self.costs, self.steps = costs, []
        for axis, matrix in enumerate(costs.matrices):
            lines = h.movedim(axis, -1)
            step: _Product | _Weights
            if float(matrix[0, -1]) <= PRODUCT_SPAN * eps:
                step, out = _Product.of(lines, matrix, eps)
            else:
                step, out = _Weights.of(lines, matrix, eps)
            self.steps.append(step)
            h = out.movedim(-1, axis)
        self.lse = h
        """Logarithm of the sum of exp(h_j - C_ij / eps), for each i."""

    def mean(self, q: Tensor, weigh: int | None = None) -> Tensor:
        """Return the mean of q, or of q times the cost along the axis ``weigh``, for each i; 0 without any weight."""
        for axis, step in enumerate(self.steps):
            cost = self.costs.matrices[axis] if axis == weigh else None
            q = step.mean(q.movedim(axis, -1), cost).movedim(-1, axis)
        return q

    def mean_cost(self, q: Tensor) -> Tensor:
        """Return the mean of q times the cost, for each i."""
        return torch.stack([self.mean(q, axis) for axis in range(len(self.steps))]).sum(0)


@dataclass
class _Product:
    """One axis by products with its kernel, each line scaled by its largest entry."""

    scaled: Tensor
    kernel: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, lines: Tensor, matrix: Tensor, eps: float) -> tuple[_Product, Tensor]:
        kernel = (-matrix / eps).exp()
        top = lines.amax(-1, keepdim=True)
        # A line without any cell: -inf minus -inf is no number.
        scaled = (lines - torch.where(top > -math.inf, top, 0.0)).exp()
        total = scaled @ kernel
        inverse = torch.where(total > 0, 1 / total, 0.0)
        return cls(scaled, kernel, inverse), total.log() + top

    def mean(self, q: Tensor, cost: Tensor | None) -> Tensor:
        kernel = self.kernel if cost is None else self.kernel * cost
        return (self.scaled * q) @ kernel * self.inverse


@dataclass
class _Weights:
    """One axis by its softmax weights."""

    weights: Tensor

    @classmethod
    def of(cls, lines: Tensor, matrix: Tensor, eps: float) -> tuple[_Weights, Tensor]:
        z = lines.unsqueeze(-2) - matrix / eps
        top = z.amax(-1, keepdim=True)
        z = z.sub_(torch.where(top > -math.inf, top, 0.0)).exp_()
        total = z.sum(-1, keepdim=True)
        out = (total.log() + top).squeeze(-1)
        return cls(z.mul_(torch.where(total > 0, 1 / total, 0.0))), out

    def mean(self, q: Tensor, cost: Tensor | None) -> Tensor:
        weights = self.weights if cost is None else self.weights * cost
        return (weights @ q.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class GridProblem:
    """Two measures of mass 1 on one grid, each given by its positive weights and where they are.

    Parameters
    ----------
    costs : AxisCosts
    a, b : Tensor of shape (n,) and (m,)
        float64, positive, of sum 1.
    at_a, at_b : Tensor of shape (n,) and (m,)
        Their cells, as indices into the flattened grid.
    eps : float
    """

    costs: AxisCosts
    a: Tensor
    b: Tensor
    at_a: Tensor
    at_b: Tensor
    eps: float

    @property
    def span(self) -> float:
        """Largest cost between two cells."""
        return self.costs.span

    @property
    def shape(self) -> tuple[int, int]:
        """Number of weights of either side."""
        return self.a.shape[0], self.b.shape[0]

    def spread(self, values: Tensor, at: Tensor, fill: float = 0.0) -> Tensor:
        """Return values on the whole grid."""
        out = values.new_full((math.prod(self.costs.shape),), fill)
        out[at] = values
        return out.reshape(self.costs.shape)


class GridPass:
    """What two sweeps at a potential g know: the plan with exact rows, as means over its rows and columns."""

    def __init__(self, problem: GridProblem, g: Tensor, eps: float) -> None:
        self.problem, self.g, self.eps = problem, g, eps
        self.row_means = Smoothing(
            problem.costs, problem.spread(g / eps + problem.b.log(), problem.at_b, -math.inf), eps
        )
        f_grid = -self.row_means.lse.reshape(-1)[problem.at_a]
        h = problem.spread(f_grid + problem.a.log(), problem.at_a, -math.inf)
        self.column_means = Smoothing(problem.costs, h, eps)
        # log(b / c), which a sum of underflowing numbers would not give.
        self.ratio = -self.column_means.lse.reshape(-1)[problem.at_b] - g / eps
        self.c = problem.b * (-self.ratio).exp()
        self.f = eps * f_grid
        self.phi = float(problem.a @ self.f + problem.b @ g)
        self.err = float((self.c - problem.b).abs().sum())

    def log_ratio(self) -> tuple[Tensor, bool]:
        """Return log b - log c, which is known."""
        return self.ratio, False

    def rows(self, p: Tensor) -> Tensor:
        """Return diag(1/a) P p."""
        problem = self.problem
        return self.row_means.mean(problem.spread(p, problem.at_b)).reshape(-1)[problem.at_a]

    def columns(self, q: Tensor) -> Tensor:
        """Return diag(1/c) P^T q."""
        problem = self.problem
        return self.column_means.mean(problem.spread(q, problem.at_a)).reshape(-1)[problem.at_b]

    def self_mass(self) -> Tensor:
        """Return sum_i P_ij^2 / a_i, by one more sweep at half of eps."""
        problem = self.problem
        h = problem.spread(2 * self.f / self.eps + problem.a.log(), problem.at_a, -math.inf)
        squares = Smoothing(problem.costs, h, self.eps / 2).lse.reshape(-1)[problem.at_b]
        return (squares + 2 * (self.g / self.eps + problem.b.log())).exp()


class ScaledSolver:
    r"""Solves (S + Lam) d = rhs inexactly, in the variables :math:`\sqrt{c}\, d`.

    Images often have tails of 1e-50 of their mass. There the null direction of ones can only be taken out of residuals
    in proportion to c: rounding of a plain mean, over such a c, would be astronomical.
    """

    def solve(self, point: GridPass, rhs: Tensor, ridge: Tensor, rtol: float) -> tuple[Tensor, int]:
        """Return a direction and the iterations of conjugate gradients it took."""
        root = point.c.sqrt()
        null = root / root.norm()
        relative = ridge / point.c
        diagonal = torch.clamp(1 - point.self_mass() / point.c, min=0.01) + relative

        def product(q: Tensor) -> Tensor:
            p = q / root
            return root * (p - point.columns(point.rows(p))) + relative * q

        def project(q: Tensor) -> Tensor:
            return q - null * (null @ q)

        cg = CG(rtol=rtol, max_iter=MAX_CG, precond=lambda q: q / diagonal, project=project, verify=False)
        result = cg(product, project(rhs / root))
        return result.value / root, result.convergence.iterations


class SymmetricPass:
    """One sweep at a potential f of a measure and itself, whose optimal plan is symmetric."""

    def __init__(self, problem: GridProblem, f: Tensor) -> None:
        eps = problem.eps
        self.problem, self.f = problem, f
        self.means = Smoothing(problem.costs, problem.spread(f / eps + problem.a.log(), problem.at_a, -math.inf), eps)
        self.softmin = -eps * self.means.lse.reshape(-1)[problem.at_a]
        self.ratio = (f - self.softmin) / eps
        """Logarithm of the row sums over the weights."""
        self.r = problem.a * self.ratio.exp()
        self.err = float(2 * (self.r - problem.a).abs().sum())

    def product(self, p: Tensor) -> Tensor:
        """Multiply by diag(r) + P."""
        problem = self.problem
        return self.r * (p + self.means.mean(problem.spread(p, problem.at_a)).reshape(-1)[problem.at_a])


def self_transport(problem: GridProblem, tracker: Tracker) -> SymmetricPass:
    r"""Solve for the potential of a measure and itself, annealed: :math:`f = T f` with T the softmin.

    Far off, the mean of f and T f; near, a Newton step, whose matrix diag(r) + P is well conditioned.
    """
    final = problem.eps
    problem = replace(problem, eps=max(final, problem.span / ANNEAL_FROM))
    f = torch.zeros_like(problem.a)
    while True:
        point = SymmetricPass(problem, f)
        last = problem.eps <= final
        tol = tracker.tol if last else ANNEAL_TOL
        newton, smallest = True, math.inf
        while True:
            tracker.record(problem.eps, point.err, 2 * float(problem.a @ point.f))
            if point.err <= tol or tracker.ended is not None:
                break
            # A full step that does not pay is followed by a mean, which always gets closer.
            newton = point.err < 0.9 * smallest and float(point.ratio.abs().max()) <= 0.5
            smallest = min(smallest, point.err)
            if newton:
                inverse = 1 / point.r
                cg = CG(rtol=min(0.1, point.err), max_iter=100, precond=lambda p, w=inverse: w * p, verify=False)
                found = cg(point.product, problem.eps * (problem.a - point.r))
                tracker.count("newton")
                tracker.count("cg", found.convergence.iterations)
                f = point.f + found.value
            else:
                tracker.count("sinkhorn")
                f = (point.f + point.softmin) / 2
            point = SymmetricPass(problem, f)
        if last or tracker.ended is not None:
            return point
        f, problem = point.f, replace(problem, eps=max(final, problem.eps / ANNEAL_BY))


class GridPasses:
    """Where the sweeps of one problem come from; they keep no buffers."""

    def __init__(self, problem: GridProblem) -> None:
        self.problem = problem

    def at(self, g: Tensor, eps: float) -> GridPass:
        """Sweep at g."""
        return GridPass(self.problem, g, eps)

    def release(self, old: GridPass) -> None:
        """Do nothing: a pass owns what it needs."""
