"""Options that the estimators share: how to search, in which precision and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stochproc._checks import check_choice, check_integer
from stochproc.solvers import LBFGS

__all__ = ["DTYPES", "as_device", "check_options", "plain_bool"]

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def check_options(estimator: Any, *, automatic_starts: bool = False) -> None:
    """Check what every Gaussian process estimator takes; TypeError or ValueError naming the parameter.

    ``automatic_starts`` lets ``n_restarts`` be "auto".
    """
    check_choice("mean", estimator.mean, ("constant", "zero"))
    check_choice("normalize_y", plain_bool(estimator.normalize_y), (True, False))
    if not isinstance(estimator.optimizer, LBFGS):
        check_choice("optimizer", estimator.optimizer, ("lbfgs", None))
    if not (automatic_starts and isinstance(estimator.n_restarts, str) and estimator.n_restarts == "auto"):
        check_integer("n_restarts", estimator.n_restarts, 1)
    check_integer("verbose", int(estimator.verbose) if isinstance(estimator.verbose, bool) else estimator.verbose, 0)


def plain_bool(value: Any) -> Any:
    """Return NumPy's booleans, which a grid search over an array passes, as Python's, and anything else as it is."""
    return bool(value) if isinstance(value, np.bool_) else value


def as_device(value: Any) -> torch.device:
    """Return a device that can be computed on, or raise ValueError."""
    try:
        device = torch.device("cpu" if value is None else value)
        torch.empty(0, device=device)
    # Builds without a device's support raise AssertionError or NotImplementedError.
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ValueError(
            f"device must be None or a device of this machine, such as 'cpu'; got {value!r}: {reason}."
        ) from None
    return device
