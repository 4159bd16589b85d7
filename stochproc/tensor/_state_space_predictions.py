"""What a fitted process in time answers, in the units of the data and in the kind of array it was asked with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.metrics import r2_score
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from stochproc._base import FLOATS, Given, ProbabilisticRegressorMixin, as_array, check_levels
from stochproc._checks import check_integer
from stochproc._persistence import as_tensor
from stochproc._random import make_generator
from stochproc._standardise import Standardiser
from stochproc.kernels import Kernel
from stochproc.solvers import sample_paths
from stochproc.tensor._state_space_model import TimeSeries
from stochproc.tensor._time_data import as_column, as_target, known_noise

__all__ = ["StateSpacePredictions"]

_LOG_2PI = math.log(2 * math.pi)
# Numbers in the states of the draws that are smoothed together.
_STATES_AT_ONCE = 1 << 18


class StateSpacePredictions(ProbabilisticRegressorMixin):
    """The methods that need the fitted model, the sorted data in its units and the two maps, nothing else."""

    _model: TimeSeries
    _times: Tensor
    _y_train: Tensor
    _known: Tensor
    _x_map: Standardiser
    _y_map: Standardiser
    _given: Given
    _order: Tensor
    kernel_: Kernel

    def predict(self, X: Any, return_std: bool = False, return_cov: bool = False, *, latent: bool = False) -> Any:
        """Predict the mean of new observations, and on request their spread.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
            Times in any order, before, between, at and after those of the data.
        return_std : bool, default=False
            Whether to return standard deviations too.
        return_cov : bool, default=False
            Whether to return the joint covariance of the rows too.
        latent : bool, default=False
            Whether the spread is that of the function without noise.

        Returns
        -------
        mean : ndarray or Tensor of shape (n_samples,)
        std : ndarray or Tensor of shape (n_samples,)
            Only with ``return_std``.
        cov : ndarray or Tensor of shape (n_samples, n_samples)
            Only with ``return_cov``.

        Raises
        ------
        ValueError
            If both spreads are asked for, or X lies before the start of a process that begins at a given time.

        Notes
        -----
        O((n + n_samples) D^3) time for D states; the joint covariance takes O(n_samples^2) more. New
        observations have the learned noise, not the known variances of the training rows.
        """
        if return_std and return_cov:
            raise ValueError("return_std and return_cov must not both be True; ask for one of them.")
        given, query = self._inputs(X)
        with torch.no_grad():
            if return_cov:
                smoothed, _ = self._model.smooth(self._times, self._y_train, self._known, query)
                mean, cov = smoothed.mean[..., 0], smoothed.joint_cov()[:, 0, :, 0]
                if not latent:
                    cov.diagonal().add_(self._model.noise)
                return given.back(self._unscaled(mean)), given.back(cov * self._y_unit**2)
            mean, variance = self._moments(query)
            if not return_std:
                return given.back(self._unscaled(mean))
            std = self._std(variance, latent)
            return given.back(self._unscaled(mean)), given.back(std * self._y_unit)

    def predict_quantiles(self, X: Any, q: Any, *, latent: bool = False) -> Any:
        """Predict quantiles of new observations.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
        q : float or sequence of float
            Probabilities in (0, 1).
        latent : bool, default=False
            Whether to give quantiles of the function without noise.

        Returns
        -------
        ndarray or Tensor of shape (n_samples, n_quantiles)
            In the units of y, increasing in q.

        Raises
        ------
        ValueError
            If a probability does not lie in (0, 1).
        """
        levels = check_levels("q", q)
        given, query = self._inputs(X)
        with torch.no_grad():
            mean, variance = self._moments(query)
            std = self._std(variance, latent)
            z = torch.special.ndtri(torch.as_tensor(levels, device=mean.device))
            return given.back(self._unscaled(mean[:, None] + std[:, None] * z))

    def predict_derivative(self, X: Any, return_std: bool = False) -> Any:
        """Predict the slope of the function.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
        return_std : bool, default=False
            Whether to return standard deviations of the slope too.

        Returns
        -------
        slope : ndarray or Tensor of shape (n_samples,)
            In units of y a unit of X.
        std : ndarray or Tensor of shape (n_samples,)
            Only with ``return_std``.

        Raises
        ------
        ValueError
            If paths of the kernel are not differentiable, such as those of a Matern 1/2.
        """
        given, query = self._inputs(X)
        with torch.no_grad():
            row = self.kernel_.state_space().derivative_output().to(query)[0]
            smoothed, _ = self._model.smooth(self._times, self._y_train, self._known, query)
            unit, at = self._y_unit / self._x_map.scale[0], smoothed.positions
            slope = smoothed.state_mean[at] @ row
            if not return_std:
                return given.back(slope * unit)
            std = torch.einsum("i,nij,j->n", row, smoothed.state_cov[at], row).clamp(min=0).sqrt()
            return given.back(slope * unit), given.back(std * unit)

    def log_predictive_density(self, X: Any, y: Any, noise: Any = None) -> Any:
        """Return the log density of each new observation given the data.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
        y : array-like of shape (n_samples,)
        noise : float or array-like of shape (n_samples,), default=None
            Known variances of these observations on top of the learned noise, as in ``fit``.

        Returns
        -------
        ndarray or Tensor of shape (n_samples,)
            In nats and the units of y, one row at a time.
        """
        given, query = self._inputs(X)
        target, known = self._targets(y, len(query)), self._known_of(noise, len(query))
        with torch.no_grad():
            mean, variance = self._moments(query)
            total = variance + self._model.noise + known
            if not bool((total > 0).all()):
                raise ValueError(
                    "noise must be positive where the function is known exactly; pass the known variances."
                )
            return given.back(_log_normal(target - mean, total) - self._y_unit.log())

    def log_marginal_likelihood(self, X: Any = None, y: Any = None, noise: Any = None) -> float:
        """Return log p(y) at the learned hyperparameters.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,), default=None
            Other data, taken alone; None means those of the fit, with their known noise.
        y : array-like of shape (n_samples,), default=None
            NaN where nothing was observed.
        noise : float or array-like of shape (n_samples,), default=None
            Known variances of the other data, as in ``fit``.

        Returns
        -------
        float
            In nats and the units of y.

        Raises
        ------
        ValueError
            If only one of X and y is given, ``noise`` without them, or the noise of a row is zero in all.
        """
        check_is_fitted(self)
        if (X is None) != (y is None) or (X is None and noise is not None):
            raise ValueError("X and y must be given together, or neither; noise goes with them.")
        if X is None:
            return float(self.log_marginal_likelihood_)  # type: ignore[attr-defined]
        _, times = self._inputs(X)
        target = self._targets(y, len(times), missing=True)
        known = self._known_of(noise, len(times))
        if not bool((self._model.noise + known > 0).all()):
            raise ValueError("noise must be positive in all: the fit learned none; pass the known variances.")
        times, order = times.sort(stable=True)
        with torch.no_grad():
            total = self._model.smooth(times, target[order], known[order])[1]
        return float(total - (~target.isnan()).sum() * self._y_unit.log())

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the coefficient of determination of the predicted means, over rows whose target is not missing.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
        y : array-like of shape (n_samples,)
            NaN where nothing was observed.
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        float

        Raises
        ------
        ValueError
            If every target is missing.
        """
        check_is_fitted(self)
        target = as_target(y, missing=True)
        seen = ~np.isnan(target)
        if not seen.any():
            raise ValueError("y must hold at least one observed value; got NaN in every row.")
        mean = np.asarray(as_array(self.predict(X)))
        check_consistent_length(mean, target)
        weight = None if sample_weight is None else np.asarray(as_array(sample_weight))[seen]
        return float(r2_score(target[seen], mean[seen], sample_weight=weight))

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = None, *, latent: bool = False) -> Any:
        """Draw new observations jointly over the rows.

        Parameters
        ----------
        X : array-like of shape (n_rows, 1) or (n_rows,)
        n_samples : int, default=1
            Number of joint draws.
        random_state : int, RandomState, Generator or None, default=None
        latent : bool, default=False
            Whether to draw functions without noise.

        Returns
        -------
        ndarray or Tensor of shape (n_rows, n_samples)

        Notes
        -----
        O(n_samples (n + n_rows) D^3): a path of the prior plus the smoothed difference between the data and that
        path with noise, which has exactly the law of the posterior (Matheron's rule).
        """
        check_integer("n_samples", n_samples, 1)
        given, query = self._inputs(X)
        generator = make_generator(random_state, query.device)
        with torch.no_grad():
            draws = self._draw(query, n_samples, generator)
            if not latent:
                noise = torch.randn(draws.shape, dtype=draws.dtype, device=draws.device, generator=generator)
                draws = draws + self._model.noise.sqrt() * noise
            return given.back(self._unscaled(draws).mT)

    def sample(self, X: Any, n_samples: int = 1, random_state: Any = None) -> Any:
        """Draw functions without noise jointly over the rows; ``sample_y(..., latent=True)``."""
        return self.sample_y(X, n_samples, random_state, latent=True)

    def loo(self) -> Any:
        """Return the leave-one-out log density of each training row.

        Returns
        -------
        ndarray or Tensor of shape (n_samples,)
            A tensor if ``fit`` was given one as X. In nats and the units of y, in the order of the rows of ``fit``,
            NaN for missing ones; hyperparameters stay those of all rows.

        Notes
        -----
        O(n): the message of a row is taken out of the smoothed marginal at its time.
        """
        check_is_fitted(self)
        with torch.no_grad():
            smoothed, _ = self._model.smooth(self._times, self._y_train, self._known)
            noise = self._model.noise + self._known
            D, u = smoothed.left_out()
            density = _log_normal(noise.sqrt() * u / D, noise / D) - self._y_unit.log()
            density = torch.where(self._y_train.isnan(), torch.nan, density)
            return self._given.back(torch.empty_like(density).scatter_(0, self._order, density))

    def _draw(self, query: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        merged, order = torch.cat([self._times, query]).sort(stable=True)
        ss, n = self.kernel_.state_space(), len(self._times)
        noise = (self._model.noise + self._known).sqrt()
        found = []
        # Some at a time, so that memory stays that of a long series.
        size = max(1, _STATES_AT_ONCE // (len(merged) * ss.state_dim))
        for start in range(0, n_samples, size):
            some = min(size, n_samples - start)
            sorted_paths = sample_paths(ss, merged, some, generator=generator)[..., 0]
            paths = torch.empty_like(sorted_paths)
            paths[:, order] = sorted_paths
            fake = torch.randn(some, n, dtype=noise.dtype, device=noise.device, generator=generator) * noise
            # The constant mean is in `smooth`, hence in the result.
            residual = self._y_train - paths[:, :n] - fake
            smoothed, _ = self._model.smooth(self._times, residual, self._known, query)
            found.append(smoothed.mean[..., 0] + paths[:, n:])
        return torch.cat(found)

    def _moments(self, query: Tensor) -> tuple[Tensor, Tensor]:
        smoothed, _ = self._model.smooth(self._times, self._y_train, self._known, query)
        return smoothed.mean[..., 0], smoothed.cov[..., 0, 0].clamp(min=0)

    def _std(self, variance: Tensor, latent: bool) -> Tensor:
        return (variance if latent else variance + self._model.noise).sqrt()

    def _inputs(self, X: Any) -> tuple[Given, Tensor]:
        check_is_fitted(self)
        given = Given.of(X)
        column = self._validated_column(X, reset=False)
        times = as_tensor(column, torch.float64, self._times.device)
        return given, self._x_map.apply(times, torch.float64, "X")[:, 0]

    def _validated_column(self, X: Any, **options: Any) -> np.ndarray:
        column = validate_data(self, as_column(X), dtype=FLOATS, **options)
        if column.shape[1] != 1:
            raise ValueError(f"X must have one column, the times; got {column.shape[1]} columns.")
        return column

    def _targets(self, y: Any, n: int, *, missing: bool = False) -> Tensor:
        target = as_target(y, missing=missing)
        check_consistent_length(np.empty(n), target)
        return (as_tensor(target, torch.float64, self._times.device) - self._y_map.shift[0]) / self._y_unit

    def _known_of(self, noise: Any, n: int) -> Tensor:
        return known_noise(noise, n, self._times.device) / self._y_unit**2

    @property
    def _y_unit(self) -> Tensor:
        return self._y_map.scale[0]

    def _unscaled(self, value: Tensor) -> Tensor:
        return value * self._y_unit + self._y_map.shift[0]


def _log_normal(error: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (error.square() / variance + variance.log() + _LOG_2PI)
