"""Hyperparameters: positive ones stored as logarithms, and modules evaluated at other values than their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from stochproc._checks import check_positive

__all__ = ["as_hyperparameter", "call_with_parameters", "one_column", "positive", "with_parameters"]

M = TypeVar("M", bound=torch.nn.Module)


def with_parameters(module: M, names: Sequence[str], values: Sequence[Tensor]) -> M:
    """Return a shallow copy of ``module`` whose named parameters are ``values``, wherever they are used.

    The module itself is not touched, unlike in ``torch.func.functional_call``, which swaps parameters in place:
    two threads that share a kernel would overwrite each other's, for good.
    """
    if not names:
        return module
    own = dict(module.named_parameters())
    replaced = {id(own[name]): value for name, value in zip(names, values, strict=True)}
    return _copy_with(module, replaced, {})


def _copy_with(module: M, replaced: dict[int, Tensor], done: dict[int, torch.nn.Module]) -> M:
    if id(module) not in done:
        new = type(module).__new__(type(module))
        done[id(module)] = new
        new.__dict__.update(module.__dict__)
        new.__dict__["_parameters"] = {k: replaced.get(id(p), p) for k, p in module._parameters.items()}
        new.__dict__["_modules"] = {
            k: None if child is None else _copy_with(child, replaced, done) for k, child in module._modules.items()
        }
    return done[id(module)]  # type: ignore[return-value]


def call_with_parameters(
    module: torch.nn.Module,
    names: Sequence[str],
    values: Sequence[Tensor],
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return ``function(module, *args, **kwargs)`` with the named parameters replaced by ``values``."""
    return function(with_parameters(module, names, values), *args, **kwargs)


def positive(name: str, what: str) -> property:
    """Return a property for a positive hyperparameter that is stored as the float64 logarithm ``log_<name>``."""
    log_name = f"log_{name}"

    def get(self: Any) -> Tensor:
        return getattr(self, log_name).exp()

    def set_(self: Any, value: Any) -> None:
        parameter = getattr(self, log_name)
        new = as_hyperparameter(name, value)
        check_positive(name, new)
        if new.ndim and torch.broadcast_shapes(new.shape, parameter.shape) != parameter.shape:
            raise ValueError(
                f"{name} must be one number or have shape {tuple(parameter.shape)}, as at construction; got shape "
                f"{tuple(new.shape)}."
            )
        with torch.no_grad():
            parameter.copy_(new.log().to(parameter.device).expand_as(parameter))

    return property(get, set_, doc=what)


def as_hyperparameter(name: str, value: Any) -> Tensor:
    sequence = isinstance(value, Sequence) and not isinstance(value, str)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number or sequence or hasattr(value, "__array__")):
        raise TypeError(f"{name} must be a number, a sequence or a tensor; got {type(value).__name__}.")
    return torch.as_tensor(value, dtype=torch.float64).detach()


def one_column(kernel: torch.nn.Module, name: str) -> Tensor:
    """Return the positive hyperparameter, shape (*batch, 1), after checking that it is not one a column."""
    value = getattr(kernel, f"log_{name}").exp()
    if value.shape[-1] != 1:
        raise NotImplementedError(
            f"{type(kernel).__name__} has {value.shape[-1]} entries of {name}, one a column; a state space needs one "
            "input column, time."
        )
    return value
