"""L-BFGS-B over torch parameters, with failed evaluations that the line search backs away from."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stochproc._checks import check_integer, check_positive
from stochproc._random import make_generator
from stochproc.solvers._loss_of_vector import LossOfVector, Point
from stochproc.solvers._result import Callback, Convergence, Result, SolverState, Status

__all__ = ["LBFGS", "Start"]


class Start(NamedTuple):
    """How one start of ``LBFGS`` ended."""

    loss: float
    """Loss at its last iterate; infinite where the loss could not be evaluated at its first point."""
    status: Status
    """How it ended."""
    message: str
    """The same in words."""
    iterations: int
    """Iterations done."""
    residual: float
    """Max-norm of the projected gradient at its last iterate."""
    history: tuple[float, ...]
    """Loss after each iteration."""


@dataclass(frozen=True)
class LBFGS:
    r"""Minimise a scalar loss over torch parameters by scipy's L-BFGS-B with gradients from autograd.

    Parameters
    ----------
    max_iter : int, default=200
        Iterations of each start.
    tol : float, default=1e-6
        A start has converged when the max-norm of its projected gradient, :math:`x - P(x - g)` with P the
        projection onto the bounds, is at most ``tol * min(max(1, abs(loss)), 1000)``. For a loss in nats over
        logarithms this puts the loss within 0.1 nat of the minimum in every direction of curvature above 5e-6
        nat, also where the loss is a sum over very many data. A small relative decrease never counts as
        convergence by itself: a start that cannot decrease the loss further ends as ``STAGNATED``, unless the
        gradient is below ``sqrt(eps) * max(1, abs(loss))``, about what rounding hides, with eps that of the
        dtype of the loss or as given to the call.
    memory : int, default=20
        Pairs of steps and gradient changes kept.
    n_restarts : int, default=1
        Number of starts in all. The first starts at the current values, clipped to the bounds. In a later one
        each entry between two finite bounds is uniform between them; any other is its current value plus a
        standard normal (a factor of e, up or down, for a logarithm), clipped to the bound it may have.

    Examples
    --------
    >>> import torch
    >>> x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    >>> result = LBFGS()(lambda: (x - torch.tensor([1.0, 2.0])).square().sum(), [x], bounds=[(None, 1.5)])
    >>> result.ok, round(result.value, 6), x.detach()
    (True, 0.25, tensor([1.0000, 1.5000], dtype=torch.float64))
    """

    max_iter: int = 200
    tol: "float | int" = 1e-6
    memory: int = 20
    n_restarts: int = 1

    def __post_init__(self) -> None:
        check_integer("max_iter", self.max_iter, 1)
        check_positive("tol", self.tol, zero=True)
        check_integer("memory", self.memory, 1)
        check_integer("n_restarts", self.n_restarts, 1)

    def __call__(
        self,
        loss: Callable[[], Tensor],
        parameters: Iterable[Tensor],
        bounds: "Sequence[Any] | None" = None,
        *,
        generator: "torch.Generator | None" = None,
        callback: "Callback | None" = None,
        verbose: "bool | int" = 0,
        eps: "float | Callable[[], float] | None" = None,
    ) -> Result[float]:
        """Minimise ``loss()``; the parameters are left at the best point that was evaluated, however it ends.

        Parameters
        ----------
        loss : callable
            Takes nothing and returns a 0-dim tensor that depends on the parameters. Raising
            ``NotPositiveDefiniteError``, ``OverflowError``, ``FloatingPointError`` or ``torch.linalg.LinAlgError``
            (or linear_operator's ``NotPSDError`` or ``NanError``), or returning a value or gradient with NaN or
            infinity, marks the point as failed.
            The line search sees a value above the current one with zero gradient there, and takes a shorter
            step. It must be deterministic: fix the noise of a Monte Carlo loss.
        parameters : iterable of Tensor
            Leaf tensors of any shape, float dtype and device. Those with ``requires_grad=False`` are not
            touched.
        bounds : sequence or None, default=None
            None, or one entry a parameter: None or a pair (low, high) of None, numbers, or tensors that
            broadcast to its shape. No point outside is evaluated.
        generator : torch.Generator or None, default=None
            Draws the starts after the first; None takes a fresh seed.
        callback : callable or None, default=None
            Called with a ``SolverState`` after each iteration of each start: ``value`` is the loss, and the
            parameters hold the iterate. Returning True ends the whole call with ``STOPPED``.
        verbose : int, default=0
            1 shows a progress bar for each start.
        eps : float, callable or None, default=None
            Relative rounding of the loss, which decides what gradient it hides; never taken below the eps of
            the dtype of the loss or a parameter, which is also what None means. A loss that sums float32 work
            in float64, or an ill-conditioned one, should say so. A callable takes nothing and is asked where a
            start ended, with the parameters there.

        Returns
        -------
        Result[float]
            ``value`` is the smallest loss that was evaluated. ``status`` is that of the start it belongs to:
            ``CONVERGED``, ``MAX_ITER``, ``STAGNATED`` (no decrease found along the search direction) or
            ``STOPPED``; ``NONFINITE`` if no start had a finite loss, with an infinite ``value`` and the
            parameters as they were. ``convergence`` has that start's iterations, the projected gradient
            recomputed at the returned point, and the loss after each iteration as ``history``. ``stats`` has
            ``evaluations``, ``failed_evaluations``, ``last_failure``, ``starts`` (a list of ``Start``: loss,
            status, message and more) and ``best_start``.

        Raises
        ------
        TypeError
            If a parameter is not a floating tensor or ``loss`` does not return a tensor.
        ValueError
            If a parameter is not a leaf or comes twice, ``bounds`` do not fit, or ``loss`` is not 0-dim or does
            not depend on the parameters. Any other exception of ``loss`` passes through, ``KeyboardInterrupt``
            too; the best point is restored first.
        """
        if eps is not None and not callable(eps):
            check_positive("eps", eps)
        problem = LossOfVector(loss, parameters, bounds, eps)
        if self.n_restarts > 1:
            generator = make_generator(generator)
        starts: list[Start] = []
        best = 0
        try:
            for i in range(self.n_restarts):
                x0 = problem.first if generator is None or i == 0 else problem.draw(generator)
                lowest = problem.best_loss
                starts.append(self._run(problem, x0, callback, f"start {i + 1}/{self.n_restarts}" if verbose else ""))
                if problem.best_loss < lowest:
                    best = i
                if starts[-1].status is Status.STOPPED:
                    break
            return self._finish(problem, starts, best)
        finally:
            problem.restore()

    def _run(self, problem: LossOfVector, x0: np.ndarray, callback: "Callback | None", label: str) -> Start:
        """Minimise from one starting point."""
        from scipy.optimize import Bounds, minimize

        point = problem.evaluate(x0)
        if point is None:
            message = f"the loss cannot be evaluated at the starting point: {problem.last_failure}"
            return Start(math.inf, Status.NONFINITE, message, 0, math.inf, ())
        problem.iterate = point
        history: list[float] = []
        stopped, failed_after_all, reason = False, False, ""

        def after_iteration(intermediate_result: Any) -> None:
            nonlocal stopped, failed_after_all
            accepted = problem.evaluate(intermediate_result.x)
            if accepted is None:  # the loss is not deterministic, or so large that the iterate overflowed
                failed_after_all = True
                raise StopIteration
            problem.iterate = accepted
            residual = problem.projected_gradient(accepted)
            history.append(accepted.loss)
            if bar is not None:
                bar.set_postfix(loss=accepted.loss, gradient=residual, refresh=False)
                bar.update()
            stopped = callback is not None and bool(callback(SolverState(len(history), residual, accepted.loss)))
            if stopped or residual <= self.tol * _scale(accepted.loss):
                raise StopIteration

        if problem.projected_gradient(point) > self.tol * _scale(point.loss):
            bar = _progress_bar(self.max_iter, label)
            # Our own test on the projected gradient decides; scipy's only say that it can go no further.
            options = {
                "maxcor": self.memory,
                "maxiter": self.max_iter,
                "maxfun": sys.maxsize,
                "ftol": problem.eps,
                "gtol": self.tol,
            }
            try:
                out = minimize(
                    problem.for_line_search,
                    x0,
                    jac=True,
                    method="L-BFGS-B",
                    bounds=Bounds(problem.low, problem.high) if problem.bounded else None,
                    callback=after_iteration,
                    options=options,
                )
            finally:
                if bar is not None:
                    bar.close()
            reason = "an accepted iterate failed when evaluated again" if failed_after_all else str(out.message)

        last = problem.iterate
        residual = problem.projected_gradient(last)
        if stopped:
            status, message = Status.STOPPED, f"the callback stopped it with projected gradient {residual:.3g}"
        else:
            status, message, _ = self._classify(problem, last, residual, len(history), reason)
        return Start(last.loss, status, message, len(history), residual, tuple(history))

    def _classify(
        self, problem: LossOfVector, point: Point, residual: float, iterations: int, reason: str
    ) -> tuple[Status, str, float]:
        """Status, message and the tolerance met or missed, by the projected gradient, not by scipy's word."""
        gradient = f"projected gradient {residual:.3g}"
        tolerance = self.tol * _scale(point.loss)
        if residual <= tolerance:
            return Status.CONVERGED, gradient, tolerance
        if iterations >= self.max_iter:
            return Status.MAX_ITER, f"{iterations} iterations done with {gradient}; raise max_iter", tolerance
        # Rounding by eps |loss| hides gradients up to sqrt(2 h eps |loss|), with curvature h of order |loss|.
        floor = math.sqrt(problem.rounding(point)) * max(1.0, abs(point.loss))
        if residual <= floor:
            return Status.CONVERGED, f"{gradient}, the least that rounding in the loss allows", floor
        message = f"no lower loss found, with {gradient} ({reason})"
        if problem.failures:
            message += f"; {problem.failures} evaluations failed, the last: {problem.last_failure}"
        return Status.STAGNATED, message, tolerance

    def _finish(self, problem: LossOfVector, starts: list[Start], best: int) -> Result[float]:
        """Measure the gradient at the best point and say how the call ended."""
        start = starts[best]
        status, message, tolerance, residual = start.status, start.message, float(self.tol), math.inf
        if problem.best_x is not None:
            point = problem.evaluate(problem.best_x)
            residual = math.inf if point is None else problem.projected_gradient(point)
            status, message, tolerance = self._classify(
                problem,
                point or Point(problem.best_x, problem.best_loss, problem.first),
                residual,
                start.iterations,
                "the best point is not the last",
            )
            if status is start.status:
                message = start.message
        if starts[-1].status is Status.STOPPED:
            status, message = Status.STOPPED, starts[-1].message
        stats = {
            "evaluations": problem.evaluations,
            "failed_evaluations": problem.failures,
            "last_failure": problem.last_failure,
            "starts": starts,
            "best_start": best,
        }
        history = torch.tensor(start.history, dtype=torch.float64)
        return Result(
            problem.best_loss,
            status,
            Convergence(start.iterations, residual, tolerance, history, message),
            stats,
        )


def _scale(loss: float) -> float:
    """Scale of ``tol``; capped, or a sum over a million points would stop 0.1 nat and more from its minimum."""
    return min(max(1.0, abs(loss)), 1e3)


def _progress_bar(max_iter: int, label: str) -> Any:
    """Return a tqdm bar, or None where no label asks for one."""
    if not label:
        return None
    from tqdm.auto import tqdm

    return tqdm(total=max_iter, desc=label)
