"""Conjugate gradients for the inner solves of Newton methods: one vector, few words, the last iterate."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_floating, check_integer, check_positive
from stochproc.solvers._result import Convergence, Result, Status

__all__ = ["truncated_cg"]

Map = Callable[[Tensor], Tensor]


def truncated_cg(
    product: Map,
    b: Float[Tensor, " n"],
    *,
    precond: "Map | None" = None,
    project: "Map | None" = None,
    rtol: "float | int" = 0.1,
    max_iter: int = 300,
) -> Result[Tensor]:
    r"""Solve :math:`A x \approx b` as far as a Newton step needs it.

    Differs from ``CG`` in three ways. It returns its last iterate, which has the lowest energy
    :math:`\tfrac12 x^\top A x - b^\top x` of all and is a direction of ascent of :math:`b^\top x`, where the residual
    of a nearly singular system may never fall below that of zero; it believes its recursion; and an iteration has
    no bookkeeping beyond three inner products.

    Parameters
    ----------
    product : callable
        A times a vector; A is symmetric and positive semidefinite.
    b : Tensor of shape (n,)
        float32 or float64.
    precond : callable, default=None
        Symmetric positive definite approximation of the inverse of A; None is the identity.
    project : callable, default=None
        Orthogonal projection off a known null space, applied to b, products and preconditioned residuals.
    rtol : float, default=0.1
        Relative to the norm of the projected b.
    max_iter : int, default=300

    Returns
    -------
    Result[Tensor]
        ``status`` is ``CONVERGED``, ``MAX_ITER``, ``BREAKDOWN`` (curvature that is not positive: the iterate
        before it, or the preconditioned b if it is the first) or ``NONFINITE`` (the iterate before). None of them is
        a failure of a Newton method. The residual reported is that of the recursion.

    Raises
    ------
    TypeError
        If b is not a float32 or float64 tensor.
    ValueError
        If rtol is not positive or ``max_iter`` less than 1.

    Notes
    -----
    An iteration costs one product, one application of the preconditioner, and on CUDA two synchronisations. Not
    differentiable.

    References
    ----------
    .. [1] J. Nocedal and S. Wright, "Numerical Optimization", 2nd edition, 2006, algorithm 7.1.

    Examples
    --------
    >>> import torch
    >>> d = torch.tensor([1.0, 2.0, 4.0])
    >>> result = truncated_cg(lambda p: d * p, torch.ones(3), rtol=1e-5)
    >>> result.value, result.convergence.iterations
    (tensor([1.0000, 0.5000, 0.2500]), 3)
    """
    check_floating(b=b)
    check_positive("rtol", rtol)
    check_integer("max_iter", max_iter, 1)
    with torch.no_grad():
        return _solve(product, b.detach(), precond or _same, project or _same, float(rtol), max_iter)


def _solve(product: Map, b: Tensor, precond: Map, project: Map, rtol: float, max_iter: int) -> Result[Tensor]:
    r = project(b).clone()
    x = torch.zeros_like(r)
    norm = float(torch.linalg.vector_norm(r))
    tol = rtol * norm
    if norm == 0:
        return Result(x, Status.CONVERGED, Convergence(0, 0.0, 0.0))
    z = project(precond(r))
    p, rz = z.clone(), float(torch.dot(r, z))
    status, k = Status.MAX_ITER, 0
    for k in range(1, max_iter + 1):
        Ap = project(product(p))
        curvature = float(torch.dot(p, Ap))
        if not (curvature > 0 and rz > 0 and math.isfinite(curvature) and math.isfinite(rz)):
            finite = math.isfinite(curvature) and math.isfinite(rz)
            status, k = Status.BREAKDOWN if finite else Status.NONFINITE, k - 1
            # At a point without curvature the steepest direction, in the metric of the preconditioner.
            x = z if finite and k == 0 else x
            break
        step = rz / curvature
        x.add_(p, alpha=step)
        r.sub_(Ap, alpha=step)
        norm = float(torch.linalg.vector_norm(r))
        if norm <= tol:
            status = Status.CONVERGED
            break
        z = project(precond(r))
        old, rz = rz, float(torch.dot(r, z))
        p.mul_(rz / old).add_(z)
    return Result(x, status, Convergence(k, norm, tol))


def _same(x: Tensor) -> Tensor:
    return x
