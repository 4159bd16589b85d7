"""Financial and price series that come with arch, and the volatility that their daily range reveals."""

import math
from typing import Any

import numpy as np

from stochproc.datasets._bunch import decimal_years, describe, need, series

__all__ = [
    "load_bond_yields",
    "load_core_cpi",
    "load_crude",
    "load_french_factors",
    "load_nasdaq",
    "load_sp500",
    "load_sp500_volatility",
    "load_vix",
    "load_wti",
]

_COPY = "copy distributed by arch (NCSA licence); no licence is stated for the numbers"
_DAYS = "times count the rows, one a trading day"


def load_sp500(*, return_X_y: bool = False) -> Any:
    """Load daily prices of the S&P 500 index, 1999 to 2018.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (5031,) number of the trading day from 0, ``dates`` (5031,) datetime64[D], ``target`` (5031, 6) with
        the columns ``feature_names``: open, high, low, close, adjusted close (index points), volume (shares),
        ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If arch is not installed; the message says how to get it.
    """
    return _index("sp500", "load_sp500", "S&P 500", return_X_y)


def load_nasdaq(*, return_X_y: bool = False) -> Any:
    """Load daily prices of the NASDAQ Composite index, 1999 to 2018.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        The fields of ``load_sp500``, 5031 days.

    Raises
    ------
    ImportError
        If arch is not installed; the message says how to get it.
    """
    return _index("nasdaq", "load_nasdaq", "NASDAQ Composite", return_X_y)


def load_sp500_volatility(*, return_X_y: bool = False) -> Any:
    r"""Load the daily log volatility of the S&P 500 by Parkinson's estimator from high and low, 1999 to 2018.

    The variance of a day is estimated by :math:`(\log H - \log L)^2 / (4 \log 2)`, which is unbiased for a Brownian
    log price and has a fifth of the variance of the squared return. Its logarithm is rough: the variogram grows
    with a Hurst index of about 0.1, which the noise of the estimator lowers.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (5031,) number of the trading day from 0, ``dates`` (5031,) datetime64[D], ``target`` (5031,) log of
        the daily volatility (a standard deviation), ``variance`` (5031,) Parkinson's estimate itself,
        ``feature_names``, ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If arch is not installed; the message says how to get it.

    References
    ----------
    .. [1] M. Parkinson, "The extreme value method for estimating the variance of the rate of return", Journal of
       Business 53 (1980) 61-65.
    """
    frame, dates = _frame("sp500", "load_sp500_volatility")
    variance = np.log(frame["High"].to_numpy() / frame["Low"].to_numpy()) ** 2 / (4 * math.log(2))
    DESCR = describe(
        "Daily log volatility of the S&P 500 by Parkinson's estimator, 1999 to 2018.",
        origin="high and low prices of Yahoo! Finance",
        units=f"{_DAYS}; target holds log standard deviations of a day's log return",
        licence=_COPY,
    )
    times, values = np.arange(len(dates), dtype=np.float64), 0.5 * np.log(variance)
    names = ["log_volatility"]
    return series(return_X_y, times, values, names, DESCR, dates=dates, variance=variance)


def load_vix(*, return_X_y: bool = False) -> Any:
    """Load the daily VIX index of implied volatility, 2014 to 2018.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` of the 1259 days with a price instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (1305,) number of the weekday from 0, ``dates`` (1305,) datetime64[D], ``target`` (1305,) in per cent
        a year with NaN on 46 holidays, ``feature_names``, ``DESCR``.

    Raises
    ------
    ImportError
        If arch is not installed; the message says how to get it.
    """
    return _daily("vix", "load_vix", "VIX", "per cent a year", "46 of 1305 weekdays", return_X_y)


def load_wti(*, return_X_y: bool = False) -> Any:
    """Load the daily price of West Texas Intermediate crude oil, 1986 to 2018.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` of the 8321 days with a price instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (8611,) number of the weekday from 0, ``dates`` (8611,) datetime64[D], ``target`` (8611,) in dollars a
        barrel with NaN on 290 holidays, ``feature_names``, ``DESCR``.

    Raises
    ------
    ImportError
        If arch is not installed; the message says how to get it.
    """
    return _daily("wti", "load_wti", "WTI crude oil", "dollars a barrel", "290 of 8611 weekdays", return_X_y)


def load_crude(*, return_X_y: bool = False) -> Any:
    """Load the monthly prices of Brent and West Texas Intermediate crude oil, 1987 to 2020.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (393,) years with decimals, ``dates`` (393,) datetime64[D], ``target`` (393, 2) in dollars a barrel,
        ``feature_names``, ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If arch is not installed; the message says how to get it.
    """
    title = "Monthly price of Brent and WTI crude oil, 1987 to 2020."
    return _monthly("crude", "load_crude", title, "dollars a barrel", return_X_y)


def load_bond_yields(*, return_X_y: bool = False) -> Any:
    """Load the monthly yields of corporate bonds rated AAA and BAA, 1919 to 2018.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (1200,) years with decimals, ``dates`` (1200,) datetime64[D], ``target`` (1200, 2) in per cent a year,
        ``feature_names``, ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If arch is not installed; the message says how to get it.
    """
    title = "Monthly yield of corporate bonds rated AAA and BAA, 1919 to 2018."
    return _monthly("default", "load_bond_yields", title, "per cent a year", return_X_y)


def load_core_cpi(*, return_X_y: bool = False) -> Any:
    """Load the monthly consumer prices of the United States without food and energy, 1957 to 2018.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (743,) years with decimals, ``dates`` (743,) datetime64[D], ``target`` (743,) with 100 the mean of
        1982 to 1984, ``feature_names``, ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If arch is not installed; the message says how to get it.
    """
    title = "Monthly consumer price index of the United States less food and energy, 1957 to 2018."
    return _monthly("core_cpi", "load_core_cpi", title, "index, 100 in 1982 to 1984", return_X_y)


def load_french_factors(*, return_X_y: bool = False) -> Any:
    """Load the monthly market, size and value factors of Fama and French and the riskless rate, 1926 to 2018.

    Parameters
    ----------
    return_X_y : bool, default=False
        Return ``(times as a column, target)`` instead.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (1109,) years with decimals, ``dates`` (1109,) first days of the months as datetime64[D], ``target``
        (1109, 4) in per cent a month, ``feature_names``, ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If arch is not installed; the message says how to get it.
    """
    title = "Monthly factors of Fama and French: market less riskless rate, size, value; 1926 to 2018."
    return _monthly("frenchdata", "load_french_factors", title, "per cent a month", return_X_y, "K. R. French")


def _frame(name: str, loader: str) -> tuple[Any, np.ndarray]:
    frame = need(f"arch.data.{name}", loader).load()
    # The months of French's file, 192607 and on, arrive as so many units after 1970.
    code = np.asarray(frame.index.asi8)
    if code.max() < 1_000_000:
        return frame, (code // 100 * 12 + code % 100 - 1970 * 12 - 1).astype("datetime64[M]").astype("datetime64[D]")
    return frame, frame.index.to_numpy().astype("datetime64[D]")


def _index(name: str, loader: str, title: str, return_X_y: bool) -> Any:
    frame, dates = _frame(name, loader)
    DESCR = describe(
        f"Daily open, high, low and close of the {title} index, 1999 to 2018.",
        origin="Yahoo! Finance",
        units=f"{_DAYS}; prices in index points, volume in shares",
        licence=_COPY,
    )
    names = [str(c).lower().replace("adj ", "adjusted_") for c in frame.columns]
    return series(return_X_y, np.arange(len(dates)), frame, names, DESCR, dates=dates)


def _daily(name: str, loader: str, title: str, units: str, missing: str, return_X_y: bool) -> Any:
    frame, dates = _frame(name, loader)
    DESCR = describe(
        f"Daily {title}, {dates[0]} to {dates[-1]}.",
        origin="FRED, Federal Reserve Bank of St. Louis",
        units=f"times count the rows, one a weekday; target in {units}",
        missing=f"NaN on {missing} (holidays)",
        licence=_COPY,
    )
    return series(return_X_y, np.arange(len(dates)), frame.iloc[:, 0], [name], DESCR, dates=dates)


def _monthly(
    name: str,
    loader: str,
    title: str,
    units: str,
    return_X_y: bool,
    origin: str = "FRED, Federal Reserve Bank of St. Louis",
) -> Any:
    frame, dates = _frame(name, loader)
    DESCR = describe(title, origin=origin, units=f"times in years, target in {units}", licence=_COPY)
    values = frame.iloc[:, 0] if frame.shape[1] == 1 else frame
    names = [str(c) for c in frame.columns] if frame.shape[1] > 1 else [name]
    return series(return_X_y, decimal_years(dates), values, names, DESCR, dates=dates)
