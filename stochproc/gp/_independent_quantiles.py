"""Quantiles of finite mixtures of Gaussians, many at once."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["gaussian_tail", "mixture_quantile"]

# Relative to the probability of the smaller tail.
TOLERANCE = 1e-13
MAX_ITERATIONS = 200


@torch.no_grad()
def mixture_quantile(
    weights: Float[Tensor, " J"], loc: Float[Tensor, "m J"], sigma: Float[Tensor, "m J"], q: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """Solve for the quantile of each row's mixture at each row's probability.

    Parameters
    ----------
    weights : Tensor of shape (J,)
        Positive, summing to one.
    loc, sigma : Tensor of shape (m, J)
        Means and standard deviations; a row of zero deviations is a discrete law.
    q : Tensor of shape (m,)
        Probabilities inside (0, 1).

    Returns
    -------
    Tensor of shape (m,), float64

    Notes
    -----
    Newton steps on the logarithm of the smaller tail, kept inside a bracket: a mixture's quantile lies between
    the smallest and the largest of its components'. A step that does not shrink the bracket is replaced by one to
    its middle, on a scale that is linear near the centre and logarithmic far out, since components may be wider
    than others by many orders of magnitude. A row costs some 10 evaluations at J components.
    """
    upper = q > 0.5
    sign = torch.where(upper, 1.0, -1.0).to(loc)
    # Mirrored, so that each root is of an upper tail; its probability is at most a half.
    loc = loc * sign[:, None]
    tail = torch.where(upper, 1 - q, q)
    sigma = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
    each = loc - sigma * torch.special.ndtri(tail)[:, None]
    low, high = each.amin(1), each.amax(1)
    centre, unit = loc @ weights, torch.maximum(sigma.amin(1), 1e-12 * (high - low))
    z = (each @ weights).clamp(min=low, max=high)
    out = z.clone()
    rows = (high > low).nonzero()[:, 0]
    loc, sigma, tail, low, high, centre, unit, z = (t[rows] for t in (loc, sigma, tail, low, high, centre, unit, z))
    last = high - low
    for _ in range(MAX_ITERATIONS):
        if not len(rows):
            break
        x = (z[:, None] - loc) / sigma
        value = gaussian_tail(x) @ weights
        density = ((-x.square() / 2).exp() / sigma) @ weights * (2 * torch.pi) ** -0.5
        above = value > tail
        low, high = torch.where(above, z, low), torch.where(above, high, z)
        out[rows] = z
        close = ((value - tail).abs() > TOLERANCE * tail) & (
            high - low > 4 * torch.finfo(z.dtype).eps * torch.maximum(low.abs(), high.abs())
        )
        # Newton on log tail: concave or nearly straight for Gaussian and for power-law tails alike.
        step = value * (value / tail).log() / density
        found = z + step
        middle = centre + unit * _sinh_mean((low - centre) / unit, (high - centre) / unit)
        poor = ~((found > low) & (found < high)) | (step.abs() > last / 2)
        last = torch.where(poor, high - low, step.abs())
        z = torch.where(poor, middle.clamp(min=low, max=high), found)
        rows = rows[close]
        loc, sigma, tail, low, high, centre, unit, z, last = (
            t[close] for t in (loc, sigma, tail, low, high, centre, unit, z, last)
        )
    return out * sign


def gaussian_tail(x: Tensor) -> Tensor:
    """P(Z > x), exact relative to itself; ``torch.special.ndtr`` is 1 + erf and loses small tails."""
    return torch.special.erfc(x * 0.5**0.5) / 2


def _sinh_mean(a: Tensor, b: Tensor) -> Tensor:
    """Middle of two numbers on the scale of asinh."""
    return torch.sinh((torch.asinh(a) + torch.asinh(b)) / 2)
