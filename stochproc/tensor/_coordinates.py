"""Columns of X as coordinates: numbers, phases of a period, categories; and where rows are among distinct points."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import validate_data
from torch import Tensor

from stochproc._base import FLOATS, as_array
from stochproc.exceptions import DataWarning
from stochproc.tensor._modes import Mode

__all__ = ["as_coordinates", "as_known", "column_name", "columns_of", "distinct", "place", "warn_if_coarse"]


def column_name(estimator: Any, k: int) -> str:
    """How messages call a column."""
    names = getattr(estimator, "feature_names_in_", None)
    return f"column {k}" if names is None else f"column {k} ({names[k]!r})"


def columns_of(estimator: Any, X: Any, modes: Sequence[Mode] | None, *, reset: bool) -> list[np.ndarray]:
    """Return the columns of X: float64 for coordinates on a line, of any type for categories.

    ``modes`` may be None, when all are numbers. TypeError or ValueError naming the column.
    """
    X = as_array(X)
    if np.ma.isMaskedArray(X):
        raise TypeError("X must hold numbers and categories; got a masked array. Leave missing entries out.")
    _refuse_dates(X, modes)
    plain = modes is None or not any(m.kind == "discrete" for m in modes)
    if plain:
        table: Any = validate_data(estimator, X, dtype=FLOATS, ensure_all_finite=False, reset=reset)
        found = [np.asarray(table[:, k], dtype=np.float64) for k in range(table.shape[1])]
    else:
        if hasattr(X, "dtypes") and len(set(X.dtypes)) > 1:
            # Each column as it is: a common type would round whole numbers, or not exist.
            X = X.astype(object)
        table = validate_data(estimator, X, dtype=None, ensure_all_finite=False, reset=reset)
        found = [np.asarray(table[:, k]) for k in range(table.shape[1])]
    if modes is None:
        modes = [Mode()] * len(found)
    if len(modes) != len(found):
        raise ValueError(f"modes must have one entry a column of X, {len(found)}; got {len(modes)}.")
    return [
        as_coordinates(estimator, column, mode, k) for k, (column, mode) in enumerate(zip(found, modes, strict=True))
    ]


def _refuse_dates(X: Any, modes: Sequence[Mode] | None) -> None:
    """Raise TypeError for dates as coordinates, which scikit-learn would turn into whole numbers in silence."""
    dtypes = list(X.dtypes) if hasattr(X, "dtypes") and getattr(X, "ndim", 0) == 2 else [getattr(X, "dtype", None)]
    for k, dtype in enumerate(dtypes):
        discrete = modes is not None and k < len(modes) and modes[k].kind == "discrete"
        if getattr(dtype, "kind", None) in ("m", "M") and not discrete:
            names = getattr(X, "columns", None)
            where = f"column {k}" if names is None else f"column {k} ({names[k]!r})"
            raise TypeError(
                f"X must hold numbers in {where}; got dates. Pass for instance "
                "(dates - dates[0]) / numpy.timedelta64(1, 'D')."
            )


def as_coordinates(estimator: Any, column: np.ndarray, mode: Mode, k: int) -> np.ndarray:
    """Check one column; phases are brought into [0, period)."""
    if mode.kind == "discrete":
        return _categories(estimator, column, k)
    numbers = _numbers(estimator, column, k)
    if mode.period is not None:
        numbers = np.mod(numbers, mode.period)
        # The remainder of a tiny negative number rounds to the period itself.
        numbers[numbers >= mode.period] = 0.0
    return numbers


def _numbers(estimator: Any, column: np.ndarray, k: int) -> np.ndarray:
    if column.dtype.kind in ("m", "M"):
        raise TypeError(
            f"X must hold numbers in {column_name(estimator, k)}; got dates. Pass for instance "
            "(dates - dates[0]) / numpy.timedelta64(1, 'D')."
        )
    try:
        numbers = column.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"X must hold numbers in {column_name(estimator, k)}: {error}. Name it 'discrete' in modes if it holds "
            "categories."
        ) from None
    bad = ~np.isfinite(numbers)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        what = "NaN" if np.isnan(numbers[row]) else "infinity"
        raise ValueError(f"X must be finite; got {what} in row {row} of {column_name(estimator, k)}.")
    # 0.0 and -0.0 are one point.
    return numbers + 0.0


def _categories(estimator: Any, column: np.ndarray, k: int) -> np.ndarray:
    """Numbers as float64, anything else as text."""
    missing = np.zeros(len(column), dtype=bool)
    if column.dtype.kind in "fmM":
        missing = column != column
    elif column.dtype.kind == "O":
        missing = np.asarray([_is_missing(value) for value in column], dtype=bool)
    if missing.any():
        row = int(np.flatnonzero(missing)[0])
        raise ValueError(f"X must hold a category in every row; got NaN in row {row} of {column_name(estimator, k)}.")
    plain = column.dtype.kind in "biuf" or (column.dtype.kind == "O" and all(map(_is_number, column)))
    if not plain:
        return np.asarray([_text(value) for value in column], dtype=object)
    numbers = column.astype(np.float64) + 0.0
    if not np.isfinite(numbers).all():
        row = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise ValueError(f"X must be finite; got infinity in row {row} of {column_name(estimator, k)}.")
    if (np.abs(numbers) >= 2**53).any():
        row = int(np.flatnonzero(np.abs(numbers) >= 2**53)[0])
        raise ValueError(
            f"X must hold categories below 2**53 in size if they are numbers; got {column[row]} in row {row} of "
            f"{column_name(estimator, k)}, which float64 cannot tell from its neighbours. Pass them as text."
        )
    return numbers


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:
        # pandas.NA is neither equal nor unequal to anything.
        return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.bool_))


def _text(value: Any) -> str:
    """Text of a category; that of a number is the same for all its types."""
    if isinstance(value, bytes):
        return value.decode()
    if not _is_number(value):
        return str(value)
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def as_known(estimator: Any, column: np.ndarray, categories: np.ndarray | None, k: int) -> np.ndarray:
    """Bring categories to the kind, text or numbers, of those that the fit saw; ValueError if they cannot be."""
    if categories is None or (column.dtype.kind == "O") == (categories.dtype.kind == "O"):
        return column
    if categories.dtype.kind == "O":
        return np.asarray([_text(value) for value in column], dtype=object)
    try:
        return column.astype(np.float64)
    except ValueError as error:
        raise ValueError(f"X must hold numbers in {column_name(estimator, k)}, as in fit: {error}.") from None


def distinct(column: np.ndarray, mode: Mode, device: torch.device) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """Return the distinct points (numbers of categories for a discrete mode), where rows are, and categories."""
    values, index = np.unique(column, return_inverse=True)
    where = torch.as_tensor(index.reshape(-1), dtype=torch.int64, device=device)
    if mode.kind == "discrete":
        return torch.arange(len(values), dtype=torch.float64, device=device), where, values
    return torch.as_tensor(values, dtype=torch.float64, device=device), where, None


def place(column: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """Return the number of each category, and numbers from ``len(categories)`` on for unknown ones, as float64."""
    values, index = np.unique(column, return_inverse=True)
    where = np.searchsorted(categories, values)
    where[where == len(categories)] = 0
    known = np.asarray([categories[w] == v for w, v in zip(where, values, strict=True)], dtype=bool)
    numbers = np.where(known, where, 0).astype(np.float64)
    numbers[~known] = len(categories) + np.arange((~known).sum())
    return numbers[index.reshape(-1)]


def warn_if_coarse(estimator: Any, points: Sequence[Tensor], modes: Sequence[Mode], stacklevel: int) -> None:
    """Warn where the points of a mode span so little of their size that their differences have few digits."""
    for k, (p, mode) in enumerate(zip(points, modes, strict=True)):
        span, size = float(p[-1] - p[0]), float(p.abs().max())
        if mode.kind == "continuous" and 0 < span < 1e-12 * size:
            warnings.warn(
                f"X spans {span:.3g} at values of {size:.3g} in {column_name(estimator, k)}: differences of its points "
                "have few digits left. Subtract the first value before fitting.",
                DataWarning,
                stacklevel=stacklevel,
            )
