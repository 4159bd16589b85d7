"""Unbalanced transport between points whose costs are recomputed in every sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochproc.kernels import logsumexp, softmax_pass
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._unbalanced import separated
from stochproc.ot._unbalanced_pass import TINY, Penalties, Softened, ascend
from stochproc.solvers import CG

__all__ = ["unbalanced_points"]

# Products of one Newton step; each is a sweep over the pairs.
MAX_CG = 20
# Exponents of moving weights that floating point holds with room to spare.
LARGE = 300.0


@dataclass(frozen=True, eq=False)
class _PointProblem:
    """Weighted points, float64, in the place of a :class:`~stochproc.ot._problem.Problem`."""

    X: Tensor
    Y: Tensor
    metric: Any
    a: Tensor
    b: Tensor
    eps: float
    span: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.X.shape[0], self.Y.shape[0]


class _BalancedPointPass:
    """A sweep at g: everything but the column sums, which need the weights of the rows."""

    def __init__(self, problem: _PointProblem, g: Tensor, eps: float) -> None:
        self.problem: Any = problem
        self.points, self.g, self.eps = problem, g, eps
        self.height = g + eps * problem.b.log()

    def sweep(self, weights: Any, v: Tensor | None = None) -> Any:
        points = self.points
        backend = "auto" if points.X.is_cuda else "chunked"
        options: dict[str, Any] = {} if v is None else {"v": v.unsqueeze(1), "gram": True}
        return softmax_pass(
            points.metric, points.X, points.Y, self.height, weights, eps=self.eps, backend=backend, **options
        )

    def log_ratio(self) -> tuple[Tensor, bool]:
        """Return log b - log c, finite however small c is, and whether that took another sweep."""
        points, problem = self.points, self.problem
        ratio = problem.b.log() - self.c.log()  # type: ignore[attr-defined]
        lost = (self.c < TINY[torch.float64]).nonzero().squeeze(1)  # type: ignore[attr-defined]
        if lost.numel():
            metric = points.metric
            flipped = (lambda q, p: metric(p, q).mT) if callable(metric) else metric
            height = self.f + self.eps * problem.a.log()  # type: ignore[attr-defined]
            soft = logsumexp(flipped, points.Y[lost], points.X, height, eps=self.eps, backend="chunked")
            ratio[lost] = -soft - self.g[lost] / self.eps
        return ratio, lost.numel() > 0

    def product(self, p: Tensor) -> Tensor:
        """Multiply by diag(c) - P^T diag(1/a) P, in one sweep."""
        return self.c * p - self.sweep(self.problem.a, p).PtKv.squeeze(1)  # type: ignore[attr-defined]


class _PointPass(Softened, _BalancedPointPass):
    def __init__(self, problem: _PointProblem, penalties: Penalties, g: Tensor, eps: float, shift: float) -> None:
        super().__init__(problem, g, eps)
        strength, a = penalties.rho_a + eps, problem.a

        def weights(lse: Tensor, rows: slice) -> Tensor:
            # Up to a factor the row sums of the plan, which are known once all rows are.
            return a[rows] * (lse * (eps / strength) - shift).clamp(-LARGE, LARGE).exp()

        out = self.sweep(weights)
        self.f = -eps * out.lse
        u = self.soften(penalties)
        exponents = out.lse * (eps / strength)
        self.shift = float(exponents.max())
        if math.isinf(penalties.rho_a):
            self.finish(out.mass * math.exp(shift))
        elif float((exponents - shift).abs().max()) < LARGE:
            self.finish(out.mass / float(weights(out.lse, slice(None)).sum()))
        else:
            self.finish(self.sweep(u).mass)


class _PointPasses:
    def __init__(self, problem: _PointProblem, penalties: Penalties) -> None:
        self.problem: Any = problem
        self.penalties, self.shift = penalties, 0.0

    def at(self, g: Tensor, eps: float) -> _PointPass:
        found = _PointPass(self.problem, self.penalties, g, eps, self.shift)
        if math.isfinite(self.penalties.rho_a):
            self.shift = found.shift
        return found

    def release(self, old: Any) -> None:
        """Nothing is held."""


class _PointSolver:
    """Truncated conjugate gradients, preconditioned by the column sums."""

    def solve(self, point: _PointPass, rhs: Tensor, ridge: Tensor, rtol: float) -> tuple[Tensor, int]:
        diagonal = ridge + point.ridge
        inverse = 1 / (point.c + diagonal)
        precond, project = (lambda p: inverse * p), (lambda p: p - p.mean())
        cg = CG(rtol=rtol, max_iter=MAX_CG, precond=precond, project=project, verify=False)
        found = cg(lambda p: point.product(p) + diagonal * p, rhs - rhs.mean())
        return found.value - found.value.mean(), found.convergence.iterations


def unbalanced_points(
    X: Tensor,
    Y: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    metric: Any,
    rho_a: float,
    rho_b: float,
    tracker: Tracker,
    span: float,
) -> Outcome:
    """Solve an unbalanced problem between weighted points; memory grows with n + m.

    Parameters and outcome are those of :func:`stochproc.ot._unbalanced.unbalanced`, with points and a metric of
    :func:`stochproc.kernels.softmax_pass` in the place of the cost; ``span`` is the size of the costs.
    """
    penalties = Penalties(rho_a, rho_b)
    problem: Any = _PointProblem(X, Y, metric, a / a.sum(), b / b.sum(), eps, span)
    point = ascend(_PointPasses(problem, penalties), _PointSolver(), tracker)
    f, g = separated(point.f, point.g, problem, (a.sum(), b.sum()), penalties)
    why = f"rounding allows about {1e-16 * span / eps:.1e} at this reg; raise tol or reg."
    return Outcome(f, g, point.err, tracker.status_of(point.err), tracker.message_of(point.err, why))
