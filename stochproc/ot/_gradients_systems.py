r"""The linear system behind every implicit gradient of a stored transport problem, and what the backwards share.

With :math:`Q_{ij} = e^{(f_i + g_j - M_{ij})/\varepsilon}`, optimal potentials satisfy :math:`Q b = 1` and
:math:`Q^\top a = 1`. Written so, the equations also define the potentials of weights that are zero.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import scipy.sparse as sp
import torch
from torch import Tensor

from stochproc.exceptions import NumericalWarning
from stochproc.ot._laplacian import sparse_factor
from stochproc.solvers import CG, Convergence, safe_cholesky

__all__ = ["Adjoint", "centred", "gauge_fixed", "once", "positive_or_one", "report", "run_cg", "solve_adjoint"]

DENSE_UP_TO = 1000
# A direct factorisation is still bearable here where conjugate gradients are slow.
DENSE_AT_MOST = 2048
PATIENT, MAX_CG = 60, 3000
RTOL = 1e-10
# Right-hand sides are differences of sums; rounding leaves this part of them.
FLOOR = 1e-14
# Entries of the plan, relative to the weights, that the factored preconditioner keeps.
TRUNCATION = 1e-6
# What makes a Laplacian of several components invertible, relative to the weights.
RIDGE = 1e-14


class Adjoint(NamedTuple):
    """Multipliers of the equations of the rows and of the columns."""

    x: Tensor
    y: Tensor


def positive_or_one(weights: Tensor) -> Tensor:
    """Replace zero weights by one, so that divisions by them are harmless."""
    return torch.where(weights > 0, weights, 1.0)


def solve_adjoint(A: Tensor, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> Adjoint:
    r"""Solve the transposed linearised equations of the potentials.

    .. math:: x + R y = p, \qquad T^\top x + y = q

    with :math:`T_{ij} = b_j Q_{ij}` and :math:`R_{ij} = a_i Q_{ij}`.

    Parameters
    ----------
    A : Tensor of shape (*batch, n, m)
        Plan, with weights that are zero replaced by one.
    a, b : Tensor of shape (*batch, n) and (*batch, m)
    p, q : Tensor of shape (*batch, n) and (*batch, m)
        Derivatives with respect to the potentials; of equal sums, as the plan does not depend on the gauge.

    Returns
    -------
    Adjoint
        Of all solutions, which differ by multiples of (a, -b), that in which the y of positive weights sum to 0.

    Warns
    -----
    NumericalWarning
        If the solve ended short of its tolerance.
    """
    if A.shape[-2] < A.shape[-1]:
        y, x = _columns_eliminated(A.mT, b, a, q, p)
    else:
        x, y = _columns_eliminated(A, a, b, p, q)
    return gauge_fixed(x, y, a, b)


def gauge_fixed(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Adjoint:
    """Return the one solution that does not depend on how it was found."""
    t = torch.where(b > 0, y, 0.0).sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
    return Adjoint(x + t * a, y - t * b)


def _columns_eliminated(A: Tensor, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    alpha, beta = (a > 0).to(A), (b > 0).to(A)
    a_safe, b_safe = positive_or_one(a), positive_or_one(b)
    # Row sums as they are, not as they should be: T / D then has rows of sum one, and S a null space, to rounding.
    D = _nonzero(_times(A, beta) / a_safe)
    # A column of weight zero moves no row, so its equation stands alone.
    alone = (1 - beta) * q
    p = p - alpha * _times(A, alone / b_safe)
    pulled = _times(A.mT, p / (D * a_safe))
    rhs = beta * (q - pulled)
    scale = torch.linalg.vector_norm(beta * q, dim=-1) + torch.linalg.vector_norm(beta * pulled, dim=-1)
    rhs = centred(rhs, beta)
    P = A if bool((alpha > 0).all() and (beta > 0).all()) else A * alpha.unsqueeze(-1) * beta.unsqueeze(-2)
    system = _Schur(P, 1 / (a_safe * D), b)
    mu = system.solve(rhs, scale)
    y = b * mu + alone
    x = (p - alpha * _times(A, mu)) / D
    return x, y


class _Schur:
    r"""The Schur complement on the columns, S: the Laplacian of links :math:`W = P^\top \mathrm{diag}(w) P`.

    Its diagonal is the sum of the links, so that nothing cancels.
    """

    def __init__(self, P: Tensor, w: Tensor, b: Tensor) -> None:
        self.P, self.w, self.b = P, w, b
        self.degree = self.links(torch.ones_like(b))
        # Columns of weight zero have no equation here; their place on the diagonal keeps them at zero.
        self.extra = (b == 0) * (b.sum(-1, keepdim=True) / b.shape[-1])

    def links(self, v: Tensor) -> Tensor:
        return _times(self.P.mT, self.w * _times(self.P, v))

    def product(self, v: Tensor) -> Tensor:
        return (self.degree + self.extra) * v - self.links(v)

    def solve(self, rhs: Tensor, scale: Tensor) -> Tensor:
        if rhs.ndim > 1 or rhs.shape[-1] <= DENSE_UP_TO:
            return self.directly(rhs, scale)
        atol = FLOOR * float(scale)
        positive = (self.b > 0).to(self.b)
        own = self.w @ self.P.square()
        inverse = 1 / (torch.maximum(self.degree - own, 0.01 * self.degree) + self.extra)
        first = run_cg(self.product, rhs, lambda v: inverse * v, positive, atol, max_iter=PATIENT)
        if first.ok:
            return first.value
        if rhs.shape[-1] <= DENSE_AT_MOST:
            return self.directly(rhs, scale)
        second = run_cg(self.product, rhs, self.truncated_factor(), positive, atol, max_iter=MAX_CG, x0=first.value)
        if not second.ok:
            report(second.convergence)
        return second.value

    def directly(self, rhs: Tensor, scale: Tensor) -> Tensor:
        half = self.P * self.w.sqrt().unsqueeze(-1)
        S = -(half.mT @ half)
        S.diagonal(dim1=-2, dim2=-1).zero_()
        S.diagonal(dim1=-2, dim2=-1).copy_(-S.sum(-1) + self.extra + RIDGE * self.b)
        # Removes the null space: the solution then has <b, mu> = 0.
        S += (self.b / self.b.sum(-1, keepdim=True)).unsqueeze(-1) * self.b.unsqueeze(-2)
        factor = safe_cholesky(S)
        mu = torch.cholesky_solve(rhs.unsqueeze(-1), factor.value).squeeze(-1)
        left = torch.linalg.vector_norm(rhs - self.product(mu), dim=-1)
        allowed = torch.maximum(RTOL * torch.linalg.vector_norm(rhs, dim=-1), 100 * FLOOR * scale)
        if not bool((left <= allowed).all()):
            worst = int((left / allowed).nan_to_num(nan=math.inf).argmax())
            reached, asked = float(left.flatten()[worst]), float(allowed.flatten()[worst])
            report(Convergence(1, reached, asked, message="a Cholesky factor is inexact."))
            mu = mu.nan_to_num()
        return mu

    def truncated_factor(self) -> Callable[[Tensor], Tensor] | None:
        # Entries that matter to neither their row nor their column are left out.
        rows = self.P.sum(-1, keepdim=True)
        kept = self.P.gt(TRUNCATION * self.b) | self.P.gt(TRUNCATION * rows)
        at = kept.nonzero()
        values = self.P[kept].cpu().numpy()
        index = (at[:, 0].cpu().numpy(), at[:, 1].cpu().numpy())
        used, position = rows.squeeze(-1).gt(0).cpu().numpy(), rows.squeeze(-1).gt(0).cumsum(0).cpu().numpy() - 1
        matrix = sp.csr_array((values, (position[index[0]], index[1])), shape=(int(used.sum()), self.b.shape[0]))
        return sparse_factor(matrix, self.extra + 1e-10 * self.b)


def run_cg(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    precond: Callable[[Tensor], Tensor] | None,
    positive: Tensor,
    atol: float,
    *,
    max_iter: int,
    x0: Tensor | None = None,
) -> Any:
    """Solve for the columns of positive weight, to a relative residual of 1e-10 or to a given one."""
    cg = CG(rtol=RTOL, atol=atol, max_iter=max_iter, precond=precond, project=lambda v: centred(v, positive))
    return cg(product, rhs, x0)


def report(convergence: Convergence) -> None:
    """Warn that gradients are inexact."""
    warnings.warn(
        "the linear solve behind a gradient of optimal transport did not converge (residual "
        f"{convergence.residual:.3g}, asked for {convergence.tolerance:.3g}), so that this gradient is inexact: "
        f"{convergence.message}",
        NumericalWarning,
        stacklevel=2,
    )


def once(results: tuple[Tensor | None, ...], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
    """Mark the results of a backward so that differentiating them again raises, rather than lacks terms.

    torch's own ``once_differentiable`` marks nothing where the upstream gradient is a constant.
    """
    if not torch.is_grad_enabled():
        return results
    present = [s for s in sources if s is not None]
    return tuple(r if r is None else _NotTwice.apply(r, *present) for r in results)


class _NotTwice(torch.autograd.Function):
    """Identity on its first argument; differentiating it in any argument raises."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *_: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(
            "implicit gradients of plan, potentials and value_linear cannot be differentiated again; value can be "
            "differentiated twice, and grad='unroll' any number of times."
        )


def _times(A: Tensor, v: Tensor) -> Tensor:
    return (A @ v.unsqueeze(-1)).squeeze(-1)


def _nonzero(sums: Tensor) -> Tensor:
    # A row of weight zero whose costs are all infinite has no sum and no equation.
    return torch.where(sums > 0, sums, 1.0)


def centred(v: Tensor, mask: Tensor) -> Tensor:
    """Remove the mean over the entries of a mask of ones and zeros, along which S is singular."""
    return v - mask * ((v * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True))
