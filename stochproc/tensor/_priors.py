"""Priors of the functions of a mode, and their posterior given messages: Markov in a coordinate, or by category."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.kernels import Kernel, Scale, StateSpace
from stochproc.solvers import cholesky_or_raise, kalman_smoother, sample_paths
from stochproc.tensor._packed import pack, unpack
from stochproc.tensor._spanned import features, spanned_posterior

__all__ = ["DiscretePrior", "FunctionPrior", "MarkovPrior", "Posterior"]

# Spread of the log-normal priors of hyperparameters around their start, in nats.
LOG_SPREAD = 0.7
# The same where a variance says how much a component is needed.
ARD_LOG_SPREAD = 10.0
# A variance is searched within these factors of its start.
VARIANCE_RANGE = (1e-8, 1e4)


class Posterior(NamedTuple):
    """Moments of the functions of a mode at some points, and the evidence of the messages."""

    mean: Float[Tensor, "m r"]
    cov: Float[Tensor, "m p"]
    """Covariances of the functions at one point, packed."""
    log_z: Float[Tensor, ""]
    """Log of the prior expectation of the product of all messages; differentiable in the hyperparameters."""


class FunctionPrior(torch.nn.Module):
    """Independent zero-mean processes, one a component, with variances ``variance`` (R,).

    Subclasses say how the values at different points hang together.
    """

    log_variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._starts: dict[str, tuple[Tensor, float, tuple[float, float]]] = {}

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.variance.shape[0]

    @property
    def variance(self) -> Float[Tensor, " r"]:
        """Variance of each component."""
        raise NotImplementedError

    @property
    def numbers_a_point(self) -> int:
        """About how many numbers a smoother holds for each point."""
        return self.rank**2

    def posterior(
        self,
        points: Float[Tensor, " n"],
        Lam: Float[Tensor, "n p"],
        eta: Float[Tensor, "n r"],
        query: Tensor | None = None,
    ) -> Posterior:
        """Condition on messages exp(eta' u - u' Lam u / 2), Lam packed; moments at ``query`` or at the points."""
        raise NotImplementedError

    def joint(
        self, points: Float[Tensor, " n"], Lam: Float[Tensor, "n p"], eta: Float[Tensor, "n r"], query: Tensor
    ) -> tuple[Float[Tensor, "m r"], Float[Tensor, "m m r r"]]:
        """Posterior means at ``query``, and covariances at every pair of its points."""
        raise NotImplementedError

    def evidence(
        self, points: Float[Tensor, " n"], lam: Float[Tensor, "c n"], eta: Float[Tensor, "c n"]
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, "c n"]]:
        """Evidence and posterior means of the first component alone, for c sets of scalar messages."""
        raise NotImplementedError

    def sample(self, points: Tensor, n_samples: int, generator: torch.Generator) -> Float[Tensor, "s n r"]:
        """Draw the functions jointly at points in ascending order."""
        raise NotImplementedError

    def keep(self, components: Tensor) -> None:
        """Drop all other components."""
        raise NotImplementedError

    def learn_from(self, names: dict[str, tuple[float, tuple[float, float]]]) -> None:
        """Mark parameters as learned: name -> (prior spread of the logarithm, allowed range)."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)
            if name in names:
                spread, allowed = names[name]
                self._starts[name] = (parameter.detach().clone(), spread, allowed)

    def search_record(self) -> dict[str, tuple[Tensor, float, tuple[float, float]]]:
        """Where the search for each learned parameter started, the spread of its prior, and its range."""
        return dict(self._starts)

    def note_search(self, name: str, start: Tensor, spread: float, allowed: tuple[float, float]) -> None:
        """Undo ``search_record`` for one parameter."""
        self._starts[name] = (start, spread, allowed)

    def resume(self) -> None:
        """Learn again what was learned."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._starts)

    def learned(self) -> dict[str, Tensor]:
        """Parameters that are learned, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def bounds(self, name: str) -> tuple[float, float]:
        """Bounds of the logarithm of a learned parameter."""
        low, high = self._starts[name][2]
        return math.log(low), math.log(high)

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the learned hyperparameters, up to a constant: normal in the logarithms."""
        total = self.variance.new_zeros(())
        for name, parameter in self.learned().items():
            start, spread, _ = self._starts[name]
            total = total - 0.5 * ((parameter - start) / spread).square().sum()
        return total


class MarkovPrior(FunctionPrior):
    """Processes in one coordinate with a state-space form.

    Parameters
    ----------
    kernel : Kernel
        With a state space and variance of about 1; copied.
    variance : Tensor of shape (R,)
    shared : bool
        Whether all components have one kernel, or each a copy whose hyperparameters are its own.
    method : str
        See ``kalman_smoother``.
    """

    def __init__(self, kernel: Kernel, variance: Float[Tensor, " r"], *, shared: bool, method: str) -> None:
        super().__init__()
        self.shared, self.method = shared, method
        if shared:
            parts = [Scale(copy.deepcopy(kernel), variance[:, None], batch_shape=(len(variance),))]
        else:
            parts = [Scale(copy.deepcopy(kernel), v) for v in variance]
        self._parts = torch.nn.ModuleList(part.double() for part in parts)

    @classmethod
    def of_parts(cls, parts: Sequence[Scale], *, shared: bool, method: str) -> MarkovPrior:
        """Rebuild a prior from its ``parts``."""
        new = cls.__new__(cls)
        FunctionPrior.__init__(new)
        new.shared, new.method = shared, method
        new._parts = torch.nn.ModuleList(part.double() for part in parts)
        return new

    @property
    def parts(self) -> list[Scale]:
        """One kernel times the variances of all components, or one each."""
        return list(self._parts)  # type: ignore[arg-type]

    @property
    def variance(self) -> Float[Tensor, " r"]:
        """Variance of each component."""
        return torch.cat([part.outputscale.flatten() for part in self.parts])

    @property
    def numbers_a_point(self) -> int:
        """See :attr:`FunctionPrior.numbers_a_point`: states and their covariances, filtered, smoothed and between."""
        return self.rank**2 if self._spanned else 10 * self.state_space().state_dim ** 2

    @property
    def kernels(self) -> list[Kernel]:
        """The kernel of all components, or one each."""
        return [part.kernel for part in self.parts]

    def state_space(self) -> StateSpace:
        """All components as the outputs of one process."""
        if self.shared:
            return self.parts[0].state_space().join()
        return StateSpace.stack([part.state_space() for part in self.parts])

    @property
    def _spanned(self) -> bool:
        """Whether a state at one time determines everything: weights then take the place of a filter."""
        return all(part.state_space().noiseless for part in self.parts)

    def _features(self, points: Tensor, *more: Tensor) -> list[list[Tensor]]:
        """Features of each component, (n, q) each, at the points and at each of ``more``."""
        everywhere = torch.cat([points, *more])
        found = []
        for part in self.parts:
            phi = features(part.kernel.state_space(), everywhere, everywhere.min())
            found += [phi * scale.sqrt() for scale in part.outputscale.flatten()]
        sizes = [len(points), *(len(m) for m in more)]
        return [list(parts) for parts in zip(*(phi.split(sizes) for phi in found), strict=True)]

    def posterior(self, points: Tensor, Lam: Tensor, eta: Tensor, query: Tensor | None = None) -> Posterior:
        """See :meth:`FunctionPrior.posterior`."""
        if self._spanned:
            at_points, at_query = self._features(points, points[:0] if query is None else query)
            law = spanned_posterior(at_points, unpack(Lam, self.rank), eta)
            at = at_points if query is None else at_query
            with torch.no_grad():
                return Posterior(law.mean(at).detach(), pack(law.covariances(at)).detach(), law.log_z)
        found = kalman_smoother(
            self.state_space(), points, unpack(Lam, self.rank), eta, query=query, method=self.method
        ).unwrap()
        return Posterior(found.mean, pack(found.cov), found.log_z)

    def joint(self, points: Tensor, Lam: Tensor, eta: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FunctionPrior.joint`."""
        if self._spanned:
            at_points, at_query = self._features(points, query)
            law = spanned_posterior(at_points, unpack(Lam, self.rank), eta)
            return law.mean(at_query), law.covariances(at_query, at_query)
        found = kalman_smoother(
            self.state_space(), points, unpack(Lam, self.rank), eta, query=query, method=self.method
        ).unwrap()
        return found.mean, found.joint_cov().transpose(1, 2)

    def evidence(self, points: Tensor, lam: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FunctionPrior.evidence`."""
        alone = copy.deepcopy(self)
        alone.keep(torch.zeros(1, dtype=torch.int64, device=points.device))
        if self._spanned:
            (at_points,) = alone._features(points)
            laws = [spanned_posterior(at_points, l[:, None, None], e[:, None]) for l, e in zip(lam, eta, strict=True)]
            return torch.stack([law.log_z for law in laws]), torch.stack([law.mean(at_points)[:, 0] for law in laws])
        found = kalman_smoother(
            alone.state_space(), points, lam[..., None, None], eta[..., None], method=self.method
        ).unwrap()
        return found.log_z, found.mean[..., 0]

    def sample(self, points: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`FunctionPrior.sample`."""
        return sample_paths(self.state_space(), points, n_samples, generator=generator)

    def keep(self, components: Tensor) -> None:
        """See :meth:`FunctionPrior.keep`."""
        if not self.shared:
            kept, starts = components.tolist(), self._starts
            self._parts = torch.nn.ModuleList(self.parts[j] for j in kept)
            # Names count the components.
            self._starts = {
                f"_parts.{new}.{name.split('.', 2)[2]}": start
                for new, old in enumerate(kept)
                for name, start in starts.items()
                if name.startswith(f"_parts.{old}.")
            }
            return
        old = self.parts[0]
        new = Scale(old.kernel, old.outputscale.detach()[components], batch_shape=(len(components),)).double()
        new.log_outputscale.requires_grad_(old.log_outputscale.requires_grad)
        self._parts = torch.nn.ModuleList([new.to(old.log_outputscale.device)])
        for name, (start, spread, allowed) in self._starts.items():
            if name.endswith("log_outputscale"):
                self._starts[name] = (start[components], spread, allowed)


class DiscretePrior(FunctionPrior):
    """Independent values for each category; points are the numbers of the categories.

    Parameters
    ----------
    variance : Tensor of shape (R,)
    """

    def __init__(self, variance: Float[Tensor, " r"]) -> None:
        super().__init__()
        self.log_variance = torch.nn.Parameter(variance.double().log())

    @property
    def variance(self) -> Float[Tensor, " r"]:
        """Variance of each component."""
        return self.log_variance.exp()

    def posterior(self, points: Tensor, Lam: Tensor, eta: Tensor, query: Tensor | None = None) -> Posterior:
        """See :meth:`FunctionPrior.posterior`; a query that is no point has the law of the prior."""
        # With D = diag(variance): log Z = eta' V eta / 2 - log det(I + D^1/2 Lam D^1/2) / 2, V = (1/D + Lam)^-1.
        root = self.variance.sqrt()
        matrix = root[:, None] * unpack(Lam, self.rank) * root
        eye = torch.eye(self.rank, dtype=eta.dtype, device=eta.device)
        L = cholesky_or_raise(eye + 0.5 * (matrix + matrix.mT), "the precision of a category")
        cov = root[:, None] * torch.cholesky_solve(eye.expand_as(L), L) * root
        mean = (cov @ eta[..., None])[..., 0]
        log_z = 0.5 * (eta * mean).sum() - L.diagonal(dim1=-2, dim2=-1).log().sum()
        mean, cov = mean.detach(), pack(cov.detach())
        if query is None:
            return Posterior(mean, cov, log_z)
        where = torch.searchsorted(points, query).clamp(max=len(points) - 1)
        known = points[where] == query
        prior = pack(torch.diag(self.variance.detach()))
        return Posterior(
            torch.where(known[:, None], mean[..., where, :], 0.0),
            torch.where(known[:, None], cov[where], prior),
            log_z,
        )

    def joint(self, points: Tensor, Lam: Tensor, eta: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FunctionPrior.joint`; different categories are independent."""
        found = self.posterior(points, Lam, eta, query)
        m, r = found.mean.shape
        cov = found.mean.new_zeros(m, m, r, r)
        cov[range(m), range(m)] = unpack(found.cov, r)
        return found.mean, cov

    def evidence(self, points: Tensor, lam: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FunctionPrior.evidence`."""
        variance = self.variance[0].detach()
        mean = variance * eta / (1 + variance * lam)
        return (0.5 * eta * mean - 0.5 * (variance * lam).log1p()).sum(-1), mean

    def sample(self, points: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """See :meth:`FunctionPrior.sample`."""
        shape = (n_samples, len(points), self.rank)
        noise = torch.randn(shape, dtype=torch.float64, device=self.log_variance.device, generator=generator)
        return noise * self.variance.detach().sqrt()

    def keep(self, components: Tensor) -> None:
        """See :meth:`FunctionPrior.keep`."""
        learned = self.log_variance.requires_grad
        self.log_variance = torch.nn.Parameter(self.log_variance.detach()[components], requires_grad=learned)
        self._starts = {name: (s[components], spread, allowed) for name, (s, spread, allowed) in self._starts.items()}
