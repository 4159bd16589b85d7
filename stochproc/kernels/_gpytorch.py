"""The two adapters between kernels of this library and those of GPyTorch."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from linear_operator import to_dense
from torch import Tensor

from stochproc.kernels._base import Kernel, check_points
from stochproc.kernels._dispatch import select_backend
from stochproc.kernels._keops import prepare_environment
from stochproc.kernels._operator import same_points
from stochproc.kernels._parameters import with_parameters

# GPyTorch imports pykeops, which reads its environment there and then.
prepare_environment()

import gpytorch  # noqa: E402

__all__ = ["AsGPyTorch", "WrappedGPyTorch"]


class AsGPyTorch(gpytorch.kernels.Kernel):
    """A kernel of this library inside GPyTorch; see :func:`as_gpytorch`."""

    has_lengthscale = False

    def __init__(self, kernel: Kernel, **kwargs: Any) -> None:
        super().__init__(batch_shape=kernel.batch_shape, **kwargs)
        self.kernel = kernel

    @property
    def is_stationary(self) -> bool:
        """Whether the kernel depends on differences alone, as far as GPyTorch needs to know."""
        return False

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Any:
        """Evaluate as GPyTorch asks: the diagonal, one column a batch, or the matrix."""
        if last_dim_is_batch:
            x1, x2 = x1.mT.unsqueeze(-1), x2.mT.unsqueeze(-1)
        if diag:
            if same_points(x1, x2):
                return self.kernel.diag(x1)
            return self.kernel.operator(x1, x2)._diagonal()
        if select_backend(self.kernel, x1, x2) == "dense":
            return self.kernel(x1, x2)
        return self.kernel.operator(x1, x2)

    def __getitem__(self, index: Any) -> AsGPyTorch:
        """Select from the batch of kernels, as GPyTorch does when a batched matrix is indexed."""
        batch = self.kernel.batch_shape
        if not batch:
            return self
        if self.kernel._opaque:
            raise NotImplementedError("a kernel that holds a batched GPyTorch kernel cannot be indexed.")
        index = index if isinstance(index, tuple) else (index,)
        named = dict(self.kernel.named_parameters())
        values = [p.expand(*batch, p.shape[-1])[(*index, ..., slice(None))] for p in named.values()]
        kernel = with_parameters(self.kernel, list(named), values)
        shape = torch.empty(batch)[index].shape
        for part in kernel.modules():
            if isinstance(part, Kernel):
                part.batch_shape = shape
        return AsGPyTorch(kernel, active_dims=self.active_dims)


class WrappedGPyTorch(Kernel):
    """A GPyTorch kernel inside this library; see :func:`as_kernel`."""

    # Its parameters have shapes of their own, which cannot be indexed along a batch.
    _opaque = True

    def __init__(self, base: gpytorch.kernels.Kernel) -> None:
        super().__init__(batch_shape=tuple(base.batch_shape))
        self.base = base

    def forward(
        self, x: Float[Tensor, "*#batch n d"], y: Float[Tensor, "*#batch m d"] | None = None
    ) -> Float[Tensor, "*batch n m"]:
        """Evaluate the GPyTorch kernel on one dense block."""
        x, y = check_points(x, y)
        return to_dense(self.base(x, y)).to(x)

    def diag(self, x: Float[Tensor, "*#batch n d"]) -> Float[Tensor, "*batch n"]:
        """Evaluate k(x_i, x_i)."""
        return self.base(x, diag=True).to(x)
