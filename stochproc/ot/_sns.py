"""Sinkhorn-Newton-Sparse as published: Newton steps on the joint dual with a plan cut to its largest entries."""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from stochproc.ot._joint_dual import JointDual, JointPoint, centred
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import Problem
from stochproc.solvers import LineSearch, SparseCG, Trial

__all__ = ["largest_entries", "sns"]

MAX_CG = 1000
# Largest exponent by which a trial step may multiply an entry of the plan.
MAX_RISE = 600.0
# Steps down to 2^-29 of the first, where Armijo's rule is decided by rounding.
SEARCH = LineSearch(armijo=1e-4, shrink=0.5, max_steps=30)


def sns(
    problem: Problem,
    tracker: Tracker,
    g0: Tensor | None = None,
    *,
    n_sinkhorn: int = 20,
    density: float | None = None,
) -> Outcome:
    r"""Solve a reduced problem by algorithm 1 of [1]_.

    Parameters
    ----------
    problem : Problem
    tracker : Tracker
    g0 : Tensor of shape (m,) or None, default=None
        Potential of the columns to start from, KL form; None is x = y = 0 in the entropy form, as published.
    n_sinkhorn : int, default=20
        Sinkhorn sweeps before the first Newton step; problems with many optimal plans need several hundred.
    density : float or None, default=None
        Part of the entries of P kept off the diagonal blocks of the Hessian; None is 2 / n. The largest entry of each
        row and column is kept besides, so that no row is left empty.

    Returns
    -------
    Outcome
        ``STAGNATED`` where the solve gives no direction of ascent or the line search no step: the published method
        has no way on from there.

    References
    ----------
    .. [1] X. Tang, M. Shavlovsky, H. Rahmanian, E. Tardini, K. Thekumparampil, T. Xiao, L. Ying, "Accelerating
       Sinkhorn algorithm with sparse Newton iterations", ICLR 2024, arXiv:2401.12253.
    """
    n, m = problem.shape
    count = n * m if density is None and n <= 2 else math.ceil((2 / n if density is None else density) * n * m)
    dual = JointDual(problem, tracker)
    point = dual.start(g0, n_sinkhorn)
    why = ""
    while point.err > tracker.tol and tracker.ended is None:
        direction, slope = _direction(dual, point, min(count, n * m))
        if not (slope > 0 and math.isfinite(slope)):
            why = "conjugate gradients on the sparse Hessian found no direction of ascent"
            break
        found = _search(dual, point, direction, slope)
        if found is None:
            why = "no step along the sparse Newton direction raises the dual value"
            break
        point = found
    return dual.outcome(point, why)


def _direction(dual: JointDual, point: JointPoint, count: int) -> tuple[Tensor, float]:
    """Solve with the sparse Hessian; return the direction and the slope of F along it."""
    problem, tracker = dual.problem, dual.tracker
    n = problem.shape[0]
    kept = largest_entries(dual.plan, count)
    diagonal = torch.cat([point.rows, point.columns]).cpu()
    H = sp.block_array([[None, kept], [kept.T, None]], format="csr") + sp.diags_array(diagonal.numpy(), format="csr")
    # The Hessian is singular along (1, -1) where nothing is dropped; a right-hand side and a result without that part
    # make the solve the one on its complement. Quadratic convergence wants a residual that falls with err.
    rhs = centred(problem.eps * point.gradient.cpu(), n)
    cg = SparseCG(
        rtol=max(1e-12, min(1e-4, point.err)), max_iter=min(MAX_CG, diagonal.shape[0]), direct="never", backend="scipy"
    )
    result = cg(H, rhs)
    direction = result.value
    if not bool(direction.any()):
        # No iterate had a smaller residual than the zero start: the step of its preconditioner is an ascent still.
        direction = rhs / torch.where(diagonal > 0, diagonal, 1.0)
    tracker.count("newton")
    tracker.count("cg", result.convergence.iterations)
    direction = centred(direction, n).to(point.x)
    return direction, float(point.gradient @ direction)


def _search(dual: JointDual, point: JointPoint, direction: Tensor, slope: float) -> JointPoint | None:
    """Backtrack along a direction; None where no step is good enough."""
    tracker, noise = dual.tracker, dual.rounding(point)

    def phi(step: float) -> tuple[float, JointPoint]:
        trial = dual.step(point, step, direction)
        tracker.count("line_search")
        return -trial.value, trial

    def accept(trial: Trial) -> bool:
        if tracker.ended is not None:
            return True
        if trial.step * slope > noise:
            return trial.sufficient
        # Where F is flat in floating point only err can tell a better point.
        return trial.payload.err < point.err and trial.value <= noise - point.value

    # Halve before the first pass what would multiply an entry of the plan beyond float64.
    rise = float(direction[: point.x.shape[0]].max() + direction[point.x.shape[0] :].max()) / dual.problem.eps
    first = 0.5 ** max(0, math.ceil(math.log2(rise / MAX_RISE))) if rise > MAX_RISE else 1.0
    found = SEARCH(phi, -point.value, -slope, first, accept)
    if not found.accepted:
        return None
    # A search cut short returns what it has, unless that is worse.
    return found.payload if tracker.ended is None or found.payload.err < point.err else point


def largest_entries(plan: Tensor, count: int) -> sp.csr_array:
    """Return the ``count`` largest entries of a plan and the largest of each row and column, in float64."""
    n, m = plan.shape
    flat = plan.flatten()
    everywhere = flat.topk(count, sorted=False).indices
    of_rows = plan.argmax(1) + m * torch.arange(n, device=plan.device)
    of_columns = plan.argmax(0) * m + torch.arange(m, device=plan.device)
    index = torch.cat([everywhere, of_rows, of_columns]).unique()
    values = flat[index].double().cpu().numpy()
    where = index.cpu().numpy()
    present = values > 0
    coordinates = np.divmod(where[present], m)
    return sp.csr_array((values[present], coordinates), shape=(n, m))
