"""Gaussian processes in state-space form: what a Kalman filter needs to know of a kernel of time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_finite, check_floating, check_positive
from stochproc.kernels._state_space_series import series_step

__all__ = ["StateSpace"]


class StateSpace:
    r"""A process :math:`f = H x` of a linear SDE :math:`dx = F x\,dt + L\,dB`, with B of spectral density Qc.

    Kernels make it, by :meth:`Kernel.state_space`; any other linear time-invariant SDE can be given by its
    matrices.

    Parameters
    ----------
    F : Tensor of shape (*batch, D, D)
        Drift matrix, per unit of time.
    L : Tensor of shape (*batch, D, q)
        Where the noise enters.
    Qc : Tensor of shape (*batch, q, q)
        Spectral density of the noise, symmetric positive semidefinite.
    H : Tensor of shape (r, D)
        Outputs of the state; a constant, free of hyperparameters.
    P0 : Tensor of shape (*batch, D, D)
        Covariance of the state at ``t0``, or at any time if the process is stationary.
    t0 : float, default=None
        Time at which the process starts; None for a stationary one, for which
        :math:`F P_0 + P_0 F^\top + L Q_c L^\top = 0`.
    name : str, default="this process"
        Used in error messages.

    Raises
    ------
    TypeError
        If a matrix is not a floating tensor.
    ValueError
        If the shapes do not fit, or a matrix or ``t0`` is not finite.

    Notes
    -----
    The matrices hang in the autograd graph of the hyperparameters. Ask the kernel for a new state space after
    every step of an optimiser: an old one keeps the old values and a spent graph.

    Whatever the dtype of the times, transitions are computed in float64 and then rounded to it.

    A subclass with closed forms overrides ``_step`` (and ``_prior``, if need be); the public methods
    check their arguments and call these.

    References
    ----------
    .. [1] S. Särkkä and A. Solin, "Applied Stochastic Differential Equations", 2019, chapters 6 and 12.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import Matern
    >>> state_space = Matern(lengthscale=2.0, nu=0.5).state_space()
    >>> A, Q = state_space.transition(torch.tensor([0.0, 2.0]))
    >>> A.flatten(), Q.flatten()  # exp(-1), 1 - exp(-2)
    (tensor([1.0000, 0.3679]...), tensor([0.0000, 0.8647]...))
    """

    def __init__(
        self,
        F: Tensor,
        L: Tensor,
        Qc: Tensor,
        H: Tensor,
        P0: Tensor,
        *,
        t0: float | int | None = None,
        name: str = "this process",
    ) -> None:
        check_floating(F=F, L=L, Qc=Qc, H=H, P0=P0)
        D, q, batch = _check_shapes(F, L, Qc, H, P0)
        for what, matrix in {"F": F, "L": L, "Qc": Qc, "H": H, "P0": P0}.items():
            check_finite(what, matrix.detach())
        self.F, self.P0 = F.expand(*batch, D, D), P0.expand(*batch, D, D)
        self.L, self.Qc = L.expand(*batch, D, q), Qc.expand(*batch, q, q)
        self.H = H
        self.t0 = None if t0 is None else float(t0)
        if self.t0 is not None:
            check_finite("t0", torch.tensor(self.t0))
        self.name = name

    @property
    def state_dim(self) -> int:
        """Size D of the state."""
        return self.F.shape[-1]

    @property
    def n_outputs(self) -> int:
        """Number r of functions observed jointly."""
        return self.H.shape[0]

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape of the matrices."""
        return self.F.shape[:-2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices; transitions have that of the steps."""
        return self.F.dtype

    @property
    def device(self) -> torch.device:
        """The device of the matrices; transitions are on that of the steps."""
        return self.F.device

    @property
    def stationary(self) -> bool:
        """Whether the process has no beginning, so that its law does not change in time."""
        return self.t0 is None

    @property
    def noiseless(self) -> bool:
        """Whether Q is zero: the state at one time then determines it at all others, earlier ones too."""
        return not bool(self.Qc.detach().any() and self.L.detach().any())

    def transition(self, dt: Float[Tensor, "..."] | float | int) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        r"""Return A and Q of :math:`x(t + d) = A x(t) + \varepsilon`, :math:`\varepsilon \sim N(0, Q)`.

        Parameters
        ----------
        dt : Tensor of shape (*#batch, n) or (), or float
            Steps, non-negative, in the unit of time. Their dtype and device are those of the result.

        Returns
        -------
        A, Q : Tensor of shape (*batch, n, D, D), or (*batch, D, D) for a scalar
            Differentiable in the hyperparameters and in ``dt``. A step of zero gives I and 0 exactly.

        Raises
        ------
        TypeError
            If ``dt`` is neither a float nor a float32 or float64 tensor.
        ValueError
            If a step is negative, infinite or NaN, or the batch shapes do not broadcast.
        OverflowError
            If the process is unstable and exp(F dt) does not fit.
        """
        steps = self._as_times("dt", dt)
        check_positive("dt", steps.detach(), zero=True)
        scalar = steps.ndim == 0
        A, Q = self._step((steps.unsqueeze(-1) if scalar else steps).double())
        shape = (*torch.broadcast_shapes(self.batch_shape, steps.shape[:-1]), *A.shape[-3:])
        A, Q = A.to(steps.dtype).expand(shape), Q.to(steps.dtype).expand(shape)
        return (A[..., 0, :, :], Q[..., 0, :, :]) if scalar else (A, Q)

    def prior(self, t: Float[Tensor, "..."] | float | int) -> Float[Tensor, "..."]:
        """Return the covariance of the state at time t, before any data.

        Parameters
        ----------
        t : Tensor of shape (*#batch) or (), or float
            One time, for each element of the batch or for all.

        Returns
        -------
        Tensor of shape (*batch, D, D)

        Raises
        ------
        TypeError
            If ``t`` is neither a float nor a float32 or float64 tensor.
        ValueError
            If ``t`` is not finite, or lies before ``t0`` and the process is not noiseless.
        """
        times = self._as_times("t", t, columns=0)
        check_finite("t", times.detach())
        P = self._prior(times.double().unsqueeze(-1))[..., 0, :, :]
        shape = torch.broadcast_shapes(self.batch_shape, times.shape)
        return P.to(times.dtype).expand(*shape, *P.shape[-2:])

    def derivative_output(self) -> Float[Tensor, "*batch r D"]:
        """Return the row H F, which maps the state to the time derivative of the function.

        Returns
        -------
        Tensor of shape (*batch, r, D)
            In the unit of the function per unit of time. It depends on the hyperparameters, unlike H.

        Raises
        ------
        ValueError
            If the function has no derivative: noise enters it directly, H L differs from zero.
        """
        if bool((self.H @ self.L).detach().any()) and not self.noiseless:
            raise ValueError(f"{self.name} is not mean-square differentiable, so its derivative has no variance.")
        return self.H @ self.F

    def covariance(self, s: Float[Tensor, "*#batch n"], t: Float[Tensor, "*#batch m"]) -> Float[Tensor, "..."]:
        """Return the prior covariance of f(s) and f(t), by transitions; the kernel gives it faster.

        Parameters
        ----------
        s, t : Tensor of shape (*#batch, n) and (*#batch, m)
            Times, in any order.

        Returns
        -------
        Tensor of shape (*batch, n, m), or (*batch, n, m, r, r) for r > 1 outputs

        Raises
        ------
        ValueError
            If a time is not finite, or lies before ``t0`` and the process is not noiseless.

        Notes
        -----
        Time and memory O(n m D^2): for tests and small cases.
        """
        check_floating(s=s, t=t)
        s, t = s[..., :, None], t[..., None, :]
        check_finite("s", s.detach())
        check_finite("t", t.detach())
        first, gap = torch.minimum(s, t), (s - t).abs()
        A, _ = self.transition(gap.flatten(-2))
        P = self._prior(first.flatten(-2).double()).to(A)
        H = self.H.to(A)
        # Cov(f(late), f(early)); where s is the early one, its transpose.
        cov = (H @ A @ P @ H.mT).unflatten(-3, gap.shape[-2:])
        cov = torch.where((s < t)[..., None, None], cov.mT, cov)
        return cov[..., 0, 0] if self.n_outputs == 1 else cov

    @staticmethod
    def stack(parts: Sequence[StateSpace]) -> StateSpace:
        """Join independent processes into one whose outputs are observed together.

        Parameters
        ----------
        parts : sequence of StateSpace
            Their batch shapes must broadcast. Each keeps its own ``t0``.

        Returns
        -------
        StateSpace
            Block diagonal; the rows of H are those of the parts, one after the other.

        Raises
        ------
        TypeError
            If a part is no StateSpace.
        ValueError
            If there is none, or the batch shapes do not broadcast.
        """
        from stochproc.kernels._state_space_algebra import BlockStateSpace

        return BlockStateSpace(parts, joint=True)

    def join(self) -> StateSpace:
        """Join the processes of the last batch axis into one whose outputs are observed together.

        Returns
        -------
        StateSpace
            Of b D states and b r outputs for a last batch axis of length b, block diagonal: what :meth:`stack` makes
            of its elements, at one evaluation of the transitions for all of them.

        Raises
        ------
        ValueError
            If there is no batch axis.
        """
        from stochproc.kernels._state_space_algebra import JoinedStateSpace

        return JoinedStateSpace(self)

    def _step(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and Q for checked float64 steps (*#batch, n); negative ones come if Q is zero."""
        F, noise = self.F.to(dt), (self.L @ self.Qc @ self.L.mT).to(dt)
        A, Q = series_step(F, noise, dt)
        if not bool(A.detach().isfinite().all() and Q.detach().isfinite().all()):
            raise OverflowError(f"exp(F dt) of {self.name} overflows at dt = {dt.detach().abs().max().item()}.")
        return A, Q

    def _prior(self, t: Tensor) -> Tensor:
        """Return the covariances (*batch, n, D, D), or a shape that broadcasts to it, at float64 times (*#batch, n)."""
        P0 = self.P0.to(t).unsqueeze(-3)
        if self.t0 is None:
            return P0
        elapsed = t - self.t0
        if not self.noiseless and bool((elapsed < 0).any()):
            raise ValueError(f"times must not lie before t0 = {self.t0} of {self.name}; got {t.detach().min().item()}.")
        A, Q = self._step(elapsed)
        return A @ P0 @ A.mT + Q

    def _as_times(self, name: str, value: Tensor | float | int, columns: int = 1) -> Tensor:
        """Return times as a floating tensor whose batch shape was checked."""
        if not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a tensor or a number; got {type(value).__name__}.")
            value = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        check_floating(**{name: value})
        try:
            torch.broadcast_shapes(self.batch_shape, value.shape[: max(value.ndim - columns, 0)])
        except RuntimeError:
            last = ", n" if columns else ""
            raise ValueError(
                f"{name} must have shape (*batch{last}) with a batch that broadcasts to {tuple(self.batch_shape)}; got "
                f"shape {tuple(value.shape)}."
            ) from None
        return value


def _check_shapes(F: Tensor, L: Tensor, Qc: Tensor, H: Tensor, P0: Tensor) -> tuple[int, int, torch.Size]:
    """Return D, q and the batch shape."""
    shown = ", ".join(f"{k} {tuple(v.shape)}" for k, v in {"F": F, "L": L, "Qc": Qc, "H": H, "P0": P0}.items())
    if min(F.ndim, L.ndim, Qc.ndim, P0.ndim) >= 2 and H.ndim == 2:
        D, q = L.shape[-2:]
        sizes = F.shape[-2:] == P0.shape[-2:] == (D, D) and Qc.shape[-2:] == (q, q) and H.shape[-1] == D
        try:
            batch = torch.broadcast_shapes(*(m.shape[:-2] for m in (F, L, Qc, P0)))
        except RuntimeError:
            sizes = False
        if sizes and D:
            return D, q, batch
    raise ValueError(
        "F, L, Qc, H, P0 must have shapes (*batch, D, D), (*batch, D, q), (*batch, q, q), (r, D), (*batch, D, D); "
        f"got {shown}."
    )
