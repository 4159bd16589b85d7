"""The posterior process by conjugate gradients: variances with a bound on their error, and no n x n matrix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._warnings import warn_caller
from stochproc.gp._cross import as_other_points, cross_covariance
from stochproc.gp._large_system import KernelSystem, Solution, column_norms
from stochproc.gp._posterior import Posterior
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_posterior import ScalePosterior
from stochproc.kernels import matvec
from stochproc.solvers import CG

__all__ = ["LargePosterior"]

# Entries of one block of right-hand sides, n times columns: a solve keeps some ten of them, 16 MiB each.
_BLOCK_ELEMENTS = 2**21
_FEWEST_COLUMNS = 16
# Latent variances among the data are about this share of the noise; where they are less, a second pass follows.
_TYPICAL_VARIANCE = 0.1
# Residuals below this share of the right-hand side are not asked for: rounding hides them.
_SMALLEST_RESIDUAL = 1e-10


@dataclass(frozen=True)
class LargePosterior(Posterior):
    r"""The process given many data; ``LargeScaleMixtureGP.condition`` makes it.

    Parameters
    ----------
    kernel : Kernel
        A copy of the kernel.
    X : Tensor of shape (n, d)
        Training inputs.
    alpha : Tensor of shape (n, C), float64
        :math:`K_n^{-1}(y - m)`, to the tolerance of ``solver``.
    constant : Tensor of shape (C,)
        Prior mean.
    noise : Tensor, 0-dim
        Noise variance relative to s.
    scale : ScalePosterior
        The law of s given the data.
    scale_prior : ScalePrior
        A copy of the prior of s.
    single_output : bool
        Whether y was given as (n,), so that predictions are too.
    solver : CG
        Tolerance and budget of the solves for variances.
    log_marginal_likelihood : float
        Estimate of log p(y) of the data conditioned on, in nats: good for gradients, not for comparing models to
        0.1 nat.
    log_marginal_likelihood_stderr : float
        Its standard error, from the spread over the probes of the log determinant.
    converged : bool
        Whether ``alpha`` met the tolerance.
    residual : float
        Relative residual of ``alpha``; of several outputs, the largest.

    Notes
    -----
    With x an approximate solution of :math:`K_n x = k_*` and r its residual, :math:`k_{**} - x^\top(k_* + r)` exceeds
    the variance by :math:`r^\top K_n^{-1} r`, which lies between 0 and :math:`|r|^2/\mathrm{noise}`. So variances are
    never too small, never negative but for rounding, and come with a bound on their error; a column is solved until
    that bound is ``solver.rtol`` of its variance.
    """

    kernel: Any
    X: Float[Tensor, "n d"]
    alpha: Float[Tensor, "n C"]
    constant: Float[Tensor, " C"]
    noise: Float[Tensor, ""]
    scale: ScalePosterior
    scale_prior: ScalePrior
    single_output: bool
    solver: CG
    log_marginal_likelihood: float
    log_marginal_likelihood_stderr: float
    converged: bool
    residual: float

    def mean(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m *outputs"]:
        """Return the location at new inputs: one product of a kernel matrix, m n (d + C) operations.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.

        Returns
        -------
        Tensor of shape (m,) or (m, C)
            Mean where it exists, median always. Differentiable in ``X``, to any order that the kernel is.
        """
        self._check_rows(X)
        # In float64 for float32 data too: alpha is of the size of y over the noise, and cancels.
        train = self.X.double()
        product = matvec(self.kernel, as_other_points(X.double(), train), train, self.alpha)[: len(X)]
        return self._shape(product).to(X.dtype)

    def variance(self, X: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """Return the variance of the latent function before the scale.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.

        Returns
        -------
        Tensor of shape (m,)
            Multiply by s, or by ``scale.mean`` for the variance of the function. Differentiable in ``X``, once; what
            the solve lacks enters gradients to first order, values to second: with the default ``solver.rtol`` they
            were right to 1e-4 in our tests. A second derivative raises RuntimeError.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If a solve ended above its tolerance; the variances are then too large, and no less than the exact ones.
        NumericalWarning
            If a variance is below -10 eps k(x, x), an error of the solve; 0 is returned.

        Notes
        -----
        One solve a row, in blocks of max(16, 2e6 / n) rows that share the products: 20 to 200 times n² (d + rows)
        operations a block. For means alone see ``mean``.
        """
        self._check_rows(X)
        priors, values, failed = [], [], Failures()
        for rows in self._blocks(_Once.apply(X)):
            prior, _, explained = self._explained(rows, failed)
            priors.append(prior)
            values.append(prior - explained)
        failed.warn()
        return self._guarded(torch.cat(priors), torch.cat(values), "the solves are not exact enough").to(X.dtype)

    def predict(self, X: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "m *outputs"], Float[Tensor, " m"]]:
        """Return ``mean`` and ``variance`` at new inputs.

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs.
        """
        return self.mean(X), self.variance(X)

    def covariance(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
        """Return the covariance of the latent function before the scale, (m, m).

        Parameters
        ----------
        X : Tensor of shape (m, d)
            New inputs, a moderate number: columns, solutions and residuals for all of them are kept, six times n m
            numbers at the most.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            As in ``variance``, as are the derivatives.
        """
        self._check_rows(X)
        failed = Failures()
        X = _Once.apply(X)
        parts = [self._solved(rows, failed) for rows in self._blocks(X)]
        failed.warn()
        cross, x, r = (torch.cat([p[i] for p in parts], 1) for i in range(3))
        wide = X.double()
        total = self.kernel(wide, wide) - x.mT @ cross - r.mT @ x
        # One triangle decides, so that the result is symmetric to the last bit.
        return (total.tril() + total.tril(-1).mT).to(X.dtype)

    @torch.no_grad()
    def loo(self) -> Float[Tensor, " n"]:
        """Return the leave-one-out log density of each training row, jointly over its outputs.

        The hyperparameters, the mean among them, are those of all rows.

        Returns
        -------
        Tensor of shape (n,)

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If a solve ended above its tolerance.

        Notes
        -----
        The diagonal of the inverse by one solve a row, in blocks, each with a relative error of ``solver.rtol``:
        n³ times some 20 to 150 operations, so hours rather than minutes on a CPU beyond 20,000 rows.
        """
        n, failed = len(self.X), Failures()
        noise = self.noise.double()
        # (K + noise I)⁻¹ has a diagonal of at least 1/(k(x, x) + noise), which the error is held against.
        least = 1 / (self.kernel.diag(self.X).double() + noise)
        precision = torch.empty_like(least)
        for index in torch.arange(n, device=self.X.device).split(self._columns()):
            b = torch.zeros(n, len(index), dtype=torch.float64, device=self.X.device)
            b[index, torch.arange(len(index), device=b.device)] = 1.0
            wanted = (self.solver.rtol * noise * least[index]).sqrt().clamp(_SMALLEST_RESIDUAL, self.solver.rtol**0.5)
            solution = self._system.solve(b, wanted if noise > 0 else None)
            failed.add(solution)
            precision[index] = (solution.x * (b + solution.residual)).sum(0)
        failed.warn()
        return self._loo(precision)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the system, which is large with its preconditioner and made anew where it is needed."""
        return {name: value for name, value in vars(self).items() if name != "_system"}

    @functools.cached_property
    def _system(self) -> KernelSystem:
        return KernelSystem(self.kernel, self.X, self.noise, self.solver)

    def _columns(self) -> int:
        return max(_FEWEST_COLUMNS, _BLOCK_ELEMENTS // len(self.X))

    def _blocks(self, X: Tensor) -> Iterator[Tensor]:
        yield from X.split(self._columns())

    def _solved(self, rows: Tensor, failed: Failures) -> tuple[Tensor, Tensor, Tensor]:
        """Return k_*, the solution x and its residual r, whose graph is that of k_*; float64 columns."""
        cross = cross_covariance(self.kernel, rows.double(), self.X.double()).mT
        prior = self.kernel.diag(rows.double())
        with torch.no_grad():
            solution = self._certified(cross.detach(), prior.detach())
            failed.add(solution)
            product = cross - solution.residual
        # x is held fixed: k_*ᵀ K_n⁻¹ k_* has twice it as its gradient in k_*.
        return cross, solution.x, cross - product

    def _explained(self, rows: Tensor, failed: Failures) -> tuple[Tensor, Tensor, Tensor]:
        """Prior variance, k_* and what the data explain of the variance, with an error that can only lower it."""
        cross, x, r = self._solved(rows, failed)
        return self.kernel.diag(rows.double()), cross, (x * (cross + r)).sum(0)

    def _certified(self, cross: Tensor, prior: Tensor) -> Solution:
        """Solve until the bound on the error of each variance is rtol of that variance."""
        noise, rtol = self.noise.double(), self.solver.rtol
        if noise == 0:
            return self._system.solve(cross)
        least = _SMALLEST_RESIDUAL * column_norms(cross)

        def tolerance(variance: Tensor) -> Tensor:
            return (rtol * noise * variance).sqrt().maximum(least).clamp_min(torch.finfo(torch.float64).tiny)

        first = self._system.solve(cross, tolerance(_TYPICAL_VARIANCE * noise.expand_as(prior)))
        ended = first.norm > first.tolerance
        variance = (prior - (first.x * (cross + first.residual)).sum(0)).clamp_min(0)
        first = dataclasses.replace(first, tolerance=torch.minimum(first.tolerance, tolerance(variance)))
        # Where the budget ended there is nothing more to spend; the others have their own.
        short = (first.norm > first.tolerance) & ~ended
        if not bool(short.any()):
            return first
        more = self._system.solve(cross[:, short], first.tolerance[short], start=first.x[:, short])
        return first.with_columns(short, more)


class _Once(torch.autograd.Function):
    """Points in which first derivatives are right and second ones, with solutions held fixed, would be wrong."""

    @staticmethod
    def forward(ctx: Any, points: Tensor) -> Tensor:
        ctx.save_for_backward(points)
        return points.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _NotAgain.apply(grad, *ctx.saved_tensors)


class _NotAgain(torch.autograd.Function):
    """A gradient in points that cannot be differentiated in them."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, points: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "variances by conjugate gradients have no second derivatives, since solutions are held fixed; those of "
            "ScaleMixtureGP have."
        )


class Failures:
    """Solves that ended above their tolerance, to be reported once for all blocks."""

    def __init__(self) -> None:
        self.columns, self.worst, self.message = 0, 0.0, ""

    def add(self, solution: Solution) -> None:
        short = solution.norm > solution.tolerance
        if bool(short.any()):
            self.columns += int(short.sum())
            self.worst = max(self.worst, float((solution.norm / solution.size)[short].max()))
            self.message = solution.message

    def warn(self) -> None:
        """Tell the caller."""
        if self.columns:
            from sklearn.exceptions import ConvergenceWarning

            warn_caller(
                f"the solves of {self.columns} rows ended above their tolerance, with a relative residual of up to "
                f"{self.worst:.3g}, so that their variances are too large: {self.message}.",
                ConvergenceWarning,
            )
