"""Regression beyond some thousand points: the scale mixture by products with the kernel matrix alone."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._warnings import warn_caller
from stochproc.exceptions import NotPositiveDefiniteError, NumericalWarning
from stochproc.gp._exact import ScaleMixtureGP
from stochproc.gp._large_posterior import LargePosterior
from stochproc.gp._large_system import DEFAULT_CG, KernelSystem, Solution, check_cg
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_evidence import LOG_2PI, log_evidence
from stochproc.gp._scale_fit import fit_scale
from stochproc.gp._scale_posterior import scale_posterior
from stochproc.kernels import Kernel, as_kernel
from stochproc.solvers import CG, Estimate, LanczosLogdet, Result, Status

__all__ = ["LargeScaleMixtureGP"]


class LargeScaleMixtureGP(ScaleMixtureGP):
    r"""A ``ScaleMixtureGP`` whose kernel matrix is never formed: memory O(n), exact in the limit of the tolerance.

    S and predictions come from preconditioned conjugate gradients, the log determinant from stochastic Lanczos
    quadrature. Everything else, the law of s above all, is that of :class:`ScaleMixtureGP`.

    Parameters
    ----------
    kernel : Kernel, str, gpytorch.kernels.Kernel or callable
        Whatever ``stochproc.kernels.as_kernel`` takes; not copied.
    scale_prior : ScalePrior or str, default="inverse_gamma"
        Prior of s, or its name.
    noise : float, default=0.1
        Variance of the noise relative to s, non-negative. With zero the solves may not converge.
    mean : {"constant", "zero"}, default="constant"
        Prior mean.
    n_outputs : int, default=1
        Number of outputs C.
    solver : CG, default=CG()
        ``rtol`` (1e-6) bounds the residual of :math:`K_n \alpha = y - m` relative to its right-hand side, and the
        relative error of predictive variances; ``max_iter`` is the budget of each solve. ``precond="auto"`` is
        ``PivotedCholesky(rank=100)``; None, ``Nystrom`` and ``Jacobi`` work too. Their diagonal is at least a tenth of
        the mean of what the low rank leaves of the kernel's.
    logdet : LanczosLogdet, default=LanczosLogdet()
        Probes, steps and seed of the log determinant and its gradient.

    Raises
    ------
    TypeError
        If ``solver`` or ``logdet`` is of another kind, or the preconditioner is fixed.
    ValueError
        If an argument is out of range.

    Notes
    -----
    A product costs n² (d + columns) operations, a solve 20 to 150 of them for a noise of 1e-1 to 1e-4 of the
    kernel's diagonal, a log determinant ``logdet.steps`` (50) with ``logdet.probes`` (16) columns. Losses have the
    standard error of the log determinant: some nats with the defaults. Equal probes give a search a deterministic
    function, whose gradient is unbiased but not exactly its own: a search ends where the two part, some tenths of a
    nat from the optimum in our tests. Float32
    data are solved by float32 products, corrected by float64 ones. A loss whose solve ended above its tolerance is
    silent, as it is called in searches; ``condition`` warns.

    References
    ----------
    .. [1] J. Gardner, G. Pleiss, D. Bindel, K. Weinberger, A. Wilson, "GPyTorch: Blackbox Matrix-Matrix Gaussian
       Process Inference with GPU Acceleration", NeurIPS 2018.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import LargeScaleMixtureGP
    >>> from stochproc.kernels import RBF
    >>> X = torch.linspace(0, 1, 300, dtype=torch.float64)[:, None]
    >>> posterior = LargeScaleMixtureGP(RBF(0.3), noise=0.01).condition(X, torch.sin(6 * X[:, 0]))
    >>> posterior.converged, posterior.scale.df
    (True, 304.0)
    """

    kernel: Kernel

    def __init__(
        self,
        kernel: Any,
        scale_prior: ScalePrior | str = "inverse_gamma",
        *,
        noise: float | int = 0.1,
        mean: str = "constant",
        n_outputs: int = 1,
        solver: CG = DEFAULT_CG,
        logdet: LanczosLogdet | None = None,
    ) -> None:
        super().__init__(as_kernel(kernel), scale_prior, noise=noise, mean=mean, n_outputs=n_outputs)
        self.solver = check_cg(solver)
        if not isinstance(logdet, (LanczosLogdet, type(None))):
            raise TypeError(f"logdet must be a LanczosLogdet object; got {type(logdet).__name__}.")
        self.logdet = LanczosLogdet() if logdet is None else logdet
        # The last solution of fit_mean_and_scale, and why it ended early, if it did.
        self._alpha: Tensor | None = None
        self._short = ""
        self._loss = 0.0

    def exact(self) -> ScaleMixtureGP:
        """Return the model by Cholesky factors that shares every hyperparameter with this one."""
        twin = ScaleMixtureGP(
            self.kernel,
            self.scale_prior,
            mean="zero" if self.constant_mean is None else "constant",
            n_outputs=self.n_outputs,
        )
        twin.log_noise, twin.constant_mean = self.log_noise, self.constant_mean
        return twin

    @torch.enable_grad()
    def rounding(self, X: Float[Tensor, "n d"]) -> float:
        """Square of the relative gradient that the estimate of the loss cannot tell from zero.

        It is what two more sets of probes make of the gradient of log det: three times their largest difference.

        Parameters
        ----------
        X : Tensor of shape (n, d)
            Inputs.
        """
        learned = [p for p in (*self.kernel.parameters(), self.log_noise) if p.requires_grad]
        if not learned:
            return torch.finfo(X.dtype).eps
        system = KernelSystem(self.kernel, X, self.noise, self.solver)
        gradients = []
        for more in (1, 2):
            probes = dataclasses.replace(self.logdet, seed=self.logdet.seed + more)
            value = self.n_outputs / 2 * probes(system.matrix, system.preconditioner).value.value
            gradients.append(torch.autograd.grad(value, learned, retain_graph=True, allow_unused=True))
        pairs = zip(*gradients, strict=True)
        hidden = 3 * max((float((a - b).abs().max()) for a, b in pairs if a is not None), default=0.0)
        return max((hidden / max(1.0, abs(self._loss))) ** 2, torch.finfo(X.dtype).eps)

    @torch.no_grad()
    def fit_mean_and_scale(
        self,
        X: Float[Tensor, "n d"],
        y: Float[Tensor, "n *outputs"],
        *,
        progress: Callable[[int, float], None] | None = None,
    ) -> None:
        """Set constant mean and scale parameter of the prior to their optimum for the current kernel and noise.

        The mean is the generalised least squares one, one more column of the same solve. If that ends above its
        tolerance, ``condition`` says so.

        Parameters
        ----------
        X : Tensor of shape (n, d)
            Inputs.
        y : Tensor of shape (n,) or (n, C)
            Targets.
        progress : callable, default=None
            As in ``condition``.

        Raises
        ------
        NotPositiveDefiniteError
            If a solve finds the matrix indefinite or not finite.

        Warns
        -----
        DataWarning
            If all residuals are zero.
        """
        targets = self._check_data(X, y)
        system = KernelSystem(self.kernel, X, self.noise, self.solver)
        residual = self._residual(targets).double()
        solution = system.solve(self._with_ones(residual), progress=progress)
        alpha, r, b, shift = self._centred(residual, solution)
        if self._learns_mean() and self.constant_mean is not None:
            self.constant_mean += shift.to(self.constant_mean)
        if self.scale_prior.has_scale:
            fit_scale(self.scale_prior, targets.numel(), _quad(b, alpha, r))
        # What follows is most likely conditioning on the same data, which is then solved already.
        sets = self._learns_mean() or self.scale_prior.has_scale
        self._alpha, self._short = alpha, solution.message if sets and not solution.ok else ""

    @torch.no_grad()
    def condition(  # type: ignore[override]  # another posterior, with the same methods
        self,
        X: Float[Tensor, "n d"],
        y: Float[Tensor, "n *outputs"],
        *,
        progress: Callable[[int, float], None] | None = None,
    ) -> LargePosterior:
        """Return the posterior process given data; later changes of this model do not touch it.

        Parameters
        ----------
        X : Tensor of shape (n, d)
            Inputs.
        y : Tensor of shape (n,) or (n, C)
            Targets.
        progress : callable, default=None
            Called with the iterations done and the largest ratio of a residual to its tolerance.

        Raises
        ------
        NotPositiveDefiniteError
            If a solve finds the matrix indefinite or not finite.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If the budget ended, or rounding stopped the solve, above the tolerance; with the residual reached. The same
            of the solve of a ``fit_mean_and_scale`` before.
        NumericalWarning
            If the log determinant has an error beyond its standard error.
        """
        targets = self._check_data(X, y)
        system = KernelSystem(self.kernel, X, self.noise.detach(), self.solver)
        residual = self._residual(targets).double()
        start = self._alpha
        if start is not None and (start.shape, start.device) != (residual.shape, residual.device):
            start = None
        solution = system.solve(residual, start=start, progress=progress)
        if not solution.ok:
            _warn_of_solve("the solve with kernel matrix plus noise", solution.message)
        elif self._short:
            _warn_of_solve("the solve that set mean and scale", self._short)
        quad = _quad(residual, solution.x, solution.residual)
        if quad.item() <= 0:
            # As in the exact model: known to rounding, not to more.
            quad = targets.numel() * torch.finfo(X.dtype).eps ** 2 + torch.zeros_like(quad)
        logdet = self.logdet(system.matrix.detach(), system.preconditioner)
        _warn_of_logdet(logdet)
        evidence = log_evidence(self.scale_prior, targets.numel(), quad)
        zero = torch.zeros(self.n_outputs, dtype=X.dtype, device=X.device)
        half = self.n_outputs / 2
        return LargePosterior(
            kernel=copy.deepcopy(self.kernel).requires_grad_(False),
            X=X.clone(),
            alpha=solution.x,
            constant=zero if self.constant_mean is None else self.constant_mean.detach().clone().to(X),
            noise=self.noise.detach().to(X),
            scale=scale_posterior(self.scale_prior, targets.numel(), quad),
            scale_prior=copy.deepcopy(self.scale_prior),
            single_output=y.ndim == 1,
            solver=self.solver,
            log_marginal_likelihood=evidence.item() - half * logdet.value.value.item(),
            log_marginal_likelihood_stderr=half * logdet.value.stderr.item(),
            converged=solution.ok and not self._short,
            residual=solution.relative_residual,
        )

    def _terms(self, X: Tensor, noise: Tensor, residual: Tensor, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
        r"""S, log det and mean shift on the graph.

        With x held fixed, :math:`2 x^\top b - x^\top A x` is stationary in x at the solution: it has the value of S to
        second order in the residual, and its gradient in b and A to first, so that no backward solve is needed.
        """
        system = KernelSystem(self.kernel, X, noise, self.solver)
        solution = system.solve(self._with_ones(residual.detach().double(), shift))
        alpha, _, _, mean = self._centred(residual.detach().double(), solution, shift)
        b = residual.double() - mean
        x = alpha.to(X)
        quad = 2 * (alpha * b).sum() - (x * (system.matrix @ x)).double().sum()
        logdet = self.logdet(system.matrix, system.preconditioner)
        if logdet.status in (Status.BREAKDOWN, Status.NONFINITE):
            raise NotPositiveDefiniteError(f"the kernel matrix plus noise: {logdet.convergence.message}.")
        if quad.item() < 0:
            raise NotPositiveDefiniteError("the kernel matrix plus noise: the solve ended far from its tolerance.")
        n_obs, half = residual.numel(), self.n_outputs / 2
        variance = max(quad.item(), 1e-300) / n_obs
        self._loss = n_obs / 2 * (math.log(variance) + LOG_2PI + 1) + half * logdet.value.value.item()
        return quad, logdet.value.value.double(), mean.to(residual)

    def _with_ones(self, residual: Tensor, wanted: bool = True) -> Tensor:
        if not (wanted and self._learns_mean()):
            return residual
        return torch.cat([residual, torch.ones_like(residual[:, :1])], 1)

    def _centred(
        self, residual: Tensor, solution: Solution, wanted: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Solution, its residual, the right-hand side and the shift, with the least squares mean taken out."""
        x, r = solution.x, solution.residual
        if not (wanted and self._learns_mean()):
            return x, r, residual, residual.new_zeros(residual.shape[1])
        ones = x[:, -1:]
        shift = (ones * residual).sum(0) / ones.sum()
        return x[:, :-1] - shift * ones, r[:, :-1] - shift * r[:, -1:], residual - shift, shift


def _quad(b: Tensor, x: Tensor, r: Tensor) -> Float[Tensor, ""]:
    """S = bᵀ A⁻¹ b less rᵀ A⁻¹ r: the error is of second order in the residual."""
    return (x * (b + r)).sum()


def _warn_of_solve(which: str, message: str) -> None:
    from sklearn.exceptions import ConvergenceWarning

    warn_caller(f"{which}: {message}.", ConvergenceWarning)


def _warn_of_logdet(logdet: Result[Estimate]) -> None:
    if not logdet.ok:
        warn_caller(
            f"the estimate of log p(y) is worse than its standard error: {logdet.convergence.message}.",
            NumericalWarning,
        )
