"""Parameters of the regressor: their checks, and the kernel and the device that they describe."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch

from stochproc._checks import check_choice, check_integer, check_positive
from stochproc.kernels import Kernel, Periodic, Radial, Scale, as_kernel
from stochproc.solvers import LBFGS

__all__ = ["DTYPES", "as_device", "check_parameters", "make_kernel", "plain_bool"]

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def check_parameters(estimator: Any) -> None:
    """Raise TypeError or ValueError, naming the parameter, unless all are of the right kind and in range."""
    check_choice("noise_model", estimator.noise_model, ("scaled",))
    check_choice("mean", estimator.mean, ("constant", "zero"))
    check_choice("normalize_X", plain_bool(estimator.normalize_X), (True, False, "global"))
    check_choice("normalize_y", plain_bool(estimator.normalize_y), (True, False))
    if not isinstance(estimator.optimizer, LBFGS):
        check_choice("optimizer", estimator.optimizer, ("lbfgs", None))
    check_integer("n_restarts", estimator.n_restarts, 1)
    check_choice("solver", estimator.solver, ("auto", "cholesky"))
    check_choice("dtype", estimator.dtype, tuple(DTYPES))
    check_positive("noise", estimator.noise, zero=True)
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


def make_kernel(kernel: Any, n_columns: int, searched: bool) -> Kernel:
    """Return a copy of the kernel that a parameter describes, in float64 and ready for a search.

    Raises
    ------
    TypeError
        If it describes none.
    ValueError
        If its name is unknown or its hyperparameters are a batch.
    """
    named = isinstance(kernel, str)
    made = as_kernel(kernel if named else copy.deepcopy(kernel), n_columns=n_columns)
    batches: list[Any] = [getattr(m, "batch_shape", ()) for m in made.modules()]
    if any(batches):
        batch = tuple(next(filter(None, batches)))
        raise ValueError(f"kernel must be a single one, without batch_shape; got a batch of shape {batch}.")
    if isinstance(made, Scale):
        made.log_outputscale.requires_grad_(False)
    if named and searched and isinstance(made, Radial) and not isinstance(made, Periodic):
        # Standardised points are about sqrt(2 d) apart: from a lengthscale of 1 a search with many columns
        # starts at a kernel matrix that is the identity, with no gradient to follow.
        made.lengthscale = math.sqrt(n_columns)
    # GPyTorch's parameters are float32 unless asked, too coarse for the search.
    return made.double()
