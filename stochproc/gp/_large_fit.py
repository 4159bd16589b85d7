"""Hyperparameters of many data: learned on some rows by Cholesky, or on all of them by stochastic gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stochproc._search import Learned
from stochproc._warnings import warn_caller
from stochproc.exceptions import DataWarning
from stochproc.gp._hyperparameters import learn, varies_from_mean
from stochproc.gp._large import LargeScaleMixtureGP
from stochproc.solvers import LBFGS, Status

__all__ = ["learn_from_rows", "solve_progress"]

# A stochastic search on more rows than this begins at the optimum of so many of them, where it takes a few steps.
_WARM_ROWS = 2000


def learn_from_rows(
    model: LargeScaleMixtureGP,
    X: Tensor,
    y: Tensor,
    search: LBFGS,
    generator: torch.Generator,
    callback: Callable[[Any], Any] | None,
    verbose: int,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    n_starts: int = 1,
    *,
    subset: int | None = 2000,
) -> Learned:
    """Learn in place from ``subset`` random rows by Cholesky factors, or from all of them by stochastic gradients.

    What a subset of the rows learns best is kernel, noise and shape of the prior; constant mean and scale parameter
    of the prior are then set to their optimum for all rows, by one solve.
    """
    n = len(X)
    exact = model.exact()
    if subset is not None:
        rows = _some_rows(n, subset, generator)
        if not varies_from_mean(exact, y[rows]) and varies_from_mean(model, y):
            warn_caller(
                f"the {len(rows)} rows drawn from {n} have one target; kernel and noise are kept as given. A larger "
                "hyper_subset would have more.",
                DataWarning,
            )
        learned = learn(exact, X[rows], y[rows], search, generator, callback, verbose, ranges, n_starts)
        _fit_mean_and_scale(model, X, y, verbose)
        return learned
    done = 0
    if n > 2 * _WARM_ROWS:
        rows = _some_rows(n, _WARM_ROWS, generator)
        warm = learn(exact, X[rows], y[rows], search, generator, callback, verbose, ranges, n_starts)
        done, n_starts = warm.n_iter, 1
        if warm.result is not None and warm.result.status is Status.STOPPED:
            _fit_mean_and_scale(model, X, y, verbose)
            return warm
    learned = learn(model, X, y, search, generator, callback, verbose, ranges, n_starts)
    return learned._replace(n_iter=learned.n_iter + done)


def _fit_mean_and_scale(model: LargeScaleMixtureGP, X: Tensor, y: Tensor, verbose: int) -> None:
    if varies_from_mean(model, y):
        with solve_progress(verbose, "mean and scale") as progress:
            model.fit_mean_and_scale(X, y, progress=progress)


def _some_rows(n: int, subset: int, generator: torch.Generator) -> Tensor:
    """Draw rows without replacement; in their order, so that a subset of everything is everything as it is."""
    return torch.randperm(n, generator=generator)[: min(subset, n)].sort().values


@contextmanager
def solve_progress(verbose: int, what: str) -> Iterator[Callable[[int, float], None] | None]:
    """Show the iterations of a solve and how far its residual is above the tolerance, if ``verbose``."""
    if not verbose:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=what, unit=" products") as bar:

        def tell(iterations: int, excess: float) -> None:
            bar.set_postfix({"residual / tolerance": f"{excess:.3g}"}, refresh=False)
            bar.update(iterations - bar.n)

        yield tell
