"""What the functional decompositions share as estimators: parameters, fits, streams, files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_consistent_length, column_or_1d
from torch import Tensor

from stochproc._base import Given, old_fit_unless_new
from stochproc._checks import check_integer, check_positive
from stochproc._options import as_device
from stochproc._persistence import as_tensor
from stochproc._random import make_generator
from stochproc.exceptions import DataWarning
from stochproc.tensor._coordinate_ascent import Decomposition, Rows
from stochproc.tensor._coordinates import as_known, columns_of, distinct, warn_if_coarse
from stochproc.tensor._fitting import Outcome, ascend, fit
from stochproc.tensor._functional_parameters import MAX_CORE, weights_of
from stochproc.tensor._functional_predictions import FunctionalPredictions
from stochproc.tensor._functional_saved import FunctionalSaved
from stochproc.tensor._links import TuckerLink
from stochproc.tensor._modes import Mode, as_modes
from stochproc.tensor._priors import MarkovPrior
from stochproc.tensor._progress import Progress, Stopped
from stochproc.tensor._starting_parts import Grid, Settings
from stochproc.tensor._streaming import continued, forget_and_absorb
from stochproc.tensor._time_data import as_target

__all__ = ["FunctionalDecomposition"]

# Below so many rows a tenth of them says too little to stop by.
EARLY_STOPPING_FROM = 200


class FunctionalDecomposition(FunctionalSaved, FunctionalPredictions):
    """What FunctionalCP and FunctionalTucker have in common; ``_settings`` tells them apart."""

    def _settings(self, n_modes: int) -> Settings:
        raise NotImplementedError

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.input_tags.categorical = True
        modes: Any = self.modes  # type: ignore[attr-defined]
        # What is neither is refused by fit.
        said = modes if isinstance(modes, (list, tuple)) else ()
        tags.input_tags.string = any(getattr(m, "kind", m) == "discrete" for m in said)
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_model")

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, callback: Callable[[Any], Any] | None = None) -> Any:
        """Learn the functions of all modes from scattered entries.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_modes)
            Coordinates of the entries, a column a mode: numbers, or categories where ``modes`` says "discrete". In
            any order; the same coordinates may repeat.
        y : array-like of shape (n_samples,)
            Entries. Rows whose entry is NaN are left out, with a warning.
        sample_weight : array-like of shape (n_samples,), default=None
            Known relative precisions of the entries, non-negative: the variance of the noise of a row is that of
            the model over its weight. Rows of weight 0 are left out.
        callback : callable, default=None
            Called with a ``SolverState`` after each sweep: ``value`` is the bound and ``residual`` its relative
            change. Returning True ends the fit.

        Returns
        -------
        self

        Raises
        ------
        TypeError
            If a parameter or an argument is of the wrong kind.
        ValueError
            If a parameter is out of range, X is misshapen or holds NaN, infinity or what is no number, y holds
            infinity or nothing but NaN, a weight is negative, or the core of Tucker would be too large.

        Warns
        -----
        sklearn.exceptions.ConvergenceWarning
            If ``max_iter`` sweeps were not enough, or the callback ended the fit.
        DataWarning
            If y does not vary, rows without y were left out, or the coordinates of a mode have few digits left.

        Notes
        -----
        An interruption (Ctrl-C) leaves a usable estimator, fitted with what it has learned so far and
        ``converged_`` False, and is raised again. After any other failure it is what it was before.
        """
        with old_fit_unless_new(self, "_model"), torch.inference_mode(False):
            self._fit(X, y, sample_weight, callback)
        self._warn_unless_converged()
        return self

    def partial_fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, forget: float | int = 1.0, n_sweeps: int = 2
    ) -> Any:
        """Learn from more rows without the old ones, of which only what they said of each point is kept.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_modes)
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,), default=None
            See ``fit``.
        forget : float, default=1.0
            In (0, 1]: what all earlier rows said is multiplied by it.
        n_sweeps : int, default=2
            How often the messages of the new rows are computed on top of the old ones, which do not change.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If an argument is out of range; see ``fit``.

        Notes
        -----
        The first call is ``fit``. Later ones keep hyperparameters, centre and scale. O(rows) time for the messages
        and one smoother over all points a mode and sweep. One pass understates precision: the messages of early rows
        come from functions that were not yet known, so that intervals are a little wide: those of 90 % covered 92 to
        93 % of daily measurements in a benchmark, after ten chunks.
        """
        check_integer("n_sweeps", n_sweeps, 1)
        check_positive("forget", forget)
        if forget > 1:
            raise ValueError(f"forget must lie in (0, 1]; got {forget}.")
        if not hasattr(self, "_model"):
            return self.fit(X, y, sample_weight)
        with old_fit_unless_new(self, "_model"), torch.inference_mode(False):
            columns = self._alike(columns_of(self, X, self._modes, reset=False))
            columns, values, weight = self._observed(columns, y, sample_weight)
            model = copy.deepcopy(self._model)
            rows, categories = continued(model, self._modes, self._categories, columns, self._scaled(values), weight)
            forget_and_absorb(model, rows, forget, n_sweeps)
            self._set(model, categories, self._y_shift, self._y_unit, self._given)
            self.n_iter_ += n_sweeps
        return self

    def _fit(self, X: Any, y: Any, sample_weight: Any, callback: Callable[[Any], Any] | None) -> None:
        """Do the work of ``fit``; nothing but what validation sets changes before the last step."""
        warm = bool(self.warm_start) and hasattr(self, "_model")  # type: ignore[attr-defined]
        given, device = Given.of(X), as_device(self.device)  # type: ignore[attr-defined]
        if y is None:
            raise ValueError("This estimator requires y to be passed, but the target y is None.")
        said = self.modes  # type: ignore[attr-defined]
        modes = as_modes(said, len(said)) if isinstance(said, (list, tuple)) else None
        columns = columns_of(self, X, modes, reset=not warm)
        modes = as_modes(said, len(columns))
        settings = self._settings(len(columns))
        columns, values, weight = self._observed(columns, y, sample_weight, reset=True)
        progress = Progress(int(self.verbose), callback)  # type: ignore[attr-defined]
        if warm:
            self._check_unchanged(modes, settings)
            self._go_on(self._alike(columns), values, weight, settings, progress, given)
            return

        found = [distinct(column, mode, device) for column, mode in zip(columns, modes, strict=True)]
        points, index = [f[0] for f in found], [f[1] for f in found]
        categories = [f[2] for f in found]
        warn_if_coarse(self, points, modes, stacklevel=4)
        shift, unit = self._centre_and_scale(values)
        rows = Rows(
            as_tensor((values - shift) / unit, torch.float64, device),
            as_tensor(weight, torch.float64, device),
            tuple(index),
        )
        seed = self.random_state  # type: ignore[attr-defined]
        generator = make_generator(0 if seed is None else seed)
        if not isinstance(settings.init, str):
            _check_init(settings, points)
        settings = _on(settings, device)
        held_out = self._held_out(len(rows), generator, device)
        training, validation = rows, None
        if held_out is not None:
            training, validation = rows.part(~held_out), rows.part(held_out)
        grid = Grid(modes, points)

        def finish(outcome: Outcome) -> None:
            self._modes = modes
            self._describe(outcome, unit)
            self._set(outcome.model, categories, shift, unit, given)

        try:
            outcome = fit(training, validation, grid, settings, generator, progress)
        except (KeyboardInterrupt, Stopped) as stop:
            if progress.left is not None:
                finish(progress.left)
            if isinstance(stop, Stopped):
                return
            raise
        finish(outcome)

    def _go_on(
        self,
        columns: list[np.ndarray],
        values: np.ndarray,
        weight: np.ndarray,
        settings: Settings,
        progress: Progress,
        given: Given,
    ) -> None:
        """Sweep on from the present fit, over these rows alone."""
        model = copy.deepcopy(self._model)
        model.noise.fixed = None if settings.noise is None else 1 / settings.noise
        model.chunk_size = settings.chunk_size
        if isinstance(model.link, TuckerLink):
            model.link.learn_variance = settings.core_variance == "learn"
            if not model.link.learn_variance:
                model.link.prior_variance = float(settings.core_variance)
        rows, categories = continued(model, self._modes, self._categories, columns, self._scaled(values), weight)
        outcome = Outcome(model, start="warm")
        progress.phase = "warm start"
        if settings.learn_hyperparameters or settings.ard:
            for factor in model.factors:
                factor.prior.resume()

        def finish() -> None:
            self._describe(outcome, self._y_unit)
            self._set(model, categories, self._y_shift, self._y_unit, given)

        try:
            ascend(outcome, rows, None, settings, progress, sweeps=settings.max_iter)
        except (KeyboardInterrupt, Stopped) as stop:
            outcome.converged, outcome.message = False, "stopped"
            if outcome.bounds:
                finish()
            if isinstance(stop, Stopped):
                return
            raise
        finish()

    def _check_unchanged(self, modes: Sequence[Mode], settings: Settings) -> None:
        """Refuse to go on where the present fit has another shape."""
        for k, (new, old) in enumerate(zip(modes, self._modes, strict=True)):
            if (new.kind, new.period) != (old.kind, old.period):
                raise ValueError(f"modes must be those of the present fit with warm_start=True; got {new} in {k}.")
        if self._model.link.ranks != settings.ranks and not settings.ard:
            raise ValueError(f"rank must be that of the present fit with warm_start=True; got {settings.ranks}.")

    def _alike(self, columns: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Bring categories to the kind that the fit saw."""
        known = zip(columns, self._categories, strict=True)
        return [as_known(self, column, seen, k) for k, (column, seen) in enumerate(known)]

    def _observed(
        self, columns: list[np.ndarray], y: Any, sample_weight: Any, *, reset: bool = False
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Leave out rows without an entry or of weight zero."""
        target = column_or_1d(as_target(y, missing=True), warn=True)
        check_consistent_length(columns[0], target)
        weight = weights_of(sample_weight, len(target))
        missing = np.isnan(target)
        if missing.all():
            raise ValueError("y must hold at least one observed value; got NaN in every row.")
        if missing.any():
            warnings.warn(
                f"{missing.sum()} of {len(target)} rows have NaN in y and are left out.", DataWarning, stacklevel=5
            )
        seen = ~missing & (weight > 0)
        if not seen.any():
            raise ValueError("sample_weight must be positive in some row with an observed y; got zero in all.")
        values = target[seen]
        if reset and len(values) > 1 and (values == values[0]).all():
            warnings.warn("y does not vary; it is predicted as it is.", DataWarning, stacklevel=5)
        return [column[seen] for column in columns], values, weight[seen]

    def _centre_and_scale(self, values: np.ndarray) -> tuple[float, float]:
        """Shift and unit of y: mean and standard deviation, or 0 and the root mean square."""
        largest = float(np.abs(values).max())
        if largest == 0:
            return 0.0, 1.0
        scaled = values / largest
        shift = float(scaled.mean()) if self.center else 0.0  # type: ignore[attr-defined]
        spread = float(np.sqrt(np.mean((scaled - shift) ** 2)))
        if spread <= 10 * np.finfo(np.float64).eps:
            spread = 1.0 / largest if shift else 1.0
        unit = spread * largest
        if not (1e-150 < unit < 1e150 and np.isfinite(shift * largest)):
            # Variances are in squared units.
            raise ValueError(f"y must have a spread between 1e-150 and 1e150; got {unit:.3g}. Rescale it.")
        return shift * largest, unit

    def _held_out(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor | None:
        """Which rows say when to stop; None if none do."""
        if not self.early_stopping or n < EARLY_STOPPING_FROM:  # type: ignore[attr-defined]
            return None
        n_out = min(max(1, round(self.validation_fraction * n)), n - 1)  # type: ignore[attr-defined]
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.randperm(n, generator=generator)[:n_out]] = True
        return mask.to(device)

    def _scaled(self, values: np.ndarray) -> Tensor:
        device = self._model.factors[0].mean.device
        return as_tensor((values - self._y_shift) / self._y_unit, torch.float64, device)

    def _describe(self, outcome: Outcome, unit: float) -> None:
        """Set what a fit reports about itself."""
        log_unit = float(np.log(unit))
        self.elbo_ = np.asarray(outcome.bounds) - outcome.n_rows * log_unit
        self.validation_score_ = np.asarray(outcome.scores) - log_unit
        self.n_iter_ = len(outcome.bounds)
        self.converged_ = outcome.converged
        self.start_ = outcome.start
        self._message = outcome.message

    def _set(self, model: Decomposition, categories: Sequence[Any], shift: float, unit: float, given: Given) -> None:
        """Set what a fitted decomposition has."""
        for factor in model.factors:
            factor.prior.requires_grad_(False)
        self._categories, self._y_shift, self._y_unit, self._given = list(categories), shift, unit, given
        self.index_ = [
            f.points.cpu().numpy().copy() if c is None else c.copy()
            for f, c in zip(model.factors, categories, strict=True)
        ]
        ranks = model.link.ranks
        self.noise_variance_ = unit**2 / model.noise.precision
        self.variance_ = [f.prior.variance.detach().cpu().numpy() for f in model.factors]
        self.lengthscale_ = [_lengthscales(f.prior) for f in model.factors]
        if isinstance(model.link, TuckerLink):
            self.core_: Any = model.link.mean.cpu().numpy().copy()
            self.rank_: Any = tuple(ranks)
        else:
            self.core_ = None
            if ranks[0] ** len(ranks) <= MAX_CORE:
                self.core_ = np.zeros(ranks)
                self.core_[tuple(np.arange(ranks[0]) for _ in ranks)] = 1.0
            self.rank_ = ranks[0]
        self._model = model

    def _warn_unless_converged(self) -> None:
        if not self.converged_:
            warnings.warn(
                f"the fit ended early after {self.n_iter_} sweeps: {self._message}. What it learned is used; raise "
                "max_iter or tol for another end.",
                ConvergenceWarning,
                stacklevel=3,
            )


def _lengthscales(prior: Any) -> Any:
    """Lengthscales of a mode by component; None for categories or where the kernel has none."""
    if not isinstance(prior, MarkovPrior):
        return None
    found: list[Any] = [kernel.lengthscale for kernel in prior.kernels if hasattr(kernel, "lengthscale")]
    if not found:
        return None
    values = torch.cat([f.detach().flatten() for f in found]).cpu().numpy()
    return np.resize(values, prior.rank)


def _check_init(settings: Settings, points: Sequence[Tensor]) -> None:
    if len(settings.init) != len(points):
        raise ValueError(f"init must hold one array a mode, {len(points)}; got {len(settings.init)}.")
    for k, (value, p) in enumerate(zip(settings.init, points, strict=True)):
        shape = (len(p), settings.ranks[k])
        if tuple(value.shape) != shape:
            raise ValueError(f"init[{k}] must have shape {shape}, distinct points by rank; got {tuple(value.shape)}.")
        if not bool(value.isfinite().all()):
            raise ValueError(f"init[{k}] must be finite; got NaN or infinity.")


def _on(settings: Settings, device: torch.device) -> Settings:
    """Move given starts to the device."""
    if isinstance(settings.init, str):
        return settings
    return replace(settings, init=[m.to(device) for m in settings.init])
