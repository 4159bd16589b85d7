"""Parameters of the classifier: their checks, and the weights of rows that they and the data describe."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor

from stochproc._base import as_array
from stochproc._checks import check_choice, check_integer, check_positive
from stochproc._options import DTYPES, plain_bool
from stochproc.gp._svi_links import LINK_NAMES

__all__ = ["check_parameters", "merged_rows", "row_weights"]


def check_parameters(estimator: Any) -> None:
    """Raise TypeError or ValueError, naming the parameter, unless all are of the right kind and in range."""
    check_choice("link", estimator.link, (*LINK_NAMES, "gaussian"))
    check_choice("coupling", estimator.coupling, ("scaled", "fixed"))
    check_choice("covariance", estimator.covariance, ("auto", "full", "diag", "lowrank"))
    check_choice("scale_family", estimator.scale_family, ("inverse_gamma", "lognormal"))
    check_choice("inducing", estimator.inducing, ("random", "kmeans++"))
    check_choice("optimizer", estimator.optimizer, ("adam", None))
    check_choice("normalize_X", plain_bool(estimator.normalize_X), (True, False, "global"))
    check_choice("dtype", estimator.dtype, tuple(DTYPES))
    for name in ("n_inducing", "batch_size", "n_samples", "n_samples_predict"):
        check_integer(name, getattr(estimator, name), 1)
    if estimator.max_epochs is not None:
        check_integer("max_epochs", estimator.max_epochs, 1)
    check_positive("learning_rate", estimator.learning_rate)
    check_positive("tol", estimator.tol, zero=True)
    check_positive("noise", estimator.noise, zero=True)
    check_integer("verbose", int(estimator.verbose) if isinstance(estimator.verbose, bool) else estimator.verbose, 0)


def row_weights(estimator: Any, X: np.ndarray, y: np.ndarray, sample_weight: Any) -> np.ndarray | None:
    """Return weights of rows times those of their classes, or None where all are one.

    Raises
    ------
    ValueError
        If a weight is negative or not finite, all are zero, or one is neither 0 nor 1 where the model is an exact
        regression.
    """
    if sample_weight is None and estimator.class_weight is None:
        return None
    weight = _check_sample_weight(as_array(sample_weight), X, dtype=np.float64, ensure_non_negative=True)
    name = "sample_weight"
    if estimator.class_weight is not None:
        name = "class_weight" if sample_weight is None else "sample_weight times class_weight"
        weight = weight * _class_weights(estimator.class_weight, y, weight)
        bad = ~(np.isfinite(weight) & (weight >= 0))
        if bad.any():
            raise ValueError(f"{name} must be finite and non-negative; got {weight[bad][0]}.")
    if not weight.any():
        raise ValueError(f"{name} must not be zero for all rows.")
    if estimator.link == "gaussian" and not np.isin(weight, (0, 1)).all():
        raise ValueError(
            f"{name} must be 0 or 1 with link='gaussian': in an exact regression every row has the same noise; "
            f"got {weight[~np.isin(weight, (0, 1))][0]}."
        )
    return weight


def _class_weights(class_weight: Any, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weights of the classes by row; rows that count twice do so where classes are balanced, too."""
    by_row = compute_sample_weight(class_weight, y)
    if isinstance(class_weight, str):
        _, labels = np.unique(y, return_inverse=True)
        mass = np.bincount(labels, weights=weight)
        by_row = weight.sum() / (np.count_nonzero(mass) * np.where(mass > 0, mass, 1.0)[labels])
    return by_row


def merged_rows(
    X: Float[Tensor, "n d"], y: Int[Tensor, " n"], weight: Float[Tensor, " n"] | None
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " k"], Float[Tensor, " k"] | None]:
    """Return the distinct rows with their classes, sorted, and how often each counts (None where all count once).

    A row that occurs twice then is the row of weight two to the last bit, random mini-batches and all.
    """
    rows, place = torch.unique(torch.cat([X, y[:, None].to(X)], 1), dim=0, return_inverse=True)
    total = X.new_zeros(len(rows)).index_add_(0, place, X.new_ones(len(X)) if weight is None else weight)
    return rows[:, :-1].contiguous(), rows[:, -1].to(y), None if bool((total == 1).all()) else total
