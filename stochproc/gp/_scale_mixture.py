"""A finite mixture of priors of the scale."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_positive
from stochproc.gp._scale_base import PositiveNumber, ScalePrior, plain_number

__all__ = ["Mixture"]


class Mixture(ScalePrior):
    r"""Finite mixture prior: s = scale x, where x has the law of component k with probability ``weights[k]``.

    Parameters
    ----------
    components : sequence of ScalePrior
        One or more priors, of any kind; copied, and their numbers are kept by fits.
    weights : sequence of float or None, default=None
        One positive weight a component, divided by their sum; None is equal weights. Kept by fits.
    scale : float, default=1.0
        Common scale, positive. Learned by fits.

    Raises
    ------
    ValueError
        If there is no component, or the weights are not one positive number each.
    TypeError
        If a component is not a prior.

    Notes
    -----
    Evidence and posterior are sums over the components, each by its own closed form or quadrature, so that a
    ``Delta`` may be among them; the mixture then has no density, and ``log_prob`` raises TypeError.

    Examples
    --------
    >>> from stochproc.gp import Delta, InverseGamma
    >>> prior = Mixture([Delta(1.0), InverseGamma(3.0, 4.0)], [3, 1])
    >>> round(prior.mean, 6), round(prior.tail_index, 6)
    (1.25, 3.0)
    """

    scale = PositiveNumber(learned=True, doc="Common scale of the components.")
    scale_name = "scale"
    search_ranges: ClassVar[dict[str, tuple[float, float]]] = {"log_weights": (1e-12, 1e12)}
    log_scale: Tensor
    _conjugate = "mixture"

    def __init__(
        self,
        components: Sequence[ScalePrior],
        weights: "Sequence[float | int] | None" = None,
        scale: "float | int" = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(components, ScalePrior) or not isinstance(components, Iterable):
            raise TypeError(f"components must be a sequence of priors; got {type(components).__name__}.")
        parts = list(components)
        for part in parts:
            if not isinstance(part, ScalePrior):
                raise TypeError(f"components must be priors of the scale; got {type(part).__name__}.")
        if not parts:
            raise ValueError("components must hold at least one prior; got none.")
        if weights is not None and not isinstance(weights, Iterable):
            raise TypeError(f"weights must be a sequence of numbers; got {type(weights).__name__}.")
        numbers = [1.0] * len(parts) if weights is None else [plain_number("weights", w) for w in weights]
        if len(numbers) != len(parts):
            raise ValueError(f"weights must be one a component, {len(parts)}; got {len(numbers)}.")
        for number in numbers:
            check_positive("weights", number)
        self.components = torch.nn.ModuleList(copy.deepcopy(part).requires_grad_(False) for part in parts)
        log_weights = torch.tensor(numbers, dtype=torch.float64).log()
        self.log_weights = torch.nn.Parameter(log_weights.log_softmax(0), requires_grad=False)
        self.scale = scale

    @property
    def weights(self) -> Tensor:
        """Probabilities of the components."""
        return self.log_weights.softmax(0)

    def _parts(self) -> list[Any]:
        return list(self.components)

    def _has_point(self) -> bool:
        return any(
            (isinstance(part, Mixture) and part._has_point()) or part._conjugate == "point" for part in self._parts()
        )

    def _check_density(self) -> None:
        if self._has_point():
            raise TypeError(
                "a Mixture with a Delta has no density; log_evidence and scale_posterior take its point mass as it is."
            )

    @property
    def _reach(self) -> "float | int":
        return min(part._reach for part in self._parts()) - abs(self.log_scale.item())

    def _log_prob_u(self, u: Tensor) -> Tensor:
        self._check_density()
        log_weights = self.log_weights.to(u).log_softmax(0)
        x = u - self.log_scale.to(u)
        terms = [w + p._log_prob_u(x) for w, p in zip(log_weights, self._parts(), strict=True)]
        return torch.logsumexp(torch.stack(terms), 0)

    def log_prob(self, s: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return log p(s); TypeError if a component is a point mass."""
        self._check_density()
        log_weights = self.log_weights.to(s).log_softmax(0)
        log_scale = self.log_scale.to(s)
        x = s * (-log_scale).exp()
        terms = [w + p.log_prob(x) for w, p in zip(log_weights, self._parts(), strict=True)]
        return torch.logsumexp(torch.stack(terms), 0) - log_scale

    def _ranges(self, depth: float) -> list[tuple[float, float]]:
        shift = self.log_scale.item()
        found = [ends for part in self._parts() for ends in part._ranges(depth)]
        return [(low + shift, high + shift) for low, high in found]

    @property
    def tail_index(self) -> "float | int":
        """The smallest one of a component."""
        return min(part.tail_index for part in self._parts())

    @property
    def mean(self) -> "float | int":
        """Weighted mean of the components, inf if one of them has none."""
        means = [float(part.mean) for part in self._parts()]
        return self.scale.item() * math.fsum(w * m for w, m in zip(self.weights.tolist(), means, strict=True))

    def sample(
        self, shape: "int | tuple[int, ...]" = (), *, generator: "torch.Generator | None" = None
    ) -> Float[Tensor, "..."]:
        """Draw a component, then from it; see :meth:`ScalePrior.sample`."""
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        n = math.prod(size)
        with torch.no_grad():
            which = torch.searchsorted(
                self.weights.cumsum(0),
                torch.rand(n, dtype=torch.float64, device=self._device(), generator=generator),
                right=True,
            ).clamp(max=len(self.components) - 1)
            draws = torch.stack([part.sample(n, generator=generator) for part in self._parts()])
            return (self.scale * draws.gather(0, which[None])[0]).reshape(size)

    def config(self) -> dict[str, Any]:
        """Return the prior as nested names and numbers; see :meth:`ScalePrior.config`."""
        components = [part.config() for part in self._parts()]
        return {**super().config(), "components": components, "weights": self.weights.tolist()}

    @classmethod
    def _from_numbers(cls, numbers: dict[str, Any]) -> "Mixture":
        from stochproc.gp._scale_priors import scale_prior_from_config

        own = dict(numbers)
        components = [scale_prior_from_config(config) for config in own.pop("components", [])]
        return cls(components, **own)

    def __repr__(self) -> str:
        weights = ", ".join(f"{w:.6g}" for w in self.weights.tolist())
        return f"Mixture({self._parts()!r}, weights=[{weights}], scale={self.scale.item():.6g})"
