"""Preconditioned conjugate gradients for symmetric positive definite systems, honest about the residual."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice, check_integer, check_positive
from stochproc.exceptions import NumericalWarning
from stochproc.solvers._cg_iteration import Ended
from stochproc.solvers._cg_passes import Outcome, solve_in_passes
from stochproc.solvers._implicit import attach_implicit_gradient
from stochproc.solvers._linear_problem import LinearProblem
from stochproc.solvers._preconditioner_choice import resolve_preconditioner
from stochproc.solvers._preconditioners import Preconditioner, PreconditionerOption
from stochproc.solvers._result import Callback, Convergence, Result, Status

__all__ = ["CG"]

STATUS = {
    Ended.CONVERGED: Status.CONVERGED,
    Ended.STOPPED: Status.STOPPED,
    Ended.MAX_ITER: Status.MAX_ITER,
    Ended.STAGNATED: Status.STAGNATED,
    Ended.BREAKDOWN: Status.BREAKDOWN,
    Ended.NONFINITE: Status.NONFINITE,
}


@dataclass(frozen=True)
class CG:
    r"""Solve :math:`A x = b` for symmetric positive definite A by preconditioned conjugate gradients.

    A column has converged when :math:`\|b - A x\| \le \max(\mathrm{rtol}\, \|b\|, \mathrm{atol})` for its true
    residual, recomputed from ``x``.

    Parameters
    ----------
    rtol : float, default=1e-6
        Relative to the norm of each column of b.
    atol : float, default=0.0
        In the unit of b; not both may be zero.
    max_iter : int, default=1000
        Iterations in all, restarts included.
    precond : optional
        Preconditioner. ``"auto"`` (the default): ``PivotedCholesky()`` for a ``KernelOperator`` plus a diagonal
        with at least 2000 rows, else none. None: none. ``PivotedCholesky``, ``Nystrom`` or ``Jacobi``: built from
        A anew in each call; the diagonal that ``add_jitter`` or ``add_diagonal`` put on an operator is split
        off as its noise. A ``Preconditioner``: used as it is. A callable: the product of a vector with an
        approximate inverse of A, symmetric positive definite unless ``flexible``.
    project : callable or None, default=None
        Orthogonal projection that removes a known null space of a singular A, applied to ``x0``, residuals and
        directions. The residual that counts is not projected: a b outside the range ends ``STAGNATED``, at the
        solution of the projected system.
    verify : bool, default=True
        Recompute the residual at the end, for one more product; where rounding made the recursion drift, it is
        started again from the true residual until that stops falling. False believes the recursion (inner
        solves).
    flexible : bool or int, default=False
        True takes the Polak-Ribiere rule, m makes each direction conjugate to the m before it (m more pairs of
        vectors of memory): for a preconditioner that varies or is not symmetric.
    patience : int, default=500
        A column whose best residual has not halved within so many iterations has stagnated. The residual of a system
        of condition 1e5 may rise for some hundred iterations before it falls; inner solves want less.
    keep_history : bool, default=False
        Return the residual norms of the recursion after each iteration.

    Notes
    -----
    An iteration costs one product with A, one application of the preconditioner and O(n k) work; memory is eight
    vectors a column. Inner products are accumulated in float64 for float32 data too. Columns and matrices of a
    batch advance together; one that has ended is frozen, and for a tensor or LinearOperator its column leaves
    the product when half of the present ones have ended in every matrix. In float32 the residual cannot fall
    much below 1e-7 times the norms of A and x; a tolerance below that ends as ``STAGNATED``.

    **Gradients** are those of the exact solution, by the implicit function theorem: the backward solves once
    more with the same A, options and preconditioner. They reach b, a tensor A, every tensor inside a
    LinearOperator and whatever a callable A captures; not x0 or the preconditioner. In the backward ``rtol``
    refers to the upstream gradient and ``atol`` is left out (1e-6 stands for an ``rtol`` of zero). A second
    derivative raises RuntimeError. Where nothing requires a gradient no product is spent on it; with
    ``verify=False`` one is, where something does.

    References
    ----------
    .. [1] Y. Saad, "Iterative Methods for Sparse Linear Systems", 2nd edition, 2003, algorithm 9.1.
    .. [2] Y. Notay, "Flexible conjugate gradients", SIAM J. Sci. Comput. 22, 2000.

    Examples
    --------
    >>> import torch
    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> result = CG()(A, torch.tensor([1.0, 2.0], dtype=torch.float64))
    >>> result.ok, result.convergence.iterations, result.value
    (True, 2, tensor([0.0909, 0.6364], dtype=torch.float64))

    A kernel matrix that is never formed, with its noise on the diagonal:

    >>> from stochproc.kernels import RBF
    >>> x = torch.linspace(0, 1, 300, dtype=torch.float64).unsqueeze(-1)
    >>> K = RBF(lengthscale=0.2).operator(x).add_jitter(0.01)
    >>> CG(rtol=1e-8)(K, x.sin()).ok
    True
    """

    rtol: "float | int" = 1e-6
    atol: "float | int" = 0.0
    max_iter: int = 1000
    precond: "str | Preconditioner | PreconditionerOption | Callable[[Tensor], Tensor] | None" = "auto"
    project: "Callable[[Tensor], Tensor] | None" = None
    verify: bool = True
    flexible: "bool | int" = False
    patience: int = 500
    keep_history: bool = False

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol, zero=True)
        check_positive("atol", self.atol, zero=True)
        if self.rtol == 0 and self.atol == 0:
            raise ValueError("rtol and atol must not both be zero; no solver reaches a residual of exactly zero.")
        check_integer("max_iter", self.max_iter, 1)
        check_integer("flexible", int(self.flexible) if isinstance(self.flexible, bool) else self.flexible, 0)
        check_integer("patience", self.patience, 1)
        if self.project is not None and not callable(self.project):
            raise TypeError(f"project must be a callable or None; got {type(self.project).__name__}.")
        if isinstance(self.precond, str):
            check_choice("precond", self.precond, ["auto"])
        elif not (
            self.precond is None
            or isinstance(self.precond, (Preconditioner, PreconditionerOption))
            or callable(self.precond)
        ):
            raise TypeError(
                "precond must be 'auto', None, PivotedCholesky, Nystrom, Jacobi, a Preconditioner or a callable; "
                f"got {type(self.precond).__name__}."
            )

    def __call__(
        self,
        A: Any,
        b: Float[Tensor, "..."],
        x0: "Float[Tensor, '...'] | None" = None,
        *,
        callback: "Callback | None" = None,
    ) -> Result[Tensor]:
        r"""Solve one system, several right-hand sides, or a batch.

        Parameters
        ----------
        A : Tensor, LinearOperator or callable
            Symmetric positive definite, of shape (\*batch, n, n). A callable ``v -> A v`` is given tensors of
            the shape of ``b`` and returns the same shape, as do a callable ``precond`` and ``project``.
        b : Tensor
            float32 or float64. With a tensor or LinearOperator, ``b.ndim == A.ndim - 1`` is one vector a matrix,
            (\*batch, n), and ``b.ndim == A.ndim`` is columns, (\*batch, n, k); batch shapes broadcast. With a
            callable, one dimension is a vector, (n,), and more are columns, (\*batch, n, k).
        x0 : Tensor or None, default=None
            Start, of the shape of the solution; None is zero.
        callback : callable or None, default=None
            Called after each iteration with a ``SolverState``: the residual norm of the worst column and the
            current iterate. Returning True ends the columns that have not converged as ``STOPPED``.

        Returns
        -------
        Result[Tensor]
            ``value``, in the shape of ``b``, is the iterate of smallest residual, column by column; exactly 0
            where b is 0. ``status`` is that of the worst column, in the order ``CONVERGED``, ``STOPPED``,
            ``MAX_ITER``, ``STAGNATED`` (no halving of the residual within ``patience`` iterations, or rounding
            keeps the true residual above the tolerance), ``BREAKDOWN`` (a direction of non-positive curvature,
            so A or the preconditioner is not positive definite: the current iterate; or, where the very first
            direction from a zero start is one, the preconditioned residual) and ``NONFINITE`` (b, x0 or a
            product holds NaN or infinity; where it is the input, the value is 0).

            ``convergence`` has the largest iteration count, and residual norm and tolerance of the column with
            the largest ratio of the two. ``stats`` has, of each system, ``iterations``, ``residual``,
            ``tolerance`` and ``status`` (as codes of severity, 1 is converged), and ``products`` (applications
            of A to a block, those that build the preconditioner included), ``restarts``, ``preconditioner``,
            ``preconditioner_rank`` and ``dtype``.

        Raises
        ------
        TypeError
            If A is of another kind, b is not float32 or float64, or dtypes or devices are mixed.
        ValueError
            If A is not square or shapes do not fit.

        Warns
        -----
        NumericalWarning
            In the backward, if its solve does not converge.
        """
        problem = LinearProblem(A, b, x0, self.project)
        with torch.no_grad():
            chosen = resolve_preconditioner(self.precond, problem)
            outcome = solve_in_passes(problem, self, chosen, callback)
        value = problem.shaped(outcome.x)
        if outcome.residual is not None and outcome.residual.requires_grad:
            solve = functools.partial(_solve_backward, self, problem, chosen)
            value = attach_implicit_gradient(value, problem.shaped(outcome.residual), solve, problem.guard)
        return _result(value, outcome, problem, chosen)


def _solve_backward(options: CG, problem: LinearProblem, chosen: Any, grad: Tensor) -> Tensor:
    """Solve A w = g with the options of the forward solve."""
    # atol is in the unit of b and says nothing about a gradient.
    options = dataclasses.replace(options, rtol=options.rtol or 1e-6, atol=0.0, keep_history=False)
    backward = problem.with_right_side(grad)
    outcome = solve_in_passes(backward, options, chosen, None)
    result = _result(backward.shaped(outcome.x), outcome, backward, chosen)
    if not result.ok:
        warnings.warn(
            f"the backward solve of CG ended with status '{result.status.value}', so that gradients are inexact: "
            f"{result.convergence.message}",
            NumericalWarning,
            stacklevel=2,
        )
    return result.value


def _result(value: Tensor, outcome: Outcome, problem: LinearProblem, chosen: Any) -> Result[Tensor]:
    """Put the numbers of each column, and those of the worst, into the shared form."""

    def per_system(t: Tensor) -> Tensor:
        return t.squeeze(-1) if problem.vector else t

    stats = {
        "iterations": per_system(outcome.iterations),
        "residual": per_system(outcome.norm),
        "tolerance": per_system(outcome.tol),
        "status": per_system(outcome.code),
        "products": problem.products,
        "restarts": outcome.restarts,
        "preconditioner": chosen.name,
        "preconditioner_rank": chosen.rank,
        "dtype": str(problem.b.dtype).removeprefix("torch."),
    }
    if outcome.code.numel() == 0:
        return Result(value, Status.CONVERGED, Convergence(0, 0.0, 0.0), stats)
    worst = Ended(int(outcome.code.max()))
    at = int(torch.where(outcome.norm == 0, 0.0, outcome.norm / outcome.tol).argmax())
    residual, tolerance = (float(t.flatten()[at]) for t in (outcome.norm, outcome.tol))
    iterations = int(outcome.iterations.max())
    message = outcome.describe(worst, residual, tolerance, iterations)
    history = None
    if outcome.history is not None:
        history = outcome.history.squeeze(-1) if problem.vector else outcome.history
    return Result(value, STATUS[worst], Convergence(iterations, residual, tolerance, history, message), stats)
