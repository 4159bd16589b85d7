"""Safe and Sparse Newton: regularised Newton steps on the joint dual with a plan cut by the mass it may lose."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from stochproc.ot._dense_pass import CROWDED, row_blocks
from stochproc.ot._joint_dual import JointDual, JointPoint, centred
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._problem import Problem
from stochproc.solvers import safe_cholesky

__all__ = ["safe_entries", "ssns"]

# Sinkhorn sweeps at each eps of the ladder that leads to the first step. From sweeps at the last eps alone clouds at
# eps = span / 1e4 do not converge in 2000 passes; so they take some 150.
SWEEPS = 20
STEPS = (1.0, 0.5, 0.25, 0.1)
# Mass that may be dropped from a row or column, relative to the norm of the gradient.
DROPPED = 0.01
SHIFT, LEAST_SHIFT = 1.0, 1e-3
# Rejected steps in a row after which the shift, 4^15 times what it was, hides the Hessian altogether.
MAX_REJECTED = 15


def ssns(problem: Problem, tracker: Tracker, g0: Tensor | None = None) -> Outcome:
    r"""Solve a reduced problem by Safe and Sparse Newton [1]_.

    Sinkhorn sweeps at falling eps come first (a few at the eps of the problem in [1]_). Then each step d solves
    :math:`(-H_\delta + \mu \|\nabla F\| I)\, d = \nabla F`, where :math:`H_\delta` has lost at most 0.01 of the
    norm of the gradient in each row and column, its diagonal never; :math:`\mu` follows the ratio of achieved to
    predicted gain.

    Parameters
    ----------
    problem : Problem
    tracker : Tracker
    g0 : Tensor of shape (m,) or None, default=None
        Potential of the columns to start from, KL form.

    Returns
    -------
    Outcome
        ``STAGNATED`` after 15 rejected steps in a row.

    References
    ----------
    .. [1] Z. Tang, Y. Qiu, "Safe and sparse Newton method for entropic-regularized optimal transport",
       NeurIPS 2024.
    """
    dual = JointDual(problem, tracker)
    point = dual.start(g0, SWEEPS, anneal=True)
    shift, rejected = SHIFT, 0
    kept: Kept | None = None
    while point.err > tracker.tol and tracker.ended is None and rejected < MAX_REJECTED:
        norm = float(point.gradient.norm())
        # A rejected step leaves the point, and with it the sparse Hessian.
        if kept is None:
            kept = safe_entries(dual.plan, DROPPED * norm)
        # The shift is that of a cost of span 1, so that the unit of the cost does not matter.
        sigma = shift * norm * problem.eps / problem.span
        direction = _solve(kept, point, sigma, problem.eps)
        tracker.count("newton")
        rho = -1.0
        if bool(direction.any()):
            trial, step = _search(dual, point, direction)
            rho = _ratio(dual, point, trial, step, direction, sigma)
        shift = shift * 4 if rho < 0.25 else max(LEAST_SHIFT, shift / 2) if rho > 0.75 else shift
        if rho > 0:
            point, rejected, kept = trial, 0, None
        else:
            rejected += 1
    return dual.outcome(point, "no regularised Newton step raises the dual value")


def _search(dual: JointDual, point: JointPoint, direction: Tensor) -> tuple[JointPoint, float]:
    """Return the first trial step that raises F, or the last."""
    for step in STEPS:
        trial = dual.step(point, step, direction)
        dual.tracker.count("line_search")
        gain = trial.value - point.value
        if gain > 0 or (gain > -dual.rounding(point) and trial.err < point.err) or dual.tracker.ended is not None:
            break
    return trial, step


def _ratio(
    dual: JointDual, point: JointPoint, trial: JointPoint, step: float, direction: Tensor, sigma: float
) -> float:
    """Return achieved over predicted gain; where both are lost in rounding, 1 for a smaller err and -1 else."""
    # d (-H) d = grad d - sigma d d / eps by the equation that d solves.
    slope, square = float(point.gradient @ direction), float(direction @ direction)
    predicted = (step - step**2 / 2) * slope + step**2 / 2 * sigma / dual.problem.eps * square
    if predicted <= dual.rounding(point):
        return 1.0 if trial.err < point.err else -1.0
    return (trial.value - point.value) / predicted


class Kept(NamedTuple):
    """A plan without the small entries that its rows and columns can spare."""

    entries: sp.csr_array | Tensor
    """The plan itself where dropping would not make it sparse."""
    dropped_rows: Tensor
    """Mass that each row lost."""
    dropped_columns: Tensor


def safe_entries(plan: Tensor, mass: float) -> Kept:
    """Drop entries so that no row and no column loses more than ``mass``, the smallest first."""
    n, m = plan.shape
    # Entries below mass / m together cannot exceed it in a row: only larger ones need sorting. Same for columns.
    level = mass / max(n, m)
    rows, columns = plan.new_empty(n, dtype=torch.float64), plan.new_zeros(m, dtype=torch.float64)
    where, found = [], 0
    for part in row_blocks(plan):
        block = plan[part]
        large = block > level
        found += int(large.sum())
        if found > CROWDED * n * m:
            # A copy: trial steps overwrite the plan, and a rejected one needs the Hessian again.
            return Kept(plan.to(torch.float64, copy=True), torch.zeros_like(rows), torch.zeros_like(columns))
        small = block.masked_fill(large, 0.0).double()
        rows[part] = small.sum(1)
        columns += small.sum(0)
        where.append(large.nonzero() + large.new_tensor([part.start, 0], dtype=torch.int64))
    at = torch.cat(where)
    values = plan[at[:, 0], at[:, 1]].double().cpu().numpy()
    i, j = at.T.cpu().numpy()
    sums = rows.cpu().numpy(), columns.cpu().numpy()
    spare = _spare(values, i, sums[0], mass) & _spare(values, j, sums[1], mass)
    for sum_, index in zip(sums, (i, j), strict=True):
        sum_ += np.bincount(index[spare], values[spare], minlength=sum_.shape[0])
    entries = sp.csr_array((values[~spare], (i[~spare], j[~spare])), shape=(n, m))
    return Kept(entries, *(torch.from_numpy(x).to(rows) for x in sums))


def _spare(values: np.ndarray, line: np.ndarray, already: np.ndarray, mass: float) -> np.ndarray:
    """Mark the smallest values of each line that together with what it lost already stay within mass."""
    order = np.lexsort((values, line))
    running = np.cumsum(values[order])
    first = np.searchsorted(line[order], np.arange(already.shape[0]))
    before = np.concatenate([np.zeros(1), running])[first]
    lost = running - before[line[order]] + already[line[order]]
    spare = np.empty(values.shape[0], dtype=bool)
    spare[order] = lost <= mass
    return spare


def _solve(kept: Kept, point: JointPoint, sigma: float, eps: float) -> Tensor:
    r"""Solve :math:`([[D_r, P], [P^T, D_c]] + \sigma I) d = \varepsilon \nabla F`; 0 where rounding forbids it."""
    n = point.x.shape[0]
    rhs_x, rhs_y = (eps * point.gradient).split([n, point.y.shape[0]])
    if n >= point.y.shape[0]:
        dx, dy = _eliminate(kept, point.rows + sigma, sigma, rhs_x, rhs_y)
    else:
        entries = kept.entries.T if isinstance(kept.entries, Tensor) else kept.entries.T.tocsr()
        flipped = Kept(entries, kept.dropped_columns, kept.dropped_rows)
        dy, dx = _eliminate(flipped, point.columns + sigma, sigma, rhs_y, rhs_x)
    return centred(torch.cat([dx, dy]), n)


def _eliminate(kept: Kept, pivots: Tensor, sigma: float, rhs_x: Tensor, rhs_y: Tensor) -> tuple[Tensor, Tensor]:
    """Solve by the Schur complement of the rows, which holds a quarter to a half less fill than the whole."""
    entries = kept.entries
    # The complement is the Laplacian of W = P^T D^-1 P plus this diagonal: a sum of positive terms, whereas the
    # difference of the column sums and the diagonal of W cancels for near-permutations.
    weight = (kept.dropped_rows + sigma) / pivots
    if isinstance(entries, Tensor):
        half = entries / pivots.sqrt().unsqueeze(1)
        S = -(half.T @ half)
        S.fill_diagonal_(0.0)
        S.diagonal().copy_(weight @ entries + kept.dropped_columns + sigma - S.sum(1))
        factor = safe_cholesky(S, tries=0)
        rhs = rhs_y - (rhs_x / pivots) @ entries
        if not factor.ok:
            return torch.zeros_like(rhs_x), torch.zeros_like(rhs_y)
        dy = torch.cholesky_solve(rhs.unsqueeze(1), factor.value).squeeze(1)
        return (rhs_x - entries @ dy) / pivots, dy
    r, x, y, w = (t.cpu().numpy() for t in (pivots, rhs_x, rhs_y, weight))
    scaled = sp.diags_array(1 / np.sqrt(r)) @ entries
    W = (scaled.T @ scaled).tocsc()
    W.setdiag(0.0)
    diagonal = np.asarray(W.sum(1)).ravel() + w @ entries + kept.dropped_columns.cpu().numpy() + sigma
    L = (sp.diags_array(diagonal) - W).tocsc()
    factors = splu(L, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    dy = factors.solve(y - (x / r) @ entries)
    dx = (x - entries @ dy) / r
    return torch.from_numpy(dx).to(rhs_x), torch.from_numpy(dy).to(rhs_y)
