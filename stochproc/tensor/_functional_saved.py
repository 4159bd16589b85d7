"""Files of functional decompositions: factors and messages as tensors, kernels and categories as names and numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc._base import Given
from stochproc._options import as_device
from stochproc.tensor._coordinate_ascent import Decomposition
from stochproc.tensor._factor import Factor
from stochproc.tensor._links import CPLink, Link, TuckerLink
from stochproc.tensor._modes import Mode
from stochproc.tensor._noise import Noise
from stochproc.tensor._priors import DiscretePrior, FunctionPrior, MarkovPrior

__all__ = ["FunctionalSaved"]


class FunctionalSaved:
    """``_state`` and ``_restore`` of ``SavedMixin`` for an estimator with a decomposition."""

    _model: Decomposition

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        model: Any = self._model
        link, noise = model.link, model.noise
        tensors: dict[str, Tensor] = {
            "elbo": torch.as_tensor(self.elbo_),  # type: ignore[attr-defined]
            "validation_score": torch.as_tensor(self.validation_score_),  # type: ignore[attr-defined]
        }
        priors = []
        for k, factor in enumerate(model.factors):
            for name in ("points", "mean", "cov", "Lam", "eta"):
                tensors[f"{k}.{name}"] = getattr(factor, name)
            record, more = _described(factor.prior)
            priors.append({**record, "log_z": factor.log_z, "curvature": list(factor.curvature)})
            tensors |= {f"{k}.{name}": value for name, value in more.items()}
        if isinstance(link, TuckerLink):
            tensors |= {"core": link.mean, "core_cov": link.cov}
            if link.precision is not None and link.linear is not None:
                tensors |= {"core_precision": link.precision, "core_linear": link.linear}
        state = {
            "modes": self._modes,  # type: ignore[attr-defined]
            "categories": [None if c is None else c.tolist() for c in self._categories],  # type: ignore[attr-defined]
            "priors": priors,
            "noise": [noise.a, noise.b, noise.fixed],
            "core": (
                [link.prior_variance, link.learn_variance, link.diagonal] if isinstance(link, TuckerLink) else None
            ),
            "anchor": model.anchor,
            "squares": [model.squares, model.n],
            "y": [self._y_shift, self._y_unit],  # type: ignore[attr-defined]
            "given": self._given.name,  # type: ignore[attr-defined]
            "feature_names_in": list(getattr(self, "feature_names_in_", [])),
            "converged": self.converged_,  # type: ignore[attr-defined]
            "n_iter": self.n_iter_,  # type: ignore[attr-defined]
            "start": self.start_,  # type: ignore[attr-defined]
        }
        return tensors, state

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        device = as_device(self.device)  # type: ignore[attr-defined]
        on = {name: value.to(device) for name, value in tensors.items()}
        factors = []
        for k, record in enumerate(state["priors"]):
            prior = _rebuilt(record, {n: v for n, v in on.items() if n.startswith(f"{k}.")}, k).to(device)
            points, mean, cov, Lam, eta = (on[f"{k}.{name}"] for name in ("points", "mean", "cov", "Lam", "eta"))
            factors.append(Factor(prior, points, mean, cov, Lam, eta, record["log_z"], list(record["curvature"])))
        link: Link
        if state["core"] is None:
            link = CPLink(factors[0].rank, len(factors))
        else:
            link = TuckerLink(on["core"], on["core_cov"], *state["core"])
            link.precision, link.linear = on.get("core_precision"), on.get("core_linear")
        a, b, fixed = state["noise"]
        model = Decomposition(factors, link, Noise(a, b, fixed), state["anchor"], int(self.chunk_size))  # type: ignore[attr-defined]
        model.squares, model.n = state["squares"]
        self.n_features_in_ = len(factors)
        if state["feature_names_in"]:
            self.feature_names_in_ = np.asarray(state["feature_names_in"], dtype=object)
        self._modes: list[Mode] = state["modes"]
        self.elbo_ = tensors["elbo"].numpy()
        self.validation_score_ = tensors["validation_score"].numpy()
        self.converged_, self.n_iter_, self.start_ = state["converged"], state["n_iter"], state["start"]
        categories = [None if c is None else _as_categories(c) for c in state["categories"]]
        shift, unit = state["y"]
        self._set(model, categories, shift, unit, Given.named(state["given"], device))  # type: ignore[attr-defined]


def _as_categories(values: list[Any]) -> np.ndarray:
    return np.asarray(values, dtype=object if isinstance(values[0], str) else np.float64)


def _described(prior: FunctionPrior) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A prior as names, numbers and tensors, with where its search started."""
    starts = prior.search_record()
    tensors = {f"start.{name}": start for name, (start, _, _) in starts.items()}
    record: dict[str, Any] = {
        "search": [[name, spread, list(allowed)] for name, (_, spread, allowed) in starts.items()]
    }
    if isinstance(prior, MarkovPrior):
        return {**record, "parts": list(prior.parts), "shared": prior.shared, "method": prior.method}, tensors
    return record, {**tensors, "variance": prior.variance.detach()}


def _rebuilt(record: dict[str, Any], tensors: dict[str, Tensor], k: int) -> FunctionPrior:
    prior: FunctionPrior
    if "parts" in record:
        prior = MarkovPrior.of_parts(record["parts"], shared=record["shared"], method=record["method"])
    else:
        prior = DiscretePrior(tensors[f"{k}.variance"])
    for name, spread, allowed in record["search"]:
        prior.note_search(name, tensors[f"{k}.start.{name}"], spread, (allowed[0], allowed[1]))
    return prior
