"""The law of the scale of trained networks, which is the prior itself."""

import contextlib
import math

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.gp._independent_scale import GivenScale
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_posterior import PointScale, ScalePosterior, scale_posterior
from stochproc.gp._scale_quadrature import DEPTH, find_range, place_nodes

__all__ = ["law_of_scale"]

# Largest distance of nodes in log s. A wide prior needs fewer nodes than the Gaussian densities that are averaged under
# it. Those, and the share of training that is done, are analytic in log s up to pi/2 off the line: with this step the
# rule errs by exp(-2 pi (pi / 2) / 0.2) = 1e-21 of what it averages.
LARGEST_STEP = 0.2


def law_of_scale(prior: ScalePrior, *, by_scale: bool, device: torch.device) -> ScalePosterior:
    """Return the prior as the law of the scale under which predictions are made.

    Parameters
    ----------
    prior : ScalePrior
        Kept in the result: pass a copy.
    by_scale : bool
        Whether predictions given s have locations of their own, so that nodes are needed also where the prior has
        closed forms.
    device : torch.device
        Of the nodes.

    Raises
    ------
    ValueError
        If nodes are needed and the prior has no density.
    """
    zero = torch.zeros((), dtype=torch.float64, device=device)
    law = scale_posterior(prior, 0, zero)
    if not by_scale or isinstance(law, PointScale):
        return law
    try:
        return GivenScale(0, zero, prior, *_nodes(prior, zero))
    except TypeError as error:
        raise ValueError(
            f'rate="fixed" at a finite time must have a scale_prior with a density, or Delta alone; got {prior!r}.'
        ) from error


@torch.no_grad()
def _nodes(prior: ScalePrior, zero: Float[Tensor, ""]) -> tuple[Float[Tensor, " J"], Float[Tensor, " J"]]:
    """Nodes in log s and log weights that hold the mass of the prior and, where it exists, of its mean."""
    low, _, high = (float(end) for end in find_range(prior, 0.0, zero[None], DEPTH))
    if prior.tail_index > 1 + 1e-9:
        # The mean may exist, but not within the range of floating-point numbers.
        with contextlib.suppress(ValueError):
            high = max(high, float(find_range(prior, -1.0, zero[None], DEPTH)[2]))
    # The rule stops at twice as many nodes as it needs.
    step = min(2 * float(place_nodes(prior, 0.0, zero[None]).log_step.exp()), LARGEST_STEP)
    log_s = torch.linspace(low, high, math.ceil((high - low) / step) + 1, dtype=zero.dtype, device=zero.device)
    return log_s, torch.log_softmax(prior._log_prob_u(log_s), 0)
