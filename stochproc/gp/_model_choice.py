"""Which model a regressor fits, by its parameters and the number of rows, and how that model is learned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from stochproc.gp._exact import ScaleMixtureGP
from stochproc.gp._hyperparameters import learn
from stochproc.gp._independent import IndependentNoiseGP
from stochproc.gp._independent_search import learn_independent, scaled_start
from stochproc.gp._large import LargeScaleMixtureGP
from stochproc.gp._large_fit import learn_from_rows, solve_progress
from stochproc.gp._large_system import DEFAULT_CG
from stochproc.gp._starts import n_starts_of
from stochproc.solvers import CG

__all__ = ["CHOLESKY_ROWS", "Model", "conditioned", "learner_of", "model_of", "start_model"]

Model = ScaleMixtureGP | IndependentNoiseGP

# Up to this many rows solver="auto" factors the matrix, which takes 200 MB in float64, twice.
CHOLESKY_ROWS = 5000


def model_of(estimator: Any, n_rows: int) -> Callable[..., Model]:
    """Return what makes the model, of kernel, prior, noise, mean and n_outputs."""
    if estimator.noise_model == "independent":
        return IndependentNoiseGP
    if isinstance(estimator.solver, CG):
        return functools.partial(LargeScaleMixtureGP, solver=estimator.solver)
    if estimator.solver == "cg" or (estimator.solver == "auto" and n_rows > CHOLESKY_ROWS):
        return functools.partial(LargeScaleMixtureGP, solver=DEFAULT_CG)
    return ScaleMixtureGP


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
