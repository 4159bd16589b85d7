"""The regressor with the noise outside the scale."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc.exceptions import DataWarning, NumericalWarning
from stochproc.gp import BurrXII, Delta, HalfCauchy, IndependentNoiseGP, InverseGamma, ScaleMixtureGPRegressor
from stochproc.gp._independent_search import learn_independent, scaled_twin
from stochproc.kernels import RBF
from stochproc.solvers import LBFGS, Status

PRIORS = ["delta", "inverse_gamma", "half_cauchy"]


def data(n=40, d=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, 3 * np.sin(X[:, 0]) + 0.3 * rng.normal(size=n) + 50


def regressor(**options):
    return ScaleMixtureGPRegressor(**{"noise_model": "independent", "n_restarts": 1, **options})


def test_under_a_delta_prior_both_noise_models_are_one():
    X, y = data()
    ours, theirs = (ScaleMixtureGPRegressor(scale_prior="delta", noise_model=m) for m in ("independent", "scaled"))
    ours.fit(X, y)
    theirs.fit(X, y)
    assert ours.log_marginal_likelihood_ == pytest.approx(theirs.log_marginal_likelihood_, abs=1e-8)
    assert ours.noise_variance_ == pytest.approx(theirs.noise_variance_, rel=1e-6)
    # noise_ is the variance on standardised targets, not a share of the scale.
    assert ours.noise_ == pytest.approx(theirs.noise_ * theirs.scale_prior_.value.item(), rel=1e-6)
    assert ours.noise_variance_ == pytest.approx(ours.noise_ * y.var(), rel=1e-12)
    np.testing.assert_allclose(ours.predict(X, return_std=True), theirs.predict(X, return_std=True), rtol=1e-6)
    np.testing.assert_allclose(ours.loo(), theirs.loo(), rtol=1e-6, atol=1e-6)


def test_without_noise_both_models_learn_the_same():
    X = np.linspace(0, 6, 12)[:, None]
    y = np.sin(X[:, 0])
    options = {"scale_prior": "inverse_gamma", "kernel": "matern32", "noise": 0.0, "n_restarts": 1}
    ours, theirs = (ScaleMixtureGPRegressor(noise_model=m, **options).fit(X, y) for m in ("independent", "scaled"))
    assert ours.noise_ == 0
    assert ours.log_marginal_likelihood_ == pytest.approx(theirs.log_marginal_likelihood_, abs=1e-6)
    np.testing.assert_allclose(
        ours.predict_quantiles(X + 0.2, [0.1, 0.9]), theirs.predict_quantiles(X + 0.2, [0.1, 0.9]), rtol=1e-5
    )


@pytest.mark.parametrize("prior", PRIORS)
def test_every_hyperparameter_is_at_a_maximum_of_the_marginal_likelihood(prior):
    X, y = data()
    model = regressor(scale_prior=prior).fit(X, y)
    assert model.converged_
    full = IndependentNoiseGP(model.kernel_, model.scale_prior_, noise=model.noise_)
    with torch.no_grad():
        full.constant_mean.copy_(model._mean_)
    learned = [*(p.requires_grad_() for p in full.kernel.parameters()), full.log_noise, full.constant_mean]
    learned += [p for p in full.scale_prior.parameters() if p.requires_grad]
    value = full.log_marginal_likelihood(model.posterior_.X, model._y_train)
    for gradient in torch.autograd.grad(value, learned):
        # tol = 1e-5 of a loss of some 30 nats.
        assert gradient.abs().max() < 2e-3


@pytest.mark.parametrize("prior", ["inverse_gamma", "half_cauchy"])
def test_the_joint_search_ends_no_lower_than_it_starts(prior):
    X, y = data()
    model = regressor(scale_prior=prior).fit(X, y)
    standard = model.posterior_.X, model._y_train
    start = IndependentNoiseGP(RBF([2**0.5] * 2), prior)
    twin = scaled_twin(start, standard[1])
    twin.fit_mean_and_scale(*standard)
    at_start = start.log_marginal_likelihood(*standard).item() - 40 * np.log(y.std())
    assert model.log_marginal_likelihood_ > at_start + 5


@pytest.mark.parametrize("prior", PRIORS)
def test_a_change_of_units_changes_nothing_but_units(prior):
    X, y = data(30)
    model, other = regressor(scale_prior=prior).fit(X, y), regressor(scale_prior=prior).fit(1000 * X + 5, 1e-3 * y - 7)
    X_test = X[:5] + 0.1
    there = 1000 * X_test + 5
    np.testing.assert_allclose(other.predict(there), 1e-3 * model.predict(X_test) - 7, rtol=1e-4)
    np.testing.assert_allclose(other.predict_interval(there), 1e-3 * model.predict_interval(X_test) - 7, rtol=1e-4)
    densities = other.log_predictive_density(there, 1e-3 * y[:5] - 7), model.log_predictive_density(X_test, y[:5])
    np.testing.assert_allclose(densities[0], densities[1] + np.log(1e3), atol=1e-3)
    assert other.noise_variance_ == pytest.approx(1e-6 * model.noise_variance_, rel=1e-3)


@pytest.mark.parametrize("prior", ["delta", "half_cauchy"])
def test_observations_vary_more_than_the_function_by_the_noise_exactly(prior):
    X, y = data()
    model = regressor(scale_prior=prior, optimizer=None).fit(X, y)
    _, total = model.predict(X, return_std=True)
    _, latent = model.predict(X, return_std=True, latent=True)
    np.testing.assert_allclose(total**2 - latent**2, model.noise_variance_, rtol=1e-10)
    cov = model.predict(X, return_cov=True)[1]
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), total, rtol=1e-10)
    difference = cov - model.predict(X, return_cov=True, latent=True)[1]
    np.testing.assert_allclose(difference, model.noise_variance_ * np.eye(len(X)), atol=1e-12)
    assert model.noise_variance_ == pytest.approx(0.1 * y.var())


def test_several_outputs_share_one_scale_and_one_kernel(tmp_path):
    X, y = data(25)
    Y = np.stack([y, -2 * y + X[:, 0], np.cos(y)], 1)
    model = regressor(scale_prior="half_cauchy").fit(X, Y)
    mean, std = model.predict(X[:4], return_std=True)
    assert mean.shape == std.shape == (4, 3)
    cov = model.predict(X[:4], return_cov=True)[1]
    assert cov.shape == (4, 4, 3)
    np.testing.assert_allclose(np.sqrt(np.einsum("iic->ic", cov)), std, rtol=1e-8)
    assert model.predict_quantiles(X[:4], [0.1, 0.9]).shape == (4, 2, 3)
    assert model.sample_y(X[:4], 6).shape == (4, 3, 6)
    assert model.log_predictive_density(X[:4], Y[:4]).shape == (4,)
    assert model.noise_variance_.shape == (3,)
    model.save(tmp_path / "m")
    again = ScaleMixtureGPRegressor.load(tmp_path / "m")
    np.testing.assert_array_equal(again.predict(X, return_std=True), model.predict(X, return_std=True))
    np.testing.assert_array_equal(again.loo(), model.loo())
    assert again.log_marginal_likelihood_ == model.log_marginal_likelihood_
    assert again.noise_model == "independent"


def test_leave_one_out_densities_equal_refits():
    X, y = data(12)
    options = {"normalize_X": False, "normalize_y": False, "mean": "zero", "optimizer": None, "noise": 0.2}
    model = regressor(kernel=RBF(0.7), scale_prior=HalfCauchy(1.5), **options).fit(X, y - 50)
    for i in (0, 7):
        keep = np.arange(12) != i
        rest = regressor(kernel=RBF(0.7), scale_prior=HalfCauchy(1.5), **options).fit(X[keep], y[keep] - 50)
        want = rest.log_predictive_density(X[i : i + 1], y[i : i + 1] - 50)[0]
        assert model.loo()[i] == pytest.approx(want, abs=1e-9)


def test_joint_samples_have_the_predicted_covariance():
    X, y = data(30)
    model = regressor(scale_prior=InverseGamma(4.0), optimizer=None).fit(X, y)
    draws = model.sample_y(X[:3] + 0.2, 20_000, random_state=0)
    mean, cov = model.predict(X[:3] + 0.2, return_cov=True)
    # Five standard errors of a sample covariance of 20,000 draws whose kurtosis is near a Gaussian's.
    error = np.sqrt(2 / 20_000) * np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
    assert np.all(np.abs(np.cov(draws) - cov) < 5 * 1.2 * error)
    assert np.all(np.abs(draws.mean(1) - mean) < 5 * np.sqrt(np.diag(cov) / 20_000))


def interrupt_at(k):
    seen = []

    def callback(state):
        seen.append(state.iteration)
        if len(seen) == k:
            raise KeyboardInterrupt

    return callback


def iterations_of_the_gaussian_process():
    X, y = data()
    return regressor(scale_prior="delta").fit(X, y).n_iter_


@pytest.mark.parametrize("where", ["first search", "joint search"])
def test_an_interruption_of_either_search_leaves_a_usable_estimator(where):
    X, y = data()
    model = regressor(scale_prior="half_cauchy")
    with pytest.raises(KeyboardInterrupt):
        model.fit(
            X, y, callback=interrupt_at(3 if where == "first search" else iterations_of_the_gaussian_process() + 1)
        )
    assert not model.converged_
    start = regressor(scale_prior="half_cauchy", optimizer=None).fit(X, y)
    assert model.log_marginal_likelihood_ > start.log_marginal_likelihood_
    assert np.isfinite(model.predict_interval(X)).all()


@pytest.mark.parametrize("where", ["first search", "joint search"])
def test_a_callback_stops_either_search(where):
    X, y = data()
    last = 2 if where == "first search" else iterations_of_the_gaussian_process() + 1
    seen = []
    with pytest.warns(ConvergenceWarning, match="callback"):
        model = regressor(scale_prior="half_cauchy").fit(X, y, callback=lambda s: seen.append(s) or len(seen) == last)
    assert len(seen) == model.n_iter_ == last
    assert model.optimizer_result_.status is Status.STOPPED
    assert np.isfinite(model.predict(X)).all()


def test_a_search_that_is_cut_short_warns_and_says_so():
    X, y = data()
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        model = regressor(optimizer=LBFGS(max_iter=1)).fit(X, y)
    assert not model.converged_


def test_a_frozen_scale_is_kept_and_a_free_shape_is_learned():
    X, y = data()
    frozen = InverseGamma(2.0, 0.3).requires_grad_(False)
    model = regressor(scale_prior=frozen).fit(X, y)
    assert model.scale_prior_.b.item() == pytest.approx(0.3)
    free = InverseGamma(2.0, 2.0)
    free.log_a.requires_grad_(True)
    other = regressor(scale_prior=free).fit(X, y)
    assert other.scale_prior_.a.item() != 2.0
    assert 0.5 <= other.scale_prior_.a.item() <= 1e3
    assert other.log_marginal_likelihood_ > model.log_marginal_likelihood_
    kept = Delta(0.4).requires_grad_(False)
    assert regressor(scale_prior=kept).fit(X, y).scale_prior_.value.item() == pytest.approx(0.4)


def test_a_search_of_the_model_itself_needs_no_estimator():
    X, y = (torch.tensor(t) for t in data(20))
    model = IndependentNoiseGP(RBF([1.0, 1.0]), "half_cauchy", noise=0.1)
    y = ((y - y.mean()) / y.std())[:, None]
    before = model.log_marginal_likelihood(X, y).item()
    learned = learn_independent(model, X, y, LBFGS(), torch.Generator(), None, 0)
    assert learned.converged
    assert model.log_marginal_likelihood(X, y).item() > before


def test_noise_alone_is_explained_at_least_as_well_as_by_noise():
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(40, 2)), rng.normal(size=40)
    model = regressor(scale_prior="half_cauchy").fit(X, y)
    # A half-Cauchy prior has its best scale near 0 there, and all of its mass within a nat of it.
    noise = -20 * (np.log(2 * np.pi * y.var()) + 1)
    assert model.log_marginal_likelihood_ > noise - 1.0


def test_a_constant_target_is_predicted_with_a_warning():
    X, _ = data(20)
    for prior in PRIORS:
        with pytest.warns(DataWarning, match="y does not vary"):
            model = regressor(scale_prior=prior).fit(X, np.full(20, 7.25))
        np.testing.assert_allclose(model.predict(X), 7.25)
        assert np.isfinite(model.predict_interval(X)).all()


def test_a_variance_that_does_not_exist_is_refused_and_quantiles_are_not():
    options = {"normalize_X": False, "normalize_y": False, "optimizer": None, "scale_prior": BurrXII(1.0, 0.2)}
    model = regressor(kernel=RBF(1.0), **options).fit([[0.0]], [2.0])
    for ask in ({"return_std": True}, {"return_cov": True}):
        with pytest.raises(ValueError, match="predict_quantiles"):
            model.predict([[0.5]], **ask)
    assert np.isfinite(model.predict_quantiles([[0.5]], [0.01, 0.99])).all()


def test_float32_agrees_with_float64_to_its_precision_and_warns_of_little_noise():
    X, y = data()
    low, high = (
        regressor(dtype=d, optimizer=None, scale_prior="half_cauchy").fit(X, y) for d in ("float32", "float64")
    )
    assert low.predict(X).dtype == np.float32
    np.testing.assert_allclose(low.predict(X), high.predict(X), rtol=1e-4)
    np.testing.assert_allclose(low.predict_interval(X), high.predict_interval(X), rtol=1e-3)
    with pytest.warns(NumericalWarning, match="float32"):
        regressor(dtype="float32", noise=1e-7, optimizer=None).fit(X, y)


def test_a_periodic_kernel_is_started_at_the_best_period():
    rng = np.random.default_rng(0)
    X = rng.uniform(0, 10, size=(40, 1))
    y = np.sin(2 * np.pi * X[:, 0] / 1.3) + 0.1 * rng.normal(size=40)
    model = regressor(kernel="periodic").fit(X, y)
    assert model.kernel_.period.item() * X.std() == pytest.approx(1.3, rel=0.01)


@pytest.mark.bad_input
@pytest.mark.parametrize(("name", "value"), [("solver", "cg"), ("inference", "importance")])
def test_what_needs_the_noise_inside_the_scale_says_so(name, value):
    X, y = data(10)
    with pytest.raises(ValueError, match=f'{name}="{value}" needs noise_model="scaled"'):
        regressor(**{name: value}).fit(X, y)


@pytest.mark.parametrize("gain", [1e-12, 1e-3, 1e3, 1e12])
def test_units_of_targets_that_are_not_standardised_change_nothing(gain):
    X, y = data()
    plain, other = (regressor(normalize_y=False).fit(X, g * (y - 50)) for g in (1.0, gain))
    assert other.converged_
    # The default noise, 0.1 in squared units of y, is another share of the scale in each.
    assert other.log_marginal_likelihood_ + 40 * np.log(gain) == pytest.approx(plain.log_marginal_likelihood_, abs=0.1)
    assert other.noise_ == pytest.approx(gain**2 * plain.noise_, rel=0.05)
