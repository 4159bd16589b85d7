"""What a fitted functional decomposition answers, in the units of y and the kind of array it was asked with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import r2_score
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from stochproc._base import Given, ProbabilisticRegressorMixin, as_array, check_levels
from stochproc._checks import check_integer
from stochproc._persistence import as_tensor
from stochproc._random import make_generator
from stochproc.tensor._coordinate_ascent import Decomposition, Rows, diagonal_of
from stochproc.tensor._coordinates import as_coordinates, as_known, column_name, columns_of, place
from stochproc.tensor._dense import dense_moments
from stochproc.tensor._functional_parameters import weights_of
from stochproc.tensor._joint_law import joint_covariance
from stochproc.tensor._modes import Mode
from stochproc.tensor._packed import outer
from stochproc.tensor._time_data import as_target

__all__ = ["FunctionalPredictions"]


class _Queries(NamedTuple):
    """Distinct query points of each mode in ascending order, and where the rows are among them."""

    points: list[Tensor]
    rows: Rows


class FunctionalPredictions(ProbabilisticRegressorMixin):
    """The methods of an estimator that need its decomposition, its modes and the map of y, nothing else."""

    _model: Decomposition
    _modes: list[Mode]
    _categories: list[Any]
    _y_shift: float
    _y_unit: float
    _given: Given

    def predict(self, X: Any, return_std: bool = False, return_cov: bool = False, *, latent: bool = False) -> Any:
        """Predict the mean of entries, and on request their spread.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_modes)
            Any coordinates, not only those of the fit. A category that the fit did not see has the law of the prior,
            or is an error, as ``handle_unknown`` says.
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
            If both spreads are asked for, X is misshapen or not finite, or a category is unknown.

        Notes
        -----
        One smoother a mode over the points of fit and query, then O(R^2) a row for CP and O((R^2 / 2)^K) for Tucker;
        the covariance takes that for every pair of rows.
        """
        if return_std and return_cov:
            raise ValueError("return_std and return_cov must not both be True; ask for one of them.")
        given, queries = self._queries(X)
        with torch.no_grad():
            if return_cov:
                mean, cov = joint_covariance(self._model, queries.points, queries.rows.index)
                if not latent:
                    cov = cov + torch.eye(len(mean), dtype=cov.dtype, device=cov.device) / self._model.noise.precision
                return given.back(self._unscaled(mean)), given.back(cov * self._y_unit**2)
            mean, variance = self._moments(queries)
            if return_std:
                return given.back(self._unscaled(mean)), given.back(self._std(variance, latent) * self._y_unit)
            return given.back(self._unscaled(mean))

    def predict_quantiles(self, X: Any, q: Any, *, latent: bool = False) -> Any:
        """Predict quantiles of entries, by the normal law with the predicted mean and variance.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_modes)
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

        Notes
        -----
        The function is a sum of products of normal variables, whose tails are heavier than normal where the data say
        little; draws of ``sample_y`` have its law.
        """
        levels = check_levels("q", q)
        given, queries = self._queries(X)
        with torch.no_grad():
            mean, variance = self._moments(queries)
            z = torch.special.ndtri(torch.as_tensor(levels, dtype=mean.dtype, device=mean.device))
            return given.back(self._unscaled(mean[:, None] + self._std(variance, latent)[:, None] * z))

    def log_predictive_density(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Return the log density of each new entry, by the normal law with the predicted mean and variance.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_modes)
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,), default=None
            Positive relative precisions of the noise, as in ``fit``.

        Returns
        -------
        ndarray or Tensor of shape (n_samples,)
            In nats and the units of y.
        """
        given, queries = self._queries(X)
        target = column_or_1d(as_target(y, missing=False))
        check_consistent_length(np.empty(len(queries.rows)), target)
        weight = weights_of(sample_weight, len(target))
        if (weight == 0).any():
            raise ValueError("sample_weight must be positive here; got 0.")
        with torch.no_grad():
            mean, variance = self._moments(queries)
            values = as_tensor((target - self._y_shift) / self._y_unit, torch.float64, mean.device)
            variance = variance + 1 / (self._model.noise.precision * as_tensor(weight, torch.float64, mean.device))
            density = -0.5 * ((values - mean).square() / variance + (2 * math.pi * variance).log())
            return given.back(density - math.log(self._y_unit))

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = None, *, latent: bool = False) -> Any:
        """Draw entries jointly over the rows: functions, core and noise by their posterior.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_modes)
        n_samples : int, default=1
            Number of joint draws.
        random_state : int, RandomState, Generator or None, default=None
        latent : bool, default=False
            Whether to draw the function without noise.

        Returns
        -------
        ndarray or Tensor of shape (n_rows, n_samples)

        Notes
        -----
        O(n_samples (points + n_rows)): paths of the prior, corrected by a smoother each.
        """
        check_integer("n_samples", n_samples, 1)
        given, queries = self._queries(X)
        model, index = self._model, queries.rows.index
        generator = make_generator(random_state, model.factors[0].mean.device)
        with torch.no_grad():
            functions = [
                f.draw(p, n_samples, generator)[:, i]
                for f, p, i in zip(model.factors, queries.points, index, strict=True)
            ]
            draws = model.link.value(functions, model.link.draw_core(n_samples, generator))
            if not latent:
                noise = torch.randn(draws.shape, dtype=draws.dtype, device=draws.device, generator=generator)
                draws = draws + noise / math.sqrt(model.noise.precision)
            return given.back(self._unscaled(draws).mT)

    def latent(self, k: int, x: Any = None, return_std: bool = False) -> Any:
        """Return the functions of one mode.

        Parameters
        ----------
        k : int
            Mode, from 0.
        x : array-like of shape (n_points,), default=None
            Coordinates, or categories, in any order; None is ``index_[k]``.
        return_std : bool, default=False
            Whether to return standard deviations too.

        Returns
        -------
        mean : ndarray or Tensor of shape (n_points, rank)
            In scaled y: the product over modes, with the core, is y less its centre, in units of its scale.
        std : ndarray or Tensor of shape (n_points, rank)
            Only with ``return_std``.

        Raises
        ------
        ValueError
            If there is no mode k, or x is not finite or holds an unknown category where that is an error.

        Notes
        -----
        Functions are found up to scale and sign shared out among the modes, and up to rotations for Tucker.
        """
        check_is_fitted(self)
        check_integer("k", k, 0, len(self._modes) - 1)
        given = Given.of(x)
        points, index = self._query_points(k, np.asarray(as_array(self.index_[k] if x is None else x)))  # type: ignore[attr-defined]
        factor = self._model.factors[k]
        found = factor.at(points)
        mean, variance = found.mean[index], found.cov[:, diagonal_of(factor.rank)][index]
        return (given.back(mean), given.back(variance.clamp(min=0).sqrt())) if return_std else given.back(mean)

    def plot_latent(self, k: int, ax: Any = None, **options: Any) -> Any:
        """Draw the functions of one mode with bands; see ``LatentDisplay.from_estimator``.

        Parameters
        ----------
        k : int
            Mode, from 0.
        ax : matplotlib Axes, default=None
        **options
            Passed on.

        Returns
        -------
        LatentDisplay
        """
        from stochproc.tensor._latent_display import LatentDisplay

        return LatentDisplay.from_estimator(self, k, ax=ax, **options)

    def to_dense(self, grid: Sequence[Any], return_std: bool = False, *, latent: bool = False) -> Any:
        """Predict every entry of a grid without listing its rows.

        Parameters
        ----------
        grid : sequence of array-like
            Coordinates of each mode, in any order.
        return_std : bool, default=False
            Whether to return standard deviations too.
        latent : bool, default=False
            Whether they are those of the function without noise.

        Returns
        -------
        mean : ndarray or Tensor of shape (m_1, .., m_K)
            A tensor if the first of the grid is one.
        std : ndarray or Tensor of the same shape
            Only with ``return_std``.

        Raises
        ------
        ValueError
            If the grid has not one entry a mode.
        """
        check_is_fitted(self)
        if len(grid) != len(self._modes):
            raise ValueError(f"grid must have one entry a mode, {len(self._modes)}; got {len(grid)}.")
        given = Given.of(grid[0])
        found = [self._query_points(k, np.asarray(as_array(g)).reshape(-1)) for k, g in enumerate(grid)]
        with torch.no_grad():
            laws = [f.at(points) for f, (points, _) in zip(self._model.factors, found, strict=True)]
            means = [law.mean[index] for law, (_, index) in zip(laws, found, strict=True)]
            covs = [law.cov[index] for law, (_, index) in zip(laws, found, strict=True)]
            mean, second = dense_moments(self._model.link, means, covs if return_std else None)
            if second is None:
                return given.back(self._unscaled(mean))
            variance = (second - mean.square()).clamp(min=0)
            return given.back(self._unscaled(mean)), given.back(self._std(variance, latent) * self._y_unit)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the coefficient of determination of the predicted means, over rows whose y is not NaN.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_modes)
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        float

        Raises
        ------
        ValueError
            If every y is NaN.
        """
        check_is_fitted(self)
        target = column_or_1d(as_target(y, missing=True))
        seen = ~np.isnan(target)
        if not seen.any():
            raise ValueError("y must hold at least one observed value; got NaN in every row.")
        mean = np.asarray(as_array(self.predict(X)))
        check_consistent_length(mean, target)
        weight = None if sample_weight is None else np.asarray(as_array(sample_weight))[seen]
        return float(r2_score(target[seen], mean[seen], sample_weight=weight))

    def _moments(self, queries: _Queries) -> tuple[Tensor, Tensor]:
        """Mean and variance of f in scaled y."""
        model = self._model
        laws = [f.at(p) for f, p in zip(model.factors, queries.points, strict=True)]
        tables = [(law.mean, law.cov + outer(law.mean)) for law in laws]
        found = []
        for some in queries.rows.chunks(model.chunk_size, model.link.width):
            means = [table[0][i] for table, i in zip(tables, some.index, strict=True)]
            seconds = [table[1][i] for table, i in zip(tables, some.index, strict=True)]
            mean, second = model.link.moments(means, seconds)
            found.append((mean, (second - mean.square()).clamp(min=0)))
        return torch.cat([m for m, _ in found]), torch.cat([v for _, v in found])

    def _queries(self, X: Any) -> tuple[Given, _Queries]:
        check_is_fitted(self)
        given = Given.of(X)
        columns = columns_of(self, X, self._modes, reset=False)
        found = [self._query_points(k, column, checked=True) for k, column in enumerate(columns)]
        index = tuple(i for _, i in found)
        nothing = torch.zeros(len(columns[0]), dtype=torch.float64, device=index[0].device)
        return given, _Queries([p for p, _ in found], Rows(nothing, nothing, index))

    def _query_points(self, k: int, column: np.ndarray, *, checked: bool = False) -> tuple[Tensor, Tensor]:
        """Distinct points in ascending order, and where the column is among them."""
        mode, device = self._modes[k], self._model.factors[k].points.device
        if not checked:
            column = as_coordinates(self, column.reshape(-1), mode, k)
        if mode.kind == "discrete":
            column = as_known(self, column, self._categories[k], k)
            column = place(column, self._categories[k])
            unknown = column >= len(self._categories[k])
            if self.handle_unknown == "error" and unknown.any():  # type: ignore[attr-defined]
                row = int(np.flatnonzero(unknown)[0])
                raise ValueError(
                    f"X must hold known categories in {column_name(self, k)}; row {row} has another. Pass "
                    "handle_unknown='prior' to predict it by the prior."
                )
        points, index = torch.unique(as_tensor(column, torch.float64, device), return_inverse=True)
        return points, index

    def _std(self, variance: Tensor, latent: bool) -> Tensor:
        return (variance if latent else variance + 1 / self._model.noise.precision).sqrt()

    def _unscaled(self, value: Tensor) -> Tensor:
        return value * self._y_unit + self._y_shift
