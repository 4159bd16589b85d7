"""What a fitted classifier answers, in the kind of array it was asked with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from stochproc._base import FLOATS, Given, as_array
from stochproc._persistence import as_tensor
from stochproc._standardise import Standardiser
from stochproc.gp._estimators import ScaleMixtureGPRegressor
from stochproc.gp._svi import ScaleMixtureSVGP
from stochproc.gp._svi_links import LatentMarginals, ScaleNodes, log_largest_of_each

__all__ = ["ClassProbabilities"]

# Equally probable scales that stand for the posterior of s in the regression on one-hot labels; with n C observed
# numbers log s spreads by sqrt(2 / (n C)) only.
_SCALE_QUANTILES = 7
_QUANTILE_DRAWS = 4001
_ROWS_OF_PROBABILITIES = 256


class ClassProbabilities:
    """The methods of a classifier that need its fitted model, its classes and the map of the inputs, nothing else."""

    n_samples_predict: int
    classes_: np.ndarray
    model_: ScaleMixtureSVGP
    regressor_: ScaleMixtureGPRegressor
    _x_map: Standardiser
    _seed: int

    def predict_log_proba(self, X: Any) -> Any:
        """Predict the logarithms of the probabilities of the classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray or Tensor of shape (n_samples, n_classes)
            Columns in the order of ``classes_``.
        """
        given, found = self._checked_log_proba(X)
        return given.back(found)

    def predict_proba(self, X: Any) -> Any:
        """Predict the probabilities of the classes, averaged over the posterior.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray or Tensor of shape (n_samples, n_classes)
            Columns in the order of ``classes_``; rows sum to one.
        """
        given, found = self._checked_log_proba(X)
        return given.back(found.exp())

    def predict(self, X: Any) -> Any:
        """Predict the class of the largest probability.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray or Tensor of shape (n_samples,)
            A tensor for a tensor, if classes are numbers.
        """
        given, found = self._checked_log_proba(X)
        labels = self.classes_[found.exp().argmax(1).cpu().numpy()]
        is_tensor = given.is_torch and self.classes_.dtype.kind in "biuf"
        return torch.as_tensor(labels, device=given.device) if is_tensor else labels

    def decision_function(self, X: Any) -> Any:
        """Return log odds of the second class, or with more than two classes the log probability of each.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray or Tensor of shape (n_samples,) or (n_samples, n_classes)
            ``predict`` is where it is largest (positive).
        """
        given, found = self._checked_log_proba(X)
        return given.back(found[:, 1] - found[:, 0] if len(self.classes_) == 2 else found)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the share of rows whose class is predicted.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,) or None, default=None
        """
        return super().score(as_array(X), as_array(y), as_array(sample_weight))  # type: ignore[misc]

    def _checked_log_proba(self, X: Any) -> tuple[Given, Tensor]:
        check_is_fitted(self)
        given = Given.of(X)
        inputs = validate_data(self, as_array(X), dtype=FLOATS, reset=False)
        with torch.no_grad():
            return given, self._log_proba(inputs)

    def _log_proba(self, X: Any) -> Tensor:
        if hasattr(self, "regressor_"):
            return self._log_proba_by_regression(X)
        Z = self.model_.inducing_points
        inputs = self._x_map.apply(as_tensor(X, torch.float64, Z.device), Z.dtype, "X")
        found = self.model_.log_proba(inputs, n_samples=self.n_samples_predict, seed=self._seed)
        # Averages of quasi-random draws and of quadrature sum to one up to rounding.
        return torch.log_softmax(found.double(), 1).to(found.dtype)

    def _log_proba_by_regression(self, X: Any) -> Tensor:
        """Log probabilities that the output of each class is the largest new observation."""
        law: Any = self.regressor_._predictive(self.regressor_._standardised(X), False)
        draws = law.scale.sample(_QUANTILE_DRAWS, generator=torch.Generator(law.loc.device).manual_seed(0))
        levels = (torch.arange(_SCALE_QUANTILES, dtype=torch.float64, device=draws.device) + 0.5) / _SCALE_QUANTILES
        spread = draws.double().quantile(levels).sqrt()
        scales = ScaleNodes(torch.ones_like(spread), spread, torch.full_like(spread, 1 / _SCALE_QUANTILES))
        variance = law.variance_before_scale[:, None].expand_as(law.loc)
        parts = zip(law.loc.split(_ROWS_OF_PROBABILITIES), variance.split(_ROWS_OF_PROBABILITIES), strict=True)
        return torch.cat([log_largest_of_each(LatentMarginals(m.mT, v.mT), scales) for m, v in parts])
