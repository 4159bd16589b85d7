"""What a fitted process in time consists of, and the way from arguments to its units and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from stochproc._base import FLOATS, Given
from stochproc._persistence import as_tensor
from stochproc._standardise import Standardiser
from stochproc.kernels import Kernel
from stochproc.tensor._state_space_model import Series, TimeSeries
from stochproc.tensor._time_data import as_column, as_target, known_noise

__all__ = ["FittedSeries"]


class FittedSeries:
    """A model, sorted data in its units, and the two maps.

    Inside, the axis of several outputs is the first, a batch axis of the smoother; outside it is the last, but for
    the draws of ``sample_y``. One output has no such axis.
    """

    _model: TimeSeries
    _data: Series
    _order: Tensor
    _x_map: Standardiser
    _y_map: Standardiser
    _given: Given
    _n_outputs: int | None
    kernel_: Kernel

    def _inputs(self, X: Any) -> tuple[Given, Tensor]:
        check_is_fitted(self)
        given = Given.of(X)
        column = self._validated_column(X, reset=False)
        times = as_tensor(column, torch.float64, self._data.times.device)
        return given, self._x_map.apply(times, torch.float64, "X")[:, 0]

    def _validated_column(self, X: Any, **options: Any) -> np.ndarray:
        column = validate_data(self, as_column(X), dtype=FLOATS, **options)
        if column.shape[1] != 1:
            raise ValueError(f"X must have one column, the times; got {column.shape[1]} columns.")
        return column

    def _targets(self, y: Any, n: int, *, missing: bool = False) -> Tensor:
        """Return targets in the units of the model, (n,) or (p, n)."""
        target = self._checked_targets(y, n, missing=missing)
        values = as_tensor(target.T, torch.float64, self._data.times.device)
        return (values - self._y_shift.unsqueeze(-1)) / self._y_unit.unsqueeze(-1)

    def _checked_targets(self, y: Any, n: int, *, missing: bool) -> np.ndarray:
        """Return targets as they are given, (n,) or (n, p)."""
        target = as_target(y, missing=missing)
        check_consistent_length(np.empty(n), target)
        columns = target.reshape(len(target), -1)
        if columns.shape[1] != (self._n_outputs or 1):
            raise ValueError(f"y must have {self._n_outputs or 1} output(s) as in fit; got shape {target.shape}.")
        return columns if self._n_outputs is not None else columns[:, 0]

    def _known_of(self, noise: Any, n: int) -> Tensor:
        device = self._data.times.device
        return known_noise(noise, n, self._n_outputs, device) / self._y_unit.unsqueeze(-1) ** 2

    @property
    def _y_unit(self) -> Tensor:
        return self._y_map.scale[0] if self._n_outputs is None else self._y_map.scale

    @property
    def _y_shift(self) -> Tensor:
        return self._y_map.shift[0] if self._n_outputs is None else self._y_map.shift

    def _unscaled(self, value: Tensor, *, shift: bool = True, axes: int = 1) -> Tensor:
        """Return values (*batch, *axes) in the units of y."""
        unit, origin = (x.reshape(*x.shape, *[1] * axes) for x in (self._y_unit, self._y_shift))
        return value * unit + origin if shift else value * unit

    def _by_row(self, value: Tensor) -> Tensor:
        """Bring the axis of outputs, first in the model, to the end."""
        return value if self._n_outputs is None else value.movedim(0, -1)

    def _moments(self, query: Tensor) -> tuple[Tensor, Tensor]:
        smoothed, _ = self._model.smooth(*self._data, query)
        return smoothed.mean[..., 0], smoothed.cov[..., 0, 0].clamp(min=0)

    def _std(self, variance: Tensor, latent: bool) -> Tensor:
        return (variance if latent else variance + self._model.noise).sqrt()
