"""Arguments of the smoother: their checks, and data and queries merged into one ascending sequence."""

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc._checks import check_finite, check_same_kind

__all__ = ["Points", "check_arguments", "merge", "transitions"]

# Steps whose transitions are asked for at once: bounds the memory of the kernel.
TRANSITIONS_AT_ONCE = 1 << 16
# Of so many steps the distinct ones are counted; if they are few, transitions are computed once for each of all.
PROBED = 512


class Points(NamedTuple):
    """Data and query in ascending order of time."""

    times: Tensor
    """(*batch, n)"""
    Lam: Tensor
    """(*batch, n, r, r)"""
    eta: Tensor
    """(*batch, n, r)"""
    offset: "Tensor | None"
    """(*batch, n, r)"""
    positions: Tensor
    """(*batch, m): where the query is, or all points if there was none."""


def check_arguments(
    ss: Any,
    times: Tensor,
    Lam: Tensor,
    eta: Tensor,
    query: "Tensor | None",
    mean: "Tensor | float | int",
    offset: "Tensor | None",
) -> torch.Size:
    """Raise TypeError or ValueError for arguments that do not fit; return the batch shape of the result."""
    for name in ("transition", "prior", "H", "batch_shape"):
        if not hasattr(ss, name):
            raise TypeError(f"ss must be a StateSpace; got {type(ss).__name__}.")
    own_mean = mean if isinstance(mean, Tensor) else None
    check_same_kind(times=times, Lam=Lam, eta=eta, query=query, offset=offset, mean=own_mean)
    if ss.H.device != times.device:
        raise TypeError(f"mixed devices: ss is on {ss.H.device}, times is on {times.device}.")
    if ss.H.requires_grad:
        raise ValueError("ss.H must be constant; got one that requires a gradient, which would be lost.")
    if not isinstance(mean, Tensor):
        if not isinstance(mean, numbers.Real):
            raise TypeError(f"mean must be a number or a tensor; got {type(mean).__name__}.")
        if not math.isfinite(mean):
            raise ValueError(f"mean must be finite; got {mean}.")
    r = ss.H.shape[-2]
    if times.ndim == 0 or times.shape[-1] == 0:
        raise ValueError(f"times must have shape (*batch, n) with n at least 1; got shape {tuple(times.shape)}.")
    if query is not None and query.ndim == 0:
        raise ValueError("query must have shape (*batch, m); got a scalar.")
    n = times.shape[-1]
    for name, value, tail in (("Lam", Lam, (n, r, r)), ("eta", eta, (n, r)), ("offset", offset, (n, r))):
        if value is not None and value.shape[-len(tail) :] != tail:
            wanted = ", ".join(map(str, tail))
            raise ValueError(
                f"{name} must have shape (*batch, {wanted}) for {n} times and {r} outputs; got {tuple(value.shape)}."
            )
    if own_mean is not None and own_mean.ndim and own_mean.shape[-1] != r:
        raise ValueError(f"mean must be a number or have shape (*batch, {r}); got shape {tuple(own_mean.shape)}.")
    batches = {"ss": tuple(ss.batch_shape), "times": times.shape[:-1], "Lam": Lam.shape[:-3], "eta": eta.shape[:-2]}
    for name, value, tail_length in (("query", query, 1), ("offset", offset, 2), ("mean", own_mean, 1)):
        if value is not None:
            batches[name] = value.shape[: max(0, value.ndim - tail_length)]
    try:
        batch = torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        shown = ", ".join(f"{name} {tuple(shape)}" for name, shape in batches.items())
        raise ValueError(f"batch shapes must broadcast; got {shown}.") from None
    if 0 in batch:
        raise ValueError(f"the batch must not be empty; got shape {tuple(batch)}.")
    check_finite("times", times.detach())
    if query is not None:
        check_finite("query", query.detach())
    back = times.detach().diff(dim=-1) < 0
    if bool(back.any()):
        where = tuple(back.nonzero()[0].tolist())
        raise ValueError(
            f"times must not decrease along the last axis; got a smaller one after index {where} "
            "(sort them, and the messages with them)."
        )
    return batch


def merge(times: Tensor, query: "Tensor | None", Lam: Tensor, eta: Tensor, offset: "Tensor | None") -> Points:
    """Sort the query into the data as points without a message, after the data of the same time."""
    n = times.shape[-1]
    if query is None:
        return Points(times, Lam, eta, offset, torch.arange(n, device=times.device).expand(times.shape))
    m = query.shape[-1]
    batch = torch.broadcast_shapes(times.shape[:-1], query.shape[:-1])
    both = torch.cat([times.expand(*batch, n), query.expand(*batch, m)], -1)
    order = both.detach().argsort(dim=-1, stable=True)

    def place(x: Tensor, own: int) -> Tensor:
        outer, inner = x.shape[: x.ndim - own], x.shape[x.ndim - own + 1 :]
        padded = torch.cat([x, x.new_zeros(*outer, m, *inner)], -own)
        if order.ndim == 1:
            return padded.index_select(-own, order)
        outer = torch.broadcast_shapes(batch, outer)
        index = order.reshape(*order.shape, *[1] * len(inner)).expand(*outer, n + m, *inner)
        return padded.expand(*outer, n + m, *inner).gather(-own, index)

    moved = None if offset is None else place(offset, 2)
    return Points(both.gather(-1, order), place(Lam, 3), place(eta, 2), moved, order.argsort(-1)[..., n:])


def transitions(ss: Any, times: Tensor) -> tuple[Tensor, Tensor]:
    """A and Q of the steps into each of the times, the first of which is a step of zero; (*batch, n, D, D)."""
    dt = torch.cat([torch.zeros_like(times[..., :1]), times.diff(dim=-1)], -1)
    if not dt.requires_grad and (dt.ndim == 1 or len(ss.batch_shape) == 0):
        probe = dt.flatten()[:PROBED]
        if 4 * probe.unique().numel() <= probe.numel():
            distinct, which = dt.flatten().unique(return_inverse=True)
            if 4 * distinct.numel() <= dt.numel():
                A, Q = (x.index_select(-3, which) for x in ss.transition(distinct))
                return A.unflatten(-3, dt.shape), Q.unflatten(-3, dt.shape)
    if dt.shape[-1] <= TRANSITIONS_AT_ONCE:
        return ss.transition(dt)
    # Piece by piece also where a gradient is wanted: what autograd keeps is the same, what it does not is less.
    pieces = [ss.transition(piece) for piece in dt.split(TRANSITIONS_AT_ONCE, -1)]
    return torch.cat([A for A, _ in pieces], -3), torch.cat([Q for _, Q in pieces], -3)
