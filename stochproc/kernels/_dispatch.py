"""Which backend evaluates a kernel: the rule, and its thresholds in one place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from stochproc.kernels._base import Kernel

__all__ = ["BACKENDS", "THRESHOLDS", "choose", "select_backend"]

BACKENDS = ("auto", "chunked", "dense", "keops")

# Every number with the benchmark that gave it.
THRESHOLDS = {
    # benchmarks/bench_kernels.py, table "crossover", one x86 core: up to about n m = 1e6 the dense matrix
    # is as fast or up to 1.3 times faster; from 3000 x 3000 chunked is 2 to 3 times faster.
    "cpu_dense_max_pairs": 1_000_000,
    # Provisional, no GPU timing backs the next three: run benchmarks/bench_kernels.py on a CUDA device.
    "cuda_dense_max_pairs": 4_000_000,
    "keops_max_dim": 64,
    "keops_max_columns": 16,
    # benchmarks/bench_kernels.py, table "block": bytes of one block of rows, and the fewest rows in it.
    "cpu_block_bytes": 1 << 20,
    "cuda_block_bytes": 64 << 20,
    "min_block_rows": 16,
    # float32 sums over more terms than this are accumulated in float64.
    "float32_max_terms": 10_000,
}


def check_backend(backend: str) -> None:
    """Raise ValueError unless there is such a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; valid: {', '.join(BACKENDS)}")


def choose(backend: str, *, pairs: int, dim: int, columns: int, device_type: str, has_formula: bool) -> str:
    """Return "dense", "chunked" or "keops" for a problem of ``pairs`` entries; an explicit name wins.

    The CPU never gets KeOps by itself: it measured 2 to 11 times slower there than row blocks.
    """
    check_backend(backend)
    if backend != "auto":
        return backend
    if device_type != "cuda":
        return "dense" if pairs <= THRESHOLDS["cpu_dense_max_pairs"] else "chunked"
    if pairs <= THRESHOLDS["cuda_dense_max_pairs"]:
        return "dense"
    fits = dim <= THRESHOLDS["keops_max_dim"] and columns <= THRESHOLDS["keops_max_columns"]
    return "keops" if fits and has_formula else "chunked"


def select_backend(
    kernel: Kernel, x: Tensor, y: Tensor | None = None, *, columns: int = 1, backend: str = "auto"
) -> str:
    """Name the backend that a product with this kernel matrix runs on.

    Parameters
    ----------
    kernel : Kernel
    x : Tensor of shape (*batch, n, d)
    y : Tensor of shape (*batch, m, d), default=None
        None means x.
    columns : int, default=1
        Columns of the vectors to be multiplied.
    backend : {"auto", "dense", "chunked", "keops"}, default="auto"
        An explicit name is returned as it is, unless KeOps is unusable: then "chunked", with one warning.

    Returns
    -------
    str
        "dense", "chunked" or "keops".

    Raises
    ------
    ValueError
        If the backend is unknown.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import RBF, select_backend
    >>> select_backend(RBF(), torch.zeros(100, 3)), select_backend(RBF(), torch.zeros(5000, 3))
    ('dense', 'chunked')
    """
    y = x if y is None else y
    return resolve(kernel.has_formula, x, y, columns, backend, strict=False)


def resolve(has_formula: bool, x: Tensor, y: Tensor, columns: int, backend: str, *, strict: bool) -> str:
    """Apply the rule to two sets of points, and fall back from KeOps where it cannot run."""
    name = choose(
        backend,
        pairs=count_pairs(x, y),
        dim=x.shape[-1],
        columns=columns,
        device_type=x.device.type,
        has_formula=has_formula,
    )
    if name == "keops":
        from stochproc.kernels._keops import usable_or_warn

        reason = None if has_formula else "this kernel or cost has no KeOps formula"
        # An empty side is legal for the other backends and not for KeOps.
        empty = 0 in (x.shape[-2], y.shape[-2])
        if empty or not usable_or_warn(x, reason=reason, strict=strict):
            name = "chunked"
    return name


def count_pairs(x: Tensor, y: Tensor) -> int:
    """Return how many kernel entries x and y make, batch included."""
    batch = max(math.prod(x.shape[:-2]), math.prod(y.shape[:-2]))
    return batch * x.shape[-2] * y.shape[-2]
