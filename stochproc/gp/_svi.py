r"""Sparse variational inference with a shared random scale, for likelihoods that are not Gaussian."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stochproc._checks import check_choice, check_finite, check_floating, check_integer, check_positive, check_same_kind
from stochproc.exceptions import NotPositiveDefiniteError, NumericalWarning
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_priors import as_scale_prior
from stochproc.gp._svi_covariance import covariance_family
from stochproc.gp._svi_links import LatentMarginals, ScaledGaussian, as_link
from stochproc.gp._svi_scale import Coupled, scale_family
from stochproc.solvers import cholesky_or_raise, safe_cholesky

__all__ = ["ScaleMixtureSVGP"]

# Added to the diagonal of K(Z, Z), relative to its mean: the inducing variables are f(Z) with that much noise, so the
# bound stays one. Without it the rounding of a matrix of near-duplicates would decide about jitter step by step.
_JITTER = {torch.float32: 1e-5, torch.float64: 1e-8}
_BLOCK_ELEMENTS = 2**20


class ScaleMixtureSVGP(torch.nn.Module):
    r"""A classifier with latent processes :math:`f_c \mid s \sim GP(0, s K)` and a variational posterior.

    With :math:`L L^\top = K(Z, Z)`, :math:`u_c = f_c(Z) = L v_c`, the posterior is approximated by

    .. math:: q(v_c \mid s) = N(g(s) \mu_c, s\, C_c), \qquad q(s) \text{ inverse gamma or log-normal},

    one s for all classes and all points. Its parameters, Z, the kernel and the scale of the prior are learned by
    maximising :meth:`elbo`, a lower bound of log p(y).

    Parameters
    ----------
    kernel : Kernel
        ``kernel(x, y)`` gives covariance blocks, ``kernel.diag(x)`` the diagonal. Shared by the classes; its scale
        should be fixed, as s is the same degree of freedom.
    inducing_points : Tensor of shape (m, d)
        Where Z starts, float32 or float64. Their dtype is that of the computation.
    n_classes : int, default=2
        Number of classes C (of outputs for ``ScaledGaussian``).
    scale_prior : ScalePrior or str, default="inverse_gamma"
        Prior of s. Under ``Delta`` this is an ordinary sparse variational Gaussian process.
    link : {"softmax", "robustmax", "logit", "probit"}, default="softmax"
        How classes depend on the latent functions. The last two take two classes and one latent function.
    coupling : {"scaled", "fixed"}, default="scaled"
        g(s) = sqrt(s), so that the mean grows with the scale as the prior does, or 1, as in [1]_, whose bound is
        looser.
    covariance : {"auto", "full", "diag", "lowrank"}, default="auto"
        Form of C_c. "auto" is full for m <= 256, diagonal above; "lowrank" lets the precision differ from a diagonal
        one in ``rank`` directions.
    rank : int, default=20
        Used by "lowrank" only.
    scale_family : {"inverse_gamma", "lognormal"}, default="inverse_gamma"
        Form of q(s).
    jitter : float or None, default=None
        Variance added to the diagonal of K(Z, Z), relative to its mean; part of the approximation. None is 1e-8 in
        float64, 1e-5 in float32.

    Raises
    ------
    ValueError
        If an argument is out of range or misshapen.

    Notes
    -----
    A step on B points costs one m x m Cholesky factor and O(C B m^2); nothing of size B x B or n is formed.

    References
    ----------
    .. [1] H. Lee, E. Yun, H. Yang, J. Lee, "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022.
    .. [2] J. Hensman, A. Matthews, Z. Ghahramani, "Scalable Variational Gaussian Process Classification", AISTATS
       2015.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import ScaleMixtureSVGP
    >>> from stochproc.kernels import RBF
    >>> X = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    >>> y = (X[:, 0] > 0).long()
    >>> model = ScaleMixtureSVGP(RBF(1.0), X[::4].clone(), link="logit")
    >>> model.start(X, y)
    >>> model.log_proba(X[:1]).exp().argmax().item()
    0
    >>> bool(model.elbo(X, y) < 0)
    True
    """

    def __init__(
        self,
        kernel: torch.nn.Module,
        inducing_points: Float[Tensor, "m d"],
        n_classes: int = 2,
        scale_prior: ScalePrior | str = "inverse_gamma",
        *,
        link: Any = "softmax",
        coupling: str = "scaled",
        covariance: str = "auto",
        rank: int = 20,
        scale_family: str = "inverse_gamma",
        jitter: float | int | None = None,
    ) -> None:
        super().__init__()
        check_floating(inducing_points=inducing_points)
        if inducing_points.ndim != 2 or not len(inducing_points):
            raise ValueError(f"inducing_points must have shape (m, d), m >= 1; got {tuple(inducing_points.shape)}.")
        check_finite("inducing_points", inducing_points)
        check_choice("coupling", coupling, ("scaled", "fixed"))
        if jitter is not None:
            check_positive("jitter", jitter, zero=True)
        self.link = as_link(link)
        check_integer("n_classes", n_classes, 1 if isinstance(self.link, ScaledGaussian) else 2)
        self.n_classes, self.coupling = n_classes, coupling
        n_latent, m = self.link.n_latent(n_classes), len(inducing_points)
        self.kernel = kernel
        self.scale_prior = as_scale_prior(scale_prior)
        self.scale_posterior = _scale_family(scale_family, self.scale_prior)
        self.covariance = covariance_family(covariance, n_latent, m, rank).to(inducing_points)
        self.inducing_points = torch.nn.Parameter(inducing_points.detach().clone())
        self.mean = torch.nn.Parameter(inducing_points.new_zeros(n_latent, m))
        self.jitter = _JITTER[inducing_points.dtype] if jitter is None else float(jitter)

    @property
    def _coupled(self) -> Coupled:
        """The law of the scale and of the means that follow it."""
        return Coupled(self.scale_posterior, self.coupling)

    def elbo(
        self,
        X: Float[Tensor, "batch d"],
        y: Shaped[Tensor, "batch *outputs"],
        *,
        n_total: float | int | None = None,
        weight: Float[Tensor, " batch"] | None = None,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return an unbiased estimate of the lower bound of log p(y), differentiable in every parameter.

        Parameters
        ----------
        X : Tensor of shape (B, d)
            All rows or a random batch of them.
        y : Tensor of shape (B,)
            Classes 0 to C - 1, integer; for ``ScaledGaussian`` real targets (B, C).
        n_total : int or None, default=None
            Number of rows of which these are a batch; None means that they are all.
        weight : Tensor of shape (B,) or None, default=None
            How often each row counts, non-negative; None is once.
        n_samples : int, default=100
            Monte-Carlo samples of the softmax, rounded up to an even number. Each has one scale for all classes and
            points. Scales are drawn one in each stratum of equal probability, latent values in pairs that mirror each
            other. The other links are integrated by quadrature and ignore it.
        generator : torch.Generator or None, default=None
            Source of randomness, on the CPU.

        Returns
        -------
        Tensor, 0-dim, float64
            In nats.

        Raises
        ------
        ValueError
            If an argument is misshapen, not finite or out of range.
        NotPositiveDefiniteError
            If K(Z, Z) cannot be factored with any admissible jitter.
        """
        targets, weight = self._check_data(X, y), _checked_weight(weight, X)
        check_integer("n_samples", n_samples, 1)
        if n_total is not None:
            check_positive("n_total", n_total)
        at, trace, logdet = self._marginals(X, self._factor(check=True))
        fit = self.link.expected(at, self._coupled, targets, weight, n_samples, generator)
        share = 1.0 if n_total is None else n_total / len(X)
        return share * fit.double() - self._divergence(trace, logdet)

    def kl(self) -> Float[Tensor, ""]:
        """Return the divergence of q(v, s) from the prior, in nats."""
        terms = self.covariance.terms(self.inducing_points.new_zeros(len(self.inducing_points), 0))
        return self._divergence(terms.trace, terms.logdet)

    def marginals(self, X: Float[Tensor, "n d"]) -> LatentMarginals:
        """Return the latent law at points: f_c | s is N(g(s) mean_c, s variance_c).

        Parameters
        ----------
        X : Tensor of shape (n, d)

        Returns
        -------
        LatentMarginals
            ``mean`` and ``variance``, each of shape (C, n); both differentiable.

        Warns
        -----
        NumericalWarning
            If K(Z, Z) needed more jitter than ``jitter``, or a variance is negative beyond rounding; it is then
            taken as 0.
        """
        self._check_points(X)
        factor = self._factor(check=False)
        blocks = [self._marginals(rows, factor, report=True)[0] for rows in X.split(self._block_rows(1))]
        return LatentMarginals(*(torch.cat(parts, 1) for parts in zip(*blocks, strict=True)))

    @torch.no_grad()
    def log_proba(
        self, X: Float[Tensor, "n d"], *, n_samples: int = 1000, seed: int = 0
    ) -> Float[Tensor, "n n_classes"]:
        """Return log probabilities of the classes, averaged over q.

        Parameters
        ----------
        X : Tensor of shape (n, d)
        n_samples : int, default=1000
            Quasi-random draws of scale and latent values (softmax only), the same for every row, so that a row's
            answer does not depend on the others.
        seed : int, default=0
            Of the quasi-random sequence.

        Returns
        -------
        Tensor of shape (n, C)
        """
        check_integer("n_samples", n_samples, 1)
        at = self.marginals(X)
        rows = self._block_rows(n_samples * self.n_classes)
        parts = [
            self.link.log_proba(LatentMarginals(m, v), self._coupled, n_samples, seed)
            for m, v in zip(at.mean.split(rows, 1), at.variance.split(rows, 1), strict=True)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def start(
        self,
        X: Float[Tensor, "n d"],
        y: Shaped[Tensor, "n *outputs"],
        *,
        weight: Float[Tensor, " n"] | None = None,
    ) -> None:
        """Set mean and covariance of q(v | s) by one Newton step from the prior, at the median scale, in place.

        Parameters
        ----------
        X, y, weight
            All rows; see :meth:`elbo`.

        Notes
        -----
        O(n m^2), in blocks of rows.
        """
        targets, weight = self._check_data(X, y), _checked_weight(weight, X)
        scale = self.scale_posterior.log_quantile(torch.zeros(1, dtype=torch.float64, device=X.device)).exp().item()
        gradient, curvature = self.link.first_step(targets, len(self.mean), scale)
        gradient = gradient.to(X) * weight
        factor = self._factor(check=False)
        m = len(self.inducing_points)
        H, slope = torch.eye(m, dtype=X.dtype, device=X.device), X.new_zeros(m, len(self.mean))
        for rows in torch.arange(len(X), device=X.device).split(self._block_rows(1)):
            A, _ = self._features(X[rows], factor)
            H.addmm_(A * weight[rows], A.mT, alpha=scale * curvature)
            slope.addmm_(A, gradient[:, rows].mT)
        H = (H + H.mT) / 2
        solved = torch.linalg.solve(H, slope * math.sqrt(scale))
        # v = sqrt(s) mu for either coupling, at the scale of the step.
        self.mean.copy_((solved if self.coupling == "scaled" else solved * math.sqrt(scale)).mT)
        self.covariance.set_precision(H)

    def _divergence(self, trace: Tensor, logdet: Tensor) -> Tensor:
        square = self.mean.square().sum().double()
        given_s = (trace - self.mean.numel() - logdet).double() + self._coupled.mean_square() * square
        return given_s / 2 + self.scale_posterior.kl(self.scale_prior)

    def _factor(self, *, check: bool) -> Tensor:
        """Cholesky factor of K(Z, Z) plus jitter; silent about a rescue by more jitter where steps are many."""
        K = self.kernel(self.inducing_points, self.inducing_points)
        diagonal = K.diagonal()
        shifted = K + torch.diag_embed(self.jitter * diagonal.mean().expand_as(diagonal))
        if not check:
            return cholesky_or_raise(shifted, "the kernel matrix of the inducing points", points=self.inducing_points)
        result = safe_cholesky(shifted)
        if not result.ok:
            raise NotPositiveDefiniteError(f"the kernel matrix of the inducing points: {result.convergence.message}.")
        return result.value

    def _features(self, X: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """L^-1 K(Z, X), and k(x, x) less its squared columns."""
        A = torch.linalg.solve_triangular(factor, self.kernel(self.inducing_points, X), upper=False)
        return A, self.kernel.diag(X) - A.square().sum(0)  # type: ignore[operator]

    def _marginals(self, X: Tensor, factor: Tensor, *, report: bool = False) -> tuple[LatentMarginals, Tensor, Tensor]:
        A, residual = self._features(X, factor)
        if report:
            _warn_if_negative(residual, A)
        terms = self.covariance.terms(A)
        # The square root of the variance is differentiated.
        smallest = torch.finfo(X.dtype).eps ** 2
        variance = (residual.clamp(min=0) + terms.quadratic).clamp(min=smallest)
        return LatentMarginals(self.mean @ A, variance), terms.trace, terms.logdet

    def _block_rows(self, per_row: int) -> int:
        return max(1, _BLOCK_ELEMENTS // max(per_row, len(self.inducing_points) * len(self.mean)))

    def _check_points(self, X: Tensor) -> None:
        check_same_kind(X=X, inducing_points=self.inducing_points)
        if X.ndim != 2 or X.shape[1] != self.inducing_points.shape[1]:
            raise ValueError(f"X must have shape (n, {self.inducing_points.shape[1]}); got {tuple(X.shape)}.")
        check_finite("X", X)

    def _check_data(self, X: Tensor, y: Tensor) -> Tensor:
        """Return targets as the link wants them, after checking shapes."""
        self._check_points(X)
        if not len(X):
            raise ValueError("X must have at least one row; got none.")
        if isinstance(self.link, ScaledGaussian):
            if tuple(y.shape) not in [(len(X), self.n_classes), (len(X),)][: 1 + (self.n_classes == 1)]:
                raise ValueError(f"y must have shape {(len(X), self.n_classes)}; got {tuple(y.shape)}.")
            check_finite("y", y)
            return y.reshape(len(X), self.n_classes).mT.to(X)
        if y.shape != X.shape[:1]:
            raise ValueError(f"y must have shape {(len(X),)}; got {tuple(y.shape)}.")
        if y.is_floating_point() or y.is_complex():
            raise TypeError(f"y must hold integer classes; got {y.dtype}.")
        y = y.long()
        if not bool(((y >= 0) & (y < self.n_classes)).all()):
            raise ValueError(f"y must hold classes 0 to {self.n_classes - 1}; got {int(y.min())} to {int(y.max())}.")
        return y

    def extra_repr(self) -> str:
        """Return what the parts do not show."""
        m, n = len(self.inducing_points), self.n_classes
        return f"n_inducing={m}, n_classes={n}, link={type(self.link).__name__}, coupling={self.coupling!r}"


def _scale_family(name: str, prior: ScalePrior) -> Any:
    # The argument of the constructor has the name of the function.
    return scale_family(name, prior)


def _checked_weight(weight: Tensor | None, X: Tensor) -> Tensor:
    """Weights of the rows of X, ones for None."""
    if weight is None:
        return X.new_ones(len(X))
    if weight.shape != X.shape[:1]:
        raise ValueError(f"weight must have shape {(len(X),)}; got {tuple(weight.shape)}.")
    if not bool((weight.isfinite() & (weight >= 0)).all()):
        raise ValueError("weight must be finite and non-negative.")
    return weight.to(X)


def _warn_if_negative(residual: Tensor, A: Tensor) -> None:
    limit = 10 * math.sqrt(torch.finfo(residual.dtype).eps)
    total = (residual + A.square().sum(0)).detach()
    bad = residual.detach() < -limit * total
    if bool(bad.any()):
        warnings.warn(
            f"{int(bad.sum())} variances are negative by up to {float(-(residual.detach() / total)[bad].min()):.1e} of "
            "k(x, x), more than rounding explains; they are taken as 0. More jitter, float64 or a kernel that is "
            "positive definite would avoid it.",
            NumericalWarning,
            stacklevel=3,
        )
