"""Checks of the arguments that the reductions over pairs share."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_floating, check_same_kind
from stochproc.kernels._base import check_points
from stochproc.kernels._costs import CostLike, as_cost

__all__ = ["check_columns", "check_inverse", "check_potential", "check_soft", "check_vectors", "check_wide"]


def check_vectors(name: str, v: Tensor, y: Tensor) -> None:
    """Raise unless ``v`` holds one row of numbers a row of y."""
    check_floating(**{name: v})
    if v.ndim < 2 or v.shape[-2] != y.shape[-2]:
        raise ValueError(f"{name} must have shape (*batch, m, p) with m = {y.shape[-2]} rows; got {tuple(v.shape)}.")


def check_columns(x: Tensor, y: Tensor, g: Tensor) -> None:
    """Raise unless ``g`` is a potential on the rows of y, of the same dtype and device."""
    check_same_kind(x=x, y=y, g=g)
    check_potential("g", g, y, "y")


def check_potential(name: str, value: Tensor, points: Tensor, of: str) -> None:
    """Raise unless ``value`` has one entry a row of ``points``, each finite or -inf."""
    bad = value.isnan() | (value == math.inf)
    if bool(bad.any()):
        raise ValueError(f"{name} must be finite or -inf; got {int(bad.sum())} entries that are NaN or +inf.")
    if value.shape[-1:] != points.shape[-2:-1]:
        raise ValueError(
            f"{name} must have one entry a row of {of}, {points.shape[-2]}; got shape {tuple(value.shape)}."
        )


def check_wide(x: Tensor, **others: Tensor | None) -> None:
    """Raise TypeError unless the others have the kind of the points; beside float32 points they may be float64."""
    check_floating(**others)
    wide = {k: t for k, t in others.items() if t is not None and t.dtype == torch.float64}
    if x.dtype == torch.float32 and wide:
        check_same_kind(x=x, **{k: t for k, t in others.items() if k not in wide})
        check_same_kind(x=x.new_empty(0, dtype=torch.float64), **wide)
    else:
        check_same_kind(x=x, **others)


def check_soft(cost: CostLike, x: Tensor, y: Tensor, g: Tensor, eps: Any) -> Any:
    """Check the arguments of the soft reductions and return 1 / eps."""
    check_points(x, y)
    check_columns(x, y, g)
    as_cost(cost)
    if isinstance(eps, Tensor):
        check_same_kind(x=x, eps=eps)
    return check_inverse(eps)


def check_inverse(eps: Any) -> Any:
    """Return 1 / eps, a tensor for a tensor, after checking that eps is positive."""
    if not isinstance(eps, Tensor) and (isinstance(eps, bool) or not isinstance(eps, numbers.Real)):
        raise TypeError(f"eps must be a number or a 0-dim tensor; got {type(eps).__name__}.")
    if isinstance(eps, Tensor) and eps.ndim != 0:
        raise ValueError(f"eps must be a number or a 0-dim tensor; got shape {tuple(eps.shape)}.")
    number = eps.detach().item() if isinstance(eps, Tensor) else float(eps)
    if not 0 < number < math.inf:
        raise ValueError(f"eps must be positive and finite; got {number}.")
    return 1 / eps if isinstance(eps, Tensor) else 1 / number
