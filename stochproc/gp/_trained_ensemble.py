"""Infinitely large ensembles of infinitely wide trained networks as a scikit-learn estimator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.metaestimators import available_if
from torch import Tensor

from stochproc._base import Given, old_fit_unless_new
from stochproc._checks import check_choice, check_integer
from stochproc._options import DTYPES, as_device, plain_bool
from stochproc._persistence import as_tensor
from stochproc._random import make_generator
from stochproc._standardise import Standardiser, varies, within_range
from stochproc._warnings import warn_caller
from stochproc.exceptions import DataWarning
from stochproc.gp._predictions import ScaleMixturePredictions
from stochproc.gp._regressor_parameters import check_random_state
from stochproc.gp._scale_priors import as_scale_prior
from stochproc.gp._trained import TrainedLaw, trained_law
from stochproc.gp._trained_flow import GradientFlow
from stochproc.gp._trained_network import as_network, network_parts

__all__ = ["TrainedEnsemble"]


class TrainedEnsemble(ScaleMixturePredictions, RegressorMixin, BaseEstimator):
    r"""Regression by an infinitely large ensemble of infinitely wide networks, each trained by gradient descent.

    Every network starts from random weights of a random scale s, drawn from ``scale_prior``, and is trained on the
    squared loss by small steps. Their outputs form a scale mixture of Gaussian processes: a Student-t process for the
    inverse gamma prior. Mean and spread are those of the ensemble, in closed form.

    Parameters
    ----------
    net : str, network, pair of kernels or kernel, default="mlp-relu-2"
        "mlp-relu-2" is a multilayer perceptron of two hidden layers, "resmlp-3" a residual one; see
        ``stochproc.gp.arch`` for networks of other kinds. A pair (K, Th) gives covariance and tangent kernel of the
        outputs, each whatever :func:`stochproc.kernels.as_kernel` takes. One kernel alone (or its name) will do for
        ``train="readout"``. Its hyperparameters are kept as given.
    scale_prior : ScalePrior or str, default="inverse_gamma"
        Law of s, for standardised data: an object such as ``InverseGamma(a=3.0)`` or a name. Training does not update
        it: the predictive law of ``InverseGamma(a, b)`` has 2a degrees of freedom, however many the data.
    time : float, default=inf
        How long the networks are trained, non-negative; inf is until convergence, when they interpolate the data
        unless there is a ridge. In a direction of eigenvalue l of the tangent kernel a share
        :math:`1 - e^{-\eta t l}` of the targets is learned.
    learning_rate : float, default=1.0
        The speed eta of training; only its product with ``time`` matters.
    ridge : float, default=0.0
        Weight decay towards the initial weights, non-negative: a penalty :math:`\tfrac r2 |w - w_0|^2` beside
        :math:`\tfrac12 |f - y|^2`, in units of standardised data. The mean is then that of regression with the tangent
        kernel and noise of variance r. Noisy data want a ridge or a finite time, since networks that interpolate agree
        on the noise as well.
    rate : {"scaled", "fixed"}, default="scaled"
        "scaled" divides the learning rate of a network by its s, so that all learn equally fast; "fixed" is one rate
        for all, so that those of large scale learn faster. They agree for ``time=inf``. "fixed" at finite time costs
        some 200 times as much to predict.
    train : {"all", "readout"}, default="all"
        Which layers are trained: all, or the last one only.
    normalize_X : bool or "global", default=True
        Standardise each column (constant columns keep unit scale), or all columns by one scale ("global"), or not at
        all.
    normalize_y : bool, default=True
        Centre and standardise each output. Untrained networks have mean 0, so uncentred targets are pulled there.
    dtype : {"float64", "float32"}, default="float64"
        Precision of the computation.
    device : str, torch.device or None, default=None
        Where to compute; None is the CPU.
    random_state : int, RandomState, Generator or None, default=None
        What :meth:`sample_y` draws from unless it is given one itself.

    Attributes
    ----------
    posterior_ : TrainedLaw
        The law of the trained outputs on standardised data, for use in torch code.
    net_ : torch.nn.Module
        The network, with functions ``nngp``, ``ntk``, ``nngp_ntk`` and ``diag``.
    scale_prior_ : ScalePrior
        A copy of the prior.
    scale_posterior_ : ScalePosterior
        The law of s: the prior.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Column names, where X had any.

    See Also
    --------
    trained_law : The same model for torch code.
    ScaleMixtureGPRegressor : Bayesian inference instead of training; the scale is then updated by the data.

    Notes
    -----
    ``fit`` takes one symmetric eigendecomposition, 9 n³ operations, and memory for five n x n matrices; ``predict``
    O(n) a row without and O(n²) with a spread. The spread is that of the outputs of the networks: there is no noise
    in the model, so that ``latent`` changes nothing, and networks that meet a target agree on it. The density of a
    value known exactly is infinite.

    References
    ----------
    .. [1] H. Lee, E. Yun, H. Yang, J. Lee, "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022.
    .. [2] J. Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
       2019.

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.gp import TrainedEnsemble
    >>> X = np.linspace(0, 6, 20)[:, None]
    >>> model = TrainedEnsemble("mlp-relu-2").fit(X, np.sin(X[:, 0]))
    >>> bool(abs(model.predict(X[:1])[0]) < 1e-6), model.scale_posterior_.df
    (True, 4.0)
    """

    posterior_: TrainedLaw  # type: ignore[assignment]

    def __init__(
        self,
        net: Any = "mlp-relu-2",
        scale_prior: Any = "inverse_gamma",
        *,
        time: float = math.inf,
        learning_rate: float = 1.0,
        ridge: float = 0.0,
        rate: str = "scaled",
        train: str = "all",
        normalize_X: Any = True,
        normalize_y: Any = True,
        dtype: str = "float64",
        device: Any = None,
        random_state: Any = None,
    ) -> None:
        self.net = net
        self.scale_prior = scale_prior
        self.time = time
        self.learning_rate = learning_rate
        self.ridge = ridge
        self.rate = rate
        self.train = train
        self.normalize_X = normalize_X
        self.normalize_y = normalize_y
        self.dtype = dtype
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "posterior_")

    def fit(self, X: Any, y: Any) -> TrainedEnsemble:
        """Train the ensemble.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            At least 2 rows if anything is standardised.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Outputs share network and scale.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter is out of range, or the data are not finite, misshapen, too few, or too large or small to
            be standardised in float64.
        NotPositiveDefiniteError
            If a kernel matrix is not positive semi-definite.

        Warns
        -----
        NumericalWarning
            If the tangent kernel is singular to rounding, as with repeated rows, and training would amplify that: the
            directions in question stay untrained.
        DataWarning
            If y does not vary.
        """
        with old_fit_unless_new(self, "posterior_"), torch.inference_mode(False):
            flow = self._checked_flow()
            dtype, device = DTYPES[self.dtype], as_device(self.device)
            how_X, how_y = plain_bool(self.normalize_X), plain_bool(self.normalize_y)
            given = Given.of(X)
            X, y = self._validated_pair(X, y, ensure_min_samples=2 if how_X is not False or how_y else 1)
            inputs, targets = as_tensor(X, torch.float64, device), as_tensor(y, torch.float64, device)
            single = targets.ndim == 1
            targets = targets.reshape(len(targets), -1)
            maps = Standardiser.fit(inputs, how_X, "X"), Standardiser.fit(targets, how_y, "y")
            if how_y and not bool(varies(targets).all()):
                warn_caller("y does not vary; it is centred and keeps unit scale.", DataWarning)
            inputs, targets = maps[0].apply(inputs, dtype, "X"), maps[1].apply(targets, dtype, "y")
            net = as_network(self.net, inputs.shape[1], tangent=self.train == "all").to(device)
            shaped = targets[:, 0] if single else targets
            law = trained_law(net, inputs, shaped, flow=flow, scale_prior=self.scale_prior, train=self.train)
            named = self.net if isinstance(self.net, str) else None
            self._set(law, shaped, maps, given, named)
        return self

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = None, *, latent: bool = False) -> Any:
        """Draw outputs of trained networks jointly over the rows; one draw is one network.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_features)
        n_samples : int, default=1
            Number of networks.
        random_state : int, RandomState, Generator or None, default=None
            None takes that of the estimator.
        latent : bool, default=False
            Changes nothing, as there is no noise.

        Returns
        -------
        ndarray or Tensor of shape (n_rows, n_samples) or (n_rows, n_outputs, n_samples)
        """
        check_integer("n_samples", n_samples, 1)
        given, inputs = self._inputs(X)
        generator = make_generator(self.random_state if random_state is None else random_state, inputs.device)
        with torch.no_grad():
            draws = self._unscaled(self.posterior_.sample(inputs, n_samples, generator=generator))
            return given.back(draws.movedim(0, -1))

    @available_if(lambda self: False)
    def loo(self) -> Any:
        """Not available: training has no leave-one-out density in closed form."""
        raise AttributeError("loo")

    def _checked_flow(self) -> GradientFlow:
        """Check all parameters but the network and the prior."""
        check_choice("train", self.train, ("all", "readout"))
        check_choice("normalize_X", plain_bool(self.normalize_X), (True, False, "global"))
        check_choice("normalize_y", plain_bool(self.normalize_y), (True, False))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_random_state(self.random_state)
        as_scale_prior(self.scale_prior)
        return GradientFlow(self.time, self.learning_rate, self.ridge, self.rate)

    def _set(
        self,
        law: TrainedLaw,
        targets: Tensor,
        maps: tuple[Standardiser, Standardiser],
        given: Given,
        named: str | None,
    ) -> None:
        """Set what a fitted estimator has."""
        self.posterior_ = law
        self._given = given
        self._x_map, self._y_map = maps
        self._single_output = law.single_output
        self._y_train = targets
        self._net_name = named
        self.net_ = law.net
        self.scale_prior_ = law.scale_prior
        self.scale_posterior_ = law.scale

    def _covariance(self, inputs: Tensor, latent: bool) -> Tensor:
        total, unit = self.posterior_.covariance(inputs), self._y_map.scale
        return within_range(total.double() * (unit[0] if self._single_output else unit).square(), total.dtype, "cov")

    def _predictive(self, inputs: Tensor, latent: bool) -> Any:
        return self.posterior_.predictive(inputs)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"X": self.posterior_.X, "y": self._y_train}
        for name, part in (("x", self._x_map), ("y", self._y_map)):
            tensors |= {f"{name}_shift": part.shift, f"{name}_scale": part.scale}
        flow = self.posterior_.solution.flow
        state = {
            "net": network_parts(self.net_) if self._net_name is None else self._net_name,
            "scale_prior": self.scale_prior_,
            "flow": [flow.time, flow.learning_rate, flow.ridge, flow.rate],
            "train": "readout" if self.posterior_.solution.factor is None else "all",
            "n_features_in": self.n_features_in_,
            "feature_names_in": list(getattr(self, "feature_names_in_", [])),
            "given": self._given.name,
        }
        return tensors, state

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        on = {k: v.to(as_device(self.device)) for k, v in tensors.items()}
        maps = (
            Standardiser(on["x_shift"].double(), on["x_scale"].double()),
            Standardiser(on["y_shift"].double(), on["y_scale"].double()),
        )
        self.n_features_in_ = state["n_features_in"]
        if state["feature_names_in"]:
            self.feature_names_in_ = np.asarray(state["feature_names_in"], dtype=object)
        X, y, train = on["X"], on["y"], state["train"]
        net = as_network(state["net"], self.n_features_in_, tangent=train == "all").to(X.device)
        flow = GradientFlow(*state["flow"])
        law = trained_law(net, X, y, flow=flow, scale_prior=state["scale_prior"], train=train)
        named = state["net"] if isinstance(state["net"], str) else None
        self._set(law, y, maps, Given.named(state["given"], X.device), named)
