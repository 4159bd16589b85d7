"""The best scale parameter of a prior, which for one data set is a one-dimensional problem."""

import math

import torch
from jaxtyping import Float
from scipy import optimize
from torch import Tensor

from stochproc._checks import check_integer
from stochproc._warnings import warn_caller
from stochproc.exceptions import DataWarning
from stochproc.gp._scale_base import ScalePrior, plain_number
from stochproc.gp._scale_evidence import log_evidence

__all__ = ["fit_scale"]

SCAN_POINTS = 65
# Only where the density of log s is within this of its maximum, in nats, can the maximum lie.
SCAN_DEPTH = 10.0
SCAN_MARGIN = 6.0
# Largest |log s| of the scan; S is n_obs times as large, and its gradient must fit too.
SCAN_REACH = 290 * math.log(10)


def fit_scale(prior: ScalePrior, n_obs: int, quad: Float[Tensor, ""]) -> None:
    r"""Set the scale parameter of ``prior`` to the maximum of the evidence, in place.

    Parameters
    ----------
    prior : ScalePrior
        A prior that declares a scale parameter.
    n_obs : int
        N, the number of observed scalars, 1 or more.
    quad : Tensor, 0-dim
        S, the whitened squared residuals.

    Raises
    ------
    TypeError
        If the prior declares no scale parameter.
    ValueError
        If the current scale parameter puts the mass of s outside 1e-290 to 1e290.

    Warns
    -----
    DataWarning
        If S is zero: the optimum is then a scale of zero, and the parameter is left as it is.

    Notes
    -----
    If t is a scale parameter, the evidence as a function of (t, S) is :math:`S^{-N/2} g(S/t)`. Hence its
    maximum over t is a constant less N/2 log S for every such prior: kernel, noise and mean have the optimum of
    the Gaussian process with free outputscale, and t follows from S alone. It is S/N for ``Delta`` and a S/N
    for the b of ``InverseGamma``; other priors take a scan and a bracketed root of the derivative.
    """
    check_integer("n_obs", n_obs, 1)
    if prior.scale_name is None:
        raise TypeError(f"{type(prior).__name__} declares no scale parameter; set the class attribute scale_name.")
    total = quad.detach().to(torch.float64)
    if total.item() == 0:
        warn_caller(
            f"all residuals are exactly zero, so the best scale is zero; {prior.scale_name} is kept.",
            DataWarning,
        )
        return
    variance = total.item() / n_obs
    if prior._conjugate == "point":
        prior.rescale(variance / prior.mean)
    elif prior._conjugate == "inverse_gamma":
        a, b = (prior.get_parameter(name).exp().item() for name in ("log_a", "log_b"))
        prior.rescale(a * variance / b)
    else:
        prior.rescale(variance * math.exp(-_best_log_ratio(prior, n_obs)))


def _best_log_ratio(prior: ScalePrior, n_obs: int) -> float:
    """Logarithm of S/(N c) at the best c, where the prior of s becomes that of c s."""
    # The evidence in log c is the prior's density of log s, smoothed by the likelihood: its maximum lies where
    # the prior has mass. Scanned first, since that density may have several modes.
    grid = _scan_points(prior, n_obs)
    with torch.no_grad():
        value = log_evidence(prior, n_obs, n_obs * grid.exp()) + n_obs / 2 * grid
    k = int(value.argmax())
    left, right = grid[max(k - 1, 0)].item(), grid[min(k + 1, len(grid) - 1)].item()

    def slope(log_ratio: float) -> float:
        # N - S E[1/s | y]: the derivative of twice the scanned function.
        quad = torch.tensor(n_obs * math.exp(log_ratio), dtype=torch.float64, device=grid.device, requires_grad=True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(log_evidence(prior, n_obs, quad), quad)
        return n_obs + 2 * quad.item() * gradient.item()

    # At an end of the scan the maximum may lie just outside; the slope has the right sign further out.
    while k == 0 and slope(left) <= 0:
        left -= 1.0
    while k == len(grid) - 1 and slope(right) >= 0:
        right += 1.0
    if slope(left) > 0 > slope(right):
        return optimize.brentq(slope, left, right, xtol=1e-12, rtol=1e-14)
    # Another stationary point beside the highest one: search by value.
    found = optimize.minimize_scalar(
        lambda x: -float(log_evidence(prior, n_obs, n_obs * grid.new_tensor(x).exp())) - n_obs / 2 * x,
        bounds=(left, right),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(found.x)


def _scan_points(prior: ScalePrior, n_obs: int) -> Tensor:
    """Values of the log ratio at which the best one is looked for: equally spaced over each part of the prior."""
    parts = prior._ranges(SCAN_DEPTH)
    # A component may be narrower than the likelihood, whose standard deviation of log s is sqrt(2/N).
    margin = 0.0 if len(parts) == 1 else SCAN_MARGIN * math.sqrt(2 / n_obs)
    device = prior._device()
    grids = [
        torch.linspace(low - margin, high + margin, SCAN_POINTS, dtype=torch.float64, device=device)
        for low, high in parts
    ]
    points = torch.cat(grids).unique()
    if not bool((points.abs() <= SCAN_REACH).all()):
        worst = points[points.abs().argmax()].item() / math.log(10)
        number = plain_number(str(prior.scale_name), getattr(prior, str(prior.scale_name)))
        raise ValueError(
            f"{prior.scale_name} of {type(prior).__name__} must put the mass of s within 1e-290 and 1e290, so that a "
            f"search for the best one can start there; got {number:.6g}, with mass at s = 1e{worst:.0f}."
        )
    return points
