"""A transport plan between point clouds as an operator: products, rows and large entries, never the matrix."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc._base import Given
from stochproc._checks import check_positive
from stochproc.kernels import softmax_pass, support
from stochproc.ot._dist import cost_matrix

__all__ = ["LazyPlan"]

# Entries beyond which the plan is not written out.
MAX_ENTRIES = 1e8


class LazyPlan:
    r"""The plan :math:`P_{ij} = a_i b_j \exp((f_i + g_j - c(x_i, y_j)) / \varepsilon)`, recomputed at each use.

    Parameters
    ----------
    X : Tensor of shape (n, d)
        float32 or float64.
    Y : Tensor of shape (m, d)
    a : Tensor of shape (n,)
        float64, non-negative; rows of weight 0 are 0.
    b : Tensor of shape (m,)
    f : Tensor of shape (n,)
        float64, in the unit of the cost.
    g : Tensor of shape (m,)
    eps : float
        Positive, in the unit of the cost.
    metric : {"sqeuclidean", "euclidean", "cityblock"} or callable
        As the cost of :func:`stochproc.kernels.softmax_pass`.
    given : Given, default=None
        What kind of array to return; None returns tensors of the dtype of the points.

    Notes
    -----
    A product with p columns takes O(n m (d + p)) time and O((n + m)(d + p)) memory, in float64 whatever the points.
    """

    # NumPy leaves ``array @ plan`` to this class instead of writing the plan out.
    __array_ufunc__ = None
    ndim = 2

    def __init__(
        self,
        X: Tensor,
        Y: Tensor,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        eps: float,
        metric: Any,
        given: Given | None = None,
    ) -> None:
        self._X, self._Y, self._a, self._b, self._f, self._g = (t.detach() for t in (X, Y, a, b, f, g))
        self._eps, self._metric = float(eps), metric
        self._given = Given.of(X) if given is None else given

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self._X), len(self._Y)

    @property
    def dtype(self) -> Any:
        """Of the entries: NumPy's or torch's, as of what is returned."""
        dtype = self._X.dtype
        return dtype if self._given.is_torch else np.dtype(str(dtype).removeprefix("torch."))

    @property
    def T(self) -> LazyPlan:
        """The transposed plan."""
        return LazyPlan(self._Y, self._X, self._b, self._a, self._g, self._f, self._eps, self._flipped(), self._given)

    def _flipped(self) -> Any:
        metric = self._metric
        return metric if isinstance(metric, str) else lambda y, x: metric(x, y).mT

    def __repr__(self) -> str:
        n, m = self.shape
        return f"LazyPlan(shape=({n}, {m}), dtype={self.dtype})"

    def __len__(self) -> int:
        return len(self._X)

    def __matmul__(self, v: Any) -> Any:
        """Multiply with a vector (m,) or with columns (m, p), NumPy or torch."""
        if not isinstance(v, Tensor | np.ndarray):
            return NotImplemented
        columns = torch.as_tensor(v).detach().to(self._X.device, torch.float64)
        m = len(self._Y)
        if columns.ndim not in (1, 2) or len(columns) != m:
            raise ValueError(f"v must have one entry, or one row, a column of the plan, {m}; got {tuple(v.shape)}.")
        return self._back(self._times(columns.reshape(m, -1)).reshape(len(self._X), *columns.shape[1:]))

    def __rmatmul__(self, v: Any) -> Any:
        """Multiply from the left, by a vector (n,) or by rows (p, n)."""
        if not isinstance(v, Tensor | np.ndarray):
            return NotImplemented
        if v.ndim not in (1, 2) or v.shape[-1] != len(self._X):
            raise ValueError(f"v must have one entry a row of the plan, {len(self._X)}; got {tuple(v.shape)}.")
        return (self.T @ v.T).T if v.ndim == 2 else self.T @ v

    def _times(self, v: Tensor) -> Tensor:
        X, Y = self._clouds()
        height = self._g + self._eps * self._b.log()
        if v.shape[1] == 0:
            return v.new_zeros(len(X), 0)
        out: Any = softmax_pass(self._metric, X, Y, height, torch.ones_like(self._f), eps=self._eps, v=v)
        product = (self._log_row() + out.lse.double()).exp().unsqueeze(1) * out.Kv.double()
        # Where a row has no weight, or no finite cost.
        return torch.where(product.isnan(), 0.0, product) if bool((self._a == 0).any()) else product

    def _log_row(self) -> Tensor:
        return self._a.log() + self._f / self._eps

    def _clouds(self) -> tuple[Tensor, Tensor]:
        # A user's function is given the dtype that it was made for.
        return (self._X.double(), self._Y.double()) if isinstance(self._metric, str) else (self._X, self._Y)

    def row(self, i: int) -> Any:
        """Return one row.

        Parameters
        ----------
        i : int
            In [-n, n).

        Returns
        -------
        ndarray or Tensor of shape (m,)

        Raises
        ------
        IndexError
            If there is no such row.
        """
        n = len(self._X)
        if not -n <= i < n:
            raise IndexError(f"i must lie in [{-n}, {n}); got {i}.")
        i = i % n
        return self._back(self._rows(slice(i, i + 1)).squeeze(0))

    def _rows(self, rows: slice) -> Tensor:
        X, Y = self._clouds()
        cost = cost_matrix(X[rows], Y, self._metric).double()
        height = (self._f[rows, None] + self._g - cost) / self._eps
        # 0 where a weight is 0: the logarithm joins before the exponential, which could overflow.
        return (height + self._a[rows, None].log() + self._b.log()).exp()

    def to_sparse(self, threshold: float) -> Any:
        """Return the entries above a threshold.

        Parameters
        ----------
        threshold : float
            Positive, in the unit of the plan.

        Returns
        -------
        SciPy COO array or sparse torch tensor
            Of shape (n, m), by rows.

        Raises
        ------
        ValueError
            If the threshold is not positive.
        """
        check_positive("threshold", threshold)
        X, Y = self._clouds()
        f, g = self._f + self._eps * self._a.log(), self._g + self._eps * self._b.log()
        rows, columns, cost = support(self._metric, X, Y, f, g, math.log(threshold), eps=self._eps)
        values = ((f[rows] + g[columns] - cost) / self._eps).exp().to(self._X.dtype)
        if self._given.is_torch:
            where = torch.stack([rows, columns])
            return torch.sparse_coo_tensor(
                where, self._back(values), self.shape, is_coalesced=True, check_invariants=True
            )
        from scipy.sparse import coo_array

        return coo_array((self._back(values), (rows.cpu().numpy(), columns.cpu().numpy())), shape=self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Write the plan out, up to 1e8 entries."""
        n, m = self.shape
        if n * m > MAX_ENTRIES:
            raise ValueError(
                f"a plan must have at most {MAX_ENTRIES:.0e} entries to be written out; this one has {n * m:.1e}. "
                "Multiply by it, or use row(i) or to_sparse(threshold)."
            )
        if copy is False:
            raise ValueError("copy must not be False: a plan that is not stored is always written anew.")
        out = np.empty((n, m), dtype=np.dtype(str(self._X.dtype).removeprefix("torch.")) if dtype is None else dtype)
        step = max(1, (1 << 18) // m)
        for i in range(0, n, step):
            out[i : i + step] = self._rows(slice(i, min(i + step, n))).cpu().numpy()
        return out

    def _back(self, value: Tensor) -> Any:
        return self._given.back(value.to(self._X.dtype))
