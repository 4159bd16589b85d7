"""Scale mixtures of Gaussian processes as scikit-learn estimators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from torch import Tensor

from stochproc._base import Given, old_fit_unless_new
from stochproc._options import DTYPES, as_device, plain_bool
from stochproc._persistence import as_tensor
from stochproc._search import Learned, warn_unless_converged
from stochproc._standardise import Standardiser
from stochproc.gp._large_saved import restored, saved
from stochproc.gp._model_choice import Model, conditioned, model_of, solver_of
from stochproc.gp._predictions import ScaleMixturePredictions
from stochproc.gp._regressor_parameters import check_parameters, make_kernel
from stochproc.gp._regressor_search import Counted, searched
from stochproc.gp._regressor_warnings import check_size, warn_if_coarse, warn_if_constant
from stochproc.gp._scale_importance import with_drawn_scale
from stochproc.gp._scale_posterior import ScalePosterior
from stochproc.gp._scale_priors import as_scale_prior

__all__ = ["ScaleMixtureGPRegressor"]

# What decides which posterior a fit has; a file must keep it as it was then, whatever is set later.
_OF_THE_FIT = ("noise_model", "solver", "inference", "importance_samples", "random_state")


class ScaleMixtureGPRegressor(ScaleMixturePredictions, RegressorMixin, BaseEstimator):
    r"""Regression by a Gaussian process whose covariance has a random scale: Student-t and other processes.

    With standardised data the model is :math:`y \mid s \sim N(m, s (K + \mathrm{noise}\, I))`, s drawn from
    ``scale_prior`` once for all inputs and outputs. With ``"inverse_gamma"`` this is a Student-t process, with
    ``"delta"`` an ordinary Gaussian process. The posterior is exact.

    Parameters
    ----------
    kernel : Kernel, str, arch.Layer, gpytorch.kernels.Kernel or callable, default="rbf"
        Covariance function, copied at ``fit``. A network of :mod:`stochproc.gp.arch`, or its name such as
        "mlp-relu-4", "mlp-erf-2" or "resmlp-4", stands for the covariance of its outputs when it is infinitely wide;
        a name has one lengthscale a column, and the weights of the last layer are kept as given, since s is the same
        degree of freedom. A name of ``stochproc.kernels.KERNEL_NAMES`` has one lengthscale
        a column; it is 1 with ``optimizer=None``, and a search starts from the square root of the number of
        columns. The period of "periodic" starts at the best of 40, from twice the range of the columns down to a
        twentieth of it, and is searched between its two neighbours. The outputscale of a ``Scale`` kernel on top
        is kept as given, since s is the same degree of freedom.
    scale_prior : ScalePrior or str, default="inverse_gamma"
        Law of s: "delta", "inverse_gamma", "burr_xii", "gamma", "gig", "half_cauchy", "half_normal",
        "half_student_t", "log_normal", or an object such as ``InverseGamma(a=3.0)`` or a ``Mixture``; copied at
        ``fit``. Fits learn its scale parameter (the outputscale of ``Delta``) and keep its shape parameters.
    noise : float, default=0.1
        Variance of the noise, non-negative; where a search starts. 0 means none, and none is learned. As a share of
        s, or, where ``noise_model`` is "independent", of the variance of the outputs if they are standardised; there a
        search starts it within 1e-3 and 100 times the scale of the function.
    noise_model : {"scaled", "independent"}, default="scaled"
        Whether the noise is inside the scale, as above, or outside:
        :math:`y \mid s \sim N(m, s K + \mathrm{noise}\, I)`, so that a large function need not be a noisy one.
    inference : {"auto", "exact", "importance"}, default="auto"
        How the law of s given the data is found once everything else is learned: "exact", in closed form or by
        quadrature to 1e-12, or by "importance" sampling, with its diagnostics in ``scale_posterior_``. "auto" is exact.
    mean : {"constant", "zero"}, default="constant"
        Prior mean of the standardised targets: one learned constant an output, or zero.
    normalize_X : bool or "global", default=True
        Standardise each column (constant columns keep unit scale), or all columns by one scale ("global", for
        images), or not at all. Lengthscales refer to standardised columns.
    normalize_y : bool, default=True
        Standardise each output. Hyperparameters refer to standardised outputs, predictions to y.
    optimizer : {"lbfgs"}, LBFGS or None, default="lbfgs"
        How hyperparameters are learned, by maximal marginal likelihood; None keeps every one as given.
    n_restarts : int or "auto", default="auto"
        Number of starts of the search in all; the best is kept. "auto" takes up to ten (three for a network) on few
        rows, where likelihoods have several optima, and one from 800 rows on. Ignored if ``optimizer`` is an ``LBFGS``
        object, which has its own.
    importance_samples : int, default=10000
        Number of draws of the scale with ``inference="importance"``, 25 or more.
    solver : {"auto", "cholesky", "cg"} or CG, default="auto"
        "cholesky" factors the kernel matrix. "cg" never forms it: conjugate gradients to a relative residual of 1e-6,
        or as a ``CG`` object says, see ``LargeScaleMixtureGP``. "auto" is "cg" from 5001 rows on, or from fewer where
        16 matrices of that size exceed the memory of the machine; independent noise is always factored.
    hyper_subset : int or None, default=2000
        With "cg": learn kernel, noise and shape of the prior by Cholesky factors of so many random rows, then set mean
        and scale, and condition, with all rows. None learns from all of them by stochastic gradients, whose optimum
        is blurred by some tenths of a nat and which takes some hundred times as long.
    dtype : {"float64", "float32"}, default="float64"
        Precision of the computation. Standardising is done in float64 before it, and results are put in the
        units of y in float64 after it, so that offsets and units of the data cost no digits.
    device : str, torch.device or None, default=None
        Where to compute; None is the CPU.
    random_state : int, RandomState, Generator or None, default=None
        Seed of the starts after the first and of importance sampling; None takes the same ones in every fit.
    verbose : int, default=0
        1 shows a progress bar of the search.

    Attributes
    ----------
    kernel_ : Kernel
        The kernel with learned hyperparameters, all frozen; ``copy.deepcopy(kernel_).requires_grad_()`` can be the
        start of another search.
    noise_ : float
        Learned noise, as a share of s or, for independent noise, as a variance of standardised outputs.
    noise_variance_ : float or ndarray of shape (n_outputs,)
        Noise variance in squared units of y: ``noise_`` over E[1/s | y], which is the squared scale of the
        predictive Student-t law for an inverse gamma prior, and noise times outputscale for ``Delta``. For
        independent noise it is ``noise_`` itself.
    scale_prior_ : ScalePrior
        The prior with its learned scale parameter.
    scale_posterior_ : ScalePosterior
        Law of s given the data, in standardised units; an ``ImportanceScale`` with ``inference="importance"``.
    posterior_ : ExactPosterior, IndependentPosterior or LargePosterior
        The posterior process on standardised data, for use in torch code.
    log_marginal_likelihood_ : float
        log p(y) at the learned hyperparameters, in nats and the units of y; an estimate with ``solver="cg"``.
    log_marginal_likelihood_stderr_ : float
        Its standard error; 0 where it is exact.
    converged_ : bool
        Whether the search, with ``optimizer=None`` true, and a solve by conjugate gradients met their tolerances.
    n_iter_ : int
        Iterations of the search, those before an interruption too.
    optimizer_result_ : Result or None
        What the search reported.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Column names, where X had any.

    See Also
    --------
    ScaleMixtureGP, IndependentNoiseGP, LargeScaleMixtureGP : The same models for torch code.

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
        inference: str = "auto",
        mean: str = "constant",
        normalize_X: Any = True,
        normalize_y: Any = True,
        optimizer: Any = "lbfgs",
        n_restarts: Any = "auto",
        importance_samples: int = 10_000,
        solver: Any = "auto",
        hyper_subset: int | None = 2000,
        dtype: str = "float64",
        device: Any = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.kernel = kernel
        self.scale_prior = scale_prior
        self.noise = noise
        self.noise_model = noise_model
        self.inference = inference
        self.mean = mean
        self.normalize_X = normalize_X
        self.normalize_y = normalize_y
        self.optimizer = optimizer
        self.n_restarts = n_restarts
        self.importance_samples = importance_samples
        self.solver = solver
        self.hyper_subset = hyper_subset
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
            Called with a ``SolverState`` after each iteration of the search; returning True stops the search, not the
            conditioning that follows.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter is out of range, or the data are not finite, misshapen, too few, or too large or
            small to be standardised in float64.
        NotPositiveDefiniteError
            If the kernel matrix plus noise cannot be factored with any admissible jitter; the message has its
            extreme eigenvalues, its condition and the closest pair of points.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If the search stopped early; the best hyperparameters it found are used. Or if a solve by conjugate
            gradients ended above its tolerance, with the residual reached.
        NumericalWarning
            If the final factor needed jitter, with the amount, or if the noise is below 1e-5 of the kernel's diagonal
            in float32.
        DataWarning
            If y does not vary, or not in the rows that ``hyper_subset`` drew.

        Notes
        -----
        An interruption (Ctrl-C) during the search leaves a usable estimator, fitted with the best
        hyperparameters so far and ``converged_`` False, and is raised again. After any other failure the estimator
        is what it was before: unfitted, or with its old fit.
        """
        # Parameters made in inference mode could not be learned.
        with old_fit_unless_new(self, "posterior_"), torch.inference_mode(False):
            learned = self._fit(X, y, callback)
        if not learned.converged:
            warn_unless_converged(self)
        return self

    def _fit(self, X: Any, y: Any, callback: Callable[[Any], Any] | None) -> Learned:
        """Do the work of ``fit``; nothing but what validation sets changes before the last step."""
        check_parameters(self)
        dtype, device = DTYPES[self.dtype], as_device(self.device)
        how_X, how_y = plain_bool(self.normalize_X), plain_bool(self.normalize_y)
        given = Given.of(X)
        X, y = self._validated_pair(X, y, ensure_min_samples=2 if how_X is not False or how_y else 1)
        inputs, targets = as_tensor(X, torch.float64, device), as_tensor(y, torch.float64, device)
        single = targets.ndim == 1
        targets = targets.reshape(len(targets), -1)
        maps = Standardiser.fit(inputs, how_X, "X"), Standardiser.fit(targets, how_y, "y")
        flat = warn_if_constant(targets, single)
        inputs, targets = maps[0].apply(inputs, dtype, "X"), maps[1].apply(targets, dtype, "y")
        if how_y:
            # What rounding left of an output that does not vary is no data.
            targets[:, flat] = 0
        else:
            check_size(targets)

        model = model_of(self, len(inputs))(
            make_kernel(self.kernel, inputs.shape[1], self.optimizer is not None),
            copy.deepcopy(as_scale_prior(self.scale_prior)),
            noise=self.noise,
            mean=self.mean,
            n_outputs=targets.shape[1],
        ).to(device)
        shaped = targets[:, 0] if single else targets
        counted = Counted(callback)
        try:
            learned = searched(self, model, inputs, targets, counted)
        except KeyboardInterrupt:
            # The search has put its best point back; leave a usable estimator behind.
            self._condition(model, inputs, shaped, maps, given, Learned(None, False, counted.n_iter))
            raise
        self._condition(model, inputs, shaped, maps, given, learned)
        warn_if_coarse(self)
        return learned

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "posterior_")

    def _condition(
        self,
        model: Model,
        inputs: Tensor,
        targets: Tensor,
        maps: tuple[Standardiser, Standardiser],
        given: Given,
        learned: Learned,
        posterior: Any = None,
        options: Any = None,
    ) -> None:
        """Set what a fitted estimator has, from a model with its final hyperparameters: all of it or nothing."""
        options = self if options is None else options
        if posterior is None:
            posterior = conditioned(model, inputs, targets, self.verbose)
        if options.inference == "importance":
            posterior = with_drawn_scale(posterior, options.importance_samples, options.random_state)
        scale: ScalePosterior = posterior.scale
        noise, unit = model.noise.item(), maps[1].scale.cpu()
        relative_to = scale.inverse_mean if options.noise_model == "scaled" else 1.0
        variance = (unit * (noise / relative_to) ** 0.5) ** 2
        with torch.no_grad():
            evidence = posterior.log_marginal_likelihood - len(targets) * unit.log().sum().item()

        self.posterior_ = posterior
        # Whatever "auto" would be on the machine that loads a file.
        used = {"solver": solver_of(options, posterior)}
        self._options = [used.get(name, getattr(options, name)) for name in _OF_THE_FIT]
        self._given = given
        self._x_map, self._y_map = maps
        self._single_output = targets.ndim == 1
        self._y_train = targets
        self._mean_ = None if model.constant_mean is None else model.constant_mean.detach()
        self.kernel_ = posterior.kernel
        self.noise_ = noise
        self.scale_prior_ = posterior.scale_prior
        self.scale_posterior_ = scale
        self.noise_variance_ = variance.item() if self._single_output else variance.numpy()
        self.log_marginal_likelihood_ = evidence
        self.log_marginal_likelihood_stderr_ = getattr(posterior, "log_marginal_likelihood_stderr", 0.0)
        self.optimizer_result_ = learned.result
        self.converged_ = learned.converged and getattr(posterior, "converged", True)
        self.n_iter_ = learned.n_iter

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
        # Beside the numbers of the configs, whose logarithms would differ in the last bit.
        for name, module in (("kernel", self.kernel_), ("scale_prior", self.scale_prior_)):
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        state = {
            "kernel": self.kernel_,
            "scale_prior": self.scale_prior_,
            "noise": self.noise_,
            "n_features_in": self.n_features_in_,
            "feature_names_in": list(getattr(self, "feature_names_in_", [])),
            "converged": self.converged_,
            "n_iter": self.n_iter_,
            "given": self._given.name,
            "options": self._options,
        }
        more_tensors, more_state = saved(self.posterior_)
        return tensors | more_tensors, state | more_state

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        on = {k: v.to(as_device(self.device)) for k, v in tensors.items()}
        maps = (
            Standardiser(on["x_shift"].double(), on["x_scale"].double()),
            Standardiser(on["y_shift"].double(), on["y_scale"].double()),
        )
        self.n_features_in_ = state["n_features_in"]
        if state["feature_names_in"]:
            self.feature_names_in_ = np.asarray(state["feature_names_in"], dtype=object)
        options = SimpleNamespace(**dict(zip(_OF_THE_FIT, state["options"], strict=True)))
        model = model_of(options, len(on["X"]))(
            state["kernel"],
            state["scale_prior"],
            noise=state["noise"],
            mean="zero" if "mean" not in on else "constant",
            n_outputs=1 if on["y"].ndim == 1 else on["y"].shape[1],
        ).to(on["X"].device)
        logs = {k: v for k, v in on.items() if k.startswith(("kernel.", "scale_prior."))}
        model.load_state_dict(model.state_dict() | logs)
        if model.constant_mean is not None:
            with torch.no_grad():
                model.constant_mean.copy_(on["mean"])
        given = Given.named(state.get("given"), on["X"].device)
        learned = Learned(None, state["converged"], state["n_iter"])
        posterior = restored(model, on["X"], on["y"], on, state)
        self._condition(model, on["X"], on["y"], maps, given, learned, posterior, options)
