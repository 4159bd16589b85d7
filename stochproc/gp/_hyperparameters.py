"""Learning of hyperparameters by maximal marginal likelihood: first without the scale, then what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stochproc._search import KERNEL_RANGE, Learned, bounds_around, is_log, search_twice
from stochproc.exceptions import NotPositiveDefiniteError
from stochproc.gp._approach import approach
from stochproc.gp._exact import ScaleMixtureGP
from stochproc.gp._prior_bounds import free_numbers
from stochproc.gp._process import ScaleMixtureProcess
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._starts import best_of_starts
from stochproc.solvers import LBFGS, Result, Status

__all__ = ["NOISE_CEILING", "NOISE_FLOOR", "free_mean", "learn", "start_period", "varies_from_mean"]

# Below these shares of the signal the noise cannot be told from rounding of the kernel matrix.
NOISE_FLOOR = {torch.float64: 1e-8, torch.float32: 1e-5}
NOISE_CEILING = 1e5
# Frequencies that a periodic kernel without a given period is started from, and rows to compare them on.
_HALF_CYCLES = 40
_ROWS_OF_PERIODS = 500


def learn(
    model: ScaleMixtureGP,
    X: Tensor,
    y: Tensor,
    search: LBFGS,
    generator: torch.Generator,
    callback: Callable[[Any], Any] | None,
    verbose: int,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    n_starts: int = 1,
) -> Learned:
    """Maximise the marginal likelihood over what the model may learn, in place.

    A prior with a free scale parameter has the optimum of the Gaussian process with free outputscale in kernel,
    noise and mean, so one search settles them: after some iterations that see the scale, with scale and mean
    profiled out. What else is free (further parameters of the prior, or a prior whose scale is fixed) is searched
    from there jointly: from a default start such a search can end in a noise-only optimum hundreds of nats lower.
    ``ranges`` narrows the range of some parameters of the kernel, by name; ``n_starts`` is how often kernel and noise
    are searched, of which the best is kept.
    """
    if not varies_from_mean(model, y):
        # Residuals that are exactly zero have their best scale at zero: there is nothing to learn from.
        return Learned(None, True, 0)
    kernel = [(n, p) for n, p in model.kernel.named_parameters() if p.requires_grad]
    parameters: list[Tensor] = [p for _, p in kernel]
    bounds: list[Any] = [
        bounds_around(p, (ranges or {}).get(n, KERNEL_RANGE)) if is_log(n) else None for n, p in kernel
    ]
    if model.log_noise.requires_grad:
        parameters.append(model.log_noise)
        bounds.append(bounds_around(model.log_noise, (NOISE_FLOOR[X.dtype], NOISE_CEILING)))

    def search_once() -> tuple[Result[float], int]:
        """Run one search from the current values: towards the optimum with the scale, then without it."""
        first = approach(model, X, y, search, [p for _, p in kernel], bounds, callback, verbose)
        done = 0 if first is None else first.convergence.iterations
        if first is not None and first.status is Status.STOPPED:
            return first, done
        settled, more = search_twice(
            lambda how: how(
                lambda: model.profile_loss(X, y),
                parameters,
                bounds,
                generator=generator,
                callback=callback,
                verbose=verbose,
                eps=lambda: model.rounding(X),
            ),
            search,
        )
        return settled, done + more

    result: Result[float] | None = None
    iterations = 0
    if parameters:
        try:
            result, iterations = best_of_starts(search_once, parameters, bounds, model.log_noise, n_starts, generator)
        except KeyboardInterrupt:
            # What is left of the search has the mean and the scale that belong to it.
            model.fit_mean_and_scale(X, y)
            raise
    _fit_mean_and_scale(model, X, y)

    if not _has_more(model.scale_prior) or (result is not None and result.status is Status.STOPPED):
        return Learned(result, result is None or result.ok, iterations)
    for _, p, limits in free_numbers(model.scale_prior):
        parameters.append(p)
        bounds.append(limits)
    joint = _search_jointly(model, X, y, search, parameters, bounds, callback, verbose)
    if joint is None:
        return Learned(None, True, iterations)
    return Learned(joint, joint.ok, iterations + joint.convergence.iterations)


def _has_more(prior: ScalePrior) -> bool:
    """Whether a prior has more to learn than its scale parameter, or evidence in which that is not profiled out."""
    name = prior.scale_name if prior.has_scale else None
    return name is None or any(n not in (name, f"log_{name}") for n, _, _ in free_numbers(prior))


def _search_jointly(
    model: ScaleMixtureGP,
    X: Tensor,
    y: Tensor,
    search: LBFGS,
    parameters: list[Tensor],
    bounds: list[Any],
    callback: Callable[[Any], Any] | None,
    verbose: int,
) -> Result[float] | None:
    """Maximise the evidence itself over the parameters and the mean; None if there are none."""
    with free_mean(model, y) as (shift, shifted):
        if not parameters and not shift:
            return None
        return LBFGS(search.max_iter, search.tol, search.memory)(
            lambda: -model.log_marginal_likelihood(X, shifted()),
            [*parameters, *shift],
            [*bounds, *[None] * len(shift)],
            callback=callback,
            verbose=verbose,
            eps=lambda: model.rounding(X),
        )


@contextmanager
def free_mean(model: ScaleMixtureProcess, y: Tensor) -> Iterator[tuple[list[Tensor], Callable[[], Tensor]]]:
    """Give what a joint search moves instead of the constant mean, and the targets less it; the mean has it at the end.

    It is in units of the spread of y: the gradient in the mean itself, and with it the tolerance, depends on the units.
    """
    mean = model.constant_mean
    if mean is None or not mean.requires_grad:
        yield [], lambda: y
        return
    columns = y.detach().to(torch.float64).reshape(len(y), -1)
    spread = (columns - columns.mean(0)).abs().mean(0)
    unit = torch.where(spread > 0, spread, 1.0)
    shift = torch.zeros_like(unit).requires_grad_()
    try:
        yield [shift], lambda: y - (unit * shift).to(y)
    finally:
        with torch.no_grad():
            mean += (unit * shift).to(mean)


@torch.no_grad()
def start_period(model: ScaleMixtureGP, X: Tensor, y: Tensor) -> dict[str, tuple[float, float]]:
    """Set the period of a periodic kernel to the best of a grid in frequency, in place; return the range around it.

    The likelihood has about one maximum each half of a cycle over the range of the points, so a search finds only
    the nearest. The grid has that spacing and goes from half a cycle to twenty; on more than 500 rows it is
    evaluated on 500 of them. The range goes to the two neighbours: one long step would leave the maximum.
    """
    rows = torch.linspace(0, len(X) - 1, min(len(X), _ROWS_OF_PERIODS), device=X.device).round().long()
    X, y = X[rows], y[rows]
    if not varies_from_mean(model, y):
        return {}
    width = float((X.amax(0) - X.amin(0)).max())
    kernel: Any = model.kernel
    best, best_loss = 0, math.inf
    for half_cycles in range(1, _HALF_CYCLES + 1):
        period = 2 * width / half_cycles
        if not KERNEL_RANGE[0] <= period <= KERNEL_RANGE[1]:
            continue
        kernel.period = period
        try:
            loss = float(model.profile_loss(X, y))
        except NotPositiveDefiniteError:
            continue
        if loss < best_loss:
            best, best_loss = half_cycles, loss
    kernel.period = 2 * width / best if best else 1.0
    return {"log_period": (2 * width / (best + 1), 2 * width / max(best - 1, 0.5))} if best else {}


def _fit_mean_and_scale(model: ScaleMixtureGP, X: Tensor, y: Tensor) -> None:
    try:
        model.fit_mean_and_scale(X, y)
        return
    except NotPositiveDefiniteError as error:
        short = error
    # A search has no use for a diagnosis of each failure; whoever reads the final error has.
    model.condition(X, y)
    raise short


def varies_from_mean(model: ScaleMixtureGP, y: Tensor) -> bool:
    """Whether there is anything to learn: targets that differ from the prior mean by more than rounding."""
    centred = y - y.mean(0) if model.constant_mean is not None else y
    rounding = 10 * torch.finfo(y.dtype).eps * y.abs().max()
    return bool(centred.abs().max() > rounding)
