"""Slow, obvious solvers of small transport problems in float64, to compare against."""

import math

import torch

from stochproc.ot._problem import Problem


def softmin(cost, g, weights, eps):
    """-eps log sum_j w_j exp((g_j - M_ij) / eps), row by row."""
    used = weights > 0
    z = (g.unsqueeze(-2) - cost) / eps + torch.where(used, weights, 1.0).log().unsqueeze(-2)
    return -eps * z.masked_fill(~used.unsqueeze(-2), -math.inf).logsumexp(-1)


def plan_of(cost, a, b, eps, f, g):
    z = ((f.unsqueeze(-1) + g.unsqueeze(-2)) - cost) / eps
    return a.unsqueeze(-1) * b.unsqueeze(-2) * z.exp()


def solved(cost, a, b, eps, start=None):
    """Balanced potentials to rounding, gauge-fixed: annealed Sinkhorn, then Newton steps on both marginals.

    From ``start``, the g of a problem nearby, Newton steps alone.
    """
    cost, a, b, eps = (torch.as_tensor(t).detach().double() for t in (cost, a, b, eps))
    eps = float(eps)
    g = torch.zeros_like(b) if start is None else start
    if start is None:
        for e in [eps * 4**k for k in range(5, -1, -1)]:
            for _ in range(100 if e == eps else 20):
                g = softmin(cost.mT, softmin(cost, g, b, e), a, e)
    rows, cols = (a > 0).nonzero().squeeze(-1), (b > 0).nonzero().squeeze(-1)
    M, u, v = cost[rows][:, cols], a[rows], b[cols]
    y = g[cols]
    x = softmin(M, y, v, eps)
    null = torch.cat([u, -v])
    for _ in range(60):
        P = plan_of(M, u, v, eps, x, y)
        H = torch.cat([torch.cat([P.sum(1).diag(), P], 1), torch.cat([P.mT, P.sum(0).diag()], 1)])
        step = eps * torch.linalg.solve(H + torch.outer(null, null), torch.cat([u - P.sum(1), v - P.sum(0)]))
        # Far from the solution a full step overflows.
        step = step * min(1.0, 2 * eps / max(float(step.abs().max()), 1e-300))
        x, y = x + step[: len(x)], y + step[len(x) :]
        if float(step.abs().max()) < 1e-15:
            break
    f, g = softmin(cost[:, cols], y, v, eps), softmin(cost[rows].mT, x, u, eps)
    t = (b * torch.where(b > 0, g, 0.0)).sum() / b.sum()
    return f + t, g - t


def problem_of(cost, a, b, eps, dtype=torch.float64):
    """The reduced problem that solvers take; weights positive."""
    finite = cost[cost.isfinite()]
    reduced = (cost - cost.amin(1, keepdim=True)).to(dtype)
    return Problem(reduced, a / a.sum(), b / b.sum(), eps, float(finite.max() - finite.min()))


def outcome_plan(problem, outcome):
    return plan_of(problem.cost.double(), problem.a, problem.b, problem.eps, outcome.f, outcome.g)


def outcome_err(problem, outcome):
    """err of the returned potentials, from scratch."""
    P = outcome_plan(problem, outcome)
    return float((P.sum(1) - problem.a).abs().sum() + (P.sum(0) - problem.b).abs().sum())
