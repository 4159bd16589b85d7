"""Products, Cholesky factors and solves of very many tiny matrices, laid out with the batch axis last.

A matrix has shape (..., rows, columns, m): one call works on the same entry of all m matrices, at the full width of
the machine however small they are, where batched LAPACK takes each matrix for itself.
"""

import torch
from torch import Tensor

__all__ = ["product", "roots", "solve_beside", "transpose"]

# A product is one elementwise product and a sum while all its terms fit into the cache, else one fused multiply-add
# a term (table "products" of benchmarks/bench_solvers_kalman.py).
TERMS_IN_CACHE = 1 << 16


def transpose(a: Tensor) -> Tensor:
    return a.transpose(-3, -2)


def product(a: Tensor, b: Tensor, out: "Tensor | None" = None) -> Tensor:
    """Return the products a b of shape (..., rows, columns, m); leading and last axes broadcast."""
    if b.size(-3) == 1:
        return torch.mul(a, b, out=out)
    if a.size(-3) * b.numel() <= TERMS_IN_CACHE:
        terms = a.unsqueeze(-2) * (b if b.ndim == 3 else b.unsqueeze(-4))
        return torch.sum(terms, -3, out=out)
    columns, rows = a.unsqueeze(-2).unbind(-3), b.unsqueeze(-4).unbind(-3)
    out = torch.mul(columns[0], rows[0], out=out)
    for column, row in zip(columns[1:], rows[1:], strict=True):
        out.addcmul_(column, row)
    return out


def roots(a: Tensor) -> Tensor:
    """Turn [S | b] into [Lᵀ | q] with S = L Lᵀ and b = L q, for positive semidefinite S and b in its range.

    ``a`` has shape (rows, rows + columns, m). L is triangular but for the order of its rows: each step takes the
    largest pivot relative to its diagonal entry. Without that a pivot lost in rounding would take couplings of its
    square root along; with it the error is a few eps of sqrt(S_ii S_jj) in entry (i, j), however the rows are
    scaled and whatever the rank.
    """
    dim = len(a)
    floor = 4 * dim * torch.finfo(a.dtype).eps
    rest, out = a.clone(), torch.empty_like(a)
    pivots = rest.diagonal().movedim(-1, 0)
    inverse = torch.where(pivots > 0, 1.0 / pivots, 0.0)
    for j in range(dim):
        left, which = torch.max(pivots * inverse, 0, keepdim=True)
        row = rest.gather(0, which.unsqueeze(1).expand(1, *a.shape[1:]))
        # Written so that NaN is not mistaken for a small pivot.
        scale = torch.where(left <= floor, 0.0, pivots.gather(0, which).rsqrt())
        row = torch.mul(row, scale, out=out[j : j + 1])
        if j + 1 < dim:
            rest.addcmul_(row[:, :dim].transpose(0, 1), row, value=-1)
    return out


def solve_beside(a: Tensor) -> Tensor:
    """Turn [S | b] into R⁻¹ b for S = R Rᵀ with all pivots at least 1, as of I plus a semidefinite matrix."""
    dim = len(a)
    rest = a.clone()
    found = []
    for j in range(dim):
        row = rest[0]
        row = row * row[0].clamp_min(1.0).rsqrt_()
        found.append(row[dim - j :])
        if j + 1 < dim:
            rest, row = rest[1:, 1:], row[1:]
            rest.addcmul_(row[: dim - j - 1].unsqueeze(1), row, value=-1)
    return torch.stack(found)
