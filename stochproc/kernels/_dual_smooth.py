"""Duals of smooth nonlinearities: error function, GELU, sine and cosine, exponential, random Fourier features."""

import math
from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stochproc._checks import check_positive
from stochproc.kernels._dual_base import Dual
from stochproc.kernels._dual_steps import by_rows, erf_step, exponential_step, gelu_step, sine_step
from stochproc.kernels._pair import AnyPair, Pair, with_gradient_of
from stochproc.kernels._pair_points import clamp_defect

__all__ = ["Cos", "Erf", "Exp", "Gelu", "Rbf", "Sin"]

# Products of up to three variances appear behind erf and GELU; they must not overflow.
_LARGEST_NORM = {torch.float32: 1e6, torch.float64: 1e50}


class SmoothDual(Dual):
    """Dual with a closed form whose derivatives of all orders are those of the plain formula.

    Values come from `_step`, free of cancellation and outside autograd; derivatives from `_value`, which is shorter.
    """

    @abstractmethod
    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """D and A after the nonlinearity, r1 and r2 being the norms after it."""

    @abstractmethod
    def _value(self, pair: AnyPair) -> Tensor:
        """E f(u) f(v) by a formula that autograd can differentiate everywhere."""

    @abstractmethod
    def derivative(self, pair: AnyPair) -> Tensor:
        """See :meth:`Dual.derivative`; takes a ``PlainPair`` too."""

    def __call__(self, pair: Pair) -> Pair:
        self._check(pair)
        r1, r2 = self._norm(pair.r1), self._norm(pair.r2)
        with torch.no_grad():
            D, A = by_rows(self._clamped_step, *pair, r1, r2)
        if torch.is_grad_enabled() and any(t.requires_grad for t in pair):
            D, A = with_gradient_of(D, r1 - r2), with_gradient_of(A, r1 * r2 - self._value(pair))
        return Pair(r1, r2, D, A)

    def _clamped_step(self, *fields: Tensor) -> tuple[Tensor, Tensor]:
        r1, r2 = fields[4:]
        D, A = self._step(Pair(*fields[:4]), r1, r2)
        return D, clamp_defect(A, r1 * r2)


@dataclass(frozen=True)
class Erf(SmoothDual):
    r"""Error function: :math:`(2/\pi) \arcsin(2 q_{12} / \sqrt{(1 + 2 q_{11})(1 + 2 q_{22})})`.

    Raises ValueError on a call with norms above 1e50 (float64) or 1e6 (float32).
    """

    def _check(self, pair: AnyPair) -> None:
        _check_norms(self, pair)

    def _variance(self, q: Tensor) -> Tensor:
        return 4 / math.pi * (4 * q / ((1 + 4 * q).sqrt() + 1) ** 2).atan()

    def _value(self, pair: AnyPair) -> Tensor:
        return 2 / math.pi * torch.atan2(2 * pair.q, self._root(pair))

    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        return erf_step(pair, r1, r2)

    def derivative(self, pair: AnyPair) -> Tensor:
        """See :meth:`Dual.derivative`."""
        self._check(pair)
        return 4 / math.pi / self._root(pair)

    def _root(self, pair: AnyPair) -> Tensor:
        return (1 + 2 * (pair.r1 * pair.r1 + pair.r2 * pair.r2) + 4 * pair.det).sqrt()


@dataclass(frozen=True)
class Gelu(SmoothDual):
    r"""Gaussian error linear unit :math:`u \Phi(u)`, the exact one.

    Raises ValueError on a call with norms above 1e50 (float64) or 1e6 (float32).

    References
    ----------
    .. [1] R. Tsuchida et al., "Avoiding Kernel Fixed Points: Computing with ELU and GELU Infinite Networks",
       AAAI 2021.
    """

    def _check(self, pair: AnyPair) -> None:
        _check_norms(self, pair)

    def _variance(self, q: Tensor) -> Tensor:
        c = (1 + 2 * q).sqrt()
        arc = 2 * (2 * q / (c + 1) ** 2).atan()
        return q * (1 / 4 + (2 * q / ((1 + q) * c) + arc) / (2 * math.pi))

    def _parts(self, pair: AnyPair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q1, q2 = pair.r1 * pair.r1, pair.r2 * pair.r2
        square = 1 + (q1 + q2) + pair.det
        return q1, q2, square, square.sqrt()

    def _value(self, pair: AnyPair) -> Tensor:
        q = pair.q
        q1, q2, _, root = self._parts(pair)
        # (q^2 + q11 q22 root^2) / (p root) as ratios, whose gradients do not overflow.
        p1, p2 = 1 + q1, 1 + q2
        rational = (q / p1) * (q / p2) / root + (q1 / p1) * (q2 / p2) * root
        return q / 4 + (rational + q * torch.atan2(q, root)) / (2 * math.pi)

    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        return gelu_step(pair, r1, r2)

    def derivative(self, pair: AnyPair) -> Tensor:
        """See :meth:`Dual.derivative`."""
        self._check(pair)
        q = pair.q
        q1, q2, square, root = self._parts(pair)
        # (1 - q11 q22)/p + 1 = (2 + q11 + q22)/p without the cancellation.
        rational = 1 / square + (2 + (q1 + q2)) / ((1 + q1) * (1 + q2))
        return 1 / 4 + (torch.atan2(q, root) + q / root * rational) / (2 * math.pi)


@dataclass(frozen=True)
class Sin(SmoothDual):
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

    def _halves(self, pair: AnyPair) -> tuple[Tensor, Tensor]:
        s = pair.sqdist / 2
        return s, pair.r1 * pair.r1 + pair.r2 * pair.r2 - s

    def _value(self, pair: AnyPair) -> Tensor:
        s, t = self._halves(pair)
        return ((-s).exp() - self._kappa * (-t).exp()) / 2

    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        return sine_step(pair, r1, r2, self._kappa, self._one_plus_kappa)

    def derivative(self, pair: AnyPair) -> Tensor:
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
class Rbf(SmoothDual):
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

    def _value(self, pair: AnyPair) -> Tensor:
        return torch.exp(-self.gamma * pair.sqdist)

    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        A = -torch.expm1(-self.gamma * pair.sqdist)
        return torch.zeros_like(A), A

    def derivative(self, pair: AnyPair) -> Tensor:
        """See :meth:`Dual.derivative`."""
        return 2 * self.gamma * self._value(pair)


@dataclass(frozen=True)
class Exp(SmoothDual):
    r"""Exponential f(u) = e^u: the value is :math:`\exp((q_{11} + q_{22})/2 + q_{12})`.

    Raises ValueError on a call with a variance above 354 (float64) or 44 (float32), which overflows. Relative
    errors grow by twice the variance in every layer, and the variance itself doubly exponentially in depth.
    """

    def _check(self, pair: AnyPair) -> None:
        limit = math.log(torch.finfo(pair.r1.dtype).max) / 2 - 0.5
        _check_largest(pair, "Exp overflows: variances", 2, limit)

    def _variance(self, q: Tensor) -> Tensor:
        return torch.exp(2 * q)

    def _norm(self, r: Tensor) -> Tensor:
        return torch.exp(r.double().square()).to(r.dtype)

    def _value(self, pair: AnyPair) -> Tensor:
        return torch.exp((pair.r1 * pair.r1 + pair.r2 * pair.r2) / 2 + pair.q)

    def _step(self, pair: Pair, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        return exponential_step(pair, r1, r2)

    def derivative(self, pair: AnyPair) -> Tensor:
        """See :meth:`Dual.derivative`."""
        self._check(pair)
        return self._value(pair)


def _check_norms(dual: Dual, pair: AnyPair) -> None:
    _check_largest(pair, f"{type(dual).__name__}: norms", 1, _LARGEST_NORM[pair.r1.dtype])


def _check_largest(pair: AnyPair, what: str, power: int, limit: float) -> None:
    for r in (pair.r1, pair.r2):
        largest = r.detach().max().item() ** power if r.numel() else 0.0
        if largest > limit:
            raise ValueError(f"{what} must be at most {limit:.3g}; got {largest:.3g}.")
