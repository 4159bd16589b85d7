"""Sinkhorn iterations inside the graph: the plainest gradients of a transport problem, of any order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stochproc.ot._inputs import DenseInputs
from stochproc.ot._outcome import Outcome, Tracker

__all__ = ["Unrolled", "solve_unrolled", "unrolled"]


class Unrolled(NamedTuple):
    """What the iterations ended at, all on the graph."""

    f: Tensor
    g: Tensor
    plan: Tensor
    err: float
    """L1 distance of the marginals from the weights relative to the mass, of the worst problem of a batch."""


def solve_unrolled(
    inputs: DenseInputs, tracker: Tracker, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Unrolled, Outcome]:
    """Solve a checked problem inside the graph, in float64."""
    M, a, b, eps = (t.double() for t in inputs[1:])
    strength, mass = float(eps.detach()), float(a.detach().sum())

    def report(err: float, dual: float) -> bool:
        tracker.record(strength, err, dual / mass)
        tracker.count("sinkhorn")
        return tracker.ended is not None

    try:
        run = unrolled(M, a, b, eps, tol=tracker.tol, max_iter=tracker.max_iter, start=start, report=report)
    finally:
        tracker.close()
    f, g = (torch.where(t.isfinite(), t, 0.0) for t in run[:2])
    run = run._replace(f=f, g=g)
    status = tracker.status_of(run.err)
    return run, Outcome(f.detach(), g.detach(), run.err, status, tracker.message_of(run.err))


def unrolled(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float | Tensor,
    *,
    tol: float = 1e-9,
    max_iter: int = 1000,
    start: tuple[Tensor, Tensor] | None = None,
    report: Callable[[float, float], bool] | None = None,
) -> Unrolled:
    """Run Sinkhorn in the log domain and keep its graph: memory O(n m) an iteration.

    Parameters
    ----------
    cost : Tensor of shape (*batch, n, m)
        Finite or ``+inf``.
    a, b : Tensor of shape (*batch, n) and (*batch, m)
        Weights of equal mass; no gradient flows to those that are zero but that of their own potential.
    eps : float or Tensor of shape (*batch)
    tol : float, default=1e-9
        Of ``err``; the iterations end as soon as it is met.
    max_iter : int, default=1000
    start : pair of Tensors, default=None
        Potentials to start from, of which the second counts; constants.
    report : callable, default=None
        Gets err and the dual value after each iteration; returning True ends them. Not for batches.

    Returns
    -------
    Unrolled
        Potentials in the gauge of sum_j b_j g_j = 0, in the dtype of the cost.
    """
    strength = eps[..., None, None] if isinstance(eps, Tensor) else eps
    forbidden = cost == math.inf
    scaled = torch.where(forbidden, 0.0, cost) / strength
    # In units of eps from here on.
    f, g = torch.zeros_like(a).to(cost), torch.zeros_like(b).to(cost)
    if start is not None:
        g = start[1].to(g) / strength.detach().reshape(-1, 1) if isinstance(strength, Tensor) else start[1].to(g) / eps
        g = g.reshape(b.shape)
    for _ in range(max_iter):
        f = _softmin(scaled, forbidden, g, b)
        with torch.no_grad():
            plan = _plan(scaled, forbidden, a, b, f, g)
            err = float(((plan.sum(-2) - b).abs().sum(-1) / b.sum(-1)).max())
            if report is not None:
                dual = torch.where(a > 0, a * f, 0.0).sum() + (b * g).sum()
                stopped = report(err, float(dual * eps))
        if err <= tol or (report is not None and stopped):
            break
        g = _softmin(scaled.mT, forbidden.mT, f, a)
    # At weights of zero the loop may have ended before their first update.
    g = torch.where(b > 0, g, _softmin(scaled.mT, forbidden.mT, f, a))
    shift = (b * g).sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
    plan = _plan(scaled, forbidden, a, b, f, g)
    f, g = f + shift, g - shift
    unit = eps.unsqueeze(-1) if isinstance(eps, Tensor) else eps
    return Unrolled(unit * f, unit * g, plan, err)


def _softmin(scaled: Tensor, forbidden: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    used = (weights > 0).unsqueeze(-2) & ~forbidden
    log_weights = torch.where(weights > 0, weights, 1.0).log()
    z = (g + log_weights).unsqueeze(-2) - scaled
    return -z.masked_fill(~used, -math.inf).logsumexp(-1)


def _plan(scaled: Tensor, forbidden: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor) -> Tensor:
    # Where no mass can go the exponent is unbounded.
    dropped = forbidden | (a == 0).unsqueeze(-1) | (b == 0).unsqueeze(-2)
    z = (f.unsqueeze(-1) + g.unsqueeze(-2) - scaled).masked_fill(dropped, -math.inf)
    return a.unsqueeze(-1) * b.unsqueeze(-2) * z.exp()
