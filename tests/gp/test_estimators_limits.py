"""The regressor at its limits: ill-conditioned matrices, searches cut short, files, bad input, coverage."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc.exceptions import NotPositiveDefiniteError, NumericalWarning
from stochproc.gp import BurrXII, InverseGamma, ScaleMixtureGPRegressor
from stochproc.kernels import RBF, Linear, Matern, Scale
from stochproc.solvers import LBFGS, Status
from tests.gp.test_estimators import as_given, data


def test_a_variance_that_does_not_exist_is_refused_and_quantiles_are_not():
    model = as_given(RBF(1.0), noise=0.1, scale_prior=InverseGamma(0.4, 1.0)).fit([[0.0]], [2.0])
    with pytest.raises(ValueError, match="predict_quantiles"):
        model.predict([[0.0]], return_std=True)
    with pytest.raises(ValueError, match="predict_quantiles"):
        model.predict([[0.0]], return_cov=True)
    assert np.isfinite(model.predict_quantiles([[0.0]], [0.01, 0.99])).all()


def test_an_ill_conditioned_matrix_is_factored_with_a_warning_that_says_how():
    X = np.linspace(0, 1, 60)[:, None]
    with pytest.warns(NumericalWarning, match="jitter"):
        as_given(RBF(1.0), noise=0.0).fit(X, np.sin(X[:, 0]))


def test_an_indefinite_kernel_is_refused_with_its_eigenvalues():
    X, y = data(20)
    with pytest.raises(NotPositiveDefiniteError, match="eigenvalue"):
        as_given(lambda a, b: -torch.exp(-torch.cdist(a, b)), noise=0.0).fit(X, y)


def test_a_search_that_is_cut_short_warns_and_says_so():
    X, y = data()
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        model = ScaleMixtureGPRegressor(optimizer=LBFGS(max_iter=1)).fit(X, y)
    assert not model.converged_
    assert model.n_iter_ == 1
    assert model.optimizer_result_.status is Status.MAX_ITER


def test_a_callback_stops_the_search():
    X, y = data()
    seen = []
    with pytest.warns(ConvergenceWarning, match="callback"):
        model = ScaleMixtureGPRegressor().fit(X, y, callback=lambda s: seen.append(s.residual) or len(seen) == 2)
    assert len(seen) == 2
    assert np.isfinite(model.predict(X)).all()


def test_an_interruption_leaves_a_usable_estimator():
    X, y = data()

    def interrupt(state):
        if state.iteration == 3:
            raise KeyboardInterrupt

    model = ScaleMixtureGPRegressor()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y, callback=interrupt)
    assert not model.converged_
    assert model.n_iter_ == 3
    start = ScaleMixtureGPRegressor(optimizer=None).fit(X, y)
    assert model.log_marginal_likelihood_ > start.log_marginal_likelihood_


def test_an_interruption_leaves_the_mean_and_the_scale_of_what_was_found():
    X, y = data()
    calls = []

    def interrupt(state):
        calls.append(state)
        if len(calls) == 3:
            raise KeyboardInterrupt

    model = ScaleMixtureGPRegressor(normalize_y=False)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, 1e3 * y + 1e6, callback=interrupt)
    # The scale of an inverse gamma prior has its optimum at a S/N.
    scale = model.scale_posterior_
    assert model.scale_prior_.b.item() == pytest.approx(2 * scale.quad.item() / scale.n_obs, rel=1e-9)
    target = 1e3 * y + 1e6
    assert abs(model._mean_.item() - target.mean()) < target.std()


def test_restarts_never_end_lower_and_repeat_with_their_seed():
    X, y = data(40)
    one = ScaleMixtureGPRegressor().fit(X, y)
    runs = [ScaleMixtureGPRegressor(n_restarts=3, random_state=1).fit(X, y) for _ in range(2)]
    assert runs[0].log_marginal_likelihood_ >= one.log_marginal_likelihood_ - 1e-6
    assert runs[0].log_marginal_likelihood_ == runs[1].log_marginal_likelihood_
    assert len(runs[0].optimizer_result_.stats["starts"]) == 3


def test_a_file_holds_names_and_numbers_of_every_library_kernel(tmp_path):
    X, y = data(25)
    kernel = Scale(Matern([1.0, 2.0], nu=1.5), 2.0) + Linear(0.3) * RBF()
    model = ScaleMixtureGPRegressor(kernel, scale_prior=BurrXII(0.7, 1.5), optimizer=LBFGS(max_iter=500)).fit(X, y)
    model.save(tmp_path / "m")
    again = ScaleMixtureGPRegressor.load(tmp_path / "m")
    np.testing.assert_array_equal(again.predict(X, return_std=True), model.predict(X, return_std=True))
    assert again.optimizer == model.optimizer
    assert again.log_marginal_likelihood_ == model.log_marginal_likelihood_
    assert again.noise_variance_ == model.noise_variance_
    assert repr(again.kernel_) == repr(model.kernel_)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    X, y = data(10)
    target = tmp_path / "m"
    ScaleMixtureGPRegressor(optimizer=None).fit(X, y).save(target)
    before = target.read_bytes()
    with pytest.raises(TypeError, match="random_state cannot be saved"):
        ScaleMixtureGPRegressor(optimizer=None, random_state=np.random.RandomState(0)).fit(X, y).save(target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.bad_input
def test_a_wrong_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError):
        ScaleMixtureGPRegressor.load(tmp_path / "none")
    (tmp_path / "text").write_text("not a model, by far not")
    with pytest.raises(ValueError, match=r"not a file that save\(\) wrote"):
        ScaleMixtureGPRegressor.load(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not one that save"):
        ScaleMixtureGPRegressor.load(tmp_path / "other")
    save_file({"a": torch.zeros(1)}, tmp_path / "class", {"stochproc": '{"class": "Other"}'})
    with pytest.raises(ValueError, match="holds a Other"):
        ScaleMixtureGPRegressor.load(tmp_path / "class")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise_model": "outside"}, ValueError, "noise_model must be one of 'scaled', 'independent'; got 'outside'"),
        ({"mean": "linear"}, ValueError, "mean must be one of 'constant', 'zero'; got 'linear'"),
        ({"normalize_X": "columns"}, ValueError, "normalize_X must be one of True, False, 'global'"),
        ({"normalize_y": "global"}, ValueError, "normalize_y must be one of True, False"),
        ({"optimizer": "adam"}, ValueError, "optimizer must be one of 'lbfgs', None; got 'adam'"),
        ({"n_restarts": 0}, ValueError, "n_restarts must be at least 1; got 0"),
        ({"n_restarts": 1.5}, TypeError, "n_restarts must be an integer"),
        ({"solver": "lu"}, ValueError, "solver must be one of 'auto', 'cholesky', 'cg'; got 'lu'"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of 'float64', 'float32'; got 'float16'"),
        ({"noise": -0.1}, ValueError, "noise must be non-negative and finite; got -0.1"),
        ({"noise": float("nan")}, ValueError, "noise must be non-negative and finite"),
        ({"noise": "low"}, TypeError, "noise must be a number"),
        ({"kernel": "rfb"}, ValueError, "unknown kernel 'rfb'"),
        ({"kernel": 3}, TypeError, "kernel must be a Kernel, a name"),
        ({"kernel": RBF([1.0, 2.0, 3.0])}, ValueError, "lengthscale has 3 entries, one a column"),
        ({"scale_prior": "student"}, ValueError, "inverse_gamma"),
        ({"scale_prior": 2.0}, TypeError, "prior"),
        ({"random_state": -1, "n_restarts": 2}, ValueError, "random_state must be a non-negative integer"),
        ({"random_state": -1, "optimizer": None}, ValueError, "random_state must be a non-negative integer"),
        ({"random_state": "0", "optimizer": None}, TypeError, "random_state must be None, an integer, .*; got str"),
    ],
)
def test_bad_parameters_name_themselves_and_what_is_allowed(options, error, message):
    X, y = data(10)
    with pytest.raises(error, match=message):
        ScaleMixtureGPRegressor(**options).fit(X, y)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        ([[0.0], [np.nan]], [0.0, 1.0], "X contains NaN"),
        ([[0.0], [1.0]], [0.0, np.inf], "y contains infinity"),
        ([[0.0], [1.0]], [0.0, 1.0, 2.0], "inconsistent numbers of samples"),
        (np.zeros((0, 2)), [], "0 sample"),
        ([[0.0]], [1.0], "1 sample"),
        ([0.0, 1.0], [0.0, 1.0], "Reshape your data"),
    ],
)
def test_bad_data_are_refused_before_any_work(X, y, message):
    with pytest.raises(ValueError, match=message):
        ScaleMixtureGPRegressor().fit(X, y)


@pytest.mark.bad_input
def test_bad_queries_are_refused():
    X, y = data(10)
    model = ScaleMixtureGPRegressor(optimizer=None).fit(X, y)
    with pytest.raises(ValueError, match="3 features"):
        model.predict(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="return_std and return_cov"):
        model.predict(X, return_std=True, return_cov=True)
    with pytest.raises(ValueError, match=r"y must have 1 output\(s\)"):
        model.log_predictive_density(X, np.zeros((10, 2)))
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        model.sample_y(X, 0)


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["delta", "inverse_gamma"])
def test_intervals_on_data_of_the_model_cover_as_often_as_they_say(prior):
    # 40 functions of 150 test points each; the standard error of a mean of 40 coverages that vary by some 0.05
    # is 0.008, so four of them is 0.032.
    covered = []
    rng = np.random.default_rng(0)
    for _ in range(40):
        X = rng.uniform(0, 5, size=(200, 1))
        K = np.exp(-((X - X.T) ** 2) / 2) + 0.1 * np.eye(200)
        y = np.linalg.cholesky(K) @ rng.normal(size=200)
        model = ScaleMixtureGPRegressor(scale_prior=prior, n_restarts=1).fit(X[:50], y[:50])
        lower, upper = model.predict_interval(X[50:]).T
        covered.append(np.mean((lower < y[50:]) & (y[50:] < upper)))
    assert abs(np.mean(covered) - 0.9) < 0.032
