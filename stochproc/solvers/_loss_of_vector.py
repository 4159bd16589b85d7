"""A loss over torch parameters as a function of one vector, for optimisers that know only vectors."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stochproc._checks import check_floating
from stochproc.exceptions import NotPositiveDefiniteError

__all__ = ["LossOfVector", "Point"]


class Point(NamedTuple):
    """A vector at which the loss and its gradient are finite."""

    x: np.ndarray
    loss: float
    gradient: np.ndarray


class LossOfVector:
    """A loss over torch parameters as a function of one float64 vector, which remembers its best point.

    Parameters
    ----------
    loss, parameters, bounds
        As in ``LBFGS.__call__``.
    eps : float, callable or None, default=None
        As in ``LBFGS.__call__``.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        parameters: Iterable[Tensor],
        bounds: "Sequence[Any] | None",
        eps: "float | Callable[[], float] | None" = None,
    ) -> None:
        everything = _check_parameters(parameters)
        if bounds is None:
            bounds = [None] * len(everything)
        elif len(bounds) != len(everything):
            raise ValueError(
                f"bounds must have one entry a parameter; got {len(bounds)} for {len(everything)} parameters."
            )
        ends = [_ends(i, p, b) for i, (p, b) in enumerate(zip(everything, bounds, strict=True)) if p.requires_grad]
        self.loss = loss
        self.parameters = [p for p in everything if p.requires_grad]
        self.before = [p.detach().clone() for p in self.parameters]
        self.low, self.high = (_flat([pair[k] for pair in ends]) for k in (0, 1))
        self.bounded = bool(np.isfinite(self.low).any() or np.isfinite(self.high).any())
        self.first = np.clip(_flat(self.before), self.low, self.high)
        # The coarsest arithmetic in play limits how small a decrease can be seen.
        finest = torch.finfo(torch.float64).eps
        self.eps = max([torch.finfo(p.dtype).eps for p in self.parameters], default=finest)
        self.given_eps = eps
        self.evaluations = self.failures = 0
        self.last_failure = ""
        self.best_x: np.ndarray | None = None
        self.best_loss = math.inf
        self.last: Point | None = None
        self.iterate = Point(self.first, math.inf, np.zeros_like(self.first))

    def evaluate(self, x: np.ndarray) -> "Point | None":
        """Loss and gradient at x, or None if it failed; the parameters are left at x."""
        self._write(x)
        if self.last is not None and np.array_equal(self.last.x, x):
            return self.last
        self.evaluations += 1
        try:
            with torch.enable_grad():
                loss = self.loss()
                self._check_loss(loss)
                gradients = self._gradients(loss)
        except failure_types() as error:
            return self._failed(f"{type(error).__name__}: {error}")
        value, gradient = float(loss.detach()), _flat(gradients)
        self.eps = max(self.eps, torch.finfo(loss.dtype).eps)
        if not math.isfinite(value):
            return self._failed(f"the loss is {value}")
        if not np.isfinite(gradient).all():
            return self._failed(f"the gradient holds NaN or infinity at a loss of {value:.6g}")
        self.last = Point(x.copy(), value, gradient)
        if value < self.best_loss:
            self.best_x, self.best_loss = self.last.x, value
        return self.last

    def for_line_search(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Loss and gradient for scipy, with a stand-in where the evaluation failed."""
        point = self.evaluate(x)
        if point is not None:
            return point.loss, point.gradient
        # The stand-in is above the iterate, so it can be neither accepted nor returned. It is only a little
        # above, by a tenth of the decrease the gradient promises: the line search interpolates, and then tries
        # 0.28 of the step. A huge value would give a step of almost nothing, which passes for convergence.
        promised = abs(float(self.iterate.gradient @ (x - self.iterate.x)))
        rise = max(0.1 * promised if math.isfinite(promised) else 0.0, 1e-12 * max(1.0, abs(self.iterate.loss)))
        return self.iterate.loss + rise, np.zeros_like(x)

    def rounding(self, point: Point) -> float:
        """Relative rounding of the loss at a point; the parameters are left there."""
        if self.given_eps is None:
            return self.eps
        self._write(point.x)
        given = self.given_eps() if callable(self.given_eps) else self.given_eps
        return max(self.eps, float(given))

    def projected_gradient(self, point: Point) -> float:
        """Max-norm of x - P(x - g), zero exactly at a stationary point within the bounds."""
        step = point.x - np.clip(point.x - point.gradient, self.low, self.high)
        return float(np.abs(step).max(initial=0.0))

    def draw(self, generator: torch.Generator) -> np.ndarray:
        """Draw a starting point by the rule of ``LBFGS.n_restarts``."""
        shape, device = self.first.shape, generator.device
        uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float64).cpu().numpy()
        normal = torch.randn(shape, generator=generator, device=device, dtype=torch.float64).cpu().numpy()
        boxed = np.isfinite(self.low) & np.isfinite(self.high)
        low, high = np.where(boxed, self.low, 0.0), np.where(boxed, self.high, 1.0)
        return np.clip(np.where(boxed, low + (high - low) * uniform, self.first + normal), self.low, self.high)

    def restore(self) -> None:
        """Put the parameters at the best point, or where they were if there is none."""
        if self.best_x is not None:
            self._write(self.best_x)
            return
        with torch.no_grad():
            for p, before in zip(self.parameters, self.before, strict=True):
                p.copy_(before)

    def _write(self, x: np.ndarray) -> None:
        values = torch.from_numpy(np.ascontiguousarray(x)).split([p.numel() for p in self.parameters])
        with torch.no_grad():
            for p, value in zip(self.parameters, values, strict=True):
                p.copy_(value.view(p.shape))

    def _failed(self, why: str) -> "Point | None":
        self.failures += 1
        self.last_failure = why
        return None

    def _check_loss(self, loss: Any) -> None:
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must return a 0-dim torch.Tensor; got {type(loss).__name__}.")
        if loss.ndim or not loss.is_floating_point():
            raise ValueError(
                f"loss must return a 0-dim floating tensor; got {loss.dtype} of shape {tuple(loss.shape)}."
            )
        if self.parameters and not loss.requires_grad:
            raise ValueError("loss must depend on the parameters; got a tensor that has no gradient.")

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        if not self.parameters:
            return []
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]


def _flat(tensors: list[Tensor]) -> np.ndarray:
    if not tensors:
        return np.zeros(0)
    return torch.cat([t.detach().reshape(-1).to("cpu", torch.float64) for t in tensors]).numpy()


def _check_parameters(parameters: Iterable[Tensor]) -> list[Tensor]:
    everything = list(parameters)
    for i, p in enumerate(everything):
        check_floating(**{f"parameters[{i}]": p})
        if not p.is_leaf:
            raise ValueError(f"parameters[{i}] must be a leaf tensor; got the result of an operation.")
    if len({id(p) for p in everything}) < len(everything):
        raise ValueError(f"parameters must be distinct; got the same tensor twice among {len(everything)}.")
    return everything


def _ends(i: int, parameter: Tensor, bound: Any) -> tuple[Tensor, Tensor]:
    """Bounds of one parameter in its shape, rounded inwards in its dtype so that no copy of x is outside."""
    low, high = (None, None) if bound is None else bound
    ends = []
    for end, inwards in ((low, math.inf), (high, -math.inf)):
        wanted = torch.as_tensor(-inwards if end is None else end, dtype=torch.float64).detach().cpu()
        if wanted.isnan().any():
            raise ValueError(f"bounds[{i}] must not be NaN; got {bound}.")
        wanted = wanted.broadcast_to(parameter.shape)
        rounded = wanted.to(parameter.dtype)
        outside = rounded < wanted if inwards > 0 else rounded > wanted
        nearer = torch.nextafter(rounded, torch.full_like(rounded, inwards))
        ends.append(torch.where(outside, nearer, rounded))
    if bool((ends[0] > ends[1]).any()):
        raise ValueError(f"bounds[{i}] must have low <= high; got {bound}.")
    return ends[0], ends[1]


def failure_types() -> tuple[type[BaseException], ...]:
    """Exceptions that mark a point as failed; linear_operator's only if it is loaded already."""
    known: tuple[type[BaseException], ...] = (
        NotPositiveDefiniteError,
        torch.linalg.LinAlgError,
        OverflowError,
        FloatingPointError,
    )
    errors = sys.modules.get("linear_operator.utils.errors")
    return known if errors is None else (*known, errors.NotPSDError, errors.NanError)
