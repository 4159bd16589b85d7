"""Learning of hyperparameters by maximal marginal likelihood: first without the scale, then what is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc.gp._exact import ScaleMixtureGP
from stochproc.solvers import LBFGS, Result

__all__ = ["NOISE_FLOOR", "Learned", "default_search", "learn"]

# Positive hyperparameters of the kernel are searched within these; a given value outside widens them.
_KERNEL_RANGE = (1e-5, 1e5)
# Below these shares of the signal the noise cannot be told from rounding of the kernel matrix.
NOISE_FLOOR = {torch.float64: 1e-8, torch.float32: 1e-5}
_NOISE_CEILING = 1e5
# With one data set the tail of a process-wide scale is only weakly identified (spec/gp_scale_mixture 10).
_TAIL_RANGE = (0.5, 1e3)


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


def learn(
    model: ScaleMixtureGP,
    X: Tensor,
    y: Tensor,
    search: LBFGS,
    generator: torch.Generator,
    callback: Callable[[Any], Any] | None,
    verbose: int,
) -> Learned:
    """Maximise the marginal likelihood over what the model may learn, in place.

    A prior with a free scale parameter has the optimum of the Gaussian process with free outputscale in kernel,
    noise and mean, so one search with scale and mean profiled out settles them. What else is free (further
    parameters of the prior, or a prior whose scale is fixed) is searched from there jointly: from a default
    start such a search can end in a noise-only optimum hundreds of nats lower.
    """
    if not _varies(model, y):
        # Residuals that are exactly zero have their best scale at zero: there is nothing to learn from.
        return Learned(None, True, 0)
    kernel = [(n, p) for n, p in model.kernel.named_parameters() if p.requires_grad]
    parameters = [p for _, p in kernel]
    bounds: list[Any] = [_bounds(p, _KERNEL_RANGE) if _is_log(n) else None for n, p in kernel]
    if model.log_noise.requires_grad:
        parameters.append(model.log_noise)
        bounds.append(_bounds(model.log_noise, (NOISE_FLOOR[X.dtype], _NOISE_CEILING)))

    result: Result[float] | None = None
    iterations = 0
    if parameters:
        result = search(
            lambda: model.profile_loss(X, y),
            parameters,
            bounds,
            generator=generator,
            callback=callback,
            verbose=verbose,
        )
        iterations = result.convergence.iterations
    model.fit_mean_and_scale(X, y)

    scale = f"log_{model.scale_prior.scale_name}" if model.scale_prior.has_scale else None
    prior = [(n, p) for n, p in model.scale_prior.named_parameters() if p.requires_grad]
    extra = [(n, p) for n, p in prior if n != scale]
    if (scale is None or extra) and (result is None or result.status != "stopped"):
        parameters += [p for _, p in prior]
        bounds += [_bounds(p, _TAIL_RANGE) if n == "log_a" else None for n, p in prior]
        if model.constant_mean is not None and model.constant_mean.requires_grad:
            parameters.append(model.constant_mean)
            bounds.append(None)
        if parameters:
            result = LBFGS(search.max_iter, search.tol, search.memory)(
                lambda: -model.log_marginal_likelihood(X, y), parameters, bounds, callback=callback, verbose=verbose
            )
            iterations += result.convergence.iterations
    return Learned(result, result is None or result.ok, iterations)


def _varies(model: ScaleMixtureGP, y: Tensor) -> bool:
    centred = y - y.mean(0) if model.constant_mean is not None else y
    rounding = 10 * torch.finfo(y.dtype).eps * y.abs().max().clamp(min=1.0)
    return bool(centred.abs().max() > rounding)


def _is_log(name: str) -> bool:
    return name.rsplit(".", 1)[-1].startswith("log_")


def _bounds(parameter: Tensor, allowed: tuple[float, float]) -> tuple[Tensor, Tensor]:
    value = parameter.detach()
    return value.clamp(max=math.log(allowed[0])), value.clamp(min=math.log(allowed[1]))
