"""Angles between all pairs of two sets of points, tile by tile, to a rounding of the angle (outside autograd)."""

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_same_kind
from stochproc.kernels._pair_points import NEAR, half_chords, prefers_product, quarters_of_squares, unit_vectors

__all__ = ["HalfAngles"]

# Beyond this squared sine, angles are taken from the sum of the unit vectors.
_NEARLY_OPPOSITE = 0.999


class HalfAngles:
    r"""Squared sines of half the angles between points, :math:`\sin^2(\theta/2) = |u - v|^2/4` of unit vectors.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Points, float32 or float64.
    y : Tensor of shape (m, d)
        Points of the same dtype and device; ``x`` itself for the angles within one set.

    Raises
    ------
    TypeError
        If dtypes or devices differ.
    ValueError
        If the points are no matrices or differ in dimension.

    Notes
    -----
    One product of matrices in float64, O(n m d); pairs that are nearly equal or opposite from explicit differences and
    sums. Equal points give 0 and opposite ones 1 exactly. A point at 0 has any angle. Nothing is differentiated.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import HalfAngles
    >>> x = torch.eye(2)
    >>> HalfAngles(x, -x).tile(slice(None), slice(None))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """

    def __init__(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> None:
        check_same_kind(x=x, y=y)
        if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
            raise ValueError(
                f"x and y must be matrices with the same number of columns; got {tuple(x.shape)} and {tuple(y.shape)}."
            )
        self.dtype, self.same, self.by_product = x.dtype, y is x, prefers_product(x)
        self.first = unit_vectors(x.detach())
        self.second = self.first if self.same else unit_vectors(y.detach())

    def tile(self, rows: slice, cols: slice) -> Float[Tensor, "rows cols"]:
        """Return the values of some rows of x and some of y, in a new tensor of their dtype.

        Parameters
        ----------
        rows, cols : slice
        """
        u, v = self.first[rows], self.second[cols]
        out = self._near(u, v, self.same and rows.start == cols.start)
        if out.numel() and bool(out.max() > _NEARLY_OPPOSITE):
            # The angle changes as the square root of what lacks to 1.
            opposite = out > _NEARLY_OPPOSITE
            out[opposite] = 1 - quarters_of_squares(u, -v, opposite).to(self.dtype)
        return out

    def _near(self, u: Tensor, v: Tensor, with_diagonal: bool) -> Tensor:
        if not self.by_product:
            return torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(0.25).to(self.dtype)
        out = half_chords(u, v, self.dtype)
        diagonal = out.diagonal()
        if with_diagonal:
            # Known, and not worth a second look at the tile.
            diagonal.fill_(0.5)
        if out.numel() and bool(out.min() < NEAR[self.dtype]):
            near = out < NEAR[self.dtype]
            out[near] = quarters_of_squares(u, v, near).to(self.dtype)
        if with_diagonal:
            diagonal.zero_()
        return out
