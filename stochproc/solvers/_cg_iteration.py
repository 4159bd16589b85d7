"""The conjugate gradient recursion on many columns at once, from a zero start; scalars in float64."""

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ColumnState", "Ended", "descend", "inner"]


class Ended(enum.IntEnum):
    """How a column ended, in order of severity."""

    RUNNING = 0
    CONVERGED = 1
    STOPPED = 2
    MAX_ITER = 3
    STAGNATED = 4
    BREAKDOWN = 5
    NONFINITE = 6


@dataclass
class ColumnState:
    """State of the columns: vectors of shape (*batch, n, k), scalars of shape (*batch, k)."""

    x: Tensor
    best_x: Tensor
    r: Tensor
    p: Tensor
    rz: Tensor
    norm: Tensor
    best: Tensor
    mark: Tensor  # the best norm when it last halved, and when that was
    mark_at: Tensor
    x_is_best: Tensor
    tol: Tensor
    iterations: Tensor
    code: Tensor
    bad_preconditioner: Tensor

    @classmethod
    def start(cls, r: Tensor, tol: Tensor, code: Tensor) -> "ColumnState":
        norm = inner(r, r).sqrt()
        code = torch.where((code == Ended.RUNNING) & (norm <= tol), int(Ended.CONVERGED), code)
        zero, count = torch.zeros_like(r), torch.zeros_like(code)
        # A recursion that starts from r is at its best before the first step.
        return cls(
            x=zero,
            best_x=zero.clone(),
            r=r.clone(),
            p=zero.clone(),
            rz=torch.zeros_like(norm),
            norm=norm,
            best=norm.clone(),
            mark=norm.clone(),
            mark_at=count,
            x_is_best=torch.ones_like(code, dtype=torch.bool),
            tol=tol,
            iterations=count.clone(),
            code=code,
            bad_preconditioner=torch.zeros_like(code, dtype=torch.bool),
        )

    def take(self, index: Tensor) -> "ColumnState":
        """Return the state of some columns."""
        parts = {f.name: getattr(self, f.name)[..., index] for f in dataclasses.fields(self)}
        return ColumnState(**parts)

    def put(self, index: Tensor, part: "ColumnState") -> None:
        """Write the state of some columns back."""
        for f in dataclasses.fields(self):
            getattr(self, f.name)[..., index] = getattr(part, f.name)

    def solution(self) -> Tensor:
        """Return the best iterate of every column."""
        return torch.where(self.x_is_best.unsqueeze(-2), self.x, self.best_x)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each column with its partner, products and sum in float64."""
    return (a.double() * b.double()).sum(-2)


def descend(
    r: Tensor,
    tol: Tensor,
    code: Tensor,
    *,
    product: Callable[[Tensor], Tensor],
    precondition: "Callable[[Tensor], Tensor] | None",
    budget: int,
    patience: int = 100,
    flexible: int = 0,
    shrink: bool = False,
    steepest: bool = False,
    after: "Callable[[ColumnState, Tensor, Tensor, ColumnState], bool] | None" = None,
    coefficients: "list[tuple[Tensor, Tensor]] | None" = None,
) -> ColumnState:
    """Solve A x = r from x = 0 for the columns whose ``code`` is ``RUNNING``.

    Parameters
    ----------
    r : Tensor of shape (*batch, n, k)
        Of moderate size: squares of its entries must neither overflow nor vanish in float64.
    tol : Tensor of shape (*batch, k), float64
        Norm of the residual at which a column is done.
    code : Tensor of shape (*batch, k), int64
    product, precondition : callable
        A V, and a symmetric positive definite approximation of its inverse; both map (*batch, n, k) to the same.
    budget : int
        Most iterations.
    patience : int, default=100
        Iterations within which the best residual has to halve.
    flexible : int, default=0
        0 is the usual recursion. m > 0 makes each direction conjugate to the m before it, which also holds for
        a preconditioner that varies or is not symmetric; m = 1 is the Polak-Ribiere rule.
    shrink : bool, default=False
        Drop columns from the products once half of those present have ended; only for a ``product`` and a
        ``precondition`` that take any number of columns.
    steepest : bool, default=False
        A column whose first direction has no positive curvature returns that direction instead of 0.
    after : callable or None
        Called after each iteration with the state, the columns that it holds, the norms of all columns, and the
        state of all columns as it was when some were last dropped; returning True stops.
    coefficients : list or None
        Receives (alpha, beta) of each iteration, both (*batch, k) and zero for columns that have ended: the
        Lanczos matrix of a column has diagonal 1/alpha_j + beta_{j-1}/alpha_{j-1} and off-diagonal
        sqrt(beta_j)/alpha_j.

    Returns
    -------
    ColumnState
        Columns still ``RUNNING`` at the end ran out of budget or were stopped.
    """
    whole = ColumnState.start(r, tol, code)
    s, index = whole, torch.arange(r.shape[-1], device=r.device)
    norms = whole.norm.clone()
    directions: list[tuple[Tensor, Tensor, Tensor]] = []
    if bool((s.code == Ended.RUNNING).any()):
        _new_direction(s, precondition, directions, flexible)
    for k in range(1, budget + 1):
        if not bool((s.code == Ended.RUNNING).any()):
            break
        Ap = product(s.p)
        curvature = inner(s.p, Ap)
        alpha = _step(s, Ap, curvature, k, flexible, steepest)
        _judge(s, k, patience)
        norms[..., index] = s.norm
        if coefficients is not None:
            coefficients.append((torch.zeros_like(norms), torch.zeros_like(norms)))
            coefficients[-1][0][..., index] = alpha
        running = s.code == Ended.RUNNING
        n_columns = int(running.reshape(-1, running.shape[-1]).any(0).sum())
        stop = after is not None and bool(after(s, index, norms, whole))
        if stop or n_columns == 0 or k == budget:
            break
        if flexible:
            directions = [*directions, (s.p, Ap, curvature)][-flexible:]
        elif shrink and 2 * n_columns <= running.shape[-1]:
            keep = running.reshape(-1, running.shape[-1]).any(0).nonzero().squeeze(1)
            if s is not whole:
                whole.put(index, s)
            s, index = s.take(keep), index[keep]
        beta = _new_direction(s, precondition, directions, flexible)
        if coefficients is not None:
            coefficients[-1][1][..., index] = beta
    if s is not whole:
        whole.put(index, s)
    return whole


def _step(s: ColumnState, Ap: Tensor, curvature: Tensor, k: int, flexible: int, steepest: bool) -> Tensor:
    """Minimise along the directions; columns without positive curvature end where they are. Return the steps."""
    running = s.code == Ended.RUNNING
    broken = running & ~(curvature > 0)
    if bool((broken | (running & ~curvature.isfinite())).any()):
        _end_broken(s, running, curvature, Ap, k, steepest)
        running = s.code == Ended.RUNNING
        # Frozen columns must not meet what is left of NaN.
        Ap = _masked(Ap, running)
    slope = inner(s.p, s.r) if flexible else s.rz
    alpha = torch.where(running, slope / curvature, 0.0)
    step = alpha.to(s.r.dtype).unsqueeze(-2)
    r = torch.addcmul(s.r, step, Ap, value=-1)
    norm = torch.where(running, inner(r, r).sqrt(), s.norm)
    # The best iterate is set aside only when a worse one is about to replace it.
    worse = running & s.x_is_best & ~(norm < s.best)
    if bool(worse.any()):
        s.best_x = torch.where(worse.unsqueeze(-2), s.x, s.best_x)
    better = running & (norm < s.best)
    s.x_is_best = torch.where(running, better, s.x_is_best)
    s.best = torch.where(better, norm, s.best)
    s.x = torch.addcmul(s.x, step, s.p)
    s.r, s.norm = r, norm
    s.iterations = torch.where(running, k, s.iterations)
    return alpha


def _end_broken(s: ColumnState, running: Tensor, curvature: Tensor, Ap: Tensor, k: int, steepest: bool) -> None:
    """End the columns whose curvature is not positive, or not a number."""
    nonfinite = running & ~curvature.isfinite()
    negative = running & curvature.isfinite() & (curvature <= 0)
    s.code = torch.where(nonfinite, int(Ended.NONFINITE), torch.where(negative, int(Ended.BREAKDOWN), s.code))
    s.iterations = torch.where(nonfinite | negative, k - 1, s.iterations)
    if k == 1 and steepest:
        # What an inexact Newton method wants at a point of negative curvature: the steepest direction.
        first = negative.unsqueeze(-2)
        s.x = torch.where(first, s.p, s.x)
        r = torch.where(first, s.r - Ap, s.r)
        s.r, s.norm = r, torch.where(negative, inner(r, r).sqrt(), s.norm)
    # The current iterate, which minimises the energy so far, even if an earlier residual was smaller.
    s.x_is_best = s.x_is_best | negative
    s.best = torch.where(negative, s.norm, s.best)


def _judge(s: ColumnState, k: int, patience: int) -> None:
    """End the columns that have converged, overflowed or stopped improving after iteration k."""
    running = s.code == Ended.RUNNING
    halved = running & (s.best <= 0.5 * s.mark)
    s.mark, s.mark_at = torch.where(halved, s.best, s.mark), torch.where(halved, k, s.mark_at)
    code = torch.where(k - s.mark_at >= patience, int(Ended.STAGNATED), s.code)
    code = torch.where(s.norm <= s.tol, int(Ended.CONVERGED), code)
    code = torch.where(s.norm.isfinite(), code, int(Ended.NONFINITE))
    s.code = torch.where(running, code, s.code)


def _new_direction(
    s: ColumnState,
    precondition: "Callable[[Tensor], Tensor] | None",
    directions: list[tuple[Tensor, Tensor, Tensor]],
    flexible: int,
) -> Tensor:
    """Replace the directions by conjugate ones; return beta, of the usual recursion."""
    running = s.code == Ended.RUNNING
    z = s.r if precondition is None else precondition(s.r)
    rz = inner(s.r, z)
    if precondition is not None:
        nonfinite = running & ~rz.isfinite()
        # A preconditioner that is not symmetric owes no sign; with a symmetric one r'z is a squared norm.
        negative = running & (rz <= 0) if not flexible else torch.zeros_like(running)
        s.bad_preconditioner = s.bad_preconditioner | nonfinite | negative
        s.code = torch.where(nonfinite, int(Ended.NONFINITE), torch.where(negative, int(Ended.BREAKDOWN), s.code))
        running = s.code == Ended.RUNNING
    beta = torch.zeros_like(rz)
    if flexible:
        p = z
        for q, Aq, curvature in directions:
            weight = torch.where(running, inner(z, Aq) / curvature, 0.0)
            p = torch.addcmul(p, weight.to(p.dtype).unsqueeze(-2), q, value=-1)
    else:
        # rz is zero before the first direction.
        beta = torch.where(running & (s.rz > 0), rz / s.rz, 0.0)
        p = torch.addcmul(z, beta.to(z.dtype).unsqueeze(-2), s.p)
    s.p, s.rz = _masked(p, running), rz
    return beta


def _masked(V: Tensor, running: Tensor) -> Tensor:
    return V if bool(running.all()) else torch.where(running.unsqueeze(-2), V, 0.0)
