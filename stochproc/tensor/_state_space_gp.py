"""Regression in time by a Gaussian process, in linear time, as a scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_consistent_length
from torch import Tensor

from stochproc._base import Given, old_fit_unless_new
from stochproc._checks import check_choice, check_integer, check_positive
from stochproc._options import as_device, check_options, plain_bool
from stochproc._persistence import as_tensor
from stochproc._random import make_generator
from stochproc._search import Learned, default_search, warn_unless_converged
from stochproc._standardise import Standardiser
from stochproc.tensor._state_space_model import Series, TimeSeries, make_kernel, warn_if_times_are_coarse
from stochproc.tensor._state_space_predictions import StateSpacePredictions
from stochproc.tensor._state_space_search import Search, learn
from stochproc.tensor._time_data import as_target, known_noise, standardiser_of

__all__ = ["StateSpaceGP"]


class StateSpaceGP(StateSpacePredictions, RegressorMixin, BaseEstimator):
    r"""Regression in time by a Gaussian process, exact and in O(n): smoothing, gaps, forecasts and slopes.

    The model is that of an ordinary Gaussian process with one input, :math:`y_i = m + f(x_i) + \varepsilon_i`; its
    kernel is written as a linear stochastic differential equation, so that a Kalman smoother replaces the n by n
    matrix. Times may come in any order, repeat, and have gaps; NaN in y marks a value that was not observed. Several
    outputs, columns of y, are independent processes given the hyperparameters, which they share unless told otherwise.

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
        Prior mean of the (standardised) target: a learned constant, one an output, or zero.
    normalize_X : bool, default=False
        Whether to standardise the times. By default lengthscales and periods are in the unit of X.
    normalize_y : bool, default=True
        Whether to standardise the target, each output for itself. Variances of kernel and noise refer to it then;
        predictions to y.
    share_hyperparameters : bool, default=True
        Whether all outputs have one kernel and one noise, as in scikit-learn's ``GaussianProcessRegressor``. False
        learns them for each output as if it were alone, in one search after the other; a kernel object may then hold
        one an output, with ``batch_shape=(n_outputs,)``.
    hyper_subset : int or None, default=None
        Learn kernel and noise from so many rows, 64 stretches of neighbours spread over the series, and then the
        constant mean from all; None learns everything from all rows. The likelihood of m of n rows costs the
        share m / n, and its optimum about n / (2 m) nats of log p(y) a hyperparameter.
    optimizer : {"lbfgs"}, LBFGS or None, default="lbfgs"
        How hyperparameters are learned, by maximal marginal likelihood; None keeps every one as given.
    n_restarts : int, default=1
        Number of starts of the search in all; ignored if ``optimizer`` is an ``LBFGS`` object, which has its own. The
        first is where the kernel is; a later one is the likeliest of 30 draws over the scales and periods that the
        data can tell. A sum or product given without good starting values should have 2 or 3: its likelihood has
        many maxima.
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
        With ``share_hyperparameters=False`` a batch of them, one an output.
    noise_ : float, or ndarray of shape (n_outputs,) with ``share_hyperparameters=False``
        Learned noise variance of the (standardised) target.
    noise_variance_ : float or ndarray of shape (n_outputs,)
        The same in squared units of y.
    mean_ : float or ndarray of shape (n_outputs,)
        Prior mean in the units of y.
    log_marginal_likelihood_ : float
        log p(y) of all outputs at the learned hyperparameters, in nats and the units of y.
    n_observed_ : int
        Targets that are not NaN.
    converged_ : bool
        Whether every search met its tolerance; True with ``optimizer=None``.
    n_iter_ : int
        Iterations of the search, all starts and outputs together.
    optimizer_result_ : Result, None, or a list of them
        What the search reported; a list, one an output, with ``share_hyperparameters=False``.
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
    1, 2, 3 for the Matern kernels, 6 for "rbf", 15 for "periodic"; sums add them and products multiply them. On one
    core an evaluation takes 0.9 microseconds and 0.95 kB a row for "matern32", 7 and 5.7 kB for "rbf", and 120 and
    30 kB for a trend plus a season that drifts (18 states); "matern32" learns from a million rows in 15 seconds. p
    outputs take p times as much. For large states and very many rows see ``hyper_subset``.

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
        share_hyperparameters: bool = True,
        hyper_subset: int | None = None,
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
        self.share_hyperparameters = share_hyperparameters
        self.hyper_subset = hyper_subset
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
        tags.target_tags.multi_output = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_model")

    def fit(self, X: Any, y: Any, noise: Any = None, *, callback: Callable[[Any], Any] | None = None) -> StateSpaceGP:
        """Learn hyperparameters by maximal marginal likelihood and condition on the data.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
            Times in any order; repeated ones are several observations of one value.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            NaN where nothing was observed, in a row or in some outputs of it.
        noise : float or array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
            Known variances of the noise of the rows or of the values, non-negative, in squared units of y. The learned
            noise comes on top; pass the estimator ``noise=0`` for none.
        callback : callable, default=None
            Called with a ``SolverState`` after each iteration of the search; returning True stops it.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter is out of range, the kernel has no state space, X has more than one column or an entry
            that is not finite, y or an output of it holds infinity or nothing but NaN, or the noise of a row is zero
            in all.
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
            learned = self._fit(X, y, noise, callback)
        worst = next((one for one in learned if not one.converged), learned[0])
        warn_unless_converged(SimpleNamespace(converged_=worst.converged, optimizer_result_=worst.result))
        return self

    def _fit(self, X: Any, y: Any, noise: Any, callback: Callable[[Any], Any] | None) -> list[Learned]:
        """Do the work of ``fit``; nothing but what validation sets changes before the last step."""
        check_options(self)
        check_choice("normalize_X", plain_bool(self.normalize_X), (True, False))
        check_choice("method", self.method, ("auto", "scan", "sequential"))
        check_positive("noise", self.noise, zero=True)
        check_choice("share_hyperparameters", plain_bool(self.share_hyperparameters), (True, False))
        if self.hyper_subset is not None:
            check_integer("hyper_subset", self.hyper_subset, 2)
        given, device = Given.of(X), as_device(self.device)
        column = self._validated_column(X)
        target = as_target(y, missing=True)
        check_consistent_length(column, target)
        n_outputs = target.shape[1] if target.ndim == 2 else None
        variances = known_noise(noise, len(target), n_outputs, device)
        times, values = as_tensor(column, torch.float64, device), as_tensor(target.T, torch.float64, device)
        maps = (
            Standardiser.fit(times, bool(self.normalize_X), "X"),
            standardiser_of(values.reshape(-1, len(times)), bool(self.normalize_y)),
        )
        order = times[:, 0].argsort(stable=True)
        warn_if_times_are_coarse(times[order, 0], stacklevel=4)
        shift, unit = (x[0] if n_outputs is None else x.unsqueeze(-1) for x in maps[1])
        data = Series(
            maps[0].apply(times, torch.float64, "X")[order, 0],
            (values[..., order] - shift) / unit,
            variances[..., order] / unit**2,
        )
        if self.noise == 0 and not bool((data.known > 0).all()):
            raise ValueError(
                "noise must be positive in all: the estimator's noise is 0, and so are known variances passed to fit."
            )

        own = n_outputs if not self.share_hyperparameters else None
        kernel = make_kernel(self.kernel, own)
        model = TimeSeries(kernel, float(self.noise), self.mean, self.method, n_outputs).to(device)
        learned = [Learned(None, True, 0)]
        try:
            if self.optimizer is not None:
                search = Search(
                    default_search(self.n_restarts) if self.optimizer == "lbfgs" else self.optimizer,
                    isinstance(self.kernel, str),
                    self.hyper_subset,
                    make_generator(self.random_state),
                    callback,
                    self.verbose,
                )
                learned = learn(model, data, search)
        except KeyboardInterrupt:
            # The search has put its best point back; leave a usable estimator behind.
            self._condition(model, data, order, maps, given, [Learned(None, False, 0)])
            raise
        self._condition(model, data, order, maps, given, learned)
        return learned

    def _condition(
        self,
        model: TimeSeries,
        data: Series,
        order: Tensor,
        maps: tuple[Standardiser, Standardiser],
        given: Given,
        learned: list[Learned],
    ) -> None:
        """Set what a fitted estimator has, from a model with its final hyperparameters: all of it or nothing."""
        model.requires_grad_(False)
        n_outputs = None if data.y.ndim == 1 else len(data.y)
        shift, unit = (x[0] if n_outputs is None else x for x in maps[1])
        counts = (~data.y.isnan()).sum(-1)
        with torch.no_grad():
            evidence = float((model.smooth(*data)[1] - counts * unit.log()).sum())
            noise = model.log_noise.exp()
            mean = shift if model.constant_mean is None else shift + model.constant_mean * unit

        self._model, self._data, self._order = model, data, order
        self._x_map, self._y_map = maps
        self._given, self._n_outputs = given, n_outputs
        self.kernel_ = model.kernel
        self.noise_ = _plain(noise)
        self.noise_variance_ = _plain(noise * unit**2)
        self.mean_ = _plain(mean)
        self.log_marginal_likelihood_ = evidence
        self.n_observed_ = int(counts.sum())
        self.optimizer_result_ = learned[0].result if model.shared else [one.result for one in learned]
        self.converged_ = all(one.converged for one in learned)
        self.n_iter_ = sum(one.n_iter for one in learned)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            "times": self._data.times,
            "y": self._data.y,
            "known": self._data.known,
            "order": self._order,
            "x_shift": self._x_map.shift,
            "x_scale": self._x_map.scale,
            "y_shift": self._y_map.shift,
            "y_scale": self._y_map.scale,
        }
        # Beside the numbers of the kernel's config, whose logarithms would differ in the last bit.
        tensors |= {f"model.{name}": value for name, value in self._model.state_dict().items()}
        state = {
            "kernel": self.kernel_,
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
        mean = "constant" if "model.constant_mean" in on else "zero"
        n_outputs = None if on["y"].ndim == 1 else len(on["y"])
        model = TimeSeries(state["kernel"], 1.0, mean, self.method, n_outputs).to(device)
        model.load_state_dict({k.removeprefix("model."): v for k, v in on.items() if k.startswith("model.")})
        data = Series(on["times"], on["y"], on["known"])
        maps = Standardiser(on["x_shift"], on["x_scale"]), Standardiser(on["y_shift"], on["y_scale"])
        given = Given.named(state["given"], device)
        learned = [Learned(None, state["converged"], state["n_iter"])]
        self._condition(model, data, on["order"], maps, given, learned)


def _plain(value: Tensor) -> Any:
    """Return one number as a float, several as an array."""
    return value.item() if value.ndim == 0 else value.cpu().numpy()
