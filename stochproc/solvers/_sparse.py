"""Sparse symmetric systems: conjugate gradients and sparse factorisations behind the shared result."""

import dataclasses
import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice, check_integer, check_positive
from stochproc.exceptions import NumericalWarning
from stochproc.solvers._cg import CG
from stochproc.solvers._implicit import attach_implicit_gradient
from stochproc.solvers._preconditioners import Preconditioner
from stochproc.solvers._result import Convergence, Result, Status
from stochproc.solvers._sparse_matrix import SparseMatrix, smaller_residual

__all__ = ["SparseCG"]

# Sizes up to which a sparse factorisation costs less than finding out whether CG converges.
DIRECT_UP_TO = 2000


@dataclass(frozen=True)
class SparseCG:
    r"""Solve :math:`A x = b` for a sparse symmetric positive definite A.

    On a CPU up to 2000 rows are factored (SuperLU); above, scipy's conjugate gradients with the diagonal as
    preconditioner come first, and the factorisation where they fail. On CUDA the ``CG`` of this package runs on
    the CSR matrix. A column has converged when :math:`\|b - A x\| \le \max(\mathrm{rtol}\,\|b\|, \mathrm{atol})`
    for its true residual.

    Parameters
    ----------
    rtol : float, default=1e-8
        Relative to the norm of each column of b. A float32 solution cannot meet less than about 1e-6.
    atol : float, default=0.0
        In the unit of b; not both may be zero.
    max_iter : int, default=1000
        Iterations of conjugate gradients.
    direct : {"auto", "never"}, default="auto"
        Whether a factorisation may be used. Its memory can grow far beyond that of A: like n log n for a mesh in
        the plane, n^(4/3) in space.
    backend : {"auto", "scipy", "torch"}, default="auto"
        "auto" is scipy for a b on the CPU, and torch elsewhere; torch never factors.

    Notes
    -----
    The CPU path computes in float64 whatever the dtype. Gradients with respect to b and to the values of a
    torch sparse A are implicit: the backward solves once more, with the factorisation if there is one. A
    gradient in A has entries where A has. A SciPy matrix is a constant.

    Examples
    --------
    >>> import numpy as np, scipy.sparse, torch
    >>> A = scipy.sparse.diags_array([-np.ones(99), np.full(100, 2.0), -np.ones(99)], offsets=[-1, 0, 1])
    >>> result = SparseCG()(A, torch.ones(100, dtype=torch.float64))
    >>> result.ok, result.stats["method"], round(result.value.max().item(), 6)
    (True, 'direct', 1275.0)
    """

    rtol: "float | int" = 1e-8
    atol: "float | int" = 0.0
    max_iter: int = 1000
    direct: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol, zero=True)
        check_positive("atol", self.atol, zero=True)
        if self.rtol == 0 and self.atol == 0:
            raise ValueError("rtol and atol must not both be zero; no solver reaches a residual of exactly zero.")
        check_integer("max_iter", self.max_iter, 1)
        check_choice("direct", self.direct, ["auto", "never"])
        check_choice("backend", self.backend, ["auto", "scipy", "torch"])

    def __call__(self, A: Any, b: Float[Tensor, "n *k"]) -> Result[Tensor]:
        r"""Solve one system, or several with the same matrix.

        Parameters
        ----------
        A : torch sparse CSR or COO tensor, or SciPy sparse matrix or array, of shape (n, n)
            Symmetric; entries given twice are added up.
        b : Tensor of shape (n,) or (n, k)
            float32 or float64.

        Returns
        -------
        Result[Tensor]
            ``value`` has the shape, dtype and device of b. ``status`` is that of the worst column:
            ``CONVERGED``; ``MAX_ITER`` (no factorisation allowed); ``STAGNATED`` (rounding, or a singular system
            without solution); ``BREAKDOWN`` (A is exactly singular and conjugate gradients did not converge
            either, or, on the torch backend, A is not positive definite); ``NONFINITE`` (A or b holds NaN or
            infinity; the value is then 0). An indefinite A that the factorisation solves is ``CONVERGED``.
            ``convergence`` is that of the column with the largest ratio of residual to tolerance. ``stats`` has
            ``iterations``, ``residual`` and ``tolerance`` by column, and ``method``: "cg", "direct" or "cg,
            direct".

        Raises
        ------
        TypeError
            If A is not sparse, or dtypes or devices are mixed.
        ValueError
            If A is not square or not symmetric, or b does not fit.

        Warns
        -----
        NumericalWarning
            In the backward, if its solve does not converge.
        """
        matrix = SparseMatrix(A, b)
        result = self._solve(matrix, b.detach())
        if not (torch.is_grad_enabled() and (b.requires_grad or matrix.values.requires_grad)):
            return result
        residual = b - matrix.product(result.value)
        backward = functools.partial(self._solve_backward, matrix)
        value = attach_implicit_gradient(result.value, residual, backward, (matrix.values,))
        return dataclasses.replace(result, value=value)

    @torch.no_grad()
    def _solve(self, matrix: SparseMatrix, b: Tensor) -> Result[Tensor]:
        if not matrix.finite or not bool(b.isfinite().all()):
            what = "b" if matrix.finite else "A"
            nothing = b.new_zeros(b.shape[1:], dtype=torch.float64)
            stats = {
                "iterations": nothing.long(),
                "residual": nothing + math.inf,
                "tolerance": nothing + self.atol,
                "method": "none",
            }
            message = f"{what} holds NaN or infinity"
            return Result(
                torch.zeros_like(b),
                Status.NONFINITE,
                Convergence(0, math.inf, float(self.atol), message=message),
                stats,
            )
        if self.backend == "scipy" or (self.backend == "auto" and b.device.type == "cpu"):
            return self._solve_by_scipy(matrix, b)
        P = Preconditioner("Jacobi", b.new_zeros(matrix.n, 0), _positive(matrix.diagonal()))
        cg = CG(self.rtol, self.atol, self.max_iter, precond=P)
        result = cg(lambda v: matrix.torch_csr @ v, b)
        kept = ("iterations", "residual", "tolerance")
        return dataclasses.replace(result, stats={**{k: result.stats[k] for k in kept}, "method": "cg"})

    def _solve_by_scipy(self, matrix: SparseMatrix, b: Tensor) -> Result[Tensor]:
        """Run the methods in turn until one has met the tolerance of every column; keep the better solution."""
        B = b.double().cpu().numpy().reshape(matrix.n, -1)
        tol = np.maximum(self.rtol * np.linalg.norm(B, axis=0), self.atol)
        X, iterations = np.zeros_like(B), np.zeros(B.shape[1], dtype=np.int64)
        methods = ["direct", "cg"] if matrix.n <= DIRECT_UP_TO else ["cg", "direct"]
        if self.direct == "never":
            methods = ["cg"]
        used: list[str] = []

        def rounded() -> np.ndarray:
            # The residual that counts is that of the solution in the dtype of b.
            return X if b.dtype == torch.float64 else X.astype(np.float32).astype(np.float64)

        norm = np.linalg.norm(B, axis=0)
        for method in methods:
            todo = np.flatnonzero(~(norm <= tol))
            if todo.size == 0:
                break
            used.append(method)
            if method == "direct":
                found = matrix.factors.solve(B[:, todo], tol[todo])
            else:
                found, iterations[todo] = self._conjugate_gradients(matrix, B[:, todo], tol[todo])
            X[:, todo] = smaller_residual(matrix.csr, B[:, todo], X[:, todo], found)
            norm = np.linalg.norm(B - matrix.csr @ rounded(), axis=0)
        return self._result(matrix, b, rounded(), norm, tol, iterations, used)

    def _conjugate_gradients(
        self, matrix: SparseMatrix, B: np.ndarray, tol: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Solve column by column, started again from the true residual while that halves it."""
        from scipy.sparse import diags_array
        from scipy.sparse.linalg import cg

        M = diags_array(1 / _positive(matrix.diagonal().double()).cpu().numpy())
        X, iterations = np.zeros_like(B), np.zeros(B.shape[1], dtype=np.int64)

        def count(_: np.ndarray) -> None:
            iterations[j] += 1

        for j in range(B.shape[1]):
            norm, previous = float(np.linalg.norm(B[:, j])), math.inf
            while norm > tol[j] and norm <= 0.5 * previous and iterations[j] < self.max_iter:
                budget = self.max_iter - int(iterations[j])
                r = B[:, j] - matrix.csr @ X[:, j]
                with np.errstate(all="ignore"):
                    d, _ = cg(matrix.csr, r, rtol=0.0, atol=float(tol[j]), maxiter=budget, M=M, callback=count)
                x = smaller_residual(matrix.csr, B[:, [j]], X[:, [j]], (X[:, j] + d)[:, None])[:, 0]
                X[:, j] = x
                previous, norm = norm, float(np.linalg.norm(B[:, j] - matrix.csr @ x))
        return X, iterations

    def _result(
        self,
        matrix: SparseMatrix,
        b: Tensor,
        X: np.ndarray,
        norm: np.ndarray,
        tol: np.ndarray,
        iterations: np.ndarray,
        used: list[str],
    ) -> Result[Tensor]:
        value = torch.tensor(X.reshape(b.shape), dtype=b.dtype, device=b.device)
        shape = tuple(b.shape[1:])
        stats = {
            "iterations": torch.tensor(iterations.reshape(shape)),
            "residual": torch.tensor(norm.reshape(shape)),
            "tolerance": torch.tensor(tol.reshape(shape)),
            "method": ", ".join(used) or "none",
        }
        if norm.size == 0:
            return Result(value, Status.CONVERGED, Convergence(0, 0.0, 0.0), stats)
        with np.errstate(all="ignore"):
            at = int(np.argmax(np.where(norm == 0, 0.0, norm / tol)))
        residual, tolerance, most = float(norm[at]), float(tol[at]), int(iterations.max())
        unmet = ~(norm <= tol)
        status, message = Status.CONVERGED, ""
        if unmet.any():
            numbers = f"residual {residual:.3g}, asked for {tolerance:.3g} ({int(unmet.sum())} of {norm.size} columns)"
            if "direct" in used and matrix.factors.singular:
                status, message = Status.BREAKDOWN, f"A is singular and conjugate gradients do not converge: {numbers}"
            elif used == ["cg"] and bool((iterations[unmet] >= self.max_iter).any()):
                status, message = Status.MAX_ITER, f"{numbers} after {most} iterations; raise max_iter or allow direct"
            else:
                status, message = Status.STAGNATED, f"{numbers}: rounding, or b is outside the range of a singular A"
        return Result(value, status, Convergence(most, residual, tolerance, message=message), stats)

    def _solve_backward(self, matrix: SparseMatrix, grad: Tensor) -> Tensor:
        # atol is in the unit of b and says nothing about a gradient.
        options = dataclasses.replace(self, rtol=self.rtol or 1e-8, atol=0.0)
        result = options._solve(matrix, grad)
        if not result.ok:
            warnings.warn(
                f"the backward solve of SparseCG ended with status '{result.status.value}', so that gradients are "
                f"inexact: {result.convergence.message}",
                NumericalWarning,
                stacklevel=2,
            )
        return result.value


def _positive(d: Tensor) -> Tensor:
    """Diagonal of a preconditioner: entries that no definite matrix has count as 1."""
    return torch.where((d > 0) & d.isfinite(), d, 1.0)
