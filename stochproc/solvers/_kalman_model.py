"""A state-space model and its messages as scalar messages in blocks of time."""

from typing import NamedTuple

import torch
from torch import Tensor

from stochproc.solvers._kalman_algebra import product, roots, transpose
from stochproc.solvers._kalman_blocks import Blocks

__all__ = ["Messages", "Model", "make_model", "scalar_messages"]


class Model(NamedTuple):
    """Transitions and scalar messages in blocks of ``length`` steps; D states, r messages a point."""

    A: Tensor
    """(length, D, D, m)"""
    Q: Tensor
    """(length, D, D, m)"""
    h: Tensor
    """(length, r, D, m)"""
    q: Tensor
    """(length, r, m)"""
    linear: "Tensor | None"
    """(length, D, m): messages exp(linearᵀ x), None if there are none."""


class Messages(NamedTuple):
    """Messages of points in time, taken apart: Lam = U Uᵀ and eta = U q + left."""

    U: Tensor
    """(r, r, batch, n)"""
    q: Tensor
    """(r, batch, n)"""
    left: "Tensor | None"
    """(r, batch, n): what of eta is outside the range of Lam; None if there is nothing but rounding."""
    z: "Tensor | None"
    """(r, batch, n): Uᵀ shift for messages around ``shift``, else None."""
    indefinite: Tensor
    """(batch,): a precision is not symmetric positive semidefinite; U of that point is NaN."""


def scalar_messages(Lam: Tensor, eta: Tensor, shift: "Tensor | None") -> Messages:
    """Take messages apart that are (batch, n, r, r), (batch, n, r) and None or (batch, n, r)."""
    r, shape = Lam.shape[-1], Lam.shape[:-2]
    entries = Lam.movedim((-2, -1), (0, 1)).flatten(2)
    rhs = eta.movedim(-1, 0).flatten(1).unsqueeze(1)
    Ut, q = roots(torch.cat([entries, rhs], 1)).split((r, 1), 1)
    U = transpose(Ut)
    eps = torch.finfo(Lam.dtype).eps
    # An indefinite or unsymmetric matrix is not what its factor represents, by far more than rounding.
    error = (product(U, transpose(U)) - entries).abs().amax((0, 1))
    indefinite = error > eps**0.5 * entries.abs().amax((0, 1))
    if bool(indefinite.any()):
        # NaN spreads over the series with a bad precision and over no other.
        U = torch.where(indefinite, torch.nan, U)
    rest = rhs - product(U, q)
    real = rest.abs() > 8 * r * eps * (rhs.abs() + product(U.abs(), q.abs()))
    z = None if shift is None else product(transpose(U), shift.movedim(-1, 0).flatten(1).unsqueeze(1))
    return Messages(
        U.unflatten(-1, shape),
        q.squeeze(1).unflatten(-1, shape),
        torch.where(real, rest, 0.0).squeeze(1).unflatten(-1, shape) if bool(real.any()) else None,
        None if z is None else z.squeeze(1).unflatten(-1, shape),
        indefinite.unflatten(0, shape).any(-1),
    )


def make_model(blocks: Blocks, A: Tensor, Q: Tensor, H: Tensor, messages: Messages) -> Model:
    """Cut transitions (batch, n, D, D) and messages about the outputs H x into blocks."""

    def of_state(x: Tensor) -> Tensor:
        return (H.mT @ x.flatten(1)).unflatten(1, x.shape[1:])

    U, q, left, z, _ = messages
    return Model(
        blocks.cut_transitions(A.movedim((-2, -1), (0, 1))),
        blocks.cut(Q.movedim((-2, -1), (0, 1))),
        blocks.cut(of_state(U).transpose(0, 1)),
        blocks.cut(q if z is None else q + z),
        None if left is None else blocks.cut(of_state(left)),
    )
