"""Duals of nonlinearities: what an infinitely wide layer does to the covariance of a pair of inputs.

A dual maps the state of a pair before the nonlinearity f to the state after it, k' = E f(u) f(v) for a centred
Gaussian pair (u, v) of covariance k; its derivative dual E f'(u) f'(v) is the factor of the tangent kernel.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_positive
from stochproc.kernels._distance import safe_sqrt
from stochproc.kernels._dual_steps import (
    RectifiedDefect,
    erf_step,
    exponential_step,
    gelu_step,
    sine_step,
)
from stochproc.kernels._pair import Pair, clamp_defect, with_gradient_of

__all__ = ["ABRelu", "Abs", "Cos", "Dual", "Erf", "Exp", "Gelu", "LeakyRelu", "Rbf", "Relu", "Sign", "Sin"]

# Products of up to three variances appear behind erf and GELU; they must not overflow.
_LARGEST_NORM = {torch.float32: 1e6, torch.float64: 1e50}


class Dual(ABC):
    """Elementwise map of pair states through a nonlinearity; see the module for what it stands for.

    Subclasses are small immutable objects: hashable, comparable, picklable.
    """

    @abstractmethod
    def __call__(self, pair: Pair) -> Pair:
        """Map the state of a pair through the nonlinearity.

        Parameters
        ----------
        pair : Pair
            Fields of any shapes that broadcast together.

        Returns
        -------
        Pair
            D and the squared distance keep their relative accuracy. Differentiable along D = r1 - r2.
        """

    @abstractmethod
    def derivative(self, pair: Pair) -> Tensor:
        """Evaluate E f'(u) f'(v), by which the tangent kernel is multiplied.

        Parameters
        ----------
        pair : Pair
            State before the nonlinearity.

        Returns
        -------
        Tensor
            One value a pair.

        Raises
        ------
        ValueError
            If f has no derivative with a finite second moment (Sign).
        """

    @abstractmethod
    def _variance(self, q: Tensor) -> Tensor:
        """E f(u)^2 for u of variance q."""

    def _norm(self, r: Tensor) -> Tensor:
        # Norms are vectors, so the float64 of float32 data is cheap here; it saves the digits that depth multiplies.
        wide = r.double()
        return safe_sqrt(self._variance(wide * wide)).to(r.dtype)

    def diag(self, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Map variances: E f(u)^2.

        Parameters
        ----------
        q : Tensor
            Non-negative variances of u, any shape.

        Returns
        -------
        Tensor
            Bit for bit the square of the norm that a call on a pair with norm sqrt(q) returns, hence its ``q``
            at coincident points; so are compositions, since sqrt(r^2) = r in binary arithmetic.
        """
        r = self._norm(safe_sqrt(q.detach()))
        return with_gradient_of(r * r, self._variance(q))


class _SmoothDual(Dual):
    """Dual with a closed form whose derivatives of all orders are those of the plain formula.

    Values come from `_step`, free of cancellation and outside autograd; derivatives from `_value`, which is shorter.
    """

    @abstractmethod
    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """D and A after the nonlinearity, r1 and r2 being the norms after it."""

    @abstractmethod
    def _value(self, pair: Pair) -> Tensor:
        """E f(u) f(v) by a formula that autograd can differentiate everywhere."""

    def _check(self, pair: Pair) -> None:
        """Raise ValueError if the norms are out of the range of the formulas."""

    def __call__(self, pair: Pair) -> Pair:
        self._check(pair)
        r1, r2 = self._norm(pair.r1), self._norm(pair.r2)
        with torch.no_grad():
            D, A = self._step(pair, r1, r2)
            A = clamp_defect(A, r1 * r2)
        if torch.is_grad_enabled() and any(t.requires_grad for t in pair):
            D, A = with_gradient_of(D, r1 - r2), with_gradient_of(A, r1 * r2 - self._value(pair))
        return Pair(r1, r2, D, A)


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
        A, n, angle = torch.broadcast_tensors(pair.A, pair.n, pair.angle)
        A = RectifiedDefect.apply(A, n, angle, self._c, self._g)
        return Pair(self._norm(pair.r1), self._norm(pair.r2), math.sqrt(self._c) * pair.D, A)

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


@dataclass(frozen=True)
class Erf(_SmoothDual):
    r"""Error function: :math:`(2/\pi) \arcsin(2 q_{12} / \sqrt{(1 + 2 q_{11})(1 + 2 q_{22})})`.

    Raises ValueError on a call with norms above 1e50 (float64) or 1e6 (float32).
    """

    def _check(self, pair: Pair) -> None:
        _check_norms(self, pair)

    def _variance(self, q: Tensor) -> Tensor:
        return 4 / math.pi * (4 * q / ((1 + 4 * q).sqrt() + 1) ** 2).atan()

    def _value(self, pair: Pair) -> Tensor:
        return 2 / math.pi * torch.atan2(2 * pair.q, self._root(pair))

    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        return erf_step(pair, r1, r2)

    def derivative(self, pair: Pair) -> Tensor:
        """See :meth:`Dual.derivative`."""
        self._check(pair)
        return 4 / math.pi / self._root(pair)

    def _root(self, pair: Pair) -> Tensor:
        return (1 + 2 * (pair.r1 * pair.r1 + pair.r2 * pair.r2) + 4 * pair.det).sqrt()


@dataclass(frozen=True)
class Gelu(_SmoothDual):
    r"""Gaussian error linear unit :math:`u \Phi(u)`, the exact one.

    Raises ValueError on a call with norms above 1e50 (float64) or 1e6 (float32).

    References
    ----------
    .. [1] R. Tsuchida et al., "Avoiding Kernel Fixed Points: Computing with ELU and GELU Infinite Networks",
       AAAI 2021.
    """

    def _check(self, pair: Pair) -> None:
        _check_norms(self, pair)

    def _variance(self, q: Tensor) -> Tensor:
        c = (1 + 2 * q).sqrt()
        arc = 2 * (2 * q / (c + 1) ** 2).atan()
        return q * (1 / 4 + (2 * q / ((1 + q) * c) + arc) / (2 * math.pi))

    def _parts(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q1, q2 = pair.r1 * pair.r1, pair.r2 * pair.r2
        square = 1 + (q1 + q2) + pair.det
        return q1, q2, square, square.sqrt()

    def _value(self, pair: Pair) -> Tensor:
        q = pair.q
        q1, q2, square, root = self._parts(pair)
        # (q^2 + q11 q22 root^2) / (p root) as ratios, whose gradients do not overflow.
        p1, p2 = 1 + q1, 1 + q2
        rational = (q / p1) * (q / p2) / root + (q1 / p1) * (q2 / p2) * root
        return q / 4 + (rational + q * torch.atan2(q, root)) / (2 * math.pi)

    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        return gelu_step(pair, r1, r2)

    def derivative(self, pair: Pair) -> Tensor:
        """See :meth:`Dual.derivative`."""
        self._check(pair)
        q = pair.q
        q1, q2, square, root = self._parts(pair)
        # (1 - q11 q22)/p + 1 = (2 + q11 + q22)/p without the cancellation.
        rational = 1 / square + (2 + (q1 + q2)) / ((1 + q1) * (1 + q2))
        return 1 / 4 + (torch.atan2(q, root) + q / root * rational) / (2 * math.pi)


@dataclass(frozen=True)
class Sin(_SmoothDual):
    r"""Sine f(u) = sin(u + c).

    The value is :math:`(e^{-s} - \cos(2c) e^{-t})/2` with :math:`s, t = (q_{11} + q_{22} \mp 2 q_{12})/2`.

    Parameters
    ----------
    c : float, default=0.0
        Phase in radians, finite.

    Raises
    ------
    ValueError
        If c is not finite.
    """

    c: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.c):
            raise ValueError(f"c must be finite; got {self.c}.")

    @property
    def _kappa(self) -> float:
        return math.cos(2 * self.c)

    @property
    def _one_plus_kappa(self) -> float:
        return 2 * math.cos(self.c) ** 2

    def _variance(self, q: Tensor) -> Tensor:
        return math.sin(self.c) ** 2 - self._kappa / 2 * torch.expm1(-2 * q)

    def _halves(self, pair: Pair) -> tuple[Tensor, Tensor]:
        s = pair.sqdist / 2
        return s, pair.r1 * pair.r1 + pair.r2 * pair.r2 - s

    def _value(self, pair: Pair) -> Tensor:
        s, t = self._halves(pair)
        return ((-s).exp() - self._kappa * (-t).exp()) / 2

    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        return sine_step(pair, r1, r2, self._kappa, self._one_plus_kappa)

    def derivative(self, pair: Pair) -> Tensor:
        """See :meth:`Dual.derivative`."""
        s, t = self._halves(pair)
        # e^-s + kappa e^-t with the larger exponential taken out, so that nearly equal ones do not cancel.
        other = torch.expm1(-2 * pair.q.abs())
        near = pair.q >= 0
        return (
            torch.exp(-torch.where(near, s, t))
            * (self._one_plus_kappa + torch.where(near, self._kappa * other, other))
            / 2
        )


@dataclass(frozen=True)
class Cos(Sin):
    """Cosine f(u) = cos(u)."""

    c: float = field(default=math.pi / 2, init=False, repr=False)


@dataclass(frozen=True)
class Rbf(_SmoothDual):
    r"""Random Fourier features: the value is :math:`\exp(-\gamma (q_{11} + q_{22} - 2 q_{12}))`.

    Parameters
    ----------
    gamma : float, default=1.0
        Positive inverse squared length.

    Raises
    ------
    ValueError
        If gamma is not positive.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma)

    def _variance(self, q: Tensor) -> Tensor:
        return torch.ones_like(q)

    def _value(self, pair: Pair) -> Tensor:
        return torch.exp(-self.gamma * pair.sqdist)

    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        A = -torch.expm1(-self.gamma * pair.sqdist)
        return torch.zeros_like(A), A

    def derivative(self, pair: Pair) -> Tensor:
        """See :meth:`Dual.derivative`."""
        return 2 * self.gamma * self._value(pair)


@dataclass(frozen=True)
class Exp(_SmoothDual):
    r"""Exponential f(u) = e^u: the value is :math:`\exp((q_{11} + q_{22})/2 + q_{12})`.

    Raises ValueError on a call with a variance above 354 (float64) or 44 (float32), which overflows. Relative
    errors grow by twice the variance in every layer, and the variance itself doubly exponentially in depth.
    """

    def _check(self, pair: Pair) -> None:
        limit = math.log(torch.finfo(pair.r1.dtype).max) / 2 - 0.5
        _check_largest(pair, "Exp overflows: variances", 2, limit)

    def _variance(self, q: Tensor) -> Tensor:
        return torch.exp(2 * q)

    def _norm(self, r: Tensor) -> Tensor:
        return torch.exp(r.double().square()).to(r.dtype)

    def _value(self, pair: Pair) -> Tensor:
        return torch.exp((pair.r1 * pair.r1 + pair.r2 * pair.r2) / 2 + pair.q)

    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        return exponential_step(pair, r1, r2)

    def derivative(self, pair: Pair) -> Tensor:
        """See :meth:`Dual.derivative`."""
        self._check(pair)
        return self._value(pair)


def _check_norms(dual: Dual, pair: Pair) -> None:
    _check_largest(pair, f"{type(dual).__name__}: norms", 1, _LARGEST_NORM[pair.r1.dtype])


def _check_largest(pair: Pair, what: str, power: int, limit: float) -> None:
    for r in (pair.r1, pair.r2):
        largest = r.detach().max().item() ** power if r.numel() else 0.0
        if largest > limit:
            raise ValueError(f"{what} must be at most {limit:.3g}; got {largest:.3g}.")
