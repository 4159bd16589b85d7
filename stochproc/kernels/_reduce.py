"""Sums, soft and hard minima over all pairs of two sets of points, without the matrix where it is large."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stochproc._checks import check_floating, check_integer, check_same_kind
from stochproc.kernels._base import Kernel, Prepared, Tensors, check_points
from stochproc.kernels._costs import CostLike, as_cost
from stochproc.kernels._dispatch import THRESHOLDS, resolve
from stochproc.kernels._distance import LOG2E
from stochproc.kernels._evaluate import (
    DROPPED,
    accurate_product,
    exponent,
    gathered,
    logsumexp2,
    row_max,
    run,
    scaled,
    shifted_exp2,
    smallest,
    split,
)

__all__ = ["argmin", "expsum", "kmin", "logsumexp", "matvec"]


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
    _check_vectors("v", v, y)
    check_same_kind(x=x, v=v)
    name = resolve(kernel.has_formula, x, y, v.shape[-1], backend, strict=strict)
    if name == "keops":
        from stochproc.kernels._keops import column_of

        return _reduced(kernel.formula(x, y) * column_of(v), x, y)
    prepared = kernel.prepare(x, y)

    def product(rows: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
        cols, own, (w,) = split(prepared, shared)
        return (accurate_product(prepared.block(rows, cols, own), w),), ()

    return run(product, prepared, (v,), name, y, x.dtype, block_bytes)[0]


def logsumexp(
    cost: CostLike,
    x: Float[Tensor, "*#batch n d"],
    y: Float[Tensor, "*#batch m d"],
    g: Float[Tensor, "*#batch m"],
    *,
    eps: float | int | Tensor = 1.0,
    backend: str = "auto",
    block_bytes: int | None = None,
    strict: bool = False,
) -> Float[Tensor, "*batch n"]:
    r"""Soft maximum over columns, :math:`\log \sum_j \exp((g_j - c_{ij}) / \varepsilon)`.

    Parameters
    ----------
    cost : {"sqeuclidean", "euclidean", "cityblock"} or callable
        Cost of a pair of points (the squared distance, not half of it), or a function of two blocks of
        points, (*batch, n, d) and (*batch, m, d), that returns (*batch, n, m).
    x : Tensor of shape (*batch, n, d)
    y : Tensor of shape (*batch, m, d)
    g : Tensor of shape (*batch, m)
        In the unit of the cost; weights b enter as g + eps log b. ``-inf`` drops the column.
    eps : float or 0-dim Tensor, default=1.0
        Positive, in the unit of the cost.
    backend, block_bytes, strict
        As in :func:`matvec`.

    Returns
    -------
    Tensor of shape (*batch, n)
        ``-inf`` for a row without a finite column; a cost of ``+inf`` drops the pair.

    Raises
    ------
    ValueError
        If shapes do not fit, eps is not positive, or the cost or backend is unknown.
    TypeError
        If dtypes or devices are mixed, or a dtype is neither float32 nor float64.

    Notes
    -----
    Time O(n m d), memory O((n + m) d) plus one block. x, y, g and a tensor eps may require gradients.
    """
    scale = _check_soft(cost, x, y, g, eps)
    found = as_cost(cost)
    name = resolve(found.has_formula, x, y, 1, backend, strict=strict)
    if name == "keops":
        from stochproc.kernels._keops import column_of

        # KeOps would make NaN of a row in which all is -inf, so a dropped column gets a very small value.
        lowest = DROPPED[x.dtype]
        z = (column_of(g.clamp(min=lowest).unsqueeze(-1)) - found.formula(x, y)) * _eps_factor(scale, x)
        out = z.logsumexp(z.nbatchdims + 1).squeeze(-1)
        return torch.where(out <= 0.5 * lowest * scale, -math.inf, out)
    prepared = exponent(found, x, y, g, scale * LOG2E)

    def soft(rows: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
        cols, own, _ = split(prepared, shared)
        return ((logsumexp2(prepared.block(rows, cols, own)) + rows[-1]) / LOG2E,), ()

    return run(soft, prepared, (), name, y, x.dtype, block_bytes)[0].squeeze(-1)


def expsum(
    cost: CostLike,
    x: Float[Tensor, "*#batch n d"],
    y: Float[Tensor, "*#batch m d"],
    f: Float[Tensor, "*#batch n"],
    g: Float[Tensor, "*#batch m"],
    v: Float[Tensor, "*#batch m p"],
    *,
    eps: float | int | Tensor = 1.0,
    backend: str = "auto",
    block_bytes: int | None = None,
    strict: bool = False,
) -> Float[Tensor, "*batch n p"]:
    r"""Multiply a transport plan with vectors: :math:`\sum_j \exp((f_i + g_j - c_{ij})/\varepsilon)\, v_j`.

    Swap (x, f) and (y, g) for the transposed plan.

    Parameters
    ----------
    cost, x, y, g, eps, backend, block_bytes, strict
        As in :func:`logsumexp`.
    f : Tensor of shape (*batch, n)
        In the unit of the cost; ``-inf`` drops the row.
    v : Tensor of shape (*batch, m, p)

    Returns
    -------
    Tensor of shape (*batch, n, p)

    Raises
    ------
    ValueError
        If shapes do not fit, eps is not positive, or the cost or backend is unknown.
    TypeError
        If dtypes or devices are mixed, or a dtype is neither float32 nor float64.

    Notes
    -----
    Time O(n m (d + p)), memory O((n + m)(d + p)) plus one block. The exponent is shifted by its row maximum,
    so the result overflows only where the sum itself does.
    """
    scale = _check_soft(cost, x, y, g, eps)
    check_same_kind(x=x, f=f, v=v)
    _check_potential("f", f)
    if f.shape[-1:] != x.shape[-2:-1]:
        raise ValueError(f"f must have one entry a row of x, {x.shape[-2]}; got shape {tuple(f.shape)}.")
    _check_vectors("v", v, y)
    found = as_cost(cost)
    name = resolve(found.has_formula, x, y, v.shape[-1], backend, strict=strict)
    if name == "keops":
        from stochproc.kernels._keops import column_of, row_of

        factor = _eps_factor(scale, x)
        z = (row_of(f.unsqueeze(-1)) + column_of(g.unsqueeze(-1)) - found.formula(x, y)) * factor
        return _reduced(z.exp() * column_of(v), x, y)
    prepared = exponent(found, x, y, g, scale * LOG2E)
    left = Prepared(
        (*prepared.rows, scaled(f, scale * LOG2E, -math.inf).unsqueeze(-1)),
        prepared.cols,
        prepared.shared,
        prepared.block,
    )

    def plan(rows: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
        cols, own, (w,) = split(prepared, shared)
        z = prepared.block(rows[:-1], cols, own)
        top, dropped = row_max(z)
        mass = shifted_exp2(z, top)
        outer = torch.where(dropped, -math.inf, top)
        return (accurate_product(mass, w) * (outer + rows[-2] + rows[-1]).exp2(),), ()

    return run(plan, left, (v,), name, y, x.dtype, block_bytes)[0]


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
        _check_columns(x, y, g)
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


def _check_vectors(name: str, v: Tensor, y: Tensor) -> None:
    check_floating(**{name: v})
    if v.ndim < 2 or v.shape[-2] != y.shape[-2]:
        raise ValueError(f"{name} must have shape (*batch, m, p) with m = {y.shape[-2]} rows; got {tuple(v.shape)}.")


def _check_columns(x: Tensor, y: Tensor, g: Tensor) -> None:
    check_same_kind(x=x, y=y, g=g)
    _check_potential("g", g)
    if g.shape[-1:] != y.shape[-2:-1]:
        raise ValueError(f"g must have one entry a row of y, {y.shape[-2]}; got shape {tuple(g.shape)}.")


def _check_potential(name: str, value: Tensor) -> None:
    bad = value.isnan() | (value == math.inf)
    if bool(bad.any()):
        raise ValueError(f"{name} must be finite or -inf; got {int(bad.sum())} entries that are NaN or +inf.")


def _check_soft(cost: CostLike, x: Tensor, y: Tensor, g: Tensor, eps: Any) -> Any:
    """Check the arguments of the soft reductions and return 1 / eps."""
    check_points(x, y)
    _check_columns(x, y, g)
    as_cost(cost)
    if isinstance(eps, Tensor):
        if eps.ndim != 0:
            raise ValueError(f"eps must be a number or a 0-dim tensor; got shape {tuple(eps.shape)}.")
        check_same_kind(x=x, eps=eps)
    elif isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"eps must be a number or a 0-dim tensor; got {type(eps).__name__}.")
    number = eps.detach().item() if isinstance(eps, Tensor) else float(eps)
    if not 0 < number < math.inf:
        raise ValueError(f"eps must be positive and finite; got {number}.")
    return 1 / eps if isinstance(eps, Tensor) else 1 / number


def _eps_factor(scale: Any, x: Tensor) -> Any:
    from stochproc.kernels._keops import _lazy_tensor

    if not isinstance(scale, Tensor):
        return float(scale)
    return _lazy_tensor()(scale.reshape(*[1] * (x.ndim + 1)))


def _reduced(z: Any, x: Tensor, y: Tensor) -> Tensor:
    """Sum a symbolic matrix over its columns."""
    long = x.dtype == torch.float32 and y.shape[-2] > THRESHOLDS["float32_max_terms"]
    return z.sum(z.nbatchdims + 1, **({"dtype_acc": "float64"} if long else {}))
