"""Draws of Gaussian processes and of their scale mixtures, with everything they were drawn from."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from stochproc._checks import check_choice, check_floating, check_integer, check_positive
from stochproc._random import make_generator
from stochproc.solvers import cholesky_or_raise

__all__ = ["make_gp_regression", "make_student_t_process"]

# Of the mean diagonal: smooth kernels are singular to rounding, and 1e-10 is far below any noise.
JITTER = 1e-10


def make_gp_regression(
    n_samples: int = 100,
    n_features: int = 1,
    *,
    kernel: "Callable[[Tensor, Tensor], Tensor] | None" = None,
    lengthscale: "float | int" = 0.3,
    noise: "float | int" = 0.01,
    scale_prior: Any = None,
    noise_model: str = "scaled",
    random_state: Any = None,
) -> Any:
    r"""Draw a regression problem from a Gaussian process, or from a scale mixture of Gaussian processes.

    .. math:: f \mid s \sim \mathrm{GP}(0, s k), \qquad y_i = f(x_i) + e_i, \qquad e_i \sim N(0, s \cdot noise)

    with one scale s for the whole data set, so that a heavy-tailed ``scale_prior`` makes it large or small at once.
    The rows of X are uniform on the unit cube.

    Parameters
    ----------
    n_samples : int, default=100
        Number of rows.
    n_features : int, default=1
        Number of columns.
    kernel : callable or None, default=None
        Takes two tensors (n, d) and (m, d) and returns (n, m). None is :math:`\exp(-|x-y|^2 / (2 l^2))`.
    lengthscale : float, default=0.3
        l of the default kernel; not used with ``kernel``.
    noise : float, default=0.01
        Noise variance, at least 0; multiplied by s where ``noise_model`` is "scaled".
    scale_prior : None, float or object with ``sample``, default=None
        Distribution of s. None is s = 1; a number is s itself; an object, for instance a prior of ``stochproc.gp``,
        has ``sample(shape, generator=...)``.
    noise_model : {"scaled", "independent"}, default="scaled"
        Whether s multiplies the noise too.
    random_state : None, int, numpy or torch generator, default=None
        Seed.

    Returns
    -------
    sklearn.utils.Bunch
        ``X`` (n_samples, n_features) and ``y`` (n_samples,) float64 tensors; the truth: ``f`` (n_samples,) without
        noise, ``s`` (float), ``noise`` (the variance as given), ``noise_variance`` (that of this draw), ``kernel``
        (callable), ``DESCR``.

    Raises
    ------
    ValueError
        If a size, ``lengthscale``, ``noise`` or the scale is out of range, or ``noise_model`` unknown.
    NotPositiveDefiniteError
        If ``kernel`` is not positive definite at the points.

    Notes
    -----
    O(n³) time, O(n²) memory. Smooth kernels are factored with 1e-10 of their diagonal added where they need it.

    Examples
    --------
    >>> problem = make_gp_regression(50, 2, noise=0.1, random_state=0)
    >>> problem.X.shape, problem.y.shape
    (torch.Size([50, 2]), torch.Size([50]))
    """
    check_integer("n_samples", n_samples, 1)
    check_integer("n_features", n_features, 1)
    check_positive("noise", noise, zero=True)
    check_choice("noise_model", noise_model, ("scaled", "independent"))
    kernel = _rbf(lengthscale) if kernel is None else kernel
    gen = make_generator(random_state)

    X = torch.rand(n_samples, n_features, generator=gen, dtype=torch.float64)
    s = _draw_scale(scale_prior, gen)
    z = torch.randn(2, n_samples, generator=gen, dtype=torch.float64)
    L = _factor(kernel, X)
    f = math.sqrt(s) * (L @ z[0])
    noise_variance = float(noise) * (s if noise_model == "scaled" else 1.0)
    from sklearn.utils import Bunch

    return Bunch(
        X=X,
        y=f + math.sqrt(noise_variance) * z[1],
        f=f,
        s=s,
        noise=float(noise),
        noise_variance=noise_variance,
        kernel=kernel,
        DESCR=f"Draw of a Gaussian process at {n_samples} points in {n_features} dimensions, times sqrt(s).",
    )


def make_student_t_process(
    n_samples: int = 1,
    times: "Float[Tensor, ' n'] | None" = None,
    *,
    n_steps: int = 100,
    df: "float | int" = 4.0,
    kernel: "Callable[[Tensor, Tensor], Tensor] | None" = None,
    lengthscale: "float | int" = 0.3,
    random_state: Any = None,
) -> Any:
    r"""Draw paths of a Student-t process, each with a scale of its own.

    A path is :math:`\sqrt{s} f` with f a Gaussian process of covariance K and s inverse gamma with shape and scale
    df/2: a multivariate Student-t vector of shape matrix K, whose covariance is :math:`K \, df / (df - 2)`.

    Parameters
    ----------
    n_samples : int, default=1
        Number of independent paths.
    times : Tensor of shape (n,) or None, default=None
        Where the paths are evaluated; None is ``n_steps`` equal steps from 0 to 1.
    n_steps : int, default=100
        Number of times where ``times`` is None.
    df : float, default=4.0
        Degrees of freedom, positive; the variance is finite above 2.
    kernel : callable or None, default=None
        Takes two tensors (n, 1) and (m, 1) and returns (n, m). None is :math:`\exp(-(t-u)^2 / (2 l^2))`.
    lengthscale : float, default=0.3
        l of the default kernel.
    random_state : None, int, numpy or torch generator, default=None
        Seed.

    Returns
    -------
    sklearn.utils.Bunch
        ``times`` (n,), ``paths`` (n_samples, n); the truth: ``scales`` (n_samples,), ``shape_matrix`` (n, n), ``df``,
        ``DESCR``. Tensors are float64.

    Raises
    ------
    ValueError
        If a number is out of range or ``times`` is not a finite vector.
    NotPositiveDefiniteError
        If ``kernel`` is not positive definite at the times.

    Examples
    --------
    >>> make_student_t_process(3, n_steps=20, random_state=0).paths.shape
    torch.Size([3, 20])
    """
    check_integer("n_samples", n_samples, 1)
    check_integer("n_steps", n_steps, 1)
    check_positive("df", df)
    if times is None:
        times = torch.linspace(0, 1, n_steps, dtype=torch.float64)
    check_floating(times=times)
    if times.ndim != 1 or times.numel() == 0 or not bool(times.isfinite().all()):
        raise ValueError(f"times must be a finite vector; got shape {tuple(times.shape)}.")
    times = times.to("cpu", torch.float64)
    kernel = _rbf(lengthscale) if kernel is None else kernel
    gen = make_generator(random_state)

    uniform = torch.rand(n_samples, generator=gen, dtype=torch.float64).clamp_min(2.0**-54)
    scales = df / 2 / torch.from_numpy(special.gammaincinv(df / 2, uniform.numpy()))
    z = torch.randn(n_samples, len(times), generator=gen, dtype=torch.float64)
    L = _factor(kernel, times[:, None])
    from sklearn.utils import Bunch

    return Bunch(
        times=times,
        paths=scales.sqrt()[:, None] * (z @ L.mT),
        scales=scales,
        shape_matrix=L @ L.mT,
        df=float(df),
        DESCR=f"{n_samples} paths of a Student-t process of {float(df):g} degrees of freedom.",
    )


def _rbf(lengthscale: "float | int") -> Callable[[Tensor, Tensor], Tensor]:
    check_positive("lengthscale", lengthscale)
    return lambda x, y: torch.exp(-0.5 * (torch.cdist(x, y) / lengthscale) ** 2)


def _factor(kernel: Callable[[Tensor, Tensor], Tensor], X: Tensor) -> Tensor:
    K = kernel(X, X).detach()
    if K.shape != (len(X), len(X)):
        raise ValueError(f"kernel must return {(len(X), len(X))} for {len(X)} points; got {tuple(K.shape)}.")
    return cholesky_or_raise(K.to("cpu", torch.float64), "kernel", jitter=JITTER, points=X)


def _draw_scale(scale_prior: Any, gen: torch.Generator) -> float:
    if scale_prior is None:
        return 1.0
    s = scale_prior.sample((), generator=gen) if hasattr(scale_prior, "sample") else scale_prior
    check_positive("scale_prior", s)
    return float(s)
