"""Which model a regressor fits, by its parameters and the number of rows, and how that model is learned."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from stochproc.gp._exact import ScaleMixtureGP
from stochproc.gp._hyperparameters import learn
from stochproc.gp._independent import IndependentNoiseGP
from stochproc.gp._independent_search import learn_independent, scaled_start
from stochproc.gp._large import LargeScaleMixtureGP
from stochproc.gp._large_fit import learn_from_rows, solve_progress
from stochproc.gp._large_posterior import LargePosterior
from stochproc.gp._large_system import DEFAULT_CG
from stochproc.gp._starts import n_starts_of
from stochproc.solvers import CG

__all__ = ["CHOLESKY_ROWS", "Model", "conditioned", "learner_of", "model_of", "solver_of", "start_model"]

Model = ScaleMixtureGP | IndependentNoiseGP

# Up to this many rows solver="auto" factors the matrix, which takes 200 MB in float64, twice.
CHOLESKY_ROWS = 5000
# Matrices of that size that shall fit the memory: a search held up to six at once in our tests, and is not alone.
_MATRICES = 16


def model_of(estimator: Any, n_rows: int) -> Callable[..., Model]:
    """Return what makes the model, of kernel, prior, noise, mean and n_outputs."""
    if estimator.noise_model == "independent":
        return IndependentNoiseGP
    if isinstance(estimator.solver, CG):
        return functools.partial(LargeScaleMixtureGP, solver=estimator.solver)
    if estimator.solver == "cg" or (estimator.solver == "auto" and n_rows > _rows_to_factor()):
        return functools.partial(LargeScaleMixtureGP, solver=DEFAULT_CG)
    return ScaleMixtureGP


def _rows_to_factor() -> int:
    """Return up to how many rows "auto" factors the matrix on this machine."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        # Not every system tells.
        return CHOLESKY_ROWS
    return min(CHOLESKY_ROWS, math.isqrt(total // (8 * _MATRICES))) if total > 0 else CHOLESKY_ROWS


def solver_of(estimator: Any, posterior: Any) -> Any:
    """Return the solver that a fit took: that of the estimator, or what "auto" was on this machine."""
    if isinstance(estimator.solver, CG) or estimator.solver != "auto":
        return estimator.solver
    return "cg" if isinstance(posterior, LargePosterior) else "cholesky"


def start_model(model: Model, targets: Tensor) -> ScaleMixtureGP:
    """Return the model by Cholesky factors, noise inside the scale, that a search begins with."""
    return model.exact() if isinstance(model, LargeScaleMixtureGP) else scaled_start(model, targets)


def learner_of(estimator: Any, model: Model, n_rows: int) -> Callable[..., Any]:
    """Return the search for hyperparameters, with the arguments of ``learn``."""
    if isinstance(model, IndependentNoiseGP):
        return functools.partial(learn_independent, n_starts=n_starts_of(estimator, n_rows, model.kernel))
    if not isinstance(model, LargeScaleMixtureGP):
        return functools.partial(learn, n_starts=n_starts_of(estimator, n_rows, model.kernel))
    subset = estimator.hyper_subset
    # A stochastic search is long and its optima are blurred: one start, unless more are asked for.
    many = n_rows if subset is not None else max(n_rows, CHOLESKY_ROWS)
    n_starts = n_starts_of(estimator, min(many, subset or many), model.kernel)
    return functools.partial(learn_from_rows, n_starts=n_starts, subset=subset)


def conditioned(model: Model, inputs: Tensor, targets: Tensor, verbose: int) -> Any:
    """Return the posterior process; a bar shows the progress of a long solve, if ``verbose``."""
    if not isinstance(model, LargeScaleMixtureGP):
        return model.condition(inputs, targets)
    with solve_progress(verbose, "conditioning") as progress:
        return model.condition(inputs, targets, progress=progress)
