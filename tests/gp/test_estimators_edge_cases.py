"""The regressor where fits fail, units are extreme, precision is low, or files must say everything."""

import copy
import os
import stat

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from stochproc.exceptions import DataWarning, NotPositiveDefiniteError
from stochproc.gp import InverseGamma, ScaleMixtureGPRegressor
from stochproc.kernels import RBF, Linear

from .test_estimators import data


def fail(_):
    raise RuntimeError("stop")


def test_a_failed_refit_leaves_the_old_fit_as_it_was():
    pd = pytest.importorskip("pandas")
    X, y = data(30)
    frame = pd.DataFrame(X, columns=["a", "b"])
    model = ScaleMixtureGPRegressor().fit(frame, y)
    before = model.predict(frame, return_std=True)
    with pytest.raises(RuntimeError, match="stop"):
        model.fit(100 * np.column_stack([X, X]), np.stack([y, 7 * y], 1), callback=fail)
    np.testing.assert_array_equal(model.predict(frame, return_std=True), before)
    assert model.n_features_in_ == 2
    assert list(model.feature_names_in_) == ["a", "b"]
    model.kernel = lambda a, b: -torch.exp(-torch.cdist(a, b))
    with pytest.raises(NotPositiveDefiniteError):
        model.fit(X * 3, y * 5)
    np.testing.assert_array_equal(model.predict(frame, return_std=True), before)


def test_a_first_fit_that_fails_leaves_an_unfitted_estimator():
    X, y = data(30)
    model = ScaleMixtureGPRegressor()
    with pytest.raises(RuntimeError, match="stop"):
        model.fit(X, y, callback=fail)
    with pytest.raises(NotFittedError):
        model.predict(X)
    assert not hasattr(model, "n_features_in_")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("gain_X", "offset_X", "gain_y"), [(1, 1e9, 1), (1e30, 0, 1), (1, 0, 1e-30), (1, 0, 1e30), (1e-30, 0, 1)]
)
def test_offsets_and_units_of_the_data_cost_no_digits(dtype, gain_X, offset_X, gain_y):
    X, y = data(30)
    options = {"dtype": dtype, "optimizer": None}
    plain = ScaleMixtureGPRegressor(**options).fit(X, y)
    moved = ScaleMixtureGPRegressor(**options).fit(gain_X * X + offset_X, gain_y * y)
    mean, std = moved.predict(gain_X * X + offset_X, return_std=True)
    # Inputs at an offset of 1e9 hold 1e-7 of their own spread; float32 works to some 1e-5 behind the factor.
    for got, want in zip((mean, std), plain.predict(X, return_std=True), strict=True):
        np.testing.assert_allclose(got / gain_y, want, rtol=1e-4 if dtype == "float32" else 1e-6)
        assert got.dtype == np.dtype(dtype)


def test_inputs_whose_squares_overflow_are_standardised():
    X, y = data(30)
    for how in (True, "global"):
        plain = ScaleMixtureGPRegressor(optimizer=None, normalize_X=how).fit(X, y)
        for gain in (1e160, 1e-160):
            moved = ScaleMixtureGPRegressor(optimizer=None, normalize_X=how).fit(gain * X, gain * y)
            np.testing.assert_allclose(moved.predict(gain * X) / gain, plain.predict(X), rtol=1e-9)


@pytest.mark.bad_input
def test_values_beyond_the_range_of_the_computation_are_refused_by_name():
    X, y = data(30)
    model = ScaleMixtureGPRegressor(dtype="float32", optimizer=None, normalize_X=False)
    with pytest.raises(ValueError, match=r"X after standardising must lie within the range of float32"):
        model.fit(1e39 * X, y)
    with pytest.raises(ValueError, match="X after standardising"):
        model.fit(X, y).predict(1e39 * X)
    model = ScaleMixtureGPRegressor(dtype="float32", optimizer=None).fit(X, 1e30 * y)
    with pytest.raises(ValueError, match="cov must lie within the range of float32"):
        model.predict(X, return_cov=True)
    with pytest.raises(ValueError, match="y must have columns of finite mean and positive scale"):
        ScaleMixtureGPRegressor(optimizer=None).fit(X, 5e-324 * np.r_[1.0, np.zeros(29)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_in_single(dtype):
    X, y = data(20)
    model = ScaleMixtureGPRegressor(optimizer=None).fit(torch.tensor(X).to(dtype), torch.tensor(y).to(dtype))
    got = model.predict(torch.tensor(X).to(dtype))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, model.predict(torch.tensor(X).to(dtype).double()), rtol=1e-6)
    assert model.loo().dtype == torch.float32


@pytest.mark.parametrize("n", [60, 200])
def test_float32_fits_converge_without_a_warning_near_the_float64_optimum(n):
    X, y = data(n)
    low, high = (ScaleMixtureGPRegressor(dtype=d).fit(X, y) for d in ("float32", "float64"))
    assert low.converged_
    # A tenth of a nat is what a search promises.
    assert low.log_marginal_likelihood_ == pytest.approx(high.log_marginal_likelihood_, abs=0.1)


def test_functions_known_exactly_can_be_drawn_at_their_points():
    X = np.random.default_rng(0).normal(size=(5, 1))
    y = np.sin(X[:, 0])
    draws = ScaleMixtureGPRegressor(noise=0.0, optimizer=None).fit(X, y).sample_y(X, 3, random_state=0)
    # The jitter is 1e-10 of the prior variance, so 1e-5 of the prior deviation, of order 1, in a draw.
    np.testing.assert_allclose(draws, np.repeat(y[:, None], 3, 1), atol=1e-4)


def test_a_saved_file_has_the_mode_of_the_umask_or_of_the_file_it_replaces(tmp_path):
    X, y = data(10)
    model, target = ScaleMixtureGPRegressor(optimizer=None).fit(X, y), tmp_path / "m"
    (tmp_path / "new").touch()
    model.save(target)
    assert target.stat().st_mode == (tmp_path / "new").stat().st_mode
    os.chmod(target, 0o640)
    model.save(target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_refit_after_loading_keeps_what_was_frozen(tmp_path):
    X, y = data(30)
    kernel, prior = RBF([0.7, 1.3]) + Linear(), InverseGamma(2.0, 1.5)
    kernel.kernels[0].log_lengthscale.requires_grad_(False)
    prior.requires_grad_(True)
    model = ScaleMixtureGPRegressor(kernel, scale_prior=prior).fit(X, y)
    model.save(tmp_path / "m")
    again = ScaleMixtureGPRegressor.load(tmp_path / "m").fit(X, y)
    assert again.kernel_.kernels[0].lengthscale.tolist() == pytest.approx([0.7, 1.3])
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert again.scale_prior.log_a.requires_grad


@pytest.mark.bad_input
def test_a_kernel_whose_parts_share_a_hyperparameter_is_not_saved(tmp_path):
    X, y = data(20)
    part = RBF()
    model = ScaleMixtureGPRegressor(part + part * Linear(), optimizer=None).fit(X, y)
    with pytest.raises(TypeError, match=r"kernel cannot be saved: .*lengthscale.* are one parameter"):
        model.save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.bad_input
def test_a_directory_is_not_a_file_to_load(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory, not a file that save\(\) wrote"):
        ScaleMixtureGPRegressor.load(tmp_path)


# The likelihood is so curved in the period that rounding of its gradient can end the search above the tolerance.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("period", [0.7, 2.5])
def test_a_periodic_kernel_finds_the_period_of_a_sine(period):
    X = np.linspace(0, 10, 80)[:, None]
    noise = 0.05 * np.random.default_rng(0).normal(size=80)
    model = ScaleMixtureGPRegressor("periodic").fit(X, np.sin(2 * np.pi * X[:, 0] / period) + noise)
    found = model.kernel_.period.item() * X.std()
    # The frequency is known to sqrt(6/n) noise/(pi T) = 4e-4 a unit of X, so a period of 2.5 to 3e-3: 1 %.
    assert found == pytest.approx(period, rel=0.01)


@pytest.mark.parametrize("optimizer", ["lbfgs", None])
def test_an_indefinite_matrix_is_diagnosed_with_and_without_a_search(optimizer):
    X, y = data(20)
    indefinite = ScaleMixtureGPRegressor(lambda a, b: -torch.exp(-torch.cdist(a, b)), noise=0.0, optimizer=optimizer)
    with pytest.raises(NotPositiveDefiniteError, match=r"condition about .* closest pair of points is rows \d+ and"):
        indefinite.fit(X, y)
    kernel = RBF(1.0)
    model = ScaleMixtureGPRegressor(lambda a, b: -kernel(a, b), noise=1e-3, optimizer=optimizer)
    with pytest.raises(NotPositiveDefiniteError, match="closest pair of points"):
        model.fit(X, y)


def test_leave_one_out_densities_are_torch_if_the_fit_was(tmp_path):
    X, y = data(20)
    model = ScaleMixtureGPRegressor(optimizer=None).fit(torch.tensor(X), torch.tensor(y))
    assert isinstance(model.loo(), torch.Tensor)
    model.save(tmp_path / "m")
    assert torch.equal(ScaleMixtureGPRegressor.load(tmp_path / "m").loo(), model.loo())
    assert isinstance(model.fit(X, y).loo(), np.ndarray)


def test_byte_order_and_numpy_booleans_change_nothing():
    X, y = data(20)
    want = ScaleMixtureGPRegressor(optimizer=None).fit(X, y).predict(X)
    model = ScaleMixtureGPRegressor(optimizer=None, normalize_y=np.True_, normalize_X=np.True_)
    np.testing.assert_array_equal(model.fit(X.astype(">f8"), y.astype(">f8")).predict(X.astype(">f8")), want)


def test_fits_and_files_work_in_inference_mode(tmp_path):
    X, y = data(20)
    want = ScaleMixtureGPRegressor().fit(X, y)
    with torch.inference_mode():
        model = ScaleMixtureGPRegressor(RBF([1.0, 1.0])).fit(torch.tensor(X), torch.tensor(y))
        np.testing.assert_array_equal(ScaleMixtureGPRegressor().fit(X, y).predict(X), want.predict(X))
        model.save(tmp_path / "m")
        again = ScaleMixtureGPRegressor.load(tmp_path / "m")
    np.testing.assert_array_equal(again.fit(X, y).predict(X), model.predict(X))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "foo"}, ValueError, "device must be None or a device of this machine.*got 'foo'"),
        ({"verbose": -1}, ValueError, "verbose must be at least 0; got -1"),
        ({"verbose": "yes"}, TypeError, "verbose must be an integer"),
        ({"kernel": RBF(batch_shape=(3,))}, ValueError, r"kernel must be a single one.*got a batch of shape \(3,\)"),
        ({"kernel": RBF() + RBF(batch_shape=(2,))}, ValueError, "kernel must be a single one"),
    ],
)
def test_devices_verbosity_and_batches_are_refused_by_name(options, error, message):
    X, y = data(10)
    with pytest.raises(error, match=message):
        ScaleMixtureGPRegressor(**options).fit(X, y)


@pytest.mark.bad_input
@pytest.mark.parametrize("y", [["a", "b", "c"], [["a", "b"]] * 3, np.ones((3, 2), dtype="M8[s]")])
def test_targets_that_are_no_numbers_are_refused_by_name(y):
    with pytest.raises(ValueError, match="y must hold real numbers"):
        ScaleMixtureGPRegressor().fit(np.zeros((3, 1)), np.asarray(y))


@pytest.mark.parametrize(("dtype", "gain"), [("float32", 1e-7), ("float32", 1e-12), ("float64", 1e-16)])
def test_small_targets_are_learned_from_though_they_are_not_standardised(dtype, gain):
    X, y = data(30)
    options = {"dtype": dtype, "normalize_y": False, "n_restarts": 1}
    model, small = (ScaleMixtureGPRegressor(**options).fit(X, g * y) for g in (1.0, gain))
    # The scale is profiled out: losses differ by rounding, and a search ends within 0.1 nat of the optimum.
    assert small.log_marginal_likelihood_ + 30 * np.log(gain) == pytest.approx(model.log_marginal_likelihood_, abs=0.1)


def test_rounding_of_a_constant_target_is_no_data():
    X, _ = data(20)
    constant = np.full(20, 0.3)
    rounded = constant.copy()
    rounded[3] = 0.1 + 0.2
    with pytest.warns(DataWarning, match="y does not vary"):
        model, other = (ScaleMixtureGPRegressor().fit(X, y) for y in (constant, rounded))
    np.testing.assert_allclose(other.predict_interval(X), model.predict_interval(X), rtol=1e-12)


@pytest.mark.parametrize("noise_model", ["scaled", "independent"])
@pytest.mark.parametrize("gain", [1e160, 1e-160])
def test_targets_whose_squares_do_not_fit_are_refused_by_name(noise_model, gain):
    X, y = data(20)
    with pytest.raises(ValueError, match="y must be 0 or between 1e-140 and 1e\\+140 in size"):
        ScaleMixtureGPRegressor(noise_model=noise_model, normalize_y=False).fit(X, gain * y)


@pytest.mark.parametrize(
    "later", [{"noise_model": "independent"}, {"solver": "cg"}, {"inference": "importance"}], ids=str
)
def test_a_file_holds_the_fit_whatever_is_set_after_it(later, tmp_path):
    X, y = data(20)
    model = ScaleMixtureGPRegressor(optimizer=None).fit(X, y).set_params(**later)
    model.save(tmp_path / "m")
    loaded = ScaleMixtureGPRegressor.load(tmp_path / "m")
    assert type(loaded.posterior_) is type(model.posterior_)
    np.testing.assert_array_equal(loaded.predict(X, return_std=True), model.predict(X, return_std=True))
    name, value = next(iter(later.items()))
    assert getattr(loaded, name) == value


@pytest.mark.parametrize("prior", ["half_cauchy", "gamma"])
def test_leaving_out_the_only_residual_gives_a_number(prior):
    X = 100 * np.arange(12.0)[:, None]
    options = {"normalize_X": False, "normalize_y": False, "mean": "zero", "optimizer": None}
    for dtype in ("float32", "float64"):
        loo = ScaleMixtureGPRegressor(RBF(1.0), scale_prior=prior, dtype=dtype, **options).fit(X, np.eye(12)[5]).loo()
        assert np.isfinite(loo).all()
        # The others are exactly zero, so that their own law all but excludes it.
        assert loo.argmin() == 5


def test_a_learned_kernel_can_start_another_search_once_it_is_thawed():
    X, y = data(30)
    model = ScaleMixtureGPRegressor(n_restarts=1).fit(X, y)
    frozen = ScaleMixtureGPRegressor(model.kernel_, n_restarts=1).fit(X, np.sin(3 * X[:, 0]))
    assert torch.equal(frozen.kernel_.lengthscale, model.kernel_.lengthscale)
    thawed = copy.deepcopy(model.kernel_).requires_grad_()
    again = ScaleMixtureGPRegressor(thawed, n_restarts=1).fit(X, np.sin(3 * X[:, 0]))
    assert again.log_marginal_likelihood_ > frozen.log_marginal_likelihood_ + 1
