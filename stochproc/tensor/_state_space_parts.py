"""What else the state of a fitted process holds: its slopes, and the parts of a sum of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_integer
from stochproc.kernels import ActiveDims, Kernel, Scale, StateSpace, Sum
from stochproc.tensor._state_space_fitted import FittedSeries

__all__ = ["StateSpaceParts"]


class StateSpaceParts(FittedSeries):
    """Predictions of linear functions of the state other than the output."""

    def predict_derivative(self, X: Any, return_std: bool = False, *, order: int = 1) -> Any:
        """Predict the slope of the function, or a higher derivative.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
        return_std : bool, default=False
            Whether to return standard deviations of the derivative too.
        order : int, default=1
            Which derivative, 1 or more: 1 is the slope, 2 the curvature.

        Returns
        -------
        derivative : ndarray or Tensor of shape (n_samples,) or (n_samples, n_outputs)
            In units of y a unit of X to the power of ``order``.
        std : ndarray or Tensor of the same shape
            Only with ``return_std``.

        Raises
        ------
        ValueError
            If paths of the kernel have no derivative of this order: a Matern 1/2 has none, 3/2 has one and 5/2 has
            two, "rbf" as approximated three; a sum or product has as many as its roughest part.
        """
        check_integer("order", order, 1)
        given, query = self._inputs(X)
        with torch.no_grad():
            row = _derivative_row(self.kernel_.state_space(), order)
            unit = self._x_map.scale[0] ** -order
            mean, std = self._of_state(query, row, return_std)
            mean = given.back(self._by_row(self._unscaled(mean[..., 0] * unit, shift=False)))
            if std is None:
                return mean
            return mean, given.back(self._by_row(self._unscaled(std[..., 0] * unit, shift=False)))

    def predict_components(self, X: Any, return_std: bool = False) -> Any:
        """Take the function apart into the parts of a sum of kernels, such as trend and season.

        Parameters
        ----------
        X : array-like of shape (n_samples, 1) or (n_samples,)
        return_std : bool, default=False
            Whether to return standard deviations of the parts too, each for itself.

        Returns
        -------
        mean : ndarray or Tensor of shape (n_samples, n_components) or (n_samples, n_components, n_outputs)
            In the units of y and the order of ``kernel_.kernels``, the terms of the sum; one component if the kernel is
            no sum. With ``mean_`` they add up to ``predict(X)``.
        std : ndarray or Tensor of the same shape
            Only with ``return_std``. Errors of different parts are correlated, so their variances do not add up to that
            of the function: what several parts contain, such as the level of a trend and of a periodic kernel, the
            data cannot divide between them.
        """
        given, query = self._inputs(X)
        with torch.no_grad():
            H = self.kernel_.state_space().H
            sizes = [part.state_space().state_dim for part in _terms(self.kernel_)]
            rows = torch.block_diag(*H[0].split(sizes))
            mean, std = self._of_state(query, rows, return_std)
            mean = given.back(self._by_row(self._unscaled(mean, shift=False, axes=2)))
            if std is None:
                return mean
            return mean, given.back(self._by_row(self._unscaled(std, shift=False, axes=2)))

    def _of_state(self, query: Tensor, rows: Tensor, return_std: bool) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation, (*batch, n_rows, k), of k linear functions (*batch, k, D) of the state."""
        smoothed, _ = self._model.smooth(*self._data, query)
        # All outputs are asked for at the same times.
        at = smoothed.positions.reshape(-1, len(query))[0]
        rows = rows.to(query).unsqueeze(-3)
        mean = (rows @ smoothed.state_mean[..., at, :].unsqueeze(-1)).squeeze(-1)
        if not return_std:
            return mean, None
        cov = rows @ smoothed.state_cov[..., at, :, :]
        return mean, (cov * rows).sum(-1).clamp(min=0).sqrt()


def _derivative_row(ss: StateSpace, order: int) -> Tensor:
    """Return the row (*batch, 1, D) that maps the state to a derivative of the function, or raise ValueError."""
    row = ss.derivative_output()
    for k in range(2, order + 1):
        # Noise that enters derivative k - 1 makes its paths rough; it enters exactly or not at all.
        if bool((row @ ss.L @ ss.Qc).any()):
            raise ValueError(
                f"order must be at most {k - 1} for {ss.name}, whose paths have no derivative of order {k}; got "
                f"{order}."
            )
        row = row @ ss.F
    return row


def _terms(kernel: Kernel) -> list[Kernel]:
    """Return the kernels whose states side by side are that of a sum, or the one kernel."""
    while isinstance(kernel, (Scale, ActiveDims)):
        kernel = kernel.kernel
    return [k for k in kernel.kernels if isinstance(k, Kernel)] if isinstance(kernel, Sum) else [kernel]
