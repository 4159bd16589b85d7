"""Sums, products, scalings and restrictions to columns of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_integer
from stochproc.kernels._base import Kernel, Prepared, Tensors, plain
from stochproc.kernels._parameters import positive
from stochproc.kernels._state_space import StateSpace
from stochproc.kernels._state_space_algebra import BlockStateSpace, ScaledStateSpace, multiply

__all__ = ["ActiveDims", "Product", "Scale", "Sum"]


class _Combination(Kernel):
    """Several kernels of the same points, combined entry by entry."""

    kernels: torch.nn.ModuleList
    _opaque = property(lambda self: any(k._opaque for k in self._parts()))  # type: ignore[assignment]

    def __init__(self, *kernels: Kernel) -> None:
        if not kernels:
            raise ValueError(f"{type(self).__name__} needs at least one kernel; got none.")
        for k in kernels:
            if not isinstance(k, Kernel):
                raise TypeError(
                    f"{type(self).__name__} combines kernels of this library; got {type(k).__name__}. "
                    "Pass it through as_kernel first."
                )
        try:
            batch_shape = torch.broadcast_shapes(*(k.batch_shape for k in kernels))
        except RuntimeError:
            shapes = ", ".join(str(tuple(k.batch_shape)) for k in kernels)
            raise ValueError(f"the batch shapes of the kernels must broadcast; got {shapes}.") from None
        super().__init__(batch_shape=tuple(batch_shape))
        # a + b + c is one sum of three, not a sum in a sum.
        flat: list[Kernel] = []
        for k in kernels:
            flat.extend(k._parts() if isinstance(k, _Combination) and type(k) is type(self) else [k])
        self.kernels = torch.nn.ModuleList(flat)

    @staticmethod
    def _combine(left: Any, right: Any) -> Any:
        raise NotImplementedError

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """See :meth:`Kernel.prepare`."""
        parts = [k.prepare(x, y) for k in self._parts()]
        combine = self._combine

        def block(rows: Tensors, cols: Tensors, shared: Tensors) -> Tensor:
            value: Tensor | None = None
            i = j = k = 0
            for p in parts:
                i_, j_, k_ = i + len(p.rows), j + len(p.cols), k + len(p.shared)
                part = p.block(rows[i:i_], cols[j:j_], shared[k:k_])
                value = part if value is None else combine(value, part)
                i, j, k = i_, j_, k_
            return value  # type: ignore[return-value]

        return Prepared(
            tuple(t for p in parts for t in p.rows),
            tuple(t for p in parts for t in p.cols),
            tuple(t for p in parts for t in p.shared),
            block,
        )

    def diag(self, x: Float[Tensor, "*#batch n d"]) -> Float[Tensor, "*batch n"]:
        """Evaluate k(x_i, x_i); see :meth:`Kernel.diag`."""
        return reduce(self._combine, (k.diag(x) for k in self._parts()))

    def formula(self, x: Tensor, y: Tensor) -> Any:
        """Return the symbolic KeOps matrix; see :meth:`Kernel.formula`."""
        return reduce(self._combine, (k.formula(x, y) for k in self._parts()))

    @property
    def has_formula(self) -> bool:
        """Whether every part has a formula."""
        return all(k.has_formula for k in self._parts())

    def config(self) -> dict[str, Any]:
        """See :meth:`Kernel.config`."""
        return {"class": type(self).__name__, "kernels": [k.config() for k in self._parts()]}

    def _parts(self) -> list[Kernel]:
        return [k for k in self.kernels if isinstance(k, Kernel)]

    def _state_spaces(self, order: int | None) -> list[StateSpace]:
        """State spaces of the parts; the error names the part that has none."""
        forms = []
        for i, k in enumerate(self._parts(), 1):
            try:
                forms.append(k.state_space(order))
            except NotImplementedError as error:
                raise NotImplementedError(f"in part {i} of a {type(self).__name__}: {error}") from None
        return forms


class Sum(_Combination):
    """Sum of kernels: the process is a sum of independent parts.

    Parameters
    ----------
    *kernels : Kernel
        At least one; ``a + b`` writes the same.
    """

    @staticmethod
    def _combine(left: Any, right: Any) -> Any:
        return left + right

    def state_space(self, order: int | None = None) -> StateSpace:
        """Return the states of the parts side by side; see :meth:`Kernel.state_space`."""
        return BlockStateSpace(self._state_spaces(order), joint=False)


class Product(_Combination):
    """Product of kernels, for instance of one periodic and one slowly decaying.

    Parameters
    ----------
    *kernels : Kernel
        At least one; ``a * b`` writes the same.
    """

    @staticmethod
    def _combine(left: Any, right: Any) -> Any:
        return left * right

    def state_space(self, order: int | None = None) -> StateSpace:
        """Return the Kronecker product of the states of stationary parts; see :meth:`Kernel.state_space`."""
        return multiply(self._state_spaces(order))


class Scale(Kernel):
    """A kernel times a positive outputscale, the variance of the process.

    Parameters
    ----------
    kernel : Kernel
    outputscale : float or Tensor, default=1.0
        Positive variance, in squared units of the function; ``2.0 * kernel`` writes the same.
    batch_shape : tuple of int, default=()
        Batch shape of the outputscale.
    """

    outputscale = positive("outputscale", "Variance of the process.")
    log_outputscale: Tensor
    _opaque = property(lambda self: self.kernel._opaque)  # type: ignore[assignment]

    def __init__(self, kernel: Kernel, outputscale: Any = 1.0, *, batch_shape: tuple[int, ...] = ()) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(f"kernel must be a Kernel; got {type(kernel).__name__}.")
        super().__init__(batch_shape=batch_shape)
        self.kernel = kernel
        self._add_positive("outputscale", outputscale)
        self.batch_shape = torch.broadcast_shapes(self.batch_shape, kernel.batch_shape)

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """See :meth:`Kernel.prepare`."""
        inner = self.kernel.prepare(x, y)
        scale = self._hyper("outputscale", x).unsqueeze(-1)

        def block(rows: Tensors, cols: Tensors, shared: Tensors) -> Tensor:
            return inner.block(rows, cols, shared[:-1]) * shared[-1]

        return Prepared(inner.rows, inner.cols, (*inner.shared, scale), block)

    def diag(self, x: Float[Tensor, "*#batch n d"]) -> Float[Tensor, "*batch n"]:
        """Evaluate k(x_i, x_i); see :meth:`Kernel.diag`."""
        return self.kernel.diag(x) * self._hyper("outputscale", x)

    def formula(self, x: Tensor, y: Tensor) -> Any:
        """Return the symbolic KeOps matrix; see :meth:`Kernel.formula`."""
        from stochproc.kernels._keops import parameter_of

        inner = self.kernel.formula(x, y)
        return inner * parameter_of(self.outputscale, inner)

    def state_space(self, order: int | None = None) -> StateSpace:
        """Return the form of the kernel with its variances multiplied; see :meth:`Kernel.state_space`."""
        return ScaledStateSpace(self.kernel.state_space(order), self.outputscale)

    def config(self) -> dict[str, Any]:
        """See :meth:`Kernel.config`."""
        config = {"class": "Scale", "kernel": self.kernel.config(), "outputscale": plain(self.outputscale)}
        own = list(self.log_outputscale.shape[:-1])
        return {**config, "batch_shape": own} if own else config


class ActiveDims(Kernel):
    """A kernel of some of the columns.

    Parameters
    ----------
    kernel : Kernel
    dims : sequence of int
        Columns that the kernel sees, counted from 0; in this order.

    Raises
    ------
    ValueError
        If dims is empty or repeats a column, or, at the call, if the points have too few columns.
    """

    _opaque = property(lambda self: self.kernel._opaque)  # type: ignore[assignment]

    def __init__(self, kernel: Kernel, dims: Sequence[int]) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(f"kernel must be a Kernel; got {type(kernel).__name__}.")
        dims = list(dims)
        for dim in dims:
            check_integer("dims", dim, 0)
        if not dims or len(set(dims)) != len(dims):
            raise ValueError(f"dims must name at least one column and none twice; got {dims}.")
        super().__init__(batch_shape=tuple(kernel.batch_shape))
        self.kernel = kernel
        self.dims = tuple(int(dim) for dim in dims)

    def _columns(self, x: Tensor) -> Tensor:
        if max(self.dims) >= x.shape[-1]:
            raise ValueError(f"dims names column {max(self.dims)}, but the points have {x.shape[-1]} columns.")
        return x[..., list(self.dims)]

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """See :meth:`Kernel.prepare`."""
        return self.kernel.prepare(self._columns(x), self._columns(y))

    def diag(self, x: Float[Tensor, "*#batch n d"]) -> Float[Tensor, "*batch n"]:
        """Evaluate k(x_i, x_i); see :meth:`Kernel.diag`."""
        return self.kernel.diag(self._columns(x))

    def formula(self, x: Tensor, y: Tensor) -> Any:
        """Return the symbolic KeOps matrix; see :meth:`Kernel.formula`."""
        return self.kernel.formula(self._columns(x), self._columns(y))

    def state_space(self, order: int | None = None) -> StateSpace:
        """Return the form of the kernel if column 0 is all it sees; see :meth:`Kernel.state_space`."""
        if self.dims != (0,):
            raise NotImplementedError(f"a state space has one input column, number 0; ActiveDims sees {self.dims}.")
        return self.kernel.state_space(order)

    def config(self) -> dict[str, Any]:
        """See :meth:`Kernel.config`."""
        return {"class": "ActiveDims", "kernel": self.kernel.config(), "dims": list(self.dims)}

    def extra_repr(self) -> str:
        return f"dims={self.dims}"
