"""What a user sees of a long fit, and how it can be stopped."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stochproc.solvers import SolverState

if TYPE_CHECKING:
    from stochproc.tensor._fitting import Outcome

__all__ = ["Progress", "Stopped"]


class Stopped(Exception):
    """The callback asked for the end."""


class Progress:
    """One line a sweep on stderr behind ``verbose``, and a callback."""

    def __init__(self, verbose: int, callback: Callable[[SolverState], Any] | None) -> None:
        self.verbose, self.callback = verbose, callback
        self.phase = "sweep"
        self.left: Outcome | None = None
        """What an interruption leaves to go on with."""
        self.sweeps = 0
        self._before = time.perf_counter()

    def report(self, sweep: int, outcome: Outcome, change: float) -> None:
        """Show a sweep; raise Stopped if the callback returns True."""
        self.sweeps += 1
        now = time.perf_counter()
        bound = outcome.bounds[-1]
        if self.verbose:
            from tqdm.auto import tqdm

            held_out = f"  held-out density {outcome.scores[-1]:.4f}" if outcome.scores else ""
            line = (
                f"{self.phase}: sweep {sweep}  bound {bound:.6g}  change {change:.1e}  noise variance "
                f"{1 / outcome.model.noise.precision:.3g}{held_out}  {now - self._before:.2f} s"
            )
            tqdm.write(line, file=sys.stderr)
        self._before = now
        if self.callback is not None:
            residual = change if math.isfinite(change) else math.inf
            if self.callback(SolverState(iteration=self.sweeps, residual=residual, value=bound)) is True:
                raise Stopped
