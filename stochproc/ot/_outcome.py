"""What the solvers of a transport problem share: how passes are counted, reported and stopped, and how they end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from tqdm.auto import tqdm

from stochproc.solvers import Status

__all__ = ["OTState", "Outcome", "Tracker"]

COUNTERS = ("passes", "newton", "cg", "sinkhorn", "line_search")


@dataclass(frozen=True)
class OTState:
    """What a callback sees after each pass over the pairs; returning True from it stops the solver.

    Parameters
    ----------
    iteration : int
        Passes done so far, from 1.
    eps : float
        Regularisation of this pass, in the unit of the cost; larger than ``reg`` while it is annealed.
    err : float
        L1 distance of the marginals from the weights, relative to the mass.
    dual_value : float
        Dual value of this pass at this ``eps``, for weights of mass one.
    """

    iteration: int
    eps: float
    err: float
    dual_value: float


OTCallback = Callable[[OTState], "bool | None"]


class Outcome(NamedTuple):
    """How a solver of a reduced problem ended."""

    f: Tensor
    """Potential of the rows (n), float64, in the unit of the cost, KL form."""
    g: Tensor
    """Potential of the columns (m)."""
    err: float
    """Of the returned potentials."""
    status: Status
    message: str
    """One sentence for people where the tolerance was not met; else empty."""


@dataclass
class Tracker:
    """Counts passes, keeps the log, shows progress and says when to stop."""

    tol: float
    max_iter: int
    callback: OTCallback | None = None
    verbose: bool | int = False
    stats: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    log: list[tuple[float, float]] = field(default_factory=list)
    ended: Status | None = None
    """Set once the budget is spent or the callback asked to stop: solvers then return what they have."""
    started: float = field(default_factory=time.perf_counter)
    bar: Any = None
    unit: float = 1.0
    """What the solver multiplied costs by; eps and dual values are reported without."""

    def record(self, eps: float, err: float, dual_value: float, what: str = "passes") -> None:
        """Count one pass, trial steps too; those over a part of the pairs have a counter of their own."""
        self.stats[what] = self.stats.get(what, 0) + 1
        eps, dual_value = eps / self.unit, dual_value / self.unit
        self.log.append((eps, err))
        if self.verbose:
            if self.bar is None:
                self.bar = tqdm(total=self.max_iter, desc="transport", unit="pass", leave=False)
            self.bar.set_postfix(eps=f"{eps:.2e}", err=f"{err:.2e}", refresh=False)
            self.bar.update()
        if self.callback is not None:
            state = OTState(len(self.log), eps, err, dual_value)
            if self.callback(state) is True:
                self.ended = Status.STOPPED
        if self.ended is None and len(self.log) >= self.max_iter:
            self.ended = Status.MAX_ITER

    def count(self, what: str, times: int = 1) -> None:
        """Add to one of the counters of ``stats``."""
        self.stats[what] = self.stats.get(what, 0) + times

    def close(self) -> None:
        """Note the time taken and take the progress bar away."""
        self.stats["time_s"] = time.perf_counter() - self.started
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def status_of(self, err: float) -> Status:
        """Return the status of a solver that leaves its loop with this err."""
        if err <= self.tol:
            return Status.CONVERGED
        return self.ended or Status.STAGNATED

    def message_of(self, err: float, why: str = "") -> str:
        """Return one sentence about an end that is no convergence."""
        status = self.status_of(err)
        if status is Status.CONVERGED:
            return ""
        reached = f"err {err:.3g} above tol {self.tol:.3g} after {len(self.log)} passes"
        if status is Status.MAX_ITER:
            return f"{reached}: the budget max_iter={self.max_iter} is spent; raise max_iter, tol or reg."
        if status is Status.STOPPED:
            return f"{reached}: the callback asked to stop."
        if not math.isfinite(err):
            return f"{reached}: the potentials are not finite; the problem has no finite plan at this reg."
        return f"{reached}: no step improves it any more; {why or 'raise tol or reg.'}"
