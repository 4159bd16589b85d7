"""A sparse symmetric matrix from torch or SciPy in one form, and its factorisation."""

import functools
import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc._checks import check_floating, check_same_kind

__all__ = ["SparseMatrix"]

# Entries (i, j) and (j, i) of a product such as Pᵀ D P may differ by rounding, in units of eps max |A|.
SYMMETRIC_TO = 1e3


class SparseMatrix:
    """Coordinates and values of a sparse matrix, the values still attached to the graph of a torch argument.

    Parameters
    ----------
    A : torch sparse CSR or COO tensor, or SciPy sparse matrix
    b : Tensor of shape (n,) or (n, k)
        Gives dtype and device, which those of A must equal (a SciPy matrix goes to the device).
    """

    def __init__(self, A: Any, b: Tensor) -> None:
        check_floating(b=b)
        if isinstance(A, Tensor):
            self.rows, self.cols, self.values = _from_torch(A, b)
        else:
            self.rows, self.cols, self.values = _from_scipy(A, b)
        if A.ndim != 2 or A.shape[0] != A.shape[1]:
            raise ValueError(f"A must be square, (n, n); got shape {tuple(A.shape)}.")
        self.n = int(A.shape[0])
        if b.ndim not in (1, 2) or b.shape[0] != self.n:
            raise ValueError(f"b must have shape (n,) or (n, k) with n = {self.n}; got {tuple(b.shape)}.")
        self.finite = bool(self.values.detach().isfinite().all())
        if self.finite:
            self._check_symmetric()

    def _check_symmetric(self) -> None:
        csr = self.csr
        difference = abs(csr - csr.T)
        worst = float(difference.max()) if difference.nnz else 0.0
        largest = float(abs(csr).max()) if csr.nnz else 0.0
        if worst > SYMMETRIC_TO * torch.finfo(self.values.dtype).eps * largest:
            raise ValueError(f"A must be symmetric; got entries that differ from their mirror image by {worst:.3g}.")

    @functools.cached_property
    def csr(self) -> Any:
        """The matrix for SciPy, in float64."""
        import scipy.sparse

        values, rows, cols = (t.detach().cpu().numpy() for t in (self.values, self.rows, self.cols))
        return scipy.sparse.csr_array((values.astype(np.float64), (rows, cols)), shape=(self.n, self.n))

    @functools.cached_property
    def torch_csr(self) -> Tensor:
        """The matrix for torch, detached."""
        counts = torch.bincount(self.rows, minlength=self.n)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        with warnings.catch_warnings():
            # "Sparse CSR tensor support is in beta state", once a process.
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(
                crow, self.cols, self.values.detach(), (self.n, self.n), check_invariants=False
            )

    def diagonal(self) -> Tensor:
        """Diagonal of the matrix, detached."""
        on = self.rows == self.cols
        return self.values.new_zeros(self.n).index_add(0, self.rows[on], self.values.detach()[on])

    def product(self, x: Tensor) -> Tensor:
        """A x, differentiable in the values."""
        values = self.values if x.ndim == 1 else self.values.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, self.rows, values * x[self.cols])

    @functools.cached_property
    def factors(self) -> "_Factors":
        """Factorisations, made when first used and kept for the backward."""
        return _Factors(self.csr)


class _Factors:
    """Sparse LU factors: in symmetric mode, and with free pivoting if that does not reach the tolerance."""

    def __init__(self, csr: Any) -> None:
        self.csr = csr
        self._made: dict[int, Any] = {}
        self.singular = False

    def solve(self, B: np.ndarray, tol: np.ndarray) -> np.ndarray:
        """Best solution of A X = B, with one step of refinement; NaN where there is no factor."""
        best = np.full_like(B, np.nan)
        for attempt in (0, 1):
            factor = self._factor(attempt)
            if factor is None:
                continue
            with np.errstate(all="ignore"):
                X = factor.solve(B)
                X = smaller_residual(self.csr, B, X, X + factor.solve(B - self.csr @ X))
                best = smaller_residual(self.csr, B, best, X)
                if bool((np.linalg.norm(B - self.csr @ best, axis=0) <= tol).all()):
                    break
        return best

    def _factor(self, attempt: int) -> Any:
        if attempt not in self._made:
            from scipy.sparse.linalg import splu

            options: dict[str, Any] = {}
            if attempt == 0:
                # Half the fill of the default ordering for a symmetric pattern; stable where A is definite.
                options = {
                    "permc_spec": "MMD_AT_PLUS_A",
                    "diag_pivot_thresh": 0.0,
                    "options": {"SymmetricMode": True},
                }
            try:
                self._made[attempt] = splu(self.csr.tocsc(), **options)
            except RuntimeError:  # SuperLU's word for an exactly zero pivot
                self._made[attempt] = None
                self.singular = self.singular or attempt == 1
        return self._made[attempt]


def smaller_residual(csr: Any, B: np.ndarray, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Columns of Y where their residual is smaller than that of X, or X has none."""
    norm_x, norm_y = (np.linalg.norm(B - csr @ V, axis=0) for V in (X, Y))
    return np.where((norm_y < norm_x) | ~np.isfinite(norm_x), Y, X)


def _from_torch(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if A.layout not in (torch.sparse_coo, torch.sparse_csr):
        raise TypeError(f"A must be a sparse CSR or COO tensor; got layout {A.layout}. Use CG for a dense one.")
    check_same_kind(A=A, b=b)
    if A.layout == torch.sparse_coo:
        A = A.coalesce()
        indices = A.indices()
        return indices[0], indices[1], A.values()
    counts = A.crow_indices().diff()
    return torch.repeat_interleave(counts), A.col_indices().long(), A.values()


def _from_scipy(A: Any, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scipy_sparse = sys.modules.get("scipy.sparse")
    if scipy_sparse is None or not scipy_sparse.issparse(A):
        raise TypeError(f"A must be a torch sparse tensor or a SciPy sparse matrix; got {type(A).__name__}.")
    if A.dtype not in (np.float32, np.float64):
        raise TypeError(f"A must be float32 or float64; got {A.dtype}.")
    coo = A.tocsr().tocoo()
    rows, cols = (torch.tensor(i, dtype=torch.int64, device=b.device) for i in (coo.row, coo.col))
    values = torch.tensor(coo.data, device=b.device)
    check_same_kind(A=values, b=b)
    return rows, cols, values
