"""What ``solve_batch`` accepts: stacks, one cost for many weights, and lists of problems of different sizes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from stochproc._base import Given
from stochproc.ot._inputs import DenseInputs, check_cost, check_masses, check_weights, read, read_reg

__all__ = ["Group", "RaggedInputs", "read_ragged", "read_ragged_start", "read_stack", "read_stack_start"]


class Group(NamedTuple):
    """Problems of a list that are padded to one size."""

    items: Tensor
    """Their places in the list (k,)."""
    inputs: DenseInputs


class RaggedInputs(NamedTuple):
    """A list of problems of different sizes, in groups of similar size."""

    given: Given
    sizes: list[tuple[int, int]]
    groups: list[Group]
    dtype: torch.dtype
    reg: Tensor


def read_stack(M: Any, a: Any, b: Any, reg: Any) -> DenseInputs:
    """Check and convert a batch of problems of one size; M stays (n, m) where all items share it."""
    given, found = read(M=M, a=a, b=b)
    cost = found["M"]
    if cost is None:
        raise TypeError("M must be an array of costs; got None.")
    if cost.ndim not in (2, 3):
        raise ValueError(f"M must have shape (B, n, m), or (n, m) with weights (B, n); got {tuple(cost.shape)}.")
    size = _batch_size(cost, found["a"], found["b"], reg)
    weights = []
    for name, k in (("a", cost.shape[-2]), ("b", cost.shape[-1])):
        w = found[name]
        if k == 0:
            raise ValueError(f"{name} must have at least one entry; got none.")
        if w is None:
            w = cost.new_full((k,), 1 / k)
        if tuple(w.shape) not in ((k,), (size, k)):
            raise ValueError(
                f"{name} must have shape ({k},) or ({size}, {k}) to fit M of shape {tuple(cost.shape)}; "
                f"got {tuple(w.shape)}."
            )
        check_weights(name, w)
        weights.append(w.expand(size, k))
    check_cost("M", cost)
    value = read_reg(reg, cost, size)
    weights[1] = check_masses(*weights)
    _check_finite_pairs(cost, *weights)
    return DenseInputs(given, cost, weights[0], weights[1], value)


def _batch_size(cost: Tensor, a: Tensor | None, b: Tensor | None, reg: Any) -> int:
    if cost.ndim == 3:
        return cost.shape[0]
    sizes = [w.shape[0] for w in (a, b) if w is not None and w.ndim == 2]
    if not sizes and not isinstance(reg, (int, float)) and np.ndim(reg) == 1:
        sizes = [len(reg)]
    if not sizes:
        raise ValueError(
            f"M of shape {tuple(cost.shape)} must come with weights (B, n) or (B, m) or a reg of shape (B,); use solve "
            "for a single problem."
        )
    return sizes[0]


def _check_finite_pairs(M: Tensor, a: Tensor, b: Tensor) -> None:
    """Raise ValueError where a row or column has weight and no finite cost to a partner with weight."""
    if M.numel() == 0 or bool(M.detach().amax() < math.inf):
        return
    # In float32 a product counts partners without an array of the size of all items.
    open_pairs = (M.detach() < math.inf).float()
    for name, own, other, pairs in (("row", a, b, open_pairs), ("column", b, a, open_pairs.mT)):
        partners = ((other > 0).float().unsqueeze(-2) @ pairs.mT).squeeze(-2)
        stuck = (own > 0) & (partners == 0)
        if bool(stuck.any()):
            item, where = stuck.nonzero()[0].tolist()
            raise ValueError(
                f"M must leave every {name} with positive weight a finite cost; {name} {where} of item {item} has "
                "weight and no finite cost to any partner with weight."
            )


def read_ragged(M: Any, a: Any, b: Any, reg: Any) -> RaggedInputs:
    """Check and convert a list of problems, and pad them with costs of ``+inf`` and weights of 0."""
    B = len(M)
    if B == 0:
        raise ValueError("M must hold at least one matrix of costs; got an empty list.")
    arrays = {}
    for name, values in (("M", M), ("a", a), ("b", b)):
        if values is None:
            values = [None] * B
        if not isinstance(values, (list, tuple)) or len(values) != B:
            came = f"{len(values)} entries" if isinstance(values, (list, tuple)) else type(values).__name__
            raise ValueError(f"{name} must be a list of {B} arrays, one for each matrix in M; got {came}.")
        arrays.update({f"{name}[{i}]": value for i, value in enumerate(values)})
    # One dtype, device and kind for the whole list.
    given, found = read(**arrays)
    problems = [_read_item(i, *(found[f"{name}[{i}]"] for name in "Mab")) for i in range(B)]
    sizes = [(cost.shape[0], cost.shape[1]) for cost, _, _ in problems]
    eps = read_reg(reg, problems[0][0], B)
    groups = []
    for items in _similar(sizes):
        n, m = (max(sizes[i][j] for i in items) for j in range(2))
        costs, left, right = zip(*(_padded(*problems[i], n, m) for i in items), strict=True)
        where = torch.tensor(items)
        stack = DenseInputs(
            given, torch.stack(costs), torch.stack(left), torch.stack(right), eps if eps.ndim == 0 else eps[where]
        )
        stack = stack._replace(b=check_masses(stack.a, stack.b))
        _check_finite_pairs(*stack[1:4])
        groups.append(Group(where, stack))
    return RaggedInputs(given, sizes, groups, problems[0][0].dtype, eps)


def _read_item(i: int, cost: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Check one problem of a list."""
    if cost is None or cost.ndim != 2 or 0 in cost.shape:
        came = None if cost is None else tuple(cost.shape)
        raise ValueError(f"M[{i}] must have shape (n, m) with at least one entry; got {came}.")
    out = []
    for name, w, k in (("a", a, cost.shape[0]), ("b", b, cost.shape[1])):
        weights = cost.new_full((k,), 1 / k) if w is None else w
        if tuple(weights.shape) != (k,):
            raise ValueError(f"{name}[{i}] must have shape ({k},) to fit M[{i}]; got {tuple(weights.shape)}.")
        check_weights(f"{name}[{i}]", weights)
        out.append(weights)
    check_cost(f"M[{i}]", cost)
    return cost, out[0], out[1]


def _padded(cost: Tensor, a: Tensor, b: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    below, right = n - cost.shape[0], m - cost.shape[1]
    return pad(cost, (0, right, 0, below), value=math.inf), pad(a, (0, below)), pad(b, (0, right))


def _similar(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Group problems so that padding at most doubles a side."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (n, m) in enumerate(sizes):
        groups.setdefault(((n - 1).bit_length(), (m - 1).bit_length()), []).append(i)
    return list(groups.values())


def read_stack_start(potentials: Any, inputs: DenseInputs) -> tuple[Tensor, Tensor] | None:
    """Check potentials (B, n) and (B, m) to start from."""
    if potentials is None:
        return None
    _, found = read(f=_pair(potentials)[0], g=potentials[1])
    f, g = (_fitting(name, found[name], w.shape) for name, w in (("f", inputs.a), ("g", inputs.b)))
    return f.to(inputs.M.device), g.to(inputs.M.device)


def read_ragged_start(potentials: Any, inputs: RaggedInputs) -> list[tuple[Tensor, Tensor]] | None:
    """Check lists of potentials to start from, and pad them; one pair a group."""
    if potentials is None:
        return None
    B = len(inputs.sizes)
    lists = _pair(potentials)
    if any(not isinstance(part, (list, tuple)) or len(part) != B for part in lists):
        raise ValueError(f"potentials_init must hold two lists of {B} arrays for a list of {B} problems.")
    read_in = [read(**{f"x{i}": x for i, x in enumerate(part)})[1] for part in lists]
    out = []
    for group in inputs.groups:
        pair = []
        for j, (name, like) in enumerate((("f", group.inputs.a), ("g", group.inputs.b))):
            parts = [_fitting(f"{name}[{i}]", read_in[j][f"x{i}"], (inputs.sizes[i][j],)) for i in group.items.tolist()]
            pair.append(torch.stack([pad(x, (0, like.shape[1] - len(x))) for x in parts]).to(like.device))
        out.append((pair[0], pair[1]))
    return out


def _pair(potentials: Any) -> Any:
    if not isinstance(potentials, (tuple, list)) or len(potentials) != 2:
        raise TypeError(f"potentials_init must be a pair (f, g); got {type(potentials).__name__}.")
    return potentials


def _fitting(name: str, value: Tensor | None, shape: Any) -> Tensor:
    if value is None or value.shape != shape:
        came = None if value is None else tuple(value.shape)
        raise ValueError(f"potentials_init must hold {name} of shape {tuple(shape)}; got {came}.")
    if not bool(value.isfinite().all()):
        raise ValueError(f"potentials_init must be finite; got NaN or infinity in {name}.")
    return value.detach()
