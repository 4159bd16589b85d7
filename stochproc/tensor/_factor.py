"""The functions of one mode: their prior, the messages about them, and their posterior at the known points."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.tensor._hyperparameters import improve
from stochproc.tensor._packed import multiplicity, outer, pack, size, unpack
from stochproc.tensor._priors import FunctionPrior, Posterior

__all__ = ["Factor"]

# Values of functions whose joint covariance is factored for draws.
_JOINT_UP_TO = 1000
# Numbers that smoothers of many query points or of several draws may hold at once.
_NUMBERS_AT_ONCE = 1 << 24


@dataclass
class Factor:
    """q(u) of one mode. ``mean`` and ``cov`` may be a start that no messages stand for."""

    prior: FunctionPrior
    points: Float[Tensor, " n"]
    """Distinct coordinates in ascending order."""
    mean: Float[Tensor, "n r"]
    cov: Float[Tensor, "n p"]
    Lam: Float[Tensor, "n p"]
    eta: Float[Tensor, "n r"]
    log_z: float = 0.0
    curvature: list[float] = field(default_factory=list)
    """Of log Z in a single learned hyperparameter, kept from one sweep to the next."""

    @classmethod
    def from_means(cls, prior: FunctionPrior, points: Tensor, mean: Tensor, variance: float) -> Factor:
        """Start from given functions with equal variances and no messages."""
        n, rank = mean.shape
        eye = torch.eye(rank, dtype=mean.dtype, device=mean.device)
        cov = pack(variance * eye).expand(n, -1).clone()
        return cls(prior, points, mean.clone(), cov, mean.new_zeros(n, size(rank)), mean.new_zeros(n, rank))

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.mean.shape[1]

    @property
    def second(self) -> Float[Tensor, "n p"]:
        """Packed second moments E[u u']."""
        return self.cov + outer(self.mean)

    def absorb(self, Lam: Tensor, eta: Tensor, *, learn: bool) -> None:
        """Take the place of all messages, learn hyperparameters from them, and smooth."""
        if learn and self.prior.learned():
            found = improve(self.prior, self.points, Lam, eta, self.curvature)
        else:
            with torch.no_grad():
                found = self.prior.posterior(self.points, Lam, eta)
        self.Lam, self.eta = Lam, eta
        self.mean, self.cov, self.log_z = found.mean, found.cov, float(found.log_z)

    def divergence(self) -> float:
        """KL(q || prior) of the whole functions, for the messages and hyperparameters in place."""
        weight = multiplicity(self.rank, self.mean)
        explained = (self.eta * self.mean).sum() - 0.5 * (self.Lam * self.second @ weight).sum()
        return float(explained) - self.log_z

    def at(self, query: Float[Tensor, " m"]) -> Posterior:
        """Posterior at any points, distinct and in ascending order."""
        # Some at a time: with as many as there are points, the points are smoothed at most as often as the queries.
        size = max(1, len(self.points), _NUMBERS_AT_ONCE // self.prior.numbers_a_point)
        with torch.no_grad():
            found = [self.prior.posterior(self.points, self.Lam, self.eta, some) for some in query.split(size)]
        return Posterior(torch.cat([f.mean for f in found]), torch.cat([f.cov for f in found]), found[0].log_z)

    def draw(self, query: Float[Tensor, " m"], n_samples: int, generator: torch.Generator) -> Float[Tensor, "s m r"]:
        """Draw the functions jointly at distinct points in ascending order.

        At few points from their joint normal law; else as a path of the prior, corrected: given a path u0 and fake
        observations about it with the precisions of the messages, the smoothed difference between messages and fakes
        added to u0 has the law of the posterior (Matheron's rule), at a smoother a draw.
        """
        if len(query) * self.rank <= _JOINT_UP_TO:
            mean, cov = self.joint(query)
            whole = cov.permute(0, 2, 1, 3).reshape(mean.numel(), mean.numel())
            noise = torch.randn(n_samples, mean.numel(), dtype=mean.dtype, device=mean.device, generator=generator)
            return mean + (noise @ _root(0.5 * (whole + whole.mT)).mT).reshape(n_samples, *mean.shape)
        size = max(1, _NUMBERS_AT_ONCE // ((len(self.points) + len(query)) * self.prior.numbers_a_point))
        pieces = [min(size, n_samples - start) for start in range(0, n_samples, size)]
        return torch.cat([self._corrected_paths(query, some, generator) for some in pieces])

    def _corrected_paths(self, query: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        both, order = torch.cat([self.points, query]).unique(return_inverse=True)
        at_points, at_query = order[: len(self.points)], order[len(self.points) :]
        paths = self.prior.sample(both, n_samples, generator)
        Lam = unpack(self.Lam, self.rank)
        noise = torch.randn(n_samples, *self.eta.shape, dtype=paths.dtype, device=paths.device, generator=generator)
        fake = (Lam @ paths[:, at_points, :, None] + _root(Lam) @ noise[..., None])[..., 0]
        with torch.no_grad():
            shift = self.prior.posterior(self.points, self.Lam, self.eta - fake, both[at_query])
        return paths[:, at_query] + shift.mean

    def joint(self, query: Float[Tensor, " m"]) -> tuple[Float[Tensor, "m r"], Float[Tensor, "m m r r"]]:
        """Posterior means, and covariances of the functions at every pair of distinct points in ascending order."""
        with torch.no_grad():
            return self.prior.joint(self.points, self.Lam, self.eta, query)

    def insert(self, points: Tensor) -> Tensor:
        """Merge new points without messages into the grid; return where the old ones are now."""
        both, order = torch.cat([self.points, points]).unique(return_inverse=True)
        old = order[: len(self.points)]
        if len(both) > len(self.points):
            with torch.no_grad():
                found = self.prior.posterior(self.points, self.Lam, self.eta, both)
            Lam, eta = self.Lam.new_zeros(len(both), self.Lam.shape[1]), self.eta.new_zeros(len(both), self.rank)
            Lam[old], eta[old] = self.Lam, self.eta
            self.points, self.Lam, self.eta = both, Lam, eta
            self.mean, self.cov = found.mean, found.cov
        return old

    def keep(self, components: Tensor) -> None:
        """Drop all other components, and what the messages say about them."""

        def part(packed: Tensor) -> Tensor:
            return pack(unpack(packed, self.rank)[:, components][:, :, components])

        self.Lam, self.cov = part(self.Lam), part(self.cov)
        self.mean, self.eta = self.mean[:, components], self.eta[:, components]
        self.prior.keep(components)
        self.curvature.clear()


def _root(matrix: Tensor) -> Tensor:
    """Return R with R R' = matrix, for semidefinite matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]
