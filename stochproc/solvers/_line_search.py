"""Backtracking line search that knows when a decrease is too small to be seen."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc._checks import check_integer, check_positive

__all__ = ["LineSearch", "LineStep", "Trial"]


class Trial(NamedTuple):
    """What an ``accept`` rule sees of a step; its value is finite."""

    step: float
    """Length along the direction."""
    value: float
    """The function there."""
    payload: Any
    """What the function returned besides; None if nothing."""
    sufficient: bool
    """Whether the search would accept the step by itself."""
    flat: bool
    """Whether the promised decrease is lost in rounding, so that ``sufficient`` says no more than "no increase"."""


class LineStep(NamedTuple):
    """What a line search found."""

    step: float
    """Length along the direction; 0 if none was accepted."""
    value: float
    """The function there; the value at 0 if none was accepted."""
    payload: Any
    """What the function returned besides at the accepted step; None if none was accepted."""
    evaluations: int
    """How often the function was evaluated."""
    accepted: bool
    """Whether a step was accepted."""


@dataclass(frozen=True)
class LineSearch:
    r"""Shorten a step along a direction until the function has decreased enough.

    A step t is sufficient by Armijo's rule, :math:`\phi(t) \le \phi(0) + c\, t\, \phi'(0)`. Close to a minimum
    the promised decrease :math:`t |\phi'(0)|` falls below the rounding of :math:`\phi` and the rule would be
    decided by noise: there a step is sufficient if :math:`\phi` does not rise by more than that rounding, and
    ``Trial.flat`` tells an ``accept`` rule to look at something better than values, such as the gradient.

    Parameters
    ----------
    armijo : float, default=1e-4
        The constant c, in (0, 1).
    shrink : float, default=0.5
        Factor, in (0, 1), from one step to the next.
    max_steps : int, default=30
        Steps tried at most.
    rounding : float or None, default=None
        Rounding of the function relative to its value; None is 16 eps of the coarsest dtype among the values
        (float64 for Python numbers). A sum of large terms that cancel has more.

    Examples
    --------
    >>> LineSearch()(lambda t: (4 * t - 1) ** 2, 1.0, -8.0)
    LineStep(step=0.25, value=0.0, payload=None, evaluations=3, accepted=True)
    """

    armijo: "float | int" = 1e-4
    shrink: "float | int" = 0.5
    max_steps: int = 30
    rounding: "float | int | None" = None

    def __post_init__(self) -> None:
        for name in ("armijo", "shrink"):
            value = getattr(self, name)
            check_positive(name, value)
            if value >= 1:
                raise ValueError(f"{name} must lie in (0, 1); got {value}.")
        check_integer("max_steps", self.max_steps, 1)
        if self.rounding is not None:
            check_positive("rounding", self.rounding, zero=True)

    def __call__(
        self,
        phi: Callable[[float], Any],
        value0: "Tensor | float | int",
        slope0: "Tensor | float | int",
        step0: "float | int" = 1.0,
        accept: "Callable[[Trial], bool] | None" = None,
    ) -> LineStep:
        r"""Try ``step0``, ``step0 * shrink``, ... until one is accepted.

        Parameters
        ----------
        phi : callable
            Maps a step to the value of the function there, a number or a tensor of one entry, or to a pair of
            the value and anything to be kept with it. A value that is NaN or infinite makes the search back off.
        value0 : float or Tensor of one entry
            The function at 0, finite.
        slope0 : float or Tensor of one entry
            Its derivative along the direction at 0; not positive.
        step0 : float, default=1.0
            First step.
        accept : callable or None, default=None
            Given a ``Trial``, has the last word on it: ``lambda t: t.sufficient and ok(t)`` vetoes,
            ``lambda t: t.sufficient or ok(t)`` also lets through what Armijo's rule would not.

        Returns
        -------
        LineStep
            With ``accepted`` False where no step was.

        Raises
        ------
        TypeError
            If a value is not a number.
        ValueError
            If ``value0`` or ``slope0`` is not finite, ``slope0`` is positive, ``step0`` is not positive, or a
            value has more than one entry.
        """
        start, eps = _number("value0", value0)
        slope, _ = _number("slope0", slope0)
        check_positive("step0", step0)
        if not math.isfinite(start):
            raise ValueError(f"value0 must be finite; got {start}.")
        if not (math.isfinite(slope) and slope <= 0):
            raise ValueError(f"slope0 must be finite and not positive, as along a direction of descent; got {slope}.")
        step = float(step0)
        for k in range(1, self.max_steps + 1):
            found = phi(step)
            value, payload = found if isinstance(found, tuple) else (found, None)
            number, its_eps = _number("phi", value)
            if math.isfinite(number):
                noise = abs(start) * (16 * max(eps, its_eps) if self.rounding is None else self.rounding)
                flat = step * abs(slope) <= noise
                sufficient = number <= start + self.armijo * step * slope or (flat and number <= start + noise)
                trial = Trial(step, number, payload, sufficient, flat)
                if sufficient if accept is None else accept(trial):
                    return LineStep(step, number, payload, k, True)
            step *= self.shrink
        return LineStep(0.0, start, None, self.max_steps, False)


def _number(name: str, value: Any) -> tuple[float, float]:
    """Return a value as a float, and the relative spacing of its dtype."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one entry; got shape {tuple(value.shape)}.")
        if value.is_complex():
            raise TypeError(f"{name} must be real; got {value.dtype}.")
        dtype = value.dtype if value.is_floating_point() else torch.float64
        return float(value.detach()), torch.finfo(dtype).eps
    if isinstance(value, numbers.Real):
        return float(value), torch.finfo(torch.float64).eps
    raise TypeError(f"{name} must be a number or a tensor of one entry; got {type(value).__name__}.")
