"""Scale mixtures of Gaussian processes as scikit-learn estimators."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from stochproc._base import Given, ProbabilisticRegressorMixin, check_levels
from stochproc._checks import check_choice, check_integer, check_positive
from stochproc._persistence import as_tensor, encode
from stochproc._random import make_generator
from stochproc.exceptions import DataWarning, NumericalWarning
from stochproc.gp._exact import ScaleMixtureGP
from stochproc.gp._exact_posterior import ExactPosterior
from stochproc.gp._hyperparameters import NOISE_FLOOR, Learned, default_search, learn
from stochproc.gp._predictive import Predictive
from stochproc.gp._scale_posterior import ScalePosterior
from stochproc.gp._scale_priors import as_scale_prior
from stochproc.gp._standardise import Standardiser
from stochproc.kernels import Kernel, Periodic, Radial, Scale, as_kernel
from stochproc.solvers import LBFGS

__all__ = ["ScaleMixtureGPRegressor"]

_DTYPES = {"float64": torch.float64, "float32": torch.float32}


class ScaleMixtureGPRegressor(ProbabilisticRegressorMixin, RegressorMixin, BaseEstimator):
    r"""Regression by a Gaussian process whose covariance has a random scale: Student-t and other processes.

    With standardised data the model is :math:`y \mid s \sim N(m, s (K + \mathrm{noise}\, I))`, s drawn from
    ``scale_prior`` once for all inputs and outputs. With ``"inverse_gamma"`` this is a Student-t process, with
    ``"delta"`` an ordinary Gaussian process. The posterior is exact.

    Parameters
    ----------
    kernel : Kernel, str, gpytorch.kernels.Kernel or callable, default="rbf"
        Covariance function, copied at ``fit``. A name of ``stochproc.kernels.KERNEL_NAMES`` has one lengthscale
        a column; it is 1 with ``optimizer=None``, and a search starts from the square root of the number of
        columns. The outputscale of a ``Scale`` kernel on top is kept as given, since s is the same degree of
        freedom.
    scale_prior : ScalePrior or str, default="inverse_gamma"
        Law of s: "delta", "inverse_gamma", "burr_xii", "half_cauchy", or an object such as
        ``InverseGamma(a=3.0)``; copied at ``fit``. Fits learn its scale parameter (the outputscale of
        ``Delta``) and keep its shape parameters.
    noise : float, default=0.1
        Variance of the noise as a share of s, non-negative; where a search starts. 0 means none, and none is
        learned.
    noise_model : {"scaled"}, default="scaled"
        The noise is inside the scale, as above.
    mean : {"constant", "zero"}, default="constant"
        Prior mean of the standardised targets: one learned constant an output, or zero.
    normalize_X : bool or "global", default=True
        Standardise each column (constant columns keep unit scale), or all columns by one scale ("global", for
        images), or not at all. Lengthscales refer to standardised columns.
    normalize_y : bool, default=True
        Standardise each output. Hyperparameters refer to standardised outputs, predictions to y.
    optimizer : {"lbfgs"}, LBFGS or None, default="lbfgs"
        How hyperparameters are learned, by maximal marginal likelihood; None keeps every one as given.
    n_restarts : int, default=1
        Number of starts of the search in all; ignored if ``optimizer`` is an ``LBFGS`` object.
    solver : {"auto", "cholesky"}, default="auto"
        How linear systems are solved; both are an exact Cholesky factor.
    dtype : {"float64", "float32"}, default="float64"
        Precision of the computation.
    device : str, torch.device or None, default=None
        Where to compute; None is the CPU.
    random_state : int, RandomState, Generator or None, default=None
        Seed of the starts after the first.
    verbose : int, default=0
        1 shows a progress bar of the search.

    Attributes
    ----------
    kernel_ : Kernel
        The kernel with learned hyperparameters.
    noise_ : float
        Learned noise as a share of s.
    noise_variance_ : float or ndarray of shape (n_outputs,)
        Noise variance in squared units of y: ``noise_`` over E[1/s | y], which is the squared scale of the
        predictive Student-t law for an inverse gamma prior, and noise times outputscale for ``Delta``.
    scale_prior_ : ScalePrior
        The prior with its learned scale parameter.
    scale_posterior_ : ScalePosterior
        Law of s given the data, in standardised units.
    posterior_ : ExactPosterior
        The posterior process on standardised data, for use in torch code.
    log_marginal_likelihood_ : float
        log p(y) at the learned hyperparameters, in nats and the units of y.
    converged_ : bool
        Whether the search met its tolerance; True with ``optimizer=None``.
    n_iter_ : int
        Iterations of the search.
    optimizer_result_ : Result or None
        What the search reported.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Column names, where X had any.

    See Also
    --------
    ScaleMixtureGP : The same model for torch code.

    Notes
    -----
    ``fit`` takes O(n^3) time an evaluation of the likelihood and O(n^2) memory; ``predict`` O(n) a row without
    and O(n^2) with the variance. Kernel, noise and mean have the same optimum for every prior with a free
    scale, so it is searched once with that scale profiled out, and the scale follows from a problem in one
    dimension: a Student-t process costs as much to fit as a Gaussian one. The scale is shared by all points:
    it widens all intervals together and does not down-weight single outliers.

    References
    ----------
    .. [1] H. Lee, E. Yun, H. Yang, J. Lee, "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022.
    .. [2] A. Shah, A. Wilson, Z. Ghahramani, "Student-t Processes as Alternatives to Gaussian Processes",
       AISTATS 2014.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.gp import ScaleMixtureGPRegressor
    >>> X = np.linspace(0, 6, 40)[:, None]
    >>> model = ScaleMixtureGPRegressor().fit(X, np.sin(X[:, 0]))
    >>> model.predict(X[:2]).shape, model.predict_interval(X[:2]).shape
    ((2,), (2, 2))
    """

    def __init__(
        self,
        kernel: Any = "rbf",
        *,
        scale_prior: Any = "inverse_gamma",
        noise: float = 0.1,
        noise_model: str = "scaled",
        mean: str = "constant",
        normalize_X: Any = True,
        normalize_y: bool = True,
        optimizer: Any = "lbfgs",
        n_restarts: int = 1,
        solver: str = "auto",
        dtype: str = "float64",
        device: Any = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.kernel = kernel
        self.scale_prior = scale_prior
        self.noise = noise
        self.noise_model = noise_model
        self.mean = mean
        self.normalize_X = normalize_X
        self.normalize_y = normalize_y
        self.optimizer = optimizer
        self.n_restarts = n_restarts
        self.solver = solver
        self.dtype = dtype
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, *, callback: Callable[[Any], Any] | None = None) -> ScaleMixtureGPRegressor:
        """Learn hyperparameters by maximal marginal likelihood and condition on the data.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            At least 2 rows if anything is standardised.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        callback : callable, default=None
            Called with a ``SolverState`` after each iteration of the search; returning True stops it.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter is out of range, or the data are not finite, misshapen or too few.
        NotPositiveDefiniteError
            If the kernel matrix plus noise cannot be factored with any admissible jitter.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If the search stopped early; the best hyperparameters it found are used.
        NumericalWarning
            If the final factor needed jitter, with the amount, or if the noise is below 1e-5 of the kernel's diagonal
            in float32.
        DataWarning
            If y does not vary.

        Notes
        -----
        An interruption (Ctrl-C) during the search leaves a usable estimator, fitted with the best
        hyperparameters so far and ``converged_`` False, and is raised again.
        """
        self._check_parameters()
        normalised = self.normalize_X is not False or self.normalize_y
        X, y = self._validated_pair(X, y, ensure_min_samples=2 if normalised else 1)
        dtype, device = _DTYPES[self.dtype], torch.device(self.device or "cpu")
        inputs, targets = as_tensor(X, dtype, device), as_tensor(y, dtype, device)
        self._single_output = targets.ndim == 1
        targets = targets.reshape(len(targets), -1)
        self._x_map = Standardiser.fit(inputs, self.normalize_X)
        self._y_map = Standardiser.fit(targets, bool(self.normalize_y))
        self._warn_if_constant(targets)
        inputs, targets = self._x_map.apply(inputs), self._y_map.apply(targets)

        model = ScaleMixtureGP(
            self._make_kernel(inputs.shape[1]),
            copy.deepcopy(as_scale_prior(self.scale_prior)),
            noise=self.noise,
            mean=self.mean,
            n_outputs=targets.shape[1],
        ).to(device)
        learned = Learned(None, True, 0)
        try:
            if self.optimizer is not None:
                search = default_search(self.n_restarts) if self.optimizer == "lbfgs" else self.optimizer
                generator = make_generator(self.random_state)
                learned = learn(model, inputs, targets, search, generator, callback, self.verbose)
        except KeyboardInterrupt:
            # The search has put its best point back; leave a usable estimator behind.
            self._condition(model, inputs, targets, Learned(None, False, 0))
            raise
        self._condition(model, inputs, targets, learned)
        self._warn_if_coarse()
        if not self.converged_:
            message = learned.result.convergence.message if learned.result is not None else "stopped"
            warnings.warn(
                f"the search for hyperparameters ended without meeting its tolerance: {message}. The best ones found "
                "are used. Pass optimizer=LBFGS(max_iter=...) or more n_restarts for a longer search.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def predict(self, X: Any, return_std: bool = False, return_cov: bool = False, *, latent: bool = False) -> Any:
        """Predict the mean of new observations, and on request their spread.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        return_std : bool, default=False
            Whether to return standard deviations too.
        return_cov : bool, default=False
            Whether to return the joint covariance of the rows too.
        latent : bool, default=False
            Whether the spread is that of the function without noise.

        Returns
        -------
        mean : ndarray or Tensor of shape (n_samples,) or (n_samples, n_outputs)
        std : ndarray or Tensor of the same shape
            Only with ``return_std``.
        cov : ndarray or Tensor of shape (n_samples, n_samples) or (n_samples, n_samples, n_outputs)
            Only with ``return_cov``.

        Raises
        ------
        ValueError
            If both spreads are asked for, or the variance does not exist (a Student-t law with at most two
            degrees of freedom); ``predict_quantiles`` always works.

        Notes
        -----
        The mean alone costs O(n) a row and never computes a variance; standard deviations cost O(n^2) a row
        and never form the covariance of the new rows. Both run in blocks of rows.
        """
        if return_std and return_cov:
            raise ValueError("return_std and return_cov must not both be True; ask for one of them.")
        given, inputs = self._inputs(X)
        with torch.no_grad():
            if return_cov:
                cov = self._covariance(inputs, latent)
                return given.back(self._unscaled(self.posterior_.mean(inputs))), given.back(cov)
            if return_std:
                law = self._predictive(inputs, latent)
                return given.back(self._unscaled(law.mean)), given.back(law.std * self._y_scale())
            if not self.scale_posterior_.has_location:
                raise ValueError("the predictive mean does not exist; predict_quantiles(X, 0.5) does.")
            return given.back(self._unscaled(self.posterior_.mean(inputs)))

    def predict_quantiles(self, X: Any, q: Any, *, latent: bool = False) -> Any:
        """Predict quantiles of new observations; they exist for every prior.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        q : float or sequence of float
            Probabilities in (0, 1).
        latent : bool, default=False
            Whether to give quantiles of the function without noise.

        Returns
        -------
        ndarray or Tensor of shape (n_samples, n_quantiles) or (n_samples, n_quantiles, n_outputs)
            In the units of y, increasing in q.

        Raises
        ------
        ValueError
            If a probability does not lie in (0, 1).
        """
        levels = check_levels("q", q)
        given, inputs = self._inputs(X)
        with torch.no_grad():
            law = self._predictive(inputs, latent)
            z = law.scale.quantile(torch.as_tensor(levels, dtype=torch.float64)).to(inputs)
            spread = law.variance_before_scale.sqrt()
            loc = law.loc.reshape(len(inputs), 1, -1)
            scale, shift = self._y_map.scale, self._y_map.shift
            found = (loc + (z[None, :] * spread[:, None]).unsqueeze(-1)) * scale + shift
            return given.back(found[..., 0] if self._single_output else found)

    def log_predictive_density(self, X: Any, y: Any) -> Any:
        """Return the log density of each new observation given the data.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)

        Returns
        -------
        ndarray or Tensor of shape (n_samples,)
            In nats and the units of y; with several outputs that of the row, whose outputs share one scale.
        """
        check_is_fitted(self)
        given = Given.of(X)
        X, y = self._validated_pair(X, y, reset=False)
        inputs, targets = self._tensor(X), self._tensor(y)
        if targets.reshape(len(targets), -1).shape[1] != len(self._y_map.scale):
            raise ValueError(
                f"y must have {len(self._y_map.scale)} output(s) as in fit; got shape {tuple(targets.shape)}."
            )
        shape = (len(targets),) if self._single_output else (len(targets), -1)
        targets = self._y_map.apply(targets.reshape(len(targets), -1)).reshape(shape)
        with torch.no_grad():
            density = self._predictive(self._x_map.apply(inputs), False).log_prob(targets)
            return given.back(density - self._y_map.scale.log().sum())

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = None, *, latent: bool = False) -> Any:
        """Draw new observations jointly over the rows; one draw has one scale s.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features)
        n_samples : int, default=1
            Number of joint draws.
        random_state : int, RandomState, Generator or None, default=None
        latent : bool, default=False
            Whether to draw functions without noise.

        Returns
        -------
        ndarray or Tensor of shape (n_rows, n_samples) or (n_rows, n_outputs, n_samples)
        """
        check_integer("n_samples", n_samples, 1)
        given, inputs = self._inputs(X)
        generator = make_generator(random_state, inputs.device)
        with torch.no_grad():
            draws = self.posterior_.sample(inputs, n_samples, noise=not latent, generator=generator)
            draws = self._unscaled(draws)
            return given.back(draws.movedim(0, -1))

    def loo(self) -> Any:
        """Return the leave-one-out log density of each training row, from the one factor of the fit.

        Returns
        -------
        ndarray of shape (n_samples,)
            In nats and the units of y; hyperparameters stay those of all rows. Their sum is a criterion to
            compare models by.

        Notes
        -----
        O(n^3) time, no refit.
        """
        check_is_fitted(self)
        return (self.posterior_.loo() - self._y_map.scale.log().sum()).cpu().numpy()

    def _check_parameters(self) -> None:
        check_choice("noise_model", self.noise_model, ("scaled",))
        check_choice("mean", self.mean, ("constant", "zero"))
        check_choice("normalize_X", self.normalize_X, (True, False, "global"))
        check_choice("normalize_y", self.normalize_y, (True, False))
        if not isinstance(self.optimizer, LBFGS):
            check_choice("optimizer", self.optimizer, ("lbfgs", None))
        check_integer("n_restarts", self.n_restarts, 1)
        check_choice("solver", self.solver, ("auto", "cholesky"))
        check_choice("dtype", self.dtype, tuple(_DTYPES))
        check_positive("noise", self.noise, zero=True)

    def _make_kernel(self, n_columns: int) -> Kernel:
        named = isinstance(self.kernel, str)
        kernel = as_kernel(self.kernel if named else copy.deepcopy(self.kernel), n_columns=n_columns)
        if isinstance(kernel, Scale):
            kernel.log_outputscale.requires_grad_(False)
        if named and self.optimizer is not None and isinstance(kernel, Radial) and not isinstance(kernel, Periodic):
            # Standardised points are about sqrt(2 d) apart: from a lengthscale of 1 a search with many columns
            # starts at a kernel matrix that is the identity, with no gradient to follow.
            kernel.lengthscale = math.sqrt(n_columns)
        # GPyTorch's parameters are float32 unless asked, too coarse for the search.
        return kernel.double()

    def _warn_if_constant(self, targets: Tensor) -> None:
        spread = targets - targets.mean(0)
        flat = spread.abs().amax(0) <= 10 * torch.finfo(targets.dtype).eps * targets.abs().amax(0)
        if len(targets) > 1 and bool(flat.any()):
            which = "y" if self._single_output else f"{int(flat.sum())} column(s) of y"
            warnings.warn(f"{which} does not vary; it is centred and keeps unit scale.", DataWarning, stacklevel=3)

    def _warn_if_coarse(self) -> None:
        X = self.posterior_.X
        with torch.no_grad():
            level = NOISE_FLOOR[X.dtype] * self.kernel_.diag(X).mean().item()
        if X.dtype == torch.float32 and self.noise_ < 0.99 * level:
            warnings.warn(
                f"noise is {self.noise_:.3g} and the mean of the kernel's diagonal {level / NOISE_FLOOR[X.dtype]:.3g}: "
                'in float32 a factor of their sum keeps few digits. Use dtype="float64" or more noise.',
                NumericalWarning,
                stacklevel=3,
            )

    def _condition(self, model: ScaleMixtureGP, inputs: Tensor, targets: Tensor, learned: Learned) -> None:
        """Set what a fitted estimator has, from a model with its final hyperparameters."""
        shaped = targets[:, 0] if self._single_output else targets
        self.posterior_: ExactPosterior = model.condition(inputs, shaped)
        self._y_train = shaped
        self._mean_ = None if model.constant_mean is None else model.constant_mean.detach()
        self.kernel_ = self.posterior_.kernel
        self.noise_ = model.noise.item()
        self.scale_prior_ = self.posterior_.scale_prior
        self.scale_posterior_: ScalePosterior = self.posterior_.scale
        variance = self._y_map.scale.cpu() ** 2 * (self.noise_ / self.scale_posterior_.inverse_mean)
        self.noise_variance_ = variance.item() if self._single_output else variance.numpy()
        jacobian = len(targets) * self._y_map.scale.log().sum().item()
        with torch.no_grad():
            self.log_marginal_likelihood_ = self.posterior_.log_marginal_likelihood - jacobian
        self.optimizer_result_ = learned.result
        self.converged_ = learned.converged
        self.n_iter_ = learned.n_iter

    def _tensor(self, value: Any) -> Tensor:
        return as_tensor(value, self.posterior_.X.dtype, self.posterior_.X.device)

    def _inputs(self, X: Any) -> tuple[Given, Tensor]:
        check_is_fitted(self)
        given = Given.of(X)
        return given, self._x_map.apply(self._tensor(self._validated(X)))

    def _predictive(self, inputs: Tensor, latent: bool) -> Predictive:
        return self.posterior_.predictive(inputs, noise=not latent)

    def _covariance(self, inputs: Tensor, latent: bool) -> Tensor:
        if self.scale_posterior_.missing_variance:
            raise ValueError(
                f"the predictive covariance does not exist: {self.scale_posterior_.missing_variance}; "
                "predict_quantiles always works."
            )
        total = self.posterior_.covariance(inputs)
        if not latent:
            total.diagonal().add_(self.posterior_.noise)
        total = total.unsqueeze(-1) * (self.scale_posterior_.mean * self._y_map.scale**2)
        return total[..., 0] if self._single_output else total

    def _y_scale(self) -> Tensor:
        return self._y_map.scale[0] if self._single_output else self._y_map.scale

    def _unscaled(self, value: Tensor) -> Tensor:
        """Return standardised outputs, on the last axis if there are several, in the units of y."""
        return value * self._y_scale() + (self._y_map.shift[0] if self._single_output else self._y_map.shift)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            "X": self.posterior_.X,
            "y": self._y_train,
            "x_shift": self._x_map.shift,
            "x_scale": self._x_map.scale,
            "y_shift": self._y_map.shift,
            "y_scale": self._y_map.scale,
        }
        if self._mean_ is not None:
            tensors["mean"] = self._mean_
        state = {
            "kernel": self.kernel_,
            "scale_prior": self.scale_prior_,
            "noise": self.noise_,
            "n_features_in": self.n_features_in_,
            "feature_names_in": list(getattr(self, "feature_names_in_", [])),
            "converged": self.converged_,
            "n_iter": self.n_iter_,
        }
        for name, value in state.items():
            encode(name, value)
        return tensors, state

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        import numpy as np

        device = torch.device(self.device or "cpu")
        on = {k: v.to(device) for k, v in tensors.items()}
        self._x_map = Standardiser(on["x_shift"], on["x_scale"])
        self._y_map = Standardiser(on["y_shift"], on["y_scale"])
        self._single_output = on["y"].ndim == 1
        self.n_features_in_ = state["n_features_in"]
        if state["feature_names_in"]:
            self.feature_names_in_ = np.asarray(state["feature_names_in"], dtype=object)
        targets = on["y"].reshape(len(on["y"]), -1)
        model = ScaleMixtureGP(
            state["kernel"],
            state["scale_prior"],
            noise=state["noise"],
            mean="zero" if "mean" not in on else "constant",
            n_outputs=targets.shape[1],
        ).to(device)
        if model.constant_mean is not None:
            with torch.no_grad():
                model.constant_mean.copy_(on["mean"])
        self._condition(model, on["X"], targets, Learned(None, state["converged"], state["n_iter"]))
