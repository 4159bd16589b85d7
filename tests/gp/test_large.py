"""The model by conjugate gradients against the one by Cholesky factors."""

import copy

import gpytorch
import pytest
import torch

from stochproc.gp import (
    Delta,
    HalfCauchy,
    InverseGamma,
    LargeScaleMixtureGP,
    ScaleMixtureGP,
)
from stochproc.gp._hyperparameters import learn
from stochproc.kernels import RBF, ActiveDims, Linear, Matern, RationalQuadratic
from stochproc.solvers import CG, LBFGS, LanczosLogdet, PivotedCholesky

# Few probes where the test does not look at log p(y).
COARSE = LanczosLogdet(probes=2, steps=50)


def data(n=600, d=3, n_outputs=None, seed=0):
    gen = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=gen)
    shape = (n,) if n_outputs is None else (n, n_outputs)
    y = torch.sin(X.sum(1)).reshape(-1, *[1] * (len(shape) - 1)) + 0.1 * torch.randn(shape, generator=gen)
    return X, y, torch.randn(40, d, generator=gen)


def pair(kernel, prior="inverse_gamma", **options):
    """The two models of the same hyperparameters."""
    large = LargeScaleMixtureGP(kernel, prior, logdet=COARSE, solver=options.pop("solver", CG()), **options)
    return large.exact(), large


@pytest.mark.filterwarnings("ignore:the estimate of log p:stochproc.exceptions.NumericalWarning")
@pytest.mark.parametrize("noise", [1e-1, pytest.param(1e-4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", [RBF(1.5), Matern([1.0, 2.0, 4.0], nu=1.5)], ids=["rbf", "matern"])
def test_mean_variance_and_quadratic_form_equal_cholesky_at_the_default_tolerance(kernel, noise):
    X, y, X_test = data(600 if noise > 1e-3 else 400)
    exact, large = (model.condition(X, y) for model in pair(kernel, noise=noise))
    assert large.converged
    mean, variance = exact.predict(X_test)
    found, spread = large.predict(X_test)
    # The target, relative to the size of the mean: a relative residual of 1e-6 bounds no entry near zero better.
    assert (found - mean).abs().max() <= 1e-5 * mean.abs().max()
    # What solver.rtol promises for each variance of the latent function, noise not added.
    torch.testing.assert_close(spread, variance, rtol=2e-6, atol=0)
    # Of second order in the residual: 1e-12 times a condition number of the preconditioned matrix.
    torch.testing.assert_close(large.scale.quad, exact.scale.quad, rtol=1e-8, atol=0)


@pytest.mark.slow
def test_a_thousand_and_a_half_points_equal_cholesky():
    X, y, X_test = data(1500, d=4)
    X_test = X_test[:10]
    exact, large = (model.condition(X, y) for model in pair(RBF(2.0), noise=1e-3))
    mean, variance = exact.predict(X_test)
    found, spread = large.predict(X_test)
    assert (found - mean).abs().max() <= 1e-5 * mean.abs().max()
    torch.testing.assert_close(spread, variance, rtol=2e-6, atol=0)


@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_a_variance_is_never_too_small_and_within_the_tolerance(rtol):
    X, y, X_test = data(400)
    exact, large = (m.condition(X, y) for m in pair(RBF(1.5), noise=1e-3, solver=CG(rtol=rtol)))
    excess = large.variance(X_test) / exact.variance(X_test) - 1
    # Rounding of the Cholesky factor, eps times a condition number of 1e5.
    assert excess.min() > -1e-9
    assert excess.max() < rtol
    assert excess.max() > 0


def test_the_covariance_is_that_of_cholesky_and_has_the_variances_on_its_diagonal():
    X, y, X_test = data(400)
    exact, large = (m.condition(X, y) for m in pair(RBF(1.5), noise=1e-2))
    covariance = large.covariance(X_test)
    torch.testing.assert_close(covariance, exact.covariance(X_test), rtol=0, atol=1e-8)
    torch.testing.assert_close(covariance.diagonal(), large.variance(X_test), rtol=1e-6, atol=0)
    assert torch.equal(covariance, covariance.mT)


def test_draws_have_the_mean_and_covariance_of_the_posterior(gen):
    X, y, X_test = data(200)
    posterior = pair(RBF(1.5), "delta", noise=1e-2)[1].condition(X, y)
    draws = posterior.sample(X_test[:3], 4000, generator=gen)
    covariance = posterior.covariance(X_test[:3])
    # Four standard errors of 4000 draws: one run in 1e3 fails by chance, and the seed is fixed.
    error = 4 * covariance.diagonal().sqrt() / 4000**0.5
    assert ((draws.mean(0) - posterior.mean(X_test[:3])).abs() < error).all()
    spread = covariance.diagonal().sqrt()
    assert ((draws.mT.cov() - covariance).abs() < 4 * (2 / 4000) ** 0.5 * spread * spread[:, None]).all()


def test_leave_one_out_densities_equal_those_of_cholesky():
    X, y, _ = data(200, n_outputs=2)
    exact, large = (m.condition(X, y) for m in pair(RBF(1.5), noise=1e-2, n_outputs=2))
    # alpha / (K^-1)_ii amplifies the residual of 1e-6.
    torch.testing.assert_close(large.loo(), exact.loo(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prior", [Delta(0.7), InverseGamma(1.5, 2.0), HalfCauchy(1.3)], ids=["delta", "t", "cauchy"])
def test_predictive_laws_of_several_outputs_equal_those_of_cholesky(prior):
    X, y, X_test = data(300, n_outputs=2)
    exact, large = (m.condition(X, y).predictive(X_test) for m in pair(RBF(1.5), prior, noise=0.01, n_outputs=2))
    torch.testing.assert_close(large.quantile([1e-8, 0.05, 0.9]), exact.quantile([1e-8, 0.05, 0.9]), rtol=0, atol=1e-5)
    torch.testing.assert_close(large.log_prob(exact.loc + 0.1), exact.log_prob(exact.loc + 0.1), rtol=0, atol=1e-4)


def test_second_derivatives_of_the_mean_are_those_of_cholesky_and_of_the_variance_refused():
    X, y, X_test = data(100)
    exact, large = (m.condition(X, y) for m in pair(RBF(1.5), noise=0.01, solver=CG(rtol=1e-12)))
    found = []
    for posterior in (exact, large):
        rows = X_test.clone().requires_grad_()
        (slope,) = torch.autograd.grad(posterior.mean(rows).sum(), rows, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), rows)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-7)
    for ask in (large.variance, large.covariance):
        (slope,) = torch.autograd.grad(ask(rows).sum(), rows, create_graph=True)
        with pytest.raises(RuntimeError, match="conjugate gradients have no second derivatives"):
            torch.autograd.grad(slope.square().sum(), rows)


def test_mean_and_variance_are_differentiable_in_the_new_points():
    X, y, X_test = data(200)
    gradients = []
    for model in pair(RBF(1.5), noise=1e-2):
        posterior = model.condition(X, y)
        Z = X_test[:5].clone().requires_grad_()
        mean, variance = posterior.predict(Z)
        gradients.append(torch.autograd.grad(mean.sum() + 100 * variance.sum(), Z)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def composite():
    return ActiveDims(RationalQuadratic(1.2), (0, 2)) + 0.3 * Linear()


def by_gpytorch():
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=3)).double()
    kernel.base_kernel.lengthscale = torch.tensor([1.0, 2.0, 3.0])
    return kernel


def exponential(x, y):
    return (-torch.cdist(x, y)).exp()


@pytest.mark.parametrize("make", [composite, by_gpytorch, lambda: exponential], ids=["sum", "gpytorch", "function"])
def test_every_kind_of_kernel_is_taken(make):
    X, y, X_test = data(200)
    exact, large = (m.condition(X, y) for m in pair(make(), noise=0.05))
    for a, b in zip(large.predict(X_test), exact.predict(X_test), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_least_squares_mean_and_scale_are_those_of_cholesky():
    X, y, _ = data(300, n_outputs=2)
    models = pair(RBF(1.5), noise=0.01, n_outputs=2)
    found = []
    for model in map(copy.deepcopy, models):
        model.fit_mean_and_scale(X, y + torch.tensor([3.0, -1.0]))
        found.append((model.constant_mean.detach(), model.scale_prior.b.detach()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_log_p_of_y_is_within_its_standard_error(seed):
    X, y, _ = data(300)
    model = LargeScaleMixtureGP(
        RBF(1.0), noise=0.05, solver=CG(precond=PivotedCholesky(20)), logdet=LanczosLogdet(seed=seed)
    )
    posterior = model.condition(X, y)
    error = posterior.log_marginal_likelihood - model.exact().condition(X, y).log_marginal_likelihood
    assert 0.1 < posterior.log_marginal_likelihood_stderr < 10
    # Student-t with 15 degrees of freedom: 4 standard errors fail once in a thousand, and the seeds are fixed.
    assert abs(error) < 4 * posterior.log_marginal_likelihood_stderr


@pytest.mark.parametrize("name", ["log_marginal_likelihood", "profile_loss", "scaled_loss"])
def test_losses_and_gradients_equal_those_of_cholesky_where_the_preconditioner_is_the_matrix(name):
    # Then each probe gives the log determinant itself, and its gradient with an error of 7.
    X, y, _ = data(60)
    large = LargeScaleMixtureGP(RBF([1.0, 2.0, 3.0]), noise=0.05, logdet=LanczosLogdet(probes=1000, steps=5))
    extra = (torch.tensor(0.3),) if name == "scaled_loss" else ()
    losses, gradients = [], []
    for model in (large.exact(), large):
        loss = getattr(model, name)(X, y, *extra)
        losses.append(loss.detach())
        learned = [model.kernel.log_lengthscale, model.log_noise]
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, learned)]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    # Four standard errors.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=4 * 7 / 1000**0.5)


def test_the_gradient_of_the_quadratic_form_needs_no_second_solve():
    X, y, _ = data(150)
    exact, large = pair(RBF([1.0, 2.0, 3.0]), noise=0.05)
    found = []
    for model in (exact, large):
        quad, _, _ = model._terms(X, model.noise, y[:, None], True)
        learned = [model.kernel.log_lengthscale, model.log_noise]
        found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(quad, learned)]))
    # First order in the residual of 1e-6.
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_stochastic_search_ends_near_the_optimum_of_cholesky(gen):
    X = torch.randn(150, 1, generator=gen)
    K = RBF(0.4)(X).detach() + 0.05 * torch.eye(150)
    y = torch.linalg.cholesky(K) @ torch.randn(150, generator=gen)
    exact = ScaleMixtureGP(RBF(1.0))
    learn(exact, X, y, LBFGS(tol=1e-5), gen, None, 0)
    few = {"solver": CG(precond=PivotedCholesky(8)), "logdet": LanczosLogdet(probes=8, steps=10)}
    large = LargeScaleMixtureGP(RBF(1.0), **few)
    learned = learn(large, X, y, LBFGS(tol=1e-5), gen, None, 0)
    # It stops where function and gradient of the estimate part; that is said, and counts as the end.
    assert learned.converged
    assert 0 <= (large.exact().profile_loss(X, y) - exact.profile_loss(X, y)).item() < 2.0
