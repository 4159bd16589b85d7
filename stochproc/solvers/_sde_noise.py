"""Noise of an SDE solver: given, or drawn step by step so that one seed means one path."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._random import make_generator
from stochproc.solvers._sde_grid import TimeGrid, time_grid

__all__ = ["DrawnNoise", "Draws", "GivenNoise", "brownian_increments", "fork"]

Draws = Callable[[], Iterator[Tensor]]
"""Starts a pass over the noise of one segment, one tensor a step; a second call gives the same numbers."""

# Noise is drawn in blocks of about this size: large enough to save allocations, small enough for the cache.
BLOCK_BYTES = 1 << 18


def brownian_increments(
    ts: "Float[Tensor, '*batch n_times'] | Sequence[float | int]",
    shape: Sequence[int],
    *,
    dt: "float | int | None" = None,
    generator: "torch.Generator | None" = None,
    dtype: "torch.dtype | None" = None,
    device: "torch.device | str | None" = None,
) -> Float[Tensor, "n_steps ..."]:
    r"""Draw the increments of Brownian motion on the grid of ``integrate``.

    Parameters
    ----------
    ts, dt
        As in ``integrate``.
    shape : sequence of int
        Shape of one increment: the batch of the state, then the number of Brownian motions.
    generator : torch.Generator or None, default=None
        Source of the normals; None takes a fresh seed.
    dtype : torch.dtype or None, default=None
        None is the dtype of ``ts``, or float64 where that is no tensor.
    device : torch.device, str or None, default=None
        Where the result lives; None is the device of ``ts``, or the CPU.

    Returns
    -------
    Tensor of shape (n_steps, \*shape)
        Independent normals with the step sizes as variances. ``integrate`` without ``noise`` draws these numbers
        from a generator in this state.

    Raises
    ------
    TypeError, ValueError
        As ``time_grid``; also if the batch of ``ts`` does not fit ``shape``.

    Examples
    --------
    Increments of a grid that is four times coarser, on the same path:

    >>> import torch
    >>> fine = brownian_increments([0.0, 1.0], (5, 2), dt=1 / 64)
    >>> coarse = fine.unflatten(0, (-1, 4)).sum(1)
    >>> coarse.shape
    torch.Size([16, 5, 2])
    """
    grid = time_grid(ts, dt)
    like = ts if isinstance(ts, Tensor) else torch.empty(0, dtype=torch.float64)
    if not grid.fits(tuple(shape)[:-1]):
        raise ValueError(f"shape must start with a batch to which {grid.batch}, that of ts, broadcasts; got {shape}.")
    target = torch.device(like.device if device is None else device)
    drawn = DrawnNoise(grid, tuple(shape), True, like.dtype if dtype is None else dtype, target, generator)
    return drawn.block(drawn.generator, 0, grid.n_steps)


def fork(generator: torch.Generator) -> torch.Generator:
    """Return a generator of another stream, determined by the state of this one, which does not move."""
    copy = torch.Generator(generator.device).set_state(generator.get_state())
    seed = torch.randint(2**63 - 1, (), generator=copy, device=copy.device)
    return copy.manual_seed(int(seed))


class GivenNoise:
    """Noise that the caller drew."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def segments(self, bounds: list[tuple[int, int]]) -> list[Draws]:
        """One pass for each segment; together they cover all steps in order."""
        # Not by indexing: its backward pass would cost a whole tensor of zeros for each step.
        pieces = self.noise.split([stop - start for start, stop in bounds])
        return [lambda piece=piece: iter(piece.unbind(0)) for piece in pieces]


class DrawnNoise:
    """Noise drawn as it is needed; a step takes its numbers in one call, so segments do not change them."""

    def __init__(
        self,
        grid: TimeGrid,
        shape: tuple[int, ...],
        brownian: bool,
        dtype: torch.dtype,
        device: torch.device,
        generator: "torch.Generator | None",
    ) -> None:
        self.generator = make_generator(generator, device)
        self.shape, self.dtype, self.device = shape, dtype, device
        roots = grid.steps.sqrt()
        self.stds = roots.tolist() if brownian and roots.ndim == 1 else [1.0] * grid.n_steps
        self.roots = None
        if brownian and roots.ndim > 1:
            lead = len(shape) + 1 - roots.ndim
            self.roots = roots.to(device, dtype).reshape(-1, *(1,) * lead, *roots.shape[1:])
        self.block_steps = max(1, BLOCK_BYTES // max(1, math.prod(shape) * dtype.itemsize))

    def block(self, generator: torch.Generator, start: int, stop: int) -> Tensor:
        """Noise of the steps from start to stop; moves the generator on."""
        block = torch.empty(stop - start, *self.shape, dtype=self.dtype, device=generator.device)
        for row, std in zip(block.unbind(0), self.stds[start:stop], strict=True):
            row.normal_(0.0, std, generator=generator)
        block = block.to(self.device)
        return block if self.roots is None else block.mul_(self.roots[start:stop])

    def segments(self, bounds: list[tuple[int, int]]) -> list[Draws]:
        """One pass for each segment, to be started in order; a repeated pass draws the same numbers anew."""
        return [self.segment(start, stop) for start, stop in bounds]

    def segment(self, start: int, stop: int) -> Draws:
        """One of these passes."""
        state: Tensor | None = None

        def draws() -> Iterator[Tensor]:
            nonlocal state
            generator = self.generator
            if state is None:
                state = generator.get_state()
            else:
                generator = torch.Generator(generator.device).set_state(state)
            for i in range(start, stop, self.block_steps):
                yield from self.block(generator, i, min(i + self.block_steps, stop)).unbind(0)

        return draws
