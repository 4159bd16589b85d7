"""Coordinate ascent on the bound of a functional decomposition: messages by mode, core, noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stochproc.tensor._factor import Factor
from stochproc.tensor._links import Link, TuckerLink
from stochproc.tensor._noise import Noise
from stochproc.tensor._packed import multiplicity

__all__ = ["Decomposition", "Frozen", "Rows", "contribution", "diagonal_of"]

# Numbers that one chunk of rows may hold in its widest array: 32 MiB in float64.
_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Rows:
    """Observed entries: scaled values, weights, and where each is among the points of each mode."""

    y: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    index: tuple[Int[Tensor, " n"], ...]

    def __len__(self) -> int:
        return len(self.y)

    def part(self, rows: Tensor | slice) -> Rows:
        """Some of the rows, at the same points."""
        return Rows(self.y[rows], self.weight[rows], tuple(i[rows] for i in self.index))

    def chunks(self, chunk_size: int, width: int) -> Iterator[Rows]:
        """All rows, some at a time, so that arrays of ``width`` numbers a row stay small."""
        size = max(1, min(chunk_size, _NUMBERS_AT_ONCE // width))
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))


@dataclass
class Frozen:
    """What rows that are no longer at hand have said: messages by mode and of the core, and about the noise."""

    messages: list[tuple[Tensor, Tensor]]
    core: tuple[Tensor, Tensor] | None
    n: float
    squares: float


@dataclass
class Decomposition:
    """Factors, link and noise, with q(u^1) .. q(u^K) q(W) q(tau) improved one after the other."""

    factors: list[Factor]
    link: Link
    noise: Noise
    anchor: int
    """The mode updated first in every sweep."""
    chunk_size: int = 65_536
    squares: float = 0.0
    """Expected weighted squared residuals, summed, at the end of the last sweep."""
    n: float = 0.0
    """Rows in it."""
    frozen: Frozen | None = field(default=None)

    @property
    def order(self) -> list[int]:
        """Modes in the order of their updates."""
        return [self.anchor, *(k for k in range(len(self.factors)) if k != self.anchor)]

    def gathered(self, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
        """First and second moments of the functions of all modes at the rows."""
        means = [f.mean[i] for f, i in zip(self.factors, rows.index, strict=True)]
        seconds = [f.second[i] for f, i in zip(self.factors, rows.index, strict=True)]
        return means, seconds

    def moments(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Mean and variance of f at rows whose points are known."""
        found = []
        for some in rows.chunks(self.chunk_size, self.link.width):
            mean, second = self.link.moments(*self.gathered(some))
            found.append((mean, (second - mean.square()).clamp(min=0.0)))
        return torch.cat([m for m, _ in found]), torch.cat([v for _, v in found])

    def log_density(self, rows: Rows) -> Tensor:
        """Log density of each row by the normal law with the predicted moments."""
        mean, variance = self.moments(rows)
        variance = variance + 1 / (self.noise.precision * rows.weight)
        return -0.5 * ((rows.y - mean).square() / variance + (2 * torch.pi * variance).log())

    def sums(self, k: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Sums over rows at each point of mode k: w E[z z'], packed, and w y E z."""
        factor = self.factors[k]
        second, linear = torch.zeros_like(factor.cov), torch.zeros_like(factor.mean)
        for some in rows.chunks(self.chunk_size, self.link.width):
            z = self.link.regressors(k, *self.gathered(some))
            second.index_add_(0, some.index[k], z.second * some.weight[:, None])
            linear.index_add_(0, some.index[k], z.mean * (some.weight * some.y)[:, None])
        return second, linear

    def update_mode(self, k: int, rows: Rows, *, learn: bool, keep: float = 0.0, factor_of_rows: float = 1.0) -> float:
        """Update q(u^k); return the expected squares of the rows, but for their y^2.

        ``keep`` is the share of the old messages that stays (damping); the rows count ``factor_of_rows`` times.
        """
        factor, tau = self.factors[k], self.noise.precision
        second, linear = self.sums(k, rows)
        Lam, eta = tau * factor_of_rows * second, tau * factor_of_rows * linear
        if self.frozen is not None:
            Lam, eta = Lam + self.frozen.messages[k][0], eta + self.frozen.messages[k][1]
        if keep:
            Lam, eta = keep * factor.Lam + (1 - keep) * Lam, keep * factor.eta + (1 - keep) * eta
        factor.absorb(Lam, eta, learn=learn)
        weight = multiplicity(factor.rank, factor.mean)
        return float((second * factor.second @ weight).sum() - 2 * (linear * factor.mean).sum())

    def update_core(self, rows: Rows, *, keep: float = 0.0, factor_of_rows: float = 1.0) -> float:
        """Update q(W) and its prior variance; return the expected squares of the rows, but for their y^2."""
        link, tau = self.link, self.noise.precision
        if not isinstance(link, TuckerLink):
            raise TypeError(f"link must have a core; got {type(link).__name__}.")
        parts = [
            link.statistics(*self.gathered(some), some.y, some.weight)
            for some in rows.chunks(self.chunk_size, link.width)
        ]
        second = torch.stack([p[0] for p in parts]).sum(0)
        linear = torch.stack([p[1] for p in parts]).sum(0)
        precision, slope = tau * factor_of_rows * link.matrix(second), tau * factor_of_rows * linear
        if self.frozen is not None and self.frozen.core is not None:
            precision, slope = precision + self.frozen.core[0], slope + self.frozen.core[1]
        if keep and link.precision is not None and link.linear is not None:
            precision = keep * link.precision + (1 - keep) * precision
            slope = keep * link.linear + (1 - keep) * slope
        link.update(precision, slope)
        link.update_variance()
        return float((link.folded * second).sum() - 2 * linear @ link.mean.flatten())

    def sweep(self, rows: Rows, *, learn: bool, keep: float = 0.0, factor_of_rows: float = 1.0) -> None:
        """Update every part once."""
        options = {"keep": keep, "factor_of_rows": factor_of_rows}
        for k in self.order:
            squares = self.update_mode(k, rows, learn=learn, **options)
        if isinstance(self.link, TuckerLink):
            squares = self.update_core(rows, **options)
        # Rounding may leave squares of an exact fit below zero.
        squares = factor_of_rows * max(squares + float(rows.weight @ rows.y.square()), 0.0)
        n = factor_of_rows * len(rows)
        if self.frozen is not None:
            squares, n = squares + self.frozen.squares, n + self.frozen.n
        if keep and factor_of_rows != 1:
            # A batch says what all rows do only on average; of all rows the noise is exact, damped messages or not.
            squares, n = keep * self.squares + (1 - keep) * squares, keep * self.n + (1 - keep) * n
        self.squares, self.n = squares, n
        self.noise.update(n, squares)

    def bound(self, rows: Rows) -> float:
        """Lower bound of log p(y) of all rows of the last sweep, in nats and scaled y."""
        fit = self.noise.expected_log_likelihood(len(rows), self.squares, float(rows.weight.log().sum()))
        loss = sum(f.divergence() for f in self.factors) + self.noise.divergence()
        if isinstance(self.link, TuckerLink):
            loss += self.link.divergence()
        return fit - loss

    def objective(self, rows: Rows) -> float:
        """The bound plus the log prior of the learned hyperparameters: what never falls."""
        with torch.no_grad():
            return self.bound(rows) + sum(float(f.prior.log_prior()) for f in self.factors)


def contribution(factors: Sequence[Factor], rows: Rows) -> Tensor:
    """E ||f_r||^2 over rows of each component of CP."""
    total = torch.ones_like(factors[0].mean[rows.index[0]])
    for factor, index in zip(factors, rows.index, strict=True):
        diagonal = factor.cov[:, diagonal_of(factor.rank)] + factor.mean.square()
        total = total * diagonal[index]
    return total.sum(0)


def diagonal_of(rank: int) -> list[int]:
    """Where the diagonal is in a packed matrix."""
    return [j * rank - j * (j - 1) // 2 for j in range(rank)]
