"""Checks of arguments whose messages name the argument, what is allowed and what came."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_choice",
    "check_finite",
    "check_floating",
    "check_integer",
    "check_positive",
    "check_same_kind",
]


def check_positive(name: str, value: "Tensor | float | int", *, zero: bool = False) -> None:
    """Raise ValueError unless every entry of ``value`` is finite and positive (or zero, if ``zero``).

    The message names the first entry that is not; TypeError if ``value`` is no number at all.
    """
    if isinstance(value, Tensor):
        good = value.isfinite() & (value >= 0 if zero else value > 0)
        if bool(good.all()):
            return
        entry = value[~good].flatten()[0].item()
        shown = f"{entry}" if value.numel() == 1 else f"a tensor with entry {entry}"
    elif isinstance(value, numbers.Real):
        if math.isfinite(value) and (value >= 0 if zero else value > 0):
            return
        shown = str(value)
    else:
        raise TypeError(f"{name} must be a number or a tensor; got {type(value).__name__}.")
    raise ValueError(f"{name} must be {'non-negative' if zero else 'positive'} and finite; got {shown}.")


def check_integer(name: str, value: Any, low: int, high: "int | None" = None) -> None:
    """Raise TypeError unless ``value`` is an integer, ValueError unless it lies in [low, high]."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer; got {value!r} of type {type(value).__name__}.")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {allowed}; got {value}.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def check_floating(**tensors: "Tensor | None") -> None:
    """Raise TypeError unless every tensor is float32 or float64."""
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(t).__name__}.")
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64; got {t.dtype}.")


def check_same_kind(**tensors: "Tensor | None") -> None:
    """Raise TypeError unless all tensors are float32 or float64 and share one dtype and device."""
    check_floating(**tensors)
    present = {name: t for name, t in tensors.items() if t is not None}
    if len({t.dtype for t in present.values()}) > 1:
        raise TypeError("mixed dtypes: " + ", ".join(f"{k} is {t.dtype}" for k, t in present.items()) + ".")
    if len({t.device for t in present.values()}) > 1:
        raise TypeError("mixed devices: " + ", ".join(f"{k} is on {t.device}" for k, t in present.items()) + ".")


def check_finite(name: str, value: Tensor) -> None:
    """Raise ValueError if ``value`` holds NaN or infinity, saying how many and where the first is."""
    bad = ~value.isfinite()
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} must be finite; got {int(bad.sum())} NaN or infinite entries, the first at index {where}."
        )
