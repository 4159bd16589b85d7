"""The arc-cosine kernels: the ReLU and step duals applied to the points themselves."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice
from stochproc.kernels._base import Kernel, Prepared, Tensors, check_points
from stochproc.kernels._duals import Relu
from stochproc.kernels._pair import Pair

__all__ = ["ArcCosine"]


class ArcCosine(Kernel):
    r"""Arc-cosine kernel of order 0 or 1: an infinite layer of step or ReLU units.

    With t the angle between x and y: order 0 is :math:`1 - t/\pi`, order 1 is
    :math:`|x||y| (\sin t + (\pi - t) \cos t)/\pi`.

    Parameters
    ----------
    order : {0, 1}, default=1

    Raises
    ------
    ValueError
        If order is neither 0 nor 1.

    Notes
    -----
    Order 0 needs nonzero points: the angle with the origin has no limit and is taken as pi/2, its mean over
    directions, so that the kernel is 1/2 there. Its gradient is unbounded at coincident and opposite points, and
    returned as 0. Evaluated from explicit differences, O(n m d).

    References
    ----------
    .. [1] Y. Cho and L. K. Saul, "Kernel Methods for Deep Learning", NeurIPS 2009.
    """

    _config_names = ("order",)

    def __init__(self, order: int = 1) -> None:
        check_choice("order", order, (0, 1))
        super().__init__()
        self.order = order

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """See :meth:`Kernel.prepare`."""
        order = self.order

        def block(rows: Tensors, cols: Tensors, shared: Tensors) -> Tensor:
            pair = Pair.from_points(rows[0], cols[0])
            if order == 0:
                return 2 * Relu().derivative(pair)
            out = Relu()(pair)
            return 2 * (out.r1 * out.r2 - out.A)

        return Prepared((x,), (y,), (), block)

    def diag(self, x: Float[Tensor, "*#batch n d"]) -> Float[Tensor, "*batch n"]:
        """Evaluate k(x_i, x_i): 1 for order 0, the squared norm for order 1."""
        x, _ = check_points(x, None)
        q = (x * x).sum(-1)
        return torch.ones_like(q) if self.order == 0 else 2 * Relu().diag(q)

    def formula(self, x: Tensor, y: Tensor) -> Any:
        """Return the symbolic KeOps matrix; see :meth:`Kernel.formula`."""
        from stochproc.kernels._keops import pair_of

        norms = [t.norm(dim=-1, keepdim=True) for t in (x, y)]
        units = [t / torch.where(r == 0, 1.0, r) for t, r in zip((x, y), norms, strict=True)]
        u, w = pair_of(*units)
        # 2 asin(|u - w| / 2) keeps the digits of small angles that acos(u . w) loses.
        sq = ((u - w) ** 2).sum(-1)
        if self.order == 0:
            # The origin has no direction: its angle is pi/2 with another point and 0 with itself.
            at_x, at_y = pair_of(*((r == 0).to(x) for r in norms))
            sq = sq + (at_x + at_y - 2 * at_x * at_y).sum(-1)
        angle = 2 * (sq.sqrt() / 2).clamp(0, 1).asin()
        if self.order == 0:
            return 1 - angle / math.pi
        r, s = pair_of(*norms)
        return (r * s).sum(-1) * (angle.sin() + (math.pi - angle) * angle.cos()) / math.pi
