"""The parallel scan over blocks: what the points before and after say about the state at each end of a block.

A block is the element (A, b, C, e, J): given the state x where it starts, the state where it ends is normal with
mean A x + b and covariance C, and the messages in between have the likelihood exp(eᵀx - xᵀJx/2). Two elements
combine as in equation (15) of the reference, here in a form that takes no difference of large matrices.

References
----------
S. Sarkka and A. F. Garcia-Fernandez, "Temporal parallelization of Bayesian smoothers", IEEE TAC 2021.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stochproc.solvers._kalman_algebra import product, roots, solve_beside, transpose

__all__ = ["Element", "Likelihood", "Moments", "condition", "scan"]


class Moments(NamedTuple):
    """Covariance (D, D, m) and mean (D, 1, m) of a state."""

    C: Tensor
    b: Tensor


class Likelihood(NamedTuple):
    """exp(eᵀx - xᵀJx/2), J of shape (D, D, m) and e of shape (D, 1, m)."""

    J: Tensor
    e: Tensor


class Element(NamedTuple):
    """What a block does to the state at its start."""

    A: Tensor
    moments: Moments
    likelihood: Likelihood


class Conditioned(NamedTuple):
    """Two things side by side on the last axis, (D, D, 2 m) and (D, 1, 2 m), from ``condition``."""

    root: Tensor
    vector: Tensor


def condition(state: Moments, seen: Likelihood, noise: Moments, likelihood: Likelihood) -> Conditioned:
    r"""Multiply ``state`` by the likelihood ``seen`` of it, and average ``likelihood`` over ``noise``.

    These are the same formula with covariance and precision exchanged, hence one pass over both. The first m
    matrices Z of ``root`` have Zᵀ Z = (I + C J)⁻¹ C, and their vectors are the means; the other m have
    Yᵀ Y = (I + J C)⁻¹ J, and their vectors are n = (I + J C)⁻¹ w with w = e - J b. In the first case C = L Lᵀ,
    I + Lᵀ J L = R Rᵀ and Z = R⁻¹ Lᵀ, in the second C and J change places.
    """
    dim, m = len(state.C), state.C.shape[-1]
    own, other = torch.cat([state.C, likelihood.J], -1), torch.cat([seen.J, noise.C], -1)
    b = torch.cat([state.b, noise.b], -1)
    w = torch.cat([seen.e, likelihood.e], -1) - product(torch.cat([seen.J, likelihood.J], -1), b)
    found = roots(torch.cat([own, w], 1))
    Lt = found[:, :dim]
    S = product(Lt, product(other, transpose(Lt)))
    S.diagonal().add_(1.0)
    root, y = solve_beside(torch.cat([S, found], 1)).split((dim, 1), 1)
    # With J = U Uᵀ, what is w = U q gives n = U (I + Uᵀ C U)⁻¹ q = Yᵀ R⁻¹ q, in which nothing large cancels. The
    # rest of w belongs to pivots lost in rounding, whose square roots are not, and to messages linear in the state.
    rest = w[..., m:] - product(transpose(Lt[..., m:]), found[:, dim:, m:])
    inner = product(root, torch.cat([w[..., :m], product(noise.C, rest)], -1))
    inner[..., m:] = y[..., m:] - inner[..., m:]
    return Conditioned(root, torch.cat([state.b, rest], -1) + product(transpose(root), inner))


def _carry(both: Conditioned, forwards: Element, backwards: Element) -> tuple[Moments, Likelihood]:
    """Moments after the element ``forwards``, and the likelihood before the element ``backwards``."""
    m = both.root.shape[-1] // 2
    A = torch.cat([forwards.A, transpose(backwards.A)], -1)
    moved = product(A, transpose(both.root))
    matrix = product(moved, transpose(moved)) + torch.cat([forwards.moments.C, backwards.likelihood.J], -1)
    vector = product(A, both.vector) + torch.cat([forwards.moments.b, backwards.likelihood.e], -1)
    return Moments(matrix[..., :m], vector[..., :m]), Likelihood(matrix[..., m:], vector[..., m:])


def combine(first: Element, second: Element) -> Element:
    """The element of two neighbouring blocks."""
    both = condition(first.moments, second.likelihood, first.moments, second.likelihood)
    Z = both.root[..., : first.A.shape[-1]]
    inner = product(Z, product(second.likelihood.J, first.A))
    return Element(product(second.A, first.A - product(transpose(Z), inner)), *_carry(both, second, first))


def scan(elements: Element, prior: Moments, n_blocks: int) -> tuple[Moments, Likelihood]:
    """Moments of the state before each block given all before, and likelihood of all after it at its end.

    The blocks of a series are neighbours on the last axis; their number is a power of two. Twice log2 of it levels
    of at most half as many products each.
    """
    levels = [elements]
    while n_blocks > 2:
        levels.append(combine(*_halves(levels[-1])))
        n_blocks //= 2
    before = prior
    after = Likelihood(torch.zeros_like(prior.C), torch.zeros_like(prior.b))
    for level in reversed(levels if n_blocks > 1 else []):
        first, second = _halves(level)
        # The right half starts after the left one; the left half is followed by the right one and all after it.
        both = condition(before, first.likelihood, second.moments, after)
        passed, coming = _carry(both, first, second)
        before = Moments(*(_interleave(a, b) for a, b in zip(before, passed, strict=True)))
        after = Likelihood(*(_interleave(a, b) for a, b in zip(coming, after, strict=True)))
    return before, after


def _halves(elements: Element) -> tuple[Element, Element]:
    def take(k: int) -> Element:
        A, moments, likelihood = elements
        return Element(
            A[..., k::2], Moments(*(x[..., k::2] for x in moments)), Likelihood(*(x[..., k::2] for x in likelihood))
        )

    return take(0), take(1)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    return torch.stack([even, odd], -1).flatten(-2)
