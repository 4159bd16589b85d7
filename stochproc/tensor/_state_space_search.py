"""The search for the hyperparameters of a process in time: its ranges, the rows that it sees, and several outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc._search import KERNEL_RANGE, Learned, bounds_around, is_log, search_twice
from stochproc.kernels import Kernel, Periodic, Scale
from stochproc.solvers import LBFGS, Result, Status
from stochproc.tensor._state_space_model import Series, TimeSeries, kernel_of_output
from stochproc.tensor._state_space_start import draw_start, start_named

__all__ = ["Search", "learn", "stretches"]

# Below this share of the variance of y the noise cannot be told from rounding.
_NOISE_RANGE = (1e-8, 1e5)
# Below, the series of order 7 leaves out more than 5e-4 of the variance of the periodic kernel.
_PERIODIC_LENGTHSCALES = (0.5, KERNEL_RANGE[1])
# Stretches of consecutive rows that a subset is made of: within them it sees short scales, between them long ones.
_STRETCHES = 64


class Search(NamedTuple):
    """How to search."""

    how: LBFGS
    named: bool
    """Whether the kernel was given by its name: then it starts from the best of a grid."""
    subset: int | None
    """Number of rows to learn from; None is all."""
    generator: torch.Generator
    callback: Callable[[Any], Any] | None
    verbose: int


def learn(model: TimeSeries, data: Series, search: Search) -> list[Learned]:
    """Maximise the marginal likelihood in place; one search, or one for each output that shares nothing.

    Outputs that share nothing are searched one after the other: one search for all would need steps as short as the
    most difficult of them does, and five to ten times as many.
    """
    if model.shared:
        return [_learn_one(model, data, search)]
    found: list[Learned] = []
    for k in range(len(data.y)):
        mean = "zero" if model.constant_mean is None else "constant"
        one = TimeSeries(kernel_of_output(model.kernel, k), 1.0, mean, model.method).to(data.y.device)
        one.log_noise.requires_grad_(model.log_noise.requires_grad)
        with torch.no_grad():
            for this, all_outputs in zip(one.parameters(), model.parameters(), strict=True):
                this.copy_(all_outputs[k])
        known = data.known if data.known.ndim == 1 else data.known[k]
        try:
            found.append(_learn_one(one, Series(data.times, data.y[k], known), search))
        finally:
            # An interrupted search has put its best point back.
            with torch.no_grad():
                for all_outputs, this in zip(model.parameters(), one.parameters(), strict=True):
                    all_outputs[k] = this
        result = found[-1].result
        if result is not None and result.status is Status.STOPPED:
            # Asked to stop by the callback: the others keep what they have.
            found += [Learned(result, False, 0)] * (len(data.y) - len(found))
            break
    return found


def _learn_one(model: TimeSeries, data: Series, search: Search) -> Learned:
    """Learn hyperparameters that all outputs of the data share.

    With a subset, those that explain it best; the constant mean is then set to its optimum for all rows.
    """
    everything = data
    if search.subset is not None and search.subset < len(data.observed_rows()):
        data = data.take(stretches(data.observed_rows(), search.subset))
    varies = data.varies()
    if not bool(varies.any()):
        # A process of variance zero explains equal values best: there is nothing to learn from.
        return Learned(None, True, 0)
    parameters, bounds = _prepare(model, data, varies, search.named)
    if not parameters:
        return Learned(None, True, 0)

    def run(how: LBFGS) -> Result[float]:
        return how(
            lambda: torch.where(varies, model.losses(*data), 0.0).sum(),
            parameters,
            bounds,
            generator=search.generator,
            callback=search.callback,
            verbose=search.verbose,
            eps=lambda: model.rounding(data.times),
        )

    result, iterations = _from_starts(run, model, data, search, parameters)
    if data is not everything:
        _fit_mean(model, everything)
    return Learned(result, result.ok, iterations)


def _from_starts(
    run: Callable[[LBFGS], Result[float]], model: TimeSeries, data: Series, search: Search, parameters: list[Tensor]
) -> tuple[Result[float], int]:
    """Search from where the parameters are, then from draws; leave them at the best, return its result."""
    once = replace(search.how, n_restarts=1)
    first = _values(parameters)
    result, iterations = search_twice(run, once)
    best, at, starts, chosen = result, _values(parameters), [*result.stats["starts"]], 0
    try:
        for i in range(1, search.how.n_restarts):
            if result.status is Status.STOPPED:
                break
            _put(parameters, first)
            draw_start(model, data, search.generator)
            result, more = search_twice(run, once)
            iterations, starts = iterations + more, [*starts, *result.stats["starts"]]
            if result.value < best.value:
                best, at, chosen = result, _values(parameters), i
    finally:
        _put(parameters, at)
    stats = best.stats | {"starts": starts, "best_start": chosen}
    stopped = result.status is Status.STOPPED
    return replace(best, stats=stats, status=result.status if stopped else best.status), iterations


def _values(parameters: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def _put(parameters: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def _prepare(model: TimeSeries, data: Series, varies: Tensor, named: bool) -> tuple[list[Tensor], list[Any]]:
    """Set where the search starts; return what it learns, and between which bounds."""
    centre = data.y.nanmean(-1)
    # Variances are searched relative to that of the data, which is 1 only where they were standardised.
    variance = (data.y - centre.unsqueeze(-1)).square().nanmean(-1)[varies].mean().item()
    ranges = {"log_outputscale": _times(variance, KERNEL_RANGE)}
    if named:
        next(m for m in model.kernel.modules() if isinstance(m, Scale)).outputscale = variance
        ranges |= start_named(model, data)
    kernel = [(n, p) for n, p in model.kernel.named_parameters() if p.requires_grad]
    parameters: list[Tensor] = [p for _, p in kernel]
    bounds: list[Any] = [bounds_around(p, _range(model.kernel, n, ranges)) if is_log(n) else None for n, p in kernel]
    if model.log_noise.requires_grad:
        parameters.append(model.log_noise)
        bounds.append(bounds_around(model.log_noise, _times(variance, _NOISE_RANGE)))
    if model.constant_mean is not None:
        with torch.no_grad():
            # A subset may hold nothing of an output.
            model.constant_mean.copy_(centre.nan_to_num())
        parameters.append(model.constant_mean)
        bounds.append(None)
    return parameters, bounds


def _times(factor: float, pair: tuple[float, float]) -> tuple[float, float]:
    return factor * pair[0], factor * pair[1]


def _range(kernel: Kernel, path: str, ranges: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Return the range that a positive hyperparameter of the kernel is searched in."""
    owner, _, name = path.rpartition(".")
    if name == "log_lengthscale" and isinstance(kernel.get_submodule(owner), Periodic):
        return _PERIODIC_LENGTHSCALES
    return ranges.get(name, KERNEL_RANGE)


def stretches(rows: Tensor, size: int) -> Tensor:
    """Choose ``size`` of the rows: stretches of neighbours, evenly over all, the first and the last row included."""
    n = min(_STRETCHES, size)
    lengths = torch.full((n,), size // n)
    lengths[: size % n] += 1
    left_out = len(rows) - size
    gaps = torch.arange(n) * left_out // max(1, n - 1)
    starts = lengths.cumsum(0) - lengths + gaps
    return rows[torch.cat([torch.arange(a, a + k) for a, k in zip(starts.tolist(), lengths.tolist(), strict=True)])]


def _fit_mean(model: TimeSeries, data: Series) -> None:
    """Set the constant mean to its optimum given all else: log p(y) is a parabola in it, two slopes find its top."""
    mean = model.constant_mean
    if mean is None:
        return
    model.requires_grad_(False)
    mean.requires_grad_(True)

    def slope() -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(model.losses(*data).sum(), mean)[0]

    before = slope()
    # A step of the size of the data, so that no digits are lost in the difference of two slopes.
    step = (data.y - data.y.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt()
    step = torch.where(step > 0, step, 1.0)
    with torch.no_grad():
        mean += step
        curvature = (slope() - before) / step
        mean -= step + before / curvature
