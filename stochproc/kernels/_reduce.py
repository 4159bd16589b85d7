"""Products with kernel matrices and nearest columns, without the matrix where it is large."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stochproc._checks import check_integer, check_same_kind
from stochproc.kernels._base import Kernel, Tensors, check_points
from stochproc.kernels._costs import CostLike, as_cost
from stochproc.kernels._dispatch import resolve
from stochproc.kernels._evaluate import accurate_product, gathered, run, smallest, split
from stochproc.kernels._reduction_checks import check_columns, check_vectors

__all__ = ["argmin", "kmin", "matvec"]


def matvec(
    kernel: Kernel,
    x: Float[Tensor, "*#batch n d"],
    y: Float[Tensor, "*#batch m d"] | None,
    v: Float[Tensor, "*#batch m p"],
    *,
    backend: str = "auto",
    block_bytes: int | None = None,
    strict: bool = False,
) -> Float[Tensor, "*batch n p"]:
    """Multiply a kernel matrix with vectors, without forming it where it is large.

    Parameters
    ----------
    kernel : Kernel
    x : Tensor of shape (*batch, n, d)
    y : Tensor of shape (*batch, m, d) or None
        None means x.
    v : Tensor of shape (*batch, m, p)
    backend : {"auto", "dense", "chunked", "keops"}, default="auto"
        See :func:`select_backend` for the rule.
    block_bytes : int, default=None
        Size of a block of rows of the chunked backend; None takes 1 MiB on a CPU and 64 MiB on CUDA.
    strict : bool, default=False
        With ``backend="keops"``: raise instead of falling back where KeOps cannot be used.

    Returns
    -------
    Tensor of shape (*batch, n, p)

    Raises
    ------
    ValueError
        If shapes do not fit, or the backend is unknown.
    TypeError
        If dtypes or devices are mixed, or a dtype is neither float32 nor float64.
    BackendError
        If ``strict`` and KeOps cannot be used.

    Notes
    -----
    Time O(n m (d + p)), memory O((n + m)(d + p)) plus one block; the dense backend takes O(n m). x, y, v and
    the hyperparameters may require gradients, to any order; the backward recomputes each block. float32 sums
    over more than 10,000 terms are accumulated in float64.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import RBF, matvec
    >>> matvec(RBF(), torch.zeros(2, 1), torch.zeros(3, 1), torch.ones(3, 1)).squeeze(-1).tolist()
    [3.0, 3.0]
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel must be a Kernel; got {type(kernel).__name__}. Pass it through as_kernel first.")
    x, y = check_points(x, y)
    check_vectors("v", v, y)
    check_same_kind(x=x, v=v)
    name = resolve(kernel.has_formula, x, y, v.shape[-1], backend, strict=strict)
    if name == "keops":
        from stochproc.kernels._keops import column_of, total_of

        return total_of(kernel.formula(x, y) * column_of(v), x, y.shape[-2])
    prepared = kernel.prepare(x, y)

    def product(rows: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
        cols, own, (w,) = split(prepared, shared)
        return (accurate_product(prepared.block(rows, cols, own), w),), ()

    return run(product, prepared, (v,), name, y, x.dtype, block_bytes)[0]


def argmin(
    cost: CostLike,
    x: Float[Tensor, "*#batch n d"],
    y: Float[Tensor, "*#batch m d"],
    *,
    g: Float[Tensor, "*#batch m"] | None = None,
    backend: str = "auto",
    block_bytes: int | None = None,
    strict: bool = False,
) -> tuple[Float[Tensor, "*batch n"], Int[Tensor, "*batch n"]]:
    r"""Nearest column of every row: :math:`\min_j c_{ij} - g_j` and the j that attains it.

    Parameters
    ----------
    cost, x, y, backend, block_bytes, strict
        As in :func:`logsumexp`.
    g : Tensor of shape (*batch, m), default=None
        Subtracted from the cost; None means 0.

    Returns
    -------
    values : Tensor of shape (*batch, n)
        Differentiable in x, y and g; the indices are held fixed.
    indices : Tensor of shape (*batch, n), int64

    Raises
    ------
    ValueError
        If y is empty, shapes do not fit, or the cost or backend is unknown.

    Notes
    -----
    Time O(n m d), memory O((n + m) d) plus one block. Of equal values the backend decides which one wins.
    """
    values, indices = kmin(cost, x, y, 1, g=g, backend=backend, block_bytes=block_bytes, strict=strict)
    return values.squeeze(-1), indices.squeeze(-1)


def kmin(
    cost: CostLike,
    x: Float[Tensor, "*#batch n d"],
    y: Float[Tensor, "*#batch m d"],
    k: int,
    *,
    g: Float[Tensor, "*#batch m"] | None = None,
    backend: str = "auto",
    block_bytes: int | None = None,
    strict: bool = False,
) -> tuple[Float[Tensor, "*batch n k"], Int[Tensor, "*batch n k"]]:
    r"""Return the k nearest columns of every row: the smallest :math:`c_{ij} - g_j`, ascending.

    Parameters
    ----------
    k : int
        Between 1 and m.
    cost, x, y, g, backend, block_bytes, strict
        As in :func:`argmin`.

    Returns
    -------
    values : Tensor of shape (*batch, n, k)
        Differentiable in x, y and g; the indices are held fixed.
    indices : Tensor of shape (*batch, n, k), int64

    Raises
    ------
    ValueError
        If k is not between 1 and m, shapes do not fit, or the cost or backend is unknown.

    Notes
    -----
    Time O(n m (d + log k)), memory O((n + m) d + n k) plus one block.
    """
    x, y = check_points(x, y)
    if y.shape[-2] == 0:
        raise ValueError("y must have at least one row; got none.")
    check_integer("k", k, 1, y.shape[-2])
    if g is not None:
        check_columns(x, y, g)
    found = as_cost(cost)
    name = resolve(found.has_formula, x, y, k, backend, strict=strict)
    with torch.no_grad():
        if name == "keops":
            from stochproc.kernels._keops import column_of

            c = found.formula(x, y)
            c = c if g is None else c - column_of(g.unsqueeze(-1))
            indices = c.argKmin(k, dim=c.nbatchdims + 1)
        else:
            indices = smallest(found.prepare(x, y), g, k, name, y, x.dtype, block_bytes)
    return gathered(found, x, y, g, indices)
