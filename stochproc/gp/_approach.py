"""The first iterations of a search for hyperparameters, in which the scale is still a variable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stochproc.gp._exact import ScaleMixtureGP
from stochproc.solvers import LBFGS, Result

__all__ = ["approach"]

# Easy searches converge within this many iterations, so that the one that follows has nothing left to do.
_ITERATIONS = 30
# Range of the scale, as a multiple of the mean square of y.
_SCALE_RANGE = (1e-5, 1e5)


def approach(
    model: ScaleMixtureGP,
    X: Tensor,
    y: Tensor,
    search: LBFGS,
    kernel: Sequence[Tensor],
    bounds: Sequence[Any],
    callback: Callable[[Any], Any] | None,
    verbose: int,
) -> Result[float] | None:
    """Move kernel and noise towards the optimum over them, the scale and the variance of the noise, in place.

    ``bounds`` are those of the parameters of the kernel and, if it is learned, of the noise. With the scale profiled
    out from the start the same search ended 9 times out of 20 in a worse optimum, up to 330 nats lower (splits of
    six real and synthetic data sets; benchmarks/bench_gp.py, table "search"): one long step takes a lengthscale to
    where the likelihood has no slope. None if the search is too short to share its iterations.
    """
    max_iter = min(_ITERATIONS, search.max_iter // 2)
    if not max_iter:
        return None
    residual = y - y.mean(0) if model.constant_mean is not None else y
    start = residual.detach().to(torch.float64).square().mean().log()
    log_scale = start.clone().requires_grad_()
    variables = [*kernel, log_scale]
    limits = [*bounds[: len(kernel)], tuple(start + math.log(end) for end in _SCALE_RANGE)]
    log_variance: Tensor | None = None
    if model.log_noise.requires_grad:
        log_variance = (model.log_noise.detach() + start).requires_grad_()
        variables.append(log_variance)
        limits.append(tuple(end + start for end in bounds[-1]))
    first = LBFGS(max_iter, search.tol, search.memory)
    try:
        return first(
            lambda: model.scaled_loss(X, y, log_scale, log_variance),
            variables,
            limits,
            callback=callback,
            verbose=verbose,
        )
    finally:
        # Also where it was interrupted: the best point stays with the model.
        if log_variance is not None:
            with torch.no_grad():
                model.log_noise.copy_((log_variance - log_scale).clamp(*bounds[-1]))
