"""Sweeps over the costs of a stack of transport problems, and Newton directions of their semi-duals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import threshold

from stochproc.solvers import safe_cholesky

__all__ = ["BatchPass", "BatchProblem", "item_slices"]

LOG2E = math.log2(math.e)
# exp2 of what is nearly subnormal costs ten times an ordinary one, and exp2(-inf) = 0 does not: what lies below the
# floor becomes -inf.
EXP2_FLOOR = {torch.float32: -120.0, torch.float64: -1000.0}
# Column sums below this may have lost terms to the floor; their logarithms come from a log-sum-exp.
TINY = {torch.float32: 1e-35, torch.float64: 1e-300}
# The few operations on a chunk of items stay in the cache of one core; on a GPU a chunk only bounds memory.
CHUNK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}
# Matrices that are factored in one call: the call has a fixed cost, so the chunk is larger.
FACTOR_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
# Relative to b: what keeps isolated columns from a zero pivot.
FLOOR_RIDGE = 1e-14


@dataclass(frozen=True)
class BatchPass:
    """What a sweep at the potentials g of k items knows."""

    f: Tensor
    """Potentials of the rows (k, n); 0 in a row without any finite cost."""
    c: Tensor
    """Column sums of the plans (k, m)."""
    phi: Tensor
    """Dual values (k,)."""
    err: Tensor
    """L1 distance of c from b (k,)."""
    total: Tensor
    """Row sums (k, n) of the softmax numerators ``K``."""
    K: Tensor
    r"""Numerators (k, n, m) of the row softmax, largest 1; the plan is :math:`\mathrm{diag}(a / t) K`."""


class BatchProblem:
    """Costs with smallest entry 0 in each row, and weights of sum 1 that may have zeros.

    Parameters
    ----------
    cost : Tensor of shape (B, n, m) or (1, n, m)
        Entries finite or ``+inf``; one cost may be shared by all items. Never written to.
    a, b : Tensor of shape (B, n) and (B, m)
        float64.
    """

    def __init__(self, cost: Tensor, a: Tensor, b: Tensor) -> None:
        self.low, self.cost = _lowered(cost)
        self.given = cost
        self.shared = cost.shape[0] == 1
        self.a, self.b = a, b
        live = b > 0
        self.live = None if bool(live.all()) else live
        self.log_b = b.log()
        self.dead = None
        self.highest = self.cost.amax((1, 2))
        if not bool(self.highest.isfinite().all()):
            finite = self.cost.isfinite()
            dead = ~finite.any(2)
            self.dead = dead.expand(a.shape) if bool(dead.any()) else None
            self.highest = torch.where(finite, self.cost, 0).amax((1, 2))
        self.highest = self.highest.expand(a.shape[0])

    def chunks(self, k: int) -> list[slice]:
        """Return the slices of k items that one sweep takes together."""
        n, m = self.cost.shape[1:]
        return item_slices(k, 8 * n * m, CHUNK_BYTES.get(self.cost.device.type, 1 << 28))

    def sweep(self, items: Tensor, g: Tensor, eps: Tensor, buffer: Tensor) -> BatchPass:
        """Sweep the given items, each at its own g (k, m) and eps (k,)."""
        k, (n, m) = items.shape[0], self.cost.shape[1:]
        a, b, dtype = self.a[items], self.b[items], buffer.dtype
        exact = dtype != self.cost.dtype
        cost = self.doubled(items) if self.shared and exact else self.cost
        scale = LOG2E / eps
        h = (g * scale.unsqueeze(1) + LOG2E * self.log_b[items]).to(dtype).unsqueeze(1)
        slope = -scale.to(dtype)[:, None, None]
        K, floor = buffer[:k], EXP2_FLOOR[dtype]
        total, high = g.new_empty(k, n), K.new_empty(k, n, 1)
        c = g.new_empty(k, m)
        dead = None if self.dead is None else self.dead[items]
        for s in self.chunks(k):
            z, top = K[s], high[s]
            if self.shared:
                torch.addcmul(h[s], cost, slope[s], out=z)
            else:
                if exact:
                    z.copy_(self.doubled(items[s]))
                else:
                    torch.index_select(cost, 0, items[s], out=z)
                torch.addcmul(h[s], z, slope[s], out=z)
            torch.amax(z, 2, keepdim=True, out=top)
            if dead is not None:
                top.masked_fill_(dead[s].unsqueeze(2), 0)
            threshold(z.sub_(top), floor, -math.inf, inplace=True).exp2_()
            t = z.sum(2, dtype=torch.float64)
            if dead is not None:
                t.masked_fill_(dead[s], 1)
            total[s] = t
            c[s] = torch.bmm((a[s] / t).to(dtype).unsqueeze(1), z).squeeze(1)
        f = (total.log2() + high.squeeze(2)).mul_(-eps.unsqueeze(1) / LOG2E)
        phi = torch.linalg.vecdot(a, f) + torch.linalg.vecdot(b, g)
        return BatchPass(f, c, phi, (c - b).abs().sum(1), total, K)

    def doubled(self, items: Tensor) -> Tensor:
        """Return costs with smallest entry 0 in each row in float64, without the rounding of a float32 difference."""
        if self.cost.dtype == torch.float64:
            return self.cost if self.shared else self.cost[items]
        if self.shared:
            return self.given.double() - self.low.double().unsqueeze(2)
        return self.given[items].double().sub_(self.low[items].double().unsqueeze(2))

    def log_ratio(self, items: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return log b - log c, 0 where b is 0, and which items need :meth:`log_ratio_again` for it."""
        if self.live is None:
            return self.log_b[items] - c.log(), (c < TINY[dtype]).any(1)
        live = self.live[items]
        ratio = torch.where(live, self.log_b[items] - c.log(), 0)
        return ratio, ((c < TINY[dtype]) & live).any(1)

    def log_ratio_again(self, items: Tensor, f: Tensor, g: Tensor, eps: Tensor) -> Tensor:
        """Return log b - log c from a log-sum-exp, finite however small c is."""
        ratio = -g / eps.unsqueeze(1) - self.column_softmin(items, f, eps)
        return ratio if self.live is None else torch.where(self.live[items], ratio, 0)

    def column_softmin(self, items: Tensor, f: Tensor, eps: Tensor) -> Tensor:
        """Return log sum_i a_i exp((f_i - M_ij) / eps), float64, for every column."""
        out = f.new_empty(items.shape[0], self.b.shape[1])
        for s in self.chunks(items.shape[0]):
            cost = self.doubled(items[s])
            weighted = (f[s] / eps[s].unsqueeze(1) + self.a[items[s]].log()).unsqueeze(2)
            out[s] = torch.logsumexp(weighted - cost / eps[s][:, None, None], 1)
        return out

    def directions(self, at: BatchPass, where: Tensor, items: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""Solve (S + Lam + b b^T) d = eps (b - c) at the places ``where`` of a sweep; return d and <b - c, d>.

        :math:`S = \mathrm{diag}(W 1) - W` with W the off-diagonal part of :math:`P^\top \mathrm{diag}(1/a) P`: a
        Laplacian, so nothing cancels. All is scaled by :math:`b^{-1/2}` on both sides, which leaves the unit of
        jitter, if any is needed, the same for light and heavy columns; :math:`b b^\top` removes the null space.
        """
        k, m = where.shape[0], self.b.shape[1]
        a, b, c = self.a[items], self.b[items], at.c[where]
        root = b.sqrt()
        shrink = 1 / root
        if self.live is not None:
            shrink = torch.where(self.live[items], shrink, 0)
        gradient = b - c
        ridge = 1e-3 * at.err[where].clamp(max=1) + FLOOR_RIDGE
        weight = a.sqrt() / at.total[where]
        d = torch.empty_like(b)
        dtype = at.K.dtype
        for s in item_slices(k, 8 * m * m, FACTOR_BYTES.get(b.device.type, 1 << 28)):
            A = b.new_empty(s.stop - s.start, m, m)
            for t in self.chunks(s.stop - s.start):
                u = slice(s.start + t.start, s.start + t.stop)
                half = at.K[where[u]]
                half.mul_(weight[u].to(dtype).unsqueeze(2)).mul_(shrink[u].to(dtype).unsqueeze(1))
                A[t] = torch.bmm(half.mT, half)
            A.neg_()
            diagonal = A.diagonal(dim1=1, dim2=2)
            diagonal.zero_()
            x, y = root[s].unsqueeze(2), shrink[s]
            degree = -(A @ x).squeeze(2) * y
            A.addcmul_(x, x.mT)
            diagonal += degree + ridge[s].unsqueeze(1)
            # What could not be factored gives NaN, which a line search refuses.
            L = safe_cholesky(A).value
            rhs = (eps[s].unsqueeze(1) * gradient[s] * y).unsqueeze(2)
            d[s] = torch.cholesky_solve(rhs, L).squeeze(2) * y
        d.nan_to_num_(0.0, 0.0, 0.0)
        return d, torch.linalg.vecdot(gradient, d)


def item_slices(k: int, bytes_an_item: int, limit: int) -> list[slice]:
    """Cut k items into slices that fit the limit."""
    size = max(1, limit // max(1, bytes_an_item))
    return [slice(i, min(k, i + size)) for i in range(0, k, size)]


def _lowered(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row minima (k, n), 0 in rows without a finite cost, and a contiguous cost less them."""
    low = cost.amin(2)
    low = torch.where(low.isposinf(), 0, low)
    if cost.is_contiguous() and not bool(low.any()):
        return low, cost
    out = torch.empty(cost.shape, dtype=cost.dtype, device=cost.device)
    torch.sub(cost, low.unsqueeze(2), out=out)
    return low, out
