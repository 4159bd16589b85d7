"""Solvers that at least two parts of the library use; all return the same ``Result``."""

from stochproc.solvers._result import Callback, Convergence, Result, SolverState, Status

__all__ = ["Callback", "Convergence", "Result", "SolverState", "Status"]
