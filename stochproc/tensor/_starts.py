"""Where coordinate ascent starts: polynomials of the coordinates, chosen by degree or greedily."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stochproc.tensor._coordinate_ascent import Rows
from stochproc.tensor._modes import Mode
from stochproc.tensor._priors import FunctionPrior

__all__ = ["Start", "basis_functions", "degree_start", "find_anchor", "greedy_start", "perturbed", "random_start"]

# Variance of functions that start as polynomials; from 0.1 fits ended 0.01 to 0.07 nats a held-out row lower on two of
# three tables.
START_VARIANCE = 0.02
# Rows whose regressors are held at once.
_ROWS_AT_ONCE = 65_536
# Highest total degree that the greedy start tries.
GREEDY_DEGREE = 3


class Start(NamedTuple):
    """Means of the functions of each mode at its points, and the mode that is solved for first."""

    means: list[Tensor]
    anchor: int


def _log_evidence(
    rows: Rows, k: int, regressors: Callable[[Rows], Tensor], c: int, prior: FunctionPrior, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Evidence and means of a scalar smoother in mode k, with E[tau] = 1, for c regressors of rows, (n, c)."""
    n = len(points)
    lam, eta = rows.y.new_zeros(n, c), rows.y.new_zeros(n, c)
    for some in rows.chunks(_ROWS_AT_ONCE, c):
        z = regressors(some)
        lam.index_add_(0, some.index[k], some.weight[:, None] * z.square())
        eta.index_add_(0, some.index[k], (some.weight * some.y)[:, None] * z)
    with torch.no_grad():
        return prior.evidence(points, lam.T.contiguous(), eta.T.contiguous())


def find_anchor(rows: Rows, priors: Sequence[FunctionPrior], points: Sequence[Tensor]) -> int:
    """The mode whose functions alone explain most: highest evidence, or of equal ones the most points."""
    evidence = [
        float(_log_evidence(rows, k, lambda some: torch.ones_like(some.y)[:, None], 1, prior, p)[0])
        for k, (prior, p) in enumerate(zip(priors, points, strict=True))
    ]
    return max(range(len(points)), key=lambda k: (round(evidence[k], 9), len(points[k])))


def basis_functions(rows: Rows, k: int, mode: Mode, points: Tensor, n_functions: int) -> Tensor:
    """Functions of mode k at its points, (N_k, n_functions), the first of which is constant.

    Legendre polynomials of the empirical distribution function, that of categories ordered by their mean y; of a
    periodic mode cosines and sines.
    """
    if mode.period is not None:
        angle = 2 * math.pi * points / mode.period
        waves = [torch.ones_like(points)]
        for j in range(1, n_functions // 2 + 1):
            waves += [torch.cos(j * angle), torch.sin(j * angle)]
        return torch.stack(waves[:n_functions], 1)
    share = _distribution(rows, k, mode, points)
    table = np.polynomial.legendre.legvander(2 * share.cpu().numpy() - 1, max(n_functions - 1, 0))
    return torch.as_tensor(table[:, :n_functions]).to(points.device)


def _distribution(rows: Rows, k: int, mode: Mode, points: Tensor) -> Tensor:
    """Empirical distribution function of mode k at its points; categories are in the order of their mean y."""
    index = rows.index[k]
    count = torch.zeros_like(rows.y[:1]).expand(len(points)).clone().index_add_(0, index, torch.ones_like(rows.y))
    order = torch.arange(len(points), device=index.device)
    if mode.kind == "discrete":
        total = torch.zeros_like(count).index_add_(0, index, rows.y)
        order = (total / count.clamp(min=1)).argsort(stable=True)
    share = torch.empty_like(count)
    share[order] = (count[order].cumsum(0) - 0.5 * count[order]) / len(rows)
    return share


def exponents(n_modes: int, n: int) -> list[tuple[int, ...]]:
    """The first n exponents by total degree; within one degree products of low powers come first."""
    found: list[tuple[int, ...]] = []
    degree = 0
    while len(found) < n:
        found += of_degree(n_modes, degree)
        degree += 1
        if n_modes == 0:
            return [()] * n
    return found[:n]


def of_degree(n_modes: int, degree: int) -> list[tuple[int, ...]]:
    """All exponents of a total degree."""
    if n_modes == 0:
        return [()] if degree == 0 else []
    # Compositions of the degree: where the bars are among stars and bars.
    found = []
    for bars in itertools.combinations(range(degree + n_modes - 1), n_modes - 1):
        ends = (-1, *bars, degree + n_modes - 1)
        found.append(tuple(b - a - 1 for a, b in itertools.pairwise(ends)))
    return sorted(found, key=lambda e: (max(e), tuple(-d for d in e)))


def degree_start(
    rows: Rows, modes: Sequence[Mode], points: Sequence[Tensor], priors: Sequence[FunctionPrior], rank: int
) -> Start:
    """Products of polynomials by total degree in all modes but the anchor, whose functions start at zero."""
    anchor = find_anchor(rows, priors, points)
    others = [k for k in range(len(points)) if k != anchor]
    chosen = exponents(len(others), rank)
    means = [p.new_zeros(len(p), rank) for p in points]
    for at, k in enumerate(others):
        degrees = [e[at] for e in chosen]
        means[k] = basis_functions(rows, k, modes[k], points[k], max(degrees) + 1)[:, degrees]
    return Start(means, anchor)


def greedy_start(
    rows: Rows, modes: Sequence[Mode], points: Sequence[Tensor], priors: Sequence[FunctionPrior], rank: int
) -> Start:
    """One component after the other: the anchor and exponents whose scalar smoother explains the residual best."""
    K = len(points)
    tables = [basis_functions(rows, k, modes[k], points[k], GREEDY_DEGREE + 1) for k in range(K)]
    candidates = [e for degree in range(GREEDY_DEGREE + 1) for e in of_degree(K - 1, degree)]
    residual = rows.y.clone()
    means = [p.new_zeros(len(p), rank) for p in points]
    anchors = []
    for r in range(rank):
        left = Rows(residual, rows.weight, rows.index)
        found: list[tuple[float, int, tuple[int, ...], Tensor]] = []
        for k in range(K):
            regressors = partial(_products, tables, k, candidates)
            log_z, functions = _log_evidence(left, k, regressors, len(candidates), priors[k], points[k])
            c = int(log_z.argmax())
            found.append((float(log_z[c]), k, candidates[c], functions[c]))
        _, k, chosen, function = max(found, key=lambda f: f[0])
        anchors.append(k)
        means[k][:, r] = function
        for at, j in enumerate(j for j in range(K) if j != k):
            means[j][:, r] = tables[j][:, chosen[at]]
        residual = residual - _products(tables, k, [chosen], rows)[:, 0] * function[rows.index[k]]
    return Start(means, anchors[0])


def _products(tables: Sequence[Tensor], k: int, chosen: Sequence[tuple[int, ...]], rows: Rows) -> Tensor:
    """Products of the chosen columns of the tables of all modes but k at rows, (n, len(chosen))."""
    z = rows.y.new_ones(len(rows), len(chosen))
    for at, j in enumerate(j for j in range(len(tables)) if j != k):
        z *= tables[j][:, [e[at] for e in chosen]][rows.index[j]]
    return z


def random_start(points: Sequence[Tensor], rank: int, anchor: int, generator: torch.Generator) -> Start:
    """Independent standard normal values at every point."""
    return Start([torch.randn(len(p), rank, dtype=p.dtype, generator=generator).to(p.device) for p in points], anchor)


def perturbed(
    start: Start, rows: Rows, modes: Sequence[Mode], points: Sequence[Tensor], generator: torch.Generator
) -> Start:
    """Add random cosines of the empirical distribution functions to all functions but those of the anchor."""
    means = list(start.means)
    for k, mean in enumerate(means):
        if k == start.anchor:
            continue
        share = _distribution(rows, k, modes[k], points[k])
        draw = torch.rand(2, mean.shape[1], dtype=mean.dtype, generator=generator).to(mean.device)
        means[k] = mean + 0.5 * torch.cos(math.pi * (share[:, None] * 3 * draw[0] + 2 * draw[1]))
    return Start(means, start.anchor)
