"""What the smoother returns: moments of the outputs at once, those of the states when asked for."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.solvers._kalman_algebra import product, transpose
from stochproc.solvers._kalman_gradient import Run
from stochproc.solvers._kalman_joint import joint_covariance, left_out

__all__ = ["Smoothed"]


@dataclass(frozen=True, eq=False)
class Smoothed:
    r"""Posterior of a state-space model given messages.

    Attributes
    ----------
    mean : Tensor of shape (\*batch, m, r)
        Posterior means of the outputs H x at the query, or at ``times`` where there was none. Detached.
    cov : Tensor of shape (\*batch, m, r, r)
        Posterior covariances of the outputs at one time. Detached.
    log_z : Tensor of shape (\*batch,)
        Logarithm of the prior expectation of the product of all messages, in nats; differentiable.
    times : Tensor of shape (\*batch, n)
        The times of the states: data and query in ascending order, a query after the data of its time.
    positions : Tensor of shape (\*batch, m), int64
        Where in ``times`` the rows of ``mean`` and ``cov`` are.

    Notes
    -----
    Moments of the states at ``times`` are computed when first asked for, detached, and then kept; each takes the
    memory of its own size. States are relative to the constant prior mean of the outputs, which ``mean`` alone
    includes.
    """

    mean: Float[Tensor, "*batch m r"]
    cov: Float[Tensor, "*batch m r r"]
    log_z: Float[Tensor, "*batch"]
    times: Float[Tensor, "*batch n"]
    positions: Tensor
    _run: Run = field(repr=False)

    @cached_property
    def state_mean(self) -> Float[Tensor, "*batch n D"]:
        r"""Smoothed means of the states, (\*batch, n, D)."""
        P, m = self._split(self._run.filtered.states[1:])
        _, r = self._split(self._run.of_filtered)
        return self._join((m + product(P, r)).squeeze(-2))

    @cached_property
    def state_cov(self) -> Float[Tensor, "*batch n D D"]:
        r"""Smoothed covariances of the states, (\*batch, n, D, D)."""
        P, _ = self._split(self._run.filtered.states[1:])
        N, _ = self._split(self._run.of_filtered)
        return self._join(_symmetric(P - product(product(P, N), P)))

    @cached_property
    def filtered_mean(self) -> Float[Tensor, "*batch n D"]:
        r"""Means of the states given the messages up to and including their time, (\*batch, n, D)."""
        return self._join(self._split(self._run.filtered.states[1:])[1].squeeze(-2))

    @cached_property
    def filtered_cov(self) -> Float[Tensor, "*batch n D D"]:
        r"""Covariances of the states given the messages up to and including their time, (\*batch, n, D, D)."""
        return self._join(self._split(self._run.filtered.states[1:])[0])

    @cached_property
    def predicted_mean(self) -> Float[Tensor, "*batch n D"]:
        r"""Means of the states given the messages before them in ``times``, (\*batch, n, D)."""
        _, m = self._split(self._run.filtered.states[:-1])
        return self._join(product(self._run.model.A, m).squeeze(-2))

    @cached_property
    def predicted_cov(self) -> Float[Tensor, "*batch n D D"]:
        r"""Covariances of the states given the messages before them in ``times``, (\*batch, n, D, D)."""
        return self._join(self._predicted_cov())

    @cached_property
    def lag_one_cov(self) -> Float[Tensor, "*batch steps D D"]:
        r"""Smoothed covariances of each state (rows) with the next (columns), (\*batch, n - 1, D, D)."""
        A = self._run.model.A
        P, _ = self._split(self._run.filtered.states[:-1])
        N, _ = self._split(self._run.of_predicted)
        PA = product(P, transpose(A))
        return self._join(PA - product(product(PA, N), self._predicted_cov()))[..., 1:, :, :]

    def joint_cov(self) -> Float[Tensor, "*batch m r m r"]:
        r"""Posterior covariances of the outputs at every pair of the times of ``mean``, (\*batch, m, r, m, r).

        O(n D³ + m² r² D) time and O(n D² + m² r²) memory, from what the smoother left; not kept.
        """
        positions = self.positions.expand(*self.log_z.shape, -1).reshape(-1, self.positions.shape[-1])
        found = joint_covariance(self._run, positions)
        return found.reshape(*self.log_z.shape, *found.shape[1:])

    def left_out(self) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n"]]:
        r"""Predictions of each observation from all others, for one output (r = 1).

        Returns
        -------
        D, u : Tensor of shape (\*batch, n)
            At ``times``: an observation with noise variance s² has, given all others, predictive variance s² / D and
            is off by s u / D.

        Raises
        ------
        ValueError
            If there are several outputs.
        """
        if self.mean.shape[-1] != 1:
            raise ValueError(f"left_out needs one output; this model has {self.mean.shape[-1]}.")
        D, u = left_out(self._run)
        return D.reshape(self.log_z.shape + D.shape[1:]), u.reshape(self.log_z.shape + u.shape[1:])

    def _predicted_cov(self) -> Tensor:
        A, Q = self._run.model.A, self._run.model.Q
        P, _ = self._split(self._run.filtered.states[:-1])
        return _symmetric(product(product(A, P), transpose(A)) + Q)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dim = self._run.blocks.dim
        matrix, vector = x.split((dim, 1), -2)
        return matrix, vector

    def _join(self, x: Tensor) -> Tensor:
        x = self._run.blocks.join(x)
        return x.reshape(*self.log_z.shape, *x.shape[1:])


def _symmetric(x: Tensor) -> Tensor:
    return torch.lerp(x, transpose(x), 0.5)
