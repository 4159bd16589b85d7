r"""Integrals over the scale s = sigma²: the trapezoid rule in u = log s, placed and refined automatically.

Everything a scale mixture needs is an integral

.. math:: I(k, S) = \int_0^\infty p(s)\, s^{-k}\, e^{-S/(2s)}\, ds,

the evidence with k = N/2, moments of the posterior as ratios with neighbouring k. In u = log s the integrand is
smooth and falls off exponentially on both sides, so that the trapezoid rule converges exponentially.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._warnings import warn_caller
from stochproc.exceptions import NumericalWarning

__all__ = ["DEPTH", "ScaleNodes", "find_range", "log_integral", "log_terms", "place_nodes", "sample_log_scale"]

# Nodes span the range where the logarithm of the integrand is less than this below its maximum.
DEPTH = 50.0
# Mass that may be cut off where a density cannot be evaluated further out: exp(-36.7) = 1e-16.
NEGLIGIBLE = 36.7
TOLERANCE = 1e-12
FIRST_INTERVALS = 128
# The rule stops at 1025 nodes for nearly all inputs. Only a plateau of the integrand hundreds of units wide (a
# prior with a pole at 0 and S near 1e-300) needs more.
LAST_INTERVALS = 8192
# Spacing and half-width of the first scan of u. exp(±700) are the ends of float64.
SCAN_STEP = 0.5
SCAN_REACH = 700.0
FURTHEST = 2e4
PEAKS = 3
BLOCK_ELEMENTS = 2**21
FINE_INTERVALS = 4096


class ScaleNodes(NamedTuple):
    """Nodes of the trapezoid rule for a batch of integrals: u = centre + offset."""

    centre: Float[Tensor, "batch 1"]
    offset: Float[Tensor, "batch nodes"]
    log_step: Float[Tensor, "batch 1"]

    @property
    def log_s(self) -> Float[Tensor, "batch nodes"]:
        """Logarithm of the scale at each node."""
        return self.centre + self.offset


def log_integral(
    prior: Any,
    power: "float | int",
    quad: Float[Tensor, "*batch"],
    *,
    depth: "float | int" = DEPTH,
) -> Float[Tensor, "*batch"]:
    """Return log I(power, quad) for a prior, differentiable in ``quad`` and the prior's parameters.

    Parameters
    ----------
    prior : ScalePrior
        Its density is evaluated at all nodes in one call.
    power : float
        The exponent k above, of any sign.
    quad : Tensor
        S above, zero or between 1e-300 and 1e300; any shape, one integral an entry. Computed in float64.
    depth : float, default=50
        How far below the maximum of its logarithm the integrand is cut off.

    Raises
    ------
    ValueError
        If the integral diverges, or the prior's density is NaN, infinite or nowhere positive.

    Warns
    -----
    NumericalWarning
        If two levels of the rule still differ by more than 1e-12 at the finest.

    Notes
    -----
    The nodes are constants in autograd: the value does not depend on where they are.
    """
    flat = quad.to(torch.float64).reshape(-1)
    rows = max(1, BLOCK_ELEMENTS // 3000)
    parts = [_log_integral_block(prior, float(power), part, float(depth)) for part in flat.split(rows)]
    return (torch.cat(parts) if parts else flat).reshape(quad.shape)


def _log_integral_block(prior: Any, power: float, quad: Tensor, depth: float) -> Tensor:
    nodes = place_nodes(prior, power, quad.detach(), depth=depth)
    terms = log_terms(prior, power, quad, nodes)
    constant = -power * nodes.centre - quad[:, None] * (-nodes.centre).exp() / 2
    return torch.logsumexp(terms, 1) + constant[:, 0]


def log_terms(prior: Any, power: float, quad: Tensor, nodes: ScaleNodes) -> Float[Tensor, "batch nodes"]:
    """Logarithms of the terms of the rule, less their common part at the centre.

    Relative to the centre, with expm1, rounding stays at eps times the few units by which the terms differ,
    however large ``power`` and log ``quad`` are.
    """
    v = nodes.offset
    half = quad[:, None] * (-nodes.centre).exp() / 2
    # The clamp keeps 0 * inf from a range that reaches far below s = 1e-300 with quad = 0.
    likelihood = -power * v - half * torch.expm1((-v).clamp(max=709.0))
    return _density(prior, nodes.log_s) + likelihood + nodes.log_step


@torch.no_grad()
def place_nodes(prior: Any, power: float, quad: Float[Tensor, "batch"], *, depth: float = DEPTH) -> ScaleNodes:
    """Find the range of each integrand and the number of nodes at which the rule has converged."""
    low, centre, high = find_range(prior, power, quad, depth)
    intervals = FIRST_INTERVALS
    nodes = _equal_nodes(low, centre, high, intervals)
    terms = log_terms(prior, power, quad, nodes)
    fine = torch.logsumexp(terms, 1)
    coarse = torch.logsumexp(terms[:, ::2], 1) + math.log(2)
    # The prior's own term can be large (a sharp prior); its rounding bounds what two levels can agree to.
    rounding = 8 * torch.finfo(torch.float64).eps * (1 + _density(prior, centre[:, None]).abs()[:, 0])
    while True:
        error = (fine - coarse).abs()
        if bool((error <= TOLERANCE + rounding).all()):
            return nodes
        if intervals == LAST_INTERVALS:
            warn_caller(
                f"the integral over the scale has not converged with {intervals + 1} nodes: two levels "
                f"differ by {float(error.max()):.1e} in log p(y). The density of {prior!r} may have jumps "
                "or very narrow peaks.",
                NumericalWarning,
            )
            return nodes
        intervals *= 2
        nodes = _equal_nodes(low, centre, high, intervals)
        coarse, fine = fine, torch.logsumexp(log_terms(prior, power, quad, nodes), 1)


def _equal_nodes(low: Tensor, centre: Tensor, high: Tensor, intervals: int) -> ScaleNodes:
    t = torch.linspace(0, 1, intervals + 1, dtype=low.dtype, device=low.device)
    width = high - low
    return ScaleNodes(centre[:, None], (low - centre)[:, None] + width[:, None] * t, (width / intervals).log()[:, None])


def _density(prior: Any, u: Tensor) -> Tensor:
    """Log density of u = log s, checked."""
    value = prior._log_prob_u(u)
    # NaN and +inf both fail this comparison; -inf, a density of zero, passes.
    bad = ~(value.detach() < math.inf)
    if bool(bad.any()):
        raise ValueError(
            f"{type(prior).__name__}.log_prob must be below infinity and not NaN; got "
            f"{float(value.detach()[bad][0])} at s = {math.exp(min(float(u[bad][0]), 709.0)):.6g}."
        )
    return value


def _log_target(prior: Any, power: float, log_half: Tensor, u: Tensor) -> Tensor:
    """Logarithm of the integrand in u; ``log_half`` = log(quad / 2) with axes to broadcast against u."""
    return _density(prior, u) - power * u - (log_half - u).exp()


def _scan(prior: Any, quad: Tensor) -> tuple[Tensor, Tensor]:
    """Return equally spaced u and the density there, fine enough to see the prior at all."""
    reach = min(prior._reach, SCAN_REACH)
    coarse = torch.arange(-reach, reach + SCAN_STEP / 2, SCAN_STEP, dtype=torch.float64, device=quad.device)
    density = _density(prior, coarse)
    if bool((density > -math.inf).any()):
        return coarse, density
    # A support narrower than the grid: find it on a finer one and keep only the points there.
    for step in (SCAN_STEP / 10, SCAN_STEP / 100):
        u = torch.arange(-reach, reach + step / 2, step, dtype=torch.float64, device=quad.device)
        density = _density(prior, u)
        found = density > -math.inf
        if bool(found.any()):
            both = torch.cat([coarse, u[found]]).sort().values
            return both, _density(prior, both)
    raise ValueError(f"{prior!r} has no mass between s = 1e-304 and 1e304 that a grid of step {step} in log s finds.")


@torch.no_grad()
def find_range(prior: Any, power: float, quad: Tensor, depth: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return lower end, mode and upper end of u = log s for each entry of quad (batch,)."""
    log_half = (quad / 2).log()[:, None]
    u, density = _scan(prior, quad)
    value = density - power * u - (log_half - u).exp()

    # The integrand need not be unimodal: every one of its highest peaks on the grid is refined.
    padded = torch.nn.functional.pad(value, (1, 1), value=-math.inf)
    is_peak = (value >= padded[:, :-2]) & (value >= padded[:, 2:])
    k = value.masked_fill(~is_peak, -math.inf).topk(min(PEAKS, len(u)), dim=1).indices
    left, right = u[(k - 1).clamp(min=0)], u[(k + 1).clamp(max=len(u) - 1)]
    t = torch.linspace(0, 1, 33, dtype=u.dtype, device=u.device)
    for _ in range(6):
        points = left[..., None] + (right - left)[..., None] * t
        at = _log_target(prior, power, log_half[..., None], points)
        best = at.argmax(-1, keepdim=True)
        left = points.gather(-1, (best - 1).clamp(min=0))[..., 0]
        right = points.gather(-1, (best + 1).clamp(max=32))[..., 0]
    highest, which = at.amax(-1).max(1)
    centre = points.gather(-1, best)[..., 0].gather(1, which[:, None])[:, 0]
    if bool((highest == -math.inf).any()):
        raise ValueError(
            f"{prior!r} excludes every scale that the data allow (S = {float(quad[highest == -math.inf][0]):.3g})."
        )

    floor = highest[:, None] - depth
    inside = value >= floor
    low = _find_end(prior, power, log_half, u, inside, centre, floor, highest, -1)
    high = _find_end(prior, power, log_half, u, inside, centre, floor, highest, +1)
    return low, centre, high


def _find_end(
    prior: Any,
    power: float,
    log_half: Tensor,
    u: Tensor,
    inside: Tensor,
    centre: Tensor,
    floor: Tensor,
    highest: Tensor,
    side: int,
) -> Tensor:
    """Outermost u on one side at which the integrand is above the floor, to a percent of its distance."""
    if side > 0:
        u, inside = u.flip(0), inside.flip(1)
    # Columns now run inwards from the end of the scan. `first` is the outermost one above the floor, or the one
    # just beyond the mode where a narrow peak lies between two columns.
    beyond = ((u - centre[:, None]) * side < 0).to(torch.int8).argmax(1)
    first = torch.where(inside.any(1), inside.to(torch.int8).argmax(1), beyond).minimum(beyond)
    inner = torch.where(first < beyond, u[first], centre)
    outer = u[(first - 1).clamp(min=0)]
    if bool((first == 0).any()):
        outer, inner = _extend(prior, power, log_half, first == 0, outer, inner, floor, highest, side)

    t = torch.linspace(0, 1, 17, dtype=u.dtype, device=u.device)
    # Where the density jumps to zero at its mode the relative width never falls; 12 rounds reach rounding
    # anyway.
    for _ in range(12):
        if bool(((inner - outer).abs() <= 0.01 * (centre - outer).abs()).all()):
            break
        points = outer[:, None] + (inner - outer)[:, None] * t
        above = _log_target(prior, power, log_half, points) >= floor
        above[:, -1] = True
        k = above.to(torch.int8).argmax(1, keepdim=True).clamp(min=1)
        outer, inner = points.gather(1, k - 1)[:, 0], points.gather(1, k)[:, 0]
    return outer


def _extend(
    prior: Any,
    power: float,
    log_half: Tensor,
    which: Tensor,
    outer: Tensor,
    inner: Tensor,
    floor: Tensor,
    highest: Tensor,
    side: int,
) -> tuple[Tensor, Tensor]:
    """Move the ends that lie beyond the scan outwards until the integrand is below the floor."""
    reach = float(outer[which].abs().max())
    while bool(which.any()):
        last = reach
        reach = min(reach + max(10.0, 0.2 * reach), prior._reach, FURTHEST)
        if reach == last:
            edge = _log_target(prior, power, log_half, outer[:, None])[:, 0]
            if bool((which & (edge > highest - NEGLIGIBLE)).any()):
                _raise_divergent(prior, power, log_half, which, side)
            break
        here = torch.full_like(outer, side * reach)
        below = _log_target(prior, power, log_half, here[:, None])[:, 0] < floor[:, 0]
        inner = torch.where(which & below, outer, inner)
        outer = torch.where(which, here, outer)
        which = which & ~below
    return outer, torch.where(which, outer, inner)


def _raise_divergent(prior: Any, power: float, log_half: Tensor, which: Tensor, side: int) -> None:
    quad = 2 * float(log_half[which][0].exp())
    where = "towards s = 0" if side < 0 else "towards large s"
    hint = (
        " The residuals are exactly zero, which this prior explains best by s = 0; use InverseGamma."
        if quad == 0 and power > 0
        else " The prior must be proper; rescale the data if they are of order 1e150 or 1e-150."
    )
    raise ValueError(
        f"the integral of p(s) s^(-{power:g}) exp(-S/(2s)) over the scale does not converge {where}, or "
        f"reaches beyond the floating-point range, for {prior!r} and S = {quad:.6g}.{hint}"
    )


@torch.no_grad()
def sample_log_scale(
    prior: Any,
    power: float,
    quad: Float[Tensor, ""],
    n_samples: int,
    generator: "torch.Generator | None" = None,
) -> Float[Tensor, " n"]:
    """Draw log s from the density proportional to p(s) s^-power exp(-quad/(2s)), by inversion.

    Notes
    -----
    The density of u = log s is evaluated on 4097 equal nodes and taken as linear in between, so its CDF is
    piecewise quadratic and inverted exactly. The largest relative error of the density is h² l''/8, about 1e-5
    of the probability for any width of the posterior: a Kolmogorov-Smirnov test would need 1e9 draws to see it.
    """
    quad = quad.detach().to(torch.float64).reshape(1)
    nodes = _equal_nodes(*find_range(prior, power, quad, DEPTH), FINE_INTERVALS)
    terms = log_terms(prior, power, quad, nodes)[0]
    f = (terms - terms.max()).exp()
    u = nodes.log_s[0]
    mass = (f[1:] + f[:-1]) / 2
    cdf = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    uniform = torch.rand(n_samples, dtype=torch.float64, device=u.device, generator=generator) * cdf[-1]
    k = torch.searchsorted(cdf, uniform, right=True).clamp(1, len(mass)) - 1
    target, f0, slope = uniform - cdf[k], f[k], f[k + 1] - f[k]
    # Root of f0 t + slope t²/2 = target in the form without cancellation for either sign of the slope.
    root = (f0.square() + 2 * slope * target).clamp(min=0).sqrt()
    t = (2 * target / (f0 + root).clamp(min=torch.finfo(f.dtype).tiny)).clamp(max=1)
    return u[k] + t * (u[k + 1] - u[k])
