"""One pass over the data: filter, smoother, log-normaliser, and what rounding did to them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stochproc.solvers._kalman_algebra import product, transpose
from stochproc.solvers._kalman_blocks import Blocks
from stochproc.solvers._kalman_model import Messages, Model, make_model, scalar_messages
from stochproc.solvers._kalman_scan import Likelihood, Moments, condition, scan
from stochproc.solvers._kalman_steps import Filtered, adjoint_pass, dot, element_pass, filter_pass

__all__ = ["Run", "run"]


@dataclass(frozen=True)
class Run:
    """What one pass over the data leaves, in blocks."""

    blocks: Blocks
    H: Tensor
    model: Model
    filtered: Filtered
    of_filtered: Tensor
    """(length, D, D + 1, m): adjoints of filtered states, see ``adjoint_pass``."""
    of_predicted: Tensor
    """The same of predicted states."""
    indefinite: Tensor
    """(batch,): a precision is not symmetric positive semidefinite."""
    mismatch: Tensor
    """(batch,): largest disagreement of two blocks about the output where they meet, relative to its scale."""
    negative_variance: Tensor
    """(batch,): largest smoothed variance of an output that came out below 0, relative to its filtered scale."""


def _outputs(blocks: Blocks, H: Tensor, filtered: Filtered, adjoint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smoothed mean (batch, n, r) and covariance (batch, n, r, r) of the outputs; see ``Run`` for the third."""
    H = H.unsqueeze(-1)
    HX = product(H, filtered.states[1:])
    HP, mean = HX[..., :-1, :], HX[..., -1, :]
    seen = product(HP, adjoint)
    cov = product(H - seen[..., :-1, :], transpose(HP))
    cov = blocks.join(torch.lerp(cov, transpose(cov), 0.5))
    variance = cov.diagonal(dim1=-2, dim2=-1)
    scale = product(HP, transpose(H)).diagonal(dim1=-3, dim2=-2).unflatten(1, (blocks.batch, blocks.n_blocks))
    scale = scale.amax((0, 2, 3)).clamp_min(torch.finfo(cov.dtype).tiny)
    negative = variance.amin((-2, -1)).neg().clamp_min(0.0) / scale
    variance.clamp_min_(0.0)
    return blocks.join(mean + seen[..., -1, :]), cov, negative


def run(
    blocks: Blocks, P0: Tensor, A: Tensor, Q: Tensor, H: Tensor, Lam: Tensor, eta: Tensor, shift: "Tensor | None"
) -> tuple[Run, Tensor, Tensor, Tensor]:
    """Filter and smooth; also log Z (batch,), and mean (batch, n, r) and covariance (batch, n, r, r) of the outputs.

    P0 is (batch, D, D), A and Q (batch, n, D, D), H (r, D), Lam (batch, n, r, r), eta (batch, n, r), and shift,
    around which the messages are written, is None or (batch, n, r).
    """
    messages = scalar_messages(Lam, eta, shift)
    model = make_model(blocks, A, Q, H, messages)
    prior = Moments(P0.movedim(0, -1), torch.zeros_like(P0[..., :1]).movedim(0, -1))
    if blocks.n_blocks > 1:
        before, after = scan(element_pass(model, blocks), prior, blocks.n_blocks)
    else:
        before, after = prior, Likelihood(torch.zeros_like(prior.C), torch.zeros_like(prior.b))
    filtered = filter_pass(model, blocks, before)
    dim = blocks.dim
    ends = Moments(filtered.states[-1, :, :dim], filtered.states[-1, :, dim:])
    root, vector = (x[..., filtered.states.shape[-1] :] for x in condition(ends, after, ends, after))
    adjoint = torch.cat([product(transpose(root), root), vector], 1)
    of_filtered, of_predicted = adjoint_pass(model, blocks, filtered, adjoint)
    log_z = _log_z(blocks, model, filtered, messages)
    if messages.left is not None and shift is not None:
        log_z = log_z - (messages.left * shift.movedim(-1, 0)).sum((0, -1))
    mismatch = _mismatch(blocks, H, model, filtered, adjoint, of_predicted)
    mean, cov, negative = _outputs(blocks, H, filtered, of_filtered)
    done = Run(blocks, H, model, filtered, of_filtered, of_predicted, messages.indefinite, mismatch, negative)
    return done, log_z, mean, cov


def _log_z(blocks: Blocks, model: Model, filtered: Filtered, messages: Messages) -> Tensor:
    """Log-normalisers, (batch,), of all messages, but for the shift of linear ones."""
    Ph, mean = filtered.rows[..., :-1, :], filtered.rows[..., -1, :]
    v = dot(Ph, model.h, -2)
    q = model.q if messages.z is None else blocks.cut(messages.q)
    d = mean if messages.z is None else mean - blocks.cut(messages.z)
    # Not q²/2 - (q - d)²/2/(1 + v): of a vague message with q = eta / sqrt(Lam) large nothing would be left.
    terms = ((q * (0.5 * v * q + d) - 0.5 * d * d) / (1.0 + v) - 0.5 * torch.log1p(v)).sum((0, 1))
    if model.linear is not None:
        row = product(model.linear.unsqueeze(1), filtered.states[1:])
        # The mean has moved by P linear already, hence the minus.
        own = row[..., 0, -1, :] - 0.5 * product(row[..., :-1, :], model.linear.unsqueeze(2))[..., 0, 0, :]
        terms = terms + own.sum(0)
    return terms.unflatten(0, (blocks.batch, blocks.n_blocks)).sum(-1)


def _mismatch(
    blocks: Blocks, H: Tensor, model: Model, filtered: Filtered, after: Tensor, of_predicted: Tensor
) -> Tensor:
    """See ``Run``: the filter against the next block's start, and the adjoint against the one it started with."""
    batch, n_blocks, dim = blocks.batch, blocks.n_blocks, blocks.dim
    if n_blocks == 1:
        return H.new_zeros(batch)
    rows = H.unsqueeze(-1)

    def of_blocks(x: Tensor) -> Tensor:
        return x.unflatten(-1, (batch, n_blocks))

    end, start = (of_blocks(filtered.states[k]) for k in (-1, 0))
    N, r = of_predicted[0].split((dim, 1), 1)
    At = transpose(model.A[0])
    seen = of_blocks(torch.cat([product(product(At, N), transpose(At)), product(At, r)], 1))
    jumps = end[..., :-1] - start[..., 1:]
    pulls = of_blocks(after)[..., :-1] - seen[..., 1:]
    flat_end, jumps, pulls = (x.flatten(-2) for x in (end[..., :-1], jumps, pulls))
    HX, HJ = product(rows, flat_end), product(rows, jumps)
    HP = HX[:, :dim]
    HA = product(HP, pulls)
    variance = _diagonal(product(HP, rows.transpose(0, 1)))
    errors = [
        _diagonal(product(HJ[:, :dim], rows.transpose(0, 1))),
        HJ[:, dim],
        _diagonal(product(HA[:, :dim], HP.transpose(0, 1))),
        HA[:, dim],
    ]
    variance, mean, *errors = (
        x.unflatten(-1, (batch, n_blocks - 1)).abs().amax(-1) for x in (variance, HX[:, dim], *errors)
    )
    scale = variance.sqrt() + mean
    tiny = torch.finfo(H.dtype).tiny
    relative = [
        errors[0] / (variance + tiny),
        errors[1] / (scale + tiny),
        errors[2] / (variance + tiny),
        errors[3] / (scale + tiny),
    ]
    return torch.stack(relative).amax((0, 1))


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=0, dim2=1).movedim(-1, 0)
