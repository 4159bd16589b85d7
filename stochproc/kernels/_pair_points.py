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

# (1 - u . v) / 2 of unit vectors is wrong by eps: enough for angles above this, of which the square of the sine of the
# half is compared, in the dtype of the result. Fewer columns gain too little, and have more near pairs.
NEAR = {torch.float32: 1e-6, torch.float64: 1e-2}
_PRODUCT_COLUMNS = 4
# Beyond this share of near pairs, distances of all pairs are faster than gathering those.
_GATHERED_SHARE = 20

# Entries of a block of rows, so that temporaries stay in the cache: 2 to 4 times faster at a million pairs.
_BLOCK_ENTRIES = 2**15
_NORM_ENTRIES = 2**17


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


def prefers_product(x: Tensor) -> bool:
    """Whether angles between points like these are taken from a product of matrices, which is 3 to 14 times faster."""
    return x.device.type == "cpu" and x.shape[-1] >= _PRODUCT_COLUMNS


def unit_vectors(x: Tensor) -> Tensor:
    """Return points at length 1, in float64; those at 0 as they are."""
    wide = x.double()
    return wide * inverse_or_zero(torch.linalg.vector_norm(wide, dim=-1, keepdim=True))


def half_chords(u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (1 - u . v) / 2 of all pairs of unit vectors in float64, the squared sine of half their angle.

    Values below ``NEAR`` hold fewer digits than ``dtype``, and may be negative.
    """
    half = u.new_full((1, 1), 0.5)
    if u.ndim == v.ndim == 2:
        return torch.addmm(half, u, v.mT, alpha=-0.5).to(dtype)
    return torch.matmul(u, v.mT).mul_(-0.5).add_(half).to(dtype)


def quarters_of_squares(u: Tensor, v: Tensor, where: Tensor) -> Tensor:
    """Return |u_i - v_j|^2 / 4 of the marked pairs (n, m), in their order."""
    if where.sum() > where.numel() // _GATHERED_SHARE:
        return torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist")[where].square_().mul_(0.25)
    pairs = where.nonzero().split(max(1, _GATHERED_ENTRIES // u.shape[-1]))
    return torch.cat([(u[i] - v[j]).square().sum(-1).mul_(0.25) for i, j in (part.unbind(-1) for part in pairs)])


def state_of_points(x: Tensor, y: Tensor, *, same: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return r1, r2, D, A of all pairs; of one set with itself, ``same``, A is symmetric to the bit."""
    high, low = square_norms(x)
    other_high, other_low = (t.mT for t in square_norms(y))
    r1, r2 = high.sqrt(), other_high.sqrt()
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    D, A = x.new_empty(2, *batch, x.shape[-2], y.shape[-2]).unbind(0)
    units = _Units(x, x if same else y)
    for rows in row_slices(D.shape, x.device):
        gap, defect = D[..., rows, :], A[..., rows, :]
        r = r1[..., rows, :]
        torch.sub(high[..., rows, :], other_high, out=gap)
        gap += low[..., rows, :] - other_low
        gap /= (r + r2).clamp_(min=torch.finfo(x.dtype).tiny)
        _fill(defect, (x[..., rows, :], y), units, rows, gap, r * r2)
        if same and prefers_product(x):
            # A product of matrices rounds an entry and its mirror image differently.
            square = defect[..., rows]
            square.copy_(square.triu(1) + square.triu(1).mT)
            defect[..., : rows.start] = A[..., : rows.start, rows].mT
    return r1, r2, D, A


class _Units:
    """Unit vectors of both sets of points, made when they are first wanted."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.points = (x, y)
        self.made: tuple[Tensor, Tensor] | None = None

    def of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Those of some rows of x, and all of y."""
        if self.made is None:
            x, y = self.points
            first = unit_vectors(x)
            self.made = (first, first if x is y else unit_vectors(y))
        return self.made[0][..., rows, :], self.made[1]


def _fill(A: Tensor, points: tuple[Tensor, Tensor], units: _Units, rows: slice, gap: Tensor, n: Tensor) -> None:
    """Write the defects of a block of rows."""
    if prefers_product(points[0]):
        chords = half_chords(*units.of(rows), A.dtype)
        near = chords < NEAR[A.dtype]
        count = int(near.sum())
        if count <= near.numel() // _GATHERED_SHARE:
            A.copy_(clamp_defect(chords.mul_(2).mul_(n), n))
            if count:
                _refine(A, near, points, units.of(rows), gap, n)
            return
    dist = torch.cdist(*points, compute_mode="donot_use_mm_for_euclid_dist")
    defect, collinear = _from_distances(dist, gap, n)
    A.copy_(defect)
    if bool(collinear.any()):
        _refine(A, collinear, None, units.of(rows), gap, n)


def _from_distances(dist: Tensor, gap: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Return defects, and where those of the unit vectors are better."""
    size = gap.abs()
    defect = clamp_defect((dist - size) * ((dist + size) / 2), n)
    # dist^4 > 128 n A, by factors that do not overflow; 0/0 compares as False.
    return defect, (defect / dist).mul_(2 * _COLLINEAR**2) < (dist / n).mul_(dist).mul_(dist)


def _refine(
    A: Tensor,
    where: Tensor,
    points: tuple[Tensor, Tensor] | None,
    units: tuple[Tensor, Tensor],
    gap: Tensor,
    n: Tensor,
) -> None:
    """Overwrite the marked defects by n |u - v|^2 / 2, u and v being unit vectors.

    With points, by what follows from their distances instead, where that is better.
    """
    u, v = units
    if points is None and where.sum() > where.numel() // _GATHERED_SHARE:
        exact = torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(n / 2)
        A.copy_(torch.where(where, exact, A))
        return
    for at in where.nonzero().split(max(1, _GATHERED_ENTRIES // u.shape[-1])):
        index = at.unbind(-1)
        defect = _differences(u, v, index, A.shape).square().sum(-1).to(A.dtype) * n[index] / 2
        if points is not None:
            dist = torch.linalg.vector_norm(_differences(*points, index, A.shape), dim=-1)
            better, collinear = _from_distances(dist, gap[index], n[index])
            defect = torch.where(collinear, defect, better)
        A[index] = defect


def _differences(x: Tensor, y: Tensor, index: tuple[Tensor, ...], shape: Sequence[int]) -> Tensor:
    """Return x_i - y_j of some pairs, of shape (pairs, d)."""
    x, y = (t.expand(*shape[:-2], *t.shape[-2:]) for t in (x, y))
    return x[index[:-1]] - y[(*index[:-2], index[-1])]


def square_norms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of rows, each as an unevaluated sum of two numbers (twice the digits), keeping the axis."""
    if x.device.type == "cpu" and x.ndim > 1 and x.numel() > 2 * _NORM_ENTRIES and x.shape[-1]:
        # Some 20 passes: 6 times faster where they stay in the cache.
        rows = x.reshape(-1, x.shape[-1]).split(max(1, _NORM_ENTRIES // x.shape[-1]))
        parts = zip(*(_square_norms(block) for block in rows), strict=True)
        high, low = (torch.cat(part).reshape(*x.shape[:-1], 1) for part in parts)
        return high, low
    return _square_norms(x)


def _square_norms(x: Tensor) -> tuple[Tensor, Tensor]:
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
