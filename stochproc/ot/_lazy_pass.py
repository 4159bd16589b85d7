"""Transport between point clouds without their cost matrix: every sweep recomputes it block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochproc.kernels import logsumexp, softmax_pass

__all__ = ["LazyPasses", "LazyPoint", "Mode"]

Pattern = tuple[Tensor, Tensor, Tensor, Tensor]
# Column sums below this may have lost terms to the floor of the exponential.
TINY = {torch.float32: 1e-35, torch.float64: 1e-300}


@dataclass(frozen=True, eq=False)
class Mode:
    """How a sweep is made: which pairs, in which precision."""

    single: bool = False
    ranges: Pattern | None = None

    @property
    def exact(self) -> bool:
        """Whether the sweep is over all pairs in float64."""
        return not self.single and self.ranges is None


class LazyPoint:
    """What a sweep at a potential g of the columns knows; the rows of its plan are exact."""

    def __init__(self, passes: LazyPasses, g: Tensor, eps: float, mode: Mode) -> None:
        self.passes, self.g, self.eps, self.mode = passes, g, eps, mode
        out = passes.sweep(g, eps, mode)
        self.f, self.c = -eps * out.lse, out.mass
        self.phi = float(passes.a @ self.f + passes.b @ g)
        self.err = float((self.c - passes.b).abs().sum())

    def log_ratio(self) -> Tensor:
        """Return log b - log c, finite however small c is."""
        passes, mode = self.passes, self.mode
        ratio = passes.b.log() - self.c.log()
        X, Y = passes.points(mode)
        lost = (self.c < TINY[X.dtype]).nonzero().squeeze(1)
        if len(lost):
            height = (self.f + self.eps * passes.a.log()).to(X.dtype)
            soft = logsumexp(passes.flipped, Y[lost], X, height, eps=self.eps, backend="chunked").double()
            ratio[lost] = -soft - self.g[lost] / self.eps
        return ratio

    def diagonal(self) -> Tensor:
        """Return an upper bound of the diagonal of S; the mass that columns share with themselves takes a sweep."""
        return self.c

    def product(self, p: Tensor) -> Tensor:
        """Multiply by S = diag(c) - P^T diag(1/a) P, in one sweep."""
        out = self.passes.sweep(self.g, self.eps, self.mode, p)
        return self.c * p - out.PtKv.squeeze(1)


class LazyPasses:
    """Sweeps over the pairs of two point clouds."""

    def __init__(self, X: Tensor, Y: Tensor, a: Tensor, b: Tensor, metric: Any) -> None:
        self.X, self.Y, self.a, self.b, self.metric = X, Y, a, b, metric
        self.log_b = b.log()
        self.flipped = metric if isinstance(metric, str) else lambda q, p: metric(p, q).mT
        self._single: tuple[Tensor, Tensor] | None = None

    def points(self, mode: Mode) -> tuple[Tensor, Tensor]:
        """Return both clouds in the precision of a mode."""
        if not mode.single:
            return self.X, self.Y
        if self._single is None:
            self._single = self.X.float(), self.Y.float()
        return self._single

    def at(self, g: Tensor, eps: float, mode: Mode) -> LazyPoint:
        """Sweep at g, with the constant that the plan does not depend on taken out."""
        g = g - self.b @ g
        return LazyPoint(self, g, eps, mode)

    def sweep(self, g: Tensor, eps: float, mode: Mode, v: Tensor | None = None) -> Any:
        X, Y = self.points(mode)
        return softmax_pass(
            self.metric,
            X,
            Y,
            g + eps * self.log_b,
            self.a,
            eps=eps,
            v=None if v is None else v.unsqueeze(1),
            gram=v is not None,
            ranges=mode.ranges,
            backend="auto" if X.is_cuda else "chunked",
        )
