"""Exact regression with a scale mixture of Gaussian processes, the noise inside the scale."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.exceptions import NotPositiveDefiniteError
from stochproc.gp._exact_posterior import ExactPosterior
from stochproc.gp._process import ScaleMixtureProcess
from stochproc.gp._scale_evidence import LOG_2PI, log_evidence
from stochproc.gp._scale_fit import fit_scale
from stochproc.gp._scale_posterior import scale_posterior
from stochproc.solvers import cholesky_or_raise, safe_cholesky

__all__ = ["ScaleMixtureGP"]


class ScaleMixtureGP(ScaleMixtureProcess):
    r"""A process :math:`y \mid s \sim N(m, s (K + \mathrm{noise}\, I))` with a random scale s = sigma².

    One s is shared by all inputs and outputs. With an inverse gamma prior this is a Student-t process, with
    ``Delta`` a Gaussian process.

    Parameters
    ----------
    kernel : torch.nn.Module
        ``kernel(x, y)`` gives the covariance block (n, m) of points (n, d) and (m, d), ``kernel.diag(x)`` its
        diagonal (n,).
    scale_prior : ScalePrior or str, default="inverse_gamma"
        Prior of s, or its name.
    noise : float, default=0.1
        Variance of the noise relative to s, non-negative. Zero is a fixed zero; a positive one is learned by
        fits.
    mean : {"constant", "zero"}, default="constant"
        Prior mean: one learned constant an output, starting at 0, or zero.
    n_outputs : int, default=1
        Number of outputs C. They share kernel, noise and s.

    Raises
    ------
    ValueError
        If an argument is out of range, or the name of the prior is unknown.

    Notes
    -----
    Positive hyperparameters are stored as float64 logarithms. Losses are float64 whatever the dtype of the
    data, in nats. One evaluation of a loss costs one Cholesky factor (n³/3 operations), its gradient one
    inverse from that factor (2n³/3) and one reverse pass through the kernel, whatever the number of
    hyperparameters.

    References
    ----------
    .. [1] H. Lee, E. Yun, H. Yang, J. Lee, "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022.
    .. [2] A. Shah, A. Wilson, Z. Ghahramani, "Student-t Processes as Alternatives to Gaussian Processes",
       AISTATS 2014.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import ScaleMixtureGP
    >>> from stochproc.kernels import RBF
    >>> X = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    >>> model = ScaleMixtureGP(RBF(0.3), noise=0.01, mean="zero")
    >>> posterior = model.condition(X, torch.sin(6 * X[:, 0]))
    >>> posterior.scale.df
    9.0
    """

    def log_marginal_likelihood(self, X: Float[Tensor, "n d"], y: Float[Tensor, "n *outputs"]) -> Float[Tensor, ""]:
        """Return log p(y), differentiable in all hyperparameters.

        Parameters
        ----------
        X : Tensor of shape (n, d)
            Inputs, float32 or float64.
        y : Tensor of shape (n,) or (n, C)
            Targets, of the dtype of ``X``.

        Returns
        -------
        Tensor, 0-dim, float64

        Raises
        ------
        NotPositiveDefiniteError
            If kernel matrix plus noise cannot be factored with any jitter up to the limit of ``safe_cholesky``.
            A rescue by less is silent here, as this is called in searches; ``condition`` warns of it.
        """
        targets = self._check_data(X, y)
        quad, logdet, _ = self._terms(X, self.noise, self._residual(targets), False)
        return log_evidence(self.scale_prior, targets.numel(), quad) - self.n_outputs / 2 * logdet

    def profile_loss(self, X: Float[Tensor, "n d"], y: Float[Tensor, "n *outputs"]) -> Float[Tensor, ""]:
        r"""Return the negative log p(y) of the Gaussian process, minimised over its scale and constant mean.

        Its minimiser in kernel and noise is that of ``-log_marginal_likelihood`` for every prior with a free
        scale parameter; ``fit_mean_and_scale`` then sets mean and scale.

        Parameters
        ----------
        X : Tensor of shape (n, d)
            Inputs.
        y : Tensor of shape (n,) or (n, C)
            Targets.

        Returns
        -------
        Tensor, 0-dim, float64
            :math:`\tfrac N2 (\log(2 \pi S / N) + 1) + \tfrac C2 \log\det K_n`.

        Raises
        ------
        NotPositiveDefiniteError
            As in ``log_marginal_likelihood``.
        ValueError
            If S is zero: the best scale is then zero and the likelihood unbounded.

        Notes
        -----
        The evidence as a function of the scale parameter t is :math:`S^{-N/2} g(S/t)`, so its maximum over t is
        a constant less N/2 log S. The mean is the generalised least squares one, from the same factor, if it is
        trainable; else the current one is kept.
        """
        targets = self._check_data(X, y)
        residual = self._residual(targets)
        quad, logdet, _ = self._terms(X, self.noise, residual, self._learns_mean())
        if quad.item() == 0:
            raise ValueError("y must not equal its mean exactly in every row: the best scale would be zero.")
        n_obs = targets.numel()
        return n_obs / 2 * ((quad / n_obs).log() + LOG_2PI + 1) + self.n_outputs / 2 * logdet

    def scaled_loss(
        self,
        X: Float[Tensor, "n d"],
        y: Float[Tensor, "n *outputs"],
        log_scale: Float[Tensor, ""],
        log_noise_variance: "Float[Tensor, ''] | None" = None,
    ) -> Float[Tensor, ""]:
        r"""Return the negative log p(y) of the Gaussian process with scale t, minimised over its constant mean.

        Its minimum over ``log_scale`` is ``profile_loss``. A search that sees t takes shorter steps in the
        lengthscales while t is still wrong, and is much less often caught in a poor optimum.

        Parameters
        ----------
        X : Tensor of shape (n, d)
            Inputs.
        y : Tensor of shape (n,) or (n, C)
            Targets.
        log_scale : Tensor, 0-dim
            Logarithm of t.
        log_noise_variance : Tensor, 0-dim, or None, default=None
            Logarithm of the noise variance itself, t times ``noise``; None takes the ``noise`` of the model.

        Returns
        -------
        Tensor, 0-dim, float64
            :math:`\tfrac N2 \log(2 \pi t) + \tfrac S{2t} + \tfrac C2 \log\det K_n`, in nats.

        Raises
        ------
        NotPositiveDefiniteError
            As in ``log_marginal_likelihood``.
        """
        targets = self._check_data(X, y)
        noise = self.noise if log_noise_variance is None else (log_noise_variance - log_scale).exp()
        residual = self._residual(targets)
        quad, logdet, _ = self._terms(X, noise, residual, self._learns_mean())
        fit = targets.numel() / 2 * (LOG_2PI + log_scale) + quad / 2 * (-log_scale).exp()
        return fit + self.n_outputs / 2 * logdet

    @torch.no_grad()
    def fit_mean_and_scale(self, X: Float[Tensor, "n d"], y: Float[Tensor, "n *outputs"]) -> None:
        """Set constant mean and scale parameter of the prior to their optimum for the current kernel and noise.

        What is frozen (``requires_grad=False``) or absent is kept. Parameters and errors are those of
        ``profile_loss``; zero residuals give a ``DataWarning``.
        """
        targets = self._check_data(X, y)
        residual = self._residual(targets)
        quad, _, shift = self._terms(X, self.noise, residual, self._learns_mean())
        if self._learns_mean() and self.constant_mean is not None:
            self.constant_mean += shift.to(self.constant_mean)
        if self.scale_prior.has_scale:
            fit_scale(self.scale_prior, targets.numel(), quad)

    @torch.no_grad()
    def condition(self, X: Float[Tensor, "n d"], y: Float[Tensor, "n *outputs"]) -> ExactPosterior:
        """Return the posterior process given data; later changes of this model do not touch it.

        Parameters
        ----------
        X : Tensor of shape (n, d)
            Inputs.
        y : Tensor of shape (n,) or (n, C)
            Targets.

        Raises
        ------
        NotPositiveDefiniteError
            If the matrix cannot be factored; the message has its extreme eigenvalues and the closest pair of
            points.

        Warns
        -----
        NumericalWarning
            If the factor needed jitter, with the amount.

        Notes
        -----
        n³/3 operations, memory for two n x n matrices.
        """
        targets = self._check_data(X, y)
        residual = self._residual(targets)
        matrix = _add_noise(self.kernel(X, X), self.noise)
        factor = cholesky_or_raise(matrix, "the kernel matrix plus noise", points=X)
        whitened = torch.linalg.solve_triangular(factor, residual, upper=False)
        quad = whitened.to(torch.float64).square().sum()
        if quad.item() == 0:
            # A target that equals its mean in every row is known to rounding, not to more: with S = 0 a prior with
            # mass near s = 0 would have no proper posterior.
            quad = quad + targets.numel() * torch.finfo(X.dtype).eps ** 2
        zero = torch.zeros(self.n_outputs, dtype=X.dtype, device=X.device)
        return ExactPosterior(
            kernel=copy.deepcopy(self.kernel).requires_grad_(False),
            X=X.clone(),
            factor=factor,
            alpha=torch.linalg.solve_triangular(factor.mT, whitened, upper=True),
            constant=zero if self.constant_mean is None else self.constant_mean.detach().clone().to(X),
            noise=self.noise.to(X),
            scale=scale_posterior(self.scale_prior, targets.numel(), quad),
            scale_prior=copy.deepcopy(self.scale_prior),
            single_output=y.ndim == 1,
        )

    @torch.no_grad()
    def rounding(self, X: Float[Tensor, "n d"]) -> float:
        """Relative rounding of the losses at the current hyperparameters, up to a factor.

        Parameters
        ----------
        X : Tensor of shape (n, d)
            Inputs.

        Notes
        -----
        Rounding of the matrix by eps times its diagonal changes log det and S by that times the trace of the inverse.
        """
        eps = torch.finfo(X.dtype).eps
        matrix = _add_noise(self.kernel(X, X), self.noise)
        factor = safe_cholesky(matrix)
        if not factor.ok:
            return eps
        inverse = torch.cholesky_inverse(factor.value).diagonal().mean()
        amplified = eps * float(matrix.diagonal().mean() * inverse)
        return min(amplified, 1.0) if amplified > eps else eps

    def _terms(self, X: Tensor, noise: Tensor, residual: Tensor, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
        """S and log det of kernel matrix plus noise, differentiable, and the least squares mean of the residual."""
        return _GaussianTerms.apply(self.kernel(X, X), noise, residual, shift)


def _add_noise(matrix: Tensor, noise: Tensor) -> Tensor:
    """Return a copy with noise on the diagonal: the kernel's backward pass may need the original."""
    total = matrix.detach().clone()
    total.diagonal().add_(noise.detach().to(matrix))
    return total


class _GaussianTerms(torch.autograd.Function):
    r"""S and logdet of K + noise I, and the mean shift, with a closed-form gradient.

    With :math:`\alpha = K_n^{-1} r`: :math:`dS/dK = -\alpha \alpha^\top`, :math:`dS/dr = 2 \alpha`,
    :math:`d\log\det/dK = K_n^{-1}`, :math:`d/d\mathrm{noise}` the trace of d/dK. With ``shift`` the generalised
    least squares mean of r is taken out first; S is stationary in it, so that the same formulas hold.
    """

    @staticmethod
    def forward(
        ctx: Any, matrix: Tensor, noise: Tensor, residual: Tensor, shift: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        result = safe_cholesky(_add_noise(matrix, noise))
        if not result.ok:
            raise NotPositiveDefiniteError(f"the kernel matrix plus noise: {result.convergence.message}.")
        factor = result.value
        columns = torch.cat([residual, torch.ones_like(residual[:, :1])], 1) if shift else residual
        whitened = torch.linalg.solve_triangular(factor, columns, upper=False)
        mean = residual.new_zeros(residual.shape[1])
        if shift:
            ones, whitened = whitened[:, -1:], whitened[:, :-1]
            mean = (ones.mT @ whitened)[0] / ones.square().sum()
            whitened = whitened - ones * mean
        alpha = torch.linalg.solve_triangular(factor.mT, whitened, upper=True)
        ctx.save_for_backward(factor, alpha)
        ctx.noise_dtype = noise.dtype
        quad = whitened.to(torch.float64).square().sum()
        logdet = 2 * factor.diagonal().to(torch.float64).log().sum()
        ctx.mark_non_differentiable(mean)
        return quad, logdet, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_quad: Tensor, g_logdet: Tensor, _: Tensor) -> tuple[Any, ...]:
        factor, alpha = ctx.saved_tensors
        gradient = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            gradient = torch.cholesky_inverse(factor).mul_(g_logdet.to(factor))
            gradient.addmm_(alpha, alpha.mT * -g_quad.to(factor))
        g_noise = gradient.diagonal().sum().to(ctx.noise_dtype) if gradient is not None else None
        # LAPACK's inverse is stored by columns and the kernel matrix by rows; their product entry by entry took 14
        # times as long at n = 2000. The matrix is symmetric, so its transpose is the same gradient.
        by_rows = None if gradient is None else gradient.mT
        return by_rows, g_noise, 2 * g_quad.to(alpha) * alpha, None
