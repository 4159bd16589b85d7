"""Matrices of ground costs between two sets of points."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc import kernels
from stochproc._checks import check_positive
from stochproc.ot._inputs import _points, read

__all__ = ["DIFFERENTIABLE", "cost_matrix", "dist"]

DIFFERENTIABLE = ("sqeuclidean", "euclidean", "cityblock", "minkowski")
# The metrics of scipy that take weights of the columns, as POT passes them.
_SCIPY_PLAIN = ("jensenshannon", "mahalanobis", "seuclidean")


def dist(
    X: Any,
    Y: Any = None,
    metric: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
    p: float | int = 2,
    w: Any = None,
) -> Any:
    r"""Compute the costs between all pairs of two sets of points.

    Parameters
    ----------
    X : array-like of shape (n, d)
        Finite points, NumPy or torch.
    Y : array-like of shape (m, d), default=None
        More points of the same kind; None means X.
    metric : str or callable, default="sqeuclidean"
        ``"sqeuclidean"``, the squared Euclidean distance (not half of it); ``"euclidean"``, ``"cityblock"``,
        ``"minkowski"``: these are differentiable. Any other name of a metric of `scipy.spatial.distance.cdist`, for
        points that require no gradient. A callable takes two tensors (n, d) and (m, d) and returns their costs (n, m).
    p : float, default=2
        Order of ``"minkowski"``, at least 1; ignored by the others.
    w : array-like of shape (d,), default=None
        Non-negative weights of the columns, for the names that scipy lets take them: :math:`\sum_c w_c |x_c - y_c|^p`
        before the root.

    Returns
    -------
    ndarray or Tensor of shape (n, m)
        In the unit of the metric; NumPy for NumPy, torch for torch, in the autograd graph of the points.

    Raises
    ------
    ValueError
        If points are no finite matrices with equally many columns, the metric is unknown, ``p`` is below 1 or ``w``
        does not fit; or if points require a gradient that the metric does not have.
    TypeError
        If NumPy is mixed with torch, devices are mixed, or the dtype is neither integer, float32 nor float64.

    Notes
    -----
    O(n m d) time. Squared distances come from one matrix product of the centred points, nearly coincident pairs from
    explicit differences. Where two points coincide, the gradient of ``"euclidean"`` is 0, as is that of
    ``"cityblock"`` where a coordinate agrees. Unlike in POT, ``w`` acts on the named differentiable metrics too,
    as in scipy.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.ot import dist
    >>> X = np.array([[0.0, 0.0], [3.0, 4.0]])
    >>> dist(X)
    array([[ 0., 25.],
           [25.,  0.]])
    >>> dist(X, metric="cityblock")
    array([[0., 7.],
           [7., 0.]])
    """
    given, found = read(X=X, Y=Y, w=w)
    x = _points("X", found["X"])
    y = x if Y is None else _points("Y", found["Y"])
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"X and Y must have the same number of columns; got {x.shape[1]} and {y.shape[1]}.")
    weights = found["w"]
    if weights is not None:
        if tuple(weights.shape) != (x.shape[1],):
            raise ValueError(f"w must have shape ({x.shape[1]},), one weight a column; got {tuple(weights.shape)}.")
        check_positive("w", weights, zero=True)
    return given.back(cost_matrix(x, y, metric, p=p, w=weights))


def cost_matrix(
    x: Tensor,
    y: Tensor,
    metric: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
    *,
    p: float | int = 2,
    w: Tensor | None = None,
) -> Tensor:
    """Return the costs (n, m) of checked points of one dtype, in their graph."""
    if not isinstance(metric, str):
        return _of_callable(x, y, metric)
    if metric not in DIFFERENTIABLE:
        return _of_scipy(x, y, metric, w)
    if metric == "minkowski":
        if not isinstance(p, numbers.Real):
            raise TypeError(f"p must be a number; got {type(p).__name__}.")
        if not p >= 1:
            raise ValueError(f"p must be at least 1; got {p}.")
        metric = {1.0: "cityblock", 2.0: "euclidean"}.get(float(p), metric)
    if w is not None:
        scale = w if metric == "cityblock" else w ** (0.5 if metric != "minkowski" else 1 / p)
        x, y = x * scale, y * scale
    if metric == "minkowski":
        return torch.cdist(x, y, p=float(p))
    return kernels.cost_matrix(metric, x, y)


def _of_callable(x: Tensor, y: Tensor, metric: Any) -> Tensor:
    if not callable(metric):
        raise TypeError(f"metric must be a string or a function of two blocks of points; got {type(metric).__name__}.")
    shape = (x.shape[0], y.shape[0])

    def checked(x: Tensor, y: Tensor) -> Tensor:
        # The layer has the same check, and calls the function a cost.
        out = metric(x, y)
        if not isinstance(out, Tensor) or tuple(out.shape) != shape:
            came = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"metric must return a tensor of shape {shape}, one cost a pair; got {came}.")
        return out

    return kernels.cost_matrix(checked, x, y)


def _of_scipy(x: Tensor, y: Tensor, metric: str, w: Tensor | None) -> Tensor:
    from scipy.spatial.distance import cdist

    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        raise ValueError(
            f"metric {metric!r} has no gradient; use one of {', '.join(DIFFERENTIABLE)}, a function of two blocks, or "
            "points that require none."
        )
    options: dict[str, Any] = {}
    if w is not None:
        if metric in _SCIPY_PLAIN:
            raise ValueError(f"w must be None for metric {metric!r}, which takes no weights of columns.")
        options["w"] = w.detach().cpu().numpy()
    rows, columns = x.detach().cpu().numpy(), y.detach().cpu().numpy()
    try:
        out = cdist(rows, columns, metric, **options)
    except ValueError as error:
        if "Unknown Distance Metric" not in str(error):
            raise
        named = ", ".join(map(repr, DIFFERENTIABLE))
        raise ValueError(
            f"metric must be one of {named}, another name of scipy.spatial.distance.cdist, or a function of two blocks "
            f"of points; got {metric!r}."
        ) from None
    return torch.from_numpy(np.asarray(out, dtype=np.float64)).to(x)
