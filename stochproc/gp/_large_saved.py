"""Posteriors by conjugate gradients in files: the solution is kept, so that loading solves nothing."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from stochproc.gp._large_posterior import LargePosterior
from stochproc.gp._scale_posterior import scale_posterior

__all__ = ["restored", "saved"]

_NUMBERS = ("log_marginal_likelihood", "log_marginal_likelihood_stderr", "converged", "residual")


def saved(posterior: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a file keeps of a posterior beside data and hyperparameters."""
    if not isinstance(posterior, LargePosterior):
        return {}, {}
    return {"alpha": posterior.alpha, "quad": posterior.scale.quad}, {
        "large": [getattr(posterior, name) for name in _NUMBERS]
    }


def restored(
    model: Any, X: Tensor, y: Tensor, tensors: dict[str, Tensor], state: dict[str, Any]
) -> LargePosterior | None:
    """Return the posterior that ``saved`` described, of a model with its hyperparameters, or None."""
    if "large" not in state:
        return None
    quad, constant = tensors["quad"].double(), model.constant_mean
    return LargePosterior(
        kernel=copy.deepcopy(model.kernel).requires_grad_(False),
        X=X.clone(),
        alpha=tensors["alpha"].double(),
        constant=X.new_zeros(model.n_outputs) if constant is None else constant.detach().clone().to(X),
        noise=model.noise.detach().to(X),
        scale=scale_posterior(model.scale_prior, y.numel(), quad),
        scale_prior=copy.deepcopy(model.scale_prior),
        single_output=y.ndim == 1,
        solver=model.solver,
        **dict(zip(_NUMBERS, state["large"], strict=True)),
    )
