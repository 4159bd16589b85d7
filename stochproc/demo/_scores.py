"""How the demo judges a probabilistic regressor, whoever made it, on rows it has not seen."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from stochproc.demo._report import Lead

__all__ = ["LEVELS", "Forecast", "GaussianForecaster", "ask", "compare", "forecast"]

# Nominal coverages; 0.9 is one of them.
LEVELS = np.linspace(0.05, 0.95, 19)
_NINETY = int(np.argmin(np.abs(LEVELS - 0.9)))


class GaussianForecaster:
    """A scikit-learn regressor whose ``predict`` knows its spread, with the methods of our estimators.

    Parameters
    ----------
    regressor : regressor
        With ``predict(X, return_std=True)``, the standard deviation being that of new observations, noise
        included. It is taken to be that of a normal law.
    """

    def __init__(self, regressor: Any) -> None:
        self.regressor = regressor

    def fit(self, X: np.ndarray, y: np.ndarray) -> GaussianForecaster:
        """Fit the regressor."""
        self.regressor.fit(X, y)
        return self

    def predict(self, X: np.ndarray, return_std: bool = False) -> Any:
        """Predict means, and standard deviations of new observations."""
        return self.regressor.predict(X, return_std=return_std)

    def predict_quantiles(self, X: np.ndarray, q: Any) -> np.ndarray:
        """Predict quantiles of new observations, one column a probability."""
        mean, std = self.predict(X, return_std=True)
        return mean[:, None] + std[:, None] * norm.ppf(np.atleast_1d(q))

    def log_predictive_density(self, X: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the log density of each new observation, in nats and the units of y."""
        mean, std = self.predict(X, return_std=True)
        return norm.logpdf(y, mean, std)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a model said of held-out rows, and how that turned out.

    Parameters
    ----------
    y : ndarray of shape (n,)
        What was observed.
    mean : ndarray of shape (n,)
    lower, upper : ndarray of shape (n, n_levels)
        Ends of the central intervals of coverage ``LEVELS``.
    log_density : ndarray of shape (n,)
        In nats and the units of y.
    seconds : float
        To fit and to predict means and standard deviations.
    """

    y: np.ndarray
    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    log_density: np.ndarray
    seconds: float

    @property
    def shares(self) -> np.ndarray:
        """Share of observations inside the interval of each of ``LEVELS``."""
        return ((self.lower <= self.y[:, None]) & (self.y[:, None] <= self.upper)).mean(0)

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the interval of coverage 0.9."""
        return self.lower[:, _NINETY], self.upper[:, _NINETY]

    def metrics(self) -> dict[str, float]:
        """Return the metrics that all regressors share."""
        return {
            "RMSE": math.sqrt(np.mean((self.mean - self.y) ** 2)),
            "log density": float(self.log_density.mean()),
            "90 % coverage": float(self.shares[_NINETY]),
            "seconds": self.seconds,
        }

    @classmethod
    def pooled(cls, forecasts: Sequence[Forecast]) -> Forecast:
        """Put repetitions in one; ``seconds`` becomes that of one repetition on average."""
        fields = ("y", "mean", "lower", "upper", "log_density")
        joined = {field: np.concatenate([getattr(one, field) for one in forecasts]) for field in fields}
        return cls(**joined, seconds=sum(one.seconds for one in forecasts) / len(forecasts))


def forecast(model: Any, X_train: np.ndarray, y_train: np.ndarray, X_test: np.ndarray, y_test: np.ndarray) -> Forecast:
    """Fit a probabilistic regressor and let it predict rows it has not seen.

    Parameters
    ----------
    model : regressor
        With ``fit``, ``predict(X, return_std=True)``, ``predict_quantiles`` and ``log_predictive_density``.
    X_train, y_train : ndarray of shape (n_train, n_features) and (n_train,)
    X_test, y_test : ndarray of shape (n, n_features) and (n,)

    Returns
    -------
    Forecast
    """
    start = time.perf_counter()
    model.fit(X_train, y_train)
    return ask(model, X_test, y_test, seconds=time.perf_counter() - start)


def ask(model: Any, X_test: np.ndarray, y_test: np.ndarray, *, seconds: float) -> Forecast:
    """Let a fitted probabilistic regressor predict rows it has not seen.

    Parameters
    ----------
    model : regressor
        See :func:`forecast`.
    X_test, y_test : ndarray of shape (n, n_features) and (n,)
    seconds : float
        That the fit took.

    Returns
    -------
    Forecast
    """
    start = time.perf_counter()
    mean, _ = model.predict(X_test, return_std=True)
    seconds += time.perf_counter() - start
    tails = (1 - LEVELS) / 2
    ends = model.predict_quantiles(X_test, np.concatenate([tails, 1 - tails]))
    density = model.log_predictive_density(X_test, y_test)
    return Forecast(y_test, mean, ends[:, : len(LEVELS)], ends[:, len(LEVELS) :], density, seconds)


def compare(first: np.ndarray, other: np.ndarray) -> Lead:
    """Measure how much higher the log density of one model is, from independent pairs.

    Parameters
    ----------
    first, other : ndarray of shape (n,)
        At least two log densities, of the same observations or repetitions.

    Returns
    -------
    Lead
        Mean difference and its standard error.
    """
    gain = first - other
    return Lead(float(gain.mean()), float(gain.std(ddof=1) / math.sqrt(len(gain))))
