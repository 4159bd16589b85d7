"""One step of a linear time-invariant SDE whose exponential has no closed form: power series, then doubling."""

import torch
from torch import Tensor

__all__ = ["series_step"]

# Terms beyond the first one of an entry that differs from zero. The step is cut until |F| h <= 2, so that the next
# term is below 4^32 / 32! = 7e-17. Halving it more costs a product of all matrices each time, and gains no digit.
_EXTRA_TERMS = 32


def series_step(F: Tensor, noise: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`A = e^{F d}` and :math:`Q = \int_0^d e^{F s} N e^{F^\top s}\,ds`, differentiable in everything.

    Parameters
    ----------
    F : Tensor of shape (*batch, D, D)
        Drift matrix.
    noise : Tensor of shape (*batch, D, D)
        The matrix N, symmetric positive semidefinite.
    dt : Tensor of shape (*#batch, n)
        Steps; they may be negative where N is zero.

    Returns
    -------
    A, Q : Tensor of shape (*batch, n, D, D)

    Notes
    -----
    Q is a sum of positive semidefinite terms and never a difference of covariances: the series on h = d / 2^k,
    then A(2h) = A(h)^2 and Q(2h) = Q(h) + A(h) Q(h) A(h)'. Cost O(n D^3 k) with k about log2(|F| d).
    """
    batch = torch.broadcast_shapes(F.shape[:-2], dt.shape[:-1])
    size, n = F.shape[-1], dt.shape[-1]
    h, doublings = _cut(F, dt.expand(*batch, n))

    powers_A, powers_Q = [], [noise]
    power = torch.eye(size, dtype=F.dtype, device=F.device)
    for j in range(1, size + _EXTRA_TERMS):
        power = F @ power / j
        powers_A.append(power)
    for j in range(2, 2 * size + _EXTRA_TERMS):
        power = F @ powers_Q[-1] / j
        powers_Q.append(power + power.mT)
    A = _polynomial(h, powers_A).reshape(-1, size, size) + torch.eye(size, dtype=F.dtype, device=F.device)
    Q = _polynomial(h, powers_Q).reshape(-1, size, size)

    doublings = doublings.reshape(-1)
    for k in range(int(doublings.max()) if doublings.numel() else 0):
        more = (doublings > k).nonzero()[:, 0]
        A_, Q_ = A[more], Q[more]
        Q = Q.index_copy(0, more, Q_ + A_ @ Q_ @ A_.mT)
        A = A.index_copy(0, more, A_ @ A_)
    Q = (Q + Q.mT) / 2
    shape = (*batch, n, size, size)
    return A.reshape(shape), Q.reshape(shape)


def _cut(F: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return dt / 2^k and the integer k with |F| |dt| / 2^k at most 2."""
    norm = F.detach().abs().sum(-1).amax(-1, keepdim=True)
    # By exponents: the product of the two may overflow.
    k = torch.frexp(dt.detach()).exponent + torch.frexp(norm).exponent - 1
    k = torch.where((dt == 0) | (norm == 0), 0, k).clamp(min=0)
    # 2^-k itself may underflow, its two factors do not.
    return dt * torch.exp2(-(k // 2).to(dt.dtype)) * torch.exp2((k // 2 - k).to(dt.dtype)), k


def _polynomial(h: Tensor, coefficients: list[Tensor]) -> Tensor:
    """Return h c_1 + h^2 c_2 + ... for matrices c_j: one product of (n, terms) and (terms, D D)."""
    powers = h.unsqueeze(-1) ** torch.arange(1, len(coefficients) + 1, dtype=h.dtype, device=h.device)
    return powers @ torch.stack([c.flatten(-2) for c in coefficients], -2)
