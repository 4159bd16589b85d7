"""From rows to a fitted decomposition: several starts, a held-out part that says when to stop, and a refit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from stochproc.tensor._coordinate_ascent import Decomposition, Rows
from stochproc.tensor._progress import Progress, Stopped
from stochproc.tensor._rank import Pruner
from stochproc.tensor._starting_parts import CP_SWEEPS, Grid, Settings, start_cp, start_names, start_tucker

__all__ = ["Outcome", "ascend", "fit"]

# Sweeps that each start gets before one is chosen.
TRIAL_SWEEPS = 4
# Standard errors by which a later start must predict held-out rows better to be taken.
CLEARLY = 3.0
# Sweeps without a gain on held-out rows, or with a change below the tolerance, before the end.
PATIENCE = 4
# A gain that counts, in nats a held-out row: without noise in the data the density creeps up for hundreds of sweeps.
WORTH_GOING_ON = 1e-3
SMALL_CHANGES = 3


@dataclass
class Outcome:
    """A decomposition and how it came about."""

    model: Decomposition
    bounds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Mean log density of held-out rows by sweep, in scaled y."""
    converged: bool = False
    message: str = ""
    start: str = ""
    n_rows: int = 0
    """Rows that the bounds are of."""


def fit(
    rows: Rows, held_out: Rows | None, grid: Grid, settings: Settings, generator: torch.Generator, progress: Progress
) -> Outcome:
    """Try starts for a few sweeps, go on with the best until the rule says stop; then refit with all rows.

    ``rows`` and ``held_out`` have their points in the one grid. Without held-out rows the bound ranks the starts, the
    change of the bound stops, and there is no refit.
    """
    first, *later = start_names(settings)
    best: Outcome | None = None

    def begun(name: str, among: Rows) -> Outcome:
        # Equal draws for a start and for its refit.
        return Outcome(_build(name, among, grid, settings, generator, progress), start=name)

    def tried(outcome: Outcome) -> None:
        progress.phase = f"start {outcome.start!r}"
        ascend(outcome, rows, held_out, settings, progress, sweeps=min(TRIAL_SWEEPS, settings.max_iter))

    try:
        best = begun(first, rows)
        if later:
            tried(best)
        for name in later:
            outcome = begun(name, rows)
            tried(outcome)
            best = outcome if _is_better(outcome, best, held_out) else best
        progress.phase = "held-out rows" if held_out is not None else "sweep"
        ascend(best, rows, held_out, settings, progress, sweeps=settings.max_iter)
        if held_out is None:
            return best
        n_sweeps = max(range(len(best.scores)), key=best.scores.__getitem__) + 1
        together = _together(rows, held_out)
        progress.phase = "all rows"
        final = begun(best.start, together)
        final.scores, final.converged, final.message = best.scores, best.converged, best.message
        ascend(final, together, None, settings, progress, sweeps=n_sweeps, count_only=True)
        return final
    except (KeyboardInterrupt, Stopped) as stop:
        # Half a refit is no better than the whole fit before it.
        if best is not None and best.bounds:
            progress.left = best
        if progress.left is not None:
            progress.left.converged = False
            progress.left.message = "stopped by the callback" if isinstance(stop, Stopped) else "interrupted"
        raise


def ascend(
    outcome: Outcome,
    rows: Rows,
    held_out: Rows | None,
    settings: Settings,
    progress: Progress,
    *,
    sweeps: int,
    count_only: bool = False,
) -> None:
    """Sweep until ``outcome`` has had ``sweeps`` of them in all, or, unless ``count_only``, a rule says stop."""
    model, outcome.n_rows = outcome.model, len(rows)
    pruner = Pruner(model) if settings.ard else None
    if settings.batch_size is not None and settings.batch_size < len(rows):
        batches = _Batches(rows, settings.batch_size, sweeps_done=len(outcome.bounds))
    else:
        batches = None
    while len(outcome.bounds) < sweeps:
        done = len(outcome.bounds)
        # Hyperparameters wait for the second sweep: the first messages are those of the start.
        learn = done > 0
        if batches is None:
            model.sweep(rows, learn=learn, keep=settings.damping if done else 0.0)
        else:
            batches.sweep(model, learn=learn)
        if pruner is not None:
            pruner.after_sweep(rows, learn=learn)
        outcome.bounds.append(float(model.objective(rows)))
        change = _relative_change(outcome.bounds)
        if held_out is not None:
            outcome.scores.append(float(model.log_density(held_out).mean()))
        progress.report(len(outcome.bounds), outcome, change)
        if count_only:
            continue
        if held_out is not None:
            before, recent = outcome.scores[:-PATIENCE], outcome.scores[-PATIENCE:]
            outcome.converged = bool(before) and max(recent) <= max(before) + WORTH_GOING_ON
        else:
            changes = [_relative_change(outcome.bounds[: i + 1]) for i in range(len(outcome.bounds))]
            outcome.converged = len(changes) > SMALL_CHANGES and bool(max(changes[-SMALL_CHANGES:]) < settings.tol)
        if outcome.converged:
            return
    if not count_only:
        outcome.message = f"max_iter={settings.max_iter} sweeps were not enough"


def _relative_change(bounds: Sequence[float]) -> float:
    if len(bounds) < 2:
        return math.inf
    return abs(bounds[-1] - bounds[-2]) / max(abs(bounds[-1]), 1.0)


def _is_better(outcome: Outcome, best: Outcome, held_out: Rows | None) -> bool:
    """Whether a later start takes the place of the best so far: clearly, on held-out rows, or by the bound."""
    if not math.isfinite(outcome.bounds[-1]):
        return False
    if held_out is None or not math.isfinite(best.bounds[-1]):
        return not outcome.bounds[-1] <= best.bounds[-1]
    gain = outcome.model.log_density(held_out) - best.model.log_density(held_out)
    # The density of a hundred rows ranks starts by luck where they are close: the mean gain against its standard error.
    return bool(gain.mean() > CLEARLY * gain.std() / math.sqrt(len(gain)))


def _together(a: Rows, b: Rows) -> Rows:
    index = tuple(torch.cat(pair) for pair in zip(a.index, b.index, strict=True))
    return Rows(torch.cat([a.y, b.y]), torch.cat([a.weight, b.weight]), index)


def _build(
    name: str, rows: Rows, grid: Grid, settings: Settings, generator: torch.Generator, progress: Progress
) -> Decomposition:
    """The decomposition at a start: of Tucker after some sweeps of CP."""
    model = start_cp(name, rows, grid, settings, generator)
    if not settings.tucker:
        return model
    if name != "given":
        progress.phase = f"CP before Tucker, start {name!r}"
        warm = Outcome(model, start=name)
        try:
            ascend(warm, rows, None, settings, progress, sweeps=CP_SWEEPS, count_only=True)
        except (KeyboardInterrupt, Stopped):
            if warm.bounds:
                start_tucker(model, rows, grid, settings)
                # Once, unseen: the core then stands for the rows.
                model.sweep(rows, learn=False)
                progress.left = Outcome(model, [model.objective(rows)], start=name, n_rows=len(rows))
            raise
    start_tucker(model, rows, grid, settings)
    return model


class _Batches:
    """Mini-batches in a fixed order with natural-gradient steps of size (t + t0)^-kappa."""

    _DELAY, _KAPPA = 10.0, 0.6

    def __init__(self, rows: Rows, size: int, *, sweeps_done: int) -> None:
        self.rows = rows
        self.n_parts = math.ceil(len(rows) / size)
        self.step = sweeps_done * self.n_parts
        self.generator = torch.Generator().manual_seed(sweeps_done)

    def sweep(self, model: Decomposition, *, learn: bool) -> None:
        """Take every row once."""
        order = torch.randperm(len(self.rows), generator=self.generator).to(self.rows.y.device)
        parts = order.tensor_split(self.n_parts)
        for i, part in enumerate(parts):
            step = (self.step + self._DELAY) ** -self._KAPPA if self.step else 1.0
            some = self.rows.part(part)
            # Hyperparameters move once a sweep: each evaluation costs as much as a smoother.
            model.sweep(some, learn=learn and i == 0, keep=1 - step, factor_of_rows=len(order) / len(part))
            self.step += 1
