"""Newton on the semi-duals of many transport problems at once: a state machine with one sweep a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stochproc.ot._batch_pass import BatchProblem
from stochproc.ot._batch_rules import Action, Numbers, Seen, decide, first_eps
from stochproc.solvers import Status

__all__ = ["BatchOutcome", "newton_batch"]

# Plans of the items that are worked on at the same time.
STACK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
# In units of span / eps: err that sweeps in float32 reach without fighting their rounding.
SINGLE_FLOOR = 3e-8
# Where that is more than this, single precision is of no help.
SINGLE_UP_TO = 1e-3
# Relative error of dual values, whose rows are summed in these dtypes.
ROUNDING = {torch.float32: 1e-7, torch.float64: 1e-13}

Callback = Callable[[int, float, float, float], "bool | None"]


class BatchOutcome(NamedTuple):
    """How the items of a batch ended."""

    f: Tensor
    """Potentials of the rows (B, n), float64, in the unit of the cost, KL form."""
    g: Tensor
    """Potentials of the columns (B, m); the sum of b g is 0."""
    err: Tensor
    """Of the returned potentials (B,), float64, on the CPU."""
    status: list[Status]
    message: list[str]
    """One sentence for each item that did not converge; else empty."""
    n_iter: Tensor
    """Passes of each item (B,), int64, on the CPU."""
    stats: dict[str, Any]
    """Sums over items of passes, newton, sinkhorn, line_search; ``rounds`` of the whole batch."""

    def in_gauge(self, b: Tensor) -> BatchOutcome:
        """Return it with the sum of b g moved to 0."""
        shift = torch.linalg.vecdot(b, self.g).unsqueeze(1)
        return self._replace(f=self.f + shift, g=self.g - shift)


@torch.no_grad()
def newton_batch(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    tol: float,
    max_iter: int,
    potentials: tuple[Tensor, Tensor] | None = None,
    callback: Callback | None = None,
) -> BatchOutcome:
    """Solve balanced problems of one shape, each to its own end.

    Parameters
    ----------
    cost : Tensor of shape (B, n, m) or (1, n, m)
        float32 or float64, finite or ``+inf``; one cost may be shared by all items.
    a, b : Tensor of shape (B, n) and (B, m)
        float64, non-negative, of sum 1.
    eps : Tensor of shape (B,)
        float64, positive.
    tol : float
        Bound on err of each item.
    max_iter : int
        Bound on the passes of each item.
    potentials : pair of Tensors of shape (B, n) and (B, m), optional
        Where to start; items whose first pass has an err above 0.5 start cold.
    callback : callable, optional
        Called after each round with its number and the eps, err and dual value of the worst item; returning True
        stops all items.
    """
    if a.shape[0] == 0:
        nothing = torch.zeros(0, dtype=torch.float64)
        return BatchOutcome(torch.zeros_like(a), torch.zeros_like(b), nothing, [], [], nothing.long(), {})
    if cost.shape[2] > cost.shape[1]:
        # The linear systems have the size of the columns.
        swapped = None if potentials is None else (potentials[1], potentials[0])
        out = newton_batch(cost.mT, b, a, eps, tol, max_iter, swapped, callback)
        return out._replace(f=out.g, g=out.f).in_gauge(b)
    machine = _Machine(cost, a, b, eps, tol, max_iter, callback)
    everything = np.arange(a.shape[0])
    g0 = None if potentials is None else potentials[1].double()
    if cost.dtype == torch.float32:
        floor = SINGLE_FLOOR * machine.span / machine.target
        hopeless = everything[floor > SINGLE_UP_TO]
        machine.run(hopeless, torch.float64, np.full(a.shape[0], tol), g0)
        everything = everything[floor <= SINGLE_UP_TO]
        machine.run(everything, torch.float32, np.maximum(tol, floor), g0)
        # In double the err is the true one, and what float32 could not reach takes a step or two.
        everything = everything[np.isin(machine.action[everything], (Action.CONVERGED, Action.STUCK))]
        g0 = machine.g.clone()
    machine.run(everything, torch.float64, np.full(a.shape[0], tol), g0)
    return machine.outcome().in_gauge(b)


class _Stack(NamedTuple):
    """The items that are worked on: numbers on the host (k,), vectors on the device (k, m), slope (k,)."""

    numbers: Numbers
    base: Tensor
    direction: Tensor
    ratio: Tensor
    slope: Tensor

    def select(self, keep: np.ndarray, rows: Tensor) -> _Stack:
        """Return some of the items."""
        return _Stack(Numbers(*(x[keep] for x in self.numbers)), *(x.index_select(0, rows) for x in self[1:]))

    def joined(self, more: _Stack) -> _Stack:
        """Return these items and more."""
        numbers = (np.concatenate(pair) for pair in zip(self.numbers, more.numbers, strict=True))
        return _Stack(Numbers(*numbers), *(torch.cat(pair) for pair in zip(self[1:], more[1:], strict=True)))


class _Machine:
    """Keeps what is known of every item, and a stack of those at work."""

    def __init__(
        self, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, tol: float, max_iter: int, callback: Callback | None
    ) -> None:
        self.problem = BatchProblem(cost, a, b)
        self.tol, self.max_iter, self.callback = tol, max_iter, callback
        self.target = eps.double().cpu().numpy()
        self.span = np.broadcast_to(_spans(cost).cpu().numpy(), self.target.shape)
        self.start = first_eps(self.target, self.span)
        # No dual value exceeds the largest cost plus eps times the largest KL(P | a b^T), if there is a plan.
        self.highest = 1.01 * self.problem.highest.double().cpu().numpy()
        self.entropy = np.log(max(2, min(cost.shape[1:])))
        B = len(self.target)
        self.f, self.g = torch.zeros_like(a), torch.zeros_like(b)
        self.err = np.full(B, np.nan)
        self.passes = np.zeros(B, dtype=np.int64)
        # Whatever does not end a problem stands for one that is at work or waits.
        self.action = np.full(B, int(Action.NEWTON))
        self.stats = dict.fromkeys(("newton", "cg", "sinkhorn", "line_search", "rounds"), 0)
        self.stopped = False

    def run(self, waiting: np.ndarray, dtype: torch.dtype, tol: np.ndarray, g0: Tensor | None) -> None:
        """Work on as many items as the stack holds; those that end make room for the next."""
        if not len(waiting) or self.stopped:
            return
        problem, mine = self.problem, waiting
        n, m = problem.cost.shape[1:]
        capacity = max(1, STACK_BYTES.get(self.g.device.type, 1 << 30) // max(1, n * m * dtype.itemsize))
        capacity = min(capacity, len(waiting))
        buffer = problem.cost.new_empty(capacity, n, m, dtype=dtype)
        stack = self._fresh(waiting[:0], g0)
        while len(stack.base) or len(waiting):
            room = capacity - len(stack.base)
            # Joining copies the stack, so a quarter of it comes at a time.
            if len(waiting) and 4 * room >= capacity:
                stack, waiting = stack.joined(self._fresh(waiting[:room], g0)), waiting[room:]
            stack = self._round(stack, buffer, tol)
            if self.stopped:
                self.g[self._index(stack.numbers.item)] = stack.base
                break
        self._settle(mine, buffer)

    def outcome(self) -> BatchOutcome:
        """Return all items, with what the reduction took out put back."""
        problem, eps = self.problem, torch.from_numpy(self.target).to(self.g.device)
        if problem.live is not None:
            everything = self._index(np.arange(len(self.target)))
            softmin = problem.column_softmin(everything, self.f, eps)
            # A column without any finite cost has no potential; like its weight, it does not matter.
            g = torch.where(softmin.isfinite(), -eps.unsqueeze(1) * softmin, 0)
            self.g = torch.where(problem.live, self.g, g)
        self.stats["passes"] = int(self.passes.sum())
        status = [self._status(i) for i in range(len(self.target))]
        message = [self._message(i, what) for i, what in enumerate(status)]
        err, n_iter = torch.from_numpy(self.err), torch.from_numpy(self.passes)
        return BatchOutcome(self.f + problem.low.double(), self.g, err, status, message, n_iter, self.stats)

    def _fresh(self, which: np.ndarray, g0: Tensor | None) -> _Stack:
        eps = (self.start if g0 is None else self.target)[which]
        base = self.g.new_zeros(len(which), self.g.shape[1]) if g0 is None else g0[self._index(which)]
        nothing = torch.zeros_like(base)
        return _Stack(Numbers.new(which, eps, g0 is not None), base, nothing, nothing, base.new_zeros(len(which)))

    def _index(self, which: np.ndarray) -> Tensor:
        return torch.from_numpy(which).to(self.g.device, non_blocking=True)

    def _round(self, stack: _Stack, buffer: Tensor, tol: np.ndarray) -> _Stack:
        """Sweep every item's trial and let each go on, or end; return those that go on."""
        problem, s = self.problem, stack.numbers
        rows = self._index(s.item)
        step, lift, eps = torch.from_numpy(np.stack((s.step, s.lift, s.eps))).to(self.g.device, non_blocking=True)
        trial = torch.addcmul(stack.base, stack.direction, step.unsqueeze(1)).addcmul_(stack.ratio, lift.unsqueeze(1))
        # The plan does not depend on a constant, and far-off means would cost digits.
        trial -= torch.linalg.vecdot(problem.b[rows], trial).unsqueeze(1)
        at = problem.sweep(rows, trial, eps, buffer)
        ratio, lost = problem.log_ratio(rows, at.c, buffer.dtype)
        # One transfer a round is all that the host waits for.
        found = torch.stack((at.phi, at.err, ratio.abs().amax(1), stack.slope, lost.double())).cpu().numpy()
        seen, some_lost = Seen(*found[:4]), found[4]
        self.stats["rounds"] += 1
        self.passes[s.item] += 1
        if some_lost.any():
            again = np.flatnonzero(some_lost)
            k = self._index(again)
            ratio[k] = problem.log_ratio_again(rows[k], at.f[k], trial[k], eps[k])
            seen.widest[again] = ratio[k].abs().amax(1).cpu().numpy()
            self.passes[s.item[again]] += 1

        self.stats["line_search"] += int((s.step > 0).sum())
        bound = self.highest[s.item] + s.eps * self.entropy
        spent = self.passes[s.item] >= self.max_iter
        target, start, rounding = self.target[s.item], self.start[s.item], ROUNDING[buffer.dtype]
        taken, action = decide(s, seen, target, start, bound, spent, tol[s.item], rounding)
        self.stats["sinkhorn"] += int((s.lift > 0).sum())
        chosen = torch.from_numpy(taken).to(self.g.device, non_blocking=True).unsqueeze(1)
        stack = stack._replace(
            base=torch.where(chosen, trial, stack.base), ratio=torch.where(chosen, ratio, stack.ratio)
        )
        cold = np.flatnonzero(action == Action.COLD)
        if len(cold):
            stack.base[self._index(cold)] = 0
        self._leave(stack, action, at.f)
        self._report(s)
        newton = np.flatnonzero(action == Action.NEWTON)
        if len(newton) and not self.stopped:
            k = self._index(newton)
            direction, slope = problem.directions(at, k, rows[k], eps[k])
            self.stats["newton"] += len(newton)
            stack = stack._replace(
                direction=stack.direction.index_copy(0, k, direction), slope=stack.slope.index_copy(0, k, slope)
            )
        keep = action > Action.STUCK
        return stack if keep.all() else stack.select(keep, self._index(np.flatnonzero(keep)))

    def _leave(self, stack: _Stack, action: np.ndarray, f: Tensor) -> None:
        """Note the results of the items that end with this round."""
        ended = np.flatnonzero(action <= Action.STUCK)
        if not len(ended):
            return
        item, k = stack.numbers.item[ended], self._index(ended)
        rows = self._index(item)
        self.action[item] = action[ended]
        # The rows of an item that did not converge are those of a refused trial; they are computed in the end.
        self.f[rows], self.g[rows] = f[k], stack.base[k]
        self.err[item] = stack.numbers.err[ended]

    def _report(self, s: Numbers) -> None:
        if self.callback is not None and len(s.item):
            worst = int(np.argmax(s.err))
            seen = float(s.eps[worst]), float(s.err[worst]), float(s.phi[worst])
            self.stopped = self.callback(self.stats["rounds"], *seen) is True

    def _settle(self, mine: np.ndarray, buffer: Tensor) -> None:
        """Give items that did not converge the potentials of the rows and the err that belong to their g and eps."""
        left = mine[self.action[mine] != Action.CONVERGED]
        for i in range(0, len(left), len(buffer)):
            item = left[i : i + len(buffer)]
            rows = self._index(item)
            at = self.problem.sweep(rows, self.g[rows], torch.from_numpy(self.target[item]).to(self.g.device), buffer)
            self.f[rows], self.err[item] = at.f, at.err.cpu().numpy()

    def _status(self, i: int) -> Status:
        if self.err[i] <= self.tol:
            return Status.CONVERGED
        if self.action[i] == Action.SPENT:
            return Status.MAX_ITER
        return Status.STAGNATED if self.action[i] <= Action.STUCK else Status.STOPPED

    def _message(self, i: int, status: Status) -> str:
        reached = f"err {self.err[i]:.3g} above tol {self.tol:.3g} after {self.passes[i]} passes"
        if status is Status.CONVERGED:
            return ""
        if status is Status.MAX_ITER:
            return f"{reached}: the budget max_iter={self.max_iter} is spent; raise max_iter, tol or reg."
        if status is Status.STOPPED:
            return f"{reached}: the callback asked to stop."
        if self.action[i] == Action.INFEASIBLE:
            return f"{reached}: the dual is unbounded: forbidden pairs (+inf) leave no plan with these weights."
        floor = 1e-17 * self.span[i] / self.target[i]
        return f"{reached}: no step improves it any more; rounding allows about {floor:.1e} at this reg."


def _spans(cost: Tensor) -> Tensor:
    """Largest less smallest finite entry (B,), float64; 0 where there is none."""
    low, high = cost.amin((1, 2)), cost.amax((1, 2))
    if not bool(high.isfinite().all()):
        high = torch.where(cost.isfinite(), cost, -torch.inf).amax((1, 2))
    span = high.double() - low.double()
    return torch.where(span.isfinite(), span, 0)
