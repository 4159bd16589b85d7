"""Part of the demo: a tensor of fluorescence, of which one entry in a hundred is known, filled with functions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.interpolate import CubicSpline

from stochproc.datasets import load_kinetic
from stochproc.demo._figures import COLOURS
from stochproc.demo._report import Row
from stochproc.demo._runner import Context
from stochproc.demo._scores import Forecast, GaussianForecaster, ask, compare
from stochproc.tensor import FunctionalCP, FunctionalTucker, from_dense

__all__ = ["TITLE", "run"]

TITLE = "A tensor with continuous axes"

TUCKER, CP = "functional Tucker", "functional CP"
MASKED_CP, MASKED_TUCKER = "masked CP", "masked Tucker"
_MODES = ["discrete", "continuous", "continuous", "continuous"]
_CP_RANK, _TUCKER_RANK = 4, (5, 3, 3, 3)
_SHARE = 0.02
# What is hidden whole: places among the emission wavelengths, minutes, and runs that end early.
_BANDS, _MINUTES, _END, _N_SHORT = slice(4, 7), (7.0, 11.0), 8.0, 12
_N_TEST = 8_000
_COLOURS = {
    "scattered": COLOURS["grey"],
    "hidden wavelengths": COLOURS["orange"],
    "hidden minutes": COLOURS["blue"],
    "runs cut short": COLOURS["red"],
}


def run(context: Context) -> list[Row]:
    """Fill a tensor from scattered entries, and where whole wavelengths, minutes or ends of runs are missing."""
    data = load_kinetic()
    # Runs are numbered: a category may be any number.
    tensor, axes = data.tensor, [np.arange(1.0, len(data.tensor) + 1), *data.coordinates[1:]]
    if context.quick:
        tensor, axes = tensor[:16, :, :, ::3], [axes[0][:16], *axes[1:3], axes[3][::3]]
    known, tests, short = _split(tensor, axes, share=0.1 if context.quick else _SHARE)
    X, y = from_dense(tensor, known, axes)
    rows_of = {where: from_dense(tensor, mask, axes) for where, mask in tests.items()}

    found: dict[str, dict[str, Forecast]] = {}
    models = _models(axes, context.quick)
    for name, model in models.items():
        context.progress(f"{name}: {len(y)} entries")
        start = time.perf_counter()
        model.fit(X, y)
        seconds = time.perf_counter() - start
        found[name] = {where: ask(model, *rows, seconds=seconds) for where, rows in rows_of.items()}

    rows = []
    for where, (X_test, _) in rows_of.items():
        of_run = np.unique(X_test[:, 0], return_inverse=True)[1]
        counts = np.bincount(of_run)
        means = {name: np.bincount(of_run, found[name][where].log_density) / counts for name in models}
        for name in models:
            lead = None if name == TUCKER else compare(means[TUCKER], means[name])
            rows.append(Row(f"fluorescence, {where}", name, "units", found[name][where].metrics(), lead))
    context.note(
        f"Fluorescence of {tensor.shape[0]} runs of a reaction, at {tensor.shape[1]} emission and {tensor.shape[2]} "
        f"excitation wavelengths and {tensor.shape[3]} times. The models learned from {len(y)} of {tensor.size} "
        f"entries, once, and were asked for four kinds of others, up to {_N_TEST} of each: scattered ones, three "
        f"wavelengths and four minutes that were never measured, and what came after minute {_END:.0f} in {len(short)} "
        f"runs. Standard errors are those between runs; all entries have a spread of {np.nanstd(tensor):.0f} units."
    )
    context.note(
        "Masked CP and Tucker are those of tensorly, which fill the whole tensor in each of some hundred iterations; "
        "stopped after about the time of the functional fits, they were still improving slowly. They know nothing of a "
        "wavelength or minute that was never measured: splines through their factors fill it in here. Their spread is "
        "that of the residuals. Ranks are the same for both libraries, chosen with some splits of these data in view. "
        "At hidden wavelengths and where runs were cut short, intervals of the functional models are too narrow: their "
        "posterior treats modes as independent."
    )
    context.save_figure(
        _draw(models, tensor, axes, known, found[TUCKER], short),
        "kinetic",
        "Above: the functions of three modes that CP found, with bands of 90 %; shaded is what was never measured. "
        "Below: what Tucker predicts against what was measured, a spectrum across wavelengths that are missing, and a "
        "run that was cut short.",
    )
    return rows


def _split(
    tensor: np.ndarray, axes: list[np.ndarray], *, share: float
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Masks of the entries to learn from and of those to predict by kind, and the runs that were cut short."""
    rng = np.random.default_rng(0)
    seen, drawn = ~np.isnan(tensor), rng.random(tensor.shape) < share
    short = np.sort(rng.permutation(len(tensor))[: len(tensor) * _N_SHORT // 64])
    bands, minutes, ends = (np.zeros(tensor.shape, dtype=bool) for _ in range(3))
    bands[:, _BANDS] = True
    minutes[..., (axes[3] >= _MINUTES[0]) & (axes[3] < _MINUTES[1])] = True
    ends[short] = axes[3] > _END
    kinds = {
        "scattered": ~(bands | minutes | ends | drawn),
        "hidden wavelengths": bands & ~minutes & ~ends,
        "hidden minutes": minutes & ~bands & ~ends,
        "runs cut short": ends & ~bands & ~minutes,
    }
    tests = {}
    for where, kind in kinds.items():
        places = np.flatnonzero(kind & seen)
        chosen = np.zeros(tensor.size, dtype=bool)
        chosen[rng.choice(places, min(_N_TEST, len(places)), replace=False)] = True
        tests[where] = chosen.reshape(tensor.shape)
    return seen & drawn & ~bands & ~minutes & ~ends, tests, short


def _models(axes: list[np.ndarray], quick: bool) -> dict[str, Any]:
    # Fluorescence is a sum of products, none of which is constant: centring would cost a component.
    options: dict[str, Any] = {"modes": _MODES, "kernel": "matern52", "center": False}
    patient: dict[str, Any] = {"early_stopping": False, "tol": 3e-4, "max_iter": 300}
    n_iter = 600
    if quick:
        patient["tol"], n_iter = 1e-2, 50
        options |= patient | {"n_init": 1}
    return {
        TUCKER: FunctionalTucker(_TUCKER_RANK, **options),
        CP: FunctionalCP(_CP_RANK, **(options | patient)),
        MASKED_CP: GaussianForecaster(MaskedDecomposition(_parafac, axes, n_iter)),
        MASKED_TUCKER: GaussianForecaster(MaskedDecomposition(_tucker, axes, n_iter)),
    }


def _parafac(tensor: np.ndarray, mask: np.ndarray, n_iter: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Core and factors by tensorly's CP."""
    from tensorly.decomposition import parafac

    options: dict[str, Any] = {"init": "random", "random_state": 0, "tol": 1e-9}
    weights, factors = parafac(tensor, _CP_RANK, mask=mask, n_iter_max=n_iter, **options)
    core = np.zeros((_CP_RANK,) * len(factors))
    core[(np.arange(_CP_RANK),) * len(factors)] = weights
    return core, factors


def _tucker(tensor: np.ndarray, mask: np.ndarray, n_iter: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Core and factors by tensorly's Tucker."""
    from tensorly.decomposition import tucker

    options: dict[str, Any] = {"init": "random", "random_state": 0, "tol": 1e-9}
    core, factors = tucker(tensor, _TUCKER_RANK, mask=mask, n_iter_max=n_iter, **options)
    return core, factors


class MaskedDecomposition:
    """A decomposition of the whole tensor with a mask, and splines through factors where nothing was measured.

    Parameters
    ----------
    decompose : callable
        Takes a filled tensor, the mask of measured entries and a number of iterations; returns core and factors.
    axes : list of ndarray
        Coordinates along each axis, in ascending order.
    n_iter : int
    """

    def __init__(self, decompose: Callable[..., Any], axes: list[np.ndarray], n_iter: int) -> None:
        self.decompose, self.axes, self.n_iter = decompose, axes, n_iter

    def fit(self, X: np.ndarray, y: np.ndarray) -> MaskedDecomposition:
        """Fill a tensor with the mean where nothing is known, decompose it, and measure the residuals."""
        places = self._places(X)
        shape = tuple(map(len, self.axes))
        tensor, mask = np.full(shape, y.mean()), np.zeros(shape, dtype=bool)
        tensor[places], mask[places] = y, True
        self.core, factors = self.decompose(tensor, mask, self.n_iter)
        self.factors = [np.array(factor) for factor in factors]
        for factor, axis, place in zip(self.factors, self.axes, places, strict=True):
            never = ~np.isin(np.arange(len(axis)), place)
            if never.any():
                factor[never] = CubicSpline(axis[~never], factor[~never])(axis[never])
        n_numbers = sum(factor.size for factor in self.factors)
        squares = np.sum((y - self.predict(X)) ** 2)
        self.std = float(np.sqrt(squares / max(len(y) - n_numbers, 1)))
        return self

    def predict(self, X: np.ndarray, return_std: bool = False) -> Any:
        """Predict means, and one spread for all."""
        mean = np.broadcast_to(self.core, (len(X), *self.core.shape))
        for factor, place in zip(self.factors, self._places(X), strict=True):
            # The first axis of the core that is left is contracted, the rows staying in front.
            mean = np.einsum("nr,nr...->n...", factor[place], mean)
        return (mean, np.full(len(mean), self.std)) if return_std else mean

    def _places(self, X: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.searchsorted(axis, column) for axis, column in zip(self.axes, X.T, strict=True))


def _draw(
    models: dict[str, Any],
    tensor: np.ndarray,
    axes: list[np.ndarray],
    known: np.ndarray,
    found: dict[str, Forecast],
    short: np.ndarray,
) -> Figure:
    figure = Figure(figsize=(10, 6.2))
    above, below = figure.subplots(2, 3)
    names = ("", "emission, nm", "excitation, nm", "time, minutes")
    for k, ax in zip((1, 2, 3), above, strict=True):
        models[CP].plot_latent(k, ax=ax)
        ax.set(title=names[k].partition(",")[0].capitalize(), xlabel=names[k])
        ax.get_legend().set_visible(k == 1)
        never = ~known.any(axis=tuple(j for j in range(4) if j != k))
        if never.any():
            _shade(ax, axes[k], never)
        ax.set_ylabel("function" if k == 1 else "")

    ax = below[0]
    for where, one in reversed(found.items()):
        some = slice(0, None, max(1, len(one.y) // 600))
        ax.plot(one.y[some], one.mean[some], ".", color=_COLOURS[where], markersize=2.5, label=where)
    ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="measured", ylabel="predicted", title="Entries not learned from")
    ax.legend(markerscale=4, handletextpad=0.1)

    model, run_number = models[TUCKER], int(short[0])
    early = len(axes[3]) // 4
    wavelengths = np.isin(np.arange(len(axes[1])), np.arange(len(axes[1]))[_BANDS])
    times = (axes[3] > _END) | ((axes[3] >= _MINUTES[0]) & (axes[3] < _MINUTES[1]))
    _shade(below[1], axes[1], wavelengths)
    _shade(below[2], axes[3], times)
    _draw_curve(below[1], model, tensor, axes, known, (run_number, None, 4, early))
    below[1].set(xlabel=names[1], ylabel="fluorescence", title=f"A spectrum, excited at {axes[2][4]:.0f} nm")
    _draw_curve(below[2], model, tensor, axes, known, (run_number, 3, 4, None))
    below[2].set(xlabel=names[3], title=f"Run {run_number + 1}, measured to minute {_END:.0f}")
    below[1].legend(loc="best")
    return figure


def _draw_curve(
    ax: Any, model: Any, tensor: np.ndarray, axes: list[np.ndarray], known: np.ndarray, at: tuple[int | None, ...]
) -> None:
    """Draw the tensor along the axis whose place is None, with the prediction in between and its interval."""
    k = at.index(None)
    x = np.linspace(axes[k][0], axes[k][-1], 200)
    X = np.stack([x if place is None else np.full(len(x), axes[j][place]) for j, place in enumerate(at)], axis=1)
    lower, upper = model.predict_interval(X).T
    ax.fill_between(x, lower, upper, color=COLOURS["blue"], alpha=0.25, linewidth=0, label="90 % interval")
    ax.plot(x, model.predict(X), color=COLOURS["blue"], label="predicted")
    where = tuple(slice(None) if place is None else place for place in at)
    measured, learned = tensor[where], known[where]
    ax.plot(axes[k][~learned], measured[~learned], ".", color=COLOURS["red"], markersize=4, label="kept back")
    if learned.any():
        ax.plot(axes[k][learned], measured[learned], "o", color="black", markersize=4, label="learned from")


def _shade(ax: Any, axis: np.ndarray, hidden: Any) -> None:
    """Shade the stretches of an axis where nothing was measured."""
    step = np.diff(axis).mean() / 2
    for stretch in np.split(np.flatnonzero(hidden), np.flatnonzero(np.diff(np.flatnonzero(hidden)) > 1) + 1):
        if len(stretch):
            ax.axvspan(axis[stretch[0]] - step, axis[stretch[-1]] + step, color="0.92", zorder=-1)
