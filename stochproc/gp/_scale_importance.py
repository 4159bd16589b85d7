r"""The posterior of the scale by importance sampling, with what tells whether it can be trusted.

For one scale the quadrature of ``scale_posterior`` is exact and no slower; sampling is here because the paper on
scale mixtures uses it, and as an independent check.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from stochproc._checks import check_integer
from stochproc._random import make_generator
from stochproc._warnings import warn_caller
from stochproc.exceptions import NumericalWarning
from stochproc.gp._scale_base import ScalePrior
from stochproc.gp._scale_evidence import LOG_2PI, check_quad, log_evidence
from stochproc.gp._scale_nodes import NodeScale
from stochproc.gp._scale_quadrature import find_range

__all__ = ["ImportanceScale", "importance_posterior", "pareto_shape", "with_drawn_scale"]

# Above this shape the averages of the draws converge too slowly to be used (Vehtari et al. 2024).
K_HAT_LIMIT = 0.7
# The tail that the shape is fitted to needs five weights.
LEAST_SAMPLES = 25
# Steps of the second difference at the mode, in standard deviations.
CURVATURE_STEP = 0.1


@dataclass(frozen=True)
class ImportanceScale(NodeScale):
    """The posterior of the scale as weighted draws; predictions are a finite mixture over them.

    Parameters
    ----------
    log_s : Tensor of shape (n_samples,)
        Logarithms of the draws.
    log_weights : Tensor of shape (n_samples,)
        Their log weights, which sum to one after exp.
    log_evidence : float
        Estimate of ``log_evidence(prior, n_obs, quad)``, in nats.
    log_evidence_error : float
        Its standard error.
    ess : float
        Effective sample size, one over the sum of squared weights.
    k_hat : float
        Shape of the generalised Pareto law fitted to the largest weights; -inf if all weights are equal. Below
        0.5 their variance is finite, above 0.7 averages are unreliable.
    tail_index : float
        That of the posterior, tail_index of the prior + N/2: which moments exist.
    """

    log_s: Float[Tensor, " J"]
    log_weights: Float[Tensor, " J"]
    log_evidence: "float | int"
    log_evidence_error: "float | int"
    ess: "float | int"
    k_hat: "float | int"
    tail_index: "float | int"

    @property
    def mean(self) -> "float | int":
        """Weighted mean of s, inf where E[s | y] does not exist."""
        if self.tail_index <= 1 + 1e-9:
            return math.inf
        return math.exp(min(torch.logsumexp(self.log_weights + self.log_s, 0).item(), 709.0))

    @property
    def inverse_mean(self) -> "float | int":
        """Weighted mean of 1/s."""
        return math.exp(min(torch.logsumexp(self.log_weights - self.log_s, 0).item(), 709.0))

    @property
    def has_location(self) -> bool:
        """Whether E[sqrt(s) | y] is finite."""
        return self.tail_index > 0.5 + 1e-9

    def sample(self, n_samples: int, *, generator: "torch.Generator | None" = None) -> Float[Tensor, " n"]:
        """Resample the draws by their weights, with replacement."""
        which = torch.multinomial(self.log_weights.exp(), n_samples, replacement=True, generator=generator)
        return self.log_s[which].exp()


@torch.no_grad()
def importance_posterior(
    prior: ScalePrior,
    n_obs: int,
    quad: Float[Tensor, ""],
    n_samples: int = 10_000,
    *,
    generator: "torch.Generator | None" = None,
) -> ImportanceScale:
    r"""Draw the posterior of the scale by importance sampling.

    Parameters
    ----------
    prior : ScalePrior
        The prior of s. A ``Delta`` needs no sampling and gives its one value.
    n_obs : int
        N, the number of observed scalars, 1 or more: a prior by itself has no likelihood to place draws by.
    quad : Tensor, 0-dim
        S, their whitened square sum, as in ``log_evidence``.
    n_samples : int, default=10000
        Number of draws, 25 or more.
    generator : torch.Generator or None, default=None
        Source of randomness; None is torch's default one.

    Returns
    -------
    ImportanceScale
        A ``ScalePosterior`` with ``log_evidence``, its standard error, ``ess`` and ``k_hat``.

    Raises
    ------
    ValueError
        If an argument is out of range or the posterior is not proper.
    TypeError
        If the prior is a ``Mixture`` with a point mass: it has no density to weigh draws by.

    Warns
    -----
    NumericalWarning
        If ``k_hat`` exceeds 0.7, with the value and the effective sample size.

    Notes
    -----
    The proposal is an inverse gamma law with the mode and the curvature at it of the posterior density of log s,
    so that its standard deviation is right, about sqrt(2/N); draws from the prior would all but miss the posterior.
    One such law covers one mode: a prior with several modes far apart and few data may lose one unnoticed. O(n_samples)
    to draw; predictions cost that much a point, against some 129 by ``scale_posterior``.

    References
    ----------
    .. [1] H. Lee, E. Yun, H. Yang, J. Lee, "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022.
    .. [2] A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, "Pareto Smoothed Importance Sampling", JMLR 2024.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import HalfCauchy, importance_posterior, scale_posterior
    >>> quad = torch.tensor(45.0, dtype=torch.float64)
    >>> drawn = importance_posterior(HalfCauchy(), 50, quad, generator=torch.Generator().manual_seed(0))
    >>> abs(drawn.mean - scale_posterior(HalfCauchy(), 50, quad).mean) < 0.01, drawn.ess > 9_000
    (True, True)
    """
    check_integer("n_obs", n_obs, 1)
    check_integer("n_samples", n_samples, LEAST_SAMPLES)
    quad = check_quad(n_obs, quad.detach())
    if quad.ndim:
        raise ValueError(f"quad must be a 0-dim tensor; got shape {tuple(quad.shape)}.")
    if prior._conjugate == "point":
        log_s = quad.new_tensor([math.log(prior.mean)])
        exact = log_evidence(prior, n_obs, quad).item()
        return ImportanceScale(n_obs, quad, log_s, torch.zeros_like(log_s), exact, 0.0, n_samples, -math.inf, math.inf)
    return _drawn(prior, n_obs, quad, n_samples, generator)


def _drawn(
    prior: ScalePrior, n_obs: int, quad: Tensor, n_samples: int, generator: "torch.Generator | None"
) -> ImportanceScale:
    """Draw from the proposal, weigh the draws, and say how good they are."""
    shape, mode = _proposal(prior, n_obs, quad)
    device = "cpu" if generator is None else generator.device
    draws = torch.rand(n_samples, dtype=torch.float64, device=device, generator=generator)
    uniform = draws.clamp(min=2.0**-54).cpu().numpy()
    # Offsets of log s from the mode: -log(g / shape) for gamma draws g.
    gamma = np.maximum(special.gammaincinv(shape, uniform), np.finfo(float).tiny)
    offset = torch.as_tensor(math.log(shape) - np.log(gamma), device=quad.device)
    log_proposal = shape * (-offset - torch.expm1(-offset)) + special.xlogy(shape, shape) - shape
    log_ratio = _target(prior, n_obs, quad, mode, offset) - (log_proposal - special.gammaln(shape))
    total = torch.logsumexp(log_ratio, 0)
    weights = (log_ratio - total).exp() * n_samples
    error = weights.std().item() / math.sqrt(n_samples)
    level = total.item() - math.log(n_samples) - quad.item() * math.exp(-mode) / 2 - n_obs / 2 * (mode + LOG_2PI)
    ess = n_samples / weights.square().mean().item()
    k_hat = pareto_shape(log_ratio.cpu().numpy())
    if k_hat > K_HAT_LIMIT:
        warn_caller(
            f"importance sampling of the scale is unreliable: k_hat = {k_hat:.2f} > {K_HAT_LIMIT}, effective sample "
            f'size {ess:.0f} of {n_samples}. The quadrature (scale_posterior, inference="exact") is exact.',
            NumericalWarning,
        )
    tail = prior.tail_index + n_obs / 2
    return ImportanceScale(n_obs, quad, mode + offset, log_ratio - total, level, error, ess, k_hat, tail)


def with_drawn_scale(posterior: Any, n_samples: int, random_state: Any) -> Any:
    """Return a posterior process with the law of its scale replaced by one of ``n_samples`` weighted draws."""
    scale = posterior.scale
    generator = make_generator(0 if random_state is None else random_state)
    drawn = importance_posterior(posterior.scale_prior, scale.n_obs, scale.quad, n_samples, generator=generator)
    return replace(posterior, scale=drawn)


def _target(prior: ScalePrior, n_obs: int, quad: Tensor, mode: float, offset: Tensor) -> Tensor:
    """Log of prior times likelihood in log s, less the likelihood's value at the mode."""
    likelihood = -n_obs / 2 * offset - quad * math.exp(-mode) / 2 * torch.expm1(-offset)
    return prior._log_prob_u(mode + offset) + likelihood


def _proposal(prior: ScalePrior, n_obs: int, quad: Tensor) -> tuple[float, float]:
    """Shape of the inverse gamma proposal, and log of its mode in log s."""
    low, centre, high = (t.item() for t in find_range(prior, n_obs / 2, quad.reshape(1), 0.5))
    # Half a nat down is one standard deviation where the density is Gaussian.
    width = (high - low) / 2
    h = CURVATURE_STEP * width
    steps = torch.tensor([-2 * h, -h, 0.0, h, 2 * h], dtype=torch.float64, device=quad.device)
    value = _target(prior, n_obs, quad, centre, steps)
    weights = value.new_tensor([1.0, -16.0, 30.0, -16.0, 1.0]) / (12 * h * h)
    curvature = (weights * value).sum().item()
    # A density with a kink or a plateau at its mode has no curvature to speak of: the width decides.
    if not (math.isfinite(curvature) and 0.25 < curvature * width * width < 4):
        curvature = 1 / width**2
    return curvature, centre


def pareto_shape(log_weights: np.ndarray) -> float:
    """Return the shape of the generalised Pareto law of the largest weights.

    Parameters
    ----------
    log_weights : ndarray of shape (n,)
        Logarithms of the weights, 25 or more, up to a constant.

    Returns
    -------
    float
        -inf if the largest weights are equal to rounding.

    Notes
    -----
    The estimator of Zhang and Stephens (2009) on the ceil(min(n/5, 3 sqrt(n))) largest weights, drawn towards
    1/2 by ten pseudo-observations, as in Vehtari et al. (2024).

    References
    ----------
    .. [1] J. Zhang, M. A. Stephens, "A New and Efficient Estimation Method for the Generalized Pareto Distribution",
       Technometrics 2009.
    """
    n = len(log_weights)
    n_tail = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    ordered = np.exp(np.sort(log_weights)[-n_tail - 1 :] - log_weights.max())
    excess = ordered[1:] - ordered[0]
    if ordered[-1] - ordered[0] <= 1e-10:
        return -math.inf
    # Weights that tie with the threshold carry no information about the tail.
    excess = np.maximum(excess, np.finfo(float).tiny)
    m = 30 + int(math.sqrt(n_tail))
    theta = 1 / excess[-1] + (1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))) / (3 * excess[int(n_tail / 4 + 0.5) - 1])
    shapes = np.log1p(-theta[:, None] * excess).mean(1)
    log_likelihood = n_tail * (np.log(-theta / shapes) - shapes - 1)
    weights = special.softmax(log_likelihood)
    k = float(np.log1p(-(weights @ theta) * excess).mean())
    return (n_tail * k + 10 * 0.5) / (n_tail + 10)
