"""What the loaders share: one record per data set, one way to describe it, one error when a package is absent."""

import importlib
from typing import Any

import numpy as np

__all__ = ["decimal_years", "describe", "need", "series"]


def need(module: str, loader: str) -> Any:
    """Import a module of an optional package, or say how to install it."""
    root = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but cannot find one of its own dependencies keeps its own message.
        if (error.name or "").partition(".")[0] != root:
            raise
        raise ImportError(f'{loader} needs {root}; install it with pip install "stochproc[data]"') from error


def describe(title: str, *, origin: str, units: str, licence: str, missing: str = "none") -> str:
    """Text of the field ``DESCR``."""
    return f"{title}\n\nOrigin: {origin}\nUnits: {units}\nMissing values: {missing}\nLicence: {licence}\n"


def series(return_X_y: bool, times: Any, values: Any, feature_names: list[str], DESCR: str, **fields: Any) -> Any:
    """Record of a time series, or ``(X, y)`` without the rows in which something is missing."""
    from sklearn.utils import Bunch

    times, values = np.array(times, dtype=np.float64), np.array(values, dtype=np.float64)
    if return_X_y:
        known = np.isfinite(values.reshape(len(values), -1)).all(1)
        return times[known, None], values[known]
    # Not `values`: that is a method of every dictionary, Bunch too.
    return Bunch(times=times, target=values, feature_names=feature_names, DESCR=DESCR, **fields)


def decimal_years(dates: np.ndarray) -> np.ndarray:
    """Dates as years with decimals: the day's beginning, 2000-07-01 is 2000 + 182/366."""
    days = dates.astype("datetime64[D]")
    years = days.astype("datetime64[Y]")
    start, end = years.astype("datetime64[D]"), (years + 1).astype("datetime64[D]")
    return years.astype(np.int64) + 1970 + (days - start) / (end - start)
