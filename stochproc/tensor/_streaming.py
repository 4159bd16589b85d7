"""Rows that come later: new points in the grid, old messages kept as numbers by point, new ones on top of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc._persistence import as_tensor
from stochproc.tensor._coordinate_ascent import Decomposition, Frozen, Rows
from stochproc.tensor._links import TuckerLink
from stochproc.tensor._modes import Mode

__all__ = ["continued", "forget_and_absorb"]


def continued(
    model: Decomposition,
    modes: Sequence[Mode],
    categories: Sequence[Any],
    columns: Sequence[np.ndarray],
    y: Tensor,
    weight: np.ndarray,
) -> tuple[Rows, list[Any]]:
    """Merge the points of new rows into the grid of a model, in place; return the rows there, and all categories."""
    index: list[Tensor] = []
    found: list[Any] = []
    for factor, mode, known, column in zip(model.factors, modes, categories, columns, strict=True):
        device = factor.points.device
        if mode.kind != "discrete":
            points = as_tensor(column, torch.float64, device)
            factor.insert(points)
            index.append(torch.searchsorted(factor.points, points))
            found.append(None)
            continue
        both = np.unique(np.concatenate([known, column]))
        # Categories are numbered anew in their order; those that were there move with what is known of them.
        moved = as_tensor(np.searchsorted(both, known), torch.float64, device)
        factor.points = moved
        factor.insert(torch.arange(len(both), dtype=torch.float64, device=device))
        index.append(as_tensor(np.searchsorted(both, column), torch.int64, device))
        found.append(both)
    return Rows(y, as_tensor(weight, torch.float64, y.device), tuple(index)), found


def forget_and_absorb(model: Decomposition, rows: Rows, forget: float, n_sweeps: int) -> None:
    """Freeze all messages, multiplied by ``forget``, and iterate those of new rows on top of them."""
    link = model.link
    core = None
    if isinstance(link, TuckerLink) and link.precision is not None and link.linear is not None:
        core = (forget * link.precision, forget * link.linear)
    messages = [(forget * f.Lam, forget * f.eta) for f in model.factors]
    model.frozen = Frozen(messages, core, forget * model.n, forget * model.squares)
    for _ in range(n_sweeps):
        model.sweep(rows, learn=False)
    # From now on the factors themselves hold the sums.
    model.frozen = None
