"""The search of a regressor for its hyperparameters, counted, so that an interrupted one knows how far it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stochproc._random import make_generator
from stochproc._search import Learned, default_search
from stochproc.gp._arch_names import network_ranges
from stochproc.gp._hyperparameters import start_period
from stochproc.gp._model_choice import Model, learner_of, start_model

__all__ = ["Counted", "searched"]


class Counted:
    """A callback that counts the iterations before it passes them on.

    Parameters
    ----------
    callback : callable or None
        Whom to pass them on to.
    """

    def __init__(self, callback: Callable[[Any], Any] | None) -> None:
        self.callback, self.n_iter = callback, 0

    def __call__(self, state: Any) -> Any:
        """Take note of an iteration, and return what the callback does."""
        self.n_iter += 1
        return self.callback is not None and self.callback(state)


def searched(
    estimator: Any, model: Model, inputs: Tensor, targets: Tensor, callback: Callable[[Any], Any] | None
) -> Learned:
    """Learn what the model may learn, in place, as the parameters of the estimator say."""
    if estimator.optimizer is None:
        return Learned(None, True, 0)
    ranges = network_ranges(model.kernel)
    if isinstance(estimator.kernel, str) and estimator.kernel == "periodic":
        ranges |= start_period(start_model(model, targets), inputs, targets)
    search = default_search(1) if estimator.optimizer == "lbfgs" else estimator.optimizer
    generator = make_generator(0 if estimator.random_state is None else estimator.random_state)
    find = learner_of(estimator, model, len(inputs))
    learned: Learned = find(model, inputs, targets, search, generator, callback, estimator.verbose, ranges)
    return learned
