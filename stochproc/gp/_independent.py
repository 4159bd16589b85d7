"""Exact regression with a scale mixture of Gaussian processes, the noise outside the scale."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._warnings import warn_caller
from stochproc.exceptions import NumericalWarning
from stochproc.gp._independent_posterior import IndependentPosterior
from stochproc.gp._independent_scale import given_scale
from stochproc.gp._independent_spectrum import NodeLikelihood, SpectralLikelihood, decompose
from stochproc.gp._process import ScaleMixtureProcess
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_mixture import Mixture

__all__ = ["IndependentNoiseGP"]


class IndependentNoiseGP(ScaleMixtureProcess):
    r"""A process :math:`y \mid s \sim N(m, s K + \mathrm{noise}\, I)` with a random scale s = sigma².

    The scale multiplies the function and not the noise, whose variance is known or learned: data of a known
    instrument, or a function whose size is in doubt while that of the noise is not. With noise 0, and with
    ``Delta``, this is the process of ``ScaleMixtureGP`` in other words.

    Parameters
    ----------
    kernel : torch.nn.Module
        ``kernel(x, y)`` gives the covariance block (n, m) of points (n, d) and (m, d), ``kernel.diag(x)`` its
        diagonal (n,).
    scale_prior : ScalePrior or str, default="inverse_gamma"
        Prior of s, or its name.
    noise : float, default=0.1
        Variance of the noise in squared units of y, non-negative. Zero is a fixed zero; a positive one is learned
        by fits.
    mean : {"constant", "zero"}, default="constant"
        Prior mean: one learned constant an output, starting at 0, or zero.
    n_outputs : int, default=1
        Number of outputs C. They share kernel, noise and s.

    Raises
    ------
    ValueError
        If an argument is out of range, the name of the prior is unknown, or the prior is a ``Mixture`` with a
        ``Delta`` in it.

    See Also
    --------
    ScaleMixtureGP : The noise inside the scale; one Cholesky factor, and for an inverse gamma prior closed forms.

    Notes
    -----
    One eigendecomposition of the kernel matrix (some 10 n³ operations) serves all scales at O(n) each; s is
    integrated over by the trapezoid rule in log s, 129 nodes and more until two levels agree to 1e-12. The
    gradient takes two products of n x n matrices and one reverse pass through the kernel, whatever the number of
    hyperparameters. Predictions take n² operations a row, the mean alone n.

    As s tends to 0 the likelihood tends to that of noise alone, not to 0: a prior with mass near s = 0 keeps it, and
    E[1/s | y] may be infinite.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import IndependentNoiseGP
    >>> from stochproc.kernels import RBF
    >>> X = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    >>> model = IndependentNoiseGP(RBF(0.3), "half_cauchy", noise=0.01, mean="zero")
    >>> posterior = model.condition(X, torch.sin(6 * X[:, 0]))
    >>> posterior.predictive(X[:1]).quantile([0.05, 0.95]).shape
    torch.Size([1, 2])
    """

    def __init__(
        self,
        kernel: torch.nn.Module,
        scale_prior: "ScalePrior | str" = "inverse_gamma",
        *,
        noise: "float | int" = 0.1,
        mean: str = "constant",
        n_outputs: int = 1,
    ) -> None:
        super().__init__(kernel, scale_prior, noise=noise, mean=mean, n_outputs=n_outputs)
        prior = self.scale_prior
        if isinstance(prior, Mixture) and prior._has_point():
            raise ValueError(
                f"scale_prior must have a density or be a Delta where the noise is outside the scale; got {prior!r}."
            )

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
            If the kernel matrix has negative eigenvalues beyond the largest jitter of ``safe_cholesky``, or, without
            noise, is singular to that degree. A rescue by less is silent here, as this is called in searches;
            ``condition`` warns of it.
        ValueError
            If the integral over s diverges: no noise, and a target that equals its mean in every row.

        Warns
        -----
        NumericalWarning
            If the quadrature over s has not converged to 1e-12.
        """
        targets = self._check_data(X, y)
        prior = self.scale_prior
        known = prior.log_value if prior._conjugate == "point" else None
        value, log_s, log_step = NodeLikelihood.apply(
            self.kernel(X, X), self.noise, self._residual(targets), known, prior
        )
        if known is not None:
            return value[0]
        return torch.logsumexp(prior._log_prob_u(log_s) + value + log_step, 0)

    @torch.no_grad()
    def condition(self, X: Float[Tensor, "n d"], y: Float[Tensor, "n *outputs"]) -> IndependentPosterior:
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
            As in ``log_marginal_likelihood``.

        Warns
        -----
        NumericalWarning
            If the matrix needed jitter, with the amount, or the quadrature over s has not converged.
        """
        targets = self._check_data(X, y)
        residual = self._residual(targets)
        matrix = self.kernel(X, X)
        noise = self.noise.to(dtype=torch.float64, device=X.device)
        spectrum = decompose(matrix, noise_free=noise.item() == 0)
        if spectrum.jitter:
            warn_caller(
                f"the kernel matrix is positive {'semi-' * (noise.item() > 0)}definite only with jitter "
                f"{spectrum.jitter:.3g} times its mean diagonal; more noise or fewer near-duplicate points would "
                "avoid it.",
                NumericalWarning,
            )
        rotated = (spectrum.vectors.mT @ residual).to(torch.float64)
        squares = rotated.square().sum(1)
        if noise.item() == 0 and squares.sum().item() == 0:
            # A target that equals its mean in every row is known to rounding, not to more; without noise a prior
            # with mass near s = 0 would have no proper posterior.
            squares = squares + self.n_outputs * torch.finfo(X.dtype).eps ** 2
        likelihood = SpectralLikelihood(spectrum.values, squares, noise, self.n_outputs)
        scale, log_evidence = given_scale(copy.deepcopy(self.scale_prior), likelihood)
        zero = torch.zeros(self.n_outputs, dtype=X.dtype, device=X.device)
        return IndependentPosterior(
            kernel=copy.deepcopy(self.kernel).requires_grad_(False),
            X=X.clone(),
            vectors=spectrum.vectors,
            rotated=rotated,
            likelihood=likelihood,
            constant=zero if self.constant_mean is None else self.constant_mean.detach().clone().to(X),
            noise=noise.to(X),
            scale=scale,
            scale_prior=copy.deepcopy(self.scale_prior),
            log_evidence=log_evidence,
            single_output=y.ndim == 1,
        )
