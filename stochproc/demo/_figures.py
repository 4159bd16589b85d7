"""How figures of the demo look: one style, colours that everybody can tell apart, one calibration plot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["COLOURS", "STYLE", "plot_calibration"]

# Okabe and Ito (2008), distinct for all common kinds of colour vision.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "grey": "#8A8F98",
}
_MARKERS = "osD^vP"
_LINES = ("-", "--", "-.", ":", "-", "--")

# For `matplotlib.rc_context`; the runner draws every part in it.
STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#55606E",
    "xtick.color": "#55606E",
    "ytick.color": "#55606E",
    "axes.labelcolor": "#1D2430",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def plot_calibration(ax: Any, levels: np.ndarray, curves: Mapping[str, tuple[np.ndarray, str]]) -> None:
    """Draw how much of the data lies in central intervals, against how much should.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    levels : ndarray of shape (n_levels,)
        Nominal coverages in (0, 1).
    curves : mapping of str to (ndarray of shape (n_levels,), str)
        By label: shares inside, and a colour.
    """
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=1, label="ideal")
    for i, (label, (shares, colour)) in enumerate(curves.items()):
        style = {"linestyle": _LINES[i % len(_LINES)], "marker": _MARKERS[i % len(_MARKERS)], "color": colour}
        # Markers of curves that lie on each other take turns.
        ax.plot(levels, shares, label=label, linewidth=1.3, markersize=5, markevery=(i % 4, 4), **style)
    ticks = np.linspace(0, 1, 6)
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=ticks, yticks=ticks, aspect="equal")
    ax.set(xlabel="nominal coverage of the interval", ylabel="share of held-out values inside")
