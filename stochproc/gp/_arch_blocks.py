"""A function of single points, block by block, whose backward pass evaluates each block again and keeps no graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_blocks"]

# f(points) -> tensors with one entry a point, pure in the points and the parameters.
Function = Callable[[Tensor], tuple[Tensor, ...]]


def by_blocks(function: Function, x: Tensor, parameters: Sequence[Tensor], step: int) -> tuple[Tensor, ...]:
    """Return ``function(x)``, evaluated on ``step`` points at a time; differentiable in x and the parameters."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        found: tuple[Tensor, ...] = _ByBlocks.apply(function, step, x, *parameters)
        return found
    return _joined(function, x, step)


def _joined(function: Function, x: Tensor, step: int) -> tuple[Tensor, ...]:
    return tuple(map(torch.cat, zip(*(function(block) for block in x.split(step)), strict=True)))


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, step: int, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.function, ctx.step, ctx.parameters = function, step, parameters
        # Saved for autograd's check that none is changed before the backward.
        ctx.save_for_backward(x, *parameters)
        return _joined(function, x, step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple["Tensor | None", ...]:
        x, wanted = ctx.saved_tensors[0], ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            # The gradient is to be differentiated: at once.
            return (None, None, *_gradients(ctx.function, x, ctx.parameters, wanted, grads, again=True))
        total = [torch.zeros_like(t) if w else None for t, w in zip((x, *ctx.parameters), wanted, strict=True)]
        for start in range(0, len(x), ctx.step):
            rows = slice(start, start + ctx.step)
            leaf = x[rows].detach().requires_grad_(wanted[0])
            upstream = [g[rows] for g in grads]
            parts = [total[0] if total[0] is None else total[0][rows], *total[1:]]
            found = _gradients(ctx.function, leaf, ctx.parameters, wanted, upstream, again=False)
            for part, g in zip(parts, found, strict=True):
                if part is not None and g is not None:
                    part += g
        return (None, None, *total)


def _gradients(
    function: Function,
    x: Tensor,
    parameters: Sequence[Tensor],
    wanted: Sequence[bool],
    upstream: Sequence[Tensor],
    *,
    again: bool,
) -> list[Tensor | None]:
    """Gradients in x and the parameters; None where none is wanted."""
    with torch.enable_grad():
        pairs = [(v, g) for v, g in zip(function(x), upstream, strict=True) if v.requires_grad]
    if not pairs:
        return [None] * len(wanted)
    inputs = [t for t, w in zip((x, *parameters), wanted, strict=True) if w]
    found = iter(
        torch.autograd.grad([v for v, _ in pairs], inputs, [g for _, g in pairs], create_graph=again, allow_unused=True)
    )
    return [next(found) if w else None for w in wanted]
