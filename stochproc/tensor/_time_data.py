"""Times, targets with missing values, and known variances, checked and brought into one form."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array
from torch import Tensor

from stochproc._base import as_array
from stochproc._checks import check_positive
from stochproc._persistence import as_tensor
from stochproc._standardise import Standardiser
from stochproc.exceptions import DataWarning

__all__ = ["as_column", "as_target", "known_noise", "standardiser_of"]


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
    """Return targets as a float64 vector, or matrix of one column an output, in which NaN may stand for missing."""
    if y is None:
        raise ValueError("y must be given: the estimator requires y to be passed, but the target y is None.")
    y = as_array(y)
    if np.ma.isMaskedArray(y):
        y = np.ma.filled(y.astype(np.float64), np.nan)
    finite: Any = "allow-nan" if missing else True
    try:
        target = check_array(
            y,
            ensure_2d=False,
            allow_nd=True,
            dtype=np.float64,
            ensure_all_finite=finite,
            ensure_min_samples=0,
            input_name="y",
        )
    except ValueError as error:
        if "y" in str(error).split() or not str(error).startswith("could not convert"):
            raise
        raise ValueError(f"y must hold real numbers: {error}.") from None
    if target.ndim not in (1, 2) or 0 in target.shape[1:]:
        raise ValueError(f"y must have shape (n_samples,) or (n_samples, n_outputs); got {target.shape}.")
    return target


def known_noise(noise: Any, n: int, n_outputs: int | None, device: torch.device) -> Tensor:
    """Return known variances in squared units of y, (n,), or (n_outputs, n) where they differ by output.

    None is zero. ``n_outputs`` is None for one output without an axis of its own.
    """
    if noise is None:
        return torch.zeros(n, dtype=torch.float64, device=device)
    noise = as_array(noise)
    if np.ndim(noise) == 0:
        value = noise.item() if isinstance(noise, np.ndarray) else noise
        check_positive("noise", value, zero=True)
        return torch.full((n,), float(value), dtype=torch.float64, device=device)
    variances = check_array(noise, ensure_2d=False, allow_nd=True, dtype=np.float64, input_name="noise")
    if variances.ndim == 2 and variances.shape[1] == 1:
        variances = variances[:, 0]
    if variances.shape not in ((n,), (n, n_outputs)):
        values = "" if n_outputs is None else f", or one a value of y, ({n}, {n_outputs})"
        raise ValueError(f"noise must be one number or one a row of X, {n}{values}; got shape {variances.shape}.")
    if (variances < 0).any():
        raise ValueError(f"noise must be non-negative; got {variances.min()}.")
    return as_tensor(variances.T, torch.float64, device)


def standardiser_of(y: Tensor, how: bool) -> Standardiser:
    """Learn centre and scale of each output (p, n) from what was observed of it.

    Raises
    ------
    ValueError
        If an output has no observed value, or its squares would overflow or vanish.

    Warns
    -----
    DataWarning
        If an output does not vary.
    """
    found, flat = [], []
    for k, values in enumerate(y):
        name = "y" if len(y) == 1 else f"output {k} of y"
        seen = values[~values.isnan()][:, None]
        if not len(seen):
            raise ValueError(f"{name} must hold at least one observed value; got NaN in every row.")
        size = seen.abs().max().item()
        if size > 0 and not 1e-140 < size < 1e140:
            raise ValueError(f"{name} must have entries between 1e-140 and 1e140 in size; got {size:.3g}. Rescale it.")
        found.append(Standardiser.fit(seen, how, "y"))
        if len(seen) > 1 and bool((seen == seen[0]).all()):
            flat.append(name)
    if flat:
        warnings.warn(
            f"{' and '.join(flat)} does not vary; it is centred and keeps unit scale.", DataWarning, stacklevel=4
        )
    return Standardiser(torch.cat([m.shift for m in found]), torch.cat([m.scale for m in found]))
