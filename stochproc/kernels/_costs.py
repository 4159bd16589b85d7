"""Ground costs of pairs of points, in the prepared form that kernels have too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochproc.kernels._base import Prepared, Tensors
from stochproc.kernels._distance import RadialProfile, augment, inverse_or_zero, radial_block, safe_sqrt
from stochproc.kernels._parameters import with_parameters

__all__ = ["COSTS", "CostLike", "as_cost"]

CostLike = str | Callable[[Tensor, Tensor], Tensor]

# A transport cost is divided by a small eps before the exponential, and its float32 error matters relative
# to the largest cost, so double precision starts only far out.
_COST_MAX_SQNORM = 1e5


_SQUARED = RadialProfile(lambda sq: sq, lambda sq: sq, lambda sq, value: torch.ones_like(value))
_ROOT = RadialProfile(safe_sqrt, Tensor.sqrt_, lambda sq, value: inverse_or_zero(value), 0.5)


class Cost:
    """A cost of pairs of points: `prepare` for the blocked backends, `formula` for KeOps."""

    has_formula = True

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        raise NotImplementedError

    def formula(self, x: Tensor, y: Tensor) -> Any:
        raise NotImplementedError


class SqEuclidean(Cost):
    """Squared Euclidean distance, not half of it."""

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        return _radial(x, y, _SQUARED, rough=False)

    def formula(self, x: Tensor, y: Tensor) -> Any:
        from stochproc.kernels._keops import pair_of

        u, w = pair_of(x, y)
        return ((u - w) ** 2).sum(-1)


class Euclidean(Cost):
    """Euclidean distance; its gradient at 0 is 0."""

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        return _radial(x, y, _ROOT, rough=True)

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
        # One column at a time: the sign of every difference at once would take d times the block.
        signs = [grad * torch.sign(x[..., :, None, c] - y[..., None, :, c]).detach() for c in range(x.shape[-1])]
        grad_x = torch.stack([s.sum(-1) for s in signs], -1).sum_to_size(x.shape)
        grad_y = -torch.stack([s.sum(-2) for s in signs], -1).sum_to_size(y.shape)
        return grad_x, grad_y


class CityBlock(Cost):
    """Sum of absolute differences; its gradient is 0 where a coordinate agrees."""

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


def _radial(x: Tensor, y: Tensor, profile: RadialProfile, *, rough: bool) -> Prepared:
    a, b, _ = augment(x, y, max_sqnorm=0.0 if rough else _COST_MAX_SQNORM)
    dtype = x.dtype

    def block(rows: Tensors, cols: Tensors, shared: Tensors) -> Tensor:
        return radial_block(rows[0], cols[0], dtype, profile, refine=rough)

    return Prepared((a,), (b,), (), block)


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
