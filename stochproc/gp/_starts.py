"""Several starts of a search for hyperparameters: how many, where they begin, and which one is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stochproc.gp._arch_kernel import NetworkKernel
from stochproc.solvers import Result, Status

__all__ = ["best_of_starts", "n_starts_of"]

# Starts of a search on few rows, unless a number is asked for.
_MOST_STARTS = 10
_MOST_STARTS_OF_NETWORKS = 3
# All starts together cost at most about one search on this many rows.
_ROWS = 1000
# How far from the first start the best optimum is moved from, in logarithms.
_REACH = 2.5
# Shares of the scale between which later starts draw the noise.
_NOISE_STARTS = (1e-3, 1.0)


def n_starts_of(estimator: Any, n_rows: int, kernel: torch.nn.Module) -> int:
    """Return how many starts ``n_restarts`` asks for; an ``LBFGS`` object makes its own.

    "auto" takes up to ten, on at most some 460 rows, and one from 800. Likelihoods of few data have several optima
    (yacht, 277 rows of six columns: some five within 20 nats of the best), and there a start costs some tenths of a
    second. Time grows with the cube of the rows. A network takes three at most, as its kernel costs several times as
    much an evaluation.
    """
    if estimator.optimizer != "lbfgs":
        return 1
    if estimator.n_restarts == "auto":
        most = _MOST_STARTS_OF_NETWORKS if isinstance(kernel, NetworkKernel) else _MOST_STARTS
        return max(1, min(most, int((_ROWS / n_rows) ** 3)))
    return int(estimator.n_restarts)


def best_of_starts(
    run: Callable[[], tuple[Result[float], int]],
    variables: Sequence[Tensor],
    bounds: Sequence[Any],
    noise: Tensor,
    n_starts: int,
    generator: torch.Generator,
) -> tuple[Result[float], int]:
    """Search from several points and leave the variables at the lowest loss; return its result, and all iterations.

    ``run`` searches from the current values of ``variables``. The first start is where they are. Of the later ones
    every other moves each of them by a standard normal (logarithms: a factor of e up or down), and the noise to
    anywhere between 1e-3 and 1; wider draws mostly end where the kernel matrix is the identity or of rank one. The rest
    move the best optimum so far in the same way and keep its noise, as good optima often differ in few columns: on the
    three hardest of five splits of yacht, four seeds each, ten starts so mixed found the best known optimum 7 times of
    12, ten fresh ones 4 times. An interruption after the first start leaves the best of the finished ones.
    """
    first = [v.detach().clone() for v in variables]
    best: Result[float] | None = None
    kept: list[Tensor] = []
    ends: list[Any] = []
    chosen, iterations = 0, 0
    try:
        for i in range(n_starts):
            if i % 2:
                _draw(variables, first, bounds, noise, generator)
            elif i:
                # Not from where a column has been switched off: from there nothing switches it on again.
                near = [v.clamp(start - _REACH, start + _REACH) for v, start in zip(kept, first, strict=True)]
                _draw(variables, near, bounds, None, generator, fixed=noise)
            result, more = run()
            iterations += more
            ends += result.stats.get("starts", [])
            if best is None or result.value < best.value:
                best, chosen, kept = result, i, [v.detach().clone() for v in variables]
            if result.status is Status.STOPPED:
                break
    finally:
        with torch.no_grad():
            for v, value in zip(variables, kept, strict=False):
                v.copy_(value)
    if best is None:
        raise ValueError(f"n_starts must be at least 1; got {n_starts}.")
    if n_starts > 1:
        if result.status is Status.STOPPED:
            # Why the search ended is said by the start that was stopped, not by the best one.
            why = replace(best.convergence, message=result.convergence.message)
            best = replace(best, status=Status.STOPPED, convergence=why)
        best = replace(best, stats=best.stats | {"starts": ends, "best_start": chosen})
    return best, iterations


@torch.no_grad()
def _draw(
    variables: Sequence[Tensor],
    centres: list[Tensor],
    bounds: Sequence[Any],
    noise: Tensor | None,
    generator: torch.Generator,
    fixed: Tensor | None = None,
) -> None:
    """Put the variables at a new start, inside their bounds; ``fixed`` goes to its centre."""
    for v, centre, limits in zip(variables, centres, bounds, strict=True):
        # Drawn on the CPU, so that a start does not depend on the device.
        if v is fixed:
            value = centre
        elif v is noise:
            low, high = map(math.log, _NOISE_STARTS)
            value = (low + (high - low) * torch.rand(v.shape, generator=generator, dtype=torch.float64)).to(v)
        else:
            value = centre + torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v)
        if limits is not None:
            value = value.clamp(*(torch.as_tensor(end).to(v) for end in limits))
        v.copy_(value)
