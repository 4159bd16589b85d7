"""Nonlinearities of infinitely wide networks: thin layers over the duals of the kernel layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochproc.gp._arch_base import DiagState, KernelState, Layer
from stochproc.gp._scale_base import plain_number
from stochproc.kernels import Pair, duals

__all__ = [
    "ABRelu",
    "Abs",
    "Activation",
    "Cos",
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


class Activation(Layer):
    """A nonlinearity, applied to each unit.

    Parameters
    ----------
    dual : stochproc.kernels.duals.Dual
        What it does to a pair of points.
    """

    def __init__(self, dual: duals.Dual) -> None:
        super().__init__()
        self.dual = dual

    @property
    def acts_by_dual(self) -> bool:
        """Whether the dual is all there is to it, as a subclass may have kernels of its own."""
        return type(self).kernel is Activation.kernel and type(self).diagonal is Activation.diagonal

    def function(self, u: Tensor) -> Tensor:
        """Evaluate the nonlinearity itself, entry by entry."""
        raise NotImplementedError(f"{type(self).__name__} must define function(u).")

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        # In this form it also runs on the pairs of KeOps formulas.
        ntk = None if state.ntk is None else state.ntk * state.pair.slope(self.dual)
        return state._replace(pair=state.pair.through(self.dual), ntk=ntk)

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        q = self.dual.diag(state.q)
        if state.pair is not None:
            ntk = None if state.ntk is None else state.ntk * state.pair.slope(self.dual)
            return state._replace(q=q, ntk=ntk, pair=state.pair.through(self.dual))
        if state.ntk is None:
            return state._replace(q=q)
        # The square root of 0 has an infinite derivative, which times the 0 of the other branch would be NaN.
        empty = state.q == 0
        r = torch.where(empty, 0.0, torch.where(empty, 1.0, state.q).sqrt())
        zero = torch.zeros_like(r)
        return state._replace(q=q, ntk=state.ntk * self.dual.derivative(Pair(r, r, zero, zero)))

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        values = {f.name: getattr(self.dual, f.name) for f in dataclasses.fields(self.dual) if f.init}  # type: ignore[arg-type]
        for name, value in values.items():
            if callable(value):
                raise TypeError(f"{self.name} holds a function, {name}, so it cannot be saved as numbers.")
        return values

    def extra_repr(self) -> str:
        values = {f.name: getattr(self.dual, f.name) for f in dataclasses.fields(self.dual) if f.init}  # type: ignore[arg-type]
        return ", ".join(f"{k}={v}" for k, v in values.items())


class ABRelu(Activation):
    """Two-slope rectifier: a u for u < 0, b u for u > 0.

    Parameters
    ----------
    a, b : float
        Slopes, finite and not both 0.

    Raises
    ------
    ValueError
        If a slope is not finite or both are 0.
    """

    dual: duals.ABRelu

    def __init__(self, a: float | int, b: float | int) -> None:
        super().__init__(duals.ABRelu(plain_number("a", a), plain_number("b", b)))

    def function(self, u: Tensor) -> Tensor:
        """See :meth:`Activation.function`."""
        return torch.where(u < 0, self.dual.a * u, self.dual.b * u)


class Relu(ABRelu):
    """Rectifier max(u, 0)."""

    def __init__(self) -> None:
        Activation.__init__(self, duals.Relu())


class LeakyRelu(ABRelu):
    """Leaky rectifier max(u, 0) + slope min(u, 0).

    Parameters
    ----------
    slope : float, default=0.01
        Finite.

    Raises
    ------
    ValueError
        If slope is not finite.
    """

    def __init__(self, slope: float | int = 0.01) -> None:
        Activation.__init__(self, duals.LeakyRelu(slope=plain_number("slope", slope)))


class Abs(ABRelu):
    """Absolute value."""

    def __init__(self) -> None:
        Activation.__init__(self, duals.Abs())


class Erf(Activation):
    """Error function."""

    def __init__(self) -> None:
        super().__init__(duals.Erf())

    def function(self, u: Tensor) -> Tensor:
        """See :meth:`Activation.function`."""
        return u.erf()


class Gelu(Activation):
    """Gaussian error linear unit, u times the normal distribution function of u."""

    def __init__(self) -> None:
        super().__init__(duals.Gelu())

    def function(self, u: Tensor) -> Tensor:
        """See :meth:`Activation.function`."""
        return torch.nn.functional.gelu(u)


class Sin(Activation):
    """Sine with a phase, sin(u + c).

    Parameters
    ----------
    c : float, default=0.0
        Phase in radians, finite.

    Raises
    ------
    ValueError
        If c is not finite.
    """

    dual: duals.Sin

    def __init__(self, c: float | int = 0.0) -> None:
        super().__init__(duals.Sin(plain_number("c", c)))

    def function(self, u: Tensor) -> Tensor:
        """See :meth:`Activation.function`."""
        return (u + self.dual.c).sin()


class Cos(Activation):
    """Cosine."""

    def __init__(self) -> None:
        super().__init__(duals.Cos())

    def function(self, u: Tensor) -> Tensor:
        """See :meth:`Activation.function`."""
        return u.cos()


class Rbf(Activation):
    r"""Random Fourier features, :math:`\sqrt 2 \sin(\sqrt{2 \gamma} u + \pi/4)`: a Gaussian kernel of the layer below.

    Parameters
    ----------
    gamma : float, default=1.0
        Positive inverse squared length.

    Raises
    ------
    ValueError
        If gamma is not positive.
    """

    dual: duals.Rbf

    def __init__(self, gamma: float | int = 1.0) -> None:
        super().__init__(duals.Rbf(plain_number("gamma", gamma)))

    def function(self, u: Tensor) -> Tensor:
        """See :meth:`Activation.function`."""
        return math.sqrt(2) * (math.sqrt(2 * self.dual.gamma) * u + math.pi / 4).sin()


class Sign(Activation):
    """Sign of u; it has no tangent kernel, and asking for it raises ArchitectureError."""

    has_tangent = False

    def __init__(self) -> None:
        super().__init__(duals.Sign())

    def function(self, u: Tensor) -> Tensor:
        """See :meth:`Activation.function`."""
        return u.sign()


class Exp(Activation):
    """Exponential; variances grow doubly exponentially in depth, and above 354 (44 in float32) it raises ValueError."""

    def __init__(self) -> None:
        super().__init__(duals.Exp())

    def function(self, u: Tensor) -> Tensor:
        """See :meth:`Activation.function`."""
        return u.exp()


class Numeric(Activation):
    """Any nonlinearity, by quadrature.

    Parameters
    ----------
    f : callable
        Elementwise function of a float64 tensor.
    slope : callable, optional
        Its derivative; by default autograd of f.
    kinks : tuple of float, default=()
        Where f or its derivatives jump.
    nodes : int, optional
        Number of nodes; see :class:`stochproc.kernels.duals.Numeric`, also for the cost of 1e4 to 1e5 evaluations a
        pair.

    Raises
    ------
    TypeError
        If f or slope is not callable, or nodes no integer.
    ValueError
        If a kink is not finite, or nodes out of range.
    """

    dual: duals.Numeric

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        slope: Callable[[Tensor], Tensor] | None = None,
        kinks: tuple[float | int, ...] = (),
        nodes: int | None = None,
    ) -> None:
        super().__init__(duals.Numeric(f, slope, kinks, nodes))

    def function(self, u: Tensor) -> Tensor:
        """See :meth:`Activation.function`."""
        return self.dual.f(u)
