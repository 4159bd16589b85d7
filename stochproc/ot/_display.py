"""Pictures of a fitted transport."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from stochproc._base import as_array
from stochproc.ot._lazy_plan import LazyPlan

__all__ = ["TransportDisplay"]


class TransportDisplay:
    """Sources, targets and the links of the plan between them, in the plane.

    Parameters
    ----------
    sources, targets : ndarray of shape (n_sources, 2) and (n_targets, 2)
    links : ndarray of shape (n_links, 2)
        Source and target of each link.
    mass : ndarray of shape (n_links,)
        What each link carries, positive.
    names : tuple of str, default=("x", "y")
        Names of the two columns.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
    figure_ : matplotlib.figure.Figure

    Examples
    --------
    >>> import numpy as np
    >>> from stochproc.ot import SinkhornTransport, TransportDisplay
    >>> Xs = np.array([[0.0, 0.0], [1.0, 0.0]])
    >>> model = SinkhornTransport(reg_e=0.01).fit(Xs, Xt=Xs + [0.0, 1.0])
    >>> display = TransportDisplay.from_estimator(model)
    >>> display.links
    array([[0, 0],
           [1, 1]])
    """

    def __init__(
        self,
        *,
        sources: np.ndarray,
        targets: np.ndarray,
        links: np.ndarray,
        mass: np.ndarray,
        names: tuple[str, str] = ("x", "y"),
    ) -> None:
        self.sources, self.targets = sources, targets
        self.links, self.mass, self.names = links, mass, names

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        *,
        threshold: float = 0.1,
        features: tuple[int, int] = (0, 1),
        ax: Any = None,
        **kwargs: Any,
    ) -> TransportDisplay:
        """Take the plan of a fitted estimator and draw it.

        Parameters
        ----------
        estimator : SinkhornTransport
            Fitted, with at least two features.
        threshold : float, default=0.1
            Links that carry a smaller share of the lighter of their two points are left out; in (0, 1).
        features : tuple of int, default=(0, 1)
            The two columns to draw.
        ax : matplotlib.axes.Axes, default=None
            Where to draw; None makes a new figure.
        **kwargs
            Passed to the links' ``LineCollection``.

        Returns
        -------
        TransportDisplay

        Raises
        ------
        ValueError
            If ``threshold`` does not lie in (0, 1), or there are no such columns.
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(estimator)
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1); got {threshold}.")
        d = estimator.n_features_in_
        if len(features) != 2 or not all(0 <= j < d for j in features):
            raise ValueError(f"features must be two of the {d} columns, counted from 0; got {features}.")
        columns = list(features)
        clouds = [np.asarray(as_array(points))[:, columns] for points in (estimator.xs_, estimator.xt_)]
        named = getattr(estimator, "feature_names_in_", None)
        names = ("x", "y") if named is None else (str(named[columns[0]]), str(named[columns[1]]))
        links, mass = _main_links(estimator, threshold)
        display = cls(sources=clouds[0], targets=clouds[1], links=links, mass=mass, names=names)
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax: Any = None, **kwargs: Any) -> TransportDisplay:
        """Draw on ``ax`` or a new figure; the opacity of a link is its mass relative to the largest.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
        **kwargs
            Passed to the links' ``LineCollection``.

        Returns
        -------
        TransportDisplay
            With ``ax_`` and ``figure_`` set.
        """
        import matplotlib.pyplot as plt
        from matplotlib.collections import LineCollection

        if ax is None:
            _, ax = plt.subplots()
        ends = np.stack([self.sources[self.links[:, 0]], self.targets[self.links[:, 1]]], axis=1)
        alpha = self.mass / self.mass.max() if len(self.mass) else None
        style = {"colors": "0.4", "linewidths": 0.8, "alpha": alpha, "zorder": 1, **kwargs}
        ax.add_collection(LineCollection(list(ends), **style))
        for points, marker, color, label in (
            (self.sources, "o", "C0", "sources"),
            (self.targets, "x", "C1", "targets"),
        ):
            ax.scatter(points[:, 0], points[:, 1], s=16, marker=marker, color=color, label=label, zorder=2)
        ax.set(xlabel=self.names[0], ylabel=self.names[1])
        ax.legend(frameon=False)
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _main_links(estimator: Any, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs that carry at least a share of the lighter of their two masses, and what they carry."""
    a, b = (np.asarray(as_array(masses), dtype=float) for masses in (estimator.mu_s, estimator.mu_t))
    plan = estimator.coupling_
    if isinstance(plan, LazyPlan):
        # No link that is kept lies below the share of the lightest point of all.
        entries = plan.to_sparse(threshold * min(a[a > 0].min(), b[b > 0].min()))
        if isinstance(entries, Tensor):
            (rows, columns), values = entries.indices().cpu().numpy(), as_array(entries.values())
        else:
            rows, columns, values = entries.row, entries.col, entries.data
    else:
        dense = np.asarray(as_array(plan))
        rows, columns = dense.nonzero()
        values = dense[rows, columns]
    kept = values >= threshold * np.minimum(a[rows], b[columns])
    return np.stack([rows[kept], columns[kept]], axis=1), values[kept]
