"""Points in time cut into blocks of equal length that are worked through side by side."""

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Blocks"]


@dataclass(frozen=True)
class Blocks:
    """How n points of each of ``batch`` series are laid out.

    Point i is step ``i % length`` of block ``i // length``. A quantity has shape (length, \\*entries, m), with
    m = batch * n_blocks, the block running fastest, so that one step of all blocks and series is contiguous. The
    points that fill up the last blocks are identities: transition I without noise, no message.
    """

    n: int
    batch: int
    dim: int
    n_blocks: int = 1

    @property
    def length(self) -> int:
        """Steps of a block."""
        return math.ceil(self.n / self.n_blocks)

    @classmethod
    def of_length(cls, n: int, batch: int, dim: int, length: int) -> "Blocks":
        """As many blocks, a power of two, as brings their length closest to ``length``."""
        return cls(n, batch, dim, 1 << max(0, round(math.log2(n / length))))

    def zeros(self, like: Tensor, steps: int, *entries: int) -> Tensor:
        """Zeros of shape (steps, \\*entries, m)."""
        return like.new_zeros(steps, *entries, self.batch * self.n_blocks)

    def cut(self, x: Tensor) -> Tensor:
        """Lay out x of shape (\\*entries, batch, n), padded by zeros."""
        out = self.zeros(x, self.length, *x.shape[:-2])
        target = out.unflatten(-1, (self.batch, self.n_blocks)).movedim(0, -1)
        full, rest = divmod(self.n, self.length)
        target[..., :full, :] = x[..., : full * self.length].unflatten(-1, (full, self.length))
        if rest:
            target[..., full, :rest] = x[..., full * self.length :]
        return out

    def cut_transitions(self, A: Tensor) -> Tensor:
        """``cut`` for matrices, padded by identities."""
        out = self.cut(A)
        full, rest = divmod(self.n, self.length)
        diagonal = out.diagonal(dim1=1, dim2=2).unflatten(1, (self.batch, self.n_blocks))
        if rest:
            diagonal[rest:, :, full] = 1.0
        diagonal[:, :, full + bool(rest) :] = 1.0
        return out

    def join(self, x: Tensor) -> Tensor:
        """Undo ``cut``: shape (batch, n, \\*entries)."""
        x = x.unflatten(-1, (self.batch, self.n_blocks)).movedim((-2, -1, 0), (0, 1, 2))
        return x.flatten(1, 2)[:, : self.n]
