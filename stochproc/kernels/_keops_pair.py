"""The state of a pair in KeOps formulas: it records what is done to it, and becomes one operation at the end.

The symbolic twin of :class:`~stochproc.kernels.Pair`: a layer that uses ``affine``, ``plus``, ``through``, ``slope``
and ``q`` alone runs on both. Norms are vectors, computed here by torch and handed to the formula as columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_positive
from stochproc.kernels._distance import safe_sqrt
from stochproc.kernels._dual_base import Dual
from stochproc.kernels._keops_program import Instruction, Program
from stochproc.kernels._keops_snippets import SNIPPETS, constants_of, name_of
from stochproc.kernels._pair import Pair, with_gradient_of
from stochproc.kernels._pair_points import square_norms

__all__ = ["KeopsPair", "KeopsValue"]


class _Record:
    """The instructions on the pairs of two sets of points, with the vectors and numbers that they use."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.points = (x, y)
        d = x.shape[-1]
        self.rows, self.cols = [x], [y]
        if d > 1:
            # The squared norms to twice the digits, for the difference of norms.
            for side, t in ((self.rows, x), (self.cols, y)):
                side += [part.detach() for part in square_norms(t.detach())]
        self.n_columns = d + 2 * (d > 1)
        self.parameters: list[Tensor | float] = []
        # Places of the constants of a dual.
        self.constants: dict[Dual, tuple[int, ...]] = {}
        self.program: list[Instruction] = []
        # Column of the norms of a register, made when they are first read.
        self.norms: dict[int, tuple[Tensor, Tensor]] = {}
        self.column_of: dict[int, int] = {}

    def run(self, name: str, *inputs: int, columns: tuple[int, ...] = (), parameters: tuple[int, ...] = ()) -> int:
        self.program.append(Instruction(name, inputs, columns, parameters))
        return len(self.program) - 1

    def pair(self, r1: Tensor, r2: Tensor, name: str, *inputs: int, **where: Any) -> KeopsPair:
        """Run an instruction that makes a pair with these norms."""
        register = self.run(name, *inputs, **where)
        self.norms[register] = (r1, r2)
        return KeopsPair(self, register)

    def column(self, r1: Tensor, r2: Tensor) -> int:
        """Add factors by row, (*batch, n, 1), and by column, (*batch, 1, m)."""
        self.rows.append(r1)
        self.cols.append(r2.mT)
        self.n_columns += 1
        return self.n_columns - 1

    def norms_of(self, register: int) -> int:
        """Return the column of the norms of a pair."""
        if register not in self.column_of:
            self.column_of[register] = self.column(*self.norms[register])
        return self.column_of[register]

    def parameter(self, value: Tensor | float) -> int:
        """Add a number; a tensor used again, as in tied layers, keeps its place."""
        if isinstance(value, Tensor) and value.numel() != 1:
            raise NotImplementedError(
                f"the keops backend takes one value of a hyperparameter; got shape {tuple(value.shape)}."
            )
        for i, known in enumerate(self.parameters):
            if known is value and isinstance(value, Tensor):
                return i
        self.parameters.append(value)
        return len(self.parameters) - 1

    def variables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the variables by row, (*batch, n, c), by column, (*batch, m, c), and the parameters, (p,)."""
        x, y = self.points
        sides = []
        for t, parts in ((x, self.rows), (y, self.cols)):
            batch = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
            sides.append(torch.cat([p.to(t).expand(*batch, p.shape[-1]) for p in parts], -1))
        # KeOps takes no empty variable.
        numbers = [torch.as_tensor(p, dtype=torch.float64) for p in self.parameters or [1.0]]
        return sides[0], sides[1], torch.stack([p.reshape(()).to(x) for p in numbers])


class KeopsPair:
    """Pairs of two sets of points in a KeOps formula: their norms, and a record of what is done to them.

    Made by :meth:`from_points`. Like :class:`Pair` it has ``r1`` (*batch, n, 1) and ``r2`` (*batch, 1, m); differences
    and defects exist in the formula alone.

    Notes
    -----
    Value and gradient of a network become one operation of KeOps each, however many layers and branches there are: the
    text, the time to compile and the time of a pair are linear in their number, and residual connections cost no more
    than others. Gradients are exact in points and hyperparameters, with the conventions of the torch duals where they
    are unbounded; second derivatives raise NotImplementedError. A hyperparameter is one number, not a batch.

    The C++ is written to be valid device code as well, but has been neither compiled nor run for CUDA yet.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import KeopsPair, duals
    >>> pair = KeopsPair.from_points(torch.ones(3, 2), torch.ones(4, 2))
    >>> value = pair.affine(2.0, 1.0).through(duals.Relu()).q
    >>> len(value.program)
    4
    """

    def __init__(self, record: _Record, register: int) -> None:
        self.record, self.register = record, register

    @classmethod
    def from_points(cls, x: Tensor, y: Tensor) -> KeopsPair:
        """Return the pairs of two sets of points under their inner product; nothing is checked or computed by pair.

        Parameters
        ----------
        x : Tensor of shape (*batch, n, d)
        y : Tensor of shape (*batch, m, d)
            Of the same dtype, float32 or float64, and device.
        """
        record = _Record(x, y)
        if x.shape[-1] == 1:
            r1, r2 = x.abs(), y.abs()
        else:
            r1, r2 = (
                with_gradient_of(side[1].sqrt(), safe_sqrt((t * t).sum(-1, keepdim=True)))
                for side, t in ((record.rows, x), (record.cols, y))
            )
        first = record.column(r1, r2.mT)
        record.column_of[0] = first
        return record.pair(r1, r2.mT, "points", x.shape[-1], columns=(first,))

    @property
    def r1(self) -> Tensor:
        """Norms by row, of shape (*batch, n, 1)."""
        return self.record.norms[self.register][0]

    @property
    def r2(self) -> Tensor:
        """Norms by column, of shape (*batch, 1, m)."""
        return self.record.norms[self.register][1]

    @property
    def zero(self) -> KeopsValue:
        """The number 0 for every pair."""
        return KeopsValue(self.record, None)

    @property
    def q(self) -> KeopsValue:
        """Covariance of every pair."""
        column = self.record.norms_of(self.register)
        return KeopsValue(self.record, self.record.run("value", self.register, columns=(column,)))

    def affine(self, weight_variance: Tensor | float, bias_variance: Tensor | float) -> KeopsPair:
        """Return the pairs under ``weight_variance * k + bias_variance``; see :meth:`Pair.affine`.

        Parameters
        ----------
        weight_variance, bias_variance : float or Tensor of one entry
            Non-negative and finite; tensors may require gradients.

        Raises
        ------
        NotImplementedError
            If a tensor has several entries.
        ValueError
            If a variance is negative or not finite.
        """
        check_positive("weight_variance", weight_variance, zero=True)
        check_positive("bias_variance", bias_variance, zero=True)
        w, b, record = weight_variance, bias_variance, self.record
        before = record.norms_of(self.register)
        if not isinstance(b, Tensor) and b == 0:
            root = safe_sqrt(w) if isinstance(w, Tensor) else w**0.5
            # The sweep back does not pass through D, so the root in the program has no gradient of its own.
            numbers = (root.detach() if isinstance(root, Tensor) else root, w)
            places = tuple(map(record.parameter, numbers))
            return record.pair(
                self.r1 * root, self.r2 * root, "scaled", self.register, columns=(before,), parameters=places
            )
        r1, r2 = (safe_sqrt(w * r.double().square() + b).to(r.dtype) for r in (self.r1, self.r2))
        places = (record.parameter(w), record.parameter(b))
        return self._behind(r1, r2, "affine", self.register, columns=(before,), parameters=places)

    def plus(self, other: KeopsPair) -> KeopsPair:
        """Return the pairs under the sum of two kernels, both made from one call of :meth:`from_points`.

        Raises
        ------
        ValueError
            If they stem from different calls.
        """
        if other.record is not self.record:
            raise ValueError("kernels in a formula can only be added if they stem from the same from_points.")
        r1, r2 = (safe_sqrt(s * s + t * t) for s, t in ((self.r1, other.r1), (self.r2, other.r2)))
        columns = tuple(map(self.record.norms_of, (self.register, other.register)))
        return self._behind(r1, r2, "plus", self.register, other.register, columns=columns)

    def normalised(self, eps: float) -> tuple[KeopsPair, KeopsValue]:
        """Return the pairs times ``1 / sqrt((k(x, x) + eps) (k(y, y) + eps))``, and that factor; eps is positive."""
        record = self.record
        i1, i2 = ((r * r + eps).rsqrt() for r in (self.r1, self.r2))
        inverses = record.column(i1, i2)
        pair = self._behind(
            self.r1 * i1,
            self.r2 * i2,
            "normalise",
            self.register,
            columns=(record.norms_of(self.register), inverses),
            parameters=(record.parameter(eps),),
        )
        return pair, KeopsValue(record, record.run("outer", columns=(inverses,)))

    def through(self, dual: Dual) -> KeopsPair:
        """Return the pairs behind a nonlinearity, as ``dual(pair)``.

        Raises
        ------
        NotImplementedError
            If the dual has no formula (Numeric, and subclasses of the library's duals).
        """
        name, places = self._dual(dual)
        r1, r2 = dual._norm(self.r1), dual._norm(self.r2)
        columns = (self.record.norms_of(self.register),)
        if SNIPPETS[name].behind:
            return self._behind(r1, r2, name, self.register, columns=columns, parameters=places)
        return self.record.pair(r1, r2, name, self.register, columns=columns, parameters=places)

    def slope(self, dual: Dual) -> KeopsValue:
        """Return E f'(u) f'(v) of every pair, as ``dual.derivative(pair)``; errors as in :meth:`through`.

        Raises
        ------
        ValueError
            For Sign, which has none.
        """
        name, places = self._dual(dual)
        if not SNIPPETS[name].slope:
            # Raises, in the words of the dual.
            dual.derivative(self._norms)
        column = self.record.norms_of(self.register)
        number = self.record.run(f"slope_{name}", self.register, columns=(column,), parameters=places)
        return KeopsValue(self.record, number)

    @property
    def _norms(self) -> Pair:
        """The norms as a pair of points that do not differ, for checks of norms."""
        zero = self.r1.new_zeros(())
        return Pair(self.r1, self.r2, zero, zero)

    def _dual(self, dual: Dual) -> tuple[str, tuple[int, ...]]:
        name = name_of(dual)
        dual._check(self._norms)
        known = self.record.constants
        if dual not in known:
            known[dual] = tuple(map(self.record.parameter, constants_of(dual)))
        return name, known[dual]

    def _behind(
        self, r1: Tensor, r2: Tensor, name: str, *inputs: int, columns: tuple[int, ...], **where: Any
    ) -> KeopsPair:
        """Run an instruction that reads the norms of its own result."""
        last = self.record.column(r1, r2)
        pair = self.record.pair(r1, r2, name, *inputs, columns=(*columns, last), **where)
        self.record.column_of[pair.register] = last
        return pair


class KeopsValue:
    """One number for every pair of points, in a formula: sums, products and multiples of covariances and slopes.

    Made by :attr:`KeopsPair.q`, :meth:`KeopsPair.slope` and :attr:`KeopsPair.zero`; ``+`` takes two of them, ``*`` also
    a number or a tensor of one entry.
    """

    def __init__(self, record: _Record, register: int | None) -> None:
        self.record, self.register = record, register

    def __add__(self, other: Any) -> KeopsValue:
        if not isinstance(other, KeopsValue):
            return NotImplemented
        if self.register is None or other.register is None:
            return other if self.register is None else self
        return KeopsValue(self.record, self.record.run("add", self.register, other.register))

    def __mul__(self, other: Any) -> KeopsValue:
        if isinstance(other, KeopsValue):
            if self.register is None or other.register is None:
                return KeopsValue(self.record, None)
            return KeopsValue(self.record, self.record.run("times", self.register, other.register))
        if not isinstance(other, (Tensor, float, int)):
            return NotImplemented
        if self.register is None:
            return self
        place = self.record.parameter(other)
        return KeopsValue(self.record, self.record.run("multiple", self.register, parameters=(place,)))

    __rmul__ = __mul__

    @property
    def program(self) -> Program:
        """Instructions up to this number, which is the result of the last of them."""
        if self.register is None:
            raise ValueError("the formula of this network is 0 everywhere.")
        return tuple(self.record.program[: self.register + 1])

    def variables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the program reads: by row (*batch, n, c), by column (*batch, m, c), and parameters (p,).

        They hang in the autograd graph of the points and hyperparameters.
        """
        return self.record.variables()

    def lazy(self) -> Any:
        """Return the symbolic KeOps matrix, a ``LazyTensor``.

        Raises
        ------
        ValueError
            If the number is the 0 of :attr:`KeopsPair.zero`.
        """
        from stochproc.kernels._keops import column_of, parameters_of, row_of
        from stochproc.kernels._keops_operations import lazy_program

        rows, cols, parameters = self.variables()
        return lazy_program(self.program, row_of(rows), column_of(cols), parameters_of(parameters))
