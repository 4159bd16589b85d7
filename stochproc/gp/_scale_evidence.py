r"""The evidence: what the data say about a prior of the scale, as a function of two numbers.

With N observed scalars and their whitened square sum S, p(y | s) depends on s through
:math:`(2 \pi s)^{-N/2} e^{-S/(2s)}` alone.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_floating, check_integer
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_gig import gig_log_integral
from stochproc.gp._scale_quadrature import log_integral
from stochproc.gp._special import log1p_ratio, log_gamma_ratio

__all__ = ["LOG_2PI", "check_quad", "inverse_gamma_evidence", "log_evidence", "mixture_terms"]

LOG_2PI = math.log(2 * math.pi)


def log_evidence(prior: ScalePrior, n_obs: int, quad: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""Return the part of log p(y) that depends on the scale.

    It is :math:`\log\int p(s) (2 \pi s)^{-N/2} e^{-S/(2s)} ds`.

    Parameters
    ----------
    prior : ScalePrior
        The prior of s.
    n_obs : int
        N, the number of observed scalars (rows times outputs), 0 or more.
    quad : Tensor
        S, the whitened squared residuals summed over rows and outputs; zero or in [1e-300, 1e300]. Of any
        shape: one evidence an entry.

    Returns
    -------
    Tensor of the shape of ``quad``, float64
        In nats, differentiable in ``quad`` and in the prior's parameters. log p(y) is this less half the log
        determinant.

    Raises
    ------
    ValueError
        If ``n_obs`` or ``quad`` is out of range, or the evidence is infinite, as it is for S = 0 and a prior
        with too much mass at s = 0.

    Warns
    -----
    NumericalWarning
        If quadrature has not converged to 1e-12.

    Notes
    -----
    Closed form for ``Delta``, ``InverseGamma`` and ``GIG``, and a sum over the components of a ``Mixture``;
    otherwise the trapezoid rule in log s with 129 to 1025 nodes (up to 8193 where S is near 1e-300), O(1) beside
    the Cholesky factor that S comes from.
    """
    quad = check_quad(n_obs, quad)
    half = n_obs / 2
    if prior._conjugate == "point":
        (log_value,) = _parameters(prior, "log_value", like=quad)
        return -half * (LOG_2PI + log_value) - quad * (-log_value).exp() / 2
    if prior._conjugate == "inverse_gamma":
        log_a, log_b = _parameters(prior, "log_a", "log_b", like=quad)
        return inverse_gamma_evidence(log_a, log_b, half, quad)
    if prior._conjugate == "gig":
        p, log_omega, log_scale = _parameters(prior, "p", "log_omega", "log_scale", like=quad)
        return gig_log_integral(p, log_omega, log_scale, half, quad) - half * LOG_2PI
    if prior._conjugate == "mixture":
        # Given x = s / scale the data have square sum S / scale.
        (log_scale,) = _parameters(prior, "log_scale", like=quad)
        return torch.logsumexp(mixture_terms(prior, n_obs, quad * (-log_scale).exp()), 0) - half * log_scale
    return log_integral(prior, half, quad) - half * LOG_2PI


def mixture_terms(prior: Any, n_obs: int, quad: Float[Tensor, "*batch"]) -> Float[Tensor, "components *batch"]:
    """Log of weight times evidence of each component of a mixture, for data in units of its scale."""
    log_weights = prior.log_weights.to(quad.device).log_softmax(0)
    terms = [w + log_evidence(part, n_obs, quad) for w, part in zip(log_weights, prior.components, strict=True)]
    return torch.stack(terms)


def _parameters(prior: ScalePrior, *names: str, like: Tensor) -> list[Tensor]:
    # Not get_parameter: it refuses the plain tensors that torch.func.functional_call puts in their place.
    return [getattr(prior, name).to(like.device) for name in names]


def check_quad(n_obs: int, quad: Tensor) -> Tensor:
    check_integer("n_obs", n_obs, 0)
    check_floating(quad=quad)
    quad = quad.to(torch.float64)
    allowed = (quad == 0) | ((quad >= 1e-300) & (quad <= 1e300))
    if not bool(allowed.all()):
        bad = quad.detach()[~allowed][0].item()
        raise ValueError(f"quad must be 0 or between 1e-300 and 1e300; got {bad}.")
    return quad


def inverse_gamma_evidence(log_a: Tensor, log_b: Tensor, half: float, quad: Tensor) -> Tensor:
    a = log_a.exp()
    log_growth = log1p_ratio(quad / 2, log_b)
    return log_gamma_ratio(a, half) + half * (log_a - log_b - LOG_2PI) - (a + half) * log_growth
