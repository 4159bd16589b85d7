"""Gradients of solutions by the implicit function theorem: one more solve in the backward, no unrolling."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["attach_implicit_gradient"]


def attach_implicit_gradient(
    x: Tensor, residual: Tensor, solve: Callable[[Tensor], Tensor], guard: tuple[Tensor, ...] = ()
) -> Tensor:
    r"""Return ``x`` with the gradient of the solution of :math:`A x = b`.

    :math:`x = x^* + S(b - A x^*)` with x* constant: S returns zero, and its backward applies
    :math:`A^{-\top}`. The graph of the residual carries that on to whatever b and A depend on, so tensors,
    operators and closures need no rule of their own.

    Parameters
    ----------
    x : Tensor
        Solution, detached.
    residual : Tensor
        b - A x at that solution, of the same shape, on the graph of b and A.
    solve : callable
        Maps an upstream gradient g to the solution of :math:`A^\top w = g`; runs without grad mode.
    guard : tuple of Tensor
        What ``solve`` reads: changing one in place before the backward then raises.

    Returns
    -------
    Tensor
        Equal to ``x``. A second derivative raises RuntimeError.
    """
    return x + _ImplicitSolve.apply(solve, residual, *guard)


class _ImplicitSolve(torch.autograd.Function):
    """Zero, whose backward solves."""

    @staticmethod
    def forward(ctx: Any, solve: Callable[[Tensor], Tensor], residual: Tensor, *guard: Tensor) -> Tensor:
        ctx.solve = solve
        ctx.save_for_backward(residual, *guard)
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        saved = ctx.saved_tensors  # raises where one of them was changed in place
        with torch.no_grad():
            w = ctx.solve(grad)
        if torch.is_grad_enabled():
            # torch's own once_differentiable marks nothing when the upstream gradient is a constant, and the
            # second derivative would then lack terms without a word. The residual leads to b and A.
            w = _NotTwice.apply(w, grad, *saved)
        return None, w, *(None for _ in saved[1:])


class _NotTwice(torch.autograd.Function):
    """Identity on its first argument; differentiating it in any argument raises."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, *_: Tensor) -> Tensor:
        return w.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(
            "the gradient of an implicit solution cannot be differentiated again: its backward is once differentiable. "
            "Use the dense functions of torch.linalg where second derivatives are needed."
        )
