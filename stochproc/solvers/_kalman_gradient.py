"""The log-normaliser of messages as one function with a closed-form gradient."""

from typing import Any

import torch
from torch import Tensor

from stochproc.solvers._kalman_algebra import product, transpose
from stochproc.solvers._kalman_blocks import Blocks
from stochproc.solvers._kalman_run import Run, run

__all__ = ["LogNormaliser", "Run", "log_normaliser"]


def log_normaliser(
    blocks: Blocks, P0: Tensor, A: Tensor, Q: Tensor, H: Tensor, Lam: Tensor, eta: Tensor, shift: "Tensor | None"
) -> tuple[Run, Tensor, Tensor, Tensor]:
    """Run the smoother, with arguments as in ``run``; log Z alone has a gradient."""
    keep: list[Run] = []
    # One entry of each argument: through it the gradients stay tied to what they must not be differentiated in.
    anchor = sum(x[(0,) * x.ndim] for x in (P0, A, Q, Lam, eta, shift) if x is not None and x.requires_grad)
    log_z, mean, cov = LogNormaliser.apply(P0, A, Q, Lam, eta, shift, H, blocks, keep, anchor)
    return keep[0], log_z, mean, cov


class LogNormaliser(torch.autograd.Function):
    """(log Z, smoothed mean and covariance of the outputs); only log Z is differentiable.

    The gradient is Fisher's identity in Bryson-Frazier form: with adjoints r, N of predicted states and filtered
    moments m, P, d log Z / d Q_i = (r_i r_iᵀ - N_i) / 2 and
    d log Z / d A_i = r_i (m_{i-1} + P_{i-1} A_iᵀ r_i)ᵀ - N_i A_i P_{i-1}; nothing passes through the recursion.
    """

    @staticmethod
    def forward(
        ctx: Any,
        P0: Tensor,
        A: Tensor,
        Q: Tensor,
        Lam: Tensor,
        eta: Tensor,
        shift: "Tensor | None",
        H: Tensor,
        blocks: Blocks,
        keep: list[Run],
        anchor: "Tensor | int",
    ) -> tuple[Tensor, Tensor, Tensor]:
        done, log_z, mean, cov = run(blocks, P0, A, Q, H, Lam, eta, shift)
        keep.append(done)
        ctx.run = done
        ctx.save_for_backward(mean, cov, Lam, eta, shift, anchor if isinstance(anchor, Tensor) else None)
        ctx.mark_non_differentiable(mean, cov)
        return log_z, mean, cov

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple["Tensor | None", ...]:
        mean, cov, Lam, eta, shift, anchor = ctx.saved_tensors
        with torch.no_grad():
            found = _gradient(ctx.run, ctx.needs_input_grad, grad[:, None, None], mean, cov, Lam, eta, shift)
        if torch.is_grad_enabled():
            found = [x if x is None else _DifferentiableNoFurther.apply(x, anchor) for x in found]
        return (*found, None, None, None, None)


class _DifferentiableNoFurther(torch.autograd.Function):
    """The identity, which depends on ``anchor`` in a way that raises when it is differentiated.

    ``once_differentiable`` is not enough: it lets the other factor of the chain rule, that of the transitions,
    through alone, and a second derivative would be wrong without a word.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("log_z of kalman_smoother can be differentiated only once.")


def _gradient(
    run: Run,
    needs: tuple[bool, ...],
    each: Tensor,
    mean: Tensor,
    cov: Tensor,
    Lam: Tensor,
    eta: Tensor,
    shift: "Tensor | None",
) -> list["Tensor | None"]:
    """Gradients in P0, A, Q, Lam, eta and shift, for the weights ``each`` (batch, 1, 1) of the series."""
    dim, join = run.blocks.dim, run.blocks.join
    found: list[Tensor | None] = [None] * 6
    N, r = run.of_predicted.split((dim, 1), -2)
    if needs[0]:
        At = transpose(run.model.A[0])
        first = product(At, r[0])
        of_prior = 0.5 * (product(first, transpose(first)) - product(product(At, N[0]), transpose(At)))
        found[0] = of_prior[..., :: run.blocks.n_blocks].movedim(-1, 0) * each
    each = each.unsqueeze(-1)
    if needs[1]:
        P, m = run.filtered.states[:-1].split((dim, 1), -2)
        AP = product(run.model.A, P)
        smoothed = m + product(transpose(AP), r)
        found[1] = join(product(r, transpose(smoothed)).sub_(product(N, AP))).mul_(each)
    if needs[2]:
        found[2] = join(product(r, transpose(r)).sub_(N)).mul_(0.5 * each)
    d = mean if shift is None else mean - shift
    if needs[3]:
        found[3] = (cov + d.unsqueeze(-1) * d.unsqueeze(-2)) * (-0.5 * each)
    if needs[4]:
        found[4] = d * each.squeeze(-1)
    if needs[5]:
        found[5] = ((Lam @ d.unsqueeze(-1)).squeeze(-1) - eta) * each.squeeze(-1)
    return found
