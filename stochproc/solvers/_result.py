"""What every solver returns: the best value it has, how it ended, and what it took."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from stochproc.exceptions import SolverError

T = TypeVar("T")


class Status(str, enum.Enum):
    """How a solver ended.

    Only ``CONVERGED`` means that the tolerance was met; a solver that ends otherwise still returns its best
    iterate.
    """

    CONVERGED = "converged"
    """The residual met the tolerance."""
    MAX_ITER = "max_iter"
    """The iteration budget ran out first."""
    STAGNATED = "stagnated"
    """The residual stopped falling above the tolerance."""
    BREAKDOWN = "breakdown"
    """The problem is not of the kind the solver needs, for instance not positive definite."""
    NONFINITE = "nonfinite"
    """The input or an iterate holds NaN or infinity."""
    STOPPED = "stopped"
    """The callback asked to stop."""


@dataclass(frozen=True)
class Convergence:
    """How far a solver came.

    Parameters
    ----------
    iterations : int
        Iterations done; in a batch, the largest count.
    residual : float
        The solver's measure of error at the returned value, recomputed at the end; in a batch, the worst.
    tolerance : float
        What the residual was asked to be.
    history : Tensor or None
        Residual after each iteration, where the solver keeps it.
    message : str
        One sentence for people: what happened and, if it went wrong, what to do.
    """

    iterations: int
    residual: float
    tolerance: float
    history: Tensor | None = None
    message: str = ""


@dataclass(frozen=True)
class Result(Generic[T]):
    """What every solver returns.

    Parameters
    ----------
    value : T
        The best iterate, whatever the status.
    status : Status
        How the solver ended.
    convergence : Convergence
        Iterations, residual, tolerance and a message.
    stats : dict
        What else the solver measured, per item where the problem was a batch.
    """

    value: T
    status: Status
    convergence: Convergence
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the solver met its tolerance."""
        return self.status is Status.CONVERGED

    def unwrap(self) -> T:
        """Return the value, or raise where the solver did not meet its tolerance.

        Raises
        ------
        SolverError
            If the status is not ``Status.CONVERGED``; the message is the solver's own.
        """
        if self.ok:
            return self.value
        c = self.convergence
        detail = c.message or f"residual {c.residual:.3g} after {c.iterations} iterations, asked for {c.tolerance:.3g}"
        raise SolverError(f"solver ended with status '{self.status.value}': {detail}")


@dataclass(frozen=True)
class SolverState:
    """What a callback sees after each iteration; returning True from it stops the solver.

    Parameters
    ----------
    iteration : int
        Iterations done so far, from 1.
    residual : float
        The solver's measure of error now.
    value : object
        The current iterate.
    """

    iteration: int
    residual: float
    value: Any


Callback = Callable[[SolverState], "bool | None"]
