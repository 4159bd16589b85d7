"""Where searches start: the best lengthscale of a grid or period of a few, and later the best of random draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Polynomial

from stochproc.kernels import Periodic, Radial, Scale
from stochproc.tensor._state_space_model import Series, TimeSeries

__all__ = ["draw_start", "start_named"]

# Lengthscales between two gaps and the whole range; periods at the peaks of a periodogram and twice and thrice those,
# since a harmonic may be stronger than the period itself. Each is evaluated on at most so many rows.
_N_LENGTHSCALES = 10
_N_PEAKS = 5
_ROWS_OF_LENGTHSCALES, _ROWS_OF_PERIODS = 2_000, 400
# A later start is the likeliest of so many draws.
_N_DRAWS = 30


@torch.no_grad()
def start_named(model: TimeSeries, data: Series) -> dict[str, tuple[float, float]]:
    """Set the lengthscale or period of a named kernel to the best of a grid; return ranges by name.

    The likelihood has one maximum where the function explains the data and others where it is all noise or all
    trend, decades of lengthscale away; a search finds the nearest.
    """
    base: Any = next(m for m in model.kernel.modules() if not isinstance(m, Scale))
    width, gap = _width_and_gap(data)
    if not isinstance(base, Radial) or width == 0:
        return {}
    periodic = base if isinstance(base, Periodic) else None
    part = _some_rows(data, _ROWS_OF_PERIODS if periodic is not None else _ROWS_OF_LENGTHSCALES)

    def loss_at(name: str, value: float) -> float:
        setattr(base, name, value)
        try:
            return model.losses(*part).sum().item()
        except FloatingPointError:
            return math.inf

    if periodic is not None:
        losses = {period: loss_at("period", period) for period in _candidate_periods(part, width, gap)}
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


@torch.no_grad()
def draw_start(model: TimeSeries, data: Series, generator: torch.Generator) -> None:
    """Draw hyperparameters over what the data can tell, and keep the likeliest of some draws.

    Lengthscales lie between two gaps and twice the range, variances between a thousandth and thrice that of the data,
    periods at peaks of the periodogram without the trend or, half of the time, where they were. The likelihood of a
    sum of kernels has many maxima, most of them far below the best; ranges of ten decades would miss it.
    """
    width, gap = _width_and_gap(data)
    if width == 0:
        return
    part = _some_rows(data, _ROWS_OF_PERIODS)
    learned = [(path, p) for path, p in model.named_parameters() if p.requires_grad]
    periods = _candidate_periods(part, width, gap, degree=3) if any("log_period" in path for path, _ in learned) else []
    variance = part.y.sub(part.y.nanmean(-1, keepdim=True)).square().nanmean().item()
    ranges = {
        "log_lengthscale": (2 * gap, 2 * width),
        "log_outputscale": (1e-3 * variance, 3 * variance),
        "log_noise": (1e-4 * variance, 0.5 * variance),
        "log_variance": (1e-3 * variance / width**2, 10 * variance / width**2),
        "log_bias": (1e-3 * variance, 10 * variance),
    }
    first = [p.clone() for _, p in learned]
    least, best = math.inf, first
    for _ in range(_N_DRAWS):
        uniform = torch.rand(len(learned), 2, dtype=torch.float64, generator=generator).tolist()
        for (path, p), value, (u, v) in zip(learned, first, uniform, strict=True):
            owner, _, name = path.rpartition(".")
            low, high = ranges.get(name, (1.0, 1.0))
            if name == "log_lengthscale" and isinstance(model.get_submodule(owner), Periodic):
                low, high = 0.5, 5.0
            if name == "log_period" and v < 0.5:
                p.fill_(math.log(periods[int(u * len(periods))]))
            elif name in ranges:
                p.fill_((1 - u) * math.log(low) + u * math.log(high))
            else:
                p.copy_(value)
        try:
            loss = model.losses(*part).sum().item()
        except FloatingPointError:
            continue
        if loss < least:
            least, best = loss, [p.clone() for _, p in learned]
    for (_, p), value in zip(learned, best, strict=True):
        p.copy_(value)


def _width_and_gap(data: Series) -> tuple[float, float]:
    """Range of the times, and the median of what lies between two that differ."""
    gaps = data.times.diff()
    gaps = gaps[gaps > 0]
    return (data.times[-1] - data.times[0]).item(), gaps.median().item() if len(gaps) else 0.0


def _some_rows(data: Series, n: int) -> Series:
    """Return observed rows, at random where there are more than n: every k-th would alias short periods."""
    rows = data.observed_rows()
    if len(rows) > n:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:n]
        rows = rows[chosen.to(rows.device)].sort().values
    return data.take(rows)


def _candidate_periods(part: Series, width: float, gap: float, degree: int = 0) -> list[float]:
    """Return periods at peaks of the periodogram, their doubles and triples, and those of a few cycles.

    A polynomial of this degree is taken off the data first.
    """
    from scipy.signal import find_peaks, lombscargle

    # A quarter of the resolution apart, up to the highest frequency that the median gap can show.
    frequencies = np.arange(0.5 / width, max(0.5 / gap, 2 / width), 0.25 / width)[:50_000]
    t, outputs = (part.times - part.times[0]).cpu().numpy(), part.y.reshape(-1, len(part.times)).cpu().numpy()
    power = np.zeros_like(frequencies)
    for y in outputs:
        seen = ~np.isnan(y)
        if seen.sum() <= degree:
            continue
        values = y[seen] - Polynomial.fit(t[seen], y[seen], degree)(t[seen]) if degree else y[seen] - y[seen].mean()
        if np.any(values):
            power += lombscargle(t[seen], values, 2 * np.pi * frequencies) / np.square(values).sum()
    peaks, _ = find_peaks(np.concatenate([[0.0], power, [0.0]]))
    peaks = peaks[np.argsort(power[peaks - 1])[::-1][:_N_PEAKS]] - 1
    found = [multiple / frequencies[k] for k in peaks for multiple in (1, 2, 3)]
    return [float(p) for p in (*found, width / 2, width, 2 * width) if p <= 2 * width]
