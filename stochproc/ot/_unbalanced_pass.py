r"""One sweep of unbalanced transport: the balanced sweep, with the weights that the penalties leave.

The gauge t of the potentials (f + t, g - t) and the transported mass are maximised away in closed form. What is left
is a concave function of g that adding a constant to g does not change,

.. math:: \Psi(g) = -A_{\rho_a + \varepsilon}(-f(g); a) - A_{\rho_b}(-g; b), \quad
          A_s(x; w) = s \log \sum_i w_i e^{x_i / s},

with f(g) the balanced potential of the rows and weights of sum one. Its gradient is v - c, where
:math:`v_j \propto b_j e^{-g_j / \rho_b}` and c are the column sums of the plan whose row sums are
:math:`u_i \propto a_i e^{-f_i / (\rho_a + \varepsilon)}`: a balanced problem whose weights move with g. A side with
:math:`\rho = \infty` keeps its weights, and with two of them this is the balanced semi-dual.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stochproc.ot._dense_pass import TINY, DensePass, DensePasses
from stochproc.ot._laplacian import LaplacianSolver
from stochproc.ot._newton import Ladder
from stochproc.ot._outcome import Tracker
from stochproc.ot._problem import Problem
from stochproc.solvers import Status

__all__ = ["Penalties", "Softened", "UnbalancedPass", "UnbalancedPasses", "UnbalancedSolver", "ascend", "tilt"]

# Weights that a penalty has all but removed; their logarithm stays finite, and no sum notices them.
SMALLEST = 1e-300
# Contraction of a sweep below which sweeps are all it takes, and below which they take over from Newton steps that are
# slow: 0.95 per sweep is 400 sweeps for nine digits.
FAST, SURE = 0.3, 0.95
NEWTON_PASSES = 80
# Sweeps in a row without a smaller err, after which rounding has the last word.
PATIENCE = 50


def tilt(x: Tensor, w: Tensor, s: float) -> tuple[float, Tensor]:
    """Return s log sum_i w_i exp(x_i / s) for w of sum 1, and the weights w_i exp(x_i / s) divided by their sum."""
    mean = float(w @ x)
    if math.isinf(s):
        return mean, w
    z = (x - mean) / s
    top = float(z.max())
    if top - float(z.min()) <= 1:
        # s log(1 + small) for a large s: neither s nor its inverse may meet a rounded logarithm.
        value = mean + s * math.log1p(float(w @ z.expm1()))
    else:
        value = mean + s * (math.log(float(w @ (z - top).exp())) + top)
    tilted = w * (z - top).exp()
    return value, (tilted / tilted.sum()).clamp_min(SMALLEST)


class Penalties:
    """How strongly the row and column sums are tied to the weights, with what sweeps make of it at some eps."""

    def __init__(self, rho_a: float, rho_b: float) -> None:
        self.rho_a, self.rho_b = rho_a, rho_b

    def row_softening(self, eps: float) -> float:
        """Return eps / (rho_a + eps), 0 for hard row sums."""
        return eps / (self.rho_a + eps)

    def column_softening(self, eps: float) -> float:
        """Return eps / rho_b, 0 for hard column sums."""
        return eps / self.rho_b

    def sweep(self, eps: float) -> float:
        """Return the part of a balanced half-step of the columns that an unbalanced one takes."""
        return 1 / (1 + self.column_softening(eps))

    def transposed(self) -> Penalties:
        """Exchange the sides."""
        return Penalties(self.rho_b, self.rho_a)


class Softened:
    """What the penalties change in a sweep; mixed in before a class of balanced sweeps.

    ``problem.a`` and ``problem.b`` become the moving weights u and v, of sum 1.
    """

    penalties: Penalties
    problem: Any
    eps: float
    g: Tensor
    f: Tensor
    c: Tensor
    log_b: Tensor

    def soften(self, penalties: Penalties) -> Tensor:
        """Set weights, value and everything but c and err from the balanced sweep; return the weights u."""
        self.penalties, self.log_b = penalties, self.problem.b.log()
        rows, u = tilt(-self.f, self.problem.a, penalties.rho_a + self.eps)
        columns, v = tilt(-self.g, self.problem.b, penalties.rho_b)
        self.problem = replace(self.problem, a=u, b=v)
        self.phi = -rows - columns
        return u

    def finish(self, c: Tensor) -> None:
        """Set the column sums for the weights u."""
        self.c = c
        self.err = float((c - self.problem.b).abs().sum())

    @property
    def ridge(self) -> Tensor:
        """Return the diagonal that soft marginals add to the Laplacian."""
        soft, other = self.penalties.row_softening(self.eps), self.penalties.column_softening(self.eps)
        return soft * self.c + other * self.problem.b

    def log_ratio(self) -> tuple[Tensor, bool]:
        """Return the half-step of the columns in units of eps, and whether that took another sweep."""
        ratio, swept = super().log_ratio()  # type: ignore[misc]
        if swept:
            # There the balanced formula knows the column by its own weight b, not by v.
            moved = self.problem.b.log() - self.log_b
            ratio = ratio + torch.where(self.c < TINY[torch.float64], moved, 0.0)
        return ratio * self.penalties.sweep(self.eps), swept

    def product(self, p: Tensor) -> Tensor:
        """Multiply by -eps times the Hessian, less the diagonal :attr:`ridge`."""
        c, v = self.c, self.problem.b
        soft, other = self.penalties.row_softening(self.eps), self.penalties.column_softening(self.eps)
        return (1 - soft) * super().product(p) - soft * (c @ p) * c - other * (v @ p) * v  # type: ignore[misc]


class UnbalancedPass(Softened, DensePass):
    """A sweep over a stored cost in float64."""

    def __init__(self, passes: UnbalancedPasses, g: Tensor, eps: float, K: Tensor) -> None:
        super().__init__(passes, g, eps, K)
        u = self.soften(passes.penalties)
        self.finish(self.c if math.isinf(self.penalties.rho_a) else self.columns(u))

    def self_mass(self) -> Tensor:
        """Return what makes c less this the diagonal of the Laplacian."""
        soft = self.penalties.row_softening(self.eps)
        return (1 - soft) * super().self_mass() + soft * self.c

    def gram(self) -> Tensor:
        """Return the links between columns."""
        return super().gram() * (1 - self.penalties.row_softening(self.eps))

    def truncated(self, delta: float) -> Any:
        """Return the large entries of the plan, in the scale in which their links are those of :meth:`gram`."""
        kept = super().truncated(delta)
        return None if kept is None else kept * (1 - self.penalties.row_softening(self.eps))


class UnbalancedPasses(DensePasses):
    """Sweeps over one stored cost."""

    def __init__(self, problem: Problem, penalties: Penalties) -> None:
        super().__init__(problem)
        self.penalties = penalties

    def at(self, g: Tensor, eps: float) -> UnbalancedPass:
        """Sweep at g; at most one other pass may be in use."""
        return UnbalancedPass(self, g, eps, self.buffer())


class UnbalancedSolver(LaplacianSolver):
    """Solves Newton systems of sweeps that bring a diagonal of their own."""

    def solve(self, point: UnbalancedPass, rhs: Tensor, ridge: Tensor, rtol: float) -> tuple[Tensor, int]:  # type: ignore[override]
        """Return a direction and the iterations of conjugate gradients it took."""
        return super().solve(point, rhs, ridge + point.ridge, rtol)


def ascend(passes: Any, solver: Any, tracker: Tracker, init: Tensor | None = None) -> Any:
    """Return the last point of the balanced ascent, run on these sweeps.

    Where penalties are weak, half-steps contract the distance to the solution by a known factor. That alone is enough
    where the factor is small, and saves what Newton steps make slow: masses over hundreds of decades.
    """
    ladder = Ladder(passes, tracker)
    ladder.solver = solver
    eps, penalties = passes.problem.eps, passes.penalties
    rate = penalties.sweep(eps) * penalties.transposed().sweep(eps)
    if rate <= FAST:
        start = init if init is not None else passes.problem.b.new_zeros(passes.problem.shape[1])
        return _sweep(ladder, ladder.at(start, eps))
    budget = tracker.max_iter
    if rate <= SURE:
        tracker.max_iter = min(budget, tracker.stats["passes"] + NEWTON_PASSES)
    point = None if init is None else ladder.warm(init)
    point = ladder.anneal(tracker.tol) if point is None else ladder.climb(point, tracker.tol)
    if rate <= SURE and point.err > tracker.tol and tracker.ended is not Status.STOPPED:
        tracker.max_iter, tracker.ended = budget, None
        if tracker.stats["passes"] >= budget:
            tracker.ended = Status.MAX_ITER
        point = _sweep(ladder, point)
    tracker.max_iter = budget
    return point


def _sweep(ladder: Ladder, point: Any) -> Any:
    """Improve a point by half-steps alone, which converge from everywhere, though slowly where rho is large."""
    tracker = ladder.tracker
    best, stale = math.inf, 0
    while point.err > tracker.tol and tracker.ended is None and stale < PATIENCE:
        best, stale = (point.err, 0) if point.err < best else (best, stale + 1)
        tracker.count("sinkhorn")
        trial = ladder.at(point.g + point.eps * point.log_ratio()[0], point.eps)
        ladder.passes.release(point)
        point = trial
    return point
