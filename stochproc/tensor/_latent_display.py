"""A picture of the functions of one mode."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import norm
from sklearn.utils.validation import check_is_fitted

from stochproc._base import as_array
from stochproc._checks import check_integer

__all__ = ["LatentDisplay"]


class LatentDisplay:
    """Functions of one mode of a functional decomposition, with pointwise bands.

    Parameters
    ----------
    x : ndarray of shape (n_points,)
        Coordinates in ascending order, or categories.
    mean, std : ndarray of shape (n_points, rank)
    coverage : float, default=0.9
        Probability of the bands, in (0, 1).
    name : str, default="coordinate"
        What the axis is called.
    observed : ndarray or None, default=None
        Coordinates of the data, drawn as ticks.

    Attributes
    ----------
    ax_ : matplotlib Axes
        After ``plot``.
    figure_ : matplotlib Figure
        After ``plot``.

    See Also
    --------
    FunctionalCP.plot_latent : Makes and draws one.
    """

    def __init__(
        self,
        x: Any,
        mean: np.ndarray,
        std: np.ndarray,
        *,
        coverage: float = 0.9,
        name: str = "coordinate",
        observed: np.ndarray | None = None,
    ) -> None:
        self.x, self.mean, self.std = x, mean, std
        self.coverage, self.name, self.observed = coverage, name, observed

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        k: int,
        *,
        ax: Any = None,
        n_points: int = 300,
        coverage: float = 0.9,
        components: Any = None,
        **options: Any,
    ) -> LatentDisplay:
        """Draw the functions of mode k of a fitted decomposition.

        Parameters
        ----------
        estimator : FunctionalCP or FunctionalTucker
        k : int
            Mode, from 0.
        ax : matplotlib Axes, default=None
            None makes a figure.
        n_points : int, default=300
            How finely a continuous mode is drawn, over the range of the data.
        coverage : float, default=0.9
            Probability of the bands, in (0, 1).
        components : sequence of int, default=None
            Which to draw; None is all.
        **options
            Passed to ``ax.plot``, or ``ax.errorbar`` for categories.

        Returns
        -------
        LatentDisplay
        """
        check_is_fitted(estimator)
        check_integer("k", k, 0, len(estimator._modes) - 1)
        check_integer("n_points", n_points, 2)
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must lie in (0, 1); got {coverage}.")
        mode = estimator._modes[k]
        points = estimator.index_[k]
        x = points
        if mode.kind == "periodic":
            x = np.linspace(0, mode.period * (1 - 1e-9), n_points)
        elif mode.kind == "continuous":
            x = np.linspace(points[0], points[-1], n_points)
        mean, std = (np.asarray(as_array(v)) for v in estimator.latent(k, x, return_std=True))
        if components is not None:
            mean, std = mean[:, list(components)], std[:, list(components)]
        names = getattr(estimator, "feature_names_in_", None)
        name = f"coordinate of mode {k}" if names is None else str(names[k])
        observed = None if mode.kind == "discrete" else points
        return cls(x, mean, std, coverage=coverage, name=name, observed=observed).plot(ax, **options)

    def plot(self, ax: Any = None, **options: Any) -> LatentDisplay:
        """Draw lines with bands, or points with bars for categories.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            None makes a figure.
        **options
            Passed to ``ax.plot`` or ``ax.errorbar``.

        Returns
        -------
        LatentDisplay
            Itself, with ``ax_`` and ``figure_``.
        """
        from matplotlib import pyplot as plt

        if ax is None:
            _, ax = plt.subplots()
        z = norm.ppf(0.5 + self.coverage / 2)
        rank = self.mean.shape[1]
        if self.observed is None:
            where = np.arange(len(self.x))
            for r in range(rank):
                # Beside each other, so that the bars of one category can be told apart.
                shift = 0.6 * ((r + 0.5) / rank - 0.5)
                kw = {"fmt": "o", "ms": 4, "capsize": 2, "label": f"component {r + 1}", **options}
                ax.errorbar(where + shift, self.mean[:, r], z * self.std[:, r], **kw)
            labels = [f"{v:g}" if isinstance(v, float) else str(v) for v in self.x]
            crowded = sum(map(len, labels)) > 60
            ax.set_xticks(where, labels, rotation=90 if crowded else 0)
        else:
            for r in range(rank):
                (line,) = ax.plot(self.x, self.mean[:, r], **{"label": f"component {r + 1}", **options})
                low, high = self.mean[:, r] - z * self.std[:, r], self.mean[:, r] + z * self.std[:, r]
                ax.fill_between(self.x, low, high, color=line.get_color(), alpha=0.2, lw=0)
            if len(self.observed) <= 200:
                ax.plot(
                    self.observed,
                    np.full(len(self.observed), 0.02),
                    "|",
                    color="0.4",
                    ms=5,
                    transform=ax.get_xaxis_transform(),
                    clip_on=False,
                )
        ax.axhline(0.0, color="0.8", lw=0.8, zorder=0)
        ax.set(xlabel=self.name, ylabel="latent function")
        if rank > 1:
            ax.legend(fontsize="small")
        self.ax_, self.figure_ = ax, ax.figure
        return self
