"""Whole grids of entries: predictions on them, and their entries as rows."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc._base import Given, as_array
from stochproc.tensor._links import Link, TuckerLink
from stochproc.tensor._packed import multiplicity, outer

__all__ = ["dense_moments", "from_dense"]


def dense_moments(link: Link, means: Sequence[Tensor], covs: Sequence[Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """E f, and E f^2 if covariances are given, at every combination of points; (m_1, .., m_K)."""
    if isinstance(link, TuckerLink):
        mean = reduce(_contract, means, link.mean)
        if covs is None:
            return mean, None
        return mean, reduce(_contract, [c + outer(m) for m, c in zip(means, covs, strict=True)], link.folded)
    mean = _sum_of_products(means)
    if covs is None:
        return mean, None
    seconds = [c + outer(m) for m, c in zip(means, covs, strict=True)]
    seconds[0] = seconds[0] * multiplicity(means[0].shape[1], seconds[0])
    return mean, _sum_of_products(seconds)


def _contract(core: Tensor, table: Tensor) -> Tensor:
    """Put points (m, r) in the place of the first axis of the core, at its end."""
    return torch.tensordot(core, table, dims=([0], [1]))


def _sum_of_products(tables: Sequence[Tensor]) -> Tensor:
    letters = string.ascii_lowercase[: len(tables)]
    return torch.einsum(",".join(f"{a}z" for a in letters) + "->" + letters, *tables)


def from_dense(tensor: Any, mask: Any = None, coords: Sequence[Any] | None = None) -> tuple[Any, Any]:
    """Return the observed entries of a dense tensor as rows.

    Parameters
    ----------
    tensor : array-like of shape (m_1, .., m_K)
        NaN where nothing was observed.
    mask : array-like of bool of the same shape, default=None
        False where nothing was observed; None is everything that is not NaN.
    coords : sequence of array-like, default=None
        Coordinates or categories along each axis; None counts from 0.

    Returns
    -------
    X : ndarray or Tensor of shape (n, K)
        Coordinates in the order of the entries. An array of objects if some are categories that are no numbers.
    y : ndarray or Tensor of shape (n,)
        Tensors if ``tensor`` is one.

    Raises
    ------
    ValueError
        If shapes do not fit, or nothing was observed.

    See Also
    --------
    FunctionalCP.to_dense : The way back.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.tensor import from_dense
    >>> from_dense([[1.0, np.nan], [np.nan, 4.0]], coords=[[0.5, 1.5], [10.0, 20.0]])
    (array([[ 0.5, 10. ],
           [ 1.5, 20. ]]), array([1., 4.]))
    """
    given = Given.of(tensor)
    values = np.asarray(as_array(tensor), dtype=np.float64)
    if values.ndim == 0:
        raise ValueError("tensor must have at least one axis; got a number.")
    seen = ~np.isnan(values)
    if mask is not None:
        chosen = np.asarray(as_array(mask)).astype(bool)
        if chosen.shape != values.shape:
            raise ValueError(f"mask must have the shape of tensor, {values.shape}; got {chosen.shape}.")
        seen &= chosen
    if not seen.any():
        raise ValueError("tensor must hold at least one observed entry; got none.")
    where = np.nonzero(seen)
    if coords is None:
        axes = [np.arange(m, dtype=np.float64) for m in values.shape]
    else:
        axes = [np.asarray(as_array(c)) for c in coords]
        shapes = tuple(a.shape for a in axes)
        if shapes != tuple((m,) for m in values.shape):
            raise ValueError(f"coords must have one vector an axis of lengths {values.shape}; got shapes {shapes}.")
    numeric = all(a.dtype.kind in "biuf" for a in axes)
    columns = [a[i].astype(np.float64 if numeric else object) for a, i in zip(axes, where, strict=True)]
    X, y = np.stack(columns, 1), values[seen]
    if given.is_torch and numeric:
        return given.back(torch.from_numpy(X)), given.back(torch.from_numpy(y))
    return X, y
