"""Every warning and error class of the library.

``ConvergenceWarning`` and ``NotFittedError`` are scikit-learn's (``sklearn.exceptions``), so that code which
already handles them handles ours.
"""

__all__ = [
    "ArchitectureError",
    "BackendError",
    "BackendWarning",
    "DataWarning",
    "NotPositiveDefiniteError",
    "NumericalWarning",
    "SolverError",
    "StochprocWarning",
]


class StochprocWarning(UserWarning):
    """Base class of the warnings of this library."""


class BackendWarning(StochprocWarning):
    """A backend that was asked for cannot be used; another one gives the same numbers."""


class NumericalWarning(StochprocWarning):
    """A computation went through only with help, such as jitter on a diagonal; the message says how much."""


class DataWarning(StochprocWarning):
    """The data are legal but unlikely to be what was meant, such as a target that never varies."""


class SolverError(RuntimeError):
    """A solver did not reach its tolerance and the caller asked for the value all the same."""


class NotPositiveDefiniteError(SolverError):
    """A matrix stayed indefinite up to the largest jitter that was tried."""


class BackendError(RuntimeError):
    """A backend was demanded with ``strict=True`` and cannot be used."""


class ArchitectureError(ValueError):
    """The layers of a network do not fit together, or lack what was asked of them; the message names the layer."""
