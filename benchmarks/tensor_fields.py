"""Three more real tensors against simple baselines, and what other options than the defaults would give."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensor_data
from tensor_data import Split
from tensor_peers import (
    Model,
    additive,
    between_points,
    boosting,
    boosting_with_mean,
    constant,
    cp,
    exact_gp,
    interpolated_mean,
    measured,
    regression_on_others,
    tucker,
    within,
)

from stochproc.tensor import Mode

Row = dict[str, Any]
SETS: dict[str, Callable[[], Split]] = {
    "PM2.5": functools.partial(tensor_data.pm25, 0),
    "irish_wind": tensor_data.wind,
    "coads_ocean": tensor_data.ocean,
    "us_diseases": tensor_data.diseases,
}
# One thing changed at a time.
CHOICES: dict[str, Row] = {
    "defaults": {},
    "Matern 3/2": {"kernel": "matern32"},
    "rank 2": {"rank": 2},
    "rank 5": {"rank": 5},
    "rank 8": {"rank": 8},
    "rank 12": {"rank": 12},
    "own lengthscales": {"share_lengthscale": False},
    "learned variances": {"learn_variance": True},
    "variance 1": {"variance": 1.0},
    "not centred": {"center": False},
    "degree start alone": {"init": "degree", "n_init": 1},
    "greedy start alone": {"init": "greedy", "n_init": 1},
    "four starts": {"n_init": 4},
    "30 sweeps, none held out": {"early_stopping": False, "max_iter": 30},
}
PLAIN_OCEAN = ["discrete", "continuous", "continuous"]
MORE_CHOICES: dict[str, dict[str, Row]] = {
    "irish_wind": {
        "season not periodic": {"modes": ["discrete", "continuous", "continuous"]},
        "season not periodic, rank 5": {"modes": ["discrete", "continuous", "continuous"], "rank": 5},
        "no season": {"columns": (0, 2), "modes": ["discrete", "continuous"]},
        "no season, rank 5": {"columns": (0, 2), "modes": ["discrete", "continuous"], "rank": 5},
        "no season, rank 8": {"columns": (0, 2), "modes": ["discrete", "continuous"], "rank": 8},
    },
    "coads_ocean": {
        "months as categories, plain longitude": {"modes": PLAIN_OCEAN},
        "months as categories, plain longitude, rank 8": {"modes": PLAIN_OCEAN, "rank": 8},
        "months as categories, plain longitude, rank 12": {"modes": PLAIN_OCEAN, "rank": 12},
        "months as categories, plain longitude, rank 12, Matern 3/2": {
            "modes": PLAIN_OCEAN,
            "rank": 12,
            "kernel": "matern32",
        },
    },
}
#: Many functions of 15 states each in the periodic modes: minutes a fit, and left out.
SLOW = {
    "irish_wind": ("rank 8", "rank 12", "own lengthscales", "learned variances"),
    "coads_ocean": ("rank 8", "rank 12", "own lengthscales", "learned variances"),
}


def chosen(options: Row) -> Model:
    """CP with options; ``columns`` are those it sees."""
    columns = options.get("columns")
    model = cp(**{k: v for k, v in options.items() if k != "columns"})
    if columns is None:
        return model
    keep = list(columns)
    return lambda data: model(data._replace(X=data.X[:, keep], X_test=data.X_test[:, keep]))


@functools.cache
def validated(name: str) -> list[Row]:
    """Each choice on a fifth of the training rows; the test rows take no part."""
    data = SETS[name]().validation()
    rows = []
    for label, options in (CHOICES | MORE_CHOICES.get(name, {})).items():
        if label in SLOW.get(name, ()):
            continue
        found = measured(chosen(options), data)
        rows.append({"data": name, "choice": label, **found})
        rows[-1]["rmse / defaults"] = found["rmse"] / rows[0]["rmse"]
        print(rows[-1], flush=True)
    return rows


def choices(args: argparse.Namespace) -> list[Row]:
    """Other options than the defaults, on validation rows of all four sets."""
    return [row for name in SETS for row in validated(name)]


def compared(name: str, models: dict[str, Model], ours: dict[str, Model]) -> list[Row]:
    """Baselines and ours on the test rows, and CP as the validation rows would have it."""
    best = min(validated(name), key=lambda row: row["rmse"])["choice"]
    options = (CHOICES | MORE_CHOICES.get(name, {}))[best]
    return table(SETS[name](), models, ours | {f"CP, best on validation rows: {best}": chosen(options)})


def table(data: Split, models: dict[str, Model], ours: dict[str, Model]) -> list[Row]:
    rows: list[Row] = []
    for label, model in (models | ours).items():
        rows.append({"model": label, "n": len(data.y), "n test": len(data.y_test), **measured(model, data)})
        print(rows[-1], flush=True)
    best = min(row["rmse"] for row in rows[: len(models)])
    for row in rows:
        row["rmse / best baseline"] = row["rmse"] / best
    return rows


def month(X: np.ndarray) -> np.ndarray:
    return X[:, 1] // (365.25 / 12)


def irish_wind(args: argparse.Namespace) -> list[Row]:
    """Entries at random, and then whole stations."""
    entries = compared(
        "irish_wind",
        {
            "constant": constant,
            "mean of the station": additive([0]),
            "mean of station and month": additive([0, month]),
            "interpolated mean of the day": interpolated_mean(2),
            "day + station and month": additive([2], [0, month]),
            "regression on the other stations of the day": regression_on_others(row=2, item=0),
            "boosting": boosting,
            "boosting with the mean of the day": boosting_with_mean(2),
        },
        {"CP, defaults": cp(), "Tucker, defaults": tucker()},
    )
    smooth = Mode(kernel="matern32")
    data = tensor_data.wind_stations()
    stations = table(
        data,
        {
            "constant": constant,
            "mean of month": additive([lambda X: X[:, 2] // (365.25 / 12)]),
            "interpolated mean of the day": interpolated_mean(3),
            "boosting": boosting,
            "boosting with the mean of the day": boosting_with_mean(3),
        },
        {"CP, defaults": cp(), "CP, smooth in space": cp(modes=[smooth, smooth, *data.modes[2:]])},
    )
    return [{"held out": "entries", **row} for row in entries] + [{"held out": "2 stations", **row} for row in stations]


def coads_ocean(args: argparse.Namespace) -> list[Row]:
    """Nine tenths of the grid from one tenth."""
    return compared(
        "coads_ocean",
        {
            "constant": constant,
            "zonal mean of the month": additive([0, 1]),
            "nearest neighbour": between_points(linear=False),
            "linear interpolation": between_points(linear=True),
            "boosting": boosting,
            "exact GP on 6000 rows, ARD Matern 3/2": exact_gp("matern32", spread=False),
        },
        {"CP, defaults": cp(), "Tucker, defaults": tucker()},
    )


def us_diseases(args: argparse.Namespace) -> list[Row]:
    """A fifth of the entries at random."""
    return compared(
        "us_diseases",
        {
            "constant": constant,
            "disease and year": additive([0, 2]),
            "disease and year + disease and state": additive([0, 2], [0, 1]),
            "years interpolated, by disease and state": within((0, 1), 2),
            "boosting": boosting,
        },
        {"CP, defaults": cp(), "Tucker, defaults": tucker()},
    )
