"""Solvers of entropic transport to measure against, each brought to the same marginal error as ours.

A peer is a function of a problem, eta = 1 / reg and a tolerance in its own unit, and returns a plan. Tolerances mean
something else in each library, so :func:`calibrated` looks for the loosest one at which the L1 error of the marginals,
recomputed from the plan, is as asked.
"""

import contextlib
import importlib
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from ot_problems import Array, Transport

GOAL = 1e-9
Solver = Callable[[Transport, float, float], Any]


class Run(NamedTuple):
    """A peer at the tolerance that gives the error asked for, or the best it got."""

    call: Callable[[], Any]
    err: float
    seconds: float
    linear: float

    @property
    def reached(self) -> bool:
        """Whether the error asked for was met."""
        return self.err <= GOAL


def ours(p: Transport, eta: float, tol: float) -> Any:
    """Solve with the default method and form the plan."""
    from stochproc import ot

    return ot.solve(p.M, p.a, p.b, reg=1 / eta, tol=tol).plan


def result(p: Transport, eta: float, tol: float = GOAL, **options: Any) -> Any:
    """Our whole result, without a warning where it did not converge."""
    from stochproc import ot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ot.solve(p.M, p.a, p.b, reg=1 / eta, tol=tol, **options)


def ssns(p: Transport, eta: float, tol: float) -> Array:
    """Safe and sparse Newton of regot."""
    import regot

    return regot.sinkhorn_ssns(p.M, p.a, p.b, 1 / eta, tol=tol, max_iter=1000).plan


def splr(p: Transport, eta: float, tol: float) -> Array:
    """Sparse plus low rank quasi-Newton of regot."""
    import regot

    return regot.sinkhorn_splr(p.M, p.a, p.b, 1 / eta, tol=tol, max_iter=1000).plan


def mdot(p: Transport, eta: float, tol: float) -> torch.Tensor:
    """Mirror descent with truncated Newton projections of mdot-tnt."""
    from mdot_tnt.mdot import mdot as run

    a, b, cost = (torch.from_numpy(x) for x in (p.a, p.b, p.M))
    # Its tolerance is min(H(a), H(b)) / eta^exponent.
    entropy = min(-float((w * w.log()).sum()) for w in (a, b))
    u, v, reached, *_ = run(a, b, cost, eta, p=math.log(entropy / tol) / math.log(eta))
    return (u[:, None] + v - reached * cost).exp()


def geomloss(p: Transport, eta: float, tol: float) -> Any:
    """Annealed symmetric Sinkhorn of geomloss; it stops by the number of iterations alone, here 1 / tol."""
    from geomloss import ot

    return ot.solve(p.M, reg=1 / eta, a=p.a, b=p.b, max_iter=round(1 / tol)).plan


# Name, what it imports, and the tolerances to try, loosest first.
PEERS: dict[str, tuple[str, Solver, tuple[float, ...]]] = {
    "regot SSNS": ("regot", ssns, (1e-8, 1e-9, 1e-10, 1e-11)),
    "regot SPLR": ("regot", splr, (1e-9, 1e-10, 1e-11)),
    "mdot-tnt": ("mdot_tnt", mdot, (1e-9, 1e-10)),
    "geomloss": ("geomloss", geomloss, (1 / 100, 1 / 1000)),
}


def absent(name: str) -> str | None:
    """Say why a peer cannot be run here; None if it can."""
    module = "ot" if name.startswith("POT") else PEERS[name][0]
    try:
        importlib.import_module(module)
    except Exception as error:  # A peer may fail to import in any way; the table says which.
        return f"does not import: {type(error).__name__}: {error}"[:100]
    return None


def calibrated(p: Transport, eta: float, name: str, limit: float = 120.0) -> Run:
    """Return a peer at the loosest tolerance that meets the goal, or its best within the time limit."""
    _, solver, tolerances = PEERS[name]
    best, spent = None, 0.0
    for tol in tolerances:
        run = attempt(p, lambda tol=tol: solver(p, eta, tol))
        if best is None or run.err < best.err:
            best = run
        spent += run.seconds
        if run.reached or spent > limit:
            break
    assert best is not None
    return best


def attempt(p: Transport, call: Callable[[], Any]) -> Run:
    """Run once, and look at the plan."""
    with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.suppress(FloatingPointError):
        warnings.simplefilter("ignore")
        before = time.process_time()
        plan = np.asarray(call())
        seconds = time.process_time() - before
    err = p.err(plan)
    return Run(call, err if math.isfinite(err) else math.inf, seconds, p.linear(plan))


def sinkhorn_log(p: Transport, eta: float, goal: float, limit: float) -> tuple[float, float, int]:
    """Seconds, error and iterations of POT's log-domain Sinkhorn, to an error or a time, whichever is first."""
    import ot as pot

    options = {"method": "sinkhorn_log", "numItermax": 50, "stopThr": 0.0, "log": True, "warn": False}
    start: Any = None
    iterations, seconds, err = 0, 0.0, math.inf
    # Fifty iterations a call, each from where the last one ended; the plan they return costs one more pass.
    while err > goal and seconds < limit:
        before = time.process_time()
        plan, log = pot.sinkhorn(p.a, p.b, p.M, 1 / eta, warmstart=start, **options)
        seconds += time.process_time() - before
        start = (log["log_u"], log["log_v"])
        err, iterations = p.err(plan), iterations + 50
    return seconds, err, iterations
