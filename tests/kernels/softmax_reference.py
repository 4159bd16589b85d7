"""The softmax pass and block patterns as dense float64 formulas, to compare against."""

import math

import torch


def dense_pass(c, g, w, eps, v):
    """lse, mass, Kv, PtKv of a float64 cost matrix; +inf entries are left out."""
    z = (g.double().unsqueeze(-2) - c) / eps
    lse = z.logsumexp(-1)
    k = torch.where(lse.unsqueeze(-1) == -math.inf, 0.0, (z - lse.unsqueeze(-1)).exp())
    w = w(lse, slice(0, c.shape[-2])) if callable(w) else w.double()
    w = torch.where(lse == -math.inf, 0.0, w)
    kv = k @ v.double()
    return lse, (k.mT @ w.unsqueeze(-1)).squeeze(-1), kv, k.mT @ (w.unsqueeze(-1) * kv)


def random_ranges(gen, n, m, n_row_cells, n_col_cells, density):
    """Cells of random sizes, some of them empty, and random blocks, some row and column cells without any."""

    def starts(size, cells):
        cuts = torch.randint(0, size + 1, (cells - 1,), generator=gen).sort().values
        return torch.cat([torch.tensor([0]), cuts, torch.tensor([size])])

    blocks = torch.rand(n_row_cells, n_col_cells, generator=gen) < density
    ptr = torch.cat([torch.tensor([0]), blocks.sum(1).cumsum(0)])
    return starts(n, n_row_cells), starts(m, n_col_cells), ptr, blocks.nonzero()[:, 1]


def allowed(ranges):
    """The pattern as a matrix of bool, one entry a pair."""
    x_starts, y_starts, ptr, cols = ranges
    out = torch.zeros(int(x_starts[-1]), int(y_starts[-1]), dtype=torch.bool)
    for i in range(len(x_starts) - 1):
        for j in cols[ptr[i] : ptr[i + 1]]:
            out[x_starts[i] : x_starts[i + 1], y_starts[j] : y_starts[j + 1]] = True
    return out
