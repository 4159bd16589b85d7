"""Joint covariance of entries, from those of the functions of each mode at every pair of points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stochproc.tensor._coordinate_ascent import Decomposition
from stochproc.tensor._links import TuckerLink, khatri_rao

__all__ = ["joint_covariance"]

# Numbers in one block of pairs of rows.
_NUMBERS_AT_ONCE = 1 << 22


def joint_covariance(model: Decomposition, points: Sequence[Tensor], index: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (n,) and covariance (n, n) of f at rows, exactly for the factorised posterior."""
    means, products = [], []
    for factor, p, i in zip(model.factors, points, index, strict=True):
        mean, cov = factor.joint(p)
        means.append(mean[i])
        # E[u(x) u(x')'] at every pair of points, (m, m, r, r).
        products.append(cov + torch.einsum("ia,jb->ijab", mean, mean))
    link = model.link
    n = len(index[0])
    mean = link.value(means)
    if isinstance(link, TuckerLink):
        w = link.mean.flatten()
        second = torch.outer(w, w) + (torch.diag(link.cov) if link.diagonal else link.cov)
        ranks, K = link.ranks, len(link.ranks)
        # (R_1^2, R_2^2 .. R_K^2), the two axes of a mode side by side.
        core = second.reshape(*ranks, *ranks).permute([a for k in range(K) for a in (k, K + k)])
        core = core.reshape(ranks[0] ** 2, -1)
        width = core.shape[1]
    else:
        core, width = None, link.ranks[0] ** 2
    out = mean.new_empty(n, n)
    size = max(1, _NUMBERS_AT_ONCE // max(1, n * width))
    for start in range(0, n, size):
        rows = slice(start, start + size)
        pairs = [table[i[rows][:, None], i[None, :]].flatten(-2) for table, i in zip(products, index, strict=True)]
        if core is None:
            total = pairs[0]
            for pair in pairs[1:]:
                total = total * pair
            out[rows] = total.sum(-1)
        elif len(pairs) == 1:
            out[rows] = pairs[0] @ core[:, 0]
        else:
            out[rows] = ((pairs[0] @ core) * khatri_rao(pairs[1:])).sum(-1)
    cov = out - torch.outer(mean, mean)
    return mean, 0.5 * (cov + cov.mT)
