"""What else the adjoints of the smoother give: covariances between times, and predictions without one message."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stochproc.solvers._kalman_algebra import product
from stochproc.solvers._kalman_run import Run
from stochproc.solvers._kalman_steps import dot

__all__ = ["joint_covariance", "left_out"]


def joint_covariance(run: Run, positions: Int[Tensor, "batch m"]) -> Float[Tensor, "batch m r m r"]:
    r"""Posterior covariances of the outputs at the given steps, every pair of them.

    With the closed-loop transitions :math:`B_k = A_{k+1} (I - \text{gain}_k h_k^\top)` of the filter's errors, and
    the adjoints N of predicted states, de Jong (1989): for i before j, :math:`\mathrm{Cov}(s_i, s_j) =
    P_i B_i^\top \cdots B_{j-1}^\top (I - N_j P_j)`, P that of predictions. No inverse, so singular P are right.
    """
    dim, r = run.blocks.dim, run.H.shape[0]
    A, Q, P, N, kept = (run.blocks.join(x) for x in _pieces(run))
    # (batch, n, D, D): predicted covariances, and closed-loop transitions from each step to the next.
    predicted = A @ P @ A.mT + Q
    predicted = 0.5 * (predicted + predicted.mT)
    loops = A[:, 1:] @ kept[:, :-1]
    m = positions.shape[-1]
    out = predicted.new_zeros(len(positions), m, r, m, r)
    eye = torch.eye(dim, dtype=predicted.dtype, device=predicted.device)
    for item in range(len(positions)):
        steps, order = positions[item].sort()
        between = _segment_products(loops[item], steps)
        start = run.H @ predicted[item, steps]
        end = (eye - N[item, steps] @ predicted[item, steps]) @ run.H.mT
        rows = start[:0]
        found = out.new_zeros(m, r, m, r)
        for j in range(m):
            rows = torch.cat([rows @ between[j - 1].mT if j else rows, start[j : j + 1]])
            column = rows @ end[j]
            found[: j + 1, :, j] = column
            found[j, :, : j + 1] = column.permute(2, 0, 1)
        # The two halves of each diagonal block agree but for rounding.
        found = torch.lerp(found, found.permute(2, 3, 0, 1), 0.5)
        back = order.argsort()
        out[item] = found[back][:, :, back]
    return out


def left_out(run: Run) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n"]]:
    r"""Return D and u of each scalar message, about the data without it; de Jong (1988).

    With the innovation e, its variance F, the gain K and adjoints N, r of the filtered state, all in units of the
    noise, :math:`D = 1/F + K^\top N K` and :math:`u = e/F - K^\top r`: sums of what is not negative, so nothing
    cancels however small the noise.
    """
    rows, gain = run.filtered.rows[:, 0], run.filtered.gains[:, 0]
    dim = run.blocks.dim
    beta = 1.0 / (dot(rows[:, :dim], run.model.h[:, 0], 1) + 1.0)
    N, r = run.of_filtered[:, :, :dim], run.of_filtered[:, :, dim]
    D = beta + dot(dot(gain.unsqueeze(2), N, 1), gain, 1)
    u = (run.model.q[:, 0] - rows[:, dim]) * beta - dot(gain, r, 1)
    return run.blocks.join(D), run.blocks.join(u)


def _pieces(run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return A, Q, filtered covariances before each step, N of predictions, and I - gain hᵀ, in blocks."""
    dim, model = run.blocks.dim, run.model
    kept = run.blocks.zeros(model.A, run.blocks.length, dim, dim)
    kept.diagonal(dim1=1, dim2=2).fill_(1.0)
    for k in range(model.h.shape[1]):
        row = product(model.h[:, k].unsqueeze(1), kept)
        kept = kept - run.filtered.gains[:, k].unsqueeze(2) * row
    return model.A, model.Q, run.filtered.states[:-1, :, :dim], run.of_predicted[:, :, :dim], kept


def _segment_products(loops: Float[Tensor, "steps d d"], ends: Int[Tensor, " m"]) -> Float[Tensor, "segments d d"]:
    """Return the product of ``loops[ends[q] : ends[q + 1]]``, later ones on the left, for every segment q.

    Neighbours in a segment are multiplied, then neighbours of the results: log2 of the longest segment rounds.
    """
    lengths = ends.diff()
    matrices = loops[ends[0] : ends[-1]] if len(ends) else loops[:0]
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=ends.device), lengths)
    while len(segment) > len(lengths):
        first = segment.new_ones(len(segment), dtype=torch.bool)
        first[1:] = segment[1:] != segment[:-1]
        starts = first.nonzero()[:, 0]
        place = torch.arange(len(segment), device=ends.device) - starts[first.cumsum(0) - 1]
        left = (place % 2 == 0).nonzero()[:, 0]
        partner = left + 1
        paired = (partner < len(segment)) & (segment[partner.clamp(max=len(segment) - 1)] == segment[left])
        new = matrices[left]
        new[paired] = matrices[partner[paired]] @ new[paired]
        matrices, segment = new, segment[left]
    return matrices
