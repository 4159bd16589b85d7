"""The regressor with solver="cg": the same answers as with Cholesky factors, files, and what it says when it fails."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from stochproc.exceptions import DataWarning
from stochproc.gp import ExactPosterior, LargePosterior, ScaleMixtureGPRegressor
from stochproc.gp import _large_system as system
from stochproc.gp import _model_choice as choice
from stochproc.kernels import RBF
from stochproc.solvers import CG, LBFGS, PivotedCholesky


def data(n=200, d=2, seed=0, n_outputs=None):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    shape = (n,) if n_outputs is None else (n, n_outputs)
    y = 3 * np.sin(X[:, 0]).reshape(-1, *[1] * (len(shape) - 1)) + 0.3 * rng.normal(size=shape) + 50
    return X, y


def as_given(solver="cg", **options):
    return ScaleMixtureGPRegressor(RBF(0.7), noise=0.02, optimizer=None, solver=solver, **options)


def test_every_prediction_equals_that_of_cholesky():
    X, y = data()
    ours, theirs = as_given().fit(X, y), as_given("cholesky").fit(X, y)
    X_test = X[:20] + 0.1
    for model in (ours, theirs):
        assert model.converged_
    np.testing.assert_allclose(ours.predict(X_test), theirs.predict(X_test), rtol=1e-6)
    np.testing.assert_allclose(
        ours.predict(X_test, return_std=True)[1], theirs.predict(X_test, return_std=True)[1], rtol=1e-6
    )
    np.testing.assert_allclose(
        ours.predict(X_test, return_cov=True)[1], theirs.predict(X_test, return_cov=True)[1], rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(ours.predict_interval(X_test), theirs.predict_interval(X_test), rtol=1e-6)
    np.testing.assert_allclose(
        ours.log_predictive_density(X_test, y[:20]), theirs.log_predictive_density(X_test, y[:20]), atol=1e-4
    )
    np.testing.assert_allclose(ours.sample_y(X_test, 3, 0), theirs.sample_y(X_test, 3, 0), rtol=1e-5)
    np.testing.assert_allclose(ours.loo(), theirs.loo(), atol=1e-3)
    assert ours.noise_variance_ == pytest.approx(theirs.noise_variance_, rel=1e-8)
    error = ours.log_marginal_likelihood_ - theirs.log_marginal_likelihood_
    assert abs(error) < 5 * ours.log_marginal_likelihood_stderr_ + 1e-4
    assert theirs.log_marginal_likelihood_stderr_ == 0


def test_auto_changes_over_with_the_number_of_rows(monkeypatch):
    X, y = data(60)
    assert isinstance(as_given("auto").fit(X, y).posterior_, ExactPosterior)
    monkeypatch.setattr(choice, "CHOLESKY_ROWS", 59)
    assert isinstance(as_given("auto").fit(X, y).posterior_, LargePosterior)
    # Independent noise is factored whatever the number of rows.
    assert not isinstance(as_given("auto", noise_model="independent").fit(X, y).posterior_, LargePosterior)


def test_auto_changes_over_earlier_where_memory_is_short(monkeypatch):
    X, y = data(60)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}
    # 400 kB hold 16 matrices of 56 rows.
    monkeypatch.setattr(choice.os, "sysconf", pages.__getitem__)
    assert isinstance(as_given("auto").fit(X[:56], y[:56]).posterior_, ExactPosterior)
    assert isinstance(as_given("auto").fit(X[:57], y[:57]).posterior_, LargePosterior)
    assert isinstance(as_given("cholesky").fit(X, y).posterior_, ExactPosterior)

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(choice.os, "sysconf", unknown)
    assert isinstance(as_given("auto").fit(X, y).posterior_, ExactPosterior)


@pytest.mark.parametrize("rows", [(59, 5000), (5000, 59)], ids=["by_cg", "by_cholesky"])
def test_a_file_is_loaded_by_the_solver_of_its_fit_on_a_machine_that_would_choose_the_other(
    rows, tmp_path, monkeypatch
):
    X, y = data(60)
    monkeypatch.setattr(choice, "CHOLESKY_ROWS", rows[0])
    model = as_given("auto").fit(X, y)
    model.save(tmp_path / "model")
    monkeypatch.setattr(choice, "CHOLESKY_ROWS", rows[1])
    loaded = ScaleMixtureGPRegressor.load(tmp_path / "model")
    assert loaded.solver == "auto"
    assert type(loaded.posterior_) is type(model.posterior_)
    np.testing.assert_array_equal(loaded.predict(X[:5]), model.predict(X[:5]))


def test_a_subset_of_rows_that_does_not_vary_is_reported():
    X, y = data(100)[0], np.zeros(100)
    y[7] = 1.0
    model = ScaleMixtureGPRegressor(solver="cg", hyper_subset=5, random_state=0, noise=0.03)
    with pytest.warns(
        DataWarning, match="the 5 rows drawn from 100 have one target; kernel and noise are kept as given"
    ):
        model.fit(X, y)
    assert model.noise_ == pytest.approx(0.03)


def test_a_subset_of_all_rows_learns_what_cholesky_learns():
    X, y = data()
    ours = ScaleMixtureGPRegressor(solver="cg", n_restarts=1, random_state=0).fit(X, y)
    theirs = ScaleMixtureGPRegressor(solver="cholesky", n_restarts=1, random_state=0).fit(X, y)
    assert torch.equal(ours.kernel_.lengthscale, theirs.kernel_.lengthscale)
    assert ours.noise_ == theirs.noise_
    assert ours.scale_prior_.b.item() == pytest.approx(theirs.scale_prior_.b.item(), rel=1e-8)
    np.testing.assert_allclose(ours._mean_, theirs._mean_, atol=1e-6)


def test_mean_and_scale_after_a_subset_are_the_best_for_all_rows():
    X, y = data()
    model = ScaleMixtureGPRegressor(solver="cg", hyper_subset=50, random_state=0).fit(X, y)
    again = ScaleMixtureGPRegressor(
        model.kernel_, noise=model.noise_, scale_prior=model.scale_prior_, solver="cholesky", optimizer=None
    ).fit(X, y)
    exact = choice.ScaleMixtureGP(model.kernel_, again.scale_prior_, noise=model.noise_)
    exact.fit_mean_and_scale(model.posterior_.X, model._y_train)
    assert model.scale_prior_.b.item() == pytest.approx(exact.scale_prior.b.item(), rel=1e-8)
    np.testing.assert_allclose(model._mean_, exact.constant_mean.detach(), atol=1e-6)


def test_the_subset_is_drawn_from_the_random_state():
    X, y = data()
    model = ScaleMixtureGPRegressor(solver="cg", hyper_subset=40, random_state=1, n_restarts=1)
    first, same = model.fit(X, y).noise_, clone(model).fit(X, y).noise_
    assert first == same
    assert clone(model).set_params(random_state=2).fit(X, y).noise_ != first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_without_a_subset_all_rows_are_learned_from():
    X, y = data(100)
    few = CG(precond=PivotedCholesky(10))
    options = {"kernel": RBF([1.0, 1.0]), "random_state": 0}
    ours = ScaleMixtureGPRegressor(solver=few, hyper_subset=None, optimizer=LBFGS(max_iter=8), **options).fit(X, y)
    theirs = ScaleMixtureGPRegressor(solver="cholesky", **options).fit(X, y)
    refit = ScaleMixtureGPRegressor(
        ours.kernel_, noise=ours.noise_, scale_prior=ours.scale_prior_, solver="cholesky", optimizer=None
    ).fit(X, y)
    assert ours.n_iter_ > 3
    # The mean of the refit is zero, not the learned constant: the difference is below a nat here.
    assert refit.log_marginal_likelihood_ > theirs.log_marginal_likelihood_ - 2


def test_a_file_holds_the_solution_so_that_loading_solves_nothing(tmp_path, monkeypatch):
    X, y = data(n_outputs=2)
    model = as_given(CG(rtol=1e-7, max_iter=300)).fit(X, y)
    want = model.predict(X[:5], return_std=True)
    model.save(tmp_path / "model")

    def refuse(*args, **options):
        raise AssertionError("loading must not solve")

    with monkeypatch.context() as patch:
        patch.setattr(system.KernelSystem, "solve", refuse)
        loaded = ScaleMixtureGPRegressor.load(tmp_path / "model")
        np.testing.assert_array_equal(loaded.predict(X[:5]), want[0])
    np.testing.assert_array_equal(loaded.predict(X[:5], return_std=True)[1], want[1])
    assert loaded.solver == model.solver
    for name in ("log_marginal_likelihood_", "log_marginal_likelihood_stderr_", "converged_"):
        assert getattr(loaded, name) == getattr(model, name)


def test_a_solver_made_of_objects_is_not_saved(tmp_path):
    X, y = data(50)
    model = as_given(CG(precond=PivotedCholesky(20))).fit(X, y)
    with pytest.raises(TypeError, match=r"solver cannot be saved: .*PivotedCholesky"):
        model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:the estimate of log p:stochproc.exceptions.NumericalWarning")
def test_a_budget_that_ends_warns_once_and_says_so():
    X, y = data()
    with pytest.warns(ConvergenceWarning, match="budget ended at a relative residual") as caught:
        model = as_given(CG(max_iter=2, precond=None)).fit(X, y)
    assert sum(issubclass(w.category, ConvergenceWarning) for w in caught) == 1
    assert __file__ == next(w for w in caught if issubclass(w.category, ConvergenceWarning)).filename
    assert not model.converged_
    assert model.posterior_.residual > 1e-6


def test_a_callback_stops_the_search_and_not_the_conditioning():
    X, y = data()
    with pytest.warns(ConvergenceWarning, match="search for hyperparameters"):
        model = ScaleMixtureGPRegressor(solver="cg", n_restarts=1).fit(X, y, callback=lambda state: True)
    assert not model.converged_
    assert model.posterior_.converged


def test_verbose_shows_the_solve(capsys):
    X, y = data(50)
    as_given(verbose=1).fit(X, y)
    assert "conditioning" in capsys.readouterr().err


def test_constant_targets_and_importance_sampling_work():
    X, y = data(100)
    model = as_given(inference="importance", scale_prior="half_cauchy").fit(X, y)
    exact = as_given("cholesky", scale_prior="half_cauchy").fit(X, y)
    np.testing.assert_allclose(model.predict_interval(X[:3]), exact.predict_interval(X[:3]), rtol=1e-3)
    with pytest.warns(UserWarning, match="y does not vary"):
        flat = ScaleMixtureGPRegressor(solver="cg").fit(X, np.full(100, 7.0))
    np.testing.assert_allclose(flat.predict(X[:3]), 7.0)


def test_float32_gives_float32():
    X, y = data(100)
    model = as_given(dtype="float32").fit(X, y)
    assert model.predict(X[:3]).dtype == np.float32
    np.testing.assert_allclose(model.predict(X[:3]), as_given().fit(X, y).predict(X[:3]), rtol=1e-5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "cg", "noise_model": "independent"}, ValueError, 'solver="cg" needs noise_model="scaled"; got'),
        ({"solver": CG(), "noise_model": "independent"}, ValueError, 'solver="cg" needs noise_model="scaled"; got'),
        ({"solver": "lanczos"}, ValueError, "solver must be one of 'auto', 'cholesky', 'cg'; got 'lanczos'"),
        ({"solver": CG(rtol=0, atol=1)}, ValueError, "solver.rtol must be positive and finite; got 0"),
        ({"hyper_subset": 1}, ValueError, "hyper_subset must be at least 2; got 1"),
        ({"hyper_subset": 0.5}, TypeError, "hyper_subset must be an integer; got 0.5 of type float"),
        ({"solver": "cg", "optimizer": LBFGS}, ValueError, "optimizer must be one of"),
    ],
)
def test_bad_parameters_name_themselves(options, error, message):
    X, y = data(10)
    with pytest.raises(error, match=message):
        ScaleMixtureGPRegressor(**options).fit(X, y)
