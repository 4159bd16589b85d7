"""Checkpointing that leaves nothing behind but the inputs, for functions that close over what they depend on.

``torch.utils.checkpoint`` without re-entry keeps a node of the graph for every operation of the forward pass. On a
heap such as glibc's before 2.38 these small blocks lie between the large ones and keep them from being used
again: a loop over states of 1 MiB held on to nearly as much memory as without checkpoints. Re-entrant
checkpointing has no such nodes but forbids ``torch.autograd.grad``. Here the graph of the forward pass is
searched for what the function closes over and dropped; one autograd function takes all of it as explicit inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute"]

Function = Callable[..., tuple[Tensor, ...]]


def recompute(function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return ``function(*inputs)``; the backward pass evaluates it again, with the same global random state.

    The function may depend on any tensors besides its inputs; gradients reach them too. Where they cannot all be
    found, or under autocast, this is ``torch.utils.checkpoint``.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    if torch.is_autocast_enabled(inputs[0].device.type):
        return checkpoint(function, *inputs, use_reentrant=False)
    random = _RandomState(inputs)
    local = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    mark = inputs[0].new_zeros((), requires_grad=True).clone().grad_fn
    with _Seen(_age(mark)) as seen:
        outputs = function(*local)
    captured = _captured(outputs, local, seen)
    if captured is None:
        with random:
            return checkpoint(function, *inputs, use_reentrant=False)
    values = [out.detach() for out in outputs]
    del outputs
    return _Recomputed.apply(function, values, random, len(inputs), *inputs, *captured)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Function, values: list[Tensor], random: "_RandomState", n_inputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.random, ctx.n_inputs = function, random, n_inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: "Tensor | None") -> tuple["Tensor | None", ...]:
        tensors = ctx.saved_tensors
        inputs, captured = tensors[: ctx.n_inputs], tensors[ctx.n_inputs :]
        again = torch.is_grad_enabled()
        if not again:
            inputs = tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)
        with torch.enable_grad(), ctx.random:
            outputs = ctx.function(*inputs)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [x for x in (*inputs, *captured) if x.requires_grad]
        # Captured tensors that are no leaves are where this stops: their own graph is left as it is.
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=again, allow_unused=True
            )
            if pairs and wanted
            else [None] * len(wanted)
        )
        return (None, None, None, None, *(next(found) if x.requires_grad else None for x in (*inputs, *captured)))


class _RandomState:
    """The global random state as it was, for the time of a ``with`` block; dropout then repeats itself."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.devices = sorted({x.device.index for x in tensors if x.is_cuda})
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(i) for i in self.devices]

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng(self.devices)
        self.fork.__enter__()
        torch.set_rng_state(self.cpu)
        for i, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, i)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


class _Seen(TorchFunctionMode):
    """Keeps the tensors of an older graph that are used inside: an edge of the graph alone gives no tensor."""

    def __init__(self, mark: int) -> None:
        super().__init__()
        self.mark = mark
        self.older: dict[tuple[Any, int], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for arg in (*args, *kwargs.values()):
            for x in arg if isinstance(arg, (tuple, list)) else (arg,):
                if isinstance(x, Tensor) and x.grad_fn is not None and _age(x.grad_fn) < self.mark:
                    self.older[x.grad_fn, x.output_nr] = x
        return func(*args, **kwargs)


def _age(node: Any) -> int:
    """Place of a node in the order in which this thread made them."""
    return node._sequence_nr()


def _captured(outputs: tuple[Tensor, ...], local: list[Tensor], seen: _Seen) -> "list[Tensor] | None":
    """What the outputs depend on besides the inputs; None if part of it was never seen."""
    own = {id(x) for x in local}
    found: dict[int, Tensor] = {}
    visited = set()
    todo = [(out.grad_fn, out.output_nr) for out in outputs if out.grad_fn is not None]
    # An output may be a tensor of the older graph itself, which no function has been given.
    seen.older.update({(out.grad_fn, out.output_nr): out for out in outputs if out.grad_fn is not None})
    leaves = [out for out in outputs if out.grad_fn is None and out.requires_grad]
    while todo:
        node, i = todo.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        elif _age(node) < seen.mark:
            if (node, i) not in seen.older:
                return None
            x = seen.older[node, i]
            found[id(x)] = x
        elif node not in visited:
            visited.add(node)
            todo += [edge for edge in node.next_functions if edge[0] is not None]
    found.update({id(x): x for x in leaves if id(x) not in own})
    return list(found.values())
