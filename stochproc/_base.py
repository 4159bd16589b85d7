"""What the estimators share: torch in and torch out, intervals from quantiles, saving and loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from stochproc import _persistence

__all__ = [
    "FLOATS",
    "Given",
    "ProbabilisticRegressorMixin",
    "SavedMixin",
    "as_array",
    "as_numbers",
    "check_levels",
    "old_fit_unless_new",
]

FLOATS = [np.float64, np.float32]


class Given(NamedTuple):
    """What kind of array came in, so that the same kind goes out."""

    is_torch: bool
    dtype: torch.dtype | None
    device: torch.device | None

    @classmethod
    def of(cls, value: Any) -> Given:
        """Look at an argument."""
        if not isinstance(value, Tensor):
            return cls(False, None, None)
        if not value.is_floating_point():
            return cls(True, None, value.device)
        # Results in half precision would keep three digits of what was computed.
        return cls(True, torch.promote_types(value.dtype, torch.float32), value.device)

    @classmethod
    def named(cls, name: str | None, device: torch.device) -> Given:
        """Undo :attr:`name`, for results on ``device``."""
        dtypes = {"float32": torch.float32, "float64": torch.float64}
        return cls(name is not None, dtypes.get(name or ""), device)

    @property
    def name(self) -> str | None:
        """Name of the dtype of a tensor, empty if it held no floats; None for other arrays."""
        return str(self.dtype or "").removeprefix("torch.") if self.is_torch else None

    def back(self, value: Tensor) -> Any:
        """Return a result as it was given: NumPy for NumPy and pandas, torch for torch."""
        if self.is_torch:
            return value.to(dtype=self.dtype or value.dtype, device=self.device)
        return value.detach().cpu().numpy()


def as_array(value: Any) -> Any:
    """Return a tensor as a NumPy array, anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    # NumPy has no bfloat16.
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def as_numbers(name: str, value: np.ndarray) -> np.ndarray:
    """Return real numbers in native byte order, float32 or float64, or raise ValueError naming the argument.

    scikit-learn's validation leaves targets of several outputs in whatever dtype they came in.
    """
    if value.dtype.kind not in "buifO":
        raise ValueError(f"{name} must hold real numbers; got dtype {value.dtype}.")
    if value.dtype in FLOATS:
        return value
    try:
        out = value.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold real numbers; {error}.") from None
    if not np.isfinite(out).all():
        raise ValueError(f"{name} must be finite in float64; got NaN or infinity.")
    return out


def check_levels(name: str, value: Any) -> np.ndarray:
    """Return probabilities as a vector, or raise ValueError unless all lie strictly between 0 and 1."""
    levels = np.atleast_1d(np.asarray(as_array(value), dtype=np.float64))
    if levels.ndim != 1 or levels.size == 0:
        raise ValueError(f"{name} must be a number or a vector of numbers in (0, 1); got shape {levels.shape}.")
    if not np.all((levels > 0) & (levels < 1)):
        bad = levels[~((levels > 0) & (levels < 1))][0]
        raise ValueError(f"{name} must lie in (0, 1); got {bad}.")
    return levels


# What scikit-learn's validation sets before anything is fitted.
_SET_BY_VALIDATION = ("n_features_in_", "feature_names_in_")


@contextmanager
def old_fit_unless_new(estimator: Any, marker: str) -> Iterator[None]:
    """Leave an estimator as it was, unfitted or with its old fit, unless the block sets ``marker`` anew."""
    old = {name: vars(estimator)[name] for name in (marker, *_SET_BY_VALIDATION) if name in vars(estimator)}
    try:
        yield
    finally:
        if vars(estimator).get(marker) is old.get(marker):
            for name in _SET_BY_VALIDATION:
                estimator.__dict__.pop(name, None)
            estimator.__dict__.update(old)


class SavedMixin:
    """Files of fitted estimators: one that mixes it in writes ``_state`` and ``_restore``."""

    def save(self, path: Any) -> None:
        """Write the fitted estimator to one safetensors file.

        Parameters
        ----------
        path : str or path-like
            Replaced whole, or not at all.

        Raises
        ------
        TypeError
            If a parameter is not made of names and numbers of this library, such as a function, a kernel of
            another library or a random generator, or a kernel whose parts share a hyperparameter; nothing is
            written then.
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        """
        check_is_fitted(self)
        tensors, state = self._state()
        _persistence.write(path, type(self), self.get_params(deep=False), state, tensors)  # type: ignore[attr-defined]

    @classmethod
    def load(cls, path: Any) -> Any:
        """Read an estimator that :meth:`save` wrote.

        Parameters
        ----------
        path : str or path-like

        Returns
        -------
        estimator
            Fitted, with the same predictions; a refit learns what the saved one would.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the path is a directory, or the file is not one of this library or holds another class.
        """
        # Parameters made in inference mode could never be learned again.
        with torch.inference_mode(False):
            parameters, state, tensors = _persistence.read(path, cls)
            estimator = cls(**parameters)
            estimator._restore(tensors, state)
        return estimator

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a file holds besides the parameters: tensors, and what JSON can say."""
        raise NotImplementedError

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Become the fitted estimator that ``_state`` described."""
        raise NotImplementedError


class ProbabilisticRegressorMixin(SavedMixin):
    """The part of the contract of probabilistic regressors that does not depend on the model.

    An estimator that mixes it in writes ``fit``, ``predict``, ``predict_quantiles`` and, for files, ``_state``
    and ``_restore``.
    """

    def _validated(self, X: Any) -> Any:
        """Run scikit-learn's validation of inputs to predict at: arrays, frames or tensors."""
        return validate_data(self, as_array(X), dtype=FLOATS, reset=False)

    def _validated_pair(self, X: Any, y: Any, **options: Any) -> tuple[Any, Any]:
        """Run scikit-learn's validation of inputs and targets."""
        inputs, targets = validate_data(
            self, as_array(X), as_array(y), dtype=FLOATS, y_numeric=True, multi_output=True, **options
        )
        return inputs, as_numbers("y", targets)

    def predict_interval(self, X: Any, coverage: float = 0.9) -> Any:
        """Predict central intervals for new observations.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        coverage : float, default=0.9
            Probability inside, in (0, 1).

        Returns
        -------
        ndarray or Tensor of shape (n_samples, 2) or (n_samples, 2, n_outputs)
            Lower and upper end, in the units of y.

        Raises
        ------
        ValueError
            If coverage does not lie in (0, 1).
        """
        level = check_levels("coverage", coverage)
        if level.size != 1:
            raise ValueError(f"coverage must be one number in (0, 1); got {level.size} numbers.")
        tail = (1 - level[0]) / 2
        return self.predict_quantiles(X, [tail, 1 - tail])  # type: ignore[attr-defined]
