"""Sums, products, scalings and stacks of state spaces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from stochproc.kernels._state_space import StateSpace

__all__ = ["BlockStateSpace", "JoinedStateSpace", "ProductStateSpace", "ScaledStateSpace"]


class BlockStateSpace(StateSpace):
    """Independent processes side by side: their sum, or (``joint``) all of them as outputs.

    Where the parts start at different times, each is asked for its own prior; ``t0`` is then the latest start and
    ``P0`` the covariance there.
    """

    def __init__(self, parts: Sequence[StateSpace], *, joint: bool) -> None:
        parts = list(parts)
        for part in parts:
            if not isinstance(part, StateSpace):
                raise TypeError(f"parts must be state spaces; got {type(part).__name__}.")
        if not parts:
            raise ValueError("parts must hold at least one state space; got none.")
        try:
            torch.broadcast_shapes(*(p.batch_shape for p in parts))
        except RuntimeError:
            shapes = ", ".join(str(tuple(p.batch_shape)) for p in parts)
            raise ValueError(f"the batch shapes of the parts must broadcast; got {shapes}.") from None
        self.parts, self.joint = parts, joint
        starts = [p.t0 for p in parts if p.t0 is not None]
        t0 = max(starts) if starts else None
        super().__init__(
            block_diagonal([p.F for p in parts]),
            block_diagonal([p.L for p in parts]),
            block_diagonal([p.Qc for p in parts]),
            block_diagonal([p.H for p in parts]) if joint else torch.cat([p.H for p in parts], -1),
            block_diagonal([p.P0 if t0 is None else p.prior(t0).to(p.P0) for p in parts]),
            t0=t0,
            name=(", " if joint else " + ").join(p.name for p in parts),
        )

    @property
    def noiseless(self) -> bool:
        """See :attr:`StateSpace.noiseless`."""
        return all(p.noiseless for p in self.parts)

    def derivative_output(self) -> Tensor:
        """Return H F, part by part; see :meth:`StateSpace.derivative_output`."""
        rows = [p.derivative_output() for p in self.parts]
        if self.joint:
            return block_diagonal(rows)
        return torch.cat([row.expand(*self.batch_shape, *row.shape[-2:]) for row in rows], -1)

    def _step(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        steps = [p._step(dt) for p in self.parts]
        return block_diagonal([A for A, _ in steps]), block_diagonal([Q for _, Q in steps])

    def _prior(self, t: Tensor) -> Tensor:
        return block_diagonal([p._prior(t) for p in self.parts])


class JoinedStateSpace(StateSpace):
    """The processes of the last batch axis as the outputs of one process."""

    def __init__(self, inner: StateSpace) -> None:
        if not inner.batch_shape:
            raise ValueError("join needs a state space with a batch axis; got one without.")
        self.inner = inner
        b = inner.batch_shape[-1]
        eye = torch.eye(b, dtype=inner.H.dtype, device=inner.device)
        super().__init__(
            spread(inner.F, 2),
            spread(inner.L, 2),
            spread(inner.Qc, 2),
            kron(eye, inner.H),
            spread(inner.P0, 2),
            t0=inner.t0,
            name=f"{b} of {inner.name}",
        )

    @property
    def noiseless(self) -> bool:
        """See :attr:`StateSpace.noiseless`."""
        return self.inner.noiseless

    def derivative_output(self) -> Tensor:
        """Return H F, process by process; see :meth:`StateSpace.derivative_output`."""
        return spread(self.inner.derivative_output(), 2)

    def _step(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self._spread(x) for x in self.inner._step(dt.unsqueeze(-2)))  # type: ignore[return-value]

    def _prior(self, t: Tensor) -> Tensor:
        return self._spread(self.inner._prior(t.unsqueeze(-2)))

    def _spread(self, x: Tensor) -> Tensor:
        return spread(x.expand(*x.shape[:-4], self.inner.batch_shape[-1], *x.shape[-3:]), 3)


class ScaledStateSpace(StateSpace):
    """A process whose variance is multiplied by ``scale`` of shape (*batch, 1)."""

    def __init__(self, inner: StateSpace, scale: Tensor) -> None:
        self.inner, self.scale = inner, scale
        scale = scale.unsqueeze(-1)
        super().__init__(
            inner.F,
            inner.L,
            scale * inner.Qc,
            inner.H,
            scale * inner.P0,
            t0=inner.t0,
            name=f"a multiple of {inner.name}",
        )

    @property
    def noiseless(self) -> bool:
        """See :attr:`StateSpace.noiseless`."""
        return self.inner.noiseless

    def derivative_output(self) -> Tensor:
        """Return H F; see :meth:`StateSpace.derivative_output`."""
        row = self.inner.derivative_output()
        return row.expand(*self.batch_shape, *row.shape[-2:])

    def _step(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        A, Q = self.inner._step(dt)
        return A, self.scale.to(dt)[..., None, None] * Q

    def _prior(self, t: Tensor) -> Tensor:
        return self.scale.to(t)[..., None, None] * self.inner._prior(t)


class ProductStateSpace(StateSpace):
    r"""Product of two stationary kernels: the Kronecker product of the states.

    With :math:`A = A_1 \otimes A_2` the noise is :math:`Q = Q_1 \otimes P_2 + A_1 P_1 A_1^\top \otimes Q_2`, a sum of
    positive semidefinite terms (:math:`P - A P A^\top` expanded about :math:`P_2`).
    """

    def __init__(self, first: StateSpace, second: StateSpace) -> None:
        for part in (first, second):
            if part.t0 is not None:
                raise ValueError(
                    "only products of stationary kernels have a state-space form here; got a factor that starts at "
                    f"t0 = {part.t0}: {part.name}."
                )
            if part.n_outputs != 1:
                raise ValueError(f"factors must have one output; got {part.n_outputs}: {part.name}.")
        self.first, self.second = first, second
        one, two = (torch.eye(p.state_dim, dtype=p.dtype, device=p.device) for p in (first, second))
        L = [kron(first.L, two), kron(one, second.L)]
        batch = torch.broadcast_shapes(first.batch_shape, second.batch_shape)
        super().__init__(
            kron(first.F, two) + kron(one, second.F),
            torch.cat([m.expand(*batch, *m.shape[-2:]) for m in L], -1),
            block_diagonal([kron(first.Qc, second.P0), kron(first.P0, second.Qc)]),
            kron(first.H, second.H),
            kron(first.P0, second.P0),
            name=" * ".join(f"({p.name})" if " + " in p.name else p.name for p in (first, second)),
        )

    @property
    def noiseless(self) -> bool:
        """See :attr:`StateSpace.noiseless`."""
        return self.first.noiseless and self.second.noiseless

    def _step(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        (A1, Q1), (A2, Q2) = self.first._step(dt), self.second._step(dt)
        P1, P2 = self.first.P0.to(dt).unsqueeze(-3), self.second.P0.to(dt).unsqueeze(-3)
        A = kron(A1, A2)
        if self.noiseless:
            return A, torch.zeros_like(A)
        if self.second.noiseless:
            return A, kron(Q1, P2)
        # A P A' is P where the first factor has no noise: no product then, and no rounding.
        moved = P1 if self.first.noiseless else A1 @ P1 @ A1.mT
        Q = kron(moved, Q2)
        return A, Q if self.first.noiseless else Q + kron(Q1, P2)


def multiply(parts: Sequence[StateSpace]) -> StateSpace:
    """Return the product of one or more stationary processes."""
    return reduce(ProductStateSpace, parts)


def spread(x: Tensor, own: int) -> Tensor:
    """Make blocks along the axis before the last ``own`` one block-diagonal matrix: (b, *, i, j) to (*, b i, b j)."""
    b = x.shape[-own - 1]
    moved = x.movedim(-own - 1, -3)
    eye = torch.eye(b, dtype=x.dtype, device=x.device)
    return (moved[..., :, :, None, :] * eye[:, None, :, None]).flatten(-4, -3).flatten(-2)


def kron(a: Tensor, b: Tensor) -> Tensor:
    """Kronecker product of the last two axes, the others broadcast."""
    return (a[..., :, None, :, None] * b[..., None, :, None, :]).flatten(-4, -3).flatten(-2)


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Block-diagonal matrix on the last two axes, the others broadcast; blocks need not be square."""
    batch = torch.broadcast_shapes(*(b.shape[:-2] for b in blocks))
    out = blocks[0].new_zeros(*batch, sum(b.shape[-2] for b in blocks), sum(b.shape[-1] for b in blocks))
    row = column = 0
    for b in blocks:
        out[..., row : row + b.shape[-2], column : column + b.shape[-1]] = b
        row, column = row + b.shape[-2], column + b.shape[-1]
    return out
