"""Part of the demo: networks of infinite width, with a known and an unknown scale, on tables and on damaged digits."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter, rotate
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import BayesianRidge, LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stochproc.datasets import load_diabetes, load_digits, load_star98
from stochproc.demo._figures import COLOURS
from stochproc.demo._report import Row
from stochproc.demo._runner import Context
from stochproc.demo._scores import Forecast, GaussianForecaster, compare, forecast
from stochproc.gp import ScaleMixtureGPClassifier, ScaleMixtureGPRegressor

__all__ = ["TITLE", "run"]

TITLE = "Networks of infinite width"

STUDENT, GAUSS, LINEAR, TREES = "Student-t network", "Gaussian network", "linear fit", "boosted trees"
LOGISTIC = "logistic regression"
_COLOURS = {STUDENT: COLOURS["blue"], GAUSS: COLOURS["orange"], LOGISTIC: COLOURS["purple"]}
_NETWORK = "mlp-relu-2"
_SPLITS = 6
_LEVELS = (0, 1, 2, 3, 4)
_DAMAGES = ("noise", "blur", "rotation")


def run(context: Context) -> list[Row]:
    """Compare the two priors of the scale with each other and with plain models."""
    rows: list[Row] = []
    _run_regression(context, rows, "diabetes", "points", *load_diabetes(return_X_y=True))
    with context.optional("School districts"):
        _run_regression(context, rows, "school districts", "% of pupils", *load_star98(return_X_y=True))
    _run_digits(context, rows)
    return rows


def _run_regression(context: Context, rows: list[Row], name: str, unit: str, X: np.ndarray, y: np.ndarray) -> None:
    """Fit on two thirds of the rows, several times, and predict the others."""
    n_splits = 1 if context.quick else _SPLITS
    n = 90 if context.quick else len(y)
    context.progress(f"{name}: {n_splits} split(s)")
    draws: dict[str, list[Forecast]] = {}
    for split in range(n_splits):
        order = np.random.default_rng(split).permutation(len(y))[:n]
        train, test = order[: 2 * n // 3], order[2 * n // 3 :]
        for model_name, model in _regressors(split).items():
            draws.setdefault(model_name, []).append(forecast(model, X[train], y[train], X[test], y[test]))
    title = f"{name}, {2 * n // 3} rows"
    means = {model: np.array([one.log_density.mean() for one in each]) for model, each in draws.items()}
    for model, each in draws.items():
        lead = None if model == STUDENT or n_splits < 2 else compare(means[STUDENT], means[model])
        rows.append(Row(title, model, unit, Forecast.pooled(each).metrics(), lead))
    best = min(draws, key=lambda model: Forecast.pooled(draws[model]).metrics()["RMSE"])
    context.note(
        f"{name.capitalize()}: {n_splits} random splits in two thirds to learn from and a third to predict; standard "
        f"errors are those between splits. The {best} has the smallest RMSE. With some hundred rows the scale is known "
        "well, so the two priors agree; the part on few patients shows where they do not."
    )


def _regressors(seed: int) -> dict[str, Any]:
    trees = HistGradientBoostingRegressor(random_state=seed, max_iter=100, learning_rate=0.05)
    return {
        STUDENT: ScaleMixtureGPRegressor(_NETWORK, n_restarts=1),
        GAUSS: ScaleMixtureGPRegressor(_NETWORK, scale_prior="delta", n_restarts=1),
        LINEAR: GaussianForecaster(make_pipeline(StandardScaler(), BayesianRidge())),
        TREES: GaussianForecaster(_ResidualSpread(trees)),
    }


class _ResidualSpread:
    """A regressor without a spread, with that of its errors on a fifth of the rows kept back.

    Parameters
    ----------
    regressor : regressor
    """

    def __init__(self, regressor: Any) -> None:
        self.regressor = regressor

    def fit(self, X: np.ndarray, y: np.ndarray) -> _ResidualSpread:
        """Measure the spread, then fit on all rows."""
        n = 4 * len(y) // 5
        self.regressor.fit(X[:n], y[:n])
        self.std = float(np.sqrt(np.mean((y[n:] - self.regressor.predict(X[n:])) ** 2)))
        self.regressor.fit(X, y)
        return self

    def predict(self, X: np.ndarray, return_std: bool = False) -> Any:
        """Predict means, and one spread for all."""
        mean = self.regressor.predict(X)
        return (mean, np.full(len(mean), self.std)) if return_std else mean


def _run_digits(context: Context, rows: list[Row]) -> None:
    """Train on clean digits, and see how probabilities hold as the test digits get worse."""
    n_train, n_test = (200, 100) if context.quick else (600, 797)
    context.progress(f"digits: {n_train} clean ones to learn from")
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))[: n_train + n_test]
    train, test = order[:n_train], order[n_train:]
    options: dict[str, Any] = {"normalize_X": "global", "random_state": 0, "tol": 0.05}
    # Large batches: there are few images.
    options |= {"n_inducing": 40, "max_epochs": 5} if context.quick else {"n_inducing": 100, "batch_size": 200}
    models = {
        STUDENT: ScaleMixtureGPClassifier(_NETWORK, **options),
        GAUSS: ScaleMixtureGPClassifier(_NETWORK, scale_prior="delta", **options),
        LOGISTIC: make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }
    scores: dict[str, dict[tuple[str, int], dict[str, float]]] = {}
    for name, model in models.items():
        start = time.perf_counter()
        model.fit(X[train], y[train])
        seconds = time.perf_counter() - start
        scores[name] = {}
        for damage in _DAMAGES:
            for level in _LEVELS:
                probabilities = model.predict_proba(_damaged(X[test], damage, level))
                scores[name][damage, level] = _judge(probabilities, y[test]) | {"seconds": seconds}
    for title, levels in (("clean", (0,)), ("damaged", _LEVELS[1:])):
        for name in models:
            found = [scores[name][damage, level] for damage in _DAMAGES for level in levels]
            metrics = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
            rows.append(Row(f"digits, {title}", name, "share", metrics))
    context.note(
        f"Digits: {n_train} clean images of 8 x 8 pixels to learn from, {n_test} others to classify, clean and with "
        "noise, blur and rotation at four levels each (means over twelve). Calibration error is the mean distance of "
        "confidence and accuracy over ten bins, weighted by their size; log loss is in nats. Seconds are to fit."
    )
    context.save_figure(
        _draw_digits(scores, X[test][0]),
        "digits",
        "Digits that get worse: accuracy and calibration error of classifiers that only ever saw clean ones, averaged "
        "over noise, blur and rotation. The images above show one digit at each level.",
    )


def _damaged(X: np.ndarray, damage: str, level: int) -> np.ndarray:
    """Return images with noise, blurred or rotated; level 0 changes nothing."""
    if level == 0:
        return X
    images = X.reshape(-1, 8, 8)
    if damage == "noise":
        # Of the 16 grey levels; the same noise whatever the model.
        images = images + 2.0 * level * np.random.default_rng(level).standard_normal(images.shape)
    elif damage == "blur":
        images = gaussian_filter(images, (0, 0.35 * level, 0.35 * level))
    else:
        images = rotate(images, 15.0 * level, axes=(2, 1), reshape=False, order=1)
    return np.clip(images, 0, 16).reshape(len(X), -1)


def _judge(probabilities: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Score class probabilities against the labels 0 to 9."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    bins = np.minimum((10 * confidence).astype(int), 9)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * np.mean(bins == b) for b in np.unique(bins)]
    return {
        "accuracy": float(right.mean()),
        "log loss": float(log_loss(y, probabilities, labels=np.arange(10))),
        "calibration error": float(np.sum(gaps)),
    }


def _draw_digits(scores: dict[str, dict[tuple[str, int], dict[str, float]]], digit: np.ndarray) -> Figure:
    figure = Figure(figsize=(9, 5.2))
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 2))
    images = above.subplots(len(_DAMAGES), len(_LEVELS))
    for line, damage in zip(images, _DAMAGES, strict=True):
        for ax, level in zip(line, _LEVELS, strict=True):
            ax.imshow(_damaged(digit[None], damage, level).reshape(8, 8), cmap="Greys", vmin=0, vmax=16)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(damage, rotation=0, ha="right", va="center")
    panels = below.subplots(1, 2)
    for ax, metric in zip(panels, ("accuracy", "calibration error"), strict=True):
        for (name, found), marker in zip(scores.items(), "osD", strict=True):
            values = [np.mean([found[damage, level][metric] for damage in _DAMAGES]) for level in _LEVELS]
            ax.plot(_LEVELS, values, marker=marker, color=_COLOURS[name], label=name)
        ax.set(xlabel="level of damage", ylabel=metric, xticks=_LEVELS)
        ax.set_ylim(bottom=0, top=1.02 if metric == "accuracy" else None)
    panels[0].legend(loc="lower left")
    return figure
