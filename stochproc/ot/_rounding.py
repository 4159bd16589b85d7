"""Rounding of an almost feasible plan to one whose marginals are exact."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["round_plan"]

# Row sums carry a few units of rounding each; a residual below them asks for no mass.
ULPS = 16


@torch.no_grad()
def round_plan(
    plan: Float[Tensor, "*batch n m"],
    a: Float[Tensor, "*#batch n"],
    b: Float[Tensor, "*#batch m"],
    forbidden: Float[Tensor, "*#batch n m"] | Bool[Tensor, "*#batch n m"] | None = None,
) -> Float[Tensor, "*batch n m"] | None:
    r"""Return a plan with the marginals a and b close to the given one.

    Rows that hold too much mass are scaled down, then columns; what is missing then, r in the rows and s in the
    columns, is put back as :math:`r s^T / \|r\|_1`. The result P' satisfies
    :math:`\|P' - P\|_1 \le 2 (\|P 1 - a\|_1 + \|P^T 1 - b\|_1)`.

    Parameters
    ----------
    plan : Tensor of shape (\*batch, n, m)
        Non-negative. It is not written to, and gradients do not flow.
    a, b : Tensor of shape (\*batch, n) and (\*batch, m)
        Non-negative masses of equal sum.
    forbidden : Tensor of shape (\*batch, n, m) or None, default=None
        Pairs that must stay empty: a boolean mask, or a cost that is ``+inf`` there.

    Returns
    -------
    Tensor of shape (\*batch, n, m) or None
        Of the dtype of ``plan``; feasible up to its rounding. None where missing mass would have to go to a
        forbidden pair, in any item of a batch.

    Notes
    -----
    O(n m) time; two arrays of the size of the plan at most.

    References
    ----------
    .. [1] J. Altschuler, J. Weed, P. Rigollet, "Near-linear time approximation algorithms for optimal transport via
       Sinkhorn iteration", NeurIPS 2017, algorithm 2 and lemma 7.

    Examples
    --------
    >>> import torch
    >>> half = torch.tensor([0.5, 0.5])
    >>> round_plan(torch.tensor([[0.5, 0.1], [0.0, 0.4]]), half, half).sum(0)
    tensor([0.5000, 0.5000])
    """
    a, b = a.to(plan.dtype), b.to(plan.dtype)
    rows = _at_most(a, plan.sum(-1))
    columns = _at_most(b, (rows.unsqueeze(-2) @ plan).squeeze(-2))
    missing_a = (a - rows * (plan @ columns.unsqueeze(-1)).squeeze(-1)).clamp_min(0.0)
    missing_b = (b - columns * (rows.unsqueeze(-2) @ plan).squeeze(-2)).clamp_min(0.0)
    # The two sums agree but for rounding; the larger never puts more back than is missing.
    total = torch.maximum(missing_a.sum(-1, keepdim=True), missing_b.sum(-1, keepdim=True))
    share = torch.where(total > 0, missing_a / total, 0.0)
    out = share.unsqueeze(-1) * missing_b.unsqueeze(-2)
    if forbidden is not None:
        closed = forbidden if forbidden.dtype == torch.bool else forbidden == torch.inf
        eps = ULPS * torch.finfo(plan.dtype).eps
        open_a, open_b = missing_a > eps * a, missing_b > eps * b
        if bool((closed & open_a.unsqueeze(-1) & open_b.unsqueeze(-2)).any()):
            return None
        out = out.masked_fill_(closed, 0.0)
    return out.add_((plan * rows.unsqueeze(-1)).mul_(columns.unsqueeze(-2)))


def _at_most(mass: Tensor, sums: Tensor) -> Tensor:
    """Return factors min(1, mass / sums)."""
    return torch.where(sums > mass, mass / sums, 1.0)
