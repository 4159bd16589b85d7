"""Learning of hyperparameters by maximal marginal likelihood: first without the scale, then what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stochproc._search import KERNEL_RANGE, Learned, bounds_around, is_log, search_twice
from stochproc.exceptions import NotPositiveDefiniteError
from stochproc.gp._approach import approach
from stochproc.gp._exact import ScaleMixtureGP
from stochproc.solvers import LBFGS, Result, Status, safe_cholesky

__all__ = ["NOISE_FLOOR", "learn", "start_period"]

# Below these shares of the signal the noise cannot be told from rounding of the kernel matrix.
NOISE_FLOOR = {torch.float64: 1e-8, torch.float32: 1e-5}
_NOISE_CEILING = 1e5
# With one data set the tail of a process-wide scale is only weakly identified (spec/gp_scale_mixture 10).
_TAIL_RANGE = (0.5, 1e3)
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
) -> Learned:
    """Maximise the marginal likelihood over what the model may learn, in place.

    A prior with a free scale parameter has the optimum of the Gaussian process with free outputscale in kernel,
    noise and mean, so one search settles them: after some iterations that see the scale, with scale and mean
    profiled out. What else is free (further parameters of the prior, or a prior whose scale is fixed) is searched
    from there jointly: from a default start such a search can end in a noise-only optimum hundreds of nats lower.
    ``ranges`` narrows the range of some parameters of the kernel, by name.
    """
    if not _varies(model, y):
        # Residuals that are exactly zero have their best scale at zero: there is nothing to learn from.
        return Learned(None, True, 0)
    kernel = [(n, p) for n, p in model.kernel.named_parameters() if p.requires_grad]
    parameters = [p for _, p in kernel]
    bounds: list[Any] = [
        bounds_around(p, (ranges or {}).get(n, KERNEL_RANGE)) if is_log(n) else None for n, p in kernel
    ]
    if model.log_noise.requires_grad:
        parameters.append(model.log_noise)
        bounds.append(bounds_around(model.log_noise, (NOISE_FLOOR[X.dtype], _NOISE_CEILING)))

    result: Result[float] | None = None
    iterations = 0
    if parameters:
        result = approach(model, X, y, search, [p for _, p in kernel], bounds, callback, verbose)
        iterations = 0 if result is None else result.convergence.iterations
    if parameters and (result is None or result.status is not Status.STOPPED):

        def profiled(how: LBFGS) -> Result[float]:
            return how(
                lambda: model.profile_loss(X, y),
                parameters,
                bounds,
                generator=generator,
                callback=callback,
                verbose=verbose,
                eps=lambda: _rounding(model, X),
            )

        result, more = search_twice(profiled, search)
        iterations += more
    _fit_mean_and_scale(model, X, y)

    scale = f"log_{model.scale_prior.scale_name}" if model.scale_prior.has_scale else None
    prior = [(n, p) for n, p in model.scale_prior.named_parameters() if p.requires_grad]
    extra = [(n, p) for n, p in prior if n != scale]
    if (scale is None or extra) and (result is None or result.status != "stopped"):
        parameters += [p for _, p in prior]
        bounds += [bounds_around(p, _TAIL_RANGE) if n == "log_a" else None for n, p in prior]
        if model.constant_mean is not None and model.constant_mean.requires_grad:
            parameters.append(model.constant_mean)
            bounds.append(None)
        if parameters:
            result = LBFGS(search.max_iter, search.tol, search.memory)(
                lambda: -model.log_marginal_likelihood(X, y),
                parameters,
                bounds,
                callback=callback,
                verbose=verbose,
                eps=lambda: _rounding(model, X),
            )
            iterations += result.convergence.iterations
    return Learned(result, result is None or result.ok, iterations)


@torch.no_grad()
def start_period(model: ScaleMixtureGP, X: Tensor, y: Tensor) -> dict[str, tuple[float, float]]:
    """Set the period of a periodic kernel to the best of a grid in frequency, in place; return the range around it.

    The likelihood has about one maximum each half of a cycle over the range of the points, so a search finds only
    the nearest. The grid has that spacing and goes from half a cycle to twenty; on more than 500 rows it is
    evaluated on 500 of them. The range goes to the two neighbours: one long step would leave the maximum.
    """
    rows = torch.linspace(0, len(X) - 1, min(len(X), _ROWS_OF_PERIODS), device=X.device).round().long()
    X, y = X[rows], y[rows]
    if not _varies(model, y):
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


@torch.no_grad()
def _rounding(model: ScaleMixtureGP, X: Tensor) -> float:
    """Relative rounding of the losses at the current hyperparameters, up to a factor.

    Rounding of the matrix by eps times its diagonal changes log det and the quadratic form by that times the trace
    of the inverse.
    """
    eps = torch.finfo(X.dtype).eps
    matrix = model.kernel(X, X).detach().clone()
    matrix.diagonal().add_(model.noise.to(matrix))
    factor = safe_cholesky(matrix)
    if not factor.ok:
        return eps
    inverse = torch.cholesky_inverse(factor.value).diagonal().mean()
    amplified = eps * float(matrix.diagonal().mean() * inverse)
    return min(amplified, 1.0) if amplified > eps else eps


def _varies(model: ScaleMixtureGP, y: Tensor) -> bool:
    centred = y - y.mean(0) if model.constant_mean is not None else y
    rounding = 10 * torch.finfo(y.dtype).eps * y.abs().max().clamp(min=1.0)
    return bool(centred.abs().max() > rounding)
