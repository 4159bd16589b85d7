"""What a dual is: the action of an infinitely wide layer on the covariance of a pair of inputs.

A dual maps the state of a pair before the nonlinearity f to the state after it, k' = E f(u) f(v) for a centred
Gaussian pair (u, v) of covariance k; its derivative dual E f'(u) f'(v) is the factor of the tangent kernel.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from stochproc.kernels._distance import safe_sqrt
from stochproc.kernels._pair import Pair, with_gradient_of

__all__ = ["Dual"]


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

    @property
    def has_formula(self) -> bool:
        """Whether pairs of a KeOps formula, :class:`~stochproc.kernels.KeopsPair`, can go through."""
        from stochproc.kernels._keops_snippets import has_snippet

        return has_snippet(self)

    def _check(self, pair: Pair) -> None:
        """Raise ValueError if the norms of a pair are out of the range of the formulas; any norm is in it here."""
        return

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
