"""A Gaussian process in time with noise, one output or several: its likelihood in O(n), differentiable."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc.exceptions import DataWarning, SolverError
from stochproc.kernels import KERNEL_NAMES, Kernel, Periodic, Scale, as_kernel
from stochproc.solvers import kalman_smoother, messages

__all__ = ["Series", "TimeSeries", "kernel_of_output", "make_kernel", "warn_if_times_are_coarse"]

# Harmonics of the periodic kernel.
_HARMONICS = 7


class Series(NamedTuple):
    """Sorted data; the axis of several outputs comes first, as a batch."""

    times: Tensor
    """(n,), non-decreasing."""
    y: Tensor
    """(n,) or (p, n): NaN where nothing was observed."""
    known: Tensor
    """(n,) or (p, n): known part of the noise variances."""

    def take(self, rows: Tensor) -> Series:
        """Return the data of some rows, in their order."""
        return Series(self.times[rows], self.y[..., rows], self.known[..., rows])

    def observed_rows(self) -> Tensor:
        """Return the indices of rows of which some output was observed."""
        seen = ~self.y.isnan()
        return (seen if seen.ndim == 1 else seen.any(0)).nonzero()[:, 0]

    def varies(self) -> Tensor:
        """Return which outputs have observed values that differ, () or (p,)."""
        low = torch.where(self.y.isnan(), math.inf, self.y).amin(-1)
        return torch.where(self.y.isnan(), -math.inf, self.y).amax(-1) > low


def _named_kernels() -> list[str]:
    """Names of kernels that have a state space."""
    return [name for name in KERNEL_NAMES if _has_state_space(as_kernel(name, n_columns=1))]


def _has_state_space(kernel: Kernel) -> bool:
    try:
        kernel.state_space()
    except NotImplementedError:
        return False
    return True


def make_kernel(kernel: Any, n_outputs: int | None = None) -> Kernel:
    """Return a copy of the kernel that a parameter describes, in float64; a named one with an outputscale.

    Parameters
    ----------
    kernel : Kernel or str
    n_outputs : int or None, default=None
        Number of outputs that have hyperparameters of their own, which the copy then holds as a batch.

    Raises
    ------
    TypeError
        If it describes none.
    ValueError
        If its name is unknown, it has no state space, or its hyperparameters are a batch of another shape.
    """
    named = isinstance(kernel, str)
    made = as_kernel(kernel if named else copy.deepcopy(kernel), n_columns=1)
    allowed = [()] if n_outputs is None else [(), (n_outputs,)]
    batches = [tuple(getattr(m, "batch_shape", ())) for m in made.modules()]
    other = next((batch for batch in batches if batch not in allowed), None)
    if other is not None:
        wanted = "without batch_shape" if n_outputs is None else f"or one an output, with batch_shape ({n_outputs},)"
        raise ValueError(f"kernel must be a single one, {wanted}; got a batch of shape {other}.")
    try:
        made.state_space()
    except NotImplementedError as error:
        raise ValueError(
            f"kernel must have a state space, such as {', '.join(map(repr, _named_kernels()))}, and sums and products "
            f"of such. GPyTorch's kernels and functions have none. Got: {error}"
        ) from None
    made = (Scale(made) if named else made).double()
    if n_outputs is not None:
        _replace(made, lambda p: p.expand(n_outputs, -1).clone() if p.ndim == 1 else p, (n_outputs,))
    return made


def kernel_of_output(kernel: Kernel, output: int) -> Kernel:
    """Return a copy of the kernel of one output, out of a batch of them."""
    one = copy.deepcopy(kernel)
    _replace(one, lambda p: p[output].clone(), ())
    return one


def _replace(kernel: Kernel, change: Any, batch_shape: tuple[int, ...]) -> None:
    """Change every hyperparameter in place; parts that share one go on sharing it."""
    new: dict[int, torch.nn.Parameter] = {}
    for part in kernel.modules():
        for name, old in part.named_parameters(recurse=False):
            if id(old) not in new:
                new[id(old)] = torch.nn.Parameter(change(old.detach()), old.requires_grad)
            setattr(part, name, new[id(old)])
        if isinstance(part, Kernel):
            part.batch_shape = torch.Size(batch_shape)


class TimeSeries(torch.nn.Module):
    """A Gaussian process in time, a constant mean, and independent noise of learned plus known variances.

    Several outputs are independent processes given the hyperparameters, which they share or have one set each.

    Parameters
    ----------
    kernel : Kernel
        With a state space; not copied. A batch of kernels, one an output, for hyperparameters of their own.
    noise : float
        Variance of the learned part of the noise, non-negative; 0 is kept at 0.
    mean : {"constant", "zero"}
    method : {"auto", "scan", "sequential"}
        See ``kalman_smoother``.
    n_outputs : int or None, default=None
        None for one output, whose data have no axis of outputs.
    """

    def __init__(self, kernel: Kernel, noise: float, mean: str, method: str, n_outputs: int | None = None) -> None:
        super().__init__()
        self.kernel = kernel
        self.shared = not kernel.batch_shape
        start = torch.full(tuple(kernel.batch_shape), float(noise), dtype=torch.float64).log()
        self.log_noise = torch.nn.Parameter(start, requires_grad=noise > 0)
        zero = torch.zeros(() if n_outputs is None else n_outputs, dtype=torch.float64)
        self.constant_mean = torch.nn.Parameter(zero) if mean == "constant" else None
        self.method = method

    @property
    def noise(self) -> Tensor:
        """Variance of the learned part of the noise, (1,) or (p, 1): it broadcasts to data."""
        return self.log_noise.exp().unsqueeze(-1)

    def smooth(self, times: Tensor, y: Tensor, known: Tensor, query: Tensor | None = None) -> tuple[Any, Tensor]:
        """Smooth sorted data, and return what ``kalman_smoother`` gives with log p(y), which has gradients.

        Parameters
        ----------
        times : Tensor of shape (n,)
            In non-decreasing order.
        y : Tensor of shape (*batch, n), with the axis of several outputs at the end of the batch
            NaN where nothing was observed.
        known : Tensor of shape (n,) or (p, n)
            Known part of the noise variances.
        query : Tensor of shape (m,), default=None
            Times to give the process at instead, in any order.

        Raises
        ------
        SolverError
            If the recursion met non-finite values; L-BFGS backs off from it.
        """
        # Written around the data, log p(y) of very precise data keeps its digits.
        precision, shift, constant = messages(y, self.noise + known, around_data=True)
        result = kalman_smoother(
            self.kernel.state_space(),
            times,
            precision,
            shift,
            query=query,
            mean=0.0 if self.constant_mean is None else self.constant_mean.unsqueeze(-1),
            offset=y.nan_to_num().unsqueeze(-1),
            method=self.method,
        )
        smoothed = result.unwrap()
        return smoothed, smoothed.log_z + constant

    def rounding(self, times: Tensor) -> float:
        """Relative rounding that a loss of ordinary curvature would need to hide as large a gradient as this one.

        The curvature in the logarithm of a period grows with the square of the phase that the highest harmonic gathers
        over the data: its last digits decide the gradient, and no step improves it further.
        """
        width = (times[-1] - times[0]).item()
        phases = [
            2 * math.pi * _HARMONICS * width / m.period.min().item()
            for m in self.kernel.modules()
            if isinstance(m, Periodic) and m.log_period.requires_grad
        ]
        return min(torch.finfo(times.dtype).eps * max([1.0, *phases]) ** 2, 1e-4)

    def losses(self, times: Tensor, y: Tensor, known: Tensor) -> Tensor:
        """Return -log p(y) of each output, () or (p,), for a search."""
        try:
            return -self.smooth(times, y, known)[1]
        except SolverError as error:
            raise FloatingPointError(str(error)) from error


def warn_if_times_are_coarse(times: Tensor, stacklevel: int) -> None:
    """Warn where the times span so little of their size that their differences have few digits."""
    span, size = (times[-1] - times[0]).item(), times.abs().max().item()
    if 0 < span < 1e-12 * size:
        warnings.warn(
            f"X spans {span:.3g} at values of {size:.3g}: differences of times have few digits left. Subtract the "
            "first time before fitting.",
            DataWarning,
            stacklevel=stacklevel,
        )
