"""The state of a pair of points that the duals of infinite networks act on, free of cancellation.

Instead of the three covariances a pair carries its two norms, their difference and its defect: what the inner
product lacks to the product of the norms. Angles and distances are sums of non-negative terms of these.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_positive, check_same_kind
from stochproc.kernels._distance import inverse_or_zero, safe_sqrt
from stochproc.kernels._pair_points import clamp_defect, state_of_points

if TYPE_CHECKING:
    from stochproc.kernels._dual_base import Dual
    from stochproc.kernels._pair_plain import PlainPair

    #: What formulas in covariances take.
    AnyPair: TypeAlias = "Pair | PlainPair"
else:
    AnyPair = Any

__all__ = ["Pair"]


class Pair(NamedTuple):
    r"""Norms, their difference and the defect of all pairs of two sets of points.

    With k(x, x), k(x, y), k(y, y) the covariances of a pair:

    Parameters
    ----------
    r1 : Tensor broadcasting to (*batch, n, m)
        :math:`\sqrt{k(x, x)}`; of shape (*batch, n, 1) for a block of all pairs.
    r2 : Tensor broadcasting to (*batch, n, m)
        :math:`\sqrt{k(y, y)}`; of shape (*batch, 1, m) for a block of all pairs.
    D : Tensor broadcasting to (*batch, n, m)
        Signed difference r1 - r2, with the relative accuracy that subtracting would lose.
    A : Tensor broadcasting to (*batch, n, m)
        Defect :math:`r_1 r_2 - k(x, y)`, between 0 and :math:`2 r_1 r_2`.

    Notes
    -----
    D is redundant: derivatives hold along D = r1 - r2, and some operations differentiate through r1 and r2 only.
    The norm of a point has gradient 0 at the origin, which leaves first derivatives of covariances right there;
    second derivatives of squared norms (not of the inner product) lack their part at a point that is exactly 0.
    All operations are elementwise, so r1, r2, D, A may as well be full (n, m) blocks. ``+`` adds kernels, not tuples.

    Norms should lie within 1e-140 and 1e150 in float64, within 1e-15 and 1e18 in float32: squares must fit.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[3.0, 4.0]])
    >>> pair = Pair.from_points(x, torch.tensor([[4.0, 3.0], [-3.0, -4.0]]))
    >>> pair.q
    tensor([[ 24., -25.]])
    >>> pair.affine(2.0, 1.0).q
    tensor([[ 49., -49.]])
    """

    r1: Tensor
    r2: Tensor
    D: Tensor
    A: Tensor

    @classmethod
    def from_points(cls, x: Float[Tensor, "*#batch n d"], y: Float[Tensor, "*#batch m d"]) -> "Pair":
        r"""Pairs of points under the inner product :math:`x \cdot y`; scale the points for another one.

        Parameters
        ----------
        x : Tensor of shape (*batch, n, d)
            Finite points, float32 or float64.
        y : Tensor of shape (*batch, m, d)
            Points of the same dtype, device and dimension.

        Returns
        -------
        Pair
            r1 (*batch, n, 1), r2 (*batch, 1, m), D and A (*batch, n, m). D is accurate to a few roundings relative
            to itself at any distance, the squared distance to some tens (300 at d = 1000), the angle to a few
            roundings absolute.

        Raises
        ------
        TypeError
            If dtypes or devices differ.
        ValueError
            If the points are no matrices, have no column or differ in dimension.

        Notes
        -----
        O(n m d): angles from a product of matrices in float64, those of near pairs from explicit differences; norms as
        unevaluated sums of two numbers. The gradient is that of the plain formulas, 0 for the norm of x = 0; it is
        finite everywhere and can be differentiated again.
        """
        check_same_kind(x=x, y=y)
        if x.ndim < 2 or y.ndim < 2:
            raise ValueError(f"x and y must be matrices of points; got shapes {tuple(x.shape)} and {tuple(y.shape)}.")
        if x.shape[-1] != y.shape[-1] or x.shape[-1] == 0:
            raise ValueError(
                f"x and y must have the same number of columns, at least one; got {x.shape[-1]} and {y.shape[-1]}."
            )
        if x.shape[-1] == 1:
            # On a line everything is exact: equal signs give the same product twice, so A is exactly 0 or 2 |x y|.
            r1, r2 = x.abs(), y.abs().mT
            return cls(r1, r2, r1 - r2, r1 * r2 - x * y.mT)
        with torch.no_grad():
            value = cls(*state_of_points(x.detach(), y.detach(), same=x is y))
        if not _needs_grad(x, y):
            return value
        r1 = safe_sqrt((x * x).sum(-1, keepdim=True))
        r2 = safe_sqrt((y * y).sum(-1, keepdim=True)).mT
        return cls(*map(with_gradient_of, value, (r1, r2, r1 - r2, r1 * r2 - x @ y.mT)))

    @classmethod
    def from_gram(
        cls,
        g_xy: Float[Tensor, "*#batch n m"],
        g_xx: Float[Tensor, "*#batch n"],
        g_yy: Float[Tensor, "*#batch m"],
    ) -> "Pair":
        r"""Pairs whose covariances are known.

        Parameters
        ----------
        g_xy : Tensor of shape (*batch, n, m)
            Covariances k(x, y).
        g_xx, g_yy : Tensor of shape (*batch, n) and (*batch, m)
            Variances k(x, x) and k(y, y), non-negative.

        Returns
        -------
        Pair
            The defect is clamped to its range; it carries the rounding error of g_xy, eps r1 r2.

        Raises
        ------
        TypeError
            If dtypes or devices differ.
        ValueError
            If a variance is negative or not finite.
        """
        check_same_kind(g_xy=g_xy, g_xx=g_xx, g_yy=g_yy)
        r1, r2, D = _norms_of_gram(g_xx, g_yy)
        n = r1 * r2
        A = n - g_xy
        # The clamp must not cut the gradient: at coincident points rounding alone decides the sign of A.
        return cls(r1, r2, D, with_gradient_of(clamp_defect(A.detach(), n.detach()), A))

    @classmethod
    def from_sqdist(
        cls,
        sq: Float[Tensor, "*#batch n m"],
        g_xx: Float[Tensor, "*#batch n"],
        g_yy: Float[Tensor, "*#batch m"],
    ) -> "Pair":
        r"""Pairs whose squared distances are known: no cancellation for close pairs.

        Parameters
        ----------
        sq : Tensor of shape (*batch, n, m)
            Squared distances k(x, x) + k(y, y) - 2 k(x, y).
        g_xx, g_yy : Tensor of shape (*batch, n) and (*batch, m)
            Variances k(x, x) and k(y, y), non-negative.

        Returns
        -------
        Pair
            With :math:`A = (sq - D^2)/2`, clamped to its range.

        Raises
        ------
        TypeError
            If dtypes or devices differ.
        ValueError
            If a variance is negative or not finite.
        """
        check_same_kind(sq=sq, g_xx=g_xx, g_yy=g_yy)
        r1, r2, D = _norms_of_gram(g_xx, g_yy)
        A = (sq - D * D) / 2
        return cls(r1, r2, D, with_gradient_of(clamp_defect(A.detach(), (r1 * r2).detach()), A))

    @property
    def n(self) -> Tensor:
        """Product of the norms, the largest value k(x, y) can take."""
        return self.r1 * self.r2

    @property
    def q(self) -> Tensor:
        """Covariance k(x, y); wrong by eps r1 r2, so distances are better asked for by :attr:`sqdist`."""
        return self.n - self.A

    @property
    def sqdist(self) -> Tensor:
        """Squared distance k(x, x) + k(y, y) - 2 k(x, y), accurate relative to itself."""
        return 2 * self.A + self.D * self.D

    @property
    def difference(self) -> Tensor:
        """Difference of variances k(x, x) - k(y, y), accurate relative to itself."""
        return self.D * (self.r1 + self.r2)

    @property
    def det(self) -> Tensor:
        """Determinant k(x, x) k(y, y) - k(x, y)^2."""
        return self.A * (2 * self.n - self.A)

    @property
    def cos(self) -> Tensor:
        """Cosine of the angle; with the origin 0, and 1 if both points are the origin."""
        return 1 - 2 * _half_versine(self.A, self.n, self.r1, self.r2)

    @property
    def angle(self) -> Tensor:
        r"""Angle in [0, pi]; with the origin pi/2 (the mean over directions), and 0 if both points are the origin.

        Its derivative :math:`1/(n \sin\theta)` is unbounded at 0 and pi and is taken as 0 there.
        """
        A, n = torch.broadcast_tensors(self.A, self.n)
        return _Angle.apply(A, n, self.r1.detach(), self.r2.detach())

    def affine(self, weight_variance: "Tensor | float | int", bias_variance: "Tensor | float | int") -> "Pair":
        """Pairs after a dense layer: ``weight_variance * k + bias_variance``.

        Parameters
        ----------
        weight_variance, bias_variance : float or Tensor broadcasting to (*batch, n, m)
            Non-negative and finite; tensors may require gradients.

        Returns
        -------
        Pair
            Every term of D and A is a sum of terms of one sign.

        Raises
        ------
        ValueError
            If a variance is negative or not finite.
        """
        check_positive("weight_variance", weight_variance, zero=True)
        check_positive("bias_variance", bias_variance, zero=True)
        w, b = weight_variance, bias_variance
        if not isinstance(b, Tensor) and b == 0:
            root = safe_sqrt(w) if isinstance(w, Tensor) else w**0.5
            return Pair(self.r1 * root, self.r2 * root, self.D * root, self.A * w)
        r1, r2 = (safe_sqrt(w * r.double().square() + b).to(r.dtype) for r in (self.r1, self.r2))
        # A tensor may hold a bias of 0, hence a division by 0 at the origin.
        inverse = inverse_or_zero if isinstance(b, Tensor) else torch.reciprocal
        D = self.difference * inverse(r1 + r2) * w
        curved = self.D * self.D * inverse(r1 * r2 + (w * self.n + b)) * (w * b)
        return Pair(r1, r2, D, w * self.A + curved)

    def plus(self, other: "Pair") -> "Pair":
        """Pairs under the sum of two kernels.

        Parameters
        ----------
        other : Pair
            State of the same pairs of points under the other kernel.

        Returns
        -------
        Pair
            Of k + k'.
        """
        a, b = self, other
        r1, r2 = (safe_sqrt(s * s + t * t) for s, t in ((a.r1, b.r1), (a.r2, b.r2)))
        D = (a.difference + b.difference) * inverse_or_zero(r1 + r2)
        # a1 b2 - a2 b1 written in the differences of norms.
        cross = (a.D * (b.r1 + b.r2) - b.D * (a.r1 + a.r2)) / 2
        return Pair(r1, r2, D, a.A + b.A + cross * cross * inverse_or_zero(r1 * r2 + a.n + b.n))

    def through(self, dual: "Dual") -> "Pair":
        """Pairs behind a nonlinearity, ``dual(self)``; in this form layers also run on the pairs of KeOps formulas."""
        return dual(self)

    def slope(self, dual: "Dual") -> Tensor:
        """Factor of the tangent kernel at a nonlinearity, ``dual.derivative(self)``."""
        return dual.derivative(self)

    def __add__(self, other: Any) -> "Pair":  # type: ignore[override]
        return self.plus(other) if isinstance(other, Pair) else NotImplemented


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, formula: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.shape = inputs[1].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.sum_to_size(ctx.shape)


def with_gradient_of(value: Tensor, formula: Tensor) -> Tensor:
    """Return ``value`` with the derivatives of ``formula``, which is the same number computed less accurately."""
    return _WithGradientOf.apply(value, formula) if _needs_grad(formula) else value


class _Angle(torch.autograd.Function):
    """Angle from the defect, with derivative 0 where it is unbounded; its backward can be differentiated."""

    @staticmethod
    def forward(A: Tensor, n: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
        return _half_versine(A, n, r1, r2).sqrt_().asin_().mul_(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        A, n = ctx.saved_tensors
        # n sin(t), as a product of roots since A (2 n - A) itself may overflow.
        per_defect = grad * inverse_or_zero(safe_sqrt(A) * safe_sqrt(2 * n - A))
        return per_defect, -per_defect * A * inverse_or_zero(n), None, None


def _half_versine(A: Tensor, n: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    """Return sin^2(angle / 2) = A / (2 n), and its value by convention where n is 0."""
    if n.numel() and bool(r1.min() * r2.min() > 0):
        return (A / (2 * n)).clamp(0, 1)
    at_origin = ((r1 > 0) | (r2 > 0)).to(n.dtype) / 2
    empty = n == 0
    return torch.where(empty, at_origin, A / torch.where(empty, 1.0, 2 * n)).clamp(0, 1)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _norms_of_gram(g_xx: Tensor, g_yy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_positive("g_xx", g_xx, zero=True)
    check_positive("g_yy", g_yy, zero=True)
    q1, q2 = g_xx.unsqueeze(-1), g_yy.unsqueeze(-2)
    r1, r2 = safe_sqrt(q1), safe_sqrt(q2)
    return r1, r2, (q1 - q2) * inverse_or_zero(r1 + r2)
