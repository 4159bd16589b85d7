"""Pictures of fitted processes."""

from __future__ import annotations

from typing import Any

import numpy as np

from stochproc._base import as_array, check_levels

__all__ = ["GPDisplay"]


class GPDisplay:
    """Predictions with their intervals beside the data.

    With one feature: the mean curve, an interval as a band, and the data as points. With more: predicted
    against observed values with an error bar each, and the diagonal.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
    y : ndarray of shape (n_samples,)
    mean : ndarray of shape (n_grid,)
        Predicted mean, on ``grid`` or, with several features, at ``X``.
    interval : ndarray of shape (n_grid, 2)
    coverage : float
        Probability inside the interval.
    grid : ndarray of shape (n_grid,) or None
        Where the curve is drawn; None with several features.
    names : tuple of str
        Names of the feature and of the target.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
    figure_ : matplotlib.figure.Figure

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.gp import GPDisplay, ScaleMixtureGPRegressor
    >>> X = np.linspace(0, 6, 20)[:, None]
    >>> model = ScaleMixtureGPRegressor(optimizer=None).fit(X, np.sin(X[:, 0]))
    >>> display = GPDisplay.from_estimator(model, X, np.sin(X[:, 0]))
    >>> display.ax_.get_xlabel()
    'x'
    """

    def __init__(
        self,
        *,
        X: np.ndarray,
        y: np.ndarray,
        mean: np.ndarray,
        interval: np.ndarray,
        coverage: float = 0.9,
        grid: np.ndarray | None = None,
        names: tuple[str, str] = ("x", "y"),
    ) -> None:
        self.X, self.y = X, y
        self.mean, self.interval = mean, interval
        self.coverage, self.grid, self.names = coverage, grid, names

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        coverage: float = 0.9,
        n_grid: int = 400,
        margin: float = 0.05,
        ax: Any = None,
        **kwargs: Any,
    ) -> GPDisplay:
        """Predict and draw.

        Parameters
        ----------
        estimator : fitted probabilistic regressor
            With one output.
        X : array-like of shape (n_samples, n_features), or (n_samples,) for processes in time
        y : array-like of shape (n_samples,)
            NaN, where the estimator takes it, is not drawn.
        coverage : float, default=0.9
            Probability inside the interval, in (0, 1).
        n_grid : int, default=400
            Points of the curve, with one feature.
        margin : float, default=0.05
            How far the curve goes beyond the data on either side, as a share of their range.
        ax : matplotlib.axes.Axes, default=None
            Where to draw; None makes a new figure.
        **kwargs
            Passed to the points' ``scatter`` or ``errorbar``.

        Returns
        -------
        GPDisplay

        Raises
        ------
        ValueError
            If ``y`` has several outputs, or ``coverage`` does not lie in (0, 1).
        """
        check_levels("coverage", coverage)
        named = isinstance(getattr(X, "name", None), str)
        columns = list(X.columns) if hasattr(X, "columns") else [X.name] if named else None
        names = (str(columns[0]) if columns else "x", str(getattr(y, "name", None) or "y"))
        points, target = np.asarray(as_array(X), dtype=float), np.asarray(as_array(y), dtype=float)
        points = points[:, None] if points.ndim == 1 else points
        if target.ndim != 1:
            raise ValueError(f"y must have shape (n_samples,), one output a picture; got {target.shape}.")
        grid, where = None, X
        if points.shape[1] == 1:
            low, high = points.min(), points.max()
            grid = np.linspace(low - margin * (high - low), high + margin * (high - low), n_grid)
            where = _as_frame(grid[:, None], columns)
        mean = np.asarray(as_array(estimator.predict(where)))
        interval = np.asarray(as_array(estimator.predict_interval(where, coverage)))
        display = cls(X=points, y=target, mean=mean, interval=interval, coverage=coverage, grid=grid, names=names)
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, **kwargs: Any) -> GPDisplay:
        """Draw on ``ax`` or a new figure; the data are kept in the display.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
        **kwargs
            Passed to the points' ``scatter`` or ``errorbar``.

        Returns
        -------
        GPDisplay
            With ``ax_`` and ``figure_`` set.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots()
        lower, upper = self.interval[:, 0], self.interval[:, 1]
        label = f"{100 * self.coverage:.3g} % interval"
        if self.grid is not None:
            ax.fill_between(self.grid, lower, upper, color="C0", alpha=0.2, linewidth=0, label=label)
            ax.plot(self.grid, self.mean, color="C0", label="mean")
            style = {"s": 12, "color": "black", "label": "data", "zorder": 3, **kwargs}
            ax.scatter(self.X[:, 0], self.y, **style)
            ax.set(xlabel=self.names[0], ylabel=self.names[1])
        else:
            bars = np.stack([self.mean - lower, upper - self.mean])
            style = {"fmt": "o", "markersize": 3, "elinewidth": 0.7, "color": "C0", "ecolor": "0.75", **kwargs}
            ax.errorbar(self.y, self.mean, yerr=bars, label=f"mean and {label}", **style)
            ends = [min(self.y.min(), self.mean.min()), max(self.y.max(), self.mean.max())]
            ax.plot(ends, ends, color="black", linewidth=0.8, label="exact")
            ax.set(xlabel=f"observed {self.names[1]}", ylabel=f"predicted {self.names[1]}")
        ax.legend(frameon=False)
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _as_frame(points: np.ndarray, columns: list[Any] | None) -> Any:
    """Return the grid with the column names of the data, so that no estimator warns of missing names."""
    if columns is None:
        return points
    import pandas as pd

    return pd.DataFrame(points, columns=columns)
