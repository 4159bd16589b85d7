"""Cholesky factors of matrices that rounding may have made indefinite, with the jitter on record."""

import math
import warnings

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stochproc._checks import check_floating, check_integer, check_positive
from stochproc.exceptions import NotPositiveDefiniteError, NumericalWarning
from stochproc.solvers._result import Convergence, Result, Status

__all__ = ["cholesky_or_raise", "safe_cholesky"]

# The first amount, relative to the mean diagonal: some ten (float32) and a million (float64) roundings.
FIRST_JITTER = {torch.float32: 1e-6, torch.float64: 1e-10}
# Up to this size all eigenvalues cost less than the tries that failed; above it Lanczos gives the two ends.
DENSE_EIGENVALUES_UP_TO = 1000


def safe_cholesky(
    A: Float[Tensor, "*batch n n"], jitter: "float | int | None" = None, tries: int = 5
) -> Result[Float[Tensor, "*batch n n"]]:
    r"""Factor :math:`A = L L^\top`, adding jitter only to the matrices of the batch that need it.

    Parameters
    ----------
    A : Tensor of shape (\*batch, n, n)
        Symmetric matrices, float32 or float64; n and the batch may be empty. It is not modified. Only the lower
        triangle is factored; an upper triangle that disagrees gives ``BREAKDOWN``.
    jitter : float or None, default=None
        First amount, relative to the mean of the absolute diagonal of each matrix. None is 1e-6 in float32 and
        1e-10 in float64. An amount given here is part of the caller's model: using it is not a rescue.
    tries : int, default=5
        How many amounts are tried after the matrix itself, each ten times the one before.

    Returns
    -------
    Result[Tensor of shape (\*batch, n, n)]
        Lower factors of ``A`` plus the jitter in ``stats``, differentiable in ``A`` (the jitter is
        differentiated too: its amount relative to the diagonal is the constant). A matrix that could not be
        factored has a factor of NaN throughout, and the status is then never ``CONVERGED``.

        ``status`` is ``CONVERGED``; ``NONFINITE`` if a matrix holds NaN or infinity (it is not tried again);
        ``BREAKDOWN`` if a matrix is not positive definite up to the largest jitter, or is not symmetric.
        ``convergence.residual`` is the largest
        :math:`\|(\tilde A - L L^\top) v\| / \max(\|\tilde A v\|, \max_i \tilde A_{ii} \|v\|)` for one fixed
        vector v without zeros, where :math:`\tilde A` is ``A`` plus its jitter; infinite where there is no
        factor. ``convergence.iterations`` is the largest number of factorisations of one matrix. ``stats`` has,
        one entry a matrix: ``jitter`` (absolute), ``relative_jitter``, ``rescued`` (more jitter than the caller
        asked for) and ``failed``.

    Raises
    ------
    TypeError
        If ``A`` is not a float32 or float64 tensor, or ``tries`` not an integer.
    ValueError
        If ``A`` is not square, ``jitter`` not positive or ``tries`` negative.

    Notes
    -----
    n³/3 operations a factorisation; the check of finiteness and the residual are O(n²) (4 % of the time at n =
    1000 on one core). A matrix that needed jitter is factored once more when a gradient is wanted.

    Examples
    --------
    >>> import torch
    >>> result = safe_cholesky(torch.ones(3, 3, dtype=torch.float64))
    >>> result.ok, result.stats["relative_jitter"].item()
    (True, 1e-10)
    """
    _check_square(A)
    if jitter is not None:
        check_positive("jitter", jitter)
    check_integer("tries", tries, 0)

    first = FIRST_JITTER[A.dtype] if jitter is None else float(jitter)
    tolerance = max(math.sqrt(torch.finfo(A.dtype).eps), A.shape[-1] * torch.finfo(A.dtype).eps)
    L, info = torch.linalg.cholesky_ex(A)
    nonfinite = _nonfinite(A.detach())
    failed = (info != 0) | nonfinite
    relative = A.new_zeros(A.shape[:-2], dtype=torch.float64)
    n_factorisations = 1
    if bool(failed.any()):
        relative, failed, n_tries = _search_jitter(A.detach(), failed, nonfinite, first, tries)
        n_factorisations += n_tries
        # One differentiable factorisation of the whole batch: gradients through a failed attempt are NaN.
        L = torch.linalg.cholesky_ex(_add_jitter(A, relative))[0]
        L = torch.where(failed[..., None, None], L.new_full((), math.nan), L)

    residual = _residual(A.detach(), L.detach(), relative).masked_fill(failed, math.inf)
    asymmetric = ~failed & ~(residual <= tolerance)
    status, message = _describe(nonfinite, failed, asymmetric, relative, first * 10 ** (tries - 1) if tries else 0.0)
    asked = 0.0 if jitter is None else first
    stats = {
        "jitter": (relative * _mean_diagonal(A.detach())).to(A.dtype),
        "relative_jitter": relative,
        "rescued": relative > asked,
        "failed": failed | asymmetric,
    }
    worst = float(residual.max()) if residual.numel() else 0.0
    return Result(L, status, Convergence(n_factorisations, worst, tolerance, message=message), stats)


def cholesky_or_raise(
    A: Float[Tensor, "*batch n n"],
    name: str = "A",
    *,
    jitter: "float | int | None" = None,
    tries: int = 5,
    points: "Float[Tensor, '*#batch n d'] | None" = None,
) -> Float[Tensor, "*batch n n"]:
    r"""Return the factors of ``safe_cholesky``; warn once of a rescue by jitter and raise when there is none.

    Parameters
    ----------
    A : Tensor of shape (\*batch, n, n)
        Symmetric matrices, float32 or float64.
    name : str, default="A"
        What messages call the matrix, for instance ``"the kernel matrix plus noise"``.
    jitter, tries
        As in ``safe_cholesky``.
    points : Tensor of shape (\*batch, n, d) or None, default=None
        What the rows of ``A`` stand for; an error then names the two that are closest.

    Returns
    -------
    Tensor of shape (\*batch, n, n)
        Lower factors, differentiable in ``A``.

    Raises
    ------
    NotPositiveDefiniteError
        If a matrix is indefinite up to the largest jitter (with its extreme eigenvalues, of the first such
        matrix), not symmetric, or holds NaN or infinity.

    Warns
    -----
    NumericalWarning
        If more jitter was needed than was asked for, with the amount.

    Examples
    --------
    >>> import torch
    >>> cholesky_or_raise(4 * torch.eye(2, dtype=torch.float64))
    tensor([[2., 0.],
            [0., 2.]], dtype=torch.float64)
    """
    result = safe_cholesky(A, jitter, tries)
    if not result.ok:
        raise NotPositiveDefiniteError(f"{name}: {result.convergence.message}" + _diagnosis(A.detach(), result, points))
    rescued = result.stats["rescued"]
    if bool(rescued.any()):
        amount, relative = (float(result.stats[k].max()) for k in ("jitter", "relative_jitter"))
        how_many = f" ({int(rescued.sum())} of {rescued.numel()} matrices)" if rescued.ndim else ""
        warnings.warn(
            f"{name} is positive definite only with jitter {amount:.3g} on its diagonal, {relative:.3g} times "
            f"the mean diagonal{how_many}; more noise or fewer near-duplicate points would avoid it.",
            NumericalWarning,
            stacklevel=2,
        )
    return result.value


def _check_square(A: Tensor) -> None:
    check_floating(A=A)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be square, (*batch, n, n); got shape {tuple(A.shape)}.")


def _nonfinite(A: Tensor) -> Bool[Tensor, "*batch"]:
    """Which matrices hold NaN or infinity; one cheap sum settles the usual case."""
    if bool(A.sum().isfinite()):
        return A.new_zeros(A.shape[:-2], dtype=torch.bool)
    return ~A.isfinite().all(-1).all(-1)


def _mean_diagonal(A: Tensor) -> Float[Tensor, "*batch"]:
    """Mean absolute diagonal; of an empty matrix 0, not NaN."""
    return A.diagonal(dim1=-2, dim2=-1).abs().sum(-1) / max(A.shape[-1], 1)


def _add_jitter(A: Tensor, relative: Tensor) -> Tensor:
    shifted = A.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_((relative.to(A.dtype) * _mean_diagonal(A)).unsqueeze(-1))
    return shifted


@torch.no_grad()
def _search_jitter(
    A: Tensor, failed: Tensor, nonfinite: Tensor, first: float, tries: int
) -> tuple[Tensor, Tensor, int]:
    """Relative jitter of each matrix, which of them stay indefinite, and the number of amounts tried."""
    flat = A.reshape(-1, *A.shape[-2:])
    relative = A.new_zeros(flat.shape[0], dtype=torch.float64)
    todo = (failed & ~nonfinite).reshape(-1).nonzero().squeeze(1)
    n_tries = 0
    for k in range(tries):
        if todo.numel() == 0:
            break
        n_tries += 1
        relative[todo] = first * 10**k
        info = torch.linalg.cholesky_ex(_add_jitter(flat[todo], relative[todo]))[1]
        todo = todo[info != 0]
    # What no amount has helped reports none: it was not added to anything that is returned.
    relative[todo] = 0.0
    hopeless = nonfinite.reshape(-1).clone()
    hopeless[todo] = True
    return relative.reshape(failed.shape), hopeless.reshape(failed.shape), n_tries


@torch.no_grad()
def _residual(A: Tensor, L: Tensor, relative: Tensor) -> Float[Tensor, "*batch"]:
    """How far L Lᵀ v is from (A + jitter) v for one v; see ``safe_cholesky``."""
    if A.numel() == 0:
        return A.new_zeros(A.shape[:-2])
    # A constant and an oscillating part, so that neither a smooth nor a centred kernel matrix maps v to nearly
    # 0.
    v = 1 + 0.5 * torch.cos(torch.arange(A.shape[-1], dtype=A.dtype, device=A.device)).unsqueeze(-1)
    shift = relative.to(A.dtype) * _mean_diagonal(A)
    largest = A.diagonal(dim1=-2, dim2=-1).amax(-1) + shift
    # v is divided by the diagonal, so that matrices near the ends of the range neither overflow nor vanish.
    w = v / largest[..., None, None]
    Aw = A @ w + shift[..., None, None] * w
    error = torch.linalg.vector_norm(Aw - L @ (L.mT @ w), dim=(-2, -1))
    return error / torch.linalg.vector_norm(Aw, dim=(-2, -1)).clamp_min(float(torch.linalg.vector_norm(v)))


def _describe(
    nonfinite: Tensor, failed: Tensor, asymmetric: Tensor, relative: Tensor, largest: float
) -> tuple[Status, str]:
    """Status of the batch, the worst of its matrices, and one sentence."""
    if bool(nonfinite.any()):
        return Status.NONFINITE, f"holds NaN or infinite entries{_which(nonfinite)}"
    if bool(failed.any()):
        return (
            Status.BREAKDOWN,
            f"not positive definite with jitter up to {largest:.3g} mean diagonals{_which(failed)}",
        )
    if bool(asymmetric.any()):
        return Status.BREAKDOWN, f"not symmetric, so a lower factor does not represent it{_which(asymmetric)}"
    if bool((relative > 0).any()):
        return Status.CONVERGED, f"jitter of {float(relative.max()):.3g} mean diagonals{_which(relative > 0)}"
    return Status.CONVERGED, ""


def _which(mask: Tensor) -> str:
    if mask.ndim == 0:
        return ""
    return f" ({int(mask.sum())} of {mask.numel()} matrices, the first at {tuple(mask.nonzero()[0].tolist())})"


def _diagnosis(A: Tensor, result: Result[Tensor], points: "Tensor | None") -> str:
    """Extreme eigenvalues of the first failed matrix and its closest pair of points, as a clause."""
    if result.status is not Status.BREAKDOWN:
        return "."
    first = tuple(result.stats["failed"].nonzero()[0].tolist())
    low, high, smallest = _extreme_eigenvalues(A[first])
    condition = max(abs(low), abs(high)) / smallest if smallest else math.inf
    # Above the size for all eigenvalues, one inside the spectrum may be smaller than both ends.
    how = "about" if A.shape[-1] <= DENSE_EIGENVALUES_UP_TO else "at least"
    text = f"; eigenvalues from {low:.3g} to {high:.3g} (condition {how} {condition:.1e})"
    if points is not None and points.shape[-2] > 1:
        x = points.detach().expand(*A.shape[:-2], *points.shape[-2:])[first]
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
        i, j = divmod(int(distance.argmin()), x.shape[0])
        text += f"; the closest pair of points is rows {i} and {j}, at distance {float(distance[i, j]):.3g}"
    return text + "."


def _extreme_eigenvalues(A: Tensor) -> tuple[float, float, float]:
    """Smallest and largest eigenvalue, and the smallest size of one; beyond a thousand rows of the two ends.

    The ends are then known to 1 % of the largest.
    """
    if A.shape[-1] <= DENSE_EIGENVALUES_UP_TO:
        values = torch.linalg.eigvalsh(A.double())
        return float(values[0]), float(values[-1]), float(values.abs().min())
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    matrix = A.double().cpu().numpy()
    options = {"which": "LA", "tol": 1e-2, "return_eigenvectors": False, "v0": np.cos(np.arange(len(matrix)))}
    high = float(eigsh(matrix, k=1, **options)[0])
    # Shifted, the smallest eigenvalue is the largest: Lanczos finds it without resolving the cluster near 0.
    shifted = LinearOperator(matrix.shape, matvec=lambda v: high * v - matrix @ v, dtype=matrix.dtype)
    low = high - float(eigsh(shifted, k=1, **options)[0])
    return low, high, min(abs(low), abs(high))
