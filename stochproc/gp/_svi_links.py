r"""From latent functions to classes: expected log likelihoods under q, and predicted probabilities.

Given a scale, the latent values at a point are independent normal ones. The softmax is averaged by Monte Carlo, with
one scale a draw for all classes and points; the links of one latent function and the robust maximum by quadrature.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice, check_positive
from stochproc.gp._svi_scale import Coupled, ScaleNodes

__all__ = [
    "LINK_NAMES",
    "BinaryLink",
    "LatentMarginals",
    "Link",
    "RobustMax",
    "ScaledGaussian",
    "Softmax",
    "as_link",
    "log_largest_of_each",
    "log_normal_cdf",
]

_SCALE_NODES = 21
_HERMITE_NODES = 32
# Predictions are averages over quasi-random normals; the last of these bits is kept from 0 and 1.
_SMALLEST_UNIFORM = 2.0**-31


class LatentMarginals(NamedTuple):
    """Latent law at points: f_c given s is N(g(s) mean_c, s variance_c), independent over classes.

    Parameters
    ----------
    mean : Tensor of shape (n_latent, n_points)
        Location before the factor g(s), which is sqrt(s) or 1.
    variance : Tensor of shape (n_latent, n_points)
        Variance before the scale, positive.
    """

    mean: Float[Tensor, "latent points"]
    variance: Float[Tensor, "latent points"]


class Link:
    """How classes depend on latent functions.

    A link writes ``n_latent``, ``expected`` (the weighted sum over points of E_q[log p(y | f)]), ``log_proba`` and
    ``first_step`` (gradient and curvature of log p(y | f) at f = 0, from which training starts).
    """

    def n_latent(self, n_classes: int) -> int:
        """Return the number of latent functions for so many classes."""
        return n_classes

    def expected(
        self,
        at: LatentMarginals,
        q: Coupled,
        y: Tensor,
        weight: Tensor,
        n_samples: int,
        generator: "torch.Generator | None",
    ) -> Float[Tensor, ""]:
        """Return the sum over points of weight times E_q[log p(y | f)]."""
        raise NotImplementedError

    def log_proba(self, at: LatentMarginals, q: Coupled, n_samples: int, seed: int) -> Float[Tensor, "points classes"]:
        """Return log probabilities of the classes, averaged over q; equal points get equal bits."""
        raise NotImplementedError(f"{type(self).__name__} has no probabilities of classes.")

    def first_step(self, y: Tensor, n_latent: int, scale: float) -> tuple[Float[Tensor, "latent points"], float]:
        """Return gradient and curvature of the log likelihood at f = 0."""
        raise NotImplementedError


class Softmax(Link):
    """p(y = c | f) proportional to exp(f_c), one latent function a class."""

    def expected(
        self,
        at: LatentMarginals,
        q: Coupled,
        y: Tensor,
        weight: Tensor,
        n_samples: int,
        generator: "torch.Generator | None",
    ) -> Float[Tensor, ""]:
        """Average over pairs of draws that mirror each other; see ``Link.expected``."""
        scales = q.draws(math.ceil(n_samples / 2), generator)
        shape = (len(at.mean), len(scales.weight), at.mean.shape[1])
        noise = torch.randn(shape, dtype=at.mean.dtype, generator=generator).to(at.mean.device)
        spread = at.variance.sqrt()
        location, width, share = (t.to(at.mean) for t in scales)
        normaliser = _ExpectedNormaliser.apply(at.mean, spread, location, width, share, noise, weight)
        own = at.mean.gather(0, y[None])[0]
        return (share @ location) * (weight @ own) - normaliser

    def log_proba(self, at: LatentMarginals, q: Coupled, n_samples: int, seed: int) -> Float[Tensor, "points classes"]:
        """Average over quasi-random draws; see ``Link.log_proba``."""
        z = quasi_normals(n_samples, len(at.mean) + 1, seed, at.mean)
        scales = q.at(z[:, 0].double(), z.new_full((n_samples,), 1 / n_samples))
        location, width = scales.location.to(z)[:, None], scales.spread.to(z)[:, None]
        f = [location * m + width * v.sqrt() * z[:, c + 1, None] for c, (m, v) in enumerate(zip(*at, strict=True))]
        each = torch.log_softmax(torch.stack(f), 0)
        return (torch.logsumexp(each, 1) - math.log(n_samples)).mT

    def first_step(self, y: Tensor, n_latent: int, scale: float) -> tuple[Float[Tensor, "latent points"], float]:
        """Label less 1/C, and (1 - 1/C)/C."""
        return _one_hot(y, n_latent) - 1 / n_latent, (1 - 1 / n_latent) / n_latent


class RobustMax(Link):
    """p(y = c | f) is 1 - eps where f_c is the largest, eps / (C - 1) elsewhere.

    Parameters
    ----------
    eps : float, default=1e-3
        Probability of a label at random, in (0, 1).

    Notes
    -----
    The probability that f_c is the largest is an integral in one dimension, done by 32 Gauss-Hermite nodes.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        check_positive("eps", eps)
        if eps >= 1:
            raise ValueError(f"eps must lie in (0, 1); got {eps}.")
        self.eps = eps

    def expected(
        self,
        at: LatentMarginals,
        q: Coupled,
        y: Tensor,
        weight: Tensor,
        n_samples: int,
        generator: "torch.Generator | None",
    ) -> Float[Tensor, ""]:
        """Integrate; see ``Link.expected``."""
        largest = log_largest(at, _scale_free(q), y).exp()
        wrong = math.log(self.eps / (len(at.mean) - 1))
        return weight @ (wrong + (math.log1p(-self.eps) - wrong) * largest)

    def log_proba(self, at: LatentMarginals, q: Coupled, n_samples: int, seed: int) -> Float[Tensor, "points classes"]:
        """Integrate; see ``Link.log_proba``."""
        largest = log_largest_of_each(at, _scale_free(q)).exp()
        rest = self.eps / (len(at.mean) - 1)
        return (largest * (1 - self.eps) + (1 - largest) * rest).log()

    def first_step(self, y: Tensor, n_latent: int, scale: float) -> tuple[Float[Tensor, "latent points"], float]:
        """Those of the softmax: a step function has neither."""
        return Softmax().first_step(y, n_latent, scale)


class BinaryLink(Link):
    """Two classes and one latent function, p(y = 1 | f) = sigma(f) with sigma(-f) = 1 - sigma(f).

    Parameters
    ----------
    name : {"logit", "probit"}
    """

    def __init__(self, name: str) -> None:
        check_choice("name", name, ("logit", "probit"))
        self.name = name

    def log_sigma(self, f: Tensor) -> Tensor:
        """Logarithm of sigma, exact in both tails."""
        return torch.nn.functional.logsigmoid(f) if self.name == "logit" else log_normal_cdf(f)

    def n_latent(self, n_classes: int) -> int:
        """One latent function; ValueError unless there are two classes."""
        if n_classes != 2:
            raise ValueError(f"a binary link needs exactly 2 classes; got {n_classes}. Use link='softmax'.")
        return 1

    def expected(
        self,
        at: LatentMarginals,
        q: Coupled,
        y: Tensor,
        weight: Tensor,
        n_samples: int,
        generator: "torch.Generator | None",
    ) -> Float[Tensor, ""]:
        """Integrate over f and s; see ``Link.expected``."""
        f, share = self._values(at, q)
        sign = 2 * y.to(f) - 1
        return weight @ torch.einsum("sh,shb->b", share, self.log_sigma(f * sign))

    def log_proba(self, at: LatentMarginals, q: Coupled, n_samples: int, seed: int) -> Float[Tensor, "points classes"]:
        """Integrate over f and s; see ``Link.log_proba``."""
        f, share = self._values(at, q)
        log_share = share.log()[..., None]
        return torch.stack([torch.logsumexp(log_share + self.log_sigma(f * k), (0, 1)) for k in (-1, 1)], 1)

    def first_step(self, y: Tensor, n_latent: int, scale: float) -> tuple[Float[Tensor, "latent points"], float]:
        """Slope and curvature of log sigma at 0."""
        slope, curvature = (0.5, 0.25) if self.name == "logit" else (math.sqrt(2 / math.pi), 2 / math.pi)
        return (2 * y.to(torch.float64) - 1)[None] * slope, curvature

    @staticmethod
    def _values(at: LatentMarginals, q: Coupled) -> tuple[Float[Tensor, "s h points"], Float[Tensor, "s h"]]:
        scales = q.nodes(_SCALE_NODES)
        location, width, share = (t.to(at.mean) for t in scales)
        x, h = hermite(at.mean)
        f = location[:, None, None] * at.mean[0] + width[:, None, None] * x[:, None] * at.variance[0].sqrt()
        return f, share[:, None] * h


class ScaledGaussian(Link):
    r"""Real targets with noise inside the scale, y | f, s is N(f, s noise): everything in closed form.

    Parameters
    ----------
    noise : float
        Variance relative to s, positive.
    """

    def __init__(self, noise: float) -> None:
        check_positive("noise", noise)
        self.noise = noise

    def expected(
        self,
        at: LatentMarginals,
        q: Coupled,
        y: Tensor,
        weight: Tensor,
        n_samples: int,
        generator: "torch.Generator | None",
    ) -> Float[Tensor, ""]:
        """Closed form with E[log s], E[1/s] and E[s^-1/2]; targets have the shape of the latent values."""
        family = q.family
        inverse, half, log_s = (
            t.to(at.mean) for t in (family.inverse_moment(1.0), family.inverse_moment(0.5), family.mean_log())
        )
        if q.scaled:
            square = y.square() * inverse - 2 * half * y * at.mean + at.mean.square()
        else:
            square = inverse * (y - at.mean).square()
        each = -(square + at.variance) / (2 * self.noise) - (log_s + math.log(2 * math.pi * self.noise)) / 2
        return weight @ each.sum(0)

    def first_step(self, y: Tensor, n_latent: int, scale: float) -> tuple[Float[Tensor, "latent points"], float]:
        """Those of the normal density at this scale."""
        return y / (scale * self.noise), 1 / (scale * self.noise)


#: Links of classes by name.
_BY_NAME: dict[str, Callable[[], Link]] = {
    "softmax": Softmax,
    "robustmax": RobustMax,
    "logit": lambda: BinaryLink("logit"),
    "probit": lambda: BinaryLink("probit"),
}
LINK_NAMES: tuple[str, ...] = tuple(_BY_NAME)


def as_link(link: Any) -> Link:
    """Return a link as it is, or a new one from its name.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if isinstance(link, Link):
        return link
    check_choice("link", link, LINK_NAMES)
    return _BY_NAME[link]()


def hermite(like: Tensor) -> tuple[Float[Tensor, " h"], Float[Tensor, " h"]]:
    """Nodes and weights of Gauss-Hermite quadrature under a standard normal law."""
    x, w = np.polynomial.hermite_e.hermegauss(_HERMITE_NODES)
    return torch.as_tensor(x).to(like), torch.as_tensor(w / w.sum()).to(like)


def quasi_normals(n: int, dimension: int, seed: int, like: Tensor) -> Float[Tensor, "n dimension"]:
    """Scrambled Sobol points as standard normals."""
    points = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    return torch.special.ndtri(points.clamp(_SMALLEST_UNIFORM, 1 - _SMALLEST_UNIFORM)).to(like)


def log_largest(at: LatentMarginals, scales: ScaleNodes, y: Tensor) -> Float[Tensor, " points"]:
    """Log probability that latent function y is the largest one of its point, averaged over scales."""
    location, width, share = (t.to(at.mean)[:, None, None] for t in scales)
    x, h = hermite(at.mean)
    std = at.variance.sqrt()
    own = location * at.mean.gather(0, y[None]) + width * x[:, None] * std.gather(0, y[None])
    below = sum(
        log_normal_cdf((own - location * m) / (width * s)).masked_fill(y == c, 0.0)
        for c, (m, s) in enumerate(zip(at.mean, std, strict=True))
    )
    return torch.logsumexp(below + share.log() + h.log()[:, None], (0, 1))


def log_largest_of_each(at: LatentMarginals, scales: ScaleNodes) -> Float[Tensor, "points classes"]:
    """Log probabilities that each latent function is the largest one; they sum to one, also where quadrature errs."""
    y = torch.zeros(at.mean.shape[1], dtype=torch.long, device=at.mean.device)
    each = torch.stack([log_largest(at, scales, torch.full_like(y, c)) for c in range(len(at.mean))], 1)
    return torch.log_softmax(each, 1)


def _scale_free(q: Coupled) -> ScaleNodes:
    """Nodes for which latent function is the largest: with a mean that grows as the spread, s does not matter."""
    return q.nodes(_SCALE_NODES) if not q.scaled else ScaleNodes(*torch.ones(3, 1, dtype=torch.float64))


def _one_hot(y: Tensor, n_classes: int) -> Float[Tensor, "classes points"]:
    return torch.nn.functional.one_hot(y, n_classes).mT.to(torch.float64)


def log_normal_cdf(f: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Logarithm of the standard normal distribution function, with a derivative that is exact in both tails."""
    value: Tensor = _LogNormalCdf.apply(f)
    return value


class _LogNormalCdf(torch.autograd.Function):
    """torch's own derivative is a quotient of exponentials, wrong from -1e4 on in float32 and infinite in the end."""

    @staticmethod
    def forward(ctx: Any, f: Tensor) -> Tensor:
        ctx.save_for_backward(f)
        return torch.special.log_ndtr(f)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (f,) = ctx.saved_tensors
        return grad * (math.sqrt(2 / math.pi) / torch.special.erfcx(f * -math.sqrt(0.5)))


class _ExpectedNormaliser(torch.autograd.Function):
    r"""Weighted sum over points of the average of log sum_c exp f_c, f = g m ± r s noise, with its gradient.

    Value and gradient come from one pass over the draws: :math:`d\log\sum_c e^{f_c} / df_c` is the softmax itself.
    The mirrored draw reuses noise and scale. Classes are the first axis, so that sums over them run over whole rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        std: Tensor,
        location: Tensor,
        width: Tensor,
        share: Tensor,
        noise: Tensor,
        weight: Tensor,
    ) -> Tensor:
        swing = noise * std[:, None]
        swing.mul_(width[:, None])
        centre = mean[:, None] * location[:, None]
        total = mean.new_zeros(())
        halves = []
        for f in (centre + swing, centre.sub_(swing)):
            # A softmax in place; its normaliser is the value.
            top = f.amax(0)
            f.sub_(top).exp_()
            mass = f.sum(0)
            f.div_(mass)
            total += share @ (mass.log_().add_(top) @ weight)
            halves.append(f)
        plus, minus = halves
        total /= 2
        if any(ctx.needs_input_grad):
            odd = (plus - minus).mul_(noise)
            even = plus.add_(minus)
            by_mean = torch.einsum("s,csb->cb", location * share, even)
            by_std = torch.einsum("s,csb->cb", width * share, odd)
            by_location = share * torch.einsum("csb,cb->s", even, mean * weight)
            by_width = share * torch.einsum("csb,cb->s", odd, std * weight)
            ctx.save_for_backward(by_mean.mul_(weight), by_std.mul_(weight), by_location, by_width)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *(g * (grad / 2) for g in ctx.saved_tensors), None, None, None
