"""The estimator against a dense Gaussian process, and what people do with a series."""

import math

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel
from sklearn.gaussian_process.kernels import Matern as SklearnMatern

from stochproc.exceptions import DataWarning
from stochproc.gp import GPDisplay
from stochproc.kernels import RBF, Linear, Matern, Periodic, RationalQuadratic, Scale
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


def test_a_long_series_is_smoothed():
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(size=20_000))
    y = np.sin(times / 50) + 0.3 * rng.normal(size=len(times))
    model = StateSpaceGP(Matern(50.0, nu=1.5), optimizer=None, noise=0.1).fit(times, y)
    # Some 50 values a lengthscale: an error of about 0.3 / sqrt(25).
    assert np.sqrt(np.mean((model.predict(times) - np.sin(times / 50)) ** 2)) < 0.1


def test_draws_of_a_long_series_take_bounded_memory():
    model = StateSpaceGP(Matern(50.0, nu=1.5), optimizer=None).fit(np.arange(30_000.0), np.sin(np.arange(30_000.0)))
    assert model.sample([-1.0, 4.5], 12, random_state=0).shape == (2, 12)


@pytest.mark.slow
def test_named_kernels_start_from_the_scale_of_the_data():
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 1, 150))
    y = np.sin(12 * x) + 0.1 * rng.normal(size=150)
    fits = [StateSpaceGP("matern52").fit(unit * x + shift, y) for unit, shift in [(1, 0), (1e6, 1e9), (1e-6, 0)]]
    scales = [f.kernel_.kernel.lengthscale.item() for f in fits]
    # Times near 1e9 have rounding of 1e-7 against gaps of 1e4.
    np.testing.assert_allclose(scales, [scales[0], 1e6 * scales[0], 1e-6 * scales[0]], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "period"), [(30.0, 3.7), (100.0, 1.0)])
def test_the_period_of_a_named_kernel_is_found(width, period):
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0, width, 300))
    y = np.sin(2 * np.pi * times / period) ** 3 + 0.1 * rng.normal(size=300)
    model = StateSpaceGP("periodic").fit(times, y)
    np.testing.assert_allclose(model.kernel_.kernel.period.item(), period, rtol=1e-3)


@pytest.mark.slow
def test_the_search_does_not_depend_on_the_unit_of_the_target():
    times, y, _ = series()
    fits = [StateSpaceGP(normalize_y=False, noise=0.1 * unit**2).fit(times, unit * y) for unit in (1.0, 1e6)]
    np.testing.assert_allclose(fits[1].predict(times), 1e6 * fits[0].predict(times), rtol=5e-3)


def test_scores_leave_missing_targets_out():
    times, y, _ = series()
    model, seen = StateSpaceGP(optimizer=None).fit(times, y), ~np.isnan(y)
    assert model.score(times, y) == pytest.approx(model.score(times[seen], y[seen]))
    masked = np.ma.masked_invalid(y)
    assert StateSpaceGP(optimizer=None).fit(times, masked).n_observed_ == seen.sum()


@pytest.mark.slow
def test_saving_keeps_predictions_and_order(tmp_path):
    times, y, known = series()
    model = StateSpaceGP(KERNELS["sum"](), random_state=0).fit(times, y, noise=known)
    model.save(tmp_path / "model.safetensors")
    loaded = StateSpaceGP.load(tmp_path / "model.safetensors")
    query = np.linspace(-1, 15, 8)
    for ours, theirs in zip(model.predict(query, return_std=True), loaded.predict(query, return_std=True), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(model.loo(), loaded.loo())
    assert loaded.log_marginal_likelihood() == pytest.approx(model.log_marginal_likelihood(), rel=1e-14)


def test_torch_and_pandas_give_back_what_they_are():
    pd = pytest.importorskip("pandas")
    times, y, _ = series()
    model = StateSpaceGP(optimizer=None).fit(torch.tensor(times), torch.tensor(y))
    assert isinstance(model.predict(torch.tensor(times)), torch.Tensor)
    frame = pd.DataFrame({"year": times})
    for X in (frame, frame["year"]):
        model = StateSpaceGP(optimizer=None).fit(X, pd.Series(y))
        assert list(model.feature_names_in_) == ["year"]
        assert isinstance(model.predict(X), np.ndarray)
    with pytest.raises(TypeError, match="got dates"):
        model.fit(pd.date_range("2020-01-01", periods=len(y)), y)


@pytest.mark.filterwarnings("error")
def test_a_display_draws_vectors_of_times_with_missing_values():
    pd = pytest.importorskip("pandas")
    mpl = pytest.importorskip("matplotlib")
    mpl.use("Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    times, y, _ = series()
    for X in (times, pd.Series(times, name="year")):
        model = StateSpaceGP(optimizer=None).fit(X, y)
        display = GPDisplay.from_estimator(model, X, y)
        assert display.ax_.get_xlabel() == getattr(X, "name", "x")
        grid = display.grid if X is times else pd.Series(display.grid, name="year")
        np.testing.assert_array_equal(display.mean, model.predict(grid))
        plt.close(display.figure_)


def test_a_callback_stops_the_search_and_says_so():
    times, y, _ = series()
    with pytest.warns(ConvergenceWarning, match="without meeting its tolerance"):
        model = StateSpaceGP().fit(times, y, callback=lambda state: state.iteration == 2)
    assert not model.converged_
    assert model.n_iter_ == 2


def test_an_interruption_leaves_a_usable_estimator():
    times, y, _ = series()

    def interrupt(state):
        raise KeyboardInterrupt

    model = StateSpaceGP()
    with pytest.raises(KeyboardInterrupt):
        model.fit(times, y, callback=interrupt)
    assert np.isfinite(model.predict(times)).all()
    assert not model.converged_


def test_a_failed_fit_leaves_the_old_one():
    times, y, _ = series()
    model = StateSpaceGP(optimizer=None).fit(times, y)
    before = model.predict(times)
    with pytest.raises(ValueError, match="one column"):
        model.fit(np.ones((5, 2)), np.ones(5))
    np.testing.assert_array_equal(model.predict(times), before)


def test_equal_targets_warn_and_are_predicted():
    with pytest.warns(DataWarning, match="does not vary"):
        model = StateSpaceGP().fit([0.0, 1.0, 2.0], [4.0, 4.0, 4.0])
    np.testing.assert_allclose(model.predict([0.5, 9.0]), 4.0)


def test_times_without_digits_warn():
    with pytest.warns(DataWarning, match="few digits"):
        StateSpaceGP(optimizer=None).fit(1e13 + np.arange(3.0), [0.0, 1.0, 0.0])


def test_a_named_kernel_learns_an_outputscale_and_an_object_is_used_as_it_is():
    times, y, _ = series()
    assert isinstance(StateSpaceGP("matern12", optimizer=None).fit(times, y).kernel_, Scale)
    mine = Matern(0.7, nu=0.5)
    fitted = StateSpaceGP(mine).fit(times, y)
    assert isinstance(fitted.kernel_, Matern)
    assert mine.lengthscale.item() == pytest.approx(0.7)
    assert clone(fitted).kernel.lengthscale.item() == pytest.approx(0.7)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "fit", "error", "match"),
    [
        ({"kernel": "rational_quadratic"}, {}, ValueError, "must have a state space, such as 'rbf', 'matern12'"),
        ({"kernel": RationalQuadratic()}, {}, ValueError, "must have a state space"),
        ({"kernel": "wiener"}, {}, ValueError, "matern32"),
        ({"kernel": Matern([1.0, 2.0])}, {}, ValueError, "lengthscale|column"),
        ({"kernel": RBF(torch.ones(3, 1), batch_shape=(3,))}, {}, ValueError, "batch"),
        ({"noise": -1.0}, {}, ValueError, "noise must be non-negative"),
        ({"noise": 0.0}, {}, ValueError, "noise must be positive in all"),
        ({"mean": "linear"}, {}, ValueError, "mean must be one of"),
        ({"method": "fast"}, {}, ValueError, "method must be one of"),
        ({"normalize_X": "global"}, {}, ValueError, "normalize_X must be one of"),
        ({}, {"X": np.ones((4, 2))}, ValueError, "one column"),
        ({}, {"X": [0.0, 1.0, np.nan, 2.0]}, ValueError, "NaN"),
        ({}, {"y": [0.0, np.inf, 1.0, 2.0]}, ValueError, "infinity"),
        ({}, {"y": [np.nan] * 4}, ValueError, "at least one observed"),
        ({}, {"y": [0.0, 1.0]}, ValueError, "inconsistent numbers of samples"),
        ({}, {"noise": [0.1, 0.1]}, ValueError, "one a row of X, 4; got shape"),
        ({}, {"noise": -0.5}, ValueError, "noise must be non-negative and finite; got -0.5"),
        ({}, {"noise": np.ones((4, 2))}, ValueError, "noise must be one number or one a row"),
        ({}, {"X": np.arange(4).astype("datetime64[D]")}, TypeError, "X must hold numbers; got dates"),
        ({}, {"y": [0.0, 1e300, 1.0, 2.0]}, ValueError, "y must have entries between"),
        ({}, {"y": ["a", "b", "c", "d"]}, ValueError, "y must hold real numbers"),
        ({}, {"noise": [0.1, -0.1, 0.1, 0.1]}, ValueError, "non-negative; got -0.1"),
    ],
)
def test_bad_input_is_named(options, fit, error, match):
    arguments = {"X": [0.0, 1.0, 2.0, 3.0], "y": [0.0, 1.0, 0.0, 1.0], **fit}
    with pytest.raises(error, match=match):
        StateSpaceGP(**{"optimizer": None, **options}).fit(**arguments)


@pytest.mark.bad_input
def test_before_and_after_the_fit_calls_are_checked():
    with pytest.raises(NotFittedError):
        StateSpaceGP().predict([0.0])
    model = StateSpaceGP(optimizer=None).fit([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="must not both"):
        model.predict([0.0], return_std=True, return_cov=True)
    with pytest.raises(ValueError, match="given together"):
        model.log_marginal_likelihood([0.0])
    with pytest.raises(ValueError, match="must lie in"):
        model.predict_quantiles([0.0], 1.5)
    with pytest.raises(ValueError, match="noise goes with them"):
        model.log_marginal_likelihood(noise=1.0)
    exact = StateSpaceGP(noise=0.0, optimizer=None).fit([0.0, 1.0], [0.0, 1.0], noise=0.1)
    with pytest.raises(ValueError, match="pass the known variances"):
        exact.log_marginal_likelihood([0.0], [1.0])
    with pytest.raises(ValueError, match="NaN"):
        model.log_predictive_density([0.0], [np.nan])
