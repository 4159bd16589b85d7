"""Part of the demo: scale mixtures of Gaussian processes, on two data sets and with few data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF as SklearnRBF
from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel
from sklearn.linear_model import BayesianRidge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stochproc.datasets import load_diabetes, load_sunspots
from stochproc.demo._figures import COLOURS, STYLE, plot_calibration
from stochproc.demo._report import Row
from stochproc.demo._runner import Context
from stochproc.demo._scores import LEVELS, Forecast, GaussianForecaster, compare, forecast
from stochproc.gp import GPDisplay, ScaleMixtureGPRegressor
from stochproc.kernels import RBF

__all__ = ["TITLE", "draw_readme_figure", "run"]

TITLE = "Gaussian processes with an unknown scale"

STUDENT, GAUSS, SKLEARN, LINEAR = "Student-t process", "Gaussian process", "scikit-learn GP", "linear fit"
_COLOURS = {
    STUDENT: COLOURS["blue"],
    GAUSS: COLOURS["orange"],
    SKLEARN: COLOURS["green"],
    LINEAR: COLOURS["purple"],
}
_LAGS = 9
# Patients to learn from in the experiment with few data, and how often they are drawn anew.
_FEW, _DRAWS = 10, 40

Forecasts = dict[str, Forecast]


class RootTarget:
    """A probabilistic regressor of counts that works on :math:`z = 2(\\sqrt{1 + y} - 1)`.

    Sunspots scatter more the more there are; this transform, usual for them, makes the scatter even. It is applied
    to the features too, which are earlier counts. All that is returned refers to y.

    Parameters
    ----------
    model : regressor
        With the methods of our estimators.

    References
    ----------
    .. [1] D. K. Ghaddar, H. Tong, "Data transformation and self-exciting threshold autoregression", Applied
       Statistics 30 (1981) 238-248.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def fit(self, X: np.ndarray, y: np.ndarray) -> RootTarget:
        """Fit on the transformed scale."""
        self.model.fit(_root(X), _root(y))
        return self

    def predict(self, X: np.ndarray, return_std: bool = False) -> Any:
        """Predict the mean of y, and its standard deviation to first order."""
        mean, std = self.model.predict(_root(X), return_std=True)
        # y = (1 + z/2)^2 - 1, hence E y = (1 + E z / 2)^2 - 1 + var z / 4.
        expected = (1 + mean / 2) ** 2 - 1 + std**2 / 4
        return (expected, std * np.abs(1 + mean / 2)) if return_std else expected

    def predict_quantiles(self, X: np.ndarray, q: Any) -> np.ndarray:
        """Predict quantiles of y; counts end at zero."""
        return (1 + np.maximum(self.model.predict_quantiles(_root(X), q), 0) / 2) ** 2 - 1

    def log_predictive_density(self, X: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the log density of y in nats."""
        # log |dz / dy| = -log(1 + y) / 2
        return self.model.log_predictive_density(_root(X), _root(y)) - np.log1p(y) / 2


def run(context: Context) -> list[Row]:
    """Compare with a Gaussian process, that of scikit-learn and a linear fit."""
    X_train, y_train, X_test, y_test = _split_diabetes(context.quick)
    for model in _models(X_train.shape[1]).values():
        # What is loaded at the first fit should not count as the time of the first model.
        forecast(model, X_train[:20], y_train[:20], X_test[:2], y_test[:2])

    rows: list[Row] = []
    panels: dict[str, Forecasts] = {}
    _run_diabetes(context, rows, panels)
    _run_few(context, rows, panels)
    with context.optional("Sunspots"):
        _run_sunspots(context, rows, panels)

    figure = Figure(figsize=(3.3 * len(panels), 3.9))
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        plot_calibration(ax, LEVELS, {name: (one.shares, _COLOURS[name]) for name, one in found.items()})
        ax.set_title(title)
        ax.label_outer()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    context.save_figure(
        figure,
        "calibration",
        "Calibration of all models. Below the diagonal, intervals are too narrow. With few patients the scale is not "
        "known: a Gaussian process draws its intervals as if it were, and leaving it open widens them.",
    )
    return rows


def _run_diabetes(context: Context, rows: list[Row], panels: dict[str, Forecasts]) -> None:
    context.progress("diabetes: progression from ten measurements")
    X_train, y_train, X_test, y_test = _split_diabetes(context.quick)
    models = _models(X_train.shape[1])
    found = {name: forecast(model, X_train, y_train, X_test, y_test) for name, model in models.items()}
    title = f"diabetes, {len(y_train)} patients"
    rows += _rows(title, "points", found)
    panels[title] = found
    context.note(
        f"Diabetes, {len(y_train)} patients: progression after one year from ten measurements; {len(y_test)} other "
        f"patients were kept back. {_smallest_error(found)}"
    )
    context.save_figure(
        _draw_diabetes(models[STUDENT], X_test, y_test),
        "diabetes",
        f"Progression of diabetes after one year: what the Student-t process predicted for {len(y_test)} patients kept "
        "back, with intervals that should hold nine in ten, against what was observed.",
    )


def _run_few(context: Context, rows: list[Row], panels: dict[str, Forecasts]) -> None:
    n_draws = 2 if context.quick else _DRAWS
    context.progress(f"diabetes: {_FEW} patients to learn from, {n_draws} times")
    draws = _forecast_from_few(n_draws, context.quick)
    found = {name: Forecast.pooled(each) for name, each in draws.items()}
    means = {name: np.array([one.log_density.mean() for one in each]) for name, each in draws.items()}
    title = f"diabetes, {_FEW} patients"
    rows += _rows(title, "points", found, means)
    panels[title] = found
    context.note(
        f"Diabetes, {_FEW} patients: means over {n_draws} draws of the patients to learn from, the same ones kept "
        f"back, one lengthscale for all columns; standard errors are those between draws. {_smallest_error(found)}"
    )


def _run_sunspots(context: Context, rows: list[Row], panels: dict[str, Forecasts]) -> None:
    context.progress(f"sunspots: each year from the {_LAGS} before it")
    years, y_train, found = _forecast_sunspots(context.quick)
    title = f"sunspots, {len(y_train)} years"
    rows += _rows(title, "sunspots", found)
    panels[title] = found
    context.note(
        f"Sunspots: each year forecast from the {_LAGS} before it; the last {len(years)} years were kept back. All "
        "models see 2(√(1 + y) − 1), which makes the scatter even; all scores are in sunspots. "
        f"{_smallest_error(found)}"
    )
    figure = Figure(figsize=(9, 3.6))
    _draw_sunspots(figure.subplots(), years, found[STUDENT])
    context.save_figure(
        figure,
        "sunspots",
        f"Yearly sunspots, each forecast from the {_LAGS} years before it by a Student-t process that learned from "
        f"the {len(y_train)} years up to {years[0] - 1:.0f} alone.",
    )


def draw_readme_figure(path: Path) -> None:
    """Write the figure of the README: sunspot forecasts, and how often intervals held on all data of this part.

    Parameters
    ----------
    path : Path
        A PNG file; its folder is made if it is not there.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.5))
        left, right = figure.subplots(1, 2, width_ratios=(2.1, 1))
        years, _, found = _forecast_sunspots(quick=False, names=(STUDENT,))
        _draw_sunspots(left, years, found[STUDENT])
        split = _split_diabetes(quick=False)
        n_train, n_columns = split[0].shape
        many = forecast(_models(n_columns, (STUDENT,))[STUDENT], *split)
        few = Forecast.pooled(_forecast_from_few(_DRAWS, quick=False, names=(STUDENT,))[STUDENT])
        curves = {
            "sunspots": (found[STUDENT].shares, COLOURS["blue"]),
            f"diabetes, {n_train} patients": (many.shares, COLOURS["green"]),
            f"diabetes, {_FEW} patients": (few.shares, COLOURS["orange"]),
        }
        plot_calibration(right, LEVELS, curves)
        right.set_title("Calibration, held out")
        right.legend(loc="lower right", handlelength=1.6, borderaxespad=0.2)
        figure.savefig(path, dpi=110)


def _models(n_columns: int, names: tuple[str, ...] = (), one_lengthscale: bool = False) -> dict[str, Any]:
    """Return the models to compare, the Gaussian processes with one kernel and one start of the search."""
    start = math.sqrt(n_columns)
    kernel: Any = RBF(lengthscale=start) if one_lengthscale else "rbf"
    scales = start if one_lengthscale else np.full(n_columns, start)
    # Bounds so wide that they do not decide where the search ends.
    theirs = ConstantKernel(1.0, (1e-6, 1e6)) * SklearnRBF(scales, (1e-3, 1e10)) + WhiteKernel(0.1, (1e-8, 1e3))
    gp = GaussianProcessRegressor(theirs, normalize_y=True, random_state=0)
    models = {
        STUDENT: ScaleMixtureGPRegressor(kernel, random_state=0),
        GAUSS: ScaleMixtureGPRegressor(kernel, scale_prior="delta", random_state=0),
        # `WhiteKernel` is part of the kernel, hence of the standard deviations that `predict` returns.
        SKLEARN: GaussianForecaster(make_pipeline(StandardScaler(), gp)),
        LINEAR: GaussianForecaster(make_pipeline(StandardScaler(), BayesianRidge())),
    }
    return {name: models[name] for name in names or models}


def _split_diabetes(quick: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two thirds of the patients to learn from and one to be kept back, at random."""
    X, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))[: 120 if quick else None]
    n_train = 2 * len(order) // 3
    train, test = order[:n_train], order[n_train:]
    return X[train], y[train], X[test], y[test]


def _forecast_from_few(n_draws: int, quick: bool, names: tuple[str, ...] = ()) -> dict[str, list[Forecast]]:
    """Learn from a few patients, drawn anew each time, and predict the same ones kept back."""
    X_train, y_train, X_test, y_test = _split_diabetes(quick)
    draws: dict[str, list[Forecast]] = {}
    for seed in range(n_draws):
        few = np.random.default_rng(seed).choice(len(y_train), _FEW, replace=False)
        for name, model in _models(X_train.shape[1], names, one_lengthscale=True).items():
            draws.setdefault(name, []).append(forecast(model, X_train[few], y_train[few], X_test, y_test))
    return draws


def _forecast_sunspots(quick: bool, names: tuple[str, ...] = ()) -> tuple[np.ndarray, np.ndarray, Forecasts]:
    """Learn from the first two thirds of the years, and forecast each later one from the years before it."""
    times, counts = load_sunspots(return_X_y=True)
    years, counts = times[:, 0], counts.ravel()
    lags = np.lib.stride_tricks.sliding_window_view(counts, _LAGS)[:-1]
    years, y = years[_LAGS:], counts[_LAGS:]
    if quick:
        years, y, lags = years[-90:], y[-90:], lags[-90:]
    n = 2 * len(y) // 3
    models = {name: RootTarget(model) for name, model in _models(_LAGS, names).items()}
    found = {name: forecast(model, lags[:n], y[:n], lags[n:], y[n:]) for name, model in models.items()}
    return years[n:], y[:n], found


def _rows(data: str, unit: str, found: Forecasts, densities: dict[str, np.ndarray] | None = None) -> list[Row]:
    """Return a row a model; ``densities`` are independent log densities to compare by, those of all rows if None."""
    density = densities or {name: one.log_density for name, one in found.items()}
    leads = {name: None if name == STUDENT else compare(density[STUDENT], density[name]) for name in found}
    return [Row(data, name, unit, one.metrics(), leads[name]) for name, one in found.items()]


def _smallest_error(found: Forecasts) -> str:
    best = min(found, key=lambda name: found[name].metrics()["RMSE"])
    return f"The {best} has the smallest RMSE."


def _draw_diabetes(model: Any, X: np.ndarray, y: np.ndarray) -> Figure:
    figure = Figure(figsize=(6.2, 4.6))
    ax = figure.subplots()
    # Pale bars behind, so that the means can be seen.
    style: dict[str, Any] = {"color": COLOURS["blue"], "ecolor": "#0072B240", "elinewidth": 1.2, "markersize": 4}
    GPDisplay.from_estimator(model, X, y, ax=ax, **style)
    ax.set_ylim(top=1.2 * ax.get_ylim()[1])
    ax.legend(loc="upper left")
    ax.set(xlabel="observed progression (points)", ylabel="predicted progression (points)", title="Diabetes, held out")
    return figure


def _draw_sunspots(ax: Any, years: np.ndarray, found: Forecast) -> None:
    lower, upper = found.interval
    inside = (lower <= found.y) & (found.y <= upper)
    ax.fill_between(years, lower, upper, color=COLOURS["blue"], alpha=0.2, linewidth=0, label="90 % interval")
    ax.plot(years, found.mean, color=COLOURS["blue"], label="forecast, one year ahead")
    ax.plot(years[inside], found.y[inside], "o", color="black", markersize=3, label="observed")
    label = f"observed, outside ({np.sum(~inside)} of {len(inside)})"
    ax.plot(years[~inside], found.y[~inside], "D", color=COLOURS["red"], markersize=4.5, label=label)
    ax.set(
        xlabel="year",
        ylabel="sunspots (yearly mean)",
        title="Sunspots, held out",
    )
    ax.set_xlim(years[0] - 1, years[-1] + 1)
    # Room for the legend above the highest peak.
    ax.set_ylim(0, 1.3 * max(upper.max(), found.y.max()))
    ax.legend(loc="upper left", ncols=2)


def _root(y: np.ndarray) -> np.ndarray:
    return 2 * (np.sqrt(1 + y) - 1)
