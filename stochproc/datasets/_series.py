"""Time series that come with statsmodels: rivers, the air, the Sun, the sea and an economy."""

from typing import Any

import numpy as np

from stochproc.datasets._bunch import decimal_years, describe, need, series

__all__ = ["load_co2", "load_elnino", "load_macrodata", "load_nile", "load_sunspots"]

_PUBLIC = "public domain; copy distributed by statsmodels"


def load_nile(*, return_X_y: bool = False) -> Any:
    """Load the yearly flow of the Nile at Aswan, 1871 to 1970, whose level drops in 1899.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (100,) years, ``target`` (100,) in 1e8 m³, ``feature_names``, ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If statsmodels is not installed; the message says how to get it.

    Examples
    --------
    >>> float(load_nile().target.mean())
    919.35
    """
    frame = _frame("nile", "load_nile")
    DESCR = describe(
        "Yearly flow of the Nile at Aswan, 1871 to 1970.",
        origin="G. W. Cobb, Biometrika 65 (1978) 243-251",
        units="times in years, target in 1e8 cubic metres a year",
        licence=_PUBLIC,
    )
    return series(return_X_y, frame["year"], frame["volume"], ["volume"], DESCR)


def load_co2(*, return_X_y: bool = False) -> Any:
    """Load the weekly carbon dioxide in the air over Mauna Loa, March 1958 to December 2001.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` of the 2225 weeks that were measured instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (2284,) years with decimals, ``dates`` (2284,) the same as datetime64[D] (Saturdays), ``target``
        (2284,) in parts per million by volume with NaN in 59 weeks, ``feature_names``, ``DESCR``.

    Raises
    ------
    ImportError
        If statsmodels is not installed; the message says how to get it.
    """
    frame = _frame("co2", "load_co2")
    dates = frame.index.to_numpy().astype("datetime64[D]")
    DESCR = describe(
        "Weekly carbon dioxide in the air over Mauna Loa, Hawaii, 1958 to 2001.",
        origin="C. D. Keeling and T. P. Whorf, Scripps Institution of Oceanography, through CDIAC (2004)",
        units="times in years, target in parts per million by volume",
        missing="NaN in 59 of 2284 weeks",
        licence=_PUBLIC,
    )
    return series(return_X_y, decimal_years(dates), frame["co2"], ["co2"], DESCR, dates=dates)


def load_sunspots(*, return_X_y: bool = False) -> Any:
    """Load the yearly number of sunspots, 1700 to 2008.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (309,) years, ``target`` (309,) yearly mean counts, ``feature_names``, ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If statsmodels is not installed; the message says how to get it.
    """
    frame = _frame("sunspots", "load_sunspots")
    DESCR = describe(
        "Yearly mean number of sunspots, 1700 to 2008.",
        origin="NOAA National Geophysical Data Center",
        units="times in years, target holds relative sunspot numbers",
        licence=_PUBLIC,
    )
    return series(return_X_y, frame["YEAR"], frame["SUNACTIVITY"], ["sunspots"], DESCR)


def load_elnino(*, return_X_y: bool = False) -> Any:
    """Load the monthly temperature of the Pacific off Peru, 1950 to 2010, as 61 curves of 12 months.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target in one row)`` with 732 months instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``data`` (61, 12) in degrees Celsius, ``years`` (61,), ``times`` (732,) middles of the months in years,
        ``target`` (732,) the same temperatures in one row, ``feature_names`` the months, ``DESCR``. Nothing is
        missing.

    Raises
    ------
    ImportError
        If statsmodels is not installed; the message says how to get it.
    """
    frame = _frame("elnino", "load_elnino")
    years = frame["YEAR"].to_numpy(dtype=np.float64)
    months = frame.drop(columns="YEAR")
    data = months.to_numpy(dtype=np.float64)
    times = (years[:, None] + (np.arange(12) + 0.5) / 12).ravel()
    DESCR = describe(
        "Monthly mean temperature of the sea surface in the region Nino 1+2, 1950 to 2010.",
        origin="NOAA National Weather Service, ERSST.V3B",
        units="times in years (middles of the months), target in degrees Celsius",
        licence=_PUBLIC,
    )
    names = [str(name).capitalize() for name in months.columns]
    return series(return_X_y, times, data.ravel(), names, DESCR, data=data, years=years)


def load_macrodata(*, return_X_y: bool = False) -> Any:
    """Load twelve quarterly series of the economy of the United States, 1959 to 2009.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (203,) beginnings of the quarters in years, ``target`` (203, 12), ``feature_names``, ``DESCR``.
        Nothing is missing.

    Raises
    ------
    ImportError
        If statsmodels is not installed; the message says how to get it.
    """
    frame = _frame("macrodata", "load_macrodata")
    values = frame.drop(columns=["year", "quarter"])
    DESCR = describe(
        "Quarterly economy of the United States, first quarter of 1959 to third of 2009.",
        origin="Federal Reserve Bank of St. Louis; unemployment from the National Bureau of Labor Statistics",
        units="times in years; realgdp, realcons, realinv, realgovt, realdpi in 1e9 dollars of 2005 a year; cpi an "
        "index; m1 in 1e9 dollars; tbilrate, unemp, infl, realint in per cent; pop in millions of people",
        licence=_PUBLIC,
    )
    times = frame["year"] + (frame["quarter"] - 1) / 4
    return series(return_X_y, times, values, list(values.columns), DESCR)


def _frame(name: str, loader: str) -> Any:
    return need(f"statsmodels.datasets.{name}", loader).load_pandas().data
