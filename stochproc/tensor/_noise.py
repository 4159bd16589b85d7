"""The precision of the noise: a gamma posterior, or a number that was given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import digamma, gammaln

__all__ = ["Noise"]

# Shape and rate of the prior of the precision, in units of scaled y: next to no information.
PRIOR_SHAPE = PRIOR_RATE = 1e-3


@dataclass
class Noise:
    """q(tau) = Gamma(a, b), shape and rate; ``fixed`` is a known precision instead."""

    a: float = 1.0
    b: float = 1.0
    fixed: float | None = None

    @property
    def precision(self) -> float:
        """E[tau]."""
        return self.a / self.b if self.fixed is None else self.fixed

    def update(self, n: float | int, squares: float) -> None:
        """Set q(tau) for n rows whose expected weighted squared residuals sum to ``squares``."""
        self.a = PRIOR_SHAPE + 0.5 * n
        # Rounding may leave a sum of squares that is zero in exact arithmetic below it.
        self.b = PRIOR_RATE + 0.5 * max(squares, 0.0)

    def expected_log_likelihood(self, n: float | int, squares: float, log_weights: float) -> float:
        """E log p(y | f, tau) for n rows with these squares; ``log_weights`` is the sum of log w."""
        log_precision = digamma(self.a) - math.log(self.b) if self.fixed is None else math.log(self.fixed)
        return 0.5 * (n * (log_precision - math.log(2 * math.pi)) + log_weights - self.precision * squares)

    def divergence(self) -> float:
        """KL(q || prior); 0 if the precision is known."""
        if self.fixed is not None:
            return 0.0
        a0, b0 = PRIOR_SHAPE, PRIOR_RATE
        return float(
            (self.a - a0) * digamma(self.a)
            - gammaln(self.a)
            + gammaln(a0)
            + a0 * (math.log(self.b) - math.log(b0))
            + self.a * (b0 - self.b) / self.b
        )
