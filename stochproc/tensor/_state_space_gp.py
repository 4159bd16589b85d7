"""Regression in time by a Gaussian process, in linear time, as a scikit-learn estimator."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_consistent_length
from torch import Tensor

from stochproc._base import Given, old_fit_unless_new
from stochproc._checks import check_choice, check_positive
from stochproc._options import as_device, check_options, plain_bool
from stochproc._persistence import as_tensor
from stochproc._random import make_generator
from stochproc._search import Learned, default_search, warn_unless_converged
from stochproc._standardise import Standardiser
from stochproc.exceptions import DataWarning
from stochproc.tensor._state_space_model import TimeSeries, learn, make_kernel, warn_if_times_are_coarse
from stochproc.tensor._state_space_predictions import StateSpacePredictions
from stochproc.tensor._time_data import as_target, known_noise

__all__ = ["StateSpaceGP"]


class StateSpaceGP(StateSpacePredictions, RegressorMixin, BaseEstimator):
    r"""Regression in time by a Gaussian process, exact and in O(n): smoothing, gaps, forecasts and slopes.

    The model is that of an ordinary Gaussian process with one input, :math:`y_i = m + f(x_i) + \varepsilon_i`; its
    kernel is written as a linear stochastic differential equation, so that a Kalman smoother replaces the n by n
    matrix. Times may come in any order, repeat, and have gaps; NaN in y marks a value that was not observed.

    Parameters
    ----------
    kernel : Kernel or str, default="matern32"
        Covariance function with a state space, copied at ``fit``: "matern12", "matern32", "matern52", "rbf",
        "periodic" and "linear" by name, which adds an outputscale that is learned, or a kernel object made of such
        by sums, products and ``Scale``, used as it is. "rbf" is approximated by a process of order 6 and "periodic"
        by a series of order 7. The search of a named kernel starts from the best lengthscale (or period) of a grid
        over the data.
    noise : float, default=0.1
        Variance of independent noise, where its search starts; in squared units of y, or of standardised y with
        ``normalize_y``. 0 means that there is none but the known variances passed to ``fit``. Variances are searched
        from 1e-8 to 1e5 of that of y.
    mean : {"constant", "zero"}, default="constant"
        Prior mean of the (standardised) target: a learned constant, or zero.
    normalize_X : bool, default=False
        Whether to standardise the times. By default lengthscales and periods are in the unit of X.
    normalize_y : bool, default=True
        Whether to standardise the target. Variances of kernel and noise refer to it then; predictions to y.
    optimizer : {"lbfgs"}, LBFGS or None, default="lbfgs"
        How hyperparameters are learned, by maximal marginal likelihood; None keeps every one as given.
    n_restarts : int, default=1
        Number of starts of the search in all; ignored if ``optimizer`` is an ``LBFGS`` object.
    method : {"auto", "scan", "sequential"}, default="auto"
        How the smoother runs; see ``stochproc.solvers.kalman_smoother``.
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
        Learned noise variance of the (standardised) target.
    noise_variance_ : float
        The same in squared units of y.
    mean_ : float
        Prior mean in the units of y.
    log_marginal_likelihood_ : float
        log p(y) at the learned hyperparameters, in nats and the units of y.
    n_observed_ : int
        Rows whose target is not NaN.
    converged_ : bool
        Whether the search met its tolerance; True with ``optimizer=None``.
    n_iter_ : int
        Iterations of the search.
    optimizer_result_ : Result or None
        What the search reported.
    n_features_in_ : int
        1.
    feature_names_in_ : ndarray of str
        Name of the column, where X had one.

    See Also
    --------
    stochproc.solvers.kalman_smoother : The smoother alone, for torch code.
    stochproc.gp.ScaleMixtureGPRegressor : Any kernel and number of inputs, in O(n^3).
    stochproc.gp.GPDisplay : Draws the fit beside the data.

    Notes
    -----
    An evaluation of the likelihood with its gradient takes O(n D^3) time and O(n D^2) memory for a state of D numbers:
    1, 2, 3 for the Matern kernels, 6 for "rbf", 15 for "periodic"; sums add them and products multiply them.

    References
    ----------
    .. [1] J. Hartikainen, S. Sarkka, "Kalman filtering and smoothing solutions to temporal Gaussian process
       regression models", MLSP 2010.
    .. [2] S. Sarkka, A. Garcia-Fernandez, "Temporal parallelization of Bayesian smoothers", IEEE TAC 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.tensor import StateSpaceGP
    >>> times = np.linspace(0, 10, 200)
    >>> model = StateSpaceGP().fit(times, np.sin(times))
    >>> mean, std = model.predict([2.5, 11.0], return_std=True)
    >>> bool(std[0] < std[1])  # a forecast is less certain than a value between data
    True
    """

    def __init__(
        self,
        kernel: Any = "matern32",
        *,
        noise: float = 0.1,
        mean: str = "constant",
        normalize_X: bool = False,
        normalize_y: bool = True,
        optimizer: Any = "lbfgs",
        n_restarts: int = 1,
        method: str = "auto",
        device: Any = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.kernel = kernel
        self.noise = noise
        self.mean = mean
        self.normalize_X = normalize_X
        self.normalize_y = normalize_y
        self.optimizer = optimizer
        self.n_restarts = n_restarts
        self.method = method
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_model")

    def fit(self, X: Any, y: Any, noise: Any = None, *, callback: Callable[[Any], Any] | None = None) -> StateSpaceGP:
        """Learn hyperparameters by maximal marginal likelihood and condition on the data.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
            Times in any order; repeated ones are several observations of one value.
        y : array-like of shape (n_samples,)
            NaN where nothing was observed.
        noise : float or array-like of shape (n_samples,), default=None
            Known variances of the noise of the rows, non-negative, in squared units of y. The learned noise comes on
            top; pass the estimator ``noise=0`` for none.
        callback : callable, default=None
            Called with a ``SolverState`` after each iteration of the search; returning True stops it.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter is out of range, the kernel has no state space, X has more than one column or an entry
            that is not finite, y holds infinity or nothing but NaN, or the noise of a row is zero in all.
        SolverError
            If the smoother meets values that are not finite at the final hyperparameters.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If the search stopped early; the best hyperparameters it found are used.
        DataWarning
            If y does not vary, or the times span so little of their size that their differences have few digits.

        Notes
        -----
        An interruption (Ctrl-C) during the search leaves a usable estimator, fitted with the best
        hyperparameters so far and ``converged_`` False, and is raised again. After any other failure the estimator
        is what it was before: unfitted, or with its old fit.
        """
        # Parameters made in inference mode could not be learned.
        with old_fit_unless_new(self, "_model"), torch.inference_mode(False):
            self._fit(X, y, noise, callback)
        warn_unless_converged(self)
        return self

    def _fit(self, X: Any, y: Any, noise: Any, callback: Callable[[Any], Any] | None) -> None:
        """Do the work of ``fit``; nothing but what validation sets changes before the last step."""
        check_options(self)
        check_choice("normalize_X", plain_bool(self.normalize_X), (True, False))
        check_choice("method", self.method, ("auto", "scan", "sequential"))
        check_positive("noise", self.noise, zero=True)
        given, device = Given.of(X), as_device(self.device)
        column = self._validated_column(X)
        target = as_target(y, missing=True)
        check_consistent_length(column, target)
        if np.isnan(target).all():
            raise ValueError("y must hold at least one observed value; got NaN in every row.")

        variances = known_noise(noise, len(target), device)
        times, values = as_tensor(column, torch.float64, device), as_tensor(target, torch.float64, device)
        seen = values[~values.isnan()][:, None]
        maps = (
            Standardiser.fit(times, bool(self.normalize_X), "X"),
            Standardiser.fit(seen, bool(self.normalize_y), "y"),
        )
        _check_unit(seen)
        if len(seen) > 1 and bool((seen == seen[0]).all()):
            warnings.warn("y does not vary; it is centred and keeps unit scale.", DataWarning, stacklevel=3)
        order = times[:, 0].argsort(stable=True)
        warn_if_times_are_coarse(times[order, 0], stacklevel=4)
        times = maps[0].apply(times, torch.float64, "X")[order, 0]
        values = (values[order] - maps[1].shift[0]) / maps[1].scale[0]
        known = variances[order] / maps[1].scale[0] ** 2
        if self.noise == 0 and not bool((known > 0).all()):
            raise ValueError(
                "noise must be positive in all: the estimator's noise is 0, and so are known variances passed to fit."
            )

        model = TimeSeries(make_kernel(self.kernel), float(self.noise), self.mean, self.method).to(device)
        learned = Learned(None, True, 0)
        try:
            if self.optimizer is not None:
                learned = learn(
                    model,
                    times,
                    values,
                    known,
                    default_search(self.n_restarts) if self.optimizer == "lbfgs" else self.optimizer,
                    named=isinstance(self.kernel, str),
                    generator=make_generator(self.random_state),
                    callback=callback,
                    verbose=self.verbose,
                )
        except KeyboardInterrupt:
            # The search has put its best point back; leave a usable estimator behind.
            self._condition(model, times, values, known, order, maps, given, Learned(None, False, 0))
            raise
        self._condition(model, times, values, known, order, maps, given, learned)

    def _condition(
        self,
        model: TimeSeries,
        times: Tensor,
        values: Tensor,
        known: Tensor,
        order: Tensor,
        maps: tuple[Standardiser, Standardiser],
        given: Given,
        learned: Learned,
    ) -> None:
        """Set what a fitted estimator has, from a model with its final hyperparameters: all of it or nothing."""
        model.requires_grad_(False)
        shift, unit = maps[1].shift[0].item(), maps[1].scale[0]
        n_observed = int((~values.isnan()).sum())
        with torch.no_grad():
            evidence = float(model.smooth(times, values, known)[1] - n_observed * unit.log())

        self._model = model
        self._times, self._y_train, self._known, self._order = times, values, known, order
        self._x_map, self._y_map = maps
        self._given = given
        self.kernel_ = model.kernel
        self.noise_ = model.noise.item()
        self.noise_variance_ = self.noise_ * unit.item() ** 2
        self.mean_ = shift + (0.0 if model.constant_mean is None else model.constant_mean.item() * unit.item())
        self.log_marginal_likelihood_ = evidence
        self.n_observed_ = n_observed
        self.optimizer_result_ = learned.result
        self.converged_ = learned.converged
        self.n_iter_ = learned.n_iter

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            "times": self._times,
            "y": self._y_train,
            "known": self._known,
            "order": self._order,
            "x_shift": self._x_map.shift,
            "x_scale": self._x_map.scale,
            "y_shift": self._y_map.shift,
            "y_scale": self._y_map.scale,
        }
        if self._model.constant_mean is not None:
            tensors["mean"] = self._model.constant_mean
        state = {
            "kernel": self.kernel_,
            "noise": self.noise_,
            "feature_names_in": list(getattr(self, "feature_names_in_", [])),
            "converged": self.converged_,
            "n_iter": self.n_iter_,
            "given": self._given.name,
        }
        return tensors, state

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        device = as_device(self.device)
        on = {k: v.to(device) for k, v in tensors.items()}
        self.n_features_in_ = 1
        if state["feature_names_in"]:
            self.feature_names_in_ = np.asarray(state["feature_names_in"], dtype=object)
        mean = "constant" if "mean" in on else "zero"
        model = TimeSeries(state["kernel"], state["noise"], mean, self.method).to(device)
        if model.constant_mean is not None:
            with torch.no_grad():
                model.constant_mean.copy_(on["mean"])
        maps = Standardiser(on["x_shift"], on["x_scale"]), Standardiser(on["y_shift"], on["y_scale"])
        given = Given.named(state["given"], device)
        learned = Learned(None, state["converged"], state["n_iter"])
        self._condition(model, on["times"], on["y"], on["known"], on["order"], maps, given, learned)


def _check_unit(seen: Tensor) -> None:
    """Raise ValueError where squares of the target would overflow or vanish."""
    size = seen.abs().max().item()
    if size > 0 and not 1e-140 < size < 1e140:
        raise ValueError(f"y must have entries between 1e-140 and 1e140 in size; got {size:.3g}. Rescale it.")
