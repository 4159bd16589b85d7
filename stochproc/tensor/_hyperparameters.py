"""A few steps towards better hyperparameters of a mode, with its messages held fixed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stochproc.exceptions import SolverError
from stochproc.solvers import LBFGS
from stochproc.tensor._priors import FunctionPrior, Posterior

__all__ = ["improve"]

# Evaluations of the evidence in one call, each as dear as a smoother.
MAX_EVALUATIONS = 4
# A step that promises less, in nats, is not taken.
WORTH_A_STEP = 0.02
# Longest step in the logarithm: a lengthscale that starts at half the range may have to come down a hundredfold, and
# short steps leave the other modes fitting with a wrong one meanwhile.
MAX_STEP = 3.0


class _Trial(NamedTuple):
    at: float
    value: float
    slope: float
    posterior: Posterior


def improve(prior: FunctionPrior, points: Tensor, Lam: Tensor, eta: Tensor, curvature: list[float]) -> Posterior:
    """Raise log Z + log prior in the hyperparameters by a few evaluations; return the posterior at the best.

    The objective never falls. A single hyperparameter is searched by a safeguarded secant, whose curvature is kept in
    ``curvature`` between calls; more than one by three iterations of L-BFGS.
    """
    parameters = prior.learned()
    if sum(p.numel() for p in parameters.values()) == 1:
        (name, parameter) = next(iter(parameters.items()))
        return _secant(prior, points, Lam, eta, name, parameter, curvature)
    bounds = [
        (
            torch.full_like(p, prior.bounds(name)[0]).minimum(p.detach()),
            torch.full_like(p, prior.bounds(name)[1]).maximum(p.detach()),
        )
        for name, p in parameters.items()
    ]

    def loss() -> Tensor:
        try:
            return -(prior.posterior(points, Lam, eta).log_z + prior.log_prior())
        except SolverError as error:
            raise FloatingPointError(str(error)) from error

    # The best point stays in the parameters however the search ends.
    LBFGS(max_iter=3)(loss, list(parameters.values()), bounds)
    with torch.no_grad():
        return prior.posterior(points, Lam, eta)


def _secant(
    prior: FunctionPrior, points: Tensor, Lam: Tensor, eta: Tensor, name: str, parameter: Tensor, curvature: list[float]
) -> Posterior:
    low, high = prior.bounds(name)
    start = parameter.item()
    low, high = min(low, start), max(high, start)

    def evaluate(at: float) -> _Trial | None:
        with torch.no_grad():
            parameter.fill_(at)
        try:
            with torch.enable_grad():
                found = prior.posterior(points, Lam, eta)
                objective = found.log_z + prior.log_prior()
                (gradient,) = torch.autograd.grad(objective, parameter)
        except SolverError:
            return None
        found = found._replace(log_z=found.log_z.detach())
        value, slope = objective.item(), gradient.sum().item()
        return _Trial(at, value, slope, found) if math.isfinite(value) and math.isfinite(slope) else None

    best = evaluate(start)
    if best is None:
        # Nothing to compare with: smooth at the present value, which says what is wrong.
        with torch.no_grad():
            parameter.fill_(start)
            return prior.posterior(points, Lam, eta)
    bend = curvature[0] if curvature else max(1.0, abs(best.slope) / 0.3)
    for _ in range(MAX_EVALUATIONS - 1):
        step = max(-MAX_STEP, min(MAX_STEP, best.slope / bend))
        at = max(low, min(high, best.at + step))
        if abs(best.slope * (at - best.at)) < 2 * WORTH_A_STEP:
            break
        trial = evaluate(at)
        if trial is None:
            bend *= 4
            continue
        measured = -(trial.slope - best.slope) / (trial.at - best.at)
        if trial.value >= best.value:
            # Where the objective is convex between the two, the step was too short: go on further.
            bend = measured if measured > 0 else bend / 4
            best = trial
        else:
            bend = max(measured, 2 * bend)
    curvature[:] = [max(bend, 1e-3)]
    with torch.no_grad():
        parameter.fill_(best.at)
    return best.posterior
