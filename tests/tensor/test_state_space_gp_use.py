"""Series as users have them: long ones, units, files, displays, interruptions, bad input."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from stochproc.exceptions import DataWarning
from stochproc.gp import GPDisplay
from stochproc.kernels import RBF, Matern, RationalQuadratic, Scale
from stochproc.tensor import StateSpaceGP
from tests.tensor.test_state_space_gp import KERNELS, series


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
