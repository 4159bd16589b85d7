"""Solvers that at least two parts of the library use; all return the same ``Result``."""

from stochproc.solvers._cg import CG
from stochproc.solvers._cholesky import cholesky_or_raise, safe_cholesky
from stochproc.solvers._kalman import kalman_smoother
from stochproc.solvers._kalman_messages import Messages, messages
from stochproc.solvers._kalman_smoothed import Smoothed
from stochproc.solvers._lanczos import Estimate, LanczosLogdet
from stochproc.solvers._lbfgs import LBFGS
from stochproc.solvers._line_search import LineSearch, LineStep, Trial
from stochproc.solvers._markov_paths import sample_paths
from stochproc.solvers._newton import Newton
from stochproc.solvers._preconditioners import Jacobi, Nystrom, PivotedCholesky, Preconditioner
from stochproc.solvers._result import Callback, Convergence, Result, SolverState, Status
from stochproc.solvers._sde import integrate
from stochproc.solvers._sde_grid import TimeGrid, time_grid
from stochproc.solvers._sde_noise import brownian_increments
from stochproc.solvers._sparse import SparseCG
from stochproc.solvers._truncated_cg import truncated_cg

__all__ = [
    "CG",
    "LBFGS",
    "Callback",
    "Convergence",
    "Estimate",
    "Jacobi",
    "LanczosLogdet",
    "LineSearch",
    "LineStep",
    "Messages",
    "Newton",
    "Nystrom",
    "PivotedCholesky",
    "Preconditioner",
    "Result",
    "Smoothed",
    "SolverState",
    "SparseCG",
    "Status",
    "TimeGrid",
    "Trial",
    "brownian_increments",
    "cholesky_or_raise",
    "integrate",
    "kalman_smoother",
    "messages",
    "safe_cholesky",
    "sample_paths",
    "time_grid",
    "truncated_cg",
]
