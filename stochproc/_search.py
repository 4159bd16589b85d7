"""Searches for hyperparameters: their ranges, their default, and how they ended."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from stochproc.solvers import LBFGS, Result, Status

__all__ = [
    "KERNEL_RANGE",
    "Learned",
    "bounds_around",
    "default_search",
    "is_log",
    "search_twice",
    "warn_unless_converged",
]

# Positive hyperparameters of the kernel are searched within these; a given value outside widens them.
KERNEL_RANGE = (1e-5, 1e5)


class Learned(NamedTuple):
    """How the search ended."""

    result: Result[float] | None
    converged: bool
    n_iter: int


def default_search(n_restarts: int) -> LBFGS:
    """Return the search that an estimator runs unless it is given one.

    A projected gradient of 1e-5 |log p(y)| in the logarithms leaves the likelihood within 0.1 nat of its maximum in
    every direction of curvature that matters. With noise-free targets, where the matrix has a condition number of
    some 1e8, rounding hides smaller gradients.
    """
    return LBFGS(tol=1e-5, n_restarts=n_restarts)


def search_twice(run: Callable[[LBFGS], Result[float]], search: LBFGS) -> tuple[Result[float], int]:
    """Search, and where that stagnates once more; return the result and the iterations of both.

    The curvature gathered along a flat valley can be all rounding; without it a few steps remain.
    """
    result = run(search)
    iterations = result.convergence.iterations
    if result.status is not Status.STAGNATED:
        return result, iterations
    again = run(LBFGS(search.max_iter, search.tol, search.memory))
    stats = result.stats | {"evaluations_again": again.stats["evaluations"]}
    return replace(again, stats=stats), iterations + again.convergence.iterations


def is_log(name: str) -> bool:
    """Whether a parameter of this name is the logarithm of a positive hyperparameter."""
    return name.rsplit(".", 1)[-1].startswith("log_")


def bounds_around(parameter: Tensor, allowed: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return bounds of a logarithm: the range allowed, widened where the value lies outside it."""
    value = parameter.detach()
    return value.clamp(max=math.log(allowed[0])), value.clamp(min=math.log(allowed[1]))


def warn_unless_converged(estimator: Any) -> None:
    """Warn the caller of ``fit`` where the search stopped early."""
    if not estimator.converged_:
        result = estimator.optimizer_result_
        why = result.convergence.message if result is not None else "stopped"
        warnings.warn(
            f"the search for hyperparameters ended without meeting its tolerance: {why}. The best ones found "
            "are used. Pass optimizer=LBFGS(max_iter=...) or more n_restarts for a longer search.",
            ConvergenceWarning,
            stacklevel=3,
        )
