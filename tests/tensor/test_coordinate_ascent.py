"""Coordinate ascent: exact where the model is exact, monotone elsewhere, and indifferent to names and orders."""

import math

import numpy as np
import pytest
import torch

from stochproc.gp import ScaleMixtureGPRegressor
from stochproc.kernels import Matern
from stochproc.tensor import FunctionalCP, FunctionalTucker
from stochproc.tensor._coordinate_ascent import Decomposition, Rows
from stochproc.tensor._factor import Factor
from stochproc.tensor._links import CPLink, TuckerLink
from stochproc.tensor._noise import PRIOR_RATE, PRIOR_SHAPE, Noise
from stochproc.tensor._priors import DiscretePrior, MarkovPrior
from tests.tensor.reference import prior_covariance

PLAIN = {"learn_hyperparameters": False, "early_stopping": False, "n_init": 1}


def data(n=150, K=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.uniform(0, 1, (n, K))
    y = np.sin(5 * X[:, 0]) * np.cos(3 * X[:, -1]) + 0.5 * X[:, 0] * X[:, K // 2] + 0.1 * rng.normal(size=n)
    return X, y


def test_one_mode_and_one_function_are_a_gaussian_process():
    X, y = data(60, 1)
    model = FunctionalCP(rank=1, kernel="matern32", lengthscale=0.3, variance=0.7, noise=0.05, **PLAIN).fit(X, y)
    unit = y.std()
    gp = ScaleMixtureGPRegressor(
        0.7 * Matern(0.3, nu=1.5),
        scale_prior="delta",
        noise=0.05,
        mean="zero",
        normalize_X=False,
        normalize_y=False,
        optimizer=None,
    ).fit(X, (y - y.mean()) / unit)
    grid = np.linspace(-0.5, 1.5, 9)[:, None]
    mean, std = model.predict(grid, return_std=True, latent=True)
    want, spread = gp.predict(grid, return_std=True, latent=True)
    np.testing.assert_allclose(mean, want * unit + y.mean(), rtol=0, atol=1e-8)
    np.testing.assert_allclose(std, spread * unit, rtol=0, atol=1e-8)
    # With one factor the bound is the evidence.
    assert model.elbo_[-1] == pytest.approx(gp.log_marginal_likelihood_ - 60 * math.log(unit), abs=1e-8)


def hand_derived(rows, K, variance, sweeps):
    """R = 1, a continuous mode with prior covariance K and categories with independent values, updated by hand."""
    i, c = rows.index
    n, n_categories = len(rows), int(c.max()) + 1
    m_c, v_c = torch.ones(n_categories), torch.full((n_categories,), 0.1)
    tau = 1.0
    for _ in range(sweeps):
        precision, linear = torch.zeros(len(K)), torch.zeros(len(K))
        for r in range(n):
            w = float(rows.weight[r])
            precision[i[r]] += tau * w * (m_c[c[r]] ** 2 + v_c[c[r]])
            linear[i[r]] += tau * w * rows.y[r] * m_c[c[r]]
        cov = torch.linalg.inv(torch.linalg.inv(K) + torch.diag(precision))
        m, v = cov @ linear, cov.diagonal()
        precision, linear = torch.zeros(n_categories), torch.zeros(n_categories)
        for r in range(n):
            w = float(rows.weight[r])
            precision[c[r]] += tau * w * (m[i[r]] ** 2 + v[i[r]])
            linear[c[r]] += tau * w * rows.y[r] * m[i[r]]
        v_c = 1 / (1 / variance + precision)
        m_c = v_c * linear
        squares = sum(
            float(rows.weight[r])
            * float(
                rows.y[r] ** 2
                - 2 * rows.y[r] * m[i[r]] * m_c[c[r]]
                + (m[i[r]] ** 2 + v[i[r]]) * (m_c[c[r]] ** 2 + v_c[c[r]])
            )
            for r in range(n)
        )
        tau = (PRIOR_SHAPE + n / 2) / (PRIOR_RATE + squares / 2)
    return m, v, m_c, v_c, tau


def test_two_modes_with_categories_follow_the_updates_derived_by_hand(gen):
    points = torch.rand(15, generator=gen).sort().values
    rows = Rows(
        torch.randn(40, generator=gen),
        0.5 + torch.rand(40, generator=gen),
        (torch.randint(15, (40,), generator=gen), torch.cat([torch.arange(4), torch.randint(4, (36,), generator=gen)])),
    )
    prior = MarkovPrior(Matern(0.3, nu=0.5).double(), torch.tensor([0.6]), shared=True, method="auto")
    factors = [
        Factor.from_means(prior, points, torch.zeros(15, 1), 0.1),
        Factor.from_means(DiscretePrior(torch.tensor([0.8])), torch.arange(4.0), torch.ones(4, 1), 0.1),
    ]
    model = Decomposition(factors, CPLink(1, 2), Noise(), 0)
    for _ in range(3):
        model.sweep(rows, learn=False)
    K = prior_covariance(prior, points)[:, 0, :, 0]
    m, v, m_c, v_c, tau = hand_derived(rows, K, 0.8, 3)
    for got, want in ((factors[0].mean[:, 0], m), (factors[0].cov[:, 0], v), (factors[1].mean[:, 0], m_c)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(factors[1].cov[:, 0], v_c, rtol=1e-9, atol=0)
    assert model.noise.precision == pytest.approx(tau, rel=1e-10)


@pytest.mark.parametrize("kind", [FunctionalCP, FunctionalTucker])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "matern32", "share_lengthscale": False},
        {"learn_variance": True},
        {"learn_hyperparameters": False, "noise": 0.02},
        {"modes": ["continuous", "continuous", "discrete"]},
    ],
    ids=str,
)
@pytest.mark.slow
# tol=0 never stops.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_bound_never_falls(kind, options):
    X, y = data(100)
    X[:, 2] = np.round(4 * X[:, 2])
    weight = np.random.default_rng(1).uniform(0.5, 2, len(y))
    model = kind(rank=2, early_stopping=False, max_iter=15, tol=0, **options)
    model.fit(X, y, sample_weight=weight)
    bounds = model.elbo_
    assert len(bounds) == 15
    assert np.all(np.diff(bounds) >= -1e-8 * np.abs(bounds[1:]))
    assert bounds[-1] > bounds[0] + 1


def test_the_bound_of_tucker_is_the_expected_log_density_less_divergences(gen):
    """Against Monte Carlo over q: E log p(y | .) + E log p - E log q, term by term."""
    rows = Rows(
        torch.randn(12, generator=gen), torch.ones(12), tuple(torch.randint(5, (12,), generator=gen) for _ in "ab")
    )
    factors = [
        Factor.from_means(
            DiscretePrior(torch.tensor([0.5, 0.9])), torch.arange(5.0), torch.randn(5, 2, generator=gen), 0.1
        )
        for _ in range(2)
    ]
    link = TuckerLink(torch.randn(2, 2, generator=gen), 0.1 * torch.eye(4), 0.7)
    model = Decomposition(factors, link, Noise(), 0)
    for _ in range(2):
        model.sweep(rows, learn=False)

    draws = 100_000
    log_p_y, tau = torch.zeros(draws), torch.distributions.Gamma(model.noise.a, model.noise.b)
    precision = tau.sample((draws,))
    functions = [f.draw(f.points, draws, gen)[:, i] for f, i in zip(factors, rows.index, strict=True)]
    f = link.value(functions, link.draw_core(draws, gen))
    log_p_y = (0.5 * (precision / (2 * math.pi)).log()[:, None] - 0.5 * precision[:, None] * (rows.y - f) ** 2).sum(1)
    prior = torch.distributions.Gamma(PRIOR_SHAPE, PRIOR_RATE)
    divergence = torch.distributions.kl_divergence(tau, prior).item() + link.divergence()
    divergence += sum(factor.divergence() for factor in factors)
    error = log_p_y.std().item() / math.sqrt(draws)
    # Five standard errors; a false alarm has a chance below 1e-6.
    assert abs(model.bound(rows) - (log_p_y.mean().item() - divergence)) < 5 * error


@pytest.mark.parametrize("kind", [FunctionalCP, FunctionalTucker])
def test_order_of_rows_and_of_modes_and_names_of_categories_change_nothing(kind):
    X, y = data()
    X[:, 2] = np.round(3 * X[:, 2])
    modes = ["continuous", "continuous", "discrete"]
    rank = 2 if kind is FunctionalCP else (2, 3, 2)
    options = {"early_stopping": False, "max_iter": 8, "tol": 0.5}
    model = kind(rank=rank, modes=modes, **options).fit(X, y)
    want = model.predict(X)

    order = np.random.default_rng(0).permutation(len(y))
    shuffled = kind(rank=rank, modes=modes, **options).fit(X[order], y[order])
    np.testing.assert_allclose(shuffled.predict(X), want, rtol=0, atol=1e-8)

    renamed = X.copy()
    renamed[:, 2] = np.array([7.0, -2.0, 5.0, 0.0])[X[:, 2].astype(int)]
    other = kind(rank=rank, modes=modes, **options).fit(renamed, y)
    np.testing.assert_allclose(other.predict(renamed), want, rtol=0, atol=1e-8)


def test_order_of_modes_changes_nothing_from_equal_starts():
    X, y = data()
    rng = np.random.default_rng(0)
    init = [rng.normal(size=(150, r)) for r in (2, 3, 2)]
    options = {"early_stopping": False, "max_iter": 5, "tol": 0.5}
    model = FunctionalTucker(rank=(2, 3, 2), init=init, **options).fit(X, y)
    order = [2, 0, 1]
    # The anchor goes first and the others in the order of the columns: with the anchor in front the sweeps agree.
    first = model._model.anchor
    order = [first, *(k for k in range(3) if k != first)]
    moved = FunctionalTucker(rank=tuple((2, 3, 2)[k] for k in order), init=[init[k] for k in order], **options)
    moved.fit(X[:, order], y)
    np.testing.assert_allclose(moved.predict(X[:, order]), model.predict(X), rtol=0, atol=1e-8)
    np.testing.assert_allclose(moved.core_, model.core_.transpose(order), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", [FunctionalCP, FunctionalTucker])
@pytest.mark.slow
def test_chunks_and_methods_of_the_smoother_agree(kind):
    X, y = data()
    options = {"rank": 2, "early_stopping": False, "max_iter": 5, "tol": 0.5}
    want = kind(**options).fit(X, y).predict(X, return_std=True)
    for other in ({"chunk_size": 7}, {"method": "sequential"}, {"method": "scan"}):
        got = kind(**options, **other).fit(X, y).predict(X, return_std=True)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-8)


def test_a_weight_is_a_known_precision():
    X, y = data(40, 2)
    weight = np.random.default_rng(0).uniform(0.5, 2, 40)
    options = {"rank": 1, "noise": 0.1, **PLAIN, "max_iter": 5, "tol": 0.5}
    # Given the noise, an integer weight is that many rows.
    weight = np.ceil(weight)
    weighted = FunctionalCP(center=False, **options).fit(X, y, sample_weight=weight)
    index = np.repeat(np.arange(40), weight.astype(int))
    y_unit = np.sqrt(np.mean(y**2)) / np.sqrt(np.mean(y[index] ** 2))
    options["noise"] *= y_unit**2
    repeated = FunctionalCP(center=False, variance=0.3, **options).fit(X[index], y[index])
    # Units of y differ by what the repetition does to its root mean square, which a fixed prior variance sees.
    assert np.corrcoef(weighted.predict(X), repeated.predict(X))[0, 1] > 0.999


def test_damped_messages_leave_the_noise_that_of_the_functions():
    X, y = data(60)
    model = FunctionalCP(rank=1, damping=0.5, n_init=1, tol=1e6).fit(X, y)
    inner = model._model
    index = tuple(torch.searchsorted(f.points, torch.tensor(X[:, k].copy())) for k, f in enumerate(inner.factors))
    values = torch.as_tensor((y - y.mean()) / y.std())
    mean, variance = inner.moments(Rows(values, torch.ones(60), index))
    assert inner.squares == pytest.approx(float(((values - mean).square() + variance).sum()), rel=1e-9)
