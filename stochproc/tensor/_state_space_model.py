"""A Gaussian process in time with noise: its likelihood in O(n), and the search for its hyperparameters."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc._search import KERNEL_RANGE, Learned, bounds_around, is_log, search_twice
from stochproc.exceptions import DataWarning, SolverError
from stochproc.kernels import KERNEL_NAMES, Kernel, Periodic, Radial, Scale, as_kernel
from stochproc.solvers import LBFGS, Result, kalman_smoother, messages

__all__ = ["TimeSeries", "learn", "make_kernel", "warn_if_times_are_coarse"]

# Below this share of the variance of y the noise cannot be told from rounding.
_NOISE_RANGE = (1e-8, 1e5)
# Harmonics of the periodic kernel.
_HARMONICS = 7
# Starts of a search with a kernel given by its name: lengthscales between two gaps and the whole range; periods at the
# peaks of a periodogram and twice and thrice those, since a harmonic may be stronger than the period itself. Each is
# evaluated on at most so many rows.
_N_LENGTHSCALES = 10
_N_PEAKS = 5
_ROWS_OF_LENGTHSCALES, _ROWS_OF_PERIODS = 2_000, 400
# Below, the series of order 7 leaves out more than 5e-4 of the variance of the periodic kernel.
_PERIODIC_LENGTHSCALES = (0.5, KERNEL_RANGE[1])


def _named_kernels() -> list[str]:
    """Names of kernels that have a state space."""
    return [name for name in KERNEL_NAMES if _has_state_space(as_kernel(name, n_columns=1))]


def _has_state_space(kernel: Kernel) -> bool:
    try:
        kernel.state_space()
    except NotImplementedError:
        return False
    return True


def make_kernel(kernel: Any) -> Kernel:
    """Return a copy of the kernel that a parameter describes, in float64; a named one with an outputscale.

    Raises
    ------
    TypeError
        If it describes none.
    ValueError
        If its name is unknown, it has no state space, or its hyperparameters are a batch.
    """
    named = isinstance(kernel, str)
    made = as_kernel(kernel if named else copy.deepcopy(kernel), n_columns=1)
    batches: list[Any] = [getattr(m, "batch_shape", ()) for m in made.modules()]
    if any(batches):
        batch = tuple(next(filter(None, batches)))
        raise ValueError(f"kernel must be a single one, without batch_shape; got a batch of shape {batch}.")
    try:
        made.state_space()
    except NotImplementedError as error:
        raise ValueError(
            f"kernel must have a state space, such as {', '.join(map(repr, _named_kernels()))}, and sums and products "
            f"of such. GPyTorch's kernels and functions have none. Got: {error}"
        ) from None
    return (Scale(made) if named else made).double()


class TimeSeries(torch.nn.Module):
    """A Gaussian process in time, a constant mean, and independent noise of learned plus known variances.

    Parameters
    ----------
    kernel : Kernel
        With a state space; not copied.
    noise : float
        Variance of the learned part of the noise, non-negative; 0 is kept at 0.
    mean : {"constant", "zero"}
    method : {"auto", "scan", "sequential"}
        See ``kalman_smoother``.
    """

    def __init__(self, kernel: Kernel, noise: float, mean: str, method: str) -> None:
        super().__init__()
        self.kernel = kernel
        start = torch.tensor(float(noise), dtype=torch.float64).log()
        self.log_noise = torch.nn.Parameter(start, requires_grad=noise > 0)
        zero = torch.zeros((), dtype=torch.float64)
        self.constant_mean = torch.nn.Parameter(zero) if mean == "constant" else None
        self.method = method

    @property
    def noise(self) -> Tensor:
        """Variance of the learned part of the noise."""
        return self.log_noise.exp()

    def smooth(self, times: Tensor, y: Tensor, known: Tensor, query: Tensor | None = None) -> tuple[Any, Tensor]:
        """Smooth sorted data, and return what ``kalman_smoother`` gives with log p(y), which has gradients.

        Parameters
        ----------
        times : Tensor of shape (n,)
            In non-decreasing order.
        y : Tensor of shape (n,) or (*batch, n)
            NaN where nothing was observed.
        known : Tensor of shape (n,)
            Known part of the noise variances.
        query : Tensor of shape (m,), default=None
            Times to give the process at instead, in any order.

        Raises
        ------
        SolverError
            If the recursion met non-finite values; L-BFGS backs off from it.
        """
        # Written around the data, log p(y) of very precise data keeps its digits.
        precision, shift, constant = messages(y, self.noise + known, around_data=True)
        result = kalman_smoother(
            self.kernel.state_space(),
            times,
            precision,
            shift,
            query=query,
            mean=0.0 if self.constant_mean is None else self.constant_mean,
            offset=y.nan_to_num().unsqueeze(-1),
            method=self.method,
        )
        smoothed = result.unwrap()
        return smoothed, smoothed.log_z + constant

    def rounding(self, times: Tensor) -> float:
        """Relative rounding that a loss of ordinary curvature would need to hide as large a gradient as this one.

        The curvature in the logarithm of a period grows with the square of the phase that the highest harmonic gathers
        over the data: its last digits decide the gradient, and no step improves it further.
        """
        width = (times[-1] - times[0]).item()
        phases = [
            2 * math.pi * _HARMONICS * width / m.period.item()
            for m in self.kernel.modules()
            if isinstance(m, Periodic) and m.log_period.requires_grad
        ]
        return min(torch.finfo(times.dtype).eps * max([1.0, *phases]) ** 2, 1e-4)

    def loss(self, times: Tensor, y: Tensor, known: Tensor) -> Tensor:
        """Return -log p(y), for a search."""
        try:
            return -self.smooth(times, y, known)[1]
        except SolverError as error:
            raise FloatingPointError(str(error)) from error


def learn(
    model: TimeSeries,
    times: Tensor,
    y: Tensor,
    known: Tensor,
    search: LBFGS,
    *,
    named: bool,
    generator: torch.Generator,
    callback: Callable[[Any], Any] | None,
    verbose: int,
) -> Learned:
    """Maximise the marginal likelihood in place; a named kernel starts from the best of a grid."""
    seen = y[~y.isnan()]
    if bool((seen == seen[0]).all()):
        # A process of variance zero explains equal values best: there is nothing to learn from.
        return Learned(None, True, 0)
    # Variances are searched relative to that of the data, which is 1 only where they were standardised.
    variance = seen.var(correction=0).item()
    ranges = {"log_outputscale": _times(variance, KERNEL_RANGE)}
    if named:
        next(m for m in model.kernel.modules() if isinstance(m, Scale)).outputscale = variance
        ranges |= _start(model, times, y, known)
    kernel = [(n, p) for n, p in model.kernel.named_parameters() if p.requires_grad]
    parameters = [p for _, p in kernel]
    bounds: list[Any] = [bounds_around(p, _range(model.kernel, n, ranges)) if is_log(n) else None for n, p in kernel]
    if model.log_noise.requires_grad:
        parameters.append(model.log_noise)
        bounds.append(bounds_around(model.log_noise, _times(variance, _NOISE_RANGE)))
    if model.constant_mean is not None:
        with torch.no_grad():
            model.constant_mean.fill_(seen.mean())
        parameters.append(model.constant_mean)
        bounds.append(None)
    if not parameters:
        return Learned(None, True, 0)

    def run(how: LBFGS) -> Result[float]:
        return how(
            lambda: model.loss(times, y, known),
            parameters,
            bounds,
            generator=generator,
            callback=callback,
            verbose=verbose,
            eps=lambda: model.rounding(times),
        )

    result, iterations = search_twice(run, search)
    return Learned(result, result.ok, iterations)


def _times(factor: float, pair: tuple[float, float]) -> tuple[float, float]:
    return factor * pair[0], factor * pair[1]


def _range(kernel: Kernel, path: str, ranges: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Return the range that a positive hyperparameter of the kernel is searched in."""
    owner, _, name = path.rpartition(".")
    if name == "log_lengthscale" and isinstance(kernel.get_submodule(owner), Periodic):
        return _PERIODIC_LENGTHSCALES
    return ranges.get(name, KERNEL_RANGE)


@torch.no_grad()
def _start(model: TimeSeries, times: Tensor, y: Tensor, known: Tensor) -> dict[str, tuple[float, float]]:
    """Set the lengthscale or period of a named kernel to the best of a grid; return ranges by name.

    The likelihood has one maximum where the function explains the data and others where it is all noise or all
    trend, decades of lengthscale away; a search finds the nearest.
    """
    base: Any = next(m for m in model.kernel.modules() if not isinstance(m, Scale))
    width = (times[-1] - times[0]).item()
    gaps = times.diff()
    gaps = gaps[gaps > 0]
    if not isinstance(base, Radial) or width == 0:
        return {}
    periodic = base if isinstance(base, Periodic) else None
    part = _some_rows(times, y, known, _ROWS_OF_PERIODS if periodic is not None else _ROWS_OF_LENGTHSCALES)

    def loss_at(name: str, value: float) -> float:
        setattr(base, name, value)
        try:
            return model.loss(*part).item()
        except FloatingPointError:
            return math.inf

    gap = gaps.median().item()
    if periodic is not None:
        periods = _candidate_periods(part[0], part[1], width, gap)
        losses = {period: loss_at("period", period) for period in periods}
        least = min(losses.values())
        # Multiples of a period explain the data as well, but for rounding and prior: the shortest within a nat.
        period = min(p for p, loss in losses.items() if loss <= least + 1)
        periodic.period = period  # type: ignore[assignment]
        # The likelihood has about one maximum each half of a cycle over the range: a long step would leave this one.
        frequency, step = 1 / period, 0.5 / width
        return {"log_period": (1 / (frequency + step), 1 / max(frequency - step, 0.25 / width))}
    scales = np.geomspace(2 * gap, width, _N_LENGTHSCALES).tolist()
    base.lengthscale = min(scales, key=lambda scale: loss_at("lengthscale", scale))
    return {"log_lengthscale": (gap / 3, 10 * width)}


def _some_rows(times: Tensor, y: Tensor, known: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return observed rows, at random where there are more than n: every k-th would alias short periods."""
    rows = (~y.isnan()).nonzero()[:, 0]
    if len(rows) > n:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:n]
        rows = rows[chosen.to(rows.device)].sort().values
    return times[rows], y[rows], known[rows]


def _candidate_periods(times: Tensor, y: Tensor, width: float, gap: float) -> list[float]:
    """Return periods at peaks of the periodogram, their doubles and triples, and those of a few cycles."""
    from scipy.signal import find_peaks, lombscargle

    # A quarter of the resolution apart, up to the highest frequency that the median gap can show.
    frequencies = np.arange(0.5 / width, max(0.5 / gap, 2 / width), 0.25 / width)[:50_000]
    t, values = (times - times[0]).cpu().numpy(), y.cpu().numpy()
    power = lombscargle(t, values - values.mean(), 2 * np.pi * frequencies)
    peaks, _ = find_peaks(np.concatenate([[0.0], power, [0.0]]))
    peaks = peaks[np.argsort(power[peaks - 1])[::-1][:_N_PEAKS]] - 1
    found = [multiple / frequencies[k] for k in peaks for multiple in (1, 2, 3)]
    return [float(p) for p in (*found, width / 2, width, 2 * width) if p <= 2 * width]


def warn_if_times_are_coarse(times: Tensor, stacklevel: int) -> None:
    """Warn where the times span so little of their size that their differences have few digits."""
    span, size = (times[-1] - times[0]).item(), times.abs().max().item()
    if 0 < span < 1e-12 * size:
        warnings.warn(
            f"X spans {span:.3g} at values of {size:.3g}: differences of times have few digits left. Subtract the "
            "first time before fitting.",
            DataWarning,
            stacklevel=stacklevel,
        )
