"""The model by conjugate gradients against the one by Cholesky factors, and where it must say that it is not exact."""

import copy
import dataclasses
import pickle

import gpytorch
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc.exceptions import NotPositiveDefiniteError, NumericalWarning
from stochproc.gp import (
    Delta,
    HalfCauchy,
    InverseGamma,
    LargeScaleMixtureGP,
    ScaleMixtureGP,
    log_evidence,
)
from stochproc.gp._hyperparameters import learn
from stochproc.kernels import RBF, ActiveDims, Linear, Matern, RationalQuadratic
from stochproc.solvers import CG, LBFGS, Jacobi, LanczosLogdet, PivotedCholesky

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


def test_a_budget_that_ends_warns_with_the_residual_reached():
    X, y, X_test = data(300)
    model = pair(RBF(1.0), noise=1e-3, solver=CG(max_iter=5, precond=None))[1]
    with (
        pytest.warns(ConvergenceWarning, match="budget ended at a relative residual of .* after 5 iterations"),
        pytest.warns(NumericalWarning, match="the estimate of log p"),
    ):
        posterior = model.condition(X, y)
    assert not posterior.converged
    true = y - (model.kernel(X) + 1e-3 * torch.eye(300)).detach() @ posterior.alpha[:, 0]
    assert posterior.residual == pytest.approx((true.norm() / y.norm()).item(), rel=1e-9)
    with pytest.warns(ConvergenceWarning, match="solves of 40 rows ended above their tolerance"):
        variance = posterior.variance(X_test)
    # Too large, as it says, and never too small.
    exact = model.exact().condition(X, y).variance(X_test)
    assert (variance >= exact * (1 - 1e-9)).all()


def test_float32_data_are_solved_as_float64_ones():
    X, y, X_test = (t.float() for t in data(300))
    exact, large = pair(RBF(1.5), noise=1e-3)
    posterior = large.condition(X, y)
    assert posterior.converged
    reference = exact.condition(X.double(), y.double())
    mean, variance = posterior.predict(X_test)
    assert mean.dtype == variance.dtype == torch.float32
    mean_64, variance_64 = reference.predict(X_test.double())
    # In float32 the Cholesky factor itself is 1e-2 off here.
    assert (mean - mean_64).abs().max() < 1e-5 * mean_64.abs().max()
    torch.testing.assert_close(variance.double(), variance_64, rtol=5e-6, atol=0)


def test_targets_that_equal_their_mean_are_solved_by_zero():
    X, y, X_test = data(100)
    posterior = pair(RBF(1.5), mean="zero")[1].condition(X, torch.zeros_like(y))
    assert posterior.converged
    assert torch.equal(posterior.mean(X_test), torch.zeros(40))


def test_duplicated_rows_are_legal():
    X, y, X_test = data(100)
    exact, large = (m.condition(X.repeat(2, 1), y.repeat(2)) for m in pair(RBF(1.5), noise=0.01))
    torch.testing.assert_close(large.variance(X_test), exact.variance(X_test), rtol=2e-6, atol=0)


@pytest.mark.filterwarnings("ignore:the estimate of log p:stochproc.exceptions.NumericalWarning")
def test_without_noise_a_rough_kernel_is_solved_and_a_smooth_one_refused():
    X, y, X_test = data(80)
    exact, large = (m.condition(X, y) for m in pair(Matern(1.0, nu=0.5), noise=0.0))
    torch.testing.assert_close(large.variance(X_test), exact.variance(X_test), rtol=1e-5, atol=0)
    # Singular to rounding.
    with pytest.raises(NotPositiveDefiniteError, match="more noise would help"):
        pair(RBF(20.0), noise=0.0)[1].condition(X, y)


@pytest.mark.parametrize("n", [1, 2, 60, 150])
@pytest.mark.parametrize("noise", [0.0, 1e-12])
def test_the_evidence_is_a_number_however_little_noise_there_is(noise, n):
    X, y, _ = data(n)
    exact, large = (m.condition(X, y) for m in pair(Matern(1.0, nu=0.5), noise=noise))
    error = abs(large.log_marginal_likelihood - exact.log_marginal_likelihood)
    # Up to 100 rows the preconditioner is the matrix, so that its log determinant is exact.
    assert error < (1e-4 if n <= 100 else 4 * large.log_marginal_likelihood_stderr)


def test_an_indefinite_or_infinite_kernel_is_an_error():
    X, y, _ = data(60)
    with pytest.raises(NotPositiveDefiniteError, match="not positive"):
        pair(lambda a, b: -exponential(a, b), noise=0.01, solver=CG(precond=None))[1].condition(X, y)
    with pytest.raises(NotPositiveDefiniteError, match="not finite"):
        pair(lambda a, b: exponential(a, b) / 0.0, solver=CG(precond=None))[1].condition(X, y)


def test_a_preconditioner_saves_iterations():
    X, y, _ = data(400)
    counts = []
    for precond in (None, Jacobi(), PivotedCholesky(100)):
        seen = []
        model = pair(RBF(1.5), noise=1e-2, solver=CG(precond=precond))[1]
        model.fit_mean_and_scale(X, y, progress=lambda iteration, excess, seen=seen: seen.append((iteration, excess)))
        counts.append(seen[-1][0])
        assert seen[-1][1] <= 1
    assert counts[2] < counts[0] / 2


def test_conditioning_after_fit_mean_and_scale_starts_at_the_solution():
    X, y, _ = data(300)
    model = pair(RBF(1.5), noise=0.01)[1]
    model.fit_mean_and_scale(X, y)
    seen = []
    model.condition(X, y, progress=lambda iteration, excess: seen.append(iteration))
    assert len(seen) <= 3


def test_conditioning_on_other_data_does_not_start_at_the_solution_of_the_old_ones():
    X, y, _ = data(200)
    fresh, used = (pair(RBF(1.5), noise=0.01)[1] for _ in range(2))
    used.fit_mean_and_scale(X, 1e9 * y.flip(0))
    used.load_state_dict(fresh.state_dict())
    counts = []
    for model in (fresh, used):
        seen = []
        posterior = model.condition(X, y, progress=lambda iteration, excess, seen=seen: seen.append(iteration))
        assert posterior.converged
        counts.append(len(seen))
    assert counts[0] == counts[1]


def test_a_mean_and_a_scale_of_a_solve_that_ended_early_are_not_passed_over():
    X, y, _ = data(300)
    model = pair(RBF(1.0), noise=1e-2, solver=CG(max_iter=110, precond=None))[1]
    model.fit_mean_and_scale(X, y)
    # Where that solve stopped this one goes on, and arrives.
    with pytest.warns(ConvergenceWarning, match="the solve that set mean and scale: the budget ended at a relative"):
        posterior = model.condition(X, y)
    assert posterior.residual <= 1e-6
    assert not posterior.converged
    # It is said of the hyperparameters it set: those of another call are as good as its own solve.
    model.solver = CG(precond=None)
    model.fit_mean_and_scale(X, y)
    assert model.condition(X, y).converged


def test_a_pickle_and_a_copy_hold_the_solution_and_not_the_preconditioner():
    X, y, X_test = data(200)
    posterior = pair(RBF(1.5), noise=0.01)[1].condition(X, y)
    before = len(pickle.dumps(posterior))
    variance = posterior.variance(X_test)
    written = pickle.dumps(posterior)
    assert len(written) < 1.01 * before
    for other in (pickle.loads(written), copy.deepcopy(posterior)):
        assert torch.equal(other.variance(X_test), variance)


def test_every_column_that_misses_its_tolerance_is_reported_whatever_the_others_do():
    X, y, X_test = data(150, d=1)
    exact, large = pair(RBF(1.0), noise=1.0, solver=CG(precond=None))
    posterior, truth = large.condition(X, y), exact.condition(X, y).variance(X_test)
    cross, prior = posterior.kernel(X, X_test), posterior.kernel.diag(X_test)
    # Variances far below the noise ask for more than the first pass does.
    wanted = (1e-6 * truth).sqrt()
    for budget in range(4, 16):
        short = dataclasses.replace(posterior, solver=CG(max_iter=budget, precond=None))
        found = short._certified(cross, prior)
        assert (found.norm[found.norm <= found.tolerance] <= 1.01 * wanted[found.norm <= found.tolerance]).all()
        assert found.ok or found.message


def test_a_posterior_survives_pickling_and_later_changes_of_the_model():
    X, y, X_test = data(100)
    model = pair(RBF(1.5), noise=0.01)[1]
    posterior = model.condition(X, y)
    before = posterior.predict(X_test)
    other = pickle.loads(pickle.dumps(posterior))
    model.kernel.lengthscale = 9.0
    X.zero_()
    for a, b, c in zip(before, posterior.predict(X_test), other.predict(X_test), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_exact_twin_shares_every_hyperparameter():
    model = LargeScaleMixtureGP(RBF(1.5), noise=0.01)
    twin = model.exact()
    model.noise = 0.5
    assert twin.noise.item() == pytest.approx(0.5)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}


def test_the_evidence_is_that_of_the_quadratic_form():
    X, y, _ = data(100)
    exact, large = (m.condition(X, y) for m in pair(RBF(1.5), noise=0.01))
    parts = [p.log_marginal_likelihood - log_evidence(p.scale_prior, 100, p.scale.quad).item() for p in (exact, large)]
    # The preconditioner has the rank of the matrix: each probe gives its log determinant.
    assert parts[1] == pytest.approx(parts[0], abs=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "cg"}, TypeError, "solver must be a CG object; got str"),
        ({"solver": CG(rtol=0.0, atol=1.0)}, ValueError, "solver.rtol must be positive and finite; got 0.0"),
        ({"solver": CG(precond=torch.nn.Identity())}, TypeError, "solver.precond must be 'auto', None, Pivoted"),
        ({"solver": CG(precond=PivotedCholesky)}, TypeError, "solver.precond must be .*; got type"),
        ({"solver": CG(project=lambda v: v)}, ValueError, "solver.project must be None"),
        ({"logdet": 3}, TypeError, "logdet must be a LanczosLogdet object; got int"),
        ({"noise": -1.0}, ValueError, r"noise must be non-negative and finite; got -1\.0"),
    ],
)
def test_bad_options_name_themselves(options, error, message):
    with pytest.raises(error, match=message):
        LargeScaleMixtureGP(RBF(), **options)


@pytest.mark.bad_input
def test_new_points_of_another_kind_are_refused():
    X, y, X_test = data(50)
    posterior = pair(RBF(1.5))[1].condition(X, y)
    with pytest.raises(ValueError, match=r"X must have shape \(m, 3\); got \(40, 2\)"):
        posterior.mean(X_test[:, :2])
    with pytest.raises(TypeError, match="mixed dtypes"):
        posterior.variance(X_test.float())
