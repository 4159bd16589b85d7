"""Training of the variational classifier: mini-batches, Adam, a step that is halved on plateaus, early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stochproc.exceptions import NotPositiveDefiniteError
from stochproc.gp._svi import ScaleMixtureSVGP
from stochproc.solvers import SolverState

__all__ = ["Training", "start", "train"]

# Small data have few steps an epoch: the bound is averaged over at least this many before it is compared.
_WINDOW_STEPS = 20
# Windows without progress before the step is halved, and halvings before training has converged.
_PATIENCE = 3
_HALVINGS = 4
# The default length: this many epochs or, with few batches, this many steps.
_EPOCHS, _STEPS = 100, 2000
# Steps that may fail, with the last good parameters put back and the step halved.
_FAILURES = 8


# Scales of the prior that are tried for a start, each so many times the one before. Logits of several units are common,
# and Adam takes hundreds of steps to get there from one.
_SCALE_FACTOR, _SCALE_TRIALS = 4.0, 6
_ROWS_OF_START = 2000


@dataclass
class Training:
    """How training goes, and in the end how it went; filled in as it runs, so that an interruption leaves it whole.

    Parameters
    ----------
    history : list of float
        Bound a row (a unit of weight) in nats, averaged over each epoch.
    converged : bool
        Whether the bound stopped growing before the epochs ran out.
    message : str
        How it ended.
    """

    history: list[float] = field(default_factory=list)
    converged: bool = False
    message: str = "interrupted"


class _Plateau:
    """Watches averages of the bound and says when to halve the step, and when to stop."""

    def __init__(self, tol: float) -> None:
        self.tol, self.best, self.stale, self.halvings = tol, -math.inf, 0, 0

    def improved(self, value: float) -> bool:
        """Take one average; whether it is the best so far by more than the tolerance."""
        better = value > self.best + self.tol
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best = value
        return better

    def halve(self) -> bool:
        """Whether the step shall be halved now."""
        if self.stale < _PATIENCE:
            return False
        self.stale, self.halvings = 0, self.halvings + 1
        return True


class _Ascent:
    """Steps of Adam up the bound, taken back to the last good parameters, and halved, where one went too far."""

    def __init__(self, model: ScaleMixtureSVGP, step: float) -> None:
        self.model, self.failures = model, 0
        self.adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=step, fused=True)
        self.keep()

    def keep(self) -> None:
        """Take the parameters of now as good ones."""
        self.good = _copy(self.model)

    def halve(self) -> None:
        """Halve the step."""
        for group in self.adam.param_groups:
            group["lr"] /= 2

    def epoch(
        self,
        X: Tensor,
        y: Tensor,
        weight: Tensor | None,
        batch_size: int,
        n_samples: int,
        generator: torch.Generator,
    ) -> float:
        """Go through all rows once; return the mean bound a row, NaN if it could not be evaluated at all."""
        mass = len(X) if weight is None else weight.sum().item()
        total, seen = 0.0, 0
        for rows in torch.randperm(len(X), generator=generator).to(X.device).split(batch_size):
            self.adam.zero_grad()
            part = None if weight is None else weight[rows]
            bound = _bound(self.model, X[rows], y[rows], part, len(X), n_samples, generator)
            if bound is None:
                self._step_back()
                if self.failures > _FAILURES:
                    break
                continue
            (bound / -mass).backward()
            self.adam.step()
            total, seen = total + bound.item() / mass * len(rows), seen + len(rows)
        return total / seen if seen else math.nan

    def _step_back(self) -> None:
        self.failures += 1
        self.model.load_state_dict(self.good)
        self.adam.state.clear()
        self.halve()


@torch.no_grad()
def start(
    model: ScaleMixtureSVGP,
    X: Float[Tensor, "n d"],
    y: Shaped[Tensor, "n *outputs"],
    *,
    weight: Float[Tensor, " n"] | None = None,
    n_samples: int = 100,
    generator: torch.Generator,
) -> None:
    """Set the posterior by ``model.start``, at the scale of the prior with the largest bound where that is learned.

    Larger scales are tried until the bound, on at most 2000 random rows, falls.
    """
    rows = torch.randperm(len(X), generator=generator)[:_ROWS_OF_START].to(X.device)
    part = None if weight is None else weight[rows]
    seed = int(torch.randint(2**62, (), generator=generator))
    best, best_bound = _copy(model), -math.inf
    prior = model.scale_prior
    for trial in range(_SCALE_TRIALS if prior.has_scale and prior.scale_name is not None else 1):
        if trial:
            prior.rescale(_SCALE_FACTOR)
            model.scale_posterior.rescale(_SCALE_FACTOR)
        model.start(X, y, weight=weight)
        same = torch.Generator().manual_seed(seed)
        bound = _bound(model, X[rows], y[rows], part, len(X), n_samples, same)
        if bound is not None and bound.item() > best_bound:
            best, best_bound = _copy(model), bound.item()
        elif trial:
            break
        elif bound is None:
            # What training would only find later, with its reason.
            model.elbo(X[rows], y[rows], n_samples=n_samples, generator=same)
    model.load_state_dict(best)


def train(
    model: ScaleMixtureSVGP,
    X: Float[Tensor, "n d"],
    y: Shaped[Tensor, "n *outputs"],
    progress: Training,
    *,
    weight: Float[Tensor, " n"] | None = None,
    batch_size: int = 100,
    max_epochs: int | None = None,
    n_samples: int = 100,
    learning_rate: float | int = 1e-2,
    tol: float | int = 1e-3,
    generator: torch.Generator,
    callback: Callable[[SolverState], Any] | None = None,
    verbose: int = 0,
) -> None:
    """Maximise the bound over every parameter that has ``requires_grad``, in place.

    Parameters
    ----------
    model : ScaleMixtureSVGP
    X : Tensor of shape (n, d)
    y : Tensor of shape (n,)
    progress : Training
        Filled in on the way.
    weight : Tensor of shape (n,) or None, default=None
        How often each row counts.
    batch_size, max_epochs, n_samples
        ``max_epochs=None`` is 100 epochs, or 2000 steps where those are more.
    learning_rate : float, default=1e-2
        Step of Adam, halved where the bound has stopped growing, four times at most.
    tol : float, default=1e-3
        Growth of the bound, in nats a row, that counts as progress.
    generator : torch.Generator
        Source of randomness, on the CPU.
    callback : callable, default=None
        Called with a ``SolverState`` after each epoch: its residual is minus the bound a row, its value the model;
        returning True stops training.
    verbose : int, default=0
        1 shows a progress bar.

    Raises
    ------
    NotPositiveDefiniteError
        If the model cannot be evaluated at the parameters where it starts.
    """
    batch_size = min(batch_size, len(X))
    batches = math.ceil(len(X) / batch_size)
    epochs = max(_EPOCHS, math.ceil(_STEPS / batches)) if max_epochs is None else max_epochs
    window = math.ceil(_WINDOW_STEPS / batches)
    plateau, ascent = _Plateau(float(tol)), _Ascent(model, float(learning_rate))
    with _bar(epochs, verbose) as bar:
        for epoch in range(1, epochs + 1):
            total = ascent.epoch(X, y, weight, batch_size, n_samples, generator)
            if ascent.failures > _FAILURES:
                progress.message = "the bound could not be evaluated, again and again, however short the step"
                return
            progress.history.append(total)
            bar.update(1)
            bar.set_postfix_str(f"bound a row {total:.4f}")
            if callback is not None and callback(SolverState(epoch, -total, model)) is True:
                progress.message = "stopped by the callback"
                return
            if epoch % window:
                continue
            if plateau.improved(sum(progress.history[-window:]) / window):
                ascent.keep()
            if plateau.halve():
                if plateau.halvings > _HALVINGS:
                    progress.converged = True
                    progress.message = "the bound stopped growing"
                    return
                ascent.halve()
    progress.message = f"the bound still grew after {epochs} epochs. Pass a larger max_epochs or tol"


def _bound(
    model: ScaleMixtureSVGP, X: Tensor, y: Tensor, weight: Tensor | None, n: int, samples: int, gen: torch.Generator
) -> Tensor | None:
    """Evaluate the bound on a batch; None where a step went too far."""
    try:
        bound = model.elbo(X, y, n_total=n, weight=weight, n_samples=samples, generator=gen)
    # Kernels refuse points that are not finite, or too many lengthscales apart.
    except (NotPositiveDefiniteError, OverflowError, ValueError):
        return None
    return bound if math.isfinite(bound.item()) else None


def _copy(model: ScaleMixtureSVGP) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _bar(total: int, verbose: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, disable=not verbose, desc="epochs", leave=False)
