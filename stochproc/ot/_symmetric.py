"""Transport of weights to themselves: one potential for both sides, found by well conditioned Newton steps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from stochproc.kernels import softmax_pass
from stochproc.ot._dense_pass import DensePasses
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import Problem
from stochproc.solvers import CG

__all__ = ["PointSweeps", "StoredSweeps", "Sweeps", "symmetric", "symmetric_value"]

# Largest |log(r / u)| at which a Newton step is tried.
GUARD = 0.5
ANNEAL_FROM, ANNEAL_BY, ANNEAL_TOL = 8.0, 4.0, 1e-2
MAX_CG = 50
DENSE_UP_TO = 128
# Steps in a row without a smaller err, after which nothing is expected any more.
PATIENCE = 8


@runtime_checkable
class Sweep(Protocol):
    """The row softmax K at one potential."""

    lse: Tensor

    def times(self, p: Tensor) -> Tensor: ...
    def matrix(self) -> Tensor | None: ...


@runtime_checkable
class Sweeps(Protocol):
    """Where sweeps over the pairs of one set of points come from; costs must be symmetric."""

    span: float

    def at(self, height: Tensor, eps: float) -> Sweep: ...
    def release(self, old: Any) -> None: ...


class StoredSweeps:
    """Sweeps over a stored symmetric cost (n, n), float64."""

    def __init__(self, cost: Tensor, span: float) -> None:
        n = cost.shape[0]
        # Weights enter through the height alone.
        ones = cost.new_ones(n)
        self.passes, self.span = DensePasses(Problem(cost, ones, ones, 1.0, span)), span

    def at(self, height: Tensor, eps: float) -> Sweep:
        """Sweep; at most one other sweep may be in use."""
        return _Stored(self.passes.at(height, eps), eps)

    def release(self, old: Any) -> None:
        """Take the buffer of a sweep back."""
        self.passes.release(old.found)


class _Stored:
    def __init__(self, found: Any, eps: float) -> None:
        self.found, self.lse = found, -found.f / eps

    def times(self, p: Tensor) -> Tensor:
        return self.found.rows(p)

    def matrix(self) -> Tensor | None:
        """Return K where factoring it costs less than a few products through a solver."""
        K = self.found.K
        return K / self.found.total.unsqueeze(1) if K.shape[0] <= DENSE_UP_TO else None


class PointSweeps:
    """Sweeps over the pairs of points (n, d), float64, whose costs are recomputed each time."""

    def __init__(self, X: Tensor, metric: Any, span: float) -> None:
        self.X, self.metric, self.span = X, metric, span
        self.weights = X.new_zeros(X.shape[0])

    def at(self, height: Tensor, eps: float) -> Sweep:
        """Sweep."""
        return _Recomputed(self, height, eps)

    def release(self, old: Any) -> None:
        """Nothing is held."""

    def sweep(self, height: Tensor, eps: float, p: Tensor | None = None) -> Any:
        """Return log-sum-exps and, for a vector, the product with it."""
        v = None if p is None else p.unsqueeze(1)
        backend = "auto" if self.X.is_cuda else "chunked"
        return softmax_pass(self.metric, self.X, self.X, height, self.weights, eps=eps, v=v, backend=backend)


class _Recomputed:
    def __init__(self, sweeps: PointSweeps, height: Tensor, eps: float) -> None:
        self.sweeps, self.height, self.eps = sweeps, height, eps
        self.lse = sweeps.sweep(height, eps).lse

    def times(self, p: Tensor) -> Tensor:
        return self.sweeps.sweep(self.height, self.eps, p).Kv.squeeze(1)

    def matrix(self) -> Tensor | None:
        return None


class _Point(NamedTuple):
    """A potential f, the sums r of its plan and what they should be, both in units of ``exp(shift)``."""

    f: Tensor
    eps: float
    sweep: Sweep
    r: Tensor
    u: Tensor
    gap: Tensor
    """log(r / u)."""
    err: float


def symmetric(sweeps: Sweeps, a: Tensor, eps: float, rho: float, tracker: Tracker, f0: Tensor | None = None) -> Outcome:
    r"""Solve the transport of weights to themselves.

    Parameters
    ----------
    sweeps : Sweeps
    a : Tensor of shape (n,)
        Positive, float64; of sum 1 where rho is infinite.
    eps : float
        Regularisation, in the unit of the cost.
    rho : float
        Strength of the penalties of both marginals; ``inf`` for exact ones.
    tracker : Tracker
    f0 : Tensor of shape (n,), default=None
        Potential to start from, at the eps asked for.

    Returns
    -------
    Outcome
        With f = g, which is the solution as exchanging the two changes nothing and the dual is concave. ``err`` is
        relative to the transported mass and counts both marginals.

    Notes
    -----
    The Newton matrix diag(r) + P has no null space: the constants that the two potentials may exchange are gone, and
    where :math:`e^{-c / \varepsilon}` is positive definite, as for the named metrics, the eigenvalues of
    :math:`1 + \mathrm{diag}(1 / r) P` lie between 1 and 2.
    """
    return _Symmetric(sweeps, a, rho, tracker).run(eps, f0)


def symmetric_value(f: Tensor, a: Tensor, eps: float, rho: float, mass: float) -> float:
    """Return the dual objective for f = g whose plan has the given mass, with the mass terms of KL forms."""
    total = float(a.sum())
    penalty = float(a @ f) if math.isinf(rho) else -rho * float(a @ torch.expm1(-f / rho))
    return 2 * penalty - eps * (mass - total * total)


class _Symmetric:
    def __init__(self, sweeps: Sweeps, a: Tensor, rho: float, tracker: Tracker) -> None:
        self.sweeps, self.a, self.rho, self.tracker = sweeps, a, rho, tracker
        self.log_a = a.log()

    def run(self, eps: float, f0: Tensor | None) -> Outcome:
        target = eps
        eps = target if f0 is not None else max(target, self.sweeps.span / ANNEAL_FROM)
        f = torch.zeros_like(self.a) if f0 is None else f0
        while True:
            last = eps <= target
            point = self._improve(self._at(f, eps), self.tracker.tol if last else ANNEAL_TOL)
            if last:
                break
            f, eps = point.f, max(target, eps / ANNEAL_BY)
            if self.tracker.ended is not None:
                # The callback or the budget ended it early: the potential that fits the eps asked for.
                point = self._at(f, target)
                break
        why = f"rounding allows about {1e-17 * self.sweeps.span / target:.1e} at this reg."
        status = self.tracker.status_of(point.err)
        return Outcome(point.f, point.f, point.err, status, self.tracker.message_of(point.err, why))

    def _at(self, f: Tensor, eps: float) -> _Point:
        sweep = self.sweeps.at(f + eps * self.log_a, eps)
        # P 1 = a exp(f / eps + lse), and the penalties ask for a exp(-f / rho).
        log_r, log_u = self.log_a + f / eps + sweep.lse, self.log_a - f / self.rho
        shift = torch.maximum(log_r.max(), log_u.max())
        r, u = (log_r - shift).exp(), (log_u - shift).exp()
        err = 2 * float((r - u).abs().sum() / r.sum())
        self.tracker.record(eps, err, float(self.a @ f))
        return _Point(f, eps, sweep, r, u, log_r - log_u, err)

    def _improve(self, point: _Point, tol: float) -> _Point:
        best, stale = point, 0
        while point.err > tol and self.tracker.ended is None and stale < PATIENCE:
            # Means of potentials help from everywhere, Newton steps only nearby.
            mean = stale > 0 or float(point.gap.abs().max()) > GUARD
            self.tracker.count("sinkhorn" if mean else "newton")
            trial = self._at(point.f + (self._mean(point) if mean else self._newton(point)), point.eps)
            stale = 0 if trial.err < best.err else stale + 1
            best = trial if stale == 0 else best
            if mean or stale == 0:
                point, trial = trial, point
            self.sweeps.release(trial.sweep)
        self.sweeps.release(point.sweep)
        return best

    def _mean(self, point: _Point) -> Tensor:
        """Return half of what a sweep changes."""
        return -0.5 * point.eps / (1 + point.eps / self.rho) * point.gap

    def _newton(self, point: _Point) -> Tensor:
        eps, r, u = point.eps, point.r, point.u
        diagonal = r + (eps / self.rho) * u
        matrix = point.sweep.matrix()
        if matrix is not None:
            # Rows divided by r: rows without mass have no equation, and get none of the step.
            mass = r > 0
            scaled = torch.where(mass, diagonal / r, 1.0)
            right = torch.where(mass, eps * (u / r - 1), 0.0)
            step, info = torch.linalg.solve_ex(matrix + scaled.diag(), right)
            if int(info) == 0 and bool(step.isfinite().all()):
                return step
        inverse = 1 / diagonal.clamp_min(torch.finfo(r.dtype).tiny)
        rtol = max(min(0.1, math.sqrt(point.err)), min(0.1, 0.1 * self.tracker.tol / point.err))
        cg = CG(rtol=rtol, max_iter=MAX_CG, precond=lambda p: inverse * p, verify=False)
        found = cg(lambda p: diagonal * p + r * point.sweep.times(p), eps * (u - r))
        self.tracker.count("cg", found.convergence.iterations)
        return found.value
