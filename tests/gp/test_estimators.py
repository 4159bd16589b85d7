"""The regressor against closed forms and other libraries, in the units of y."""

import math
import warnings

import gpytorch
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as sk

from stochproc.exceptions import DataWarning, NumericalWarning
from stochproc.gp import BurrXII, Delta, HalfCauchy, InverseGamma, ScaleMixtureGPRegressor, ScalePrior
from stochproc.kernels import RBF, Matern, Scale

PRIORS = ["delta", "inverse_gamma", "burr_xii", "half_cauchy"]


def data(n=60, d=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, 3 * np.sin(X[:, 0]) + 0.3 * rng.normal(size=n) + 50


def as_given(kernel, **options):
    """A model of the data as they come, with nothing learned."""
    return ScaleMixtureGPRegressor(kernel, mean="zero", normalize_X=False, normalize_y=False, optimizer=None, **options)


def test_a_delta_prior_without_search_is_scikit_learns_gaussian_process():
    X, y = data()
    X_test = X[:9] + 0.3
    ours = as_given(RBF(0.7), scale_prior=Delta(2.0), noise=0.05).fit(X, y)
    theirs = GaussianProcessRegressor(
        sk.ConstantKernel(2.0) * sk.RBF(0.7) + sk.WhiteKernel(0.1), optimizer=None, alpha=0.0
    ).fit(X, y)
    mean, cov = theirs.predict(X_test, return_cov=True)
    np.testing.assert_allclose(ours.predict(X_test), mean, rtol=1e-9)
    np.testing.assert_allclose(ours.predict(X_test, return_cov=True)[1], cov, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(ours.log_marginal_likelihood_, theirs.log_marginal_likelihood_value_, rtol=1e-10)
    assert ours.noise_variance_ == pytest.approx(0.1)


def test_an_inverse_gamma_prior_is_the_multivariate_student_t():
    X, y = data(12)
    a, b, noise = 1.5, 2.5, 0.2
    model = as_given(RBF(0.7), scale_prior=InverseGamma(a, b), noise=noise).fit(X, y)
    K = RBF(0.7)(torch.tensor(X)).detach().numpy() + noise * np.eye(12)
    joint = stats.multivariate_t(np.zeros(12), b / a * K, df=2 * a)
    assert model.log_marginal_likelihood_ == pytest.approx(joint.logpdf(y), abs=1e-9)
    # The predictive density of a row is a ratio of two joint ones.
    fewer = as_given(RBF(0.7), scale_prior=InverseGamma(a, b), noise=noise).fit(X[:-1], y[:-1])
    want = model.log_marginal_likelihood_ - fewer.log_marginal_likelihood_
    assert fewer.log_predictive_density(X[-1:], y[-1:])[0] == pytest.approx(want, abs=1e-9)
    df = 2 * a + 11
    mean, std = fewer.predict(X[-1:], return_std=True)
    scale = std[0] * math.sqrt((df - 2) / df)
    want = stats.t(df, mean[0], scale).ppf([1e-8, 0.05, 0.5, 0.99])
    np.testing.assert_allclose(fewer.predict_quantiles(X[-1:], [1e-8, 0.05, 0.5, 0.99])[0], want, rtol=1e-9)
    # noise over E[1/s | y] is the noise part of that squared scale.
    quad = y[:11] @ np.linalg.solve(K[:11, :11], y[:11])
    assert fewer.noise_variance_ == pytest.approx(noise * (b + quad / 2) / (a + 11 / 2))


@pytest.mark.parametrize("prior", PRIORS)
def test_a_change_of_units_changes_nothing_but_units(prior):
    X, y = data()
    model = ScaleMixtureGPRegressor(scale_prior=prior).fit(X, y)
    other = ScaleMixtureGPRegressor(scale_prior=prior).fit(1000 * X + 5, 1e-3 * y - 7)
    X_test = X[:5] + 0.1
    there = 1000 * X_test + 5
    np.testing.assert_allclose(other.predict(there), 1e-3 * model.predict(X_test) - 7, rtol=1e-5)
    np.testing.assert_allclose(other.predict_interval(there), 1e-3 * model.predict_interval(X_test) - 7, rtol=1e-5)
    jacobian = math.log(1e3)
    np.testing.assert_allclose(
        other.log_predictive_density(there, 1e-3 * y[:5] - 7),
        model.log_predictive_density(X_test, y[:5]) + jacobian,
        atol=1e-4,
    )
    assert other.log_marginal_likelihood_ == pytest.approx(model.log_marginal_likelihood_ + 60 * jacobian, abs=1e-3)
    assert other.noise_variance_ == pytest.approx(1e-6 * model.noise_variance_, rel=1e-4)


@pytest.mark.parametrize("prior", PRIORS)
def test_every_hyperparameter_is_at_a_maximum_of_the_marginal_likelihood(prior):
    # Found with the scale profiled out; the gradient of the full log p(y) must vanish all the same.
    X, y = data()
    model = ScaleMixtureGPRegressor(scale_prior=prior).fit(X, y)
    assert model.converged_
    from stochproc.gp import ScaleMixtureGP

    full = ScaleMixtureGP(model.kernel_, model.scale_prior_, noise=model.noise_)
    with torch.no_grad():
        full.constant_mean.copy_(model._mean_)
    learned = [*(p.requires_grad_() for p in full.kernel.parameters()), full.log_noise, full.constant_mean]
    learned += [p for p in full.scale_prior.parameters() if p.requires_grad]
    value = full.log_marginal_likelihood(model.posterior_.X, model._y_train)
    for gradient in torch.autograd.grad(value, learned):
        # tol = 1e-5 of a loss of some 50 nats, through the curvature of what was profiled out.
        assert gradient.abs().max() < 2e-3


def test_the_search_reaches_scikit_learns_marginal_likelihood():
    X, y = data(80, 3)
    Z, t = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    ours = ScaleMixtureGPRegressor(scale_prior="delta", mean="zero").fit(X, y)
    kernel = sk.ConstantKernel(1.0, (1e-5, 1e5)) * sk.RBF(np.ones(3)) + sk.WhiteKernel(0.1, (1e-8, 1e5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs = GaussianProcessRegressor(kernel, alpha=0.0).fit(Z, t)
    in_units_of_y = theirs.log_marginal_likelihood_value_ - 80 * math.log(y.std())
    assert ours.log_marginal_likelihood_ >= in_units_of_y - 0.1


def test_a_prior_with_a_frozen_scale_is_searched_jointly():
    X, y = data()
    free = ScaleMixtureGPRegressor(scale_prior="inverse_gamma").fit(X, y)
    frozen = InverseGamma(2.0, 2 * free.scale_prior_.b.item())
    frozen.requires_grad_(False)
    model = ScaleMixtureGPRegressor(scale_prior=frozen).fit(X, y)
    assert model.scale_prior_.b.item() == pytest.approx(frozen.b.item())
    assert model.log_marginal_likelihood_ < free.log_marginal_likelihood_
    assert model.converged_


def test_a_users_prior_needs_its_density_alone():
    class LogNormal(ScalePrior):
        def __init__(self):
            super().__init__()
            self.log_width = torch.nn.Parameter(torch.tensor(-0.7))

        def log_prob(self, s):
            z = s.log() / self.log_width.exp()
            return -0.5 * z.square() - s.log() - self.log_width - 0.5 * math.log(2 * math.pi)

    X, y = data(30)
    model = ScaleMixtureGPRegressor(scale_prior=LogNormal()).fit(X, y)
    lower, upper = model.predict_interval(X).T
    assert np.all((lower < model.predict(X)) & (model.predict(X) < upper))
    with pytest.raises(TypeError, match="scale_prior cannot be saved"):
        model.save("never_written")


@pytest.mark.parametrize("prior", [BurrXII(0.7, 1.5), HalfCauchy(), InverseGamma(5.0)])
def test_priors_given_as_objects_are_copied_not_changed(prior):
    before = {k: v.clone() for k, v in prior.state_dict().items()}
    X, y = data(30)
    ScaleMixtureGPRegressor(scale_prior=prior).fit(X, y)
    assert all(torch.equal(v, before[k]) for k, v in prior.state_dict().items())


def test_kernels_given_as_objects_are_copied_and_an_outputscale_on_top_is_kept():
    X, y = data(30)
    kernel = Scale(RBF([1.0, 2.0]), 3.0)
    model = ScaleMixtureGPRegressor(kernel).fit(X, y)
    assert kernel.kernel.lengthscale.tolist() == [1.0, 2.0]
    assert model.kernel_.outputscale.item() == pytest.approx(3.0)
    assert model.kernel_.kernel.lengthscale.tolist() != [1.0, 2.0]


def test_a_gpytorch_kernel_and_a_function_serve_as_kernels():
    X, y = data(40)
    base = gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=2)
    model = ScaleMixtureGPRegressor(base).fit(X, y)
    assert (
        model.log_marginal_likelihood_
        > ScaleMixtureGPRegressor(base, optimizer=None).fit(X, y).log_marginal_likelihood_
    )
    same = ScaleMixtureGPRegressor(Matern([1.0, 1.0], nu=1.5)).fit(X, y)
    # 0.1 nat is what a search promises; the two parametrisations approach a flat optimum differently.
    assert model.log_marginal_likelihood_ == pytest.approx(same.log_marginal_likelihood_, abs=0.1)
    assert base.lengthscale.tolist() == [[pytest.approx(math.log(2))] * 2]
    plain = as_given(lambda a, b: torch.exp(-torch.cdist(a, b)), noise=0.1).fit(X, y)
    np.testing.assert_allclose(plain.predict(X), as_given(Matern(nu=0.5), noise=0.1).fit(X, y).predict(X), rtol=1e-8)
    for unsaved in (model, plain):
        with pytest.raises(TypeError, match="kernel cannot be saved"):
            unsaved.save("never_written")


def test_several_outputs_share_one_scale_and_one_kernel():
    X, y = data(25)
    Y = np.stack([y, -2 * y + X[:, 0], np.cos(y)], 1)
    model = ScaleMixtureGPRegressor("rbf", noise=0.1, optimizer=None).fit(X, Y)
    mean, std = model.predict(X[:4], return_std=True)
    assert mean.shape == std.shape == (4, 3)
    assert model.predict(X[:4], return_cov=True)[1].shape == (4, 4, 3)
    assert model.predict_quantiles(X[:4], [0.1, 0.9]).shape == (4, 2, 3)
    assert model.predict_interval(X[:4]).shape == (4, 2, 3)
    assert model.sample_y(X[:4], 6).shape == (4, 3, 6)
    assert model.log_predictive_density(X[:4], Y[:4]).shape == (4,)
    assert model.noise_variance_.shape == (3,)
    for c in range(3):
        one = ScaleMixtureGPRegressor("rbf", noise=0.1, optimizer=None).fit(X, Y[:, c])
        np.testing.assert_allclose(model.predict(X[:4])[:, c], one.predict(X[:4]), rtol=1e-10)


def test_leave_one_out_densities_equal_refits():
    X, y = data(15)
    model = as_given(RBF(0.7), scale_prior=InverseGamma(1.5, 2.5), noise=0.2).fit(X, y)
    for i in (0, 7):
        keep = np.arange(15) != i
        rest = as_given(RBF(0.7), scale_prior=InverseGamma(1.5, 2.5), noise=0.2).fit(X[keep], y[keep])
        want = rest.log_predictive_density(X[i : i + 1], y[i : i + 1])[0]
        assert model.loo()[i] == pytest.approx(want, abs=1e-9)


def test_the_latent_function_is_less_spread_than_observations_by_the_noise():
    X, y = data()
    model = ScaleMixtureGPRegressor(scale_prior="delta").fit(X, y)
    _, total = model.predict(X, return_std=True)
    _, latent = model.predict(X, return_std=True, latent=True)
    np.testing.assert_allclose(total**2 - latent**2, model.noise_variance_, rtol=1e-8)
    cov = model.predict(X, return_cov=True)[1] - model.predict(X, return_cov=True, latent=True)[1]
    np.testing.assert_allclose(cov, model.noise_variance_ * np.eye(len(X)), atol=1e-10)
    inner, outer = model.predict_quantiles(X, 0.95, latent=True), model.predict_quantiles(X, 0.95)
    assert np.all(inner < outer)


def test_joint_samples_have_the_predicted_covariance():
    X, y = data(30)
    model = ScaleMixtureGPRegressor(scale_prior="inverse_gamma", optimizer=None).fit(X, y)
    draws = model.sample_y(X[:3] + 0.2, 20_000, random_state=0)
    mean, cov = model.predict(X[:3] + 0.2, return_cov=True)
    # Five standard errors of a sample covariance of 20,000 draws whose kurtosis is near a Gaussian's (df = 34).
    error = np.sqrt(2 / 20_000) * np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
    assert np.all(np.abs(np.cov(draws) - cov) < 5 * 1.2 * error)
    assert np.all(np.abs(draws.mean(1) - mean) < 5 * np.sqrt(np.diag(cov) / 20_000))


def test_all_columns_can_share_one_scale():
    X, y = data()
    X = X * [1.0, 10.0]
    model = ScaleMixtureGPRegressor(normalize_X="global", optimizer=None).fit(X, y)
    spread = model.posterior_.X.std(0)
    assert spread[1] / spread[0] > 5
    assert float((model.posterior_.X**2).mean()) == pytest.approx(1.0)


def test_float32_agrees_with_float64_to_its_precision():
    X, y = data()
    low, high = (ScaleMixtureGPRegressor(dtype=d, optimizer=None).fit(X, y) for d in ("float32", "float64"))
    assert low.predict(X).dtype == np.float32
    np.testing.assert_allclose(low.predict(X), high.predict(X), rtol=1e-4)


def test_float32_with_little_noise_warns():
    X, y = data(20)
    with pytest.warns(NumericalWarning, match="float32"):
        ScaleMixtureGPRegressor(dtype="float32", noise=1e-7, optimizer=None).fit(X, y)


@pytest.mark.parametrize("n", [15, 20, 40])
def test_targets_without_noise_are_learned_without_a_warning(n):
    X = np.linspace(0, 6, n)[:, None]
    model = ScaleMixtureGPRegressor().fit(X, np.sin(X[:, 0]))
    assert model.converged_
    between = (X[1:] + X[:-1]) / 2
    np.testing.assert_allclose(model.predict(between), np.sin(between[:, 0]), atol=1e-2)


def test_duplicated_rows_are_legal():
    X, y = data(20)
    model = ScaleMixtureGPRegressor().fit(np.repeat(X, 2, 0), np.repeat(y, 2) + np.tile([0.1, -0.1], 20))
    assert np.isfinite(model.predict(X)).all()


def test_a_constant_target_is_predicted_with_a_warning():
    X, _ = data(20)
    for prior in PRIORS:
        with pytest.warns(DataWarning, match="y does not vary"):
            model = ScaleMixtureGPRegressor(scale_prior=prior).fit(X, np.full(20, 7.25))
        np.testing.assert_allclose(model.predict(X), 7.25)
        assert np.isfinite(model.predict_interval(X)).all()


def test_constant_columns_keep_unit_scale():
    X, y = data(20)
    X = np.column_stack([X, np.full(20, 3.0)])
    model = ScaleMixtureGPRegressor().fit(X, y)
    assert np.isfinite(model.predict(X)).all()


def test_one_point_is_enough_where_nothing_is_standardised():
    model = as_given(RBF(1.0), noise=0.1).fit([[0.0]], [2.0])
    assert model.predict([[0.0]])[0] == pytest.approx(2 / 1.1)
    quantiles = model.predict_quantiles([[0.0], [5.0]], [0.1, 0.9])
    assert np.isfinite(quantiles).all()
