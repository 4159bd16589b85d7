"""Gaussian observations as messages exp(etaᵀ f - fᵀ Lam f / 2) about the outputs of a process."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_finite, check_floating, check_integer, check_positive, check_same_kind
from stochproc.solvers._cholesky import cholesky_or_raise

__all__ = ["Messages", "messages"]


class Messages(NamedTuple):
    """Messages in information form, and what they leave out of the density of the data."""

    Lam: Float[Tensor, "*batch n r r"]
    """Precisions; zero where nothing was observed."""
    eta: Float[Tensor, "*batch n r"]
    """Linear parts: precision times observation."""
    constant: Float[Tensor, "*batch"]
    """log p(y) is log Z of the messages plus this, in nats."""


def messages(
    y: Float[Tensor, "..."],
    noise: "Float[Tensor, '...'] | float | int | None" = None,
    *,
    noise_cov: "Float[Tensor, '... r r'] | None" = None,
    n_outputs: int = 1,
    around_data: bool = False,
) -> Messages:
    r"""Turn observations with Gaussian noise into the messages that ``kalman_smoother`` takes.

    Parameters
    ----------
    y : Tensor of shape (\*batch, n) if ``n_outputs`` is 1, else (\*batch, n, n_outputs)
        Observations. NaN is missing: single outputs of a time may be.
    noise : Tensor or float, default=None
        Positive variances, in squared units of ``y``, of a shape that broadcasts to it.
    noise_cov : Tensor of shape (\*#batch, n or 1, n_outputs, n_outputs), default=None
        Positive definite covariances of the noise of the outputs at one time, instead of ``noise``.
    n_outputs : int, default=1
        Number r of functions observed jointly.
    around_data : bool, default=False
        Write the messages around the data, as :math:`\exp(-(f - y)^\top \Lambda (f - y) / 2)`, so that ``eta`` is
        zero; then pass ``offset=y`` (zero where missing, ``y.nan_to_num()``) to ``kalman_smoother``. Without it
        log Z and ``constant`` are of the size of the sum of y²/noise and lose its rounding when they are added.

    Returns
    -------
    Messages
        ``Lam`` (\*batch, n, r, r), ``eta`` (\*batch, n, r) and ``constant`` (\*batch,), differentiable in ``y`` and
        the noise; the batch is that of ``y``.

    Raises
    ------
    TypeError
        If ``y`` is not a float32 or float64 tensor, or dtypes or devices differ.
    ValueError
        If ``y`` is infinite or misshapen, the noise is not positive, or not exactly one of ``noise`` and
        ``noise_cov`` is given.
    NotPositiveDefiniteError
        If a covariance is not positive definite.

    Examples
    --------
    >>> import torch
    >>> found = messages(torch.tensor([1.0, float("nan")]), 0.5)
    >>> found.Lam.flatten(), found.eta.flatten()
    (tensor([2., 0.]), tensor([2., 0.]))
    """
    check_floating(y=y)
    check_integer("n_outputs", n_outputs, 1)
    if y.ndim < 1 + (n_outputs > 1) or (n_outputs > 1 and y.shape[-1] != n_outputs):
        wanted = "(*batch, n)" if n_outputs == 1 else f"(*batch, n, {n_outputs})"
        raise ValueError(f"y must have shape {wanted} for n_outputs={n_outputs}; got shape {tuple(y.shape)}.")
    if (noise is None) == (noise_cov is None):
        raise ValueError("exactly one of noise and noise_cov must be given.")
    observed = ~y.isnan()
    y = torch.where(observed, y, 0.0)
    check_finite("y", y.detach())
    if noise is not None:
        variance = _variances(noise, y)
        precision = torch.where(observed, variance, 1.0).reciprocal() * observed
        log_det = torch.where(observed, variance, 1.0).log()
        if n_outputs == 1:
            y, observed, precision, log_det = (x.unsqueeze(-1) for x in (y, observed, precision, log_det))
        Lam = torch.diag_embed(precision)
        eta = precision * y
    elif noise_cov is not None:
        if n_outputs == 1:
            y, observed = y.unsqueeze(-1), observed.unsqueeze(-1)
        Lam, log_det = _invert(noise_cov, y, observed)
        eta = (Lam @ y.unsqueeze(-1)).squeeze(-1)
    constant = -0.5 * (log_det + math.log(2 * math.pi) * observed.to(y)).sum((-2, -1))
    if around_data:
        return Messages(Lam, torch.zeros_like(eta), constant)
    return Messages(Lam, eta, constant - 0.5 * (eta * y).sum((-2, -1)))


def _variances(noise: "Tensor | float | int", y: Tensor) -> Tensor:
    check_positive("noise", noise.detach() if isinstance(noise, Tensor) else noise)
    if isinstance(noise, Tensor):
        check_same_kind(y=y, noise=noise)
        try:
            return noise.expand(y.shape)
        except RuntimeError:
            shapes = f"{tuple(y.shape)}; got shape {tuple(noise.shape)}"
            raise ValueError(f"noise must broadcast to the shape of y, {shapes}.") from None
    return y.new_full((), float(noise)).expand(y.shape)


def _invert(noise_cov: Tensor, y: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Precisions of the observed outputs, zero elsewhere, and log det of their covariances in pieces (*batch, n, r)."""
    check_same_kind(y=y, noise_cov=noise_cov)
    shape = (*y.shape, y.shape[-1])
    try:
        cov = noise_cov.expand(shape)
    except RuntimeError:
        raise ValueError(f"noise_cov must broadcast to shape {shape}; got shape {tuple(noise_cov.shape)}.") from None
    both = observed.unsqueeze(-1) & observed.unsqueeze(-2)
    eye = torch.eye(shape[-1], dtype=y.dtype, device=y.device)
    # A missing output becomes an independent one of variance 1, whose precision is then deleted.
    L = cholesky_or_raise(torch.where(both, cov, eye), "noise_cov")
    Lam = torch.cholesky_solve(eye.expand(shape), L) * both
    return 0.5 * (Lam + Lam.mT), 2.0 * L.diagonal(dim1=-2, dim2=-1).log()
