"""How the functions of all modes make an entry: the regressors that each mode sees, and the core of Tucker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.solvers import CG, cholesky_or_raise
from stochproc.tensor._packed import multiplicity, pack, size, unpack

__all__ = ["CPLink", "Link", "Regressors", "TuckerLink"]


class Regressors(NamedTuple):
    """Moments of z with f = z' u for one mode, a row each."""

    mean: Float[Tensor, "n r"]
    second: Float[Tensor, "n p"]
    """E[z z'], packed."""


class Link:
    """f = <W, u^1 o .. o u^K>: what of it does not depend on how W is known."""

    ranks: tuple[int, ...]

    def regressors(self, k: int, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> Regressors:
        """Moments of the regressor of mode k from those of all modes at the rows, (n, R_j) and packed (n, p_j)."""
        raise NotImplementedError

    def moments(self, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """E f and E f^2 of the rows."""
        k = max(range(len(means)), key=lambda j: means[j].shape[1])
        z = self.regressors(k, means, seconds)
        weight = multiplicity(means[k].shape[1], means[k])
        return (z.mean * means[k]).sum(-1), (z.second * seconds[k]) @ weight

    def value(self, functions: Sequence[Tensor], core: Tensor | None = None) -> Tensor:
        """F of given functions at the rows, (..., n, R_j), for a given core or its mean."""
        raise NotImplementedError

    def draw_core(self, n_samples: int, generator: torch.Generator) -> Tensor | None:
        """Draw cores, (n_samples, R_1, .., R_K), or None where there is nothing to draw."""
        return None

    @property
    def width(self) -> int:
        """Numbers a row of work takes at once, which bounds how many rows are taken at a time."""
        raise NotImplementedError


class CPLink(Link):
    """The superdiagonal of ones."""

    def __init__(self, rank: int, n_modes: int) -> None:
        self.ranks = (rank,) * n_modes

    @property
    def width(self) -> int:
        """See :attr:`Link.width`."""
        return size(self.ranks[0]) * len(self.ranks)

    def regressors(self, k: int, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> Regressors:
        """See :meth:`Link.regressors`: products over the other modes."""
        others = [j for j in range(len(means)) if j != k]
        if not others:
            return Regressors(torch.ones_like(means[k]), torch.ones_like(seconds[k]))
        return Regressors(
            reduce(torch.mul, (means[j] for j in others)), reduce(torch.mul, (seconds[j] for j in others))
        )

    def value(self, functions: Sequence[Tensor], core: Tensor | None = None) -> Tensor:
        """See :meth:`Link.value`."""
        return reduce(torch.mul, functions).sum(-1)


@dataclass
class TuckerLink(Link):
    """A core with posterior N(w, V), of a prior N(0, v_W I); axes are in the order of the modes throughout.

    V is a matrix, or a vector of variances where the posterior is taken to be independent by entry (``diagonal``).
    """

    mean: Tensor
    """(R_1, .., R_K)"""
    cov: Tensor
    """(d, d), or (d,) if diagonal, for d = R_1 .. R_K."""
    prior_variance: float
    learn_variance: bool = False
    diagonal: bool = False
    precision: Tensor | None = None
    """(d, d): what the rows say, E[tau] sum_n w_n E[x_n x_n']."""
    linear: Tensor | None = None
    """(d,): E[tau] sum_n w_n y_n E x_n."""
    _folded: Tensor | None = None

    @property
    def ranks(self) -> tuple[int, ...]:  # type: ignore[override]
        """Rank of each mode."""
        return tuple(self.mean.shape)

    @property
    def width(self) -> int:
        """See :attr:`Link.width`."""
        sizes = sorted(size(r) for r in self.ranks)
        product = 1
        for s in sizes[1:]:
            product *= s
        return product

    def set(self, mean: Tensor, cov: Tensor) -> None:
        """Change the posterior of the core."""
        self.mean, self.cov, self._folded = mean, cov, None

    @property
    def folded(self) -> Tensor:
        """E[W W'] with the two axes of each mode packed, (p_1, .., p_K); entries beside a diagonal are both orders.

        Second moments of functions are symmetric mode by mode, so the two orders are always used together.
        """
        if self._folded is None:
            w = self.mean.flatten()
            second = w[:, None] * w
            if self.diagonal:
                second.diagonal().add_(self.cov)
            else:
                second += self.cov
            K, ranks = len(self.ranks), self.ranks
            pairs = second.reshape(*ranks, *ranks).permute([a for k in range(K) for a in (k, K + k)])
            for k in range(K):
                # Axes before k are packed already.
                rows = pairs.movedim((k, k + 1), (-2, -1))
                both = rows + rows.mT
                packed = pack(both) * (multiplicity(ranks[k], both) / 2)
                pairs = packed.movedim(-1, k)
            self._folded = pairs
        return self._folded

    def regressors(self, k: int, means: Sequence[Tensor], seconds: Sequence[Tensor]) -> Regressors:
        """See :meth:`Link.regressors`: the core contracted with the products over the other modes."""
        others = [j for j in range(len(means)) if j != k]
        flat_mean = self.mean.movedim(k, -1).reshape(-1, self.ranks[k])
        flat = self.folded.movedim(k, -1).reshape(-1, size(self.ranks[k])) / multiplicity(self.ranks[k], self.mean)
        if not others:
            n = len(means[k])
            return Regressors(flat_mean.expand(n, -1), flat.expand(n, -1))
        return Regressors(
            khatri_rao([means[j] for j in others]) @ flat_mean, khatri_rao([seconds[j] for j in others]) @ flat
        )

    def value(self, functions: Sequence[Tensor], core: Tensor | None = None) -> Tensor:
        """See :meth:`Link.value`; ``core`` is (R_1, .., R_K) or (..., R_1, .., R_K) with the axes of the functions."""
        W = self.mean if core is None else core
        K = len(self.ranks)
        left = khatri_rao(functions[1:]) if K > 1 else functions[0].new_ones(*functions[0].shape[:-1], 1)
        return (functions[0] * (left @ W.reshape(*W.shape[:-K], self.ranks[0], -1).mT)).sum(-1)

    def statistics(
        self, means: Sequence[Tensor], seconds: Sequence[Tensor], y: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return sum w E[x x'], packed by mode (p_1, .., p_K), and sum w y E x, (d,), of some rows.

        One product of the first mode with the row-wise products of the rest; nothing of n by d^2 is formed.
        """
        if len(means) == 1:
            return weight @ seconds[0], (weight * y) @ means[0]
        rest = khatri_rao(seconds[1:])
        second = (seconds[0] * weight[:, None]).mT @ rest
        linear = (means[0] * (weight * y)[:, None]).mT @ khatri_rao(means[1:])
        return second.reshape([size(r) for r in self.ranks]), linear.flatten()

    def matrix(self, packed: Tensor) -> Tensor:
        """Unpack what ``statistics`` returns to (d, d)."""
        K, ranks = len(self.ranks), self.ranks
        full = packed
        for k in reversed(range(K)):
            full = unpack(full.movedim(k, -1), ranks[k]).movedim((-2, -1), (k, k + 1))
        d = self.mean.numel()
        return full.permute([2 * k for k in range(K)] + [2 * k + 1 for k in range(K)]).reshape(d, d)

    def update(self, precision: Tensor, linear: Tensor) -> None:
        """Set the posterior of the core from messages (d, d) and (d,)."""
        d = len(linear)
        self.precision, self.linear = precision, linear
        whole = precision + torch.eye(d, dtype=linear.dtype, device=linear.device) / self.prior_variance
        if self.diagonal:
            # q factorises over entries; its optimum has the exact mean and the inverse diagonal.
            start = self.mean.flatten()
            solved = CG(rtol=1e-12, max_iter=10 * d)(whole, linear[:, None], x0=start[:, None])
            if solved.ok:
                mean = solved.value[:, 0]
            else:
                # Precise rows make it badly conditioned; the factor is dearer and needs no iterations.
                L = cholesky_or_raise(whole, "the precision of the core")
                mean = torch.cholesky_solve(linear[:, None], L)[:, 0]
            cov = 1 / whole.diagonal()
        else:
            L = cholesky_or_raise(whole, "the precision of the core")
            cov = torch.cholesky_inverse(L)
            mean = cov @ linear
            # One step of refinement: the inverse alone leaves the rounding of its condition number.
            mean = mean + torch.cholesky_solve((linear - whole @ mean)[:, None], L)[:, 0]
        self.set(mean.reshape(self.ranks), cov)

    def update_variance(self) -> None:
        """Set v_W to the maximiser of the bound, if it is learned."""
        if self.learn_variance:
            total = self.cov.sum() if self.diagonal else self.cov.diagonal().sum()
            self.prior_variance = float((total + self.mean.square().sum()) / self.mean.numel())

    def divergence(self) -> float:
        """KL(q(W) || prior)."""
        d, v = self.mean.numel(), self.prior_variance
        if self.diagonal:
            trace, logdet = self.cov.sum(), self.cov.log().sum()
        else:
            trace = self.cov.diagonal().sum()
            logdet = 2 * cholesky_or_raise(self.cov, "the covariance of the core").diagonal().log().sum()
        value = (trace + self.mean.square().sum()) / v - d - logdet
        return 0.5 * float(value + d * torch.tensor(v, dtype=torch.float64).log())

    def draw_core(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`Link.draw_core`."""
        noise = torch.randn(
            n_samples, self.mean.numel(), dtype=self.mean.dtype, device=self.mean.device, generator=generator
        )
        if self.diagonal:
            deviations = noise * self.cov.sqrt()
        else:
            deviations = noise @ cholesky_or_raise(self.cov, "the covariance of the core").mT
        return self.mean + deviations.reshape(n_samples, *self.ranks)

    def keep(self, k: int, components: Tensor) -> None:
        """Drop all other components of mode k, and what the messages say about them."""
        ranks, K = self.ranks, len(self.ranks)

        def vector(v: Tensor) -> Tensor:
            return v.reshape(ranks).index_select(k, components).flatten()

        def matrix(m: Tensor) -> Tensor:
            part = m.reshape(*ranks, *ranks).index_select(k, components).index_select(K + k, components)
            return part.reshape(len(mean.flatten()), -1)

        mean = self.mean.index_select(k, components)
        cov = vector(self.cov) if self.diagonal else matrix(self.cov)
        if self.precision is not None and self.linear is not None:
            self.precision, self.linear = matrix(self.precision), vector(self.linear)
        self.set(mean, cov)


def khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """Row-wise Kronecker product of (..., n, r_j)."""

    def two(a: Tensor, b: Tensor) -> Tensor:
        return (a[..., :, None] * b[..., None, :]).flatten(-2)

    return reduce(two, matrices)
