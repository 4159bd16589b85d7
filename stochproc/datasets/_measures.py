"""Pairs of measures whose optimal transport is known without solving for it."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_integer, check_positive
from stochproc._random import make_generator

__all__ = ["make_clouds", "make_histograms"]


def make_clouds(
    n_source: int = 200,
    n_target: int = 200,
    n_features: int = 2,
    *,
    separation: "float | int" = 3.0,
    random_state: Any = None,
) -> Any:
    r"""Draw two point clouds from two normal distributions, between which transport is known.

    For N(m, A) and N(m', B) and the cost :math:`|x - y|^2` the optimal map is linear,
    :math:`T(x) = m' + A^{-1/2} (A^{1/2} B A^{1/2})^{1/2} A^{-1/2} (x - m)`, and its cost is
    :math:`|m - m'|^2 + \mathrm{tr}(A + B - 2 (A^{1/2} B A^{1/2})^{1/2})`.

    Parameters
    ----------
    n_source, n_target : int, default=200
        Number of points of each cloud.
    n_features : int, default=2
        Dimension.
    separation : float, default=3.0
        Distance of the two means, at least 0; the covariances have eigenvalues between 1/4 and 2.
    random_state : None, int, numpy or torch generator, default=None
        Seed.

    Returns
    -------
    sklearn.utils.Bunch
        ``X_source`` (n_source, d), ``X_target`` (n_target, d), uniform weights ``a`` and ``b``; the truth of the two
        normal distributions: ``mean_source``, ``mean_target``, ``cov_source``, ``cov_target``, ``transport_map``
        (callable on (n, d)), ``cost`` (float, the squared Wasserstein distance; that of the samples is larger by
        their fluctuation), ``DESCR``. Tensors are float64.

    Raises
    ------
    ValueError
        If a size is below 1 or ``separation`` negative.

    References
    ----------
    .. [1] G. Peyré and M. Cuturi, "Computational Optimal Transport", 2019, remark 2.31.

    Examples
    --------
    >>> clouds = make_clouds(100, 150, random_state=0)
    >>> clouds.X_source.shape, clouds.b.shape
    (torch.Size([100, 2]), torch.Size([150]))
    """
    for name, size in (("n_source", n_source), ("n_target", n_target), ("n_features", n_features)):
        check_integer(name, size, 1)
    check_positive("separation", separation, zero=True)
    gen = make_generator(random_state)

    d = n_features
    direction = torch.randn(d, generator=gen, dtype=torch.float64)
    means = torch.stack([torch.zeros(d, dtype=torch.float64), separation * direction / direction.norm()])
    bases = torch.linalg.qr(torch.randn(2, d, d, generator=gen, dtype=torch.float64)).Q
    variances = 0.25 + 1.75 * torch.rand(2, 1, d, generator=gen, dtype=torch.float64)
    A, B = (bases * variances) @ bases.mT
    z = [torch.randn(n, d, generator=gen, dtype=torch.float64) for n in (n_source, n_target)]
    root = _power(A, 0.5)
    middle = _power(root @ B @ root, 0.5)
    inverse = _power(A, -0.5)
    from sklearn.utils import Bunch

    return Bunch(
        X_source=means[0] + z[0] @ root,
        X_target=means[1] + z[1] @ _power(B, 0.5),
        a=torch.full((n_source,), 1 / n_source, dtype=torch.float64),
        b=torch.full((n_target,), 1 / n_target, dtype=torch.float64),
        mean_source=means[0],
        mean_target=means[1],
        cov_source=A,
        cov_target=B,
        transport_map=_affine(means[0], inverse @ middle @ inverse, means[1]),
        cost=float((means[0] - means[1]).square().sum() + (A + B - 2 * middle).trace()),
        DESCR=f"Samples of two normal distributions in {d} dimensions, {float(separation):g} apart.",
    )


def make_histograms(n_bins: int = 100, *, n_modes: int = 3, random_state: Any = None) -> Any:
    r"""Draw two histograms on one grid of [0, 1], with their optimal transport for the squared distance.

    Each histogram is a mixture of ``n_modes`` bells of width 0.02 to 0.1 over a floor of 1 % of the mass. On the
    line the optimal plan is monotone: it moves quantiles onto quantiles.

    Parameters
    ----------
    n_bins : int, default=100
        Number of bins.
    n_modes : int, default=3
        Number of bells of each histogram.
    random_state : None, int, numpy or torch generator, default=None
        Seed.

    Returns
    -------
    sklearn.utils.Bunch
        ``points`` (n_bins,) centres of the bins, ``a`` and ``b`` (n_bins,) positive weights of sum 1, ``M`` (n_bins,
        n_bins) squared distances; the truth: ``plan`` (n_bins, n_bins), ``cost`` (float), ``DESCR``. Tensors are
        float64.

    Raises
    ------
    ValueError
        If a size is below 1.

    Examples
    --------
    >>> pair = make_histograms(50, random_state=0)
    >>> bool(((pair.plan * pair.M).sum() - pair.cost).abs() < 1e-15)
    True
    """
    check_integer("n_bins", n_bins, 1)
    check_integer("n_modes", n_modes, 1)
    gen = make_generator(random_state)

    points = (torch.arange(n_bins, dtype=torch.float64) + 0.5) / n_bins
    centre, width, mass = torch.rand(3, 2, n_modes, 1, generator=gen, dtype=torch.float64)
    bells = (0.1 + mass) * torch.exp(-0.5 * ((points - 0.1 - 0.8 * centre) / (0.02 + 0.08 * width)) ** 2)
    weights = bells.sum(1)
    weights = 0.99 * weights / weights.sum(1, keepdim=True) + 0.01 / n_bins
    a, b = weights / weights.sum(1, keepdim=True)
    plan = _monotone_plan(a, b)
    M = (points[:, None] - points) ** 2
    from sklearn.utils import Bunch

    return Bunch(
        points=points,
        a=a,
        b=b,
        M=M,
        plan=plan,
        cost=float((plan * M).sum()),
        DESCR=f"Two histograms of {n_modes} bells in {n_bins} bins of [0, 1].",
    )


def _power(A: Tensor, p: float) -> Tensor:
    """Power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values**p) @ vectors.mT


def _affine(origin: Tensor, matrix: Tensor, image: Tensor) -> Callable[[Tensor], Tensor]:
    def transport_map(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return image + (x - origin) @ matrix.mT

    return transport_map


def _monotone_plan(a: Tensor, b: Tensor) -> Tensor:
    """Overlaps of the intervals that the weights cut out of [0, 1]."""
    ends_a, ends_b = a.cumsum(0), b.cumsum(0)
    low = torch.maximum((ends_a - a)[:, None], ends_b - b)
    high = torch.minimum(ends_a[:, None], ends_b)
    return (high - low).clamp_min(0)
