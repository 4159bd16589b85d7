"""A smooth function of a tensor at one point: value, gradient and Hessian products, each evaluated once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_floating
from stochproc.solvers._loss_of_vector import failure_types

__all__ = ["Point", "SmoothFunction"]


@dataclass
class SmoothFunction:
    """A function with its gradient and Hessian products, by autograd where they are not given, and call counts."""

    fun: Callable[[Tensor], Tensor]
    grad: "Callable[[Tensor], Tensor] | None"
    hvp: "Callable[[Tensor, Tensor], Tensor] | None"
    evaluations: int = 0
    gradients: int = 0
    products: int = 0
    failures: int = 0
    last_failure: str = ""

    def at(self, x: Tensor) -> "Point":
        """Evaluate the function at x; where that fails the value is NaN."""
        return Point(self, x)

    def note_failure(self, error: BaseException) -> None:
        """Count an evaluation that raised one of the errors which mark a point as out of reach."""
        self.failures += 1
        self.last_failure = f"{type(error).__name__}: {error}"


class Point:
    """The function at one point.

    Attributes
    ----------
    x : Tensor
        Detached.
    value : Tensor of shape ()
        Detached; NaN where the evaluation failed.
    """

    def __init__(self, function: SmoothFunction, x: Tensor) -> None:
        self.function = function
        by_autograd = function.grad is None or function.hvp is None
        self._leaf = x.detach().requires_grad_(by_autograd)
        self.x = self._leaf.detach()
        self._value: Tensor | None = None
        self._gradient: Tensor | None = None
        self._graph: Tensor | None = None
        self.value = x.new_full((), math.nan)
        function.evaluations += 1
        try:
            with torch.set_grad_enabled(by_autograd):
                value = _checked_value(function.fun(self._leaf))
        except failure_types() as error:
            function.note_failure(error)
            return
        if function.grad is None and not value.requires_grad:
            raise ValueError("fun must depend on x by differentiable torch operations; its value has no gradient.")
        self._value, self.value = value, value.detach()

    @property
    def gradient(self) -> Tensor:
        """Gradient, in the shape of x; NaN where it cannot be evaluated."""
        if self._gradient is None:
            self._gradient = self._evaluate_gradient()
        return self._gradient

    def product(self, v: Tensor) -> Tensor:
        """Hessian times a vector, both in the shape of x."""
        self.function.products += 1
        if self.function.hvp is not None:
            with torch.enable_grad():
                return _like_x("hvp", self.function.hvp(self.x, v), self.x)
        if self._graph is None:
            self._graph = self._differentiate(create_graph=True)
        if not self._graph.requires_grad:  # a linear function
            return torch.zeros_like(v)
        (out,) = torch.autograd.grad(
            self._graph, self._leaf, v, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return out

    def _evaluate_gradient(self) -> Tensor:
        if self._value is None:
            return torch.full_like(self.x, math.nan)
        self.function.gradients += 1
        try:
            if self.function.grad is not None:
                with torch.enable_grad():
                    return _like_x("grad", self.function.grad(self.x), self.x)
            if self.function.hvp is not None:
                return self._differentiate(create_graph=False)
            self._graph = self._differentiate(create_graph=True)
            return self._graph.detach()
        except failure_types() as error:
            self.function.note_failure(error)
            return torch.full_like(self.x, math.nan)

    def _differentiate(self, create_graph: bool) -> Tensor:
        if self._value is None or not self._value.requires_grad:
            return torch.zeros_like(self.x)
        (out,) = torch.autograd.grad(
            self._value, self._leaf, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return out


def _checked_value(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"fun must return a 0-dim torch.Tensor; got {type(value).__name__}.")
    check_floating(**{"the value of fun": value})
    if value.ndim:
        raise ValueError(f"fun must return a 0-dim tensor; got shape {tuple(value.shape)}.")
    return value


def _like_x(name: str, out: Any, x: Tensor) -> Tensor:
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} must return a torch.Tensor; got {type(out).__name__}.")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"{name} must return a tensor like x, {x.dtype} of shape {tuple(x.shape)}; got {out.dtype} of shape "
            f"{tuple(out.shape)}."
        )
    return out.detach()
