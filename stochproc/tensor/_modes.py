"""What the user says about a mode: the kind of its coordinates and the law of its functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stochproc._checks import check_choice, check_positive
from stochproc.kernels import Kernel, as_kernel

__all__ = ["KERNELS", "KINDS", "Mode", "as_modes"]

KINDS = ("continuous", "periodic", "discrete")
#: Kernels by name that have a lengthscale and a state space.
KERNELS = ("matern12", "matern32", "matern52", "rbf")


@dataclass(frozen=True)
class Mode:
    """One mode of a functional decomposition: what its coordinates are and how its functions vary.

    Parameters
    ----------
    kind : {"continuous", "periodic", "discrete"}, default="continuous"
        Real numbers; real numbers modulo a period; or categories, which share nothing.
    kernel : str, Kernel or None, default=None
        Covariance of each function of a continuous mode: "matern12", "matern32", "matern52", "rbf", or a kernel with
        a state space, used as it is but for the variance that the decomposition multiplies it by; its positive
        hyperparameters are learned unless they are frozen. None is that of the estimator. A periodic mode has the
        periodic kernel unless a kernel object is given.
    lengthscale : float or None, default=None
        Where the lengthscale of a named kernel starts, in the unit of the column; None is that of the estimator. In
        a periodic mode it has no unit.
    period : float or None, default=None
        In the unit of the column; needed by a periodic mode, refused by others.

    Raises
    ------
    TypeError
        If the kernel is neither a name nor a kernel.
    ValueError
        If a value is out of range, or does not belong to the kind.

    Examples
    --------
    >>> from stochproc.tensor import FunctionalCP, Mode
    >>> model = FunctionalCP(modes=["continuous", Mode("periodic", period=365.25), "discrete"])
    """

    kind: str = "continuous"
    kernel: Any = None
    lengthscale: float | None = None
    period: float | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if self.kind == "discrete":
            for name in ("kernel", "lengthscale"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} must be None for a discrete mode, whose categories are independent; got "
                        f"{getattr(self, name)!r}."
                    )
        if isinstance(self.kernel, str):
            check_choice("kernel", self.kernel, KERNELS)
            if self.kind == "periodic":
                raise ValueError(
                    f"kernel must be None or a Kernel for a periodic mode; got {self.kernel!r}. None is the periodic "
                    "kernel."
                )
        elif self.kernel is not None and not isinstance(self.kernel, Kernel):
            raise TypeError(f"kernel must be a name, a Kernel or None; got {type(self.kernel).__name__}.")
        if self.lengthscale is not None:
            check_positive("lengthscale", self.lengthscale)
        if (self.period is None) == (self.kind == "periodic"):
            what = "be given for a periodic mode" if self.kind == "periodic" else f"be None for a {self.kind} mode"
            raise ValueError(f"period must {what}; got {self.period}.")
        if self.period is not None:
            check_positive("period", self.period)


def as_modes(modes: Any, n_columns: int) -> list[Mode]:
    """Return one Mode a column for what the parameter ``modes`` says."""
    if modes is None:
        return [Mode()] * n_columns
    if isinstance(modes, (str, Mode)) or not isinstance(modes, Sequence):
        raise TypeError(f"modes must be None or a list with one entry a column; got {modes!r}.")
    if len(modes) != n_columns:
        raise ValueError(f"modes must have one entry a column of X, {n_columns}; got {len(modes)}.")
    found = []
    for k, mode in enumerate(modes):
        if isinstance(mode, str):
            if mode == "periodic":
                raise ValueError(f"modes[{k}] must say the period: Mode('periodic', period=...).")
            check_choice(f"modes[{k}]", mode, KINDS)
            mode = Mode(mode)
        elif not isinstance(mode, Mode):
            raise TypeError(f"modes[{k}] must be a name of {KINDS} or a Mode; got {type(mode).__name__}.")
        found.append(mode)
    return found


def kernel_of(mode: Mode, kernel: Any, lengthscale: float | None, spread: float) -> tuple[Kernel, bool]:
    """Return the kernel of a mode, a copy in float64, and whether it has a lengthscale with usual bounds.

    ``kernel`` and ``lengthscale`` are those of the estimator, for modes that say nothing; ``spread`` is the range of
    the points.
    """
    chosen = mode.kernel if mode.kernel is not None else kernel
    own = mode.lengthscale if mode.lengthscale is not None else lengthscale
    if mode.kind == "periodic" and mode.kernel is None:
        from stochproc.kernels import Periodic

        made: Kernel = Periodic(1.0 if mode.lengthscale is None else mode.lengthscale, mode.period)
        made.log_period.requires_grad_(False)
        return made.double(), True
    if isinstance(chosen, str):
        made = as_kernel(chosen, n_columns=1)
        made.lengthscale = float(own) if own is not None else (spread / 2 if spread > 0 else 1.0)  # type: ignore[assignment]
        return made.double(), True
    made = copy.deepcopy(as_kernel(chosen))
    if not math.prod(made.batch_shape) == 1 or made.batch_shape:
        raise ValueError(f"kernel must be a single one, without batch_shape; got {tuple(made.batch_shape)}.")
    try:
        made.state_space()
    except NotImplementedError as error:
        raise ValueError(f"kernel must have a state space, such as {', '.join(KERNELS)}; {error}") from None
    return made.double(), False
