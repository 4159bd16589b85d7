"""What a fitted scale mixture answers, in the units of y and in the kind of array it was asked with."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from stochproc._base import Given, ProbabilisticRegressorMixin, check_levels
from stochproc._checks import check_integer
from stochproc._persistence import as_tensor
from stochproc._random import make_generator
from stochproc._standardise import Standardiser, within_range
from stochproc.gp._exact_posterior import ExactPosterior
from stochproc.gp._independent_posterior import IndependentPosterior
from stochproc.gp._independent_predictive import MixturePredictive
from stochproc.gp._large_posterior import LargePosterior
from stochproc.gp._predictive import Predictive
from stochproc.gp._scale_posterior import ScalePosterior

__all__ = ["ScaleMixturePredictions"]


class ScaleMixturePredictions(ProbabilisticRegressorMixin):
    """The methods of a regressor that need its posterior on standardised data and the two maps, nothing else."""

    posterior_: ExactPosterior | IndependentPosterior | LargePosterior
    scale_posterior_: ScalePosterior
    _x_map: Standardiser
    _y_map: Standardiser
    _single_output: bool
    _given: Given

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
            If both spreads are asked for, the variance does not exist (a Student-t law with at most two
            degrees of freedom; ``predict_quantiles`` always works), or a result is beyond the range of ``dtype``.

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
                return given.back(self._unscaled(law.mean)), given.back(self._unscaled(law.std, shift=False))
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
            found = self._predictive(inputs, latent).quantile(torch.as_tensor(levels))
            return given.back(self._unscaled(found if self._single_output else found.movedim(-1, 1)))

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
        inputs, targets = self._standardised(X), as_tensor(y, torch.float64, self.posterior_.X.device)
        if targets.reshape(len(targets), -1).shape[1] != len(self._y_map.scale):
            raise ValueError(
                f"y must have {len(self._y_map.scale)} output(s) as in fit; got shape {tuple(targets.shape)}."
            )
        shape = (len(targets),) if self._single_output else (len(targets), -1)
        targets = self._y_map.apply(targets.reshape(len(targets), -1), inputs.dtype, "y").reshape(shape)
        with torch.no_grad():
            density = self._predictive(inputs, False).log_prob(targets)
            return given.back((density - self._log_jacobian()).to(density.dtype))

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
        ndarray or Tensor of shape (n_samples,)
            A tensor if ``fit`` was given one as X. In nats and the units of y; hyperparameters stay those of all
            rows. Their sum is a criterion to compare models by.

        Notes
        -----
        O(n^3) time, no refit.
        """
        check_is_fitted(self)
        density = self.posterior_.loo()
        return self._given.back((density - self._log_jacobian()).to(density.dtype))

    def _standardised(self, X: Any) -> Tensor:
        train = self.posterior_.X
        return self._x_map.apply(as_tensor(X, torch.float64, train.device), train.dtype, "X")

    def _inputs(self, X: Any) -> tuple[Given, Tensor]:
        check_is_fitted(self)
        return Given.of(X), self._standardised(self._validated(X))

    def _predictive(self, inputs: Tensor, latent: bool) -> Predictive | MixturePredictive:
        return self.posterior_.predictive(inputs, noise=not latent)

    def _covariance(self, inputs: Tensor, latent: bool) -> Tensor:
        if self.scale_posterior_.missing_variance:
            raise ValueError(
                f"the predictive covariance does not exist: {self.scale_posterior_.missing_variance}; "
                "predict_quantiles always works."
            )
        # With the noise outside the scale, the scale is averaged over in the covariance, and outputs differ.
        factor = 1.0 if isinstance(self.posterior_, IndependentPosterior) else self.scale_posterior_.mean
        total = self.posterior_.covariance(inputs).double() * factor
        total = total.reshape(len(inputs), len(inputs), -1)
        if not latent:
            total.diagonal().add_(self.posterior_.noise.double() * factor)
        unit = self._y_map.scale
        result = within_range(total * unit * unit, inputs.dtype, "cov")
        return result[..., 0] if self._single_output else result

    def _log_jacobian(self) -> Tensor:
        return self._y_map.scale.log().sum()

    def _unscaled(self, value: Tensor, *, shift: bool = True) -> Tensor:
        """Return standardised outputs, on the last axis if there are several, in the units of y."""
        unit, origin = (t[0] if self._single_output else t for t in (self._y_map.scale, self._y_map.shift))
        result = value.double() * unit
        return within_range(result + origin if shift else result, value.dtype, "the prediction")
