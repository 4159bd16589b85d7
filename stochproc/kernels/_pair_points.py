"""Norms, their differences and defects of all pairs of points, accurate at any distance (outside autograd)."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stochproc.kernels._distance import inverse_or_zero

# (|x - y|^2 - D^2) / 2 is wrong by eps |x - y|^2, hence the angle t by eps |x - y|^2 / (2 n t), n = |x| |y|. Where
# |x - y|^2 > 8 n t the defect is computed from unit vectors instead, which leaves an error of eps in the angle.
_COLLINEAR = 8.0
_GATHERED_ENTRIES = 2**20

# Entries of a block of rows, so that temporaries stay in the cache: 2 to 4 times faster at a million pairs.
_BLOCK_ENTRIES = 2**15


def row_slices(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Cut the second to last axis: on the CPU into blocks that fit the cache, elsewhere not at all."""
    n_rows = shape[-2]
    if device.type == "cpu" and math.prod(shape) > 2 * _BLOCK_ENTRIES:
        n_rows = max(1, _BLOCK_ENTRIES * n_rows // math.prod(shape))
    for i in range(0, shape[-2], max(n_rows, 1)):
        yield slice(i, i + n_rows)


def clamp_defect(A: Tensor, n: Tensor) -> Tensor:
    """Return A clamped to its range [0, 2 n]."""
    return torch.minimum(A.clamp(min=0), 2 * n)


def state_of_points(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return r1, r2, D, A of all pairs."""
    high, low = square_norms(x)
    other_high, other_low = (t.mT for t in square_norms(y))
    r1, r2 = high.sqrt(), other_high.sqrt()
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    D, A = x.new_empty(2, *batch, x.shape[-2], y.shape[-2]).unbind(0)
    units: tuple[Tensor, Tensor] | None = None
    for rows in row_slices(D.shape, x.device):
        gap, defect = D[..., rows, :], A[..., rows, :]
        r = r1[..., rows, :]
        torch.sub(high[..., rows, :], other_high, out=gap)
        gap += low[..., rows, :] - other_low
        gap /= (r + r2).clamp_(min=torch.finfo(x.dtype).tiny)
        n = r * r2
        dist = torch.cdist(x[..., rows, :], y, compute_mode="donot_use_mm_for_euclid_dist")
        size = gap.abs()
        defect.copy_(clamp_defect((dist - size).mul_((dist + size).div_(2)), n))
        # dist^4 > 128 n A, by factors that do not overflow; 0/0 compares as False.
        collinear = (defect / dist).mul_(2 * _COLLINEAR**2) < (dist / n).mul_(dist).mul_(dist)
        if bool(collinear.any()):
            units = units or (x * inverse_or_zero(r1), y * inverse_or_zero(r2.mT))
            _refine_collinear(defect, collinear, n, units[0][..., rows, :], units[1])
    return r1, r2, D, A


def _refine_collinear(A: Tensor, where: Tensor, n: Tensor, u: Tensor, v: Tensor) -> None:
    """Overwrite the marked defects by n |u - v|^2 / 2, u and v being unit vectors."""
    if where.sum() > where.numel() // 4:
        exact = torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(n / 2)
        A.copy_(torch.where(where, exact, A))
        return
    u, v = u.expand(*A.shape[:-2], *u.shape[-2:]), v.expand(*A.shape[:-2], *v.shape[-2:])
    for at in where.nonzero().split(max(1, _GATHERED_ENTRIES // u.shape[-1])):
        index = at.unbind(-1)
        diff = u[index[:-1]] - v[(*index[:-2], index[-1])]
        A[index] = diff.square().sum(-1) * n[index] / 2


def square_norms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of rows, each as an unevaluated sum of two numbers (twice the digits), keeping the axis."""
    if x.dtype == torch.float32:
        exact = x.double().square().sum(-1, keepdim=True)
        high = exact.to(x.dtype)
        return high, (exact - high).to(x.dtype)
    # Dekker: split each factor in halves of 26 bits, whose products are exact.
    high = x * x
    big = x * (2.0**27 + 1)
    head = big - (big - x)
    tail = x - head
    low = ((head * head - high) + 2 * head * tail) + tail * tail
    while high.shape[-1] > 1:
        # Add the two halves of the row, an odd entry out waiting for the next round; Knuth's exact addition.
        half = high.shape[-1] // 2
        a, b = high[..., :half], high[..., half : 2 * half]
        total = a + b
        part = total - a
        error = (a - (total - part)) + (b - part) + low[..., :half] + low[..., half : 2 * half]
        high = torch.cat([total, high[..., 2 * half :]], -1)
        low = torch.cat([error, low[..., 2 * half :]], -1)
    total = high + low
    return total, low - (total - high)
