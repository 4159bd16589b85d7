"""Parameters of the functional decompositions, checked and brought into one form."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array

from stochproc._base import as_array
from stochproc._checks import check_choice, check_integer, check_positive
from stochproc._options import plain_bool
from stochproc.kernels import Kernel
from stochproc.tensor._modes import KERNELS
from stochproc.tensor._starting_parts import Settings

__all__ = ["DIAGONAL_FROM", "MAX_CORE", "resolve", "weights_of"]

# Entries of the core from which its posterior is independent by entry, and beyond which it is refused.
DIAGONAL_FROM = 1024
MAX_CORE = 4096

_FLAGS = (
    "learn_hyperparameters",
    "share_lengthscale",
    "learn_variance",
    "ard",
    "center",
    "early_stopping",
    "warm_start",
)


def resolve(estimator: Any, n_modes: int, *, tucker: bool) -> Settings:
    """Check every parameter; TypeError or ValueError naming it."""
    for name in _FLAGS:
        check_choice(name, plain_bool(getattr(estimator, name)), (True, False))
    check_choice("method", estimator.method, ("auto", "scan", "sequential"))
    check_choice("handle_unknown", estimator.handle_unknown, ("prior", "error"))
    check_positive("variance", estimator.variance)
    if estimator.noise is not None:
        check_positive("noise", estimator.noise)
    _in_range("damping", estimator.damping, 0.0, 1.0, low_open=False)
    _in_range("validation_fraction", estimator.validation_fraction, 0.0, 1.0, low_open=True)
    check_positive("tol", estimator.tol, zero=True)
    check_integer("max_iter", estimator.max_iter, 1)
    check_integer("n_init", estimator.n_init, 1)
    check_integer("chunk_size", estimator.chunk_size, 1)
    verbose = estimator.verbose
    check_integer("verbose", int(verbose) if isinstance(verbose, bool) else verbose, 0)
    if estimator.batch_size is not None:
        check_integer("batch_size", estimator.batch_size, 1)
    if isinstance(estimator.kernel, str):
        check_choice("kernel", estimator.kernel, KERNELS)
    elif not isinstance(estimator.kernel, Kernel):
        raise TypeError(f"kernel must be a name or a Kernel; got {type(estimator.kernel).__name__}.")
    ranks = _ranks(estimator.rank, n_modes, tucker)
    core: Any = 1.0
    if tucker:
        core = estimator.core_variance
        if isinstance(core, str):
            check_choice("core_variance", core, ("learn",))
        else:
            check_positive("core_variance", core)
    return Settings(
        tucker=tucker,
        ranks=ranks,
        kernel=estimator.kernel,
        lengthscale=_lengthscales(estimator.lengthscale, n_modes),
        variance=float(estimator.variance),
        noise=None if estimator.noise is None else float(estimator.noise),
        learn_hyperparameters=bool(estimator.learn_hyperparameters),
        share_lengthscale=bool(estimator.share_lengthscale),
        learn_variance=bool(estimator.learn_variance),
        ard=bool(estimator.ard),
        damping=float(estimator.damping),
        max_iter=int(estimator.max_iter),
        tol=float(estimator.tol),
        n_init=int(estimator.n_init),
        init=_init(estimator.init),
        method=estimator.method,
        chunk_size=int(estimator.chunk_size),
        batch_size=estimator.batch_size,
        core_variance=core,
        diagonal_core=tucker and math.prod(ranks) > DIAGONAL_FROM,
    )


def _in_range(name: str, value: Any, low: float, high: float, *, low_open: bool) -> None:
    """Check a number in (low, high) or [low, high)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}.")
    if not ((low < value if low_open else low <= value) and value < high):
        raise ValueError(f"{name} must lie in {'(' if low_open else '['}{low:g}, {high:g}); got {value}.")


def _ranks(rank: Any, n_modes: int, tucker: bool) -> tuple[int, ...]:
    if isinstance(rank, numbers.Integral):
        check_integer("rank", rank, 1)
        ranks = (int(rank),) * n_modes
    elif tucker and isinstance(rank, Sequence) and not isinstance(rank, str):
        if len(rank) != n_modes:
            raise ValueError(f"rank must have one entry a column of X, {n_modes}; got {len(rank)}.")
        for r in rank:
            check_integer("rank", r, 1)
        ranks = tuple(int(r) for r in rank)
    else:
        wanted = "an integer or a sequence of one integer a mode" if tucker else "an integer"
        raise TypeError(f"rank must be {wanted}; got {rank!r}.")
    if tucker and math.prod(ranks) > MAX_CORE:
        d = math.prod(ranks)
        raise ValueError(
            f"rank must give a core of at most {MAX_CORE} entries; got {d} from {ranks}, whose posterior would take "
            f"{3 * 8 * d**2 / 2**30:.3g} GiB. Lower the ranks, or use FunctionalCP."
        )
    return ranks


def _lengthscales(value: Any, n_modes: int) -> tuple[float | None, ...]:
    if value is None or isinstance(value, numbers.Real):
        values: list[Any] = [value] * n_modes
    elif (isinstance(value, Sequence) and not isinstance(value, str)) or isinstance(value, np.ndarray):
        values = list(value)
        if len(values) != n_modes:
            raise ValueError(f"lengthscale must have one entry a column of X, {n_modes}; got {len(values)}.")
    else:
        raise TypeError(f"lengthscale must be None, a number or one a mode; got {type(value).__name__}.")
    for one in values:
        if one is not None:
            check_positive("lengthscale", one)
    return tuple(None if one is None else float(one) for one in values)


def _init(value: Any) -> Any:
    if isinstance(value, str):
        check_choice("init", value, ("auto", "degree", "greedy", "random"))
        return value
    if not isinstance(value, Sequence):
        raise TypeError(f"init must be a name or a list of one array a mode; got {type(value).__name__}.")
    return [torch.tensor(np.asarray(as_array(m)), dtype=torch.float64) for m in value]


def weights_of(sample_weight: Any, n: int) -> np.ndarray:
    """Return the weights of n rows, non-negative; None is 1."""
    if sample_weight is None:
        return np.ones(n)
    if isinstance(sample_weight, numbers.Real):
        check_positive("sample_weight", float(sample_weight))
        return np.full(n, float(sample_weight))
    weight = check_array(as_array(sample_weight), ensure_2d=False, dtype=np.float64, input_name="sample_weight")
    if weight.shape != (n,):
        raise ValueError(f"sample_weight must have one entry a row of X, {n}; got shape {weight.shape}.")
    if (weight < 0).any():
        raise ValueError(f"sample_weight must be non-negative; got {weight.min()}.")
    return weight
