"""The state of a pair as its three covariances: fewer operations than :class:`~stochproc.kernels.Pair`, fewer digits.

A covariance is wrong by eps times the variances here. What a network makes of that error is known from the points alone
(:class:`Rounding`): matrices of networks that are smooth and not chaotic lose nothing; distances of near points do.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.kernels._distance import safe_sqrt
from stochproc.kernels._dual_base import Dual
from stochproc.kernels._dual_smooth import Rbf, Sin, SmoothDual
from stochproc.kernels._duals import ABRelu
from stochproc.kernels._pair import Pair

__all__ = ["PlainPair", "Rounding"]

# Products and ratios of variances behind a nonlinearity must not underflow.
_SMALLEST_VARIANCE = 1e-140


class PlainPair(NamedTuple):
    """Covariances of all pairs of two sets of points; a layer that runs on ``Pair`` and ``KeopsPair`` runs on it.

    Parameters
    ----------
    q : Tensor of shape (*batch, n, m)
        k(x, y).
    q1 : Tensor of shape (*batch, n, 1)
        k(x, x).
    q2 : Tensor of shape (*batch, 1, m)
        k(y, y).

    Notes
    -----
    First derivatives are those of the plain formulas. Behind a rectifier there are none: its angle would be wrong by
    the square root of eps for near points. :class:`Rounding` tells beforehand what digits are lost.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import PlainPair, duals
    >>> x = torch.eye(2)
    >>> PlainPair.from_points(x, x).affine(2.0, 0.5).through(duals.Rbf(0.5)).q
    tensor([[1.0000, 0.1353],
            [0.1353, 1.0000]])
    """

    q: Tensor
    q1: Tensor
    q2: Tensor

    @classmethod
    def from_points(cls, x: Float[Tensor, "*#batch n d"], y: Float[Tensor, "*#batch m d"]) -> "PlainPair":
        """Pairs of points under their inner product.

        Parameters
        ----------
        x : Tensor of shape (*batch, n, d)
        y : Tensor of shape (*batch, m, d)
            Of the same dtype and device.
        """
        return cls(x @ y.mT, x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True).mT)

    @staticmethod
    def takes(dual: Dual, *, gradient: bool) -> bool:
        """Whether pairs can go through this nonlinearity, and be differentiated behind it."""
        return isinstance(dual, SmoothDual) or (isinstance(dual, ABRelu) and not gradient)

    @property
    def r1(self) -> Tensor:
        """Norms of the first points."""
        return safe_sqrt(self.q1)

    @property
    def r2(self) -> Tensor:
        """Norms of the second points."""
        return safe_sqrt(self.q2)

    @property
    def sqdist(self) -> Tensor:
        """Squared distances, wrong by eps times the variances."""
        return self.q1 + self.q2 - 2 * self.q

    @property
    def det(self) -> Tensor:
        """Determinants, wrong by eps times the product of the variances."""
        return self.q1 * self.q2 - self.q * self.q

    def affine(self, weight_variance: "Tensor | float", bias_variance: "Tensor | float") -> "PlainPair":
        """Pairs after a dense layer; see :meth:`Pair.affine`."""
        w, b = weight_variance, bias_variance
        return PlainPair(*(k * w if not isinstance(b, Tensor) and b == 0 else k * w + b for k in self))

    def plus(self, other: "PlainPair") -> "PlainPair":
        """Pairs under the sum of two kernels."""
        return PlainPair(*(k + more for k, more in zip(self, other, strict=True)))

    def through(self, dual: Dual) -> "PlainPair":
        """Pairs behind a nonlinearity."""
        if isinstance(dual, ABRelu):
            return PlainPair(*_rectified(*self, dual))
        if not isinstance(dual, SmoothDual):
            raise TypeError(f"{type(dual).__name__} has no formula in three covariances.")
        return PlainPair(dual._value(self), dual._variance(self.q1), dual._variance(self.q2))

    def slope(self, dual: Dual) -> Tensor:
        """Factor of the tangent kernel at a smooth nonlinearity."""
        if not isinstance(dual, SmoothDual):
            raise TypeError(f"{type(dual).__name__} has no tangent factor in three covariances.")
        return dual.derivative(self)

    def normalised(self, eps: float) -> tuple["PlainPair", Tensor]:
        """Pairs behind a layer normalisation, and what the tangent kernel is multiplied by."""
        i1, i2 = (self.q1 + eps).rsqrt(), (self.q2 + eps).rsqrt()
        per_pair = i1 * i2
        return PlainPair(self.q * per_pair, self.q1 * i1 * i1, self.q2 * i2 * i2), per_pair

    def __add__(self, other: Any) -> "PlainPair":  # type: ignore[override]
        return self.plus(other) if isinstance(other, PlainPair) else NotImplemented


class Rounding(NamedTuple):
    """What roundings of a ``PlainPair`` amount to, for each point paired with itself: the worst of its pairs.

    Parameters
    ----------
    q : Tensor
        Variances.
    error : Tensor of the same shape
        Bound of the error of covariances, in units of eps.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import Rounding, duals
    >>> behind = Rounding.of_variances(torch.ones(1)).affine(2.0, 0.5).through(duals.Erf())
    >>> behind.error / behind.q
    tensor([8.7546])
    """

    q: Tensor
    error: Tensor

    @classmethod
    def of_variances(cls, q: Tensor) -> "Rounding":
        """Start with covariances that are rounded once."""
        return cls(q, q)

    @property
    def r1(self) -> Tensor:
        """Norms."""
        return self.q.sqrt()

    def affine(self, weight_variance: "Tensor | float", bias_variance: "Tensor | float") -> "Rounding":
        """Behind a dense layer."""
        q = self.q * weight_variance + bias_variance
        return Rounding(q, self.error * weight_variance + q)

    def plus(self, other: "Rounding") -> "Rounding":
        """Behind a sum of branches."""
        q = self.q + other.q
        return Rounding(q, self.error + other.error + q)

    def through(self, dual: Dual) -> "Rounding":
        """Behind a nonlinearity, which passes errors on times its slope and adds those of its own formula."""
        r = self.r1
        slope = dual.derivative(Pair(r, r, torch.zeros_like(r), torch.zeros_like(r)))
        q = dual._variance(self.q)
        # Sine is a difference of exponentials up to 1; all have errors of the variances in exponents and roots.
        terms = torch.ones_like(q) if isinstance(dual, Sin) else q
        rate = max(1.0, dual.gamma) if isinstance(dual, Rbf) else 1.0
        own = terms * (1 + 2 * rate * self.q) if isinstance(dual, SmoothDual) else terms
        return Rounding(q, (self.error * slope + own).where(self.q >= _SMALLEST_VARIANCE, torch.inf))

    def normalised(self, eps: float) -> tuple["Rounding", Tensor]:
        """Behind a layer normalisation."""
        scale = 1 / (self.q + eps)
        return Rounding(self.q * scale, (self.error + self.q) * scale), scale


def _rectified(q: Tensor, q1: Tensor, q2: Tensor, dual: ABRelu) -> tuple[Tensor, Tensor, Tensor]:
    """Take covariances through a rectifier: c q + g n (sin t - t cos t), the angle t between points away from 0."""
    n = q1.sqrt() * q2.sqrt()
    cos = torch.div(q, n).clamp_(-1, 1)
    sine = torch.sub(1, cos).mul_(1 + cos).sqrt_()
    angle = cos.acos()
    value = sine.sub_(angle.mul_(cos)).mul_(n).mul_(dual._g).add_(q, alpha=dual._c)
    return value, dual._variance(q1), dual._variance(q2)
