"""Ground costs of pairs of points, in the prepared form that kernels have too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochproc.kernels._base import Prepared, Tensors
from stochproc.kernels._distance import (
    FLOAT32_MAX_SQNORM,
    RadialProfile,
    augment,
    inverse_or_zero,
    radial_block,
    safe_sqrt,
)
from stochproc.kernels._parameters import with_parameters

__all__ = ["COSTS", "CostLike", "as_cost"]

CostLike = str | Callable[[Tensor, Tensor], Tensor]

# A transport cost is divided by a small eps before the exponential, and its float32 error matters relative
# to the largest cost, so double precision starts only far out.
_COST_MAX_SQNORM = 1e5
# Coordinates whose squares keep their digits in float64, far below their size too.
_SQUARES_FIT = 1e-120, 1e150


_SQUARED = RadialProfile(lambda sq: sq, lambda sq: sq, lambda sq, value: torch.ones_like(value))
_ROOT = RadialProfile(safe_sqrt, Tensor.sqrt_, lambda sq, value: inverse_or_zero(value), 0.5)


class Cost:
    """A cost of pairs of points: `prepare` for the blocked backends, `formula` for KeOps."""

    has_formula = True

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        raise NotImplementedError

    def formula(self, x: Tensor, y: Tensor) -> Any:
        raise NotImplementedError

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """Evaluate all pairs."""
        return self.prepare(x, y)()


class SqEuclidean(Cost):
    """Squared Euclidean distance, not half of it."""

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        return _radial(x, y, _SQUARED, max_sqnorm=_COST_MAX_SQNORM)

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """Evaluate all pairs, small costs beside large ones to as many digits."""
        return _radial(x, y, _SQUARED, max_sqnorm=FLOAT32_MAX_SQNORM, refine=None)()

    def formula(self, x: Tensor, y: Tensor) -> Any:
        from stochproc.kernels._keops import pair_of

        u, w = pair_of(x, y)
        return ((u - w) ** 2).sum(-1)


class Euclidean(Cost):
    """Euclidean distance; its gradient at 0 is 0."""

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        return _radial(x, y, _ROOT, max_sqnorm=0.0, refine=True)

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """Evaluate all pairs, in a unit in which squares neither overflow nor vanish."""
        unit = _unit(x, y)
        return super().matrix(x, y) if unit == 1.0 else super().matrix(x / unit, y / unit) * unit

    def formula(self, x: Tensor, y: Tensor) -> Any:
        return SqEuclidean().formula(x, y).sqrt()


class _CityBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.cdist(x, y, p=1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        of_rows, of_columns = [], []
        # One column at a time: the sign of every difference at once would take d times the block.
        for c in range(x.shape[-1]):
            signed = grad * torch.sign(x[..., :, None, c] - y[..., None, :, c]).detach()
            of_rows.append(signed.sum(-1))
            of_columns.append(-signed.sum(-2))
        return torch.stack(of_rows, -1).sum_to_size(x.shape), torch.stack(of_columns, -1).sum_to_size(y.shape)


class CityBlock(Cost):
    """Sum of absolute differences; its gradient is 0 where a coordinate agrees."""

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """Evaluate all pairs of finite points."""
        if not bool(x.detach().isfinite().all() and y.detach().isfinite().all()):
            raise ValueError("x and y must be finite; got NaN or infinity.")
        return super().matrix(x, y)

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        return Prepared((x,), (y,), (), lambda rows, cols, shared: _CityBlock.apply(rows[0], cols[0]))

    def formula(self, x: Tensor, y: Tensor) -> Any:
        from stochproc.kernels._keops import pair_of

        u, w = pair_of(x, y)
        return (u - w).abs().sum(-1)


class UserCost(Cost):
    """A user's function of two blocks of points; of a module, the parameters are differentiated too."""

    has_formula = False

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        function = self.function
        module = function if isinstance(function, torch.nn.Module) and torch.is_grad_enabled() else None
        named = dict(module.named_parameters()) if module is not None else {}

        def block(rows: Tensors, cols: Tensors, shared: Tensors) -> Tensor:
            call = function if module is None else with_parameters(module, list(named), shared)
            value = call(rows[0], cols[0])
            shape = (rows[0].shape[-2], cols[0].shape[-2])
            if not isinstance(value, Tensor) or value.shape[-2:] != shape:
                came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"cost must return a tensor of shape (*batch, rows of x, rows of y), here (..., {shape[0]}, "
                    f"{shape[1]}); got {came}."
                )
            return value

        return Prepared((x,), (y,), tuple(named.values()), block)


def _radial(
    x: Tensor, y: Tensor, profile: RadialProfile, *, max_sqnorm: float, refine: bool | None = False
) -> Prepared:
    """Prepare a function of squared distances; ``refine=None`` refines near pairs where the product needs it."""
    try:
        a, b, far = augment(x, y, max_sqnorm=max_sqnorm)
    except OverflowError:
        raise OverflowError(
            "x and y must be less than 1e154 apart, so that squared distances fit into float64; rescale them."
        ) from None
    dtype, near = x.dtype, far if refine is None else refine

    def block(rows: Tensors, cols: Tensors, shared: Tensors) -> Tensor:
        return radial_block(rows[0], cols[0], dtype, profile, refine=near)

    return Prepared((a,), (b,), (), block)


def _unit(x: Tensor, y: Tensor) -> float:
    """Return 1, or a power of two as large as the points where the squares of float64 would leave its range."""
    if x.dtype != torch.float64 or not (x.numel() and y.numel()):
        return 1.0
    largest = max(float(t.detach().abs().amax()) for t in (x, y))
    if not 0 < largest < math.inf or _SQUARES_FIT[0] < largest < _SQUARES_FIT[1]:
        return 1.0
    return math.ldexp(1.0, min(math.frexp(largest)[1], 1022))


COSTS: dict[str, Cost] = {
    "sqeuclidean": SqEuclidean(),
    "euclidean": Euclidean(),
    "cityblock": CityBlock(),
}


def as_cost(cost: CostLike) -> Cost:
    """Return the cost named by a string, or a user's function wrapped."""
    if isinstance(cost, str):
        if cost not in COSTS:
            raise ValueError(f"unknown cost {cost!r}; valid: {', '.join(COSTS)}, or a function of two blocks.")
        return COSTS[cost]
    if callable(cost):
        return UserCost(cost)
    raise TypeError(f"cost must be a string or a function of two blocks; got {type(cost).__name__}.")
