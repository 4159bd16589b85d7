"""Exact paths of fractional Brownian motion."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_floating, check_integer, check_positive
from stochproc._random import make_generator
from stochproc.solvers import cholesky_or_raise

__all__ = ["make_fractional_brownian"]


def make_fractional_brownian(
    n_samples: int = 1,
    times: "Float[Tensor, ' n'] | None" = None,
    *,
    hurst: "float | int" = 0.7,
    n_steps: int = 1000,
    horizon: "float | int" = 1.0,
    scale: "float | int" = 1.0,
    random_state: Any = None,
) -> Any:
    r"""Draw exact paths of fractional Brownian motion.

    .. math:: \mathrm{Cov}(B_t, B_u) = \tfrac{1}{2} scale^2 (t^{2H} + u^{2H} - |t - u|^{2H})

    Parameters
    ----------
    n_samples : int, default=1
        Number of independent paths.
    times : Tensor of shape (n,) or None, default=None
        Increasing, from 0 on. None is ``n_steps`` equal steps from 0 to ``horizon``, both included.
    hurst : float, default=0.7
        Hurst index H in (0, 1).
    n_steps : int, default=1000
        Number of steps where ``times`` is None.
    horizon : float, default=1.0
        Last time where ``times`` is None.
    scale : float, default=1.0
        Standard deviation at time 1.
    random_state : None, int, numpy or torch generator, default=None
        Seed.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (n,), ``paths`` (n_samples, n), zero at time 0; the truth: ``hurst``, ``scale``; ``method``, which is
        "circulant" for multiples 0, 1, 2, ... of one step and "cholesky" otherwise; ``DESCR``. Tensors are float64.

    Raises
    ------
    ValueError
        If ``hurst`` is not in (0, 1), another number is out of range, or ``times`` is not increasing from 0 on.
    NotPositiveDefiniteError
        If times are so close that the covariance is singular to rounding.

    Notes
    -----
    On a regular grid the increments come from a circulant matrix of twice the size, whose eigenvalues are
    nonnegative for every H [1]_, [2]_: O(n log n) time and exact in distribution. Elsewhere a Cholesky factor of
    the covariance: O(n³) time, O(n²) memory.

    References
    ----------
    .. [1] R. B. Davies and D. S. Harte, "Tests for Hurst effect", Biometrika 74 (1987) 95-101.
    .. [2] P. F. Craigmile, "Simulating a class of stationary Gaussian processes using the Davies-Harte algorithm,
       with application to long memory processes", Journal of Time Series Analysis 24 (2003) 505-511.

    Examples
    --------
    >>> rough = make_fractional_brownian(2, hurst=0.2, n_steps=100, random_state=0)
    >>> rough.paths.shape, rough.method
    (torch.Size([2, 101]), 'circulant')
    """
    check_integer("n_samples", n_samples, 1)
    check_integer("n_steps", n_steps, 1)
    check_positive("horizon", horizon)
    check_positive("scale", scale)
    if not 0 < hurst < 1:
        raise ValueError(f"hurst must lie in (0, 1); got {hurst}.")
    if times is None:
        times = torch.linspace(0, float(horizon), n_steps + 1, dtype=torch.float64)
    times = _check_times(times)
    gen = make_generator(random_state)

    step = _regular_step(times)
    if step is None:
        method, paths = "cholesky", _by_cholesky(n_samples, times, float(hurst), gen)
    else:
        noise = _fractional_noise(n_samples, len(times) - 1, float(hurst), gen)
        zero = noise.new_zeros(n_samples, 1)
        method, paths = "circulant", step**hurst * torch.cat([zero, noise.cumsum(1)], 1)
    from sklearn.utils import Bunch

    return Bunch(
        times=times,
        paths=scale * paths,
        hurst=float(hurst),
        scale=float(scale),
        method=method,
        DESCR=f"{n_samples} exact paths of fractional Brownian motion with Hurst index {float(hurst):g}.",
    )


def _check_times(times: Tensor) -> Tensor:
    check_floating(times=times)
    if times.ndim != 1 or times.numel() == 0 or not bool(times.isfinite().all()):
        raise ValueError(f"times must be a finite vector; got shape {tuple(times.shape)}.")
    if bool(times[0] < 0) or bool((times.diff() <= 0).any()):
        raise ValueError("times must increase strictly, from 0 on; got a negative, equal or falling one.")
    return times.detach().to("cpu", torch.float64)


def _regular_step(times: Tensor) -> "float | None":
    """Step of a grid 0, h, 2h, ... up to the rounding of its ends; None for any other."""
    if len(times) < 2 or times[0] != 0:
        return None
    step = float(times[-1]) / (len(times) - 1)
    even = step * torch.arange(len(times), dtype=torch.float64)
    return step if bool(((times - even).abs() <= 4 * torch.finfo(torch.float64).eps * times[-1]).all()) else None


def _fractional_noise(n_samples: int, n: int, hurst: float, gen: torch.Generator) -> Tensor:
    """Increments of unit steps by circulant embedding; the real and the imaginary part give two paths."""
    k = torch.arange(1, n + 1, dtype=torch.float64)
    # The second difference of k^2H, as k^2H ((1 + 1/k)^2H + (1 - 1/k)^2H - 2) / 2: no digits are lost at large k.
    up, down = (torch.expm1(2 * hurst * torch.log1p(sign / k)) for sign in (1, -1))
    covariance = torch.cat([k.new_ones(1), 0.5 * k ** (2 * hurst) * (up + down)])
    eigenvalues = torch.fft.fft(torch.cat([covariance, covariance[1:-1].flip(0)])).real.clamp_min(0)
    m, pairs = len(eigenvalues), (n_samples + 1) // 2
    z = torch.view_as_complex(torch.randn(pairs, m, 2, generator=gen, dtype=torch.float64))
    noise = torch.view_as_real(torch.fft.fft((eigenvalues / m).sqrt() * z)[:, :n])
    return noise.movedim(2, 1).reshape(2 * pairs, n)[:n_samples]


def _by_cholesky(n_samples: int, times: Tensor, hurst: float, gen: torch.Generator) -> Tensor:
    """Paths from the covariance of the positive times; the value at time 0 is 0."""
    t = times[times > 0]
    paths = times.new_zeros(n_samples, len(times))
    power = t ** (2 * hurst)
    covariance = 0.5 * (power[:, None] + power - (t[:, None] - t).abs() ** (2 * hurst))
    # Standardised: variances t^2H over many decades would make the check of the factor meaningless.
    sd = t**hurst
    if len(t):
        L = cholesky_or_raise(covariance / (sd[:, None] * sd), "the covariance at these times", points=t[:, None])
        z = torch.randn(n_samples, len(t), generator=gen, dtype=torch.float64)
        paths[:, len(times) - len(t) :] = sd * (z @ L.mT)
    return paths
