"""Times, targets with missing values, and known variances, checked and brought into one form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array, column_or_1d
from torch import Tensor

from stochproc._base import as_array
from stochproc._checks import check_positive
from stochproc._persistence import as_tensor

__all__ = ["as_column", "as_target", "known_noise"]


def as_column(X: Any) -> Any:
    """Return a vector of times as one column, anything else as it is; TypeError for dates."""
    X = as_array(X)
    if np.ma.isMaskedArray(X):
        raise TypeError("X must hold numbers; got a masked array. Mark what was not observed by NaN in y.")
    dtypes: list[Any] = (
        list(X.dtypes) if getattr(X, "ndim", 0) == 2 and hasattr(X, "dtypes") else [getattr(X, "dtype", None)]
    )
    if any(getattr(dtype, "kind", None) in ("m", "M") for dtype in dtypes) or type(X).__name__ == "PeriodIndex":
        raise TypeError(
            "X must hold numbers; got dates. Pass for instance (dates - dates[0]) / numpy.timedelta64(1, 'D')."
        )
    if getattr(X, "ndim", 0) == 1 and isinstance(getattr(X, "name", None), str) and hasattr(X, "to_frame"):
        return X.to_frame()
    flat = getattr(X, "ndim", 0) == 1 or (isinstance(X, (list, tuple)) and all(np.ndim(x) == 0 for x in X))
    return np.asarray(X).reshape(-1, 1) if flat else X


def as_target(y: Any, *, missing: bool) -> np.ndarray:
    """Return targets as a float64 vector in which NaN may stand for a missing value."""
    y = as_array(y)
    if np.ma.isMaskedArray(y):
        y = np.ma.filled(y.astype(np.float64), np.nan)
    finite: Any = "allow-nan" if missing else True
    try:
        target = check_array(
            y, ensure_2d=False, dtype=np.float64, ensure_all_finite=finite, ensure_min_samples=0, input_name="y"
        )
    except ValueError as error:
        if "y" in str(error).split() or not str(error).startswith("could not convert"):
            raise
        raise ValueError(f"y must hold real numbers: {error}.") from None
    return column_or_1d(target, warn=True)


def known_noise(noise: Any, n: int, device: torch.device) -> Tensor:
    """Return the known variances of n rows, in squared units of y; None is zero."""
    if noise is None:
        return torch.zeros(n, dtype=torch.float64, device=device)
    noise = as_array(noise)
    if np.ndim(noise) == 0:
        value = noise.item() if isinstance(noise, np.ndarray) else noise
        check_positive("noise", value, zero=True)
        return torch.full((n,), float(value), dtype=torch.float64, device=device)
    variances = check_array(noise, ensure_2d=False, dtype=np.float64, input_name="noise")
    if variances.ndim == 2 and variances.shape[1] == 1:
        variances = variances[:, 0]
    if variances.shape != (n,):
        raise ValueError(f"noise must be one number or one a row of X, {n}; got shape {variances.shape}.")
    if (variances < 0).any():
        raise ValueError(f"noise must be non-negative; got {variances.min()}.")
    return as_tensor(variances, torch.float64, device)
