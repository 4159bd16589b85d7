"""From the arguments of an unbalanced problem with a stored cost to its solved form."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc.ot._inputs import DenseInputs
from stochproc.ot._outcome import Outcome, Tracker
from stochproc.ot._unbalanced import split, unbalanced
from stochproc.ot._unbalanced_form import UnbalancedForm
from stochproc.solvers import Status

__all__ = ["is_hard", "read_rho", "solve_unbalanced"]

Rho = tuple[Tensor, Tensor]


def read_rho(unbalanced: Any, like: Tensor, name: str = "unbalanced") -> Rho | None:
    """Return the strengths of both penalties in float64, in the graph; None where the problem is balanced."""
    if unbalanced is None:
        return None
    several = isinstance(unbalanced, (tuple, list)) or (
        isinstance(unbalanced, (np.ndarray, Tensor)) and unbalanced.ndim
    )
    pair = tuple(unbalanced) if several else (unbalanced, unbalanced)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one number or a pair; got {len(pair)} numbers.")
    out = []
    for value in pair:
        if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
            rho = value.to(dtype=torch.float64, device=like.device)
        elif isinstance(value, numbers.Real) or (isinstance(value, np.ndarray) and value.ndim == 0):
            rho = torch.tensor(float(value), dtype=torch.float64, device=like.device)
        else:
            raise TypeError(f"{name} must be a positive number, a pair of them or None; got {type(value).__name__}.")
        if not bool(rho.detach() > 0):
            raise ValueError(f"{name} must be positive (inf for exact marginals); got {float(rho.detach())}.")
        out.append(rho)
    return None if all(math.isinf(float(rho.detach())) for rho in out) else (out[0], out[1])


def is_hard(unbalanced: Any) -> bool:
    """Return whether both marginals are exact after all."""
    return read_rho(unbalanced, torch.empty(0)) is None


def solve_unbalanced(
    inputs: DenseInputs, rho: Rho, tracker: Tracker, *, grad: str = "implicit", start: Any = None
) -> tuple[UnbalancedForm, Outcome]:
    """Solve a checked problem; ``start`` is a pair of potentials to start from, of which the second counts."""
    with torch.no_grad():
        M, a, b = (t.detach() for t in inputs[1:4])
        eps, rho_a, rho_b = float(inputs.reg.detach()), float(rho[0].detach()), float(rho[1].detach())
        rows, columns = _taking_part(M, a, b, rho_a, rho_b)
        weights_a, weights_b = a[rows].double(), b[columns].double()
        if rows.numel() == 0:
            outcome = Outcome(weights_a, weights_b, 0.0, Status.CONVERGED, "")
        else:
            whole = rows.numel() == a.numel() and columns.numel() == b.numel()
            cost = (M if whole else M[rows][:, columns]).double()
            init = None if start is None else start[1].detach().double()[columns]
            try:
                outcome = unbalanced(cost, weights_a, weights_b, eps, rho_a, rho_b, tracker, init)
            finally:
                tracker.close()
        solved = split(outcome.f, outcome.g, weights_a, weights_b, rho_a, rho_b)
    form = UnbalancedForm(inputs, rho, rows, columns, solved, grad=grad)
    f, g = form.potentials()
    return form, outcome._replace(f=f.detach(), g=g.detach())


def _taking_part(M: Tensor, a: Tensor, b: Tensor, rho_a: float, rho_b: float) -> tuple[Tensor, Tensor]:
    """Return the rows and columns with weight and somewhere to go; where a hard marginal cannot be met, raise."""
    out = []
    for side, weights, others, rho, axis in (
        ("row", a, b.unsqueeze(0), rho_a, 1),
        ("column", b, a.unsqueeze(1), rho_b, 0),
    ):
        free = ((M < math.inf) & (others > 0)).any(axis)
        stuck = ((weights > 0) & ~free).nonzero()
        if stuck.numel() and math.isinf(rho):
            raise ValueError(
                f"M must leave every {side} with positive weight a finite cost where its marginal is exact; {side} "
                f"{int(stuck[0])} has none."
            )
        out.append(((weights > 0) & free).nonzero().squeeze(1))
    return out[0], out[1]
