"""The estimator against a dense Gaussian process."""

import math

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel
from sklearn.gaussian_process.kernels import Matern as SklearnMatern

from stochproc.kernels import Linear, Matern, Periodic, Scale
from stochproc.solvers import LBFGS
from stochproc.tensor import StateSpaceGP

KERNELS = {
    "matern12": lambda: Scale(Matern(0.7, nu=0.5), 1.3),
    "matern32": lambda: Scale(Matern(0.7, nu=1.5), 1.3),
    "matern52": lambda: Scale(Matern(0.7, nu=2.5), 1.3),
    "sum": lambda: Scale(Matern(2.0, nu=2.5), 1.3) + Scale(Matern(0.3, nu=0.5), 0.2),
    "trend": lambda: Linear(0.5, 0.8) + Matern(0.7, nu=1.5),
    "product": lambda: Matern(0.7, nu=1.5) * Matern(2.0, nu=0.5),
}


def series(n=60, seed=0):
    """Unsorted times with a gap and ties, values missing, known variances of several sizes."""
    rng = np.random.default_rng(seed)
    times = rng.uniform(0, 10, n)
    times[times > 6] += 3
    times[:5] = times[5:10]
    y = np.sin(2 * times) + 0.3 * times + 0.1 * rng.normal(size=n) + 5
    y[[3, 17]] = np.nan
    return times, y, rng.uniform(0.01, 0.2, n)


def dense(kernel, times, y, known, query, noise, mean=0.0):
    """Posterior mean and covariance of f at the query, and log p(y)."""
    seen = ~np.isnan(y)
    x, t, q = (torch.tensor(v)[:, None] for v in (times[seen], y[seen] - mean, query))
    with torch.no_grad():
        factor = torch.linalg.cholesky(kernel.dense(x) + torch.diag(torch.tensor(known[seen]) + noise))
        cross = torch.linalg.solve_triangular(factor, kernel.dense(x, q), upper=False)
        white = torch.linalg.solve_triangular(factor, t, upper=False)
        cov = kernel.dense(q) - cross.mT @ cross
        log_p = -0.5 * white.square().sum() - factor.diagonal().log().sum() - 0.5 * len(x) * math.log(2 * math.pi)
    return (cross.mT @ white)[:, 0].numpy() + mean, cov.numpy(), log_p.item()


def as_given(kernel, **options):
    """Hyperparameters as they are, data as they are."""
    return StateSpaceGP(kernel, mean="zero", normalize_y=False, optimizer=None, **options)


@pytest.mark.parametrize("method", ["sequential", "scan"])
@pytest.mark.parametrize("name", KERNELS)
def test_it_is_the_dense_process(name, method):
    kernel, (times, y, known) = KERNELS[name](), series()
    query = np.array([3.3, -2.0, 7.5, 20.0, times[7], 3.3])
    model = as_given(kernel, noise=0.05, method=method).fit(times, y, noise=known)
    mean, cov, log_p = dense(kernel, times, y, known, query, 0.05)
    found, std = model.predict(query, return_std=True, latent=True)
    # 60 points: rounding of the dense factor, cond 1e3.
    np.testing.assert_allclose(found, mean, atol=1e-10)
    np.testing.assert_allclose(std, np.sqrt(np.diag(cov)), atol=1e-10)
    np.testing.assert_allclose(model.predict(query, return_cov=True, latent=True)[1], cov, atol=1e-10)
    np.testing.assert_allclose(model.log_marginal_likelihood(), log_p, rtol=1e-11)


def test_a_constant_mean_and_standardising_are_undone():
    kernel, (times, y, known) = KERNELS["matern32"](), series()
    model = StateSpaceGP(kernel, noise=0.05, normalize_X=True, optimizer=LBFGS(max_iter=3), random_state=0)
    with pytest.warns(ConvergenceWarning):
        model.fit(times, y, noise=known)
    unit = np.nanstd(y)
    theirs = Scale(Matern(1.0, nu=1.5), 1.0)
    theirs.outputscale = model.kernel_.outputscale * unit**2
    theirs.kernel.lengthscale = model.kernel_.kernel.lengthscale * times.std()
    query = np.linspace(-1, 15, 7)
    mean, cov, log_p = dense(theirs, times, y, known, query, model.noise_variance_, mean=model.mean_)
    found, std = model.predict(query, return_std=True)
    np.testing.assert_allclose(found, mean, atol=1e-9)
    np.testing.assert_allclose(std, np.sqrt(np.diag(cov) + model.noise_variance_), atol=1e-9)
    np.testing.assert_allclose(model.log_marginal_likelihood_, log_p, rtol=1e-10)


@pytest.mark.slow
def test_the_search_finds_the_optimum_of_scikit_learn():
    rng = np.random.default_rng(3)
    times = np.sort(rng.uniform(0, 20, 120))
    y = np.sin(times) + 0.2 * rng.normal(size=120)
    y = (y - y.mean()) / y.std()
    ours = StateSpaceGP("matern52", mean="zero", normalize_y=False).fit(times, y)
    kernel = ConstantKernel(1.0, (1e-5, 1e5)) * SklearnMatern(1.0, (1e-5, 1e5), nu=2.5) + WhiteKernel(0.1, (1e-8, 1e5))
    theirs = GaussianProcessRegressor(kernel, n_restarts_optimizer=2, random_state=0).fit(times[:, None], y)
    assert ours.converged_
    # Both stop at a gradient of about 1e-5 nats in the logarithms.
    np.testing.assert_allclose(ours.log_marginal_likelihood_, theirs.log_marginal_likelihood_value_, atol=1e-4)
    np.testing.assert_allclose(ours.predict(times + 0.05), theirs.predict(times[:, None] + 0.05), atol=1e-3)


def test_likelihood_of_other_data_is_that_of_a_dense_process():
    kernel, (times, y, known) = KERNELS["matern32"](), series()
    model = as_given(kernel, noise=0.05).fit(times, y, noise=known)
    other, values, _ = series(20, seed=1)
    _, _, log_p = dense(kernel, other, values, np.zeros(20), other, 0.05)
    np.testing.assert_allclose(model.log_marginal_likelihood(other, values), log_p, rtol=1e-11)


@pytest.mark.parametrize("known", [0.0, None])
def test_leave_one_out_density_is_that_of_a_fit_without_the_row(known):
    kernel, (times, y, given) = KERNELS["matern32"](), series(20)
    # The times of the series have ties.
    known = np.full(20, known) if known is not None else given
    model = as_given(kernel, noise=0.05).fit(times, y, noise=known)
    found = model.loo()
    for i in range(len(y)):
        if np.isnan(y[i]):
            assert np.isnan(found[i])
            continue
        rest = np.arange(len(y)) != i
        mean, cov, _ = dense(kernel, times[rest], y[rest], known[rest], times[i : i + 1], 0.05)
        variance = cov[0, 0] + 0.05 + known[i]
        expected = -0.5 * ((y[i] - mean[0]) ** 2 / variance + math.log(2 * math.pi * variance))
        np.testing.assert_allclose(found[i], expected, atol=1e-9)


def test_leave_one_out_density_keeps_its_digits_under_tiny_noise():
    times, y = 3.0 * np.arange(6), np.array([0.3, -1.2, 0.8, 2.0, -0.5, 0.1])
    model = as_given(Matern(1.0, nu=1.5), noise=1e-16).fit(times, y)
    found = model.loo()
    for i in range(6):
        rest = np.arange(6) != i
        mean, cov, _ = dense(Matern(1.0, nu=1.5), times[rest], y[rest], np.zeros(5), times[i : i + 1], 1e-16)
        expected = -0.5 * ((y[i] - mean[0]) ** 2 / cov[0, 0] + math.log(2 * math.pi * cov[0, 0]))
        np.testing.assert_allclose(found[i], expected, rtol=1e-10)


def test_known_noise_may_be_one_number():
    times, y, _ = series()
    one, many = (as_given(Matern(), noise=0.0).fit(times, y, noise=noise) for noise in (0.3, np.full(len(y), 0.3)))
    np.testing.assert_array_equal(one.predict(times), many.predict(times))
    np.testing.assert_allclose(one.log_marginal_likelihood(times, y, noise=0.3), one.log_marginal_likelihood())
    density = one.log_predictive_density(times[:1] + 0.1, y[:1], noise=0.3)
    mean, std = one.predict(times[:1] + 0.1, return_std=True)
    expected = -0.5 * ((y[0] - mean) ** 2 / (std**2 + 0.3) + np.log(2 * np.pi * (std**2 + 0.3)))
    np.testing.assert_allclose(density, expected)


@pytest.mark.slow
def test_draws_have_the_joint_law_of_the_posterior():
    kernel, (times, y, known) = KERNELS["trend"](), series(30)
    model = as_given(kernel, noise=0.05).fit(times, y, noise=known)
    query, n = np.array([11.0, 2.0, 7.0, 2.1]), 4000
    draws = model.sample(query, n, random_state=0)
    mean, cov, _ = dense(kernel, times, y, known, query, 0.05)
    assert draws.shape == (4, n)
    # Five standard errors of a mean and of a covariance of n draws: by chance once in 1e5 runs with other seeds.
    spread = np.sqrt(np.diag(cov))
    assert (np.abs(draws.mean(1) - mean) <= 5 * spread / math.sqrt(n)).all()
    assert (np.abs(np.cov(draws) - cov) <= 5 * np.sqrt(2 / n) * np.outer(spread, spread)).all()
    noisy = model.sample_y(query, n, random_state=0)
    np.testing.assert_allclose(noisy.var(1), spread**2 + 0.05, rtol=5 * math.sqrt(2 / n))
    np.testing.assert_array_equal(draws, model.sample(query, n, random_state=0))


def test_the_slope_is_the_derivative_of_the_mean():
    kernel, (times, y, known) = KERNELS["matern52"](), series()
    model = StateSpaceGP(kernel, noise=0.05, optimizer=None, normalize_X=True).fit(times, y, noise=known)
    query, h = np.array([1.0, 4.5, 7.0, 14.0]), 1e-4
    slope, std = model.predict_derivative(query, return_std=True)
    # Central differences of a mean with bounded third derivative: h^2, and rounding 1e-13 / h.
    np.testing.assert_allclose(slope, (model.predict(query + h) - model.predict(query - h)) / (2 * h), atol=1e-6)
    # The variance of a difference quotient tends to that of the slope, from a covariance good to 1e-12.
    for i, q in enumerate(query):
        _, cov = model.predict(np.array([q - 0.01, q + 0.01]), return_cov=True, latent=True)
        quotient = (cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]) / 0.02**2
        np.testing.assert_allclose(std[i], math.sqrt(quotient), rtol=2e-2)


def test_a_rough_process_has_no_slope():
    model = StateSpaceGP("matern12", optimizer=None).fit([0.0, 1.0, 2.0], [0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="differentiable"):
        model.predict_derivative([0.5])


def test_far_from_the_data_it_is_the_prior():
    times, y, _ = series()
    model = StateSpaceGP("matern32", random_state=0).fit(times, y)
    mean, std = model.predict([-1e4, 1e4], return_std=True, latent=True)
    np.testing.assert_allclose(mean, model.mean_, rtol=1e-12)
    outputscale = model.kernel_.outputscale.item() * np.nanstd(y) ** 2
    np.testing.assert_allclose(std, math.sqrt(outputscale), rtol=1e-12)


@pytest.mark.slow
def test_rows_in_any_order_and_missing_rows_give_the_same_fit():
    times, y, known = series()
    order, seen = np.random.default_rng(0).permutation(len(y)), ~np.isnan(y)
    fits = [
        StateSpaceGP(random_state=0).fit(times, y, noise=known),
        StateSpaceGP(random_state=0).fit(times[order, None], y[order], noise=known[order]),
        StateSpaceGP(random_state=0).fit(times[seen], y[seen], noise=known[seen]),
    ]
    query = np.linspace(-1, 14, 9)
    for other in fits[1:]:
        # The searches see losses that differ by rounding, and stop at a gradient of 1e-5.
        np.testing.assert_allclose(fits[0].predict(query), other.predict(query), rtol=1e-4)
    assert [f.n_observed_ for f in fits] == [58, 58, 58]


def test_two_observations_at_one_time_are_one_with_their_mean():
    kernel = Matern(1.0, nu=1.5)
    twice = as_given(kernel, noise=0.2).fit([0.0, 1.0, 1.0], [0.5, 1.0, 2.0])
    once = as_given(kernel, noise=0.0).fit([0.0, 1.0], [0.5, 1.5], noise=[0.2, 0.1])
    query = [-0.5, 0.5, 1.0, 2.0]
    np.testing.assert_allclose(
        twice.predict(query, return_std=True, latent=True),
        once.predict(query, return_std=True, latent=True),
        rtol=1e-12,
    )


@pytest.mark.slow
def test_a_seasonal_series_is_forecast():
    rng = np.random.default_rng(0)
    times = np.arange(0, 20, 1 / 12)
    y = 0.5 * times + 2 * np.sin(2 * np.pi * times) + 0.1 * rng.normal(size=len(times))
    train = times < 15
    year = Periodic(1.0, period=1.0)
    year.log_period.requires_grad_(False)
    kernel = Scale(Matern(10.0, nu=2.5)) + Scale(year) + Linear()
    model = StateSpaceGP(kernel, normalize_y=False, noise=0.05).fit(times[train], y[train])
    mean, std = model.predict(times[~train], return_std=True)
    error = y[~train] - mean
    # The noise is 0.1 and five periods ahead the phase is known to a few hundredths of a month.
    assert np.sqrt(np.mean(error**2)) < 0.2
    assert (np.abs(error) < 4 * std).all()
