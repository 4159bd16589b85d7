"""Barycenters of histograms for entropic optimal transport."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc._checks import check_integer, check_positive
from stochproc.ot._inputs import check_cost, check_weights, read, read_reg
from stochproc.solvers import Status

__all__ = ["barycenter"]

# exp(-600) is far from underflow at exp(-708): up to this range of the cost over reg products with the kernel lose
# nothing, once the largest entry of the other factor is scaled to 1.
PRODUCT_SPAN = 600.0
# As the annealing of the transport solvers: from this part of the range of the cost, by this factor, each to this err.
ANNEAL_FROM, ANNEAL_BY, ANNEAL_TOL = 8.0, 4.0, 1e-2
# Sweeps before reg falls further without that err.
MAX_ANNEAL = 100
# Relative difference of masses that is put down to rounding, in float32 too.
MASS_RTOL = 1e-4


def barycenter(
    A: Any,
    M: Any,
    reg: Any,
    weights: Any = None,
    *,
    debiased: bool = False,
    tol: float = 1e-7,
    max_iter: int = 10_000,
    log: bool = False,
) -> Any:
    r"""Compute the barycenter of histograms for entropic optimal transport.

    .. math:: \min_{q} \sum_s w_s \, \mathrm{OT}_\epsilon(a_s, q)

    with the entropy of the plan as regularisation (``reg_type="entropy"`` of :func:`stochproc.ot.solve`), by iterative
    Bregman projections in the log domain [1]_; or, debiased, with the Sinkhorn divergence in place of
    :math:`\mathrm{OT}_\epsilon` [2]_, which takes back the blur that the regularisation adds.

    Parameters
    ----------
    A : array-like of shape (dim, n_hists)
        Histograms in the columns, non-negative, of equal mass; NumPy or torch.
    M : array-like of shape (dim, k)
        Cost between the bins of the histograms and those of the barycenter, usually a square matrix; ``+inf`` forbids
        a pair.
    reg : float
        Regularisation, positive, in the unit of M.
    weights : array-like of shape (n_hists,), default=None
        Non-negative weights of the histograms; divided by their sum. None means equal ones.
    debiased : bool, default=False
        Whether to remove the blur; M must then be square and symmetric.
    tol : float, default=1e-7
        Stop once the plans agree on the barycenter: the weighted mean of the L1 distances between their marginals and
        the barycenter, relative to the mass, is at most this, and, if debiased, the last sweep moved the barycenter by
        no more either.
    max_iter : int, default=10000
        Most sweeps, each of two products with the kernel for every histogram.
    log : bool, default=False
        Whether to return a dictionary too.

    Returns
    -------
    q : ndarray or Tensor of shape (k,)
        The barycenter, of the mass of the histograms. Not differentiable.
    log : dict
        If asked for: ``err`` (list, one a sweep at ``reg``), ``niter`` (sweeps in all), ``status``.

    Raises
    ------
    ValueError
        If shapes do not fit, an entry or weight is negative or not finite, masses differ by more than rounding, a cost
        is NaN or ``-inf``, ``reg`` is not positive, forbidden pairs leave a histogram without a plan, or M is not
        symmetric and ``debiased`` is set.
    TypeError
        If NumPy is mixed with torch, devices are mixed, or the dtype is neither integer, float32 nor float64.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If ``tol`` was not reached.

    Notes
    -----
    A sweep takes O(dim k n_hists) time. Where the range of M exceeds 600 ``reg``, products with the kernel become
    log-sum-exps, ten times dearer. ``reg`` is annealed, since the number of sweeps grows with the range of M over
    ``reg``. Computed in float64.

    References
    ----------
    .. [1] J.-D. Benamou, G. Carlier, M. Cuturi, L. Nenna and G. Peyré, "Iterative Bregman Projections for Regularized
       Transportation Problems", SIAM Journal on Scientific Computing 37, 2015.
    .. [2] H. Janati, M. Cuturi and A. Gramfort, "Debiased Sinkhorn Barycenters", ICML 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.ot import barycenter
    >>> x = np.arange(60.0)
    >>> A = np.stack([np.exp(-((x - c) ** 2) / 18) for c in (18, 40)], axis=1)
    >>> A /= A.sum(0)
    >>> q = barycenter(A, (x[:, None] - x) ** 2, reg=10.0, debiased=True)
    >>> round(float(q @ x), 6), round(float(np.sqrt(q @ (x - 29) ** 2)), 2)  # mean and width
    (29.0, 3.0)
    """
    given, found = read(A=A, M=M, weights=weights)
    hists, cost, shares = _checked(found)
    eps = float(read_reg(reg, cost))
    check_positive("tol", tol)
    check_integer("max_iter", max_iter, 1)
    if debiased and not (cost.shape[0] == cost.shape[1] and torch.equal(cost, cost.T)):
        raise ValueError("M must be square and symmetric for a debiased barycenter; got another matrix.")

    with torch.no_grad():
        mass = hists.sum(0).mean()
        out = _project(hists / hists.sum(0), cost, eps, shares, debiased, tol, max_iter)
    if out.status is not Status.CONVERGED:
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"barycenter stopped at err {out.errors[-1]:.3g} above tol {tol:.3g} after {out.sweeps} sweeps; raise "
            "max_iter, tol or reg.",
            ConvergenceWarning,
            stacklevel=2,
        )
    q = given.back((mass * out.log_q.exp()).to(found["A"]))
    return (q, {"err": out.errors, "niter": out.sweeps, "status": out.status}) if log else q


class _Outcome(NamedTuple):
    log_q: Tensor
    errors: list[float]
    sweeps: int
    status: Status


class _Kernel:
    """Log-sum-exps of minus the cost over eps, of several columns at a time."""

    def __init__(self, cost: Tensor, eps: float) -> None:
        self.log_kernel = -cost / eps
        low, high = float(self.log_kernel.min()), float(self.log_kernel.max())
        self.shift = high
        self.kernel = (self.log_kernel - high).exp() if high - low <= PRODUCT_SPAN else None

    def forth(self, h: Tensor) -> Tensor:
        """Sum over the columns of the cost."""
        return self._sum(h, False)

    def back(self, h: Tensor) -> Tensor:
        """Sum over the rows of the cost."""
        return self._sum(h, True)

    def _sum(self, h: Tensor, transposed: bool) -> Tensor:
        if self.kernel is None:
            z = self.log_kernel.T if transposed else self.log_kernel
            return torch.stack([torch.logsumexp(z + column, 1) for column in h.T], 1)
        top = h.amax(0, keepdim=True)
        kernel = self.kernel.T if transposed else self.kernel
        return (kernel @ (h - top).exp()).log() + (top + self.shift)


def _project(
    hists: Tensor, cost: Tensor, eps: float, shares: Tensor, debiased: bool, tol: float, max_iter: int
) -> _Outcome:
    """Sweep at falling eps; potentials, logarithms times eps, are what one leaves to the next."""
    log_a = hists.log()
    finite = cost[cost < math.inf]
    level = max(eps, float(finite.max() - finite.min()) / ANNEAL_FROM)
    f = cost.new_zeros(cost.shape[1], hists.shape[1])
    bias = cost.new_zeros(cost.shape[1], 1)
    sweeps = 0
    while True:
        last = level <= eps
        kernel = _Kernel(cost, level)
        u, d = f / level, bias / level
        errors: list[float] = []
        q: Tensor | None = None
        while True:
            v = torch.where(log_a > -math.inf, log_a - kernel.forth(u), -math.inf)
            seen = kernel.back(v)
            # Of mass 1, whatever u is.
            marginal = torch.where(u > -math.inf, u + seen, -math.inf).exp()
            old = q
            log_q = (shares * seen).sum(1, keepdim=True) + d
            log_q = log_q - torch.logsumexp(log_q, 0)
            sweeps += 1
            q = log_q.exp()
            errors.append(float((shares * (marginal - q).abs().sum(0)).sum()))
            if debiased:
                errors[-1] = max(errors[-1], 2.0 if old is None else float((q - old).abs().sum()))
            u = torch.where(log_q > -math.inf, log_q - seen, -math.inf)
            if debiased:
                # d (K d) = q, by the mean of its logarithm and what it should be.
                d = torch.where(log_q > -math.inf, (d + log_q - kernel.forth(d)) / 2, -math.inf)
            enough = errors[-1] <= (tol if last else max(tol, ANNEAL_TOL))
            if enough or sweeps >= max_iter or (not last and len(errors) >= MAX_ANNEAL):
                break
        if last or sweeps >= max_iter:
            status = Status.CONVERGED if last and errors[-1] <= tol else Status.MAX_ITER
            return _Outcome(log_q.squeeze(1), errors, sweeps, status)
        f, bias = u * level, d * level
        level = max(eps, level / ANNEAL_BY)


def _checked(found: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the histograms that count, the cost and the weights of sum 1, in float64."""
    hists, cost = (_matrix(name, found[name]) for name in ("A", "M"))
    weights = found["weights"]
    if cost.shape[0] != hists.shape[0]:
        raise ValueError(f"M must have {hists.shape[0]} rows, one a bin of A; got shape {tuple(cost.shape)}.")
    check_weights("A", hists.T)
    check_cost("M", cost)
    hists, cost = hists.detach().double(), cost.detach().double()
    masses = hists.sum(0)
    if bool((masses - masses[0]).abs().max() > MASS_RTOL * masses[0]):
        other = masses[(masses - masses[0]).abs().argmax()].item()
        raise ValueError(f"A must have columns of equal mass; got {masses[0].item():.6g} and {other:.6g}.")
    n = hists.shape[1]
    if weights is None:
        weights = hists.new_full((n,), 1 / n)
    elif tuple(weights.shape) != (n,):
        raise ValueError(f"weights must have shape ({n},), one a column of A; got {tuple(weights.shape)}.")
    check_weights("weights", weights)
    # A histogram of weight 0 has no say, not even where its forbidden pairs are.
    weights = weights.detach().double()
    hists, weights = hists[:, weights > 0], weights[weights > 0]
    # A bin of the barycenter must be open to some bin of each histogram, and each of those to some bin of it.
    opened = cost < math.inf
    reached = (opened.double().T @ hists > 0).all(1)
    if not bool(((opened & reached).any(1) | ~(hists > 0).any(1)).all()):
        raise ValueError(
            "M must leave every bin of the histograms a way to the barycenter; forbidden pairs (+inf) do not."
        )
    return hists, cost, weights / weights.sum()


def _matrix(name: str, matrix: Tensor | None) -> Tensor:
    if matrix is None:
        raise TypeError(f"{name} must be a matrix; got None.")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must be a matrix with at least one entry; got shape {tuple(matrix.shape)}.")
    return matrix
