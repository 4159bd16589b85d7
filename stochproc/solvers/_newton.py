"""Newton's method for smooth functions of a tensor, with Hessian products only."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice, check_floating, check_integer, check_positive
from stochproc.solvers._cg import CG
from stochproc.solvers._line_search import LineSearch, LineStep, Trial
from stochproc.solvers._newton_point import Point, SmoothFunction
from stochproc.solvers._result import Callback, Convergence, Result, SolverState, Status

__all__ = ["Newton"]

RTOL = {torch.float32: 1e-4, torch.float64: 1e-8}
# A shift that is this many times all curvature seen can no longer be what a breakdown is about.
LARGEST_SHIFT = 1e3


@dataclass(frozen=True)
class Newton:
    r"""Minimise a smooth function by a line search along inexact Newton directions.

    A direction solves :math:`(H + s I)\, d = -g` to a relative residual that falls with the gradient. The shift s is
    0 unless conjugate gradients meet a direction of non-positive curvature; then it is twice the most negative
    curvature seen, and ten times more as often as it takes. Negative curvature therefore sets the length of a step
    along it, :math:`|g / \lambda|`, and saddle points are left as long as the gradient has a component to leave
    them by.

    Parameters
    ----------
    rtol : float or None, default=None
        Less than 1. Converged when the Euclidean norm of the gradient is at most
        ``max(rtol * (norm at x0), atol)``. None is 1e-8 in float64 and 1e-4 in float32.
    atol : float, default=0.0
        In the unit of the gradient. A start that is already a minimum needs it: a fraction of the rounding in
        its gradient cannot be reached.
    max_iter : int, default=50
        Newton steps at most.
    linear : CG or "cholesky", default=CG()
        How directions are found. Of a ``CG``, ``rtol`` is the smallest relative residual asked for, ``atol`` and
        ``verify`` are not used, and ``precond`` has to be None, ``"auto"`` (which is none) or a callable or
        ``Preconditioner`` for H in the flattened x. "cholesky" builds the Hessian from one product for each
        entry of x: for up to a few hundred entries.
    line_search : LineSearch, default=LineSearch()
        A step that it finds flat is taken only if the gradient falls.
    forcing : float or None, default=None
        Relative residual of the linear solves, in (0, 1). None is min(0.5, sqrt(norm / norm at x0)), for which
        convergence is superlinear of order 1.5 [1]_; no solve is asked for more than half of the tolerance.

    Notes
    -----
    A step costs one value and gradient, and one Hessian product for each CG iteration; a product by autograd
    costs about two gradients and keeps the graph of one.

    References
    ----------
    .. [1] R. S. Dembo, S. C. Eisenstat, T. Steihaug, "Inexact Newton Methods", SIAM J. Numer. Anal. 19(2), 1982.

    Examples
    --------
    >>> import torch
    >>> x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    >>> result = Newton()(lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, x0)
    >>> result.ok, result.value
    (True, tensor([1.0000, 1.0000], dtype=torch.float64))
    """

    rtol: "float | int | None" = None
    atol: "float | int" = 0.0
    max_iter: int = 50
    linear: "CG | str" = field(default_factory=CG)
    line_search: LineSearch = field(default_factory=LineSearch)
    forcing: "float | int | None" = None

    def __post_init__(self) -> None:
        if self.rtol is not None:
            check_positive("rtol", self.rtol, zero=True)
            if self.rtol >= 1:
                raise ValueError(f"rtol must lie in [0, 1); got {self.rtol}.")
        check_positive("atol", self.atol, zero=True)
        check_integer("max_iter", self.max_iter, 1)
        if isinstance(self.linear, str):
            check_choice("linear", self.linear, ["cholesky"])
        elif not isinstance(self.linear, CG):
            raise TypeError(f"linear must be a CG or 'cholesky'; got {type(self.linear).__name__}.")
        if not isinstance(self.line_search, LineSearch):
            raise TypeError(f"line_search must be a LineSearch; got {type(self.line_search).__name__}.")
        if self.forcing is not None:
            check_positive("forcing", self.forcing)
            if self.forcing >= 1:
                raise ValueError(f"forcing must lie in (0, 1); got {self.forcing}.")

    def __call__(
        self,
        fun: Callable[[Tensor], Tensor],
        x0: Float[Tensor, "..."],
        grad: "Callable[[Tensor], Tensor] | None" = None,
        hvp: "Callable[[Tensor, Tensor], Tensor] | None" = None,
        *,
        callback: "Callback | None" = None,
    ) -> Result[Tensor]:
        """Minimise ``fun`` from ``x0``.

        Parameters
        ----------
        fun : callable
            Maps a tensor like ``x0`` to a 0-dim tensor, twice differentiable by autograd unless ``grad`` and
            ``hvp`` are given. A value or gradient of NaN or infinity, or an error as in ``LBFGS``
            (``NotPositiveDefiniteError``, ``torch.linalg.LinAlgError``, ``OverflowError``,
            ``FloatingPointError``), makes the line search back off. It must be deterministic.
        x0 : Tensor of any shape
            Start, float32 or float64; not modified. Under ``torch.inference_mode`` the run leaves that mode for a
            copy of it; what else ``fun`` needs for its gradient must have been made outside.
        grad : callable or None, default=None
            Maps x to the gradient, in its shape; None is autograd.
        hvp : callable or None, default=None
            Maps x and v to the Hessian at x times v, all in one shape; None is autograd, of ``fun``.
        callback : callable or None, default=None
            Called with a ``SolverState`` after each step: the norm of the gradient and x. Returning True ends with
            ``STOPPED``.

        Returns
        -------
        Result[Tensor]
            ``value`` is the last iterate, detached: each has a lower ``fun`` than the one before, or one that is
            equal to rounding and a smaller gradient. ``status`` is ``CONVERGED``; ``MAX_ITER``; ``STAGNATED``
            (the line search found no decrease: rounding, or derivatives that are wrong); ``NONFINITE`` (``fun`` or
            its gradient at ``x0``, or a Hessian product, is NaN or infinite) or ``STOPPED``. A gradient of zero is
            all that ``CONVERGED`` says; the last of ``shifts`` is 0 if no negative curvature was met there.

            ``convergence`` has the steps, the norm of the gradient at ``value``, and after each step as
            ``history``. ``stats`` has ``fun`` (its value), ``evaluations``, ``gradients``, ``products``,
            ``linear_iterations``, ``shifts`` and ``steps`` (of each iteration), ``failed_evaluations`` and
            ``last_failure``.

        Raises
        ------
        TypeError
            If ``x0`` or what a function returns is not a tensor of the kind it must be.
        ValueError
            If what a function returns has another shape, or ``fun`` does not depend on x.
        """
        check_floating(x0=x0)
        # Leaving inference mode turns gradients on, which is not for a caller under no_grad alone.
        inference = torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if inference else contextlib.nullcontext():
            run = _Run(self, SmoothFunction(fun, grad, hvp), x0)
            return run.minimise(callback)


class _Run:
    """One minimisation."""

    def __init__(self, options: Newton, function: SmoothFunction, x0: Tensor) -> None:
        self.options, self.function = options, function
        self.point = function.at(x0.detach().clone())
        self.norm = self.norm0 = _norm(self.point.gradient)
        rtol = RTOL[x0.dtype] if options.rtol is None else options.rtol
        self.tolerance = max(rtol * self.norm0, float(options.atol)) if self._finite() else float(options.atol)
        self.history: list[float] = []
        self.shifts: list[float] = []
        self.steps: list[float] = []
        self.linear_iterations = 0
        self.fell_always = True

    def minimise(self, callback: "Callback | None") -> Result[Tensor]:
        """Take steps until one of the ends is reached."""
        if not self._finite():
            why = self.function.last_failure or f"value {float(self.point.value):.6g}, gradient norm {self.norm:.3g}"
            return self._result(Status.NONFINITE, f"fun or its gradient is not finite at x0 ({why})")
        while self.norm > self.tolerance:
            if len(self.history) == self.options.max_iter:
                return self._result(Status.MAX_ITER, self._why_unfinished())
            direction, shift = self._direction()
            if not bool(direction.isfinite().all()):
                return self._result(Status.NONFINITE, "a Hessian product holds NaN or infinity")
            slope = _dot(self.point.gradient, direction)
            if not slope < 0:
                # Rounding in an indefinite or inexact solve; downhill is always possible.
                direction = -self.point.gradient / max(shift, 1.0)
                slope = _dot(self.point.gradient, direction)
            line = self._search(direction, slope)
            if not line.accepted:
                return self._result(Status.STAGNATED, self._why_stuck(slope))
            self.fell_always &= bool(line.payload.value < self.point.value)
            self.point = line.payload
            self.norm = _norm(self.point.gradient)
            self.history.append(self.norm)
            self.shifts.append(shift)
            self.steps.append(line.step)
            state = SolverState(len(self.history), self.norm, self.point.x.clone())
            if callback is not None and bool(callback(state)):
                return self._result(Status.STOPPED, f"the callback stopped it with gradient norm {self.norm:.3g}")
        return self._result(Status.CONVERGED, "")

    def _finite(self) -> bool:
        return math.isfinite(self.norm) and bool(self.point.value.isfinite())

    def _search(self, direction: Tensor, slope: float) -> LineStep:
        def phi(step: float) -> tuple[Tensor, Point]:
            point = self.function.at(self.point.x + step * direction)
            return point.value, point

        def accept(trial: Trial) -> bool:
            if not trial.sufficient:
                return False
            norm = _norm(trial.payload.gradient)
            return math.isfinite(norm) and (norm < self.norm or not trial.flat)

        return self.options.line_search(phi, self.point.value, slope, accept=accept)

    def _direction(self) -> tuple[Tensor, float]:
        linear = self.options.linear
        with torch.no_grad():
            if isinstance(linear, CG):
                return self._by_cg(linear)
            return self._by_cholesky()

    def _by_cg(self, linear: CG) -> tuple[Tensor, float]:
        """Solve by CG, with a shift that grows until the curvature of every direction it takes is positive."""
        forcing = self.options.forcing
        eta = min(0.5, math.sqrt(self.norm / self.norm0)) if forcing is None else float(forcing)
        # Less than half of the tolerance at the end of all would be wasted.
        eta = min(max(eta, float(linear.rtol), 0.5 * self.tolerance / self.norm), 0.9)
        solver = dataclasses.replace(linear, rtol=eta, atol=0.0, verify=False)
        x, g = self.point.x, self.point.gradient
        curvature = _Curvature()
        shift = 0.0

        def product(v: Tensor) -> Tensor:
            Hv = self.point.product(v.reshape(x.shape)).reshape(-1)
            curvature.see(v, Hv)
            return Hv + shift * v

        while True:
            result = solver(product, -g.reshape(-1))
            self.linear_iterations += result.convergence.iterations
            if result.status is Status.NONFINITE:
                return torch.full_like(x, math.nan), shift
            # A preconditioner that is not positive definite breaks down under any shift.
            if result.status is not Status.BREAKDOWN or shift > LARGEST_SHIFT * curvature.largest:
                return result.value.reshape(x.shape), shift
            shift = max(10 * shift, -2 * curvature.lowest, self._smallest_shift(curvature.largest))

    def _by_cholesky(self) -> tuple[Tensor, float]:
        """Solve by a dense factor; where H is not positive definite its lowest eigenvalue is turned around."""
        x, g = self.point.x, self.point.gradient
        basis = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        H = torch.stack([self.point.product(e.reshape(x.shape)).reshape(-1) for e in basis])
        if not bool(H.isfinite().all()):
            return torch.full_like(x, math.nan), 0.0
        H = (H + H.mT) / 2
        L, info = torch.linalg.cholesky_ex(H)
        shift = 0.0
        if int(info) != 0:
            values = torch.linalg.eigvalsh(H)
            shift = max(-2 * float(values[0]), self._smallest_shift(float(values.abs().max())))
            L, info = torch.linalg.cholesky_ex(H + shift * basis)
            if int(info) != 0:
                return -g / shift, shift
        return -torch.cholesky_solve(g.reshape(-1, 1), L).reshape(x.shape), shift

    def _smallest_shift(self, largest: float) -> float:
        """Where there is no curvature at all, the step is made as long as x, or 1."""
        if largest > 0:
            return math.sqrt(torch.finfo(self.point.x.dtype).eps) * largest
        return self.norm / max(1.0, _norm(self.point.x))

    def _why_unfinished(self) -> str:
        message = f"{self.options.max_iter} steps done with gradient norm {self.norm:.3g}; "
        # Less than the rounding in the norm of a constant gradient is no fall, even in float32.
        if self.fell_always and min(self.history) >= (1 - 1e-5) * self.norm0:
            value = float(self.point.value)
            return message + (
                f"fun may be unbounded below: its value fell in every step, to {value:.6g}, and its gradient in none; "
                "bound it, or raise max_iter if it has a minimum"
            )
        return message + "raise max_iter"

    def _why_stuck(self, slope: float) -> str:
        value = float(self.point.value)
        promised = f"the Newton step promises a decrease of {-slope / 2:.3g} at a value of {value:.6g}"
        message = f"no decrease found along the direction, with gradient norm {self.norm:.3g} ({promised}); "
        eps = torch.finfo(self.point.value.dtype).eps
        if -slope <= abs(value) * (self.options.line_search.rounding or 16 * eps):
            return message + "this is rounding: the point is a minimum as far as values can tell, or loosen atol"
        return message + "check that fun is smooth and deterministic, and grad and hvp if they were given"

    def _result(self, status: Status, message: str) -> Result[Tensor]:
        function = self.function
        stats: dict[str, Any] = {
            "fun": float(self.point.value),
            "evaluations": function.evaluations,
            "gradients": function.gradients,
            "products": function.products,
            "linear_iterations": self.linear_iterations,
            "shifts": self.shifts,
            "steps": self.steps,
            "failed_evaluations": function.failures,
            "last_failure": function.last_failure,
        }
        history = torch.tensor(self.history, dtype=torch.float64)
        residual = self.norm if math.isfinite(self.norm) else math.inf
        convergence = Convergence(len(self.history), residual, self.tolerance, history, message)
        return Result(self.point.x, status, convergence, stats)


class _Curvature:
    """The extreme Rayleigh quotients of the products that a solve has asked for."""

    def __init__(self) -> None:
        self.lowest = math.inf
        self.largest = 0.0

    def see(self, v: Tensor, Hv: Tensor) -> None:
        squared = _dot(v, v)
        if squared > 0:
            quotient = _dot(v, Hv) / squared
            if math.isfinite(quotient):
                self.lowest, self.largest = min(self.lowest, quotient), max(self.largest, abs(quotient))


def _norm(v: Tensor) -> float:
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())
