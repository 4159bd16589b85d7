"""Learning of hyperparameters where the noise is outside the scale, from the optimum of the Gaussian process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stochproc._search import KERNEL_RANGE, Learned, bounds_around, is_log, search_twice
from stochproc.gp._exact import ScaleMixtureGP
from stochproc.gp._hyperparameters import NOISE_CEILING, NOISE_FLOOR, free_mean, learn
from stochproc.gp._independent import IndependentNoiseGP
from stochproc.gp._prior_bounds import free_numbers
from stochproc.gp._scale_fit import fit_scale
from stochproc.gp._scale_priors import Delta
from stochproc.solvers import LBFGS, Status

__all__ = ["learn_independent", "scaled_start"]

# Range of the prior's scale parameter around the one that the Gaussian process implies. Towards a scale of zero, where
# all is noise, the likelihood has no slope to stop a search.
_SCALE_RANGE = (1e-6, 1e6)
# Shares of the scale between which a search starts the noise. It is given in squared units of y, so that a default can
# be any share, and from 1e-7 of the scale a search ended 36 nats below the optimum.
_NOISE_STARTS = (1e-3, 1e2)


def scaled_twin(model: IndependentNoiseGP, y: Tensor) -> ScaleMixtureGP:
    """Return a model with the noise inside the scale and the same kernel, from which a search starts.

    Without noise, and under ``Delta``, both models are one and share the prior too. A share of noise far from any that
    can be told from data is not where a search starts.
    """
    prior, noise = model.scale_prior, model.noise.item()
    if noise > 0 and prior._conjugate != "point":
        residual = y - y.mean(0) if model.constant_mean is not None else y
        prior = Delta(float(residual.detach().to(torch.float64).square().mean()) or 1.0)
    twin = ScaleMixtureGP(
        model.kernel,
        prior,
        noise=min(max(noise / prior.mean, _NOISE_STARTS[0]), _NOISE_STARTS[1]) if noise > 0 else 0.0,
        mean="zero" if model.constant_mean is None else "constant",
        n_outputs=model.n_outputs,
    )
    return twin.to(model.log_noise.device)


def scaled_start(model: ScaleMixtureGP | IndependentNoiseGP, y: Tensor) -> ScaleMixtureGP:
    """Return the model that a search starts with: the twin, or a model with the noise inside the scale itself."""
    return scaled_twin(model, y) if isinstance(model, IndependentNoiseGP) else model


def learn_independent(
    model: IndependentNoiseGP,
    X: Tensor,
    y: Tensor,
    search: LBFGS,
    generator: torch.Generator,
    callback: Callable[[Any], Any] | None,
    verbose: int,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    n_starts: int = 1,
) -> Learned:
    """Maximise the marginal likelihood over what the model may learn, in place; arguments are those of ``learn``.

    Kernel, noise and mean are searched for the Gaussian process with free outputscale first, by Cholesky factors.
    From there all hyperparameters, the scale parameter of the prior among them, are searched jointly: no scale can be
    profiled out where the noise is not in it.
    """
    twin = scaled_twin(model, y)
    try:
        learned = learn(twin, X, y, search, generator, callback, verbose, ranges, n_starts)
    except KeyboardInterrupt:
        _take_over(model, twin, y)
        raise
    if learned.result is None:
        return learned
    _take_over(model, twin, y)
    if twin.scale_prior is model.scale_prior or learned.result.status is Status.STOPPED:
        return learned

    parameters, bounds = _variables(model, X, twin, ranges or {})
    with free_mean(model, y) as (shift, shifted):
        result, iterations = search_twice(
            lambda how: how(
                lambda: -model.log_marginal_likelihood(X, shifted()),
                parameters + shift,
                bounds + [None] * len(shift),
                callback=callback,
                verbose=verbose,
                eps=lambda: twin.rounding(X),
            ),
            LBFGS(search.max_iter, search.tol, search.memory),
        )
    return Learned(result, result.ok, learned.n_iter + iterations)


@torch.no_grad()
def _take_over(model: IndependentNoiseGP, twin: ScaleMixtureGP, y: Tensor) -> None:
    """Give the model the mean of its twin and, in absolute terms, the noise and the scale."""
    if model.constant_mean is not None and twin.constant_mean is not None:
        model.constant_mean.copy_(twin.constant_mean)
    if twin.noise.item() == 0:
        return
    model.log_noise.copy_(twin.log_noise + math.log(twin.scale_prior.mean))
    if twin.scale_prior is not model.scale_prior and model.scale_prior.has_scale:
        fit_scale(model.scale_prior, y.numel(), y.new_tensor(y.numel() * twin.scale_prior.mean, dtype=torch.float64))


def _variables(
    model: IndependentNoiseGP, X: Tensor, twin: ScaleMixtureGP, ranges: Mapping[str, tuple[float, float]]
) -> tuple[list[Tensor], list[Any]]:
    """Return what the joint search moves beside the mean, and within which bounds."""
    prior, scale = model.scale_prior, twin.scale_prior.mean
    named = [(n, p) for n, p in model.kernel.named_parameters() if p.requires_grad]
    parameters: list[Tensor] = [p for _, p in named]
    bounds: list[Any] = [bounds_around(p, ranges.get(n, KERNEL_RANGE)) if is_log(n) else None for n, p in named]
    if model.log_noise.requires_grad:
        parameters.append(model.log_noise)
        bounds.append(bounds_around(model.log_noise, (NOISE_FLOOR[X.dtype] * scale, NOISE_CEILING * scale)))
    for name, p, limits in free_numbers(prior):
        parameters.append(p)
        if prior.has_scale and name in (f"log_{prior.scale_name}", prior.scale_name) and is_log(name):
            width = [prior.scale_power * math.log(end) for end in _SCALE_RANGE]
            bounds.append((p.detach() + min(width), p.detach() + max(width)))
        else:
            bounds.append(limits)
    return parameters, bounds
