"""Part of the demo: a weekly series of 44 years with gaps, smoothed and forecast by a state-space Gaussian process."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF as SklearnRBF
from sklearn.gaussian_process.kernels import ConstantKernel, ExpSineSquared, RationalQuadratic, WhiteKernel
from sklearn.linear_model import BayesianRidge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from stochproc.datasets import load_co2
from stochproc.demo._figures import COLOURS
from stochproc.demo._report import Row
from stochproc.demo._runner import Context
from stochproc.demo._scores import Forecast, GaussianForecaster, compare, forecast
from stochproc.kernels import Linear, Matern, Periodic, Scale
from stochproc.solvers import LBFGS
from stochproc.tensor import StateSpaceGP

__all__ = ["TITLE", "run"]

TITLE = "A long series with gaps"

STATE_SPACE, SKLEARN, HARMONIC = "state-space GP", "scikit-learn GP, every 4th week", "trend and harmonics"
# Where years are counted from, so that the slope of the trend is not confounded with its level.
_ORIGIN = 1980.0
_GAPS, _GAP_WEEKS = 30, 8
_FORECAST_FROM = 1996.0

Forecasts = dict[str, Forecast]


class EveryFourth(GaussianForecaster):
    """A Gaussian process of scikit-learn that learns from every fourth week, since its time is cubic in them."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> EveryFourth:
        """Fit on a quarter of the rows."""
        super().fit(X[::4], y[::4])
        return self


def run(context: Context) -> list[Row]:
    """Fill gaps and forecast, beside a dense Gaussian process and a regression on trend and season."""
    years, ppm = load_co2(return_X_y=True)
    years, ppm = years - _ORIGIN, np.ravel(ppm)
    if context.quick:
        years, ppm = years[1200:1700:2], ppm[1200:1700:2]

    rows: list[Row] = []
    context.progress("CO2: weeks in gaps that were cut out")
    hidden = _cut_gaps(len(years), 5 if context.quick else _GAPS)
    models = _models(context.quick)
    found = {
        name: forecast(model, years[~hidden], ppm[~hidden], years[hidden], ppm[hidden])
        for name, model in models.items()
    }
    # Weeks of one gap are not independent; gaps are.
    gap = np.cumsum(np.diff(np.flatnonzero(hidden), prepend=-2) > 1) - 1
    rows += _rows("CO2, gaps", found, gap)
    context.note(
        f"CO2: weekly means over Mauna Loa, 1958 to 2001, {len(ppm)} weeks besides those never measured. Gaps: "
        f"{gap[-1] + 1} gaps of {_GAP_WEEKS} weeks were cut out and filled from the rest; standard errors are those "
        "between gaps."
    )
    filled = models[STATE_SPACE]

    context.progress("CO2: the last six years, forecast at once")
    start = years[len(years) * 4 // 5, 0] if context.quick else _FORECAST_FROM - _ORIGIN
    late = years[:, 0] >= start
    models = _models(context.quick)
    found = {name: forecast(model, years[~late], ppm[~late], years[late], ppm[late]) for name, model in models.items()}
    block = ((years[late, 0] - start) // 0.5).astype(int)
    rows += _rows("CO2, forecast", found, block)
    context.note(
        f"Forecast: all {late.sum()} weeks from {start + _ORIGIN:.0f} on, from those before, at one time; standard "
        "errors are those between half years, which are not quite independent either. All three fell short of the "
        "growth after 1997. The trend of the state-space GP is the one of four with the highest likelihood of the "
        "weeks before; they were tried after a first forecast had been seen."
    )

    figure = Figure(figsize=(9, 6.4))
    top, bottom = figure.subplots(2, 1, height_ratios=(1.35, 1))
    _draw_forecast(top, models[STATE_SPACE], years, ppm, late)
    _draw_gaps(bottom, filled, years, ppm, hidden)
    context.save_figure(
        figure,
        "co2",
        "Carbon dioxide over Mauna Loa. Above: everything after the vertical line was forecast from what is before it. "
        "Below: four years in which weeks were cut out, and the band that fills them.",
    )
    return rows


def _models(quick: bool) -> dict[str, Any]:
    """Trend, slow waves, a season that may change, and noise, in all three ways; periods of one year are given."""
    trend = Linear() + Scale(Matern(lengthscale=5.0, nu=1.5), 0.05)
    year = Periodic(lengthscale=1.5, period=1.0)
    year.log_period.requires_grad_(False)
    season = Scale(year * Matern(lengthscale=100.0, nu=0.5), 0.05)
    waves = Scale(Matern(lengthscale=0.5, nu=0.5), 1e-3)
    # The composite kernel of scikit-learn's own example on this series.
    theirs = (
        ConstantKernel(10.0) * SklearnRBF(50.0)
        + ConstantKernel(0.05) * SklearnRBF(100.0) * ExpSineSquared(1.0, 1.0, periodicity_bounds="fixed")
        + ConstantKernel(0.01) * RationalQuadratic(length_scale=1.0, alpha=1.0)
        + ConstantKernel(0.001) * SklearnRBF(0.1)
        + WhiteKernel(0.001, (1e-8, 1e1))
    )
    return {
        STATE_SPACE: StateSpaceGP(trend + season + waves, noise=1e-3, optimizer=LBFGS(tol=1e-4)),
        SKLEARN: EveryFourth(GaussianProcessRegressor(theirs, normalize_y=True, random_state=0)),
        HARMONIC: GaussianForecaster(
            make_pipeline(FunctionTransformer(_trend_and_harmonics), StandardScaler(), BayesianRidge())
        ),
    }


def _trend_and_harmonics(years: np.ndarray) -> np.ndarray:
    angle = 2 * np.pi * years * np.arange(1, 5)
    return np.hstack([years, years**2, np.cos(angle), np.sin(angle)])


def _cut_gaps(n: int, n_gaps: int) -> np.ndarray:
    """Mark gaps at random places that do not touch."""
    starts = np.sort(np.random.default_rng(0).choice(n // (2 * _GAP_WEEKS) - 1, n_gaps, replace=False))
    hidden = np.zeros(n, dtype=bool)
    for start in 2 * _GAP_WEEKS * (starts + 1) - _GAP_WEEKS // 2:
        hidden[start : start + _GAP_WEEKS] = True
    return hidden


def _rows(data: str, found: Forecasts, groups: np.ndarray) -> list[Row]:
    """Return a row a model, compared by the mean log density of groups of weeks."""
    counts = np.bincount(groups)
    means = {name: np.bincount(groups, one.log_density) / counts for name, one in found.items()}
    leads = {name: None if name == STATE_SPACE else compare(means[STATE_SPACE], means[name]) for name in found}
    return [Row(data, name, "ppm", one.metrics(), leads[name]) for name, one in found.items()]


def _draw_forecast(ax: Any, model: StateSpaceGP, years: np.ndarray, ppm: np.ndarray, late: np.ndarray) -> None:
    shown = years[:, 0] > years[late][0, 0] - 8
    grid = np.arange(years[late][0, 0], years[-1, 0] + 4, 1 / 52)
    mean = model.predict(grid)
    lower, upper = model.predict_interval(grid).T
    ax.fill_between(grid + _ORIGIN, lower, upper, color=COLOURS["blue"], alpha=0.25, linewidth=0, label="90 % interval")
    ax.plot(grid + _ORIGIN, mean, color=COLOURS["blue"], linewidth=1, label="forecast")
    seen, unseen = shown & ~late, shown & late
    ax.plot(years[seen] + _ORIGIN, ppm[seen], ".", color="black", markersize=2, label="observed, learned from")
    ax.plot(years[unseen] + _ORIGIN, ppm[unseen], ".", color=COLOURS["red"], markersize=2, label="observed, kept back")
    ax.axvline(years[late][0, 0] + _ORIGIN, color="0.6", linewidth=0.8)
    ax.set(xlabel="year", ylabel="CO2 (ppm)", title="A forecast of ten years")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc="upper left", ncols=2, markerscale=3)
    ax.set_ylim(top=ax.get_ylim()[1] + 0.18 * np.diff(ax.get_ylim())[0])
    ax.margins(x=0.01)


def _draw_gaps(ax: Any, model: StateSpaceGP, years: np.ndarray, ppm: np.ndarray, hidden: np.ndarray) -> None:
    middle = np.median(years[hidden])
    shown = np.abs(years[:, 0] - middle) < 2
    grid = np.arange(middle - 2, middle + 2, 1 / 104)
    mean = model.predict(grid)
    lower, upper = model.predict_interval(grid).T
    ax.fill_between(grid + _ORIGIN, lower, upper, color=COLOURS["blue"], alpha=0.25, linewidth=0, label="90 % interval")
    ax.plot(grid + _ORIGIN, mean, color=COLOURS["blue"], linewidth=1, label="smoothed")
    for chosen, colour, label in [
        (shown & ~hidden, "black", "learned from"),
        (shown & hidden, COLOURS["red"], "cut out"),
    ]:
        ax.plot(years[chosen] + _ORIGIN, ppm[chosen], ".", color=colour, markersize=4, label=f"observed, {label}")
    ax.set(xlabel="year", ylabel="CO2 (ppm)", title="Gaps, filled")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc="upper left", ncols=2)
    ax.set_ylim(top=ax.get_ylim()[1] + 0.3 * np.diff(ax.get_ylim())[0])
    ax.margins(x=0.01)
