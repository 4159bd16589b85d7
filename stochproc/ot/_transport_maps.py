"""What a fitted transport does: move points and labels either way, show its plan, and go to a file and back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from stochproc._base import FLOATS, Given, SavedMixin, as_array
from stochproc._checks import check_choice
from stochproc._persistence import as_tensor
from stochproc.ot._transport_labels import codes_of, one_hot, read_labels
from stochproc.ot._transport_state import LogCost, Transport

__all__ = ["MAPS", "TransportMaps"]

MAPS = ("continuous", "ferradans")
# What a file holds, in the names of Transport; the last two only with labels.
_TENSORS = ("X", "Y", "a", "b", "f", "g", "rows", "columns")


class TransportMaps(SavedMixin, OneToOneFeatureMixin, TransformerMixin):
    """The part of a transport estimator that comes after its fit.

    An estimator that mixes it in writes ``fit``, and ends it by calling ``_finish``.
    """

    _solved: Transport
    _about: dict[str, Any]
    _classes: np.ndarray | None
    out_of_sample_map: str

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_solved")

    def _finish(
        self, solved: Transport, about: dict[str, Any], classes: np.ndarray | None, n_iter: int, converged: bool
    ) -> None:
        """Set what a fitted estimator has."""
        self._solved, self._about, self._classes = solved, about, classes
        self.n_iter_, self.converged_ = n_iter, converged
        self.potentials_ = self._back(solved.f / about["scale"]), self._back(solved.g / about["scale"])

    def _back(self, value: Tensor) -> Any:
        """Return a result of the kind and precision of what was fitted."""
        value = value.to(getattr(torch, self._about["dtype"]))
        return value if self._about["torch"] else value.cpu().numpy()

    @property
    def coupling_(self) -> Any:
        """The plan (n_sources, n_targets), or an operator that multiplies by it."""
        check_is_fitted(self)
        if self._solved.lazy:
            return self._solved.lazy_plan(getattr(torch, self._about["dtype"]), as_torch=self._about["torch"])
        return self._back(self._solved.plan())

    @property
    def cost_(self) -> Any:
        """Costs (n_sources, n_targets) after ``norm``."""
        check_is_fitted(self)
        if self._solved.lazy:
            n, m = len(self._solved.X), len(self._solved.Y)
            raise AttributeError(f"cost_ is not there for a problem too large to store; this one has {n} x {m} pairs.")
        return self._back(self._solved.cost() / self._about["scale"])

    @property
    def mu_s(self) -> Any:
        """Masses of the sources."""
        check_is_fitted(self)
        return self._back(self._solved.a)

    @property
    def mu_t(self) -> Any:
        """Masses of the targets."""
        check_is_fitted(self)
        return self._back(self._solved.b)

    @property
    def xs_(self) -> Any:
        """Sources."""
        check_is_fitted(self)
        return self._back(self._solved.X)

    @property
    def xt_(self) -> Any:
        """Targets."""
        check_is_fitted(self)
        return self._back(self._solved.Y)

    def fit_transform(
        self,
        Xs: Any = None,
        ys: Any = None,
        Xt: Any = None,
        yt: Any = None,
        *,
        sample_weight: Any = None,
        sample_weight_t: Any = None,
        y: Any = None,
    ) -> Any:
        """Find the plan and move the sources to their barycentric images.

        Parameters
        ----------
        Xs, ys, Xt, yt, sample_weight, sample_weight_t, y
            As in ``fit``.

        Returns
        -------
        array of shape (n_sources, n_features)
            The same as ``fit(Xs, ys, Xt, yt).transform(Xs, ys)``.
        """
        fitted = self.fit(Xs, ys, Xt, yt, sample_weight=sample_weight, sample_weight_t=sample_weight_t, y=y)  # type: ignore[attr-defined]
        return fitted.transform(Xs, y if ys is None else ys)

    def transform(self, Xs: Any = None, ys: Any = None) -> Any:
        """Move points from the side of the sources to that of the targets.

        Parameters
        ----------
        Xs : array-like of shape (n_samples, n_features)
            Sources or new points; need not be of the kind that was fitted.
        ys : array-like of shape (n_samples,), default=None
            Labels of the points, -1 where unknown. They keep the continuous map to targets that they allow, if ``fit``
            saw labels on both sides, and are ignored otherwise.

        Returns
        -------
        array of shape (n_samples, n_features)
            NumPy for NumPy and pandas, torch for torch, in the precision of the argument.

        Raises
        ------
        ValueError
            If shapes do not fit, or ``fit`` did not see a label.
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        """
        return self._moved("ys", Xs, ys, forward=True)

    def inverse_transform(self, Xt: Any, yt: Any = None) -> Any:
        """Move points from the side of the targets to that of the sources; the mirror image of :meth:`transform`.

        It is the barycentric map of the same plan in the other direction, not the inverse of the function.

        Parameters
        ----------
        Xt : array-like of shape (n_samples, n_features)
        yt : array-like of shape (n_samples,), default=None

        Returns
        -------
        array of shape (n_samples, n_features)

        Raises
        ------
        ValueError
            As :meth:`transform`.
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        """
        return self._moved("yt", Xt, yt, forward=False)

    def _moved(self, name: str, points: Any, labels: Any, *, forward: bool) -> Any:
        check_is_fitted(self)
        check_choice("out_of_sample_map", self.out_of_sample_map, MAPS)
        given, array = Given.of(points), validate_data(self, as_array(points), dtype=FLOATS, reset=False)
        solved, codes = self._solved, None
        x = as_tensor(array, torch.float64, solved.X.device).contiguous()
        if self.out_of_sample_map == "ferradans":
            out = solved.moved_with_nearest(x, forward=forward)
        else:
            if labels is not None and self._classes is not None:
                codes = codes_of(name, read_labels(name, labels, len(x)), self._classes).to(x.device)
            out = solved.images(x, forward=forward, labels=codes)
        return given.back(out.to(getattr(torch, array.dtype.name)))

    def transform_labels(self, ys: Any) -> Any:
        """Carry labels of the sources to the targets, as shares of the mass that each target receives.

        Parameters
        ----------
        ys : array-like of shape (n_sources,)
            Labels of the sources of ``fit``, -1 where unknown.

        Returns
        -------
        array of shape (n_targets, n_classes)
            One column for each known label, in sorted order. A row sums to 1, less the share that comes from sources of
            unknown label.

        Raises
        ------
        ValueError
            If there is not one label a source, or none is known.
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        """
        check_is_fitted(self)
        return self._shares("ys", ys, len(self._solved.X), forward=False)

    def inverse_transform_labels(self, yt: Any) -> Any:
        """Carry labels of the targets to the sources; the mirror image of :meth:`transform_labels`.

        Parameters
        ----------
        yt : array-like of shape (n_targets,)

        Returns
        -------
        array of shape (n_sources, n_classes)

        Raises
        ------
        ValueError
            If there is not one label a target, or none is known.
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        """
        check_is_fitted(self)
        return self._shares("yt", yt, len(self._solved.Y), forward=True)

    def _shares(self, name: str, labels: Any, n: int, *, forward: bool) -> Any:
        given = Given.of(labels)
        values = one_hot(name, read_labels(name, labels, n)).to(self._solved.X.device)
        shares = self._solved.own_images(values, forward=forward).to(getattr(torch, self._about["dtype"]))
        return shares.to(given.device) if given.is_torch else shares.cpu().numpy()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        # Of the plan the potentials only: the rest follows from them.
        solved = self._solved
        names = _TENSORS[:6] if solved.rows is None else _TENSORS
        state = {
            **self._about,
            "eps": solved.eps,
            "lazy": solved.lazy,
            "classes": None if self._classes is None else self._classes.tolist(),
            "feature_names_in": list(getattr(self, "feature_names_in_", [])),
            "n_iter": self.n_iter_,
            "converged": self.converged_,
        }
        return {name: getattr(solved, name) for name in names}, state

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        if state["feature_names_in"]:
            self.feature_names_in_ = np.asarray(state["feature_names_in"], dtype=object)
        self.n_features_in_ = tensors["X"].shape[1]
        about = {name: state[name] for name in ("scale", "dtype", "torch", "metric", "logs")}
        metric = LogCost(about["metric"], about["logs"]) if about["logs"] else about["metric"]
        solved = Transport(**tensors, eps=state["eps"], metric=metric, lazy=state["lazy"])
        classes = None if state["classes"] is None else np.asarray(state["classes"], dtype=object)
        self._finish(solved, about, classes, state["n_iter"], state["converged"])


def _by_name(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let the first argument be named: scikit-learn's ``set_output`` takes it by position, POT's users name it."""

    @functools.wraps(method)
    def called(self: Any, Xs: Any = None, *args: Any, **kwargs: Any) -> Any:
        return method(self, Xs, *args, **kwargs)

    return called


for _name in ("transform", "fit_transform"):
    setattr(TransportMaps, _name, _by_name(getattr(TransportMaps, _name)))
