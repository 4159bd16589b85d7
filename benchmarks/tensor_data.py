"""Scattered entries of real tensors, and the rows of each that are held out."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from stochproc.tensor import Mode

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
FOLDS = range(5)


class Split(NamedTuple):
    """Rows to learn from and rows to be judged by; ``modes`` as the estimators take them."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    modes: Any = None

    def validation(self, seed: int = 0) -> Split:
        """A fifth of the training rows in the place of the test rows."""
        out = np.zeros(len(self.y), bool)
        out[np.random.default_rng(seed).permutation(len(out))[: len(out) // 5]] = True
        return split(self.X, self.y, out, self.modes)


def split(X: np.ndarray, y: np.ndarray, out: np.ndarray, modes: Any = None) -> Split:
    return Split(X[~out], y[~out], X[out], y[out], modes)


def at_random(n: int, share: float, seed: int = 0) -> np.ndarray:
    out = np.zeros(n, bool)
    out[np.random.default_rng(seed).permutation(n)[: round(share * n)]] = True
    return out


@functools.cache
def _pm25() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.load(SHARED / "tensor" / "beijing_pm25.npz") as z:
        return 10 * (z["index"] + 0.5) / z["dims"], z["y"], z["test_mask"]


def pm25(fold: int = 0) -> Split:
    """PM2.5 by temperature, pressure and day, each on a scale of 0 to 10."""
    X, y, masks = _pm25()
    return split(X, y, masks[fold])


def pm25_days(seed: int, share: float = 0.05) -> Split:
    """The same with whole days held out."""
    X, y, _ = _pm25()
    days = np.unique(X[:, 2])
    return split(X, y, np.isin(X[:, 2], days[at_random(len(days), share, seed)]))


@functools.cache
def _wind(years: int) -> tuple[np.ndarray, ...]:
    """Station, latitude, longitude, day of the year, time in years, and the root of the speed in knots."""
    with np.load(SHARED / "irish_wind" / "irish_wind.npz") as z:
        speed, lat, lon = np.sqrt(z["wind"] * 0.01), z["lat"], z["lon"]
        date = z["date"].astype("datetime64[D]")
    year = date.astype("datetime64[Y]")
    first = year.astype(int) - year.astype(int)[0] < years
    day, station = np.indices(speed[first].shape)
    # The season in steps of five days: 365 points of a periodic process would take most of the time of a fit.
    day_of_year = ((date - year.astype("datetime64[D]")).astype(int)[first][day] // 5) * 5 + 2.5
    time = (date - date[0]).astype(float)[first][day] / 365.25
    return tuple(a.ravel() for a in (station, lat[station], lon[station], day_of_year, time, speed[first]))


def wind(years: int = 3) -> Split:
    """Root of the wind speed by station, day of the year and time in years; a fifth of the entries held out."""
    station, _, _, season, time, y = _wind(years)
    modes = ["discrete", Mode("periodic", period=365.25), "continuous"]
    X = np.column_stack([station, season, time])
    return split(X, y, at_random(len(y), 0.2), modes)


def wind_stations(years: int = 3, seed: int = 0) -> Split:
    """The same by latitude, longitude, day of the year and time, with two whole stations held out."""
    station, lat, lon, season, time, y = _wind(years)
    modes = ["continuous", "continuous", Mode("periodic", period=365.25), "continuous"]
    out = np.isin(station, np.random.default_rng(seed).permutation(12)[:2])
    return split(np.column_stack([lat, lon, season, time]), y, out, modes)


def ocean() -> Split:
    """Sea surface temperature by month, latitude and longitude; a tenth of the entries of a 2-degree grid known."""
    with np.load(SHARED / "coads_ocean" / "coads_ocean.npz") as z:
        sst, lat, lon, months = z["sst"], z["lat"], z["lon"], z["month"]
    month, i, j = np.nonzero(sst != -32768)
    X = np.column_stack([months[month], lat[i], lon[j]]).astype(float)
    modes = [Mode("periodic", period=12), "continuous", Mode("periodic", period=360)]
    return split(X, sst[month, i, j] * 0.01, at_random(len(X), 0.9), modes)


def diseases() -> Split:
    """Log of one plus yearly cases in 100,000 by disease, state and year; a fifth of the entries held out."""
    with np.load(SHARED / "us_diseases" / "us_diseases.npz") as z:
        count, weeks, population, years = z["count"], z["weeks_reporting"], z["population"], z["year"]
    disease, state, year = np.nonzero(np.isfinite(count) & np.isfinite(population) & (weeks > 0))
    known = disease, state, year
    y = np.log1p(1e5 * count[known].astype(float) / population[known] * 52 / weeks[known])
    X = np.column_stack([disease, state, years[year]]).astype(float)
    return split(X, y, at_random(len(y), 0.2), ["discrete", "discrete", "continuous"])
