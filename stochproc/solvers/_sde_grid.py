"""The grid of an SDE solver: every requested time exactly, and equal steps of at most ``dt`` between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_finite, check_floating, check_positive

__all__ = ["TimeGrid", "time_grid"]

# How far rounding in the given times may move the number of sub-steps, and how far two steps may differ and
# still be meant to be one: both relative, reached only by float32 times.
SLACK = 1e-4


@dataclass(frozen=True)
class TimeGrid:
    r"""Times at which an SDE solver stops.

    Parameters
    ----------
    times : Tensor of shape (n_steps + 1,) or (n_steps + 1, \*batch, 1)
        Grid points, float64 on the CPU; the second shape where each path has its own times.
    steps : Tensor of shape (n_steps,) or (n_steps, \*batch, 1)
        Step sizes. Those that differ by rounding alone are equal to the last bit, so that what depends on the
        step can be computed once for each distinct value.
    output : tuple of int
        Where in ``times`` each requested time is.
    """

    times: Tensor
    steps: Tensor
    output: tuple[int, ...]

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        return self.steps.shape[0]

    @property
    def batch(self) -> tuple[int, ...]:
        """Shape of the batch of times; empty where all paths share them."""
        return tuple(self.steps.shape[1:-1])

    def fits(self, batch: tuple[int, ...]) -> bool:
        """Whether the times broadcast to a batch of states."""
        pairs = zip(self.batch[::-1], batch[::-1], strict=False)
        return len(self.batch) <= len(batch) and all(a in (1, b) for a, b in pairs)


def time_grid(
    ts: "Float[Tensor, '*batch n_times'] | Sequence[float | int]", dt: "float | int | None" = None
) -> TimeGrid:
    r"""Return the grid on which ``integrate`` steps.

    Parameters
    ----------
    ts : Tensor of shape (n_times,) or (\*batch, n_times), or sequence of float
        Requested times, strictly increasing, at least two; rows of a batch may differ.
    dt : float or None, default=None
        Largest step, in the unit of ``ts``. Each interval of ``ts`` is cut into the least number of equal steps
        that respects it, up to the rounding of ``ts``: 0.1 goes three times into [0, 0.3]. In a batch the
        longest interval decides. None takes one step an interval.

    Returns
    -------
    TimeGrid
        Every entry of ``ts`` is a grid point exactly.

    Raises
    ------
    TypeError
        If ``ts`` is neither a float32 or float64 tensor nor a sequence of numbers.
    ValueError
        If ``ts`` has fewer than two entries, is not finite or not strictly increasing, or requires gradients;
        if ``dt`` is not one positive number, or so small that a step is lost in the rounding of the times.

    Examples
    --------
    >>> grid = time_grid([0.0, 0.3, 1.0], dt=0.1)
    >>> grid.n_steps, grid.output
    (10, (0, 3, 10))
    """
    if not isinstance(ts, Tensor):
        ts = torch.tensor(ts, dtype=torch.float64)
    check_floating(ts=ts)
    if ts.ndim == 0 or ts.shape[-1] < 2:
        raise ValueError(f"ts must hold at least two times; got shape {tuple(ts.shape)}.")
    if ts.requires_grad:
        raise ValueError("ts must not require gradients; got a tensor that does.")
    eps = torch.finfo(ts.dtype).eps
    ts = ts.to("cpu", torch.float64)
    check_finite("ts", ts)
    gaps = ts.diff(dim=-1)
    if not bool((gaps > 0).all()):
        where = tuple((~(gaps > 0)).nonzero()[0].tolist())
        after = (*where[:-1], where[-1] + 1)
        raise ValueError(
            f"ts must be strictly increasing; got {ts[after].item()} at index {after} after {ts[where].item()}."
        )
    largest = torch.maximum(ts[..., :-1].abs(), ts[..., 1:].abs())
    counts = _counts(gaps, largest, dt, eps)
    steps = gaps / counts
    if ts.ndim == 1:
        steps = _merge_equal(ts, counts, steps, (4 * eps * largest / counts).minimum(SLACK * steps))

    first = counts.cumsum(0) - counts
    n_steps = int(counts.sum())
    position = (torch.arange(n_steps) - first.repeat_interleave(counts)) / counts.repeat_interleave(counts)
    times = ts[..., :-1].repeat_interleave(counts, -1) + gaps.repeat_interleave(counts, -1) * position
    times = torch.cat([times, ts[..., -1:]], -1)
    if not bool((times.diff(dim=-1) > 0).all()):
        raise ValueError(f"dt must be larger than the rounding of ts; got {dt} with times up to {ts.abs().max():.6g}.")
    steps = steps.repeat_interleave(counts, -1)
    if ts.ndim > 1:
        # A last axis of one, so that times and steps broadcast against states.
        times, steps = times.movedim(-1, 0).unsqueeze(-1), steps.movedim(-1, 0).unsqueeze(-1)
    return TimeGrid(times, steps, (*first.tolist(), n_steps))


def _counts(gaps: Tensor, largest: Tensor, dt: "float | int | None", eps: float) -> Tensor:
    """Sub-steps of each interval, common to a batch."""
    if dt is None:
        return torch.ones(gaps.shape[-1], dtype=torch.int64)
    if isinstance(dt, Tensor):
        if dt.numel() != 1:
            raise ValueError(f"dt must be a single number; got a tensor of shape {tuple(dt.shape)}.")
        dt = dt.item()
    check_positive("dt", dt)
    ratio = gaps / dt
    # A difference of two times is known to eps times their size; dt itself to eps.
    slack = (4 * eps * largest / dt).minimum(SLACK * ratio)
    counts = (ratio - slack).ceil().clamp_min(1)
    counts = counts.reshape(-1, counts.shape[-1]).amax(0)
    # Above 2^53 steps in all, neighbouring step numbers coincide in float64; memory ends long before.
    if not float(counts.sum()) < 2.0**53:
        raise ValueError(f"dt must be larger than the rounding of ts; got {dt}, {float(counts.sum()):.3g} steps.")
    return counts.to(torch.int64)


def _merge_equal(ts: Tensor, counts: Tensor, steps: Tensor, tolerance: Tensor) -> Tensor:
    """Give neighbouring steps that differ by less than their tolerance their mean, which keeps the span exact."""
    starts: list[int] = []
    reference = math.inf
    for i, (h, tol) in enumerate(zip(steps.tolist(), tolerance.tolist(), strict=True)):
        if abs(h - reference) > tol:
            reference = h
            starts.append(i)
    edges = torch.tensor([*starts, len(steps)])
    done = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return (ts[edges].diff() / done[edges].diff()).repeat_interleave(edges.diff())
