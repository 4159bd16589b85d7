"""One step at a time through all blocks side by side: elements of blocks, the filter, and its adjoint.

A message with precision Lam = U Uᵀ is r scalar messages, one a column h of Hᵀ U, each exp(q g - g²/2) of g = hᵀ x:
they are absorbed one after the other, and nothing is ever inverted but a number that is at least 1.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc.solvers._kalman_algebra import product, transpose
from stochproc.solvers._kalman_blocks import Blocks
from stochproc.solvers._kalman_model import Model
from stochproc.solvers._kalman_scan import Element, Likelihood, Moments

__all__ = ["Filtered", "adjoint_pass", "dot", "element_pass", "filter_pass"]


class Filtered(NamedTuple):
    """Results of the filter."""

    states: Tensor
    """(length + 1, D, D + 1, m): covariance and mean beside it, before the block and after each step."""
    rows: Tensor
    """(length, r, D + 1, m): covariance P h of the state with each scalar observation, and hᵀ m, before it."""
    gains: Tensor
    """(length, r, D, m): P h / (1 + hᵀ P h)."""


def element_pass(model: Model, blocks: Blocks) -> Element:
    """The element of each block, from its single steps."""
    dim = blocks.dim
    # [[C, A, b], [*, -J, e]]: the innovation of a message is affine in the state x where the block starts, and one
    # update of rank one takes care of all five; the corner * is never read.
    whole = blocks.zeros(model.A, 1, 2 * dim, 2 * dim + 1)[0]
    state = whole[:dim]
    C, b = state[:, :dim], state[:, -1]
    state[:, dim:-1].diagonal().fill_(1.0)
    for A, Q, hs, qs, linear in _steps(model):
        state.copy_(product(A, state))
        _add_noise(C, A, Q)
        for h, q in zip(hs, qs, strict=True):
            column = h.unsqueeze(1)
            row = dot(column, state, 0)
            covariance = row[:dim]
            row[-1] -= q
            v = dot(covariance, h, 0)
            left = row[:-1] / (v + 1.0)
            whole.addcmul_(left.unsqueeze(1), row, value=-1)
            _settle(C, column, left[:dim])
        if linear is not None:
            whole[dim:, -1] += dot(state[:, dim:-1], linear.unsqueeze(1), 0)
            b += dot(C, linear, 1)
    return Element(state[:, dim:-1], Moments(C, b.unsqueeze(1)), Likelihood(-whole[dim:, dim:-1], whole[dim:, -1:]))


def filter_pass(model: Model, blocks: Blocks, before: Moments) -> Filtered:
    """Filter every block from the moments of the state before it."""
    dim, length = blocks.dim, blocks.length
    n_messages = model.h.shape[1]
    states = blocks.zeros(model.A, length + 1, dim, dim + 1)
    rows = blocks.zeros(model.A, length, n_messages, dim + 1)
    gains = blocks.zeros(model.A, length, n_messages, dim)
    states[0, :, :dim], states[0, :, dim:] = before
    all_states, Ps, ms = states.unbind(0), states[:, :, :dim].unbind(0), states[:, :, dim].unbind(0)
    for s, (A, Q, hs, qs, linear) in enumerate(_steps(model)):
        state, P, m = all_states[s + 1], Ps[s + 1], ms[s + 1]
        product(A, all_states[s], out=state)
        _add_noise(P, A, Q)
        for h, q, row, gain in zip(hs, qs, rows[s].unbind(0), gains[s].unbind(0), strict=True):
            column = h.unsqueeze(1)
            dot(column, state, 0, out=row)
            Ph = row[:dim]
            torch.div(Ph, dot(Ph, h, 0) + 1.0, out=gain)
            state.addcmul_(gain.unsqueeze(1), row, value=-1)
            m.addcmul_(gain, q)
            _settle(P, column, gain)
        if linear is not None:
            m += dot(P, linear, 1)
    return Filtered(states, rows, gains)


def _add_noise(P: Tensor, A: Tensor, Q: Tensor) -> None:
    """Turn A P' of the covariance P' of the step before into A P' Aᵀ + Q, symmetric to the last digits."""
    predicted = product(P, transpose(A)).add_(Q)
    torch.lerp(predicted, transpose(predicted), 0.5, out=P)


def _settle(P: Tensor, h: Tensor, gain: Tensor) -> None:
    """Correct the covariance after a message, h of shape (D, 1, m), where rounding matters.

    P h is ``gain`` by definition; under a very precise message the update leaves rounding errors of the size of the
    covariance before. This is the right factor and the last term of Joseph's form, (P - K h P)(I - h K) + K K.
    """
    error = dot(h, P, 0).sub_(gain)
    P.addcmul_(error.unsqueeze(1), gain, value=-1)


def adjoint_pass(model: Model, blocks: Blocks, filtered: Filtered, after: Tensor) -> tuple[Tensor, Tensor]:
    """Bryson-Frazier adjoints [N | r], (length, D, D + 1, m), of filtered and of predicted states.

    The smoothed state has mean m + P r and covariance P - P N P for the moments m, P of either kind; ``after`` is
    the adjoint of the state after the last step, (D, D + 1, m).
    """
    dim, length = blocks.dim, blocks.length
    of_filtered = blocks.zeros(after, length, dim, dim + 1)
    of_predicted = torch.empty_like(of_filtered)
    Ph, mean = filtered.rows.split((dim, 1), -2)
    beta = 1.0 / (dot(Ph, model.h, -2) + 1.0)
    own = model.h * beta.unsqueeze(-2)
    pull = own * (model.q.unsqueeze(-2) - mean)
    of_filtered[length - 1] = after
    for s in reversed(range(length)):
        adjoint = of_predicted[s].copy_(of_filtered[s])
        N, r = adjoint[:, :dim], adjoint[:, dim]
        if model.linear is not None:
            r += model.linear[s]
        parts = (model.h[s], filtered.gains[s], own[s], pull[s])
        for h, gain, own_k, pull_k in reversed(list(zip(*(x.unbind(0) for x in parts), strict=True))):
            # (I - h Kᵀ) [N | r] first, then the right factor I - K hᵀ and what the message itself says.
            adjoint.addcmul_(h.unsqueeze(1), dot(gain.unsqueeze(1), adjoint, 0), value=-1)
            N.addcmul_(dot(N, gain, 1).sub_(own_k).unsqueeze(1), h, value=-1)
            r += pull_k
        if s > 0:
            A = model.A[s]
            previous = product(transpose(A), adjoint, out=of_filtered[s - 1])
            previous[:, :dim] = product(previous[:, :dim], A)
    return of_filtered, of_predicted


def dot(a: Tensor, b: Tensor, axis: int, out: "Tensor | None" = None) -> Tensor:
    return torch.sum(a * b, axis, out=out)


def _steps(model: Model) -> Iterator[tuple[Any, ...]]:
    """A, Q, the h and the q of all messages, and the linear message, of one step after the other."""
    linear = [None] * len(model.A) if model.linear is None else model.linear.unbind(0)
    for A, Q, h, q, l in zip(
        model.A.unbind(0), model.Q.unbind(0), model.h.unbind(0), model.q.unbind(0), linear, strict=True
    ):
        yield A, Q, h.unbind(0), q.unbind(0), l
