"""Solvers that at least two parts of the library use; all return the same ``Result``."""

from stochproc.solvers._cholesky import cholesky_or_raise, safe_cholesky
from stochproc.solvers._lbfgs import LBFGS
from stochproc.solvers._result import Callback, Convergence, Result, SolverState, Status

__all__ = [
    "LBFGS",
    "Callback",
    "Convergence",
    "Result",
    "SolverState",
    "Status",
    "cholesky_or_raise",
    "safe_cholesky",
]
