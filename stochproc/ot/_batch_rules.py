"""What each transport problem of a batch does after a sweep: accept, halve, guard, lower eps or end."""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

__all__ = ["WARM_ERR", "Action", "Numbers", "Seen", "decide", "first_eps"]

# As in the solver of single problems, see there.
GUARD, MAX_GUARDS = 1.0, 5
ANNEAL_FROM, ANNEAL_BY, ANNEAL_TOL = 8.0, 4.0, 1e-2
WARM_ERR = 0.5
MAX_SWEEPS = 3
SMALLEST_STEP = 1e-8
# Steps at the final eps that gain no more than rounding and do not halve err, after which nothing is expected.
MAX_FLAT = 10


class Action(enum.IntEnum):
    """What an item does next."""

    CONVERGED = 0
    INFEASIBLE = 1
    SPENT = 2
    STUCK = 3
    COLD = 4
    LOWER = 5
    GUARD = 6
    NEWTON = 7
    HALVE = 8
    SWEEP = 9

    @property
    def ends(self) -> bool:
        """Whether the item leaves the stack."""
        return self <= Action.STUCK


class Seen(NamedTuple):
    """What the last sweep found at the trial of each item (k,)."""

    phi: np.ndarray
    err: np.ndarray
    widest: np.ndarray
    """Largest absolute log(b / c)."""
    slope: np.ndarray
    """Derivative of the dual along the present direction, at the base."""


class Numbers(NamedTuple):
    """State of the items on the stack that is one number each (k,); fields are written in place.

    The trial of an item is base + step * direction + lift * ratio; where step is 0 it is taken as it is.
    """

    item: np.ndarray
    eps: np.ndarray
    warm: np.ndarray
    phi: np.ndarray
    err: np.ndarray
    step: np.ndarray
    lift: np.ndarray
    guards: np.ndarray
    sweeps: np.ndarray
    best: np.ndarray
    """Smallest err at the final eps that :data:`MAX_FLAT` counts from."""
    flat: np.ndarray

    @classmethod
    def new(cls, item: np.ndarray, eps: np.ndarray, warm: bool) -> Numbers:
        """Return the state before a first sweep at the base."""
        k = len(item)
        phi, err, step, lift = np.zeros((4, k))
        guards, sweeps, flat = np.zeros((3, k), dtype=np.int64)
        return cls(item, eps, np.full(k, warm), phi, err, step, lift, guards, sweeps, np.full(k, np.inf), flat)


def first_eps(target: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Return where annealing starts."""
    return np.maximum(target, span / ANNEAL_FROM)


def decide(
    s: Numbers,
    seen: Seen,
    target: np.ndarray,
    start: np.ndarray,
    bound: np.ndarray,
    spent: np.ndarray,
    tol: np.ndarray,
    rounding: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Update the state after a sweep; return which trials were taken and the action of each item.

    ``target`` and ``start`` are the last and the first eps of the items, ``bound`` what a dual value cannot exceed
    if there is a plan, ``spent`` whose budget this sweep used up, ``rounding`` the relative precision of dual values.
    """
    searched = s.step > 0
    gain = seen.phi - s.phi
    # Near rounding Phi is flat: there a smaller err counts.
    better = (gain >= 1e-4 * s.step * seen.slope) | ((seen.err < s.err) & (gain >= -1e-13 * np.abs(s.phi)))
    taken = np.isfinite(seen.phi) & np.isfinite(seen.err) & (~searched | (better & (seen.slope > 0)))
    s.phi[taken], s.err[taken] = seen.phi[taken], seen.err[taken]
    s.sweeps[taken & searched] = 0

    final = s.eps <= target
    halved = taken & final & (s.err <= 0.5 * s.best)
    s.best[halved] = s.err[halved]
    s.flat[halved] = 0
    s.flat[taken & searched & final & ~halved & (gain <= rounding * np.abs(s.phi))] += 1
    # 1, 1/2, 1/4, 1/16, ...
    shorter = s.step * np.where(s.step > 0.3, 0.5, 0.25)
    rules = (
        (taken & final & (s.err <= tol), Action.CONVERGED),
        (taken & (s.phi > bound), Action.INFEASIBLE),
        (spent, Action.SPENT),
        ((~taken & ~searched) | (s.flat > MAX_FLAT), Action.STUCK),
        # A warm start that is far off costs more than a cold one.
        (s.warm & (s.err > WARM_ERR), Action.COLD),
        (taken & ~final & (s.err <= ANNEAL_TOL), Action.LOWER),
        (taken & (seen.widest > GUARD) & (s.guards < MAX_GUARDS), Action.GUARD),
        (taken, Action.NEWTON),
        ((seen.slope > 0) & (shorter >= SMALLEST_STEP), Action.HALVE),
        (s.sweeps < MAX_SWEEPS, Action.SWEEP),
        (~final, Action.LOWER),
    )
    action = np.select([rule for rule, _ in rules], [int(what) for _, what in rules], int(Action.STUCK))

    s.warm[:] = False
    s.guards[:] = np.where(action == Action.GUARD, s.guards + 1, 0)
    s.sweeps[action == Action.SWEEP] += 1
    s.step[:] = np.select([action == Action.NEWTON, action == Action.HALVE], [1.0, shorter], 0.0)
    s.lift[:] = np.where((action == Action.GUARD) | (action == Action.SWEEP), s.eps, 0.0)
    lower, cold = action == Action.LOWER, action == Action.COLD
    s.sweeps[lower | cold] = 0
    s.eps[:] = np.where(lower, np.maximum(s.eps / ANNEAL_BY, target), np.where(cold, start, s.eps))
    return taken, action
