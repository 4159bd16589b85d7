"""What the public functions accept: NumPy or torch, never mixed; every refusal names the argument."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stochproc._base import Given
from stochproc._checks import check_integer, check_positive

__all__ = [
    "DenseInputs",
    "PointInputs",
    "check_budget",
    "check_finite_pairs",
    "check_masses",
    "check_weights",
    "read",
    "read_dense",
    "read_points",
    "read_reg",
]

# Relative difference of total masses that is put down to rounding.
MASS_RTOL = {torch.float64: 1e-6, torch.float32: 1e-4}
FLOAT_TYPES = (torch.float32, torch.float64)


class DenseInputs(NamedTuple):
    """A transport problem with a stored cost, in one dtype, on one device, in the caller's graph."""

    given: Given
    M: Tensor
    a: Tensor
    b: Tensor
    reg: Tensor


class PointInputs(NamedTuple):
    """A transport problem between point clouds."""

    given: Given
    X: Tensor
    Y: Tensor
    a: Tensor
    b: Tensor
    reg: Tensor


def read(**arrays: Any) -> tuple[Given, dict[str, Tensor | None]]:
    """Return arrays as tensors of one floating dtype on one device, and what kind they were; None stays None.

    Raises TypeError where NumPy and torch, or devices, are mixed or a dtype is neither integer, float32 nor
    float64, and ValueError where an argument is no array of numbers.
    """
    present = {name: value for name, value in arrays.items() if value is not None}
    torched = [name for name, value in present.items() if isinstance(value, Tensor)]
    others = [name for name in present if name not in torched]
    if torched and others:
        raise TypeError(
            f"arguments must be all NumPy or all torch; got torch for {', '.join(torched)} and "
            f"{type(present[others[0]]).__name__} for {others[0]}."
        )
    if torched:
        given, found = _tensors(present)
    else:
        given, found = Given(False, None, None), _from_numpy(present)
    return given, {name: found.get(name) for name in arrays}


def _tensors(present: dict[str, Tensor]) -> tuple[Given, dict[str, Tensor]]:
    devices = {value.device for value in present.values()}
    if len(devices) > 1:
        on = ", ".join(f"{name} is on {value.device}" for name, value in present.items())
        raise TypeError(f"arguments must be on one device; {on}.")
    for name, value in present.items():
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}.")
        if value.is_complex() or (value.is_floating_point() and value.dtype not in FLOAT_TYPES):
            raise TypeError(f"{name} must hold integers, float32 or float64; got {value.dtype}.")
    floats = [value.dtype for value in present.values() if value.is_floating_point()]
    # Integers say nothing about precision where another argument does.
    dtype = torch.get_default_dtype() if not floats else floats[0]
    if dtype not in FLOAT_TYPES:
        dtype = torch.float32
    for other in floats[1:]:
        dtype = torch.promote_types(dtype, other)
    return Given(True, dtype, next(iter(devices))), {name: value.to(dtype) for name, value in present.items()}


def _from_numpy(present: dict[str, Any]) -> dict[str, Tensor]:
    arrays = {}
    for name, value in present.items():
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must be an array of numbers; {error}") from None
        if array.dtype.kind == "O":
            try:
                array = array.astype(np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} must hold real numbers; {error}.") from None
        if array.dtype.kind not in "buif" or (array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8)):
            raise TypeError(f"{name} must hold integers, float32 or float64; got {array.dtype}.")
        arrays[name] = array
    floats = [array.dtype for array in arrays.values() if array.dtype.kind == "f"]
    single = bool(floats) and all(dtype.itemsize == 4 for dtype in floats)
    dtype = np.float32 if single else np.float64
    # torch warns about arrays that it may not write to, and takes no negative strides; nothing is written here.
    return {name: _as_tensor(array, dtype) for name, array in arrays.items()}


def _as_tensor(array: np.ndarray, dtype: Any) -> Tensor:
    array = np.asarray(array, dtype=dtype)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = array.astype(dtype, copy=True)
    return torch.from_numpy(np.require(array, dtype=np.dtype(dtype).newbyteorder("=")))


def read_reg(reg: Any, like: Tensor, batch: int | None = None) -> Tensor:
    """Return reg in float64 on the device of ``like``: one positive number, or one an item of a batch."""
    if reg is None or (isinstance(reg, numbers.Real) and reg == 0):
        raise ValueError(f"reg must be positive; got {reg}. For transport without regularisation use emd or emd2.")
    if isinstance(reg, (Tensor, np.ndarray)) or (batch is not None and not isinstance(reg, numbers.Real)):
        value = reg if isinstance(reg, Tensor) else torch.as_tensor(np.array(reg, dtype=np.float64))
        if isinstance(reg, Tensor) and like.device != reg.device and reg.ndim > 0:
            raise TypeError(f"reg must be on the device of the costs, {like.device}; got {reg.device}.")
        allowed = [()] if batch is None else [(), (batch,)]
        if tuple(value.shape) not in allowed:
            shapes = " or ".join(map(str, allowed))
            raise ValueError(f"reg must be a number, of shape {shapes}; got shape {tuple(value.shape)}.")
    elif isinstance(reg, numbers.Real):
        value = torch.tensor(float(reg), dtype=torch.float64)
    else:
        raise TypeError(f"reg must be a number; got {type(reg).__name__}.")
    if value.is_complex():
        raise TypeError(f"reg must be real; got {value.dtype}.")
    check_positive("reg", value)
    return value.to(dtype=torch.float64, device=like.device)


def check_weights(name: str, weights: Tensor) -> None:
    """Raise ValueError unless the weights are finite, non-negative and of positive mass, in each item of a batch."""
    if weights.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one entry; got none.")
    bad = ~(weights.isfinite() & (weights >= 0))
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        entry = weights[where].item()
        raise ValueError(f"{name} must be finite and non-negative; got {entry} at index {_index(where)}.")
    if not bool((weights.sum(-1) > 0).all()):
        raise ValueError(f"{name} must have positive total mass; got 0.")


def check_masses(a: Tensor, b: Tensor) -> Tensor:
    """Return b with the mass of a, or raise ValueError where they differ by more than rounding."""
    mass_a, mass_b = a.detach().double().sum(-1), b.detach().double().sum(-1)
    off = (mass_a - mass_b).abs() > MASS_RTOL[a.dtype] * mass_a
    if bool(off.any()):
        first = tuple(off.nonzero()[0].tolist()) if off.ndim else ()
        raise ValueError(
            f"a and b must have the same total mass; got {mass_a[first].item():.10g} and {mass_b[first].item():.10g}. "
            "Rescale one of them, or let mass be created and destroyed with unbalanced=."
        )
    ratio = (mass_a / mass_b).unsqueeze(-1)
    # The gradient in b is one along changes that keep the mass, so the correction is a constant.
    return b if bool((ratio == 1).all()) else (b.double() * ratio).to(b.dtype)


def check_cost(name: str, M: Tensor) -> None:
    """Raise ValueError unless every cost is a number or +inf."""
    # One reduction each: NaN spreads through both, and an array as large as M is never made.
    low = float(M.detach().amin()) if M.numel() else 0.0
    if math.isnan(low) or low == -math.inf:
        bad = M.isnan() | (M == -math.inf)
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name} must hold numbers or +inf; got {M[where].item()} at index {_index(where)}.")


def check_finite_pairs(M: Tensor, a: Tensor, b: Tensor) -> None:
    """Raise ValueError where a row or column has weight and no finite cost to a partner with weight."""
    if bool(M.detach().amax() < math.inf):
        return
    open_pairs = M.detach() < math.inf
    for name, axis, own, other in (("row", -1, a, b.unsqueeze(-2)), ("column", -2, b, a.unsqueeze(-1))):
        stuck = (own > 0) & ~(open_pairs & (other > 0)).any(axis)
        if bool(stuck.any()):
            where = tuple(stuck.nonzero()[0].tolist())
            raise ValueError(
                f"M must leave every {name} with positive weight a finite cost; {name} {_index(where)} has weight "
                "and no finite cost to any partner with weight."
            )


def _index(where: tuple[int, ...]) -> Any:
    return where[0] if len(where) == 1 else where


def read_dense(
    M: Any, a: Any, b: Any, reg: Any, *, balanced: bool = True, batch: bool = False, names: str = "M a b"
) -> DenseInputs:
    """Check and convert the arguments of a problem with a stored cost."""
    name_M, name_a, name_b = names.split()
    given, found = read(**{name_M: M, name_a: a, name_b: b})
    cost, a, b = found[name_M], found[name_a], found[name_b]
    if cost is None:
        raise TypeError(f"{name_M} must be an array of costs; got None.")
    if cost.ndim != (3 if batch else 2):
        shape = "(B, n, m)" if batch else "(n, m)"
        raise ValueError(f"{name_M} must have shape {shape}; got {tuple(cost.shape)}.")
    a, b = _weights_of(cost, a, b, (name_a, name_b))
    check_cost(name_M, cost)
    value = read_reg(reg, cost, cost.shape[0] if batch else None)
    if balanced:
        b = check_masses(a, b)
        check_finite_pairs(cost, a, b)
    return DenseInputs(given, cost, a, b, value)


def _weights_of(cost: Tensor, a: Tensor | None, b: Tensor | None, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    n, m = cost.shape[-2:]
    out = []
    for name, weights, size in ((names[0], a, n), (names[1], b, m)):
        if weights is None:
            if size == 0:
                raise ValueError(f"{name} must have at least one entry; got none.")
            weights = cost.new_full((size,), 1 / size)
        allowed = [(size,)] if cost.ndim == 2 else [(size,), (cost.shape[0], size)]
        if tuple(weights.shape) not in allowed:
            shapes = " or ".join(map(str, allowed))
            raise ValueError(
                f"{name} must have shape {shapes} to fit M of shape {tuple(cost.shape)}; got {tuple(weights.shape)}."
            )
        check_weights(name, weights)
        out.append(weights.expand(*cost.shape[:-2], size))
    return out[0], out[1]


def read_points(X_a: Any, X_b: Any, a: Any, b: Any, reg: Any, *, balanced: bool = True) -> PointInputs:
    """Check and convert the arguments of a problem between point clouds."""
    given, found = read(X_a=X_a, X_b=X_b, a=a, b=b)
    X, Y = (_points(name, found[name]) for name in ("X_a", "X_b"))
    if X.shape[1] != Y.shape[1]:
        raise ValueError(f"X_a and X_b must have the same number of columns; got {X.shape[1]} and {Y.shape[1]}.")
    weights = []
    for name, points in (("a", X), ("b", Y)):
        w = found[name]
        if w is None:
            w = points.new_full((points.shape[0],), 1 / points.shape[0])
        if tuple(w.shape) != (points.shape[0],):
            raise ValueError(f"{name} must have shape ({points.shape[0]},), one weight a point; got {tuple(w.shape)}.")
        check_weights(name, w)
        weights.append(w)
    value = read_reg(reg, X)
    if balanced:
        weights[1] = check_masses(*weights)
    return PointInputs(given, X, Y, weights[0], weights[1], value)


def _points(name: str, points: Tensor | None) -> Tensor:
    if points is None:
        raise TypeError(f"{name} must be an array of points; got None.")
    if points.ndim != 2:
        hint = f" Write {name}.reshape(-1, 1) for points on a line." if points.ndim == 1 else ""
        raise ValueError(f"{name} must have shape (n, d); got {tuple(points.shape)}.{hint}")
    if 0 in points.shape:
        raise ValueError(f"{name} must have at least one point and one column; got shape {tuple(points.shape)}.")
    if not bool(points.detach().isfinite().all()):
        where = tuple((~points.isfinite()).nonzero()[0].tolist())
        raise ValueError(f"{name} must be finite; got {points[where].item()} at index {where}.")
    return points


def check_budget(tol: Any, max_iter: Any, dtype: torch.dtype, *, lazy: bool = False) -> tuple[float, int]:
    """Return tolerance and number of passes with their defaults filled in."""
    if tol is None:
        tol = 1e-6 if lazy else (1e-9 if dtype == torch.float64 else 1e-5)
    if not isinstance(tol, numbers.Real):
        raise TypeError(f"tol must be a number or None; got {type(tol).__name__}.")
    check_positive("tol", float(tol))
    if max_iter is None:
        max_iter = 2000
    check_integer("max_iter", max_iter, 1)
    return float(tol), int(max_iter)
