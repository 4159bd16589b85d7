"""Duals of nonlinearities: the rectifiers and the sign, with all others imported so that they are found here."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stochproc.kernels._dual_base import Dual
from stochproc.kernels._dual_quadrature import Numeric
from stochproc.kernels._dual_smooth import Cos, Erf, Exp, Gelu, Rbf, Sin
from stochproc.kernels._dual_steps import RectifiedDefect, by_rows, rectified_step
from stochproc.kernels._pair import Pair

__all__ = [
    "ABRelu",
    "Abs",
    "Cos",
    "Dual",
    "Erf",
    "Exp",
    "Gelu",
    "LeakyRelu",
    "Numeric",
    "Rbf",
    "Relu",
    "Sign",
    "Sin",
]


@dataclass(frozen=True)
class ABRelu(Dual):
    r"""Two-slope rectifier: f(u) = a u for u < 0, b u for u > 0.

    With :math:`c = (a^2 + b^2)/2`, :math:`g = (a - b)^2 / 2\pi` and the angle t,
    :math:`A' = c A - g n (\sin t - t \cos t)`, and the derivative dual is :math:`c - g t`.

    Parameters
    ----------
    a, b : float
        Slopes, finite and not both 0.

    Raises
    ------
    ValueError
        If a slope is not finite or both are 0.

    Notes
    -----
    The derivative of the derivative dual is unbounded at coincident and opposite points, and 0 there by
    definition. Close to opposite points (angle pi - p) the value of a rectifier that vanishes on one side is
    itself of order p^3, and accurate to eps r1 r2 only: the defect cannot hold p.
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite; got {value}.")
        if self.a == 0 == self.b:
            raise ValueError("a and b must not both be 0; got 0 and 0.")

    @property
    def _c(self) -> float:
        return (self.a**2 + self.b**2) / 2

    @property
    def _g(self) -> float:
        return (self.a - self.b) ** 2 / (2 * math.pi)

    def _variance(self, q: Tensor) -> Tensor:
        return self._c * q

    def _norm(self, r: Tensor) -> Tensor:
        # Rounding sqrt(c) to float32 would bias every layer the same way.
        return (r.double() * math.sqrt(self._c)).to(r.dtype)

    def __call__(self, pair: Pair) -> Pair:
        """See :meth:`Dual.__call__`; one function with the closed-form first derivative, finite everywhere."""
        c, g = self._c, self._g
        if torch.is_grad_enabled() and any(t.requires_grad for t in pair):
            A, n, angle = torch.broadcast_tensors(pair.A, pair.n, pair.angle)
            D, A = math.sqrt(c) * pair.D, RectifiedDefect.apply(A, n, angle, c, g)
        else:
            D, A = by_rows(lambda *fields: rectified_step(Pair(*fields), c, g), *pair)
        return Pair(self._norm(pair.r1), self._norm(pair.r2), D, A)

    def derivative(self, pair: Pair) -> Tensor:
        """See :meth:`Dual.derivative`; its gradient at angles 0 and pi is unbounded and returned as 0."""
        return self._c - self._g * pair.angle


@dataclass(frozen=True)
class Relu(ABRelu):
    """Rectifier f(u) = max(u, 0)."""

    a: float = field(default=0.0, init=False, repr=False)
    b: float = field(default=1.0, init=False, repr=False)


@dataclass(frozen=True)
class LeakyRelu(ABRelu):
    """Leaky rectifier f(u) = max(u, 0) + slope min(u, 0).

    Parameters
    ----------
    slope : float, default=0.01
        Finite slope for negative u.

    Raises
    ------
    ValueError
        If slope is not finite.
    """

    a: float = field(default=0.0, init=False, repr=False)
    b: float = field(default=1.0, init=False, repr=False)
    slope: float = 0.01

    def __post_init__(self) -> None:
        if not math.isfinite(self.slope):
            raise ValueError(f"slope must be finite; got {self.slope}.")
        object.__setattr__(self, "a", float(self.slope))


@dataclass(frozen=True)
class Abs(ABRelu):
    r"""Absolute value f(u) = \|u\|; opposite points have defect 0, accurate to eps r1 r2 only."""

    a: float = field(default=-1.0, init=False, repr=False)
    b: float = field(default=1.0, init=False, repr=False)


@dataclass(frozen=True)
class Sign(Dual):
    r"""Sign, f(0) = 0: the value is :math:`1 - 2 t / \pi` with the angle t, and 0 with the origin.

    Its derivative in the inputs is unbounded at coincident points and returned as 0 there.
    """

    def _variance(self, q: Tensor) -> Tensor:
        return (q > 0).to(q.dtype)

    def __call__(self, pair: Pair) -> Pair:
        """See :meth:`Dual.__call__`."""
        r1, r2 = ((r > 0).to(r.dtype) for r in (pair.r1, pair.r2))
        return Pair(r1, r2, r1 - r2, 2 / math.pi * pair.angle * (r1 * r2))

    def derivative(self, pair: Pair) -> Tensor:
        """Raise ValueError: the tangent kernel is infinite at coincident points."""
        raise ValueError("Sign has no tangent kernel: its derivative is no function; use Erf for a smooth sign.")
