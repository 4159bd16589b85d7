"""Draws from the prior of a state-space process: a linear recursion, run in blocks side by side."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_finite, check_floating, check_integer

__all__ = ["sample_paths"]


@torch.no_grad()
def sample_paths(
    ss: Any,
    times: Float[Tensor, " n"],
    n_samples: int = 1,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n_samples n r"]:
    """Draw outputs of a state-space process jointly at given times, before any observation.

    Parameters
    ----------
    ss : StateSpace
        Without batch axes.
    times : Tensor of shape (n,)
        In non-decreasing order, in the unit of the lengthscales; ties share one value.
    n_samples : int, default=1
        Number of independent paths.
    generator : torch.Generator or None, default=None
        On the device of ``times``; None takes the global one of torch.

    Returns
    -------
    Tensor of shape (n_samples, n, r)
        In the dtype and on the device of ``times``.

    Raises
    ------
    TypeError
        If ``times`` is not float32 or float64, or ``n_samples`` is no integer.
    ValueError
        If ``times`` are not one finite vector in order, ``n_samples`` is below 1, or ``ss`` is batched.

    Notes
    -----
    O(n_samples n D^2) time and memory for D states. The recursion runs in sqrt(n) blocks at once, which are then
    joined, so the number of steps in sequence is 2 sqrt(n). Noise enters through a semidefinite root of Q, so a
    process without noise (a linear trend) and repeated times are exact.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import Matern
    >>> from stochproc.solvers import sample_paths
    >>> times = torch.linspace(0, 1, 5, dtype=torch.float64)
    >>> sample_paths(Matern(0.3, nu=1.5).state_space(), times, 2).shape
    torch.Size([2, 5, 1])
    """
    check_floating(times=times)
    check_integer("n_samples", n_samples, 1)
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(f"times must be one vector of at least one time; got shape {tuple(times.shape)}.")
    check_finite("times", times)
    gaps = times.diff()
    if bool((gaps < 0).any()):
        raise ValueError(f"times must be in non-decreasing order; time {int((gaps < 0).nonzero()[0]) + 1} is smaller.")
    if tuple(ss.batch_shape):
        raise ValueError(f"ss must be a single process, without batch axes; got batch shape {tuple(ss.batch_shape)}.")

    A, Q = ss.transition(gaps)
    roots = torch.cat([semidefinite_root(ss.prior(times[0]).to(times))[None], semidefinite_root(Q)])
    D = roots.shape[-1]
    normals = torch.randn(n_samples, len(times), D, 1, dtype=times.dtype, device=times.device, generator=generator)
    states = _recursion(A, (roots @ normals)[..., 0])
    return states @ ss.H.to(times).mT


def _recursion(A: Tensor, w: Tensor) -> Tensor:
    """Solve s_0 = w_0, s_k = A_k s_{k-1} + w_k for w of shape (S, n, D) and A of shape (n - 1, D, D)."""
    S, n, D = w.shape
    length = math.isqrt(n - 1) + 1
    n_blocks = -(-n // length)
    pad = n_blocks * length - n
    eye = torch.eye(D, dtype=w.dtype, device=w.device)
    # The first state has no predecessor; padding stands still.
    A = torch.cat([torch.zeros_like(eye)[None], A, eye.expand(pad, D, D)]).reshape(n_blocks, length, D, D)
    w = torch.cat([w, w.new_zeros(S, pad, D)], 1).reshape(S, n_blocks, length, D, 1)

    # From a start at zero, all blocks at once; and what a start elsewhere would add.
    inside, reach = [w[:, :, 0]], [A[:, 0]]
    for step in range(1, length):
        inside.append(A[:, step] @ inside[-1] + w[:, :, step])
        reach.append(A[:, step] @ reach[-1])
    local, spread = torch.stack(inside, 2), torch.stack(reach, 1)

    # The end of each block is the start of the next.
    start = w.new_zeros(S, D, 1)
    starts = []
    for block in range(n_blocks):
        starts.append(start)
        start = spread[block, -1] @ start + local[:, block, -1]
    states = spread @ torch.stack(starts, 1)[:, :, None] + local
    return states.reshape(S, n_blocks * length, D)[:, :n]


def semidefinite_root(matrix: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch d d"]:
    """Return lower triangular R with R R' = matrix for positive semidefinite matrices, singular ones included.

    A pivot that is not above rounding of its diagonal entry is taken as zero, and so is its column: the exact
    factor of a semidefinite matrix has a zero column there.
    """
    D = matrix.shape[-1]
    rest, columns = matrix, []
    floor = 4 * D * torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1)
    for j in range(D):
        pivot = rest[..., j, j]
        usable = pivot > floor[..., j]
        scale = torch.where(usable, pivot, 1.0).rsqrt() * usable
        column = rest[..., :, j] * scale.unsqueeze(-1)
        columns.append(column.clone())
        columns[-1][..., :j] = 0
        rest = rest - columns[-1].unsqueeze(-1) * columns[-1].unsqueeze(-2)
    return torch.stack(columns, -1)
