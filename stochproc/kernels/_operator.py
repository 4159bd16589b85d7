"""A kernel matrix as a ``LinearOperator``: products by blocks, gradients in points and hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from linear_operator import LinearOperator
from linear_operator.utils.broadcasting import _matmul_broadcast_shape as check_product
from torch import Tensor

from stochproc.kernels._base import Kernel, Tensors
from stochproc.kernels._dispatch import select_backend
from stochproc.kernels._parameters import call_with_parameters
from stochproc.kernels._reduce import matvec

__all__ = ["KernelOperator"]


def same_points(x: Tensor, y: Tensor) -> bool:
    """Whether two arguments may be treated as one: equal values are not enough where a gradient is wanted."""
    if x is y:
        return True
    wanted = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    return not wanted and x.shape == y.shape and torch.equal(x, y)


class _Held:
    """A kernel out of reach of linear_operator, which would clone and cast any keyword that can be."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel


class KernelOperator(LinearOperator):
    """The matrix of a kernel between two sets of points, evaluated when it is used.

    Made by :meth:`Kernel.operator`. Behaves as any ``linear_operator.LinearOperator``: ``op @ v``,
    ``op[rows, cols]``, ``op.diagonal()``, ``op.add_jitter(noise).solve(b)``, ``op.to_dense()``.

    Parameters
    ----------
    x, y : Tensor of shape (*batch, n, d) and (*batch, m, d)
    *parameters : Tensor
        Values of the kernel's parameters, in the order of ``names``; they are arguments because
        linear_operator differentiates nothing else.
    kernel : Kernel
    names : tuple of str
    backend : {"auto", "dense", "chunked", "keops"}, default="auto"

    Notes
    -----
    A product takes time O(n m (d + p)) and memory O(n + m) plus one block. Noise is added outside, by
    ``op.add_jitter(noise)`` or ``op.add_diagonal(noise)``.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import RBF
    >>> op = RBF().operator(torch.zeros(3, 1))
    >>> (op @ torch.ones(3, 1)).squeeze(-1).tolist(), op.shape, op.backend_used
    ([3.0, 3.0, 3.0], torch.Size([3, 3]), 'dense')
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *parameters: Tensor,
        kernel: Kernel | _Held,
        names: tuple[str, ...],
        backend: str = "auto",
    ) -> None:
        held = kernel if isinstance(kernel, _Held) else _Held(kernel)
        kernel = held.kernel
        batched = bool(kernel.batch_shape) and not kernel._opaque
        shapes = [p.shape[:-1] for p in parameters] if batched else [kernel.batch_shape]
        try:
            batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2], *shapes)
        except RuntimeError:
            raise ValueError(
                f"the batch shapes of x, y and the kernel must broadcast; got {tuple(x.shape[:-2])}, "
                f"{tuple(y.shape[:-2])} and {tuple(kernel.batch_shape)}."
            ) from None
        if batch:
            same = x is y
            x = x.expand(*batch, *x.shape[-2:])
            y = x if same else y.expand(*batch, *y.shape[-2:])
            if batched:
                parameters = tuple(p.expand(*batch, p.shape[-1]) for p in parameters)
        super().__init__(x, y, *parameters, kernel=held, names=names, backend=backend)
        self.x, self.y, self.parameters_ = x, y, parameters
        self.kernel, self.names, self.backend = kernel, names, backend
        self._batched = batched

    @property
    def backend_used(self) -> str:
        """Name of the backend that a product with one vector runs on."""
        return select_backend(self.kernel, self.x, self.y, backend=self.backend)

    def _call(self, function: Callable[..., Any], *args: Any, parameters: Tensors | None = None, **kw: Any) -> Any:
        values = self.parameters_ if parameters is None else parameters
        return call_with_parameters(self.kernel, self.names, values, function, *args, **kw)

    def _with(self, x: Tensor, y: Tensor, parameters: Tensors | None = None) -> KernelOperator:
        values = self.parameters_ if parameters is None else parameters
        return KernelOperator(x, y, *values, kernel=self.kernel, names=self.names, backend=self.backend)

    def _per_batch(self, change: Callable[[Tensor], Tensor]) -> Tensors:
        return tuple(map(change, self.parameters_)) if self._batched else self.parameters_

    def _same_points(self) -> bool:
        return same_points(self.x, self.y)

    def _matmul(self, rhs: Tensor) -> Tensor:
        v = rhs.unsqueeze(-1) if rhs.ndim == 1 else rhs
        out = self._call(matvec, self.x, self.y, v, backend=self.backend)
        return out.squeeze(-1) if rhs.ndim == 1 else out

    def matmul(self, other: Any) -> Any:
        """Multiply by a matrix, a vector or another operator; a product with a tensor has derivatives of any order.

        The product of linear_operator would have a first derivative alone, and drop a second one without a word.
        """
        if not isinstance(other, Tensor):
            return super().matmul(other)
        check_product(self.shape, other.shape)
        return self._matmul(other)

    def _size(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-2], self.x.shape[-2], self.y.shape[-2]))

    def _transpose_nonbatch(self) -> KernelOperator:
        return self._with(self.y, self.x)

    def _diagonal(self) -> Tensor:
        if self._same_points():
            diagonal = self._call(lambda kernel, x: kernel.diag(x), self.x)
            return diagonal.expand(self.shape[:-1])
        return self._pairwise(self.x, self.y, self._per_batch(lambda p: p.unsqueeze(-2)))

    def _pairwise(self, x: Tensor, y: Tensor, parameters: Tensors) -> Tensor:
        """Evaluate k(x_i, y_i) for points in matching positions, each a batch of its own."""
        found = self._call(lambda kernel, a, b: kernel(a, b), x.unsqueeze(-2), y.unsqueeze(-2), parameters=parameters)
        return found[..., 0, 0]

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        x, y = self.x[(*batch_indices, row_index)], self.y[(*batch_indices, col_index)]
        return self._pairwise(x, y, self._per_batch(lambda p: p[batch_indices] if batch_indices else p))

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        slices = all(isinstance(i, (slice, int)) for i in batch_indices)
        if batch_indices and (not slices or self.kernel._opaque):
            # Advanced indices mix with those of the rows by NumPy's rules: let the dense matrix apply them.
            from linear_operator import to_linear_operator

            return to_linear_operator(self.to_dense()[(*batch_indices, row_index, col_index)])
        x = self.x[batch_indices][..., row_index, :]
        same = self.y is self.x and isinstance(row_index, slice) and row_index == col_index
        y = x if same else self.y[batch_indices][..., col_index, :]
        return self._with(x, y, self._per_batch(lambda p: p[batch_indices] if batch_indices else p))

    def _mul_matrix(self, other: Any) -> LinearOperator:
        # linear_operator would multiply low-rank roots of large matrices: an approximation.
        from linear_operator import to_dense, to_linear_operator

        product = self._product(other) if isinstance(other, KernelOperator) else None
        return to_linear_operator(self.to_dense() * to_dense(other)) if product is None else product

    def _product(self, other: KernelOperator) -> KernelOperator | None:
        """Return the operator of the product kernel, where both act on the same points and share no parameter."""
        points = self.x is other.x and self.y is other.y
        opaque = self.kernel._opaque or other.kernel._opaque
        own, others = ({id(p) for p in op.kernel.parameters()} for op in (self, other))
        if not points or opaque or self._batched or other._batched or own & others:
            return None
        kernel = self.kernel * other.kernel
        value = {}
        for op in (self, other):
            named = dict(op.kernel.named_parameters())
            value.update({id(named[n]): v for n, v in zip(op.names, op.parameters_, strict=True)})
        found = [(n, value[id(p)]) for n, p in kernel.named_parameters()]
        names, values = tuple(n for n, _ in found), tuple(v for _, v in found)
        return KernelOperator(self.x, self.y, *values, kernel=kernel, names=names, backend=self.backend)

    def _prod_batch(self, dim: int) -> LinearOperator:
        from linear_operator import to_linear_operator

        return to_linear_operator(self.to_dense().prod(dim))

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelOperator:
        def copied(t: Tensor) -> Tensor:
            return t.detach().clone().requires_grad_(t.requires_grad)

        x = copied(self.x)
        y = x if self.y is self.x else copied(self.y)
        values = map(copied, self.parameters_)
        kernel = copy.deepcopy(self.kernel, memo)
        return KernelOperator(x, y, *values, kernel=kernel, names=self.names, backend=self.backend)

    def _unsqueeze_batch(self, dim: int) -> KernelOperator:
        parameters = self._per_batch(lambda p: p.unsqueeze(dim))
        return self._moved(lambda t: t.unsqueeze(dim), parameters)

    def _permute_batch(self, *dims: int) -> KernelOperator:
        parameters = self._per_batch(lambda p: p.permute(*dims, -1))
        return self._moved(lambda t: t.permute(*dims, -2, -1), parameters)

    def _expand_batch(self, batch_shape: Any) -> KernelOperator:
        parameters = self._per_batch(lambda p: p.expand(*batch_shape, p.shape[-1]))
        return self._moved(lambda t: t.expand(*batch_shape, *t.shape[-2:]), parameters)

    def _moved(self, change: Callable[[Tensor], Tensor], parameters: Tensors) -> KernelOperator:
        x = change(self.x)
        return self._with(x, x if self.y is self.x else change(self.y), parameters)

    def to_dense(self) -> Tensor:
        """Form the matrix, of shape (*batch, n, m)."""
        y = None if self._same_points() else self.y
        matrix = self._call(lambda kernel, x, y: kernel.dense(x, y), self.x, y)
        return matrix.expand(self.shape)
