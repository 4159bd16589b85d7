"""Optimal transport between measures on the line, where sorting solves it."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from stochproc.ot._inputs import check_masses, check_weights, read

__all__ = ["line_cost", "wasserstein_1d"]


def wasserstein_1d(x: Any, y: Any, a: Any = None, b: Any = None, p: float | int = 1) -> Any:
    r"""Compute the optimal transport cost :math:`W_p^p` between measures on the line, exactly.

    .. math:: W_p^p = \int_0^1 |F^{-1}(q) - G^{-1}(q)|^p \, dq, \qquad W_1 = \int |F(t) - G(t)| \, dt,

    with the distribution functions F and G of the two measures. As in POT, no p-th root is taken.

    Parameters
    ----------
    x : array-like of shape (n,) or (n, ...)
        Finite positions of the atoms of the first measure along the first axis; every further index is a problem of
        its own. NumPy or torch.
    y : array-like of shape (m,) or (m, ...)
        Positions of the second measure, with further axes that broadcast with those of x.
    a : array-like of shape (n,) or (n, ...), default=None
        Non-negative weights of x, shared by all problems if a vector; None means 1/n each.
    b : array-like of shape (m,) or (m, ...), default=None
        Weights of y, of the same mass as a; None means 1/m each.
    p : float, default=1
        Order, at least 1 and finite.

    Returns
    -------
    numpy scalar, ndarray or Tensor of shape (...)
        :math:`W_p^p`, in the unit of x to the p, times the mass; differentiable in x, y, a and b.

    Raises
    ------
    ValueError
        If shapes do not fit, a position is not finite, a weight is negative or not finite, a mass is 0, the masses
        differ by more than rounding, or ``p`` is below 1.
    TypeError
        If NumPy is mixed with torch, devices are mixed, or the dtype is neither integer, float32 nor float64.

    Notes
    -----
    O((n + m) log(n + m)) time a problem. The monotone plan is optimal for every convex cost of the difference; it has
    at most n + m - 1 entries, which are summed in float64. The gradient in a and b is a pair of dual potentials, with
    the constant between them chosen so that the weighted mean of the one in b is 0; where atoms coincide or
    cumulative weights agree it is one of several.

    References
    ----------
    .. [1] G. Peyré and M. Cuturi, "Computational Optimal Transport", 2019, section 2.6.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.ot import wasserstein_1d
    >>> x = np.array([0.0, 1.0, 3.0])
    >>> round(float(wasserstein_1d(x, x + 2, p=2)), 12)  # a shift by 2
    4.0
    """
    order = _order(p)
    given, found = read(x=x, y=y, a=a, b=b)
    points = [_positions(name, found[name]) for name in ("x", "y")]
    weights = [_weights(name, found[name], at) for name, at in zip(("a", "b"), points, strict=True)]
    both = (*points, *weights)
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-1] for t in both))
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape[:-1])) for t in both)
        raise ValueError(f"x, y, a and b must have axes after the first that broadcast; got {shapes}.") from None
    at_x, at_y, of_x, of_y = (t.expand(*batch, t.shape[-1]) for t in both)
    out = line_cost(at_x, at_y, of_x, check_masses(of_x, of_y), order)
    result = given.back(out.to(points[0].dtype))
    return result if given.is_torch or result.ndim else result[()]


def line_cost(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    """Return W_p^p of atoms along the last axis, in float64; a and b have one mass up to rounding."""
    x, y, a, b = (t.double() for t in (x, y, a, b))
    # The masses agree but for rounding. Scaling in the graph also fixes the constant of the gradient.
    b = b * (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))
    (x, order_x), (y, order_y) = x.sort(dim=-1, stable=True), y.sort(dim=-1, stable=True)
    ends_x, ends_y = a.gather(-1, order_x).cumsum(-1), b.gather(-1, order_y).cumsum(-1)
    ends = torch.cat([ends_x, ends_y], -1)
    with torch.no_grad():
        # What rounding leaves over of one side would be paid for at a last atom, however far off and light.
        excess = (ends - torch.minimum(ends_x[..., -1:], ends_y[..., -1:])).clamp(min=0)
    ends, merged = (ends - excess).sort(dim=-1, stable=True)
    mass = torch.diff(ends, dim=-1, prepend=torch.zeros_like(ends[..., :1]))
    # A piece of mass belongs to the first atom of either side that is not used up: the north-west corner rule, which
    # also gives consistent pieces of mass 0 where cumulative weights agree, and so a gradient that is a dual solution.
    of_x = (merged < x.shape[-1]).long()
    index_x = (of_x.cumsum(-1) - of_x).clamp(max=x.shape[-1] - 1)
    index_y = ((1 - of_x).cumsum(-1) - (1 - of_x)).clamp(max=y.shape[-1] - 1)
    cost = _power(x.gather(-1, index_x) - y.gather(-1, index_y), p)
    # Pieces of mass 0 may be too far apart for their cost to be a number.
    cost = torch.where(cost.isinf() & (mass == 0), torch.finfo(cost.dtype).max, cost)
    return (mass * cost).sum(-1)


def _power(difference: Tensor, p: float) -> Tensor:
    """Return ``|difference| ** p``; where a derivative is infinite at 0, as the second is for p < 2, it is set to 0."""
    if p == 1:
        return difference.abs()
    if p == 2:
        return difference.square()
    apart = difference != 0
    return torch.where(apart, torch.where(apart, difference, 1.0).abs() ** p, 0.0)


def _order(p: Any) -> float:
    if not isinstance(p, numbers.Real):
        raise TypeError(f"p must be a number; got {type(p).__name__}.")
    if not 1 <= float(p) < float("inf"):
        raise ValueError(f"p must be finite and at least 1; got {p}.")
    return float(p)


def _positions(name: str, points: Tensor | None) -> Tensor:
    """Return positions with their atoms in the last axis."""
    if points is None:
        raise TypeError(f"{name} must be an array of positions; got None.")
    if points.ndim == 0 or points.shape[0] == 0:
        raise ValueError(f"{name} must have shape (n,) or (n, ...) with n at least 1; got {tuple(points.shape)}.")
    if not bool(points.detach().isfinite().all()):
        where = tuple((~points.isfinite()).nonzero()[0].tolist())
        raise ValueError(f"{name} must be finite; got {points[where].item()} at index {where}.")
    return points.movedim(0, -1)


def _weights(name: str, weights: Tensor | None, at: Tensor) -> Tensor:
    """Return weights with their atoms in the last axis."""
    n = at.shape[-1]
    if weights is None:
        return at.new_full((n,), 1 / n)
    if weights.ndim == 0 or weights.shape[0] != n:
        raise ValueError(f"{name} must have {n} weights along its first axis; got shape {tuple(weights.shape)}.")
    weights = weights.movedim(0, -1)
    check_weights(name, weights)
    return weights
