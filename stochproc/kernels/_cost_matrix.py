"""Costs of all pairs of two sets of points, written out."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.kernels._base import check_points
from stochproc.kernels._costs import CostLike, as_cost

__all__ = ["cost_matrix"]


def cost_matrix(
    cost: CostLike, x: Float[Tensor, "*#batch n d"], y: Float[Tensor, "*#batch m d"] | None = None
) -> Float[Tensor, "*batch n m"]:
    """Evaluate a cost at all pairs of points, by the blocks that the reductions use.

    Parameters
    ----------
    cost : {"sqeuclidean", "euclidean", "cityblock"} or callable
        Cost of a pair of points (the squared distance, not half of it), or a function of two blocks of points,
        (*batch, n, d) and (*batch, m, d), that returns (*batch, n, m).
    x : Tensor of shape (*batch, n, d)
        float32 or float64.
    y : Tensor of shape (*batch, m, d), default=None
        None means x.

    Returns
    -------
    Tensor of shape (*batch, n, m)
        In the dtype of the points and in their graph.

    Raises
    ------
    ValueError
        If shapes do not fit, points are not finite, or the cost is unknown.
    OverflowError
        If the squares of distances do not fit into float64.
    TypeError
        If dtypes or devices are mixed, or a dtype is neither float32 nor float64.

    Notes
    -----
    Time O(n m d), memory O(n m): squared distances come from one product of the centred points, and nearly coincident
    pairs from explicit differences where that product would lose their digits. Gradients exist to any order; that of
    "euclidean" is 0 where two points coincide, that of "cityblock" where a coordinate agrees.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import cost_matrix
    >>> cost_matrix("euclidean", torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([[5., 1.]])
    """
    x, y = check_points(x, y)
    out = as_cost(cost).matrix(x, y)
    shape = (*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-2])
    if tuple(out.shape) != shape:
        raise ValueError(f"cost must return a tensor of shape {shape}, one cost a pair; got {tuple(out.shape)}.")
    if out.is_complex():
        raise TypeError(f"cost must return real numbers; got {out.dtype}.")
    return out.to(x.dtype)
