"""Fewer components: those that explain next to nothing are dropped, those that say the same are merged."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stochproc.tensor._coordinate_ascent import Decomposition, Rows, contribution, diagonal_of
from stochproc.tensor._links import CPLink, TuckerLink

__all__ = ["Pruner", "Redundancy", "merge", "redundancies"]

# A component is dropped when its share of E||f||^2 was below this in so many sweeps in a row.
SMALL_SHARE = 1e-3
SWEEPS = 3
# Functions are taken for the same, up to a factor, from this cosine on.
COLLINEAR = 0.95
# How many mergers are tried at a time, in how many sweeps each makes up for itself, and sweeps of rest after failures.
CANDIDATES = 2
TRIAL_SWEEPS = 3
REST = 8


class Pruner:
    """Watches the share of each component from sweep to sweep.

    Parameters
    ----------
    model : Decomposition
        Changed in place.
    """

    def __init__(self, model: Decomposition) -> None:
        self.model = model
        factors = model.factors if isinstance(model.link, TuckerLink) else model.factors[:1]
        self._small = [torch.zeros(f.rank, dtype=torch.int64, device=f.mean.device) for f in factors]
        self._rest = 0

    def after_sweep(self, rows: Rows, *, learn: bool) -> None:
        """Drop what has been small for long enough; else merge two components if the bound does not fall by it."""
        self._rest -= 1
        if not self._prune(rows) and self._rest <= 0 and learn and isinstance(self.model.link, CPLink):
            self._merge(rows)

    def _prune(self, rows: Rows) -> bool:
        model = self.model
        if isinstance(model.link, TuckerLink):
            for k in range(len(model.factors)):
                self._count(k, tucker_shares(model, rows, k))
        else:
            shares = contribution(model.factors, rows)
            self._count(0, shares / shares.sum())
        kept = [self._kept(k) for k in range(len(self._small))]
        if all(len(keep) == len(small) for keep, small in zip(kept, self._small, strict=True)):
            return False
        # On a copy, so that an interruption finds all modes of one rank.
        trial = copy.deepcopy(model)
        if isinstance(trial.link, TuckerLink):
            for k, keep in enumerate(kept):
                trial.factors[k].keep(keep)
                trial.link.keep(k, keep)
        else:
            _keep_components(trial, kept[0])
        # What is left takes over what was dropped, and messages, evidence and noise become those of what is left.
        trial.sweep(rows, learn=False)
        vars(model).update(vars(trial))
        self._small = [small[keep] for keep, small in zip(kept, self._small, strict=True)]
        return True

    def _merge(self, rows: Rows) -> None:
        """Let others take over a component, on a copy that is kept if it ends with a bound no lower."""
        model = self.model
        before = model.objective(rows)
        for found in redundancies(model, rows)[:CANDIDATES]:
            trial = copy.deepcopy(model)
            merge(trial, rows, found)
            for _ in range(TRIAL_SWEEPS):
                trial.sweep(rows, learn=True)
            if trial.objective(rows) >= before:
                vars(model).update(vars(trial))
                self._small = [torch.zeros(model.factors[0].rank, dtype=torch.int64, device=rows.y.device)]
                return
            self._rest = REST

    def _count(self, k: int, shares: Tensor) -> None:
        self._small[k] = torch.where(shares < SMALL_SHARE, self._small[k] + 1, 0)

    def _kept(self, k: int) -> Tensor:
        keep = (self._small[k] < SWEEPS).nonzero()[:, 0]
        # One component stays whatever it explains.
        return keep if len(keep) else self._small[k].argmin()[None]


def _keep_components(model: Decomposition, keep: Tensor) -> None:
    for factor in model.factors:
        factor.keep(keep)
    model.link = CPLink(len(keep), len(model.factors))


class Redundancy(NamedTuple):
    """Component s is, in all modes but k, a combination of others: its functions in mode k can move to theirs."""

    cosine: float
    """Between its functions and what the others say of them, the smallest over those modes."""
    s: int
    k: int
    coefficients: Tensor
    """(rank,): how much of the function of s in mode k goes to each other component; 0 at s."""


def redundancies(model: Decomposition, rows: Rows) -> list[Redundancy]:
    """Components of CP that others can take over, the closest first.

    With two modes a function that is a combination of others in one mode will do; products of more modes can be
    joined only for pairs, whose functions are collinear in all modes but one.
    """
    gathered = [f.mean[i] for f, i in zip(model.factors, rows.index, strict=True)]
    norms = [m.norm(dim=0).clamp(min=torch.finfo(m.dtype).tiny) for m in gathered]
    grams = [(m / n).mT @ (m / n) for m, n in zip(gathered, norms, strict=True)]
    rank = gathered[0].shape[1]
    found = _combinations(grams, norms, rank) if len(grams) == 2 else _pairs(grams, norms, rank)
    return sorted((f for f in found if f.cosine > COLLINEAR), key=lambda f: -f.cosine)


def _pairs(grams: list[Tensor], norms: list[Tensor], rank: int) -> Iterator[Redundancy]:
    cosines = torch.stack(grams)
    for r in range(rank):
        for s in range(r + 1, rank):
            values = cosines[:, r, s]
            k = int(values.abs().argmin())
            others = [j for j in range(len(grams)) if j != k]
            if not others:
                continue
            coefficients = torch.zeros_like(norms[0])
            coefficients[r] = math.prod(float(values[j] * norms[j][s] / norms[j][r]) for j in others)
            yield Redundancy(float(values[others].abs().min()), s, k, coefficients)


def _combinations(grams: list[Tensor], norms: list[Tensor], rank: int) -> Iterator[Redundancy]:
    for j, k in ((0, 1), (1, 0)):
        for s in range(rank):
            others = [r for r in range(rank) if r != s]
            if not others:
                continue
            inverse = torch.linalg.pinv(grams[j][others][:, others], rtol=1e-6, hermitian=True)
            share = inverse @ grams[j][others, s]
            coefficients = torch.zeros_like(norms[0])
            coefficients[others] = share * norms[j][s] / norms[j][others]
            yield Redundancy(float((share @ grams[j][others, s]).clamp(min=0).sqrt()), s, k, coefficients)


def merge(model: Decomposition, rows: Rows, found: Redundancy) -> None:
    """Give the function of a component in mode k to others, drop it, and solve for mode k first."""
    factor = model.factors[found.k]
    factor.mean = factor.mean + factor.mean[:, found.s, None] * found.coefficients
    keep = torch.tensor([j for j in range(factor.rank) if j != found.s], device=factor.mean.device)
    anchor, model.anchor = model.anchor, found.k
    _keep_components(model, keep)
    # The messages of mode k are those of all components; those of the other modes still hold.
    model.sweep(rows, learn=False)
    model.anchor = anchor


def tucker_shares(model: Decomposition, rows: Rows, k: int) -> Tensor:
    """Share of E||f||^2 of the slice of the core that each component of mode k goes with."""
    total = torch.zeros_like(model.factors[k].mean[0])
    diagonal = diagonal_of(model.factors[k].rank)
    for some in rows.chunks(model.chunk_size, model.link.width):
        means, seconds = model.gathered(some)
        z = model.link.regressors(k, means, seconds)
        total = total + (z.second[:, diagonal] * seconds[k][:, diagonal]).sum(0)
    return total / total.sum()
