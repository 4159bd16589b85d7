"""What a fitted process in time answers, in the units of the data and in the kind of array it was asked with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.metrics import r2_score
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from stochproc._base import ProbabilisticRegressorMixin, as_array, check_levels
from stochproc._checks import check_integer
from stochproc._random import make_generator
from stochproc.solvers import sample_paths
from stochproc.tensor._state_space_model import kernel_of_output
from stochproc.tensor._state_space_parts import StateSpaceParts

__all__ = ["StateSpacePredictions"]

_LOG_2PI = math.log(2 * math.pi)
# Numbers in the states of the draws that are smoothed together.
_STATES_AT_ONCE = 1 << 18


class StateSpacePredictions(StateSpaceParts, ProbabilisticRegressorMixin):
    """The methods of the contract of probabilistic regressors, from the fitted model and data."""

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
        mean : ndarray or Tensor of shape (n_samples,) or (n_samples, n_outputs)
        std : ndarray or Tensor of the same shape
            Only with ``return_std``.
        cov : ndarray or Tensor of shape (n_samples, n_samples) or (n_samples, n_samples, n_outputs)
            Only with ``return_cov``. Outputs are independent of each other.

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
                smoothed, _ = self._model.smooth(*self._data, query)
                mean, cov = smoothed.mean[..., 0], smoothed.joint_cov()[..., 0, :, 0]
                if not latent:
                    cov.diagonal(dim1=-2, dim2=-1).add_(self._model.noise)
                cov = cov * self._y_unit[..., None, None] ** 2
                return given.back(self._by_row(self._unscaled(mean))), given.back(self._by_row(cov))
            mean, variance = self._moments(query)
            mean = given.back(self._by_row(self._unscaled(mean)))
            if not return_std:
                return mean
            std = self._unscaled(self._std(variance, latent), shift=False)
            return mean, given.back(self._by_row(std))

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
        ndarray or Tensor of shape (n_samples, n_quantiles) or (n_samples, n_quantiles, n_outputs)
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
            found = mean.unsqueeze(-1) + std.unsqueeze(-1) * z
            return given.back(self._by_row(self._unscaled(found, axes=2)))

    def log_predictive_density(self, X: Any, y: Any, noise: Any = None) -> Any:
        """Return the log density of each new observation given the data.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        noise : float or array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
            Known variances of these observations on top of the learned noise, as in ``fit``.

        Returns
        -------
        ndarray or Tensor of shape (n_samples,)
            In nats and the units of y, one row at a time; with several outputs that of the row.
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
            density = _log_normal(target - mean, total) - self._y_unit.log().unsqueeze(-1)
            return given.back(density if self._n_outputs is None else density.sum(0))

    def log_marginal_likelihood(self, X: Any = None, y: Any = None, noise: Any = None) -> float:
        """Return log p(y) at the learned hyperparameters.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,), default=None
            Other data, taken alone; None means those of the fit, with their known noise.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
            NaN where nothing was observed.
        noise : float or array-like of shape (n_samples,) or (n_samples, n_outputs), default=None
            Known variances of the other data, as in ``fit``.

        Returns
        -------
        float
            In nats and the units of y; the sum over outputs.

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
            total = self._model.smooth(times, target[..., order], known[..., order])[1]
        return float((total - (~target.isnan()).sum(-1) * self._y_unit.log()).sum())

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the coefficient of determination of the predicted means, over targets that are not missing.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            NaN where nothing was observed.
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        float
            The mean over outputs.

        Raises
        ------
        ValueError
            If every target of an output is missing.
        """
        mean = np.asarray(as_array(self.predict(X)))
        target = self._checked_targets(y, len(mean), missing=True)
        columns, means = target.reshape(len(target), -1).T, mean.reshape(len(mean), -1).T
        weight = None if sample_weight is None else np.asarray(as_array(sample_weight))
        check_consistent_length(mean, target, weight)
        scores = []
        for k, (values, predicted) in enumerate(zip(columns, means, strict=True)):
            seen = ~np.isnan(values)
            if not seen.any():
                name = "y" if self._n_outputs is None else f"output {k} of y"
                raise ValueError(f"{name} must hold at least one observed value; got NaN in every row.")
            of_seen = None if weight is None else weight[seen]
            scores.append(r2_score(values[seen], predicted[seen], sample_weight=of_seen))
        return float(np.mean(scores))

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
        ndarray or Tensor of shape (n_rows, n_samples) or (n_rows, n_outputs, n_samples)

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
            return given.back(self._unscaled(draws).movedim((0, -1), (-1, 0)))

    def sample(self, X: Any, n_samples: int = 1, random_state: Any = None) -> Any:
        """Draw functions without noise jointly over the rows; ``sample_y(..., latent=True)``."""
        return self.sample_y(X, n_samples, random_state, latent=True)

    def loo(self) -> Any:
        """Return the leave-one-out log density of each training row.

        Returns
        -------
        ndarray or Tensor of shape (n_samples,)
            A tensor if ``fit`` was given one as X. In nats and the units of y, in the order of the rows of ``fit``,
            NaN for missing ones; with several outputs the sum over those that were observed. Hyperparameters stay
            those of all rows.

        Notes
        -----
        O(n): the message of a row is taken out of the smoothed marginal at its time.
        """
        check_is_fitted(self)
        with torch.no_grad():
            smoothed, _ = self._model.smooth(*self._data)
            noise = self._model.noise + self._data.known
            D, u = smoothed.left_out()
            density = _log_normal(noise.sqrt() * u / D, noise / D) - self._y_unit.log().unsqueeze(-1)
            missing = self._data.y.isnan()
            if self._n_outputs is not None:
                density, missing = density.masked_fill(missing, 0.0).sum(0), missing.all(0)
            density = density.masked_fill(missing, torch.nan)
            return self._given.back(torch.empty_like(density).scatter_(0, self._order, density))

    def _draw(self, query: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Draw functions, (n_samples, m) or (n_samples, p, m)."""
        times, y, known = self._data
        n, batch = len(times), y.shape[:-1]
        merged, order = torch.cat([times, query]).sort(stable=True)
        # Hyperparameters of their own make each output another process; else they are draws of one.
        kernels = [self.kernel_] if self._model.shared else [kernel_of_output(self.kernel_, k) for k in range(len(y))]
        spaces = [kernel.state_space() for kernel in kernels]
        noise = (self._model.noise + known).sqrt()
        found = []
        # Some at a time, so that memory stays that of a long series.
        size = max(1, _STATES_AT_ONCE // (len(merged) * spaces[0].state_dim * batch.numel()))
        for start in range(0, n_samples, size):
            some = min(size, n_samples - start)
            count = some * batch.numel() // len(spaces)
            drawn = torch.stack([sample_paths(ss, merged, count, generator=generator)[..., 0] for ss in spaces], 1)
            paths = torch.empty_like(drawn)
            paths[..., order] = drawn
            paths = paths.reshape(some, *batch, -1)
            shape = (some, *batch, n)
            fake = torch.randn(shape, dtype=noise.dtype, device=noise.device, generator=generator) * noise
            # The constant mean is in `smooth`, hence in the result.
            smoothed, _ = self._model.smooth(times, y - paths[..., :n] - fake, known, query)
            found.append(smoothed.mean[..., 0] + paths[..., n:])
        return torch.cat(found)


def _log_normal(error: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (error.square() / variance + variance.log() + _LOG_2PI)
