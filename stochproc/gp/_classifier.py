"""Classification with latent Gaussian processes that share a random scale, as a scikit-learn estimator."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data
from torch import Tensor

from stochproc._base import FLOATS, SavedMixin, as_array, old_fit_unless_new
from stochproc._options import DTYPES, as_device, plain_bool
from stochproc._persistence import as_tensor
from stochproc._random import make_generator
from stochproc._standardise import Standardiser
from stochproc.gp._classifier_parameters import check_parameters, merged_rows, row_weights
from stochproc.gp._classifier_predictions import ClassProbabilities
from stochproc.gp._estimators import ScaleMixtureGPRegressor
from stochproc.gp._regressor_parameters import make_kernel
from stochproc.gp._scale_priors import as_scale_prior
from stochproc.gp._svi import ScaleMixtureSVGP
from stochproc.gp._svi_inducing import choose_inducing_points
from stochproc.gp._svi_train import Training, start, train

__all__ = ["ScaleMixtureGPClassifier"]


class ScaleMixtureGPClassifier(ClassProbabilities, SavedMixin, ClassifierMixin, BaseEstimator):
    r"""Classification with one latent process a class, :math:`f_c \mid s \sim GP(0, s K)`, s random.

    The posterior is found by stochastic variational inference with ``n_inducing`` inducing points; one scale s is
    shared by all classes and inputs. Probabilities are averages over the posterior.

    Parameters
    ----------
    kernel : Kernel, str, gpytorch.kernels.Kernel or callable, default="rbf"
        Covariance function, as in ``ScaleMixtureGPRegressor``; copied at ``fit``.
    scale_prior : ScalePrior or str, default="inverse_gamma"
        Law of s; copied at ``fit``, which learns its scale parameter. With "delta" this is an ordinary Gaussian
        process classifier.
    link : {"softmax", "robustmax", "logit", "probit", "gaussian"}, default="softmax"
        How classes depend on the latent functions. "logit" and "probit" take two classes and one latent function.
        "gaussian" is exact regression on one-hot labels by ``ScaleMixtureGPRegressor``; the probability of a class is
        then that of its output being the largest. It costs O(n^3) and needs neither inducing points nor epochs.
    coupling : {"scaled", "fixed"}, default="scaled"
        Whether the posterior mean grows with sqrt(s), or not (the paper's form, with a looser bound).
    covariance : {"auto", "full", "diag", "lowrank"}, default="auto"
        Posterior covariance of the inducing variables of a class: "auto" is full for ``n_inducing`` <= 256, else
        diagonal.
    scale_family : {"inverse_gamma", "lognormal"}, default="inverse_gamma"
        Form of the posterior of s.
    n_inducing : int, default=200
        Number of inducing points, chosen among the rows of each class in proportion to its size and then learned. All
        distinct rows are taken where there are no more.
    inducing : {"random", "kmeans++"}, default="random"
        How they are chosen within a class.
    batch_size : int, default=100
        Rows a step.
    max_epochs : int or None, default=None
        Passes over the data at most; None is 100, or as many as make 2000 steps.
    n_samples : int, default=100
        Monte-Carlo samples a step (softmax only).
    n_samples_predict : int, default=1000
        Quasi-random samples of a prediction (softmax only).
    learning_rate : float, default=1e-2
        Step of Adam, halved up to four times as the bound stops growing.
    tol : float, default=1e-3
        Growth of the bound, in nats a row, below which it counts as having stopped.
    noise : float, default=0.1
        Start of the noise variance relative to s ("gaussian" only).
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes, which multiply ``sample_weight``; not with "gaussian".
    normalize_X : bool or "global", default=True
        Standardise each column, or all columns by one scale (for images), or not at all.
    optimizer : {"adam"} or None, default="adam"
        None keeps kernel and prior as given, and learns the posterior and where the inducing points lie.
    dtype : {"float64", "float32"}, default="float64"
        Precision of the computation.
    device : str, torch.device or None, default=None
        Where to compute; None is the CPU.
    random_state : int, RandomState, Generator or None, default=None
        Seed of inducing points, batches and Monte Carlo, in ``fit`` and for all later predictions.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    model_ : ScaleMixtureSVGP
        The fitted model on standardised inputs, for use in torch code (all links but "gaussian").
    regressor_ : ScaleMixtureGPRegressor
        The regression on one-hot labels ("gaussian" only).
    kernel_ : Kernel
        The kernel with learned hyperparameters.
    scale_prior_ : ScalePrior
        The prior with its learned scale parameter.
    elbo_history_ : ndarray of shape (n_epochs,)
        Lower bound of log p(y) a row (a unit of weight) in nats, averaged over the steps of each epoch; with "gaussian"
        log p(y) a row of the one-hot labels.
    n_iter_ : int
        Epochs (iterations of the search with "gaussian").
    converged_ : bool
        Whether the bound stopped growing before the epochs ran out.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Column names, where X had any.

    See Also
    --------
    ScaleMixtureSVGP : The same model for torch code.

    Notes
    -----
    A step costs one factor of ``n_inducing`` rows and O(C batch_size n_inducing^2). ``predict`` gives the class of the
    largest probability; all predictions are the same from call to call and do not depend on the other rows.

    References
    ----------
    .. [1] H. Lee, E. Yun, H. Yang, J. Lee, "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022.
    .. [2] J. Hensman, A. Matthews, Z. Ghahramani, "Scalable Variational Gaussian Process Classification", AISTATS
       2015.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from stochproc.gp import ScaleMixtureGPClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ScaleMixtureGPClassifier(link="gaussian", random_state=0).fit(X, y)
    >>> model.predict_proba(X[:2]).shape, model.score(X, y) > 0.95
    ((2, 3), True)
    """

    def __init__(
        self,
        kernel: Any = "rbf",
        *,
        scale_prior: Any = "inverse_gamma",
        link: str = "softmax",
        coupling: str = "scaled",
        covariance: str = "auto",
        scale_family: str = "inverse_gamma",
        n_inducing: int = 200,
        inducing: str = "random",
        batch_size: int = 100,
        max_epochs: int | None = None,
        n_samples: int = 100,
        n_samples_predict: int = 1000,
        learning_rate: float = 1e-2,
        tol: float = 1e-3,
        noise: float = 0.1,
        class_weight: Any = None,
        normalize_X: Any = True,
        optimizer: str | None = "adam",
        dtype: str = "float64",
        device: Any = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.kernel = kernel
        self.scale_prior = scale_prior
        self.link = link
        self.coupling = coupling
        self.covariance = covariance
        self.scale_family = scale_family
        self.n_inducing = n_inducing
        self.inducing = inducing
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.n_samples = n_samples
        self.n_samples_predict = n_samples_predict
        self.learning_rate = learning_rate
        self.tol = tol
        self.noise = noise
        self.class_weight = class_weight
        self.normalize_X = normalize_X
        self.optimizer = optimizer
        self.dtype = dtype
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, callback: Callable[[Any], Any] | None = None
    ) -> ScaleMixtureGPClassifier:
        """Learn the posterior, the kernel, the prior's scale and the inducing points by maximising the bound.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
            At least two classes.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            How often each row counts: the fit is that of rows so often repeated, to the last bit. 0 or 1 with
            ``link="gaussian"``.
        callback : callable, default=None
            Called with a ``SolverState`` after each epoch; returning True stops it.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter is out of range, the data are not finite or misshapen, or there is one class only.
        NotPositiveDefiniteError
            If the kernel matrix of the inducing points cannot be factored with any admissible jitter.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If the bound still grew at the end ("gaussian": if the search for hyperparameters did not converge).
        NumericalWarning
            If a factor needed more jitter than the default, with the amount.

        Notes
        -----
        An interruption (Ctrl-C) while it trains leaves a usable estimator with ``converged_`` False, and is raised
        again. After any other failure the estimator is what it was before.
        """
        with old_fit_unless_new(self, "classes_"), torch.inference_mode(False):
            message = self._fit(X, y, sample_weight, callback)
        if not self.converged_:
            warnings.warn(f"training did not converge: {message}.", ConvergenceWarning, stacklevel=2)
        return self

    def _fit(self, X: Any, y: Any, sample_weight: Any, callback: Callable[[Any], Any] | None) -> str:
        """Do the work of ``fit`` and say how it ended; what is fitted is set in one step at the end."""
        check_parameters(self)
        device = as_device(self.device)
        X, y = validate_data(self, as_array(X), as_array(y), dtype=FLOATS)
        check_classification_targets(y)
        weight = row_weights(self, X, y, sample_weight)
        if weight is not None:
            # Rows that do not count have no say in scaling, classes and inducing points either.
            X, y, weight = (a[weight > 0] for a in (X, y, weight))
        classes, labels = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y must have at least two classes; got one class, {classes[0]!r}.")
        generator = make_generator(self.random_state)
        if self.link == "gaussian":
            return self._fit_regression(X, labels, classes, generator, callback)

        counts = None if weight is None else as_tensor(weight, torch.float64, "cpu")
        inputs, targets, counts = merged_rows(as_tensor(X, torch.float64, "cpu"), torch.as_tensor(labels), counts)
        inputs, targets, counts = inputs.to(device), targets.to(device), None if counts is None else counts.to(device)
        x_map = Standardiser.fit(inputs, plain_bool(self.normalize_X), "X", counts)
        inputs = x_map.apply(inputs, DTYPES[self.dtype], "X")
        options = {name: getattr(self, name) for name in ("link", "coupling", "covariance", "scale_family")}
        model = ScaleMixtureSVGP(
            make_kernel(self.kernel, inputs.shape[1], self.optimizer is not None),
            choose_inducing_points(inputs, targets, self.n_inducing, self.inducing, generator),
            len(classes),
            copy.deepcopy(as_scale_prior(self.scale_prior)),
            **options,
        ).to(device)
        fitted = (classes, x_map, int(torch.randint(2**31, (), generator=generator)), options)
        if self.optimizer is None:
            model.kernel.requires_grad_(False)
            model.scale_prior.requires_grad_(False)
        counts = None if counts is None else counts.to(inputs)
        start(model, inputs, targets, weight=counts, n_samples=self.n_samples, generator=generator)
        progress = Training()
        try:
            train(
                model,
                inputs,
                targets,
                progress,
                weight=counts,
                batch_size=self.batch_size,
                max_epochs=self.max_epochs,
                n_samples=self.n_samples,
                learning_rate=self.learning_rate,
                tol=self.tol,
                generator=generator,
                callback=callback,
                verbose=self.verbose,
            )
        except KeyboardInterrupt:
            # Leave a usable estimator behind.
            self._set_model(model, progress, *fitted)
            raise
        # Steps are silent about jitter; this says what the model needs in the end.
        model.marginals(inputs[:0])
        self._set_model(model, progress, *fitted)
        return progress.message

    def _fit_regression(
        self, X: Any, labels: Any, classes: Any, generator: torch.Generator, callback: Callable[[Any], Any] | None
    ) -> str:
        seed = int(torch.randint(2**31, (), generator=generator))
        regressor = self._make_regressor()
        try:
            with warnings.catch_warnings():
                # Ours says the same of this estimator.
                warnings.simplefilter("ignore", ConvergenceWarning)
                regressor.fit(X, np.eye(len(classes))[labels], callback=callback)
        except KeyboardInterrupt:
            if hasattr(regressor, "posterior_"):
                self._set_regressor(regressor, classes, seed, regressor.log_marginal_likelihood_ / len(X))
            raise
        self._set_regressor(regressor, classes, seed, regressor.log_marginal_likelihood_ / len(X))
        result = regressor.optimizer_result_
        return result.convergence.message if result is not None else "stopped"

    def _make_regressor(self) -> ScaleMixtureGPRegressor:
        return ScaleMixtureGPRegressor(
            self.kernel,
            scale_prior=self.scale_prior,
            noise=self.noise,
            normalize_X=self.normalize_X,
            normalize_y=False,
            optimizer=None if self.optimizer is None else "lbfgs",
            dtype=self.dtype,
            device=self.device,
            random_state=0,
            verbose=self.verbose,
        )

    def _set_model(
        self,
        model: ScaleMixtureSVGP,
        progress: Training,
        classes: Any,
        x_map: Standardiser,
        seed: int,
        options: dict[str, str],
    ) -> None:
        self.__dict__.pop("regressor_", None)
        self.model_ = model.requires_grad_(False)
        self.kernel_, self.scale_prior_ = model.kernel, model.scale_prior
        self.elbo_history_ = np.array(progress.history)
        self.n_iter_, self.converged_ = len(progress.history), progress.converged
        # Parameters may be set anew before the next fit; a file describes this one.
        self._x_map, self._fitted_options = x_map, options
        self._seed, self.classes_ = seed, classes

    def _set_regressor(
        self, regressor: ScaleMixtureGPRegressor, classes: Any, seed: int, evidence_of_row: float
    ) -> None:
        self.__dict__.pop("model_", None)
        self.regressor_ = regressor
        self.kernel_, self.scale_prior_ = regressor.kernel_, regressor.scale_prior_
        self.elbo_history_ = np.array([evidence_of_row])
        self.n_iter_, self.converged_ = regressor.n_iter_, regressor.converged_
        self._seed, self.classes_ = seed, classes

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state: dict[str, Any] = {
            "classes": self.classes_.tolist(),
            "classes_dtype": self.classes_.dtype.str if self.classes_.dtype.kind != "O" else "object",
            "seed": self._seed,
            "n_features_in": self.n_features_in_,
            "feature_names_in": list(getattr(self, "feature_names_in_", [])),
            "converged": self.converged_,
        }
        tensors = {"elbo_history": torch.as_tensor(self.elbo_history_)}
        if hasattr(self, "regressor_"):
            inner, more = self.regressor_._state()
            tensors |= {f"regressor.{k}": v for k, v in inner.items()}
            return tensors, state | {f"regressor.{k}": v for k, v in more.items()}
        tensors |= {"x_shift": self._x_map.shift, "x_scale": self._x_map.scale}
        tensors |= {f"model.{k}": v for k, v in self.model_.state_dict().items()}
        fitted = {"kernel": self.kernel_, "scale_prior": self.scale_prior_, "options": self._fitted_options}
        return tensors, state | fitted

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        device = as_device(self.device)
        classes = np.asarray(state["classes"], dtype=np.dtype(state["classes_dtype"]))
        self.n_features_in_ = state["n_features_in"]
        if state["feature_names_in"]:
            self.feature_names_in_ = np.asarray(state["feature_names_in"], dtype=object)
        history = tensors["elbo_history"].tolist()
        if "options" not in state:
            regressor = self._make_regressor()
            regressor._restore(_part(tensors, "regressor."), _part(state, "regressor."))
            self._set_regressor(regressor, classes, state["seed"], history[0])
            return
        saved = _part(tensors, "model.")
        prior, options = state["scale_prior"], state["options"]
        model = ScaleMixtureSVGP(state["kernel"], saved["inducing_points"], len(classes), prior, **options)
        model.load_state_dict(saved)
        x_map = Standardiser(tensors["x_shift"].to(device), tensors["x_scale"].to(device))
        progress = Training(history, state["converged"])
        self._set_model(model.to(device), progress, classes, x_map, state["seed"], options)


def _part(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
