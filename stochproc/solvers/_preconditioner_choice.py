"""Which preconditioner a solve uses, of what its caller passed."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from stochproc.solvers._linear_problem import LinearProblem, is_linear_operator
from stochproc.solvers._preconditioners import Nystrom, PivotedCholesky, Preconditioner

__all__ = ["ChosenPreconditioner", "resolve_preconditioner", "split_noise"]

# Rows from which "auto" spends the time on a preconditioner.
AUTO_FROM_ROWS = 2000


class ChosenPreconditioner(NamedTuple):
    """What a solve uses: a name and rank for its report, a function of columns, and whether k may vary."""

    name: str
    rank: "int | None"
    apply: "Callable[[Tensor], Tensor] | None"
    shrinks: bool


NONE = ChosenPreconditioner("none", None, None, True)


def resolve_preconditioner(precond: Any, problem: LinearProblem) -> ChosenPreconditioner:
    """Turn what a caller may pass as ``precond`` into a function of columns."""
    if isinstance(precond, str):
        precond = _automatic(problem.A)
    if precond is None or problem.b.numel() == 0:
        return NONE
    if not isinstance(precond, Preconditioner) and hasattr(precond, "build"):
        if not problem.entries:
            raise TypeError(
                f"precond={type(precond).__name__}() needs A as a tensor or LinearOperator; got a callable. Build it "
                f"first, {type(precond).__name__}().build(matrix, noise), or pass a callable."
            )
        A, noise = split_noise(problem.A)
        if isinstance(noise, Tensor):
            # Whether the diagonal is sound is for the solve to find out.
            noise = noise.detach().double().nan_to_num(0.0, 0.0, 0.0).clamp_min(0)
        precond = precond.build(A, noise)
        problem.products += isinstance(precond, Nystrom)
    if isinstance(precond, Preconditioner):
        n = problem.b.shape[-2]
        if precond.diagonal.shape[-1] != n:
            raise ValueError(f"precond must have {n} rows as b does; got {precond.diagonal.shape[-1]}.")
        if precond.diagonal.ndim >= problem.b.ndim:
            raise ValueError(
                f"precond has batch shape {tuple(precond.diagonal.shape[:-1])}, which does not broadcast with that of "
                f"b, {tuple(problem.b.shape[:-2])}."
            )
        return ChosenPreconditioner(precond.name, precond.rank, precond.apply, True)
    name = getattr(precond, "__name__", type(precond).__name__)
    return ChosenPreconditioner(name, None, problem.by_columns("precond", precond), False)


def split_noise(A: Any) -> tuple[Any, "Tensor | float"]:
    """Take the added diagonal off a LinearOperator, as ``add_jitter`` and ``add_diagonal`` put it there."""
    if is_linear_operator(A):
        from linear_operator.operators import AddedDiagLinearOperator

        if isinstance(A, AddedDiagLinearOperator):
            return A._linear_op, A._diag_tensor.diagonal(dim1=-2, dim2=-1)
    return A, 0.0


def _automatic(A: Any) -> "PivotedCholesky | None":
    if not is_linear_operator(A) or A.shape[-1] < AUTO_FROM_ROWS:
        return None
    from stochproc.kernels import KernelOperator

    inner, noise = split_noise(A)
    return PivotedCholesky() if isinstance(noise, Tensor) and isinstance(inner, KernelOperator) else None
