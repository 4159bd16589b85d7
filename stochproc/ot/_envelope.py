"""Values whose gradient is known from a dual solution, by the envelope theorem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["with_gradient"]


def with_gradient(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Return a number (0-d) that depends on each tensor with the gradient given beside it.

    Second derivatives raise: they are not zero, and nothing here knows them.
    """
    sources, gradients = zip(*pairs, strict=True)
    if not (torch.is_grad_enabled() and any(source.requires_grad for source in sources)):
        return value
    return _Known.apply(value, len(pairs), *sources, *gradients)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.count = count
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        sources, gradients = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        out = [(grad * known).to(source.dtype) for known, source in zip(gradients, sources, strict=True)]
        if torch.is_grad_enabled():
            out = [_Constant.apply(t, *sources) for t in out]
        return None, None, *out, *([None] * ctx.count)


class _Constant(torch.autograd.Function):
    """A number that stands for a function of the sources whose derivative is not known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *sources: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        raise RuntimeError("the gradient of this transport cost is known as a number: second derivatives are not.")
