"""Passes of the recursion, each for the correction of the true residual that the one before has left."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochproc.solvers._cg_iteration import ColumnState, Ended, descend
from stochproc.solvers._linear_problem import LinearProblem, column_norms
from stochproc.solvers._preconditioner_choice import ChosenPreconditioner
from stochproc.solvers._result import Callback, SolverState

__all__ = ["Outcome", "solve_in_passes"]


@dataclass
class Outcome:
    """What the passes found; one entry a column unless said otherwise."""

    x: Tensor  # (*batch, n, k), detached
    residual: "Tensor | None"  # b - A x on its graph, where one is wanted
    norm: Tensor
    tol: Tensor
    code: Tensor
    iterations: Tensor
    outside: Tensor  # the part of the residual that `project` removes, if there is one
    bad_input: Tensor
    bad_preconditioner: Tensor
    drifted: Tensor  # ended because the true residual does not follow that of the recursion
    restarts: int
    patience: int
    history: "Tensor | None"  # (iterations + 1, *batch, k)

    def describe(self, worst: Ended, residual: float, tolerance: float, iterations: int) -> str:
        """Say in one sentence how the worst column ended, and what to do."""
        if worst is Ended.CONVERGED:
            return ""
        at = self.code == worst
        which = f" ({int(at.sum())} of {at.numel()} columns)" if at.numel() > 1 else ""
        numbers = f"residual {residual:.3g} after {iterations} iterations, asked for {tolerance:.3g}{which}"
        if worst is Ended.STOPPED:
            return f"the callback stopped it with {numbers}"
        if worst is Ended.MAX_ITER:
            return f"{numbers}; raise max_iter, precondition, or add noise to the diagonal"
        if worst is Ended.NONFINITE:
            if bool((at & self.bad_input).any()):
                return f"b or x0 holds NaN or infinity{which}"
            return f"a product with A or the preconditioner is not finite{which}, {numbers}"
        if worst is Ended.BREAKDOWN:
            if bool((at & self.bad_preconditioner).any()):
                return f"the preconditioner is not positive definite, {numbers}; see `flexible` if that is meant"
            return f"A is not positive definite, or singular (then see `project`): curvature is not positive, {numbers}"
        if bool((at & (self.outside > self.tol)).any()):
            return f"b has a part outside the range of A, of norm {float(self.outside[at].max()):.3g}: {numbers}"
        if bool((at & self.drifted).any()):
            return f"rounding keeps the true residual above the tolerance: {numbers}; use a wider dtype or loosen rtol"
        return (
            f"the residual has not halved in {self.patience} iterations: {numbers}; precondition, add noise to the "
            "diagonal, or raise patience where slow convergence is expected"
        )


@torch.no_grad()
def solve_in_passes(
    problem: LinearProblem, options: Any, chosen: ChosenPreconditioner, callback: "Callback | None"
) -> Outcome:
    """Solve by the options of a ``CG``: passes until the true residual is small or has stopped falling.

    Each pass solves for a correction from zero, scaled by a power of two, so that neither large nor tiny
    right-hand sides leave the range of the numbers.
    """
    b = problem.b.detach()
    norm_b = column_norms(b)
    bad_input = ~norm_b.isfinite()
    tol = (options.rtol * norm_b).masked_fill(bad_input, 0.0).clamp_min(options.atol)
    x = torch.zeros_like(b) if problem.x0 is None else problem.x0.clone()
    if problem.x0 is not None:
        bad_input |= ~x.isfinite().all(-2)
        if problem.project is not None:
            x = problem.project(x)
    start_at_zero = problem.x0 is None
    blank = bad_input | (norm_b == 0)
    if bool(blank.any()):
        x, b = _blanked(x, blank), _blanked(b, bad_input)
    code = torch.where(bad_input, int(Ended.NONFINITE), int(Ended.RUNNING))
    residual = None if start_at_zero else problem.residual(x)
    r = b if residual is None else _blanked(residual.detach(), blank)
    norm = column_norms(r)

    run = _Run(problem, options, chosen, callback)
    iterations, outside = torch.zeros_like(code), torch.zeros_like(norm)
    bad_preconditioner, drifted = torch.zeros_like(bad_input), torch.zeros_like(bad_input)
    restarts = 0
    while True:
        inside, outside = run.split(r)
        previous = column_norms(inside)
        state, scale = run.descend(x, inside, tol, code)
        iterations = iterations + state.iterations
        bad_preconditioner |= state.bad_preconditioner
        code = torch.where((code == Ended.RUNNING) & (state.code != Ended.RUNNING), state.code, code)
        code = torch.where(code == Ended.RUNNING, int(Ended.STOPPED if run.stopped else Ended.MAX_ITER), code)
        correction = state.solution() * scale.unsqueeze(-2)
        moved = bool((state.iterations > 0).any()) or bool((correction != 0).any())
        if not (options.verify or problem.needs_gradient):
            norm = torch.hypot(state.best * scale.double(), outside)
            x = x + correction
            code = torch.where((code == Ended.CONVERGED) & (norm > tol), int(Ended.STAGNATED), code)
            break
        if not moved and (residual is not None or not problem.needs_gradient):
            norm = column_norms(r)
            code = torch.where((code == Ended.CONVERGED) & (norm > tol), int(Ended.STAGNATED), code)
            break
        new_x = x + correction
        new_residual = problem.residual(new_x)
        new_r = _blanked(new_residual.detach(), blank)
        new_norm = column_norms(new_r)
        # Breakdown returns its iterate by contract; anything else never gets worse by a further pass.
        worse = ~(new_norm <= column_norms(r)) & (code != Ended.BREAKDOWN)
        if restarts and residual is not None and bool(worse.any()):
            mask = worse.unsqueeze(-2)
            new_x, new_r = torch.where(mask, x, new_x), torch.where(mask, r, new_r)
            with torch.set_grad_enabled(problem.needs_gradient):
                new_residual = torch.where(mask, residual, new_residual)
            new_norm = column_norms(new_r)
        x, r, residual, norm = new_x, new_r, new_residual, new_norm
        inside, outside = run.split(r)
        now = column_norms(inside)
        met = (norm <= tol) & ~bad_input
        unmet = (code == Ended.CONVERGED) & ~met
        drifted |= unmet
        again = unmet & (now > tol) & (now <= 0.5 * previous)
        code = torch.where(met & (code != Ended.STOPPED), int(Ended.CONVERGED), code)
        code = torch.where(unmet, torch.where(norm.isfinite(), int(Ended.STAGNATED), int(Ended.NONFINITE)), code)
        if not bool(again.any()) or run.stopped:
            break
        restarts += 1
        code = torch.where(again, int(Ended.RUNNING), code)
    # Where there is no residual it is infinite: NaN would compare as small.
    norm = torch.where(bad_input | norm.isnan(), math.inf, norm)
    return Outcome(
        x=x,
        residual=residual if problem.needs_gradient else None,
        norm=norm,
        tol=tol,
        code=code,
        iterations=iterations,
        outside=outside,
        bad_input=bad_input,
        bad_preconditioner=bad_preconditioner,
        drifted=drifted,
        restarts=restarts,
        patience=options.patience,
        history=torch.stack(run.history) if options.keep_history else None,
    )


class _Run:
    """What all passes of one solve share: the operator, the budget, the callback and the history."""

    def __init__(
        self, problem: LinearProblem, options: Any, chosen: ChosenPreconditioner, callback: "Callback | None"
    ) -> None:
        self.problem, self.options, self.chosen, self.callback = problem, options, chosen, callback
        self.done, self.stopped = 0, False
        self.history: list[Tensor] = []

    def split(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected residual, and the norm of what the projection removes."""
        if self.problem.project is None:
            return r, r.new_zeros((*r.shape[:-2], r.shape[-1]), dtype=torch.float64)
        inside = self.problem.project(r)
        return inside, column_norms(r - inside)

    def precondition(self) -> "Callable[[Tensor], Tensor] | None":
        apply, project = self.chosen.apply, self.problem.project
        if project is None or apply is None:
            return apply or project
        return lambda V: project(apply(V))

    def descend(self, x: Tensor, r: Tensor, tol: Tensor, code: Tensor) -> tuple[ColumnState, Tensor]:
        """One pass for the correction of x; return its state and the scale of each column."""
        largest = r.abs().amax(-2) if r.shape[-2] else r.new_zeros((*r.shape[:-2], r.shape[-1]))
        exponent = torch.where((largest > 0) & largest.isfinite(), largest, 1.0).frexp().exponent - 1
        # Powers of two scale without rounding; one below the normal range would itself round to zero.
        lowest = math.frexp(torch.finfo(r.dtype).tiny)[1]
        scale = torch.ldexp(torch.ones_like(largest), exponent.clamp_min(lowest))
        wide = scale.double()
        options = self.options
        before = self.done

        def after(s: ColumnState, index: Tensor, norms: Tensor, whole: ColumnState) -> bool:
            self.done += 1
            if options.keep_history:
                self.history.append(norms * wide)
            if self.callback is None:
                return False
            correction = whole.x.clone()
            correction[..., index] = s.x
            residual = norms * wide
            at = int((residual / tol.clamp_min(torch.finfo(torch.float64).tiny)).argmax())
            value = self.problem.shaped(x + correction * scale.unsqueeze(-2))
            self.stopped = bool(self.callback(SolverState(self.done, float(residual.flatten()[at]), value)))
            return self.stopped

        if options.keep_history and not self.history:
            self.history.append(column_norms(r))
        state = descend(
            r / scale.unsqueeze(-2),
            tol / wide,
            code,
            product=self.problem.product,
            precondition=self.precondition(),
            budget=options.max_iter - before,
            patience=options.patience,
            flexible=int(options.flexible),
            shrink=self.problem.entries and self.chosen.shrinks and self.problem.project is None,
            steepest=before == 0 and self.problem.x0 is None,
            after=after,
        )
        return state, scale


def _blanked(V: Tensor, columns: Tensor) -> Tensor:
    """Columns replaced by zero, whatever they hold."""
    return torch.where(columns.unsqueeze(-2), 0.0, V)
