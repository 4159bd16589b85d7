"""Trained networks against integrated gradient flow, Gaussian process regression, finite networks and quadrature."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from stochproc.exceptions import NotPositiveDefiniteError, NumericalWarning
from stochproc.gp import (
    BurrXII,
    Delta,
    FlowSolution,
    GradientFlow,
    HalfCauchy,
    InverseGamma,
    KernelPair,
    LogNormal,
    Mixture,
    MixturePredictive,
    Predictive,
    ScaleMixtureGP,
    log_evidence,
    trained_law,
)
from stochproc.kernels import RBF, Matern
from tests.gp.trained_reference import NET, integrated

INF = math.inf


@pytest.fixture
def data(gen):
    X = torch.randn(8, 2, generator=gen)
    return X, torch.sin(2 * X[:, 0]) + 0.2, torch.randn(5, 2, generator=gen)


@pytest.mark.parametrize("rate", ["scaled", "fixed"])
@pytest.mark.parametrize("scale", [0.3, 4.0])
@pytest.mark.parametrize("ridge", [0.0, 0.4])
@pytest.mark.parametrize("train", ["all", "readout"])
def test_the_law_is_that_of_integrated_gradient_flow(data, rate, scale, ridge, train):
    X, y, X_new = data
    time, eta = 0.6, 0.5
    law = trained_law(NET, X, y, flow=GradientFlow(time, eta, ridge, rate), scale_prior=Delta(scale), train=train)
    mean, cov = integrated(
        X,
        y,
        X_new,
        scale=scale,
        learning_rate=eta / scale if rate == "scaled" else eta,
        time=time,
        ridge=ridge,
        readout=train == "readout",
    )
    # The integrator was asked for 1e-11.
    torch.testing.assert_close(law.mean(X_new), mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(law.covariance(X_new), cov, rtol=1e-9, atol=1e-10)
    predictive = law.predictive(X_new)
    torch.testing.assert_close(predictive.mean, mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(predictive.variance, cov.diagonal(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rate", ["scaled", "fixed"])
def test_no_time_leaves_the_prior(data, rate):
    X, y, X_new = data
    law = trained_law(NET, X, y, flow=GradientFlow(0.0, rate=rate), scale_prior=InverseGamma(2.0, 3.0))
    assert bool((law.mean(X_new) == 0).all())
    torch.testing.assert_close(law.covariance(X_new), 3 * NET.nngp(X_new), rtol=1e-11, atol=0)


def test_a_short_time_moves_outputs_by_the_gradient(data):
    X, y, X_new = data
    law = trained_law(NET, X, y, flow=GradientFlow(1e-6), scale_prior=Delta(1.0))
    # The next term of the series is 1e-6 times the tangent kernel smaller.
    torch.testing.assert_close(law.mean(X_new), 1e-6 * NET.ntk(X_new, X) @ y, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernel", [Matern(0.7, nu=1.5), NET.covariance], ids=["matern", "network"])
def test_a_converged_readout_is_the_noise_free_posterior(data, kernel):
    X, y, X_new = data
    law = trained_law(KernelPair(kernel), X, y, scale_prior=Delta(1.7), train="readout")
    posterior = ScaleMixtureGP(kernel, Delta(1.7), noise=1e-13, mean="zero").condition(X, y)
    torch.testing.assert_close(law.mean(X_new), posterior.mean(X_new), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(law.covariance(X_new), 1.7 * posterior.covariance(X_new), rtol=1e-7, atol=1e-9)


def test_a_readout_with_ridge_has_the_posterior_mean_and_a_smaller_covariance(data):
    X, y, X_new = data
    noise = 0.3
    kernel = Matern(0.7, nu=1.5)
    law = trained_law(KernelPair(kernel), X, y, flow=GradientFlow(ridge=noise), scale_prior=Delta(1.0), train="readout")
    posterior = ScaleMixtureGP(kernel, Delta(1.0), noise=noise, mean="zero").condition(X, y)
    torch.testing.assert_close(law.mean(X_new), posterior.mean(X_new), rtol=1e-10, atol=1e-12)
    difference = posterior.covariance(X_new) - law.covariance(X_new)
    # It is noise times |weights of the training points|^2, as ridge regression knows no noise.
    weights = torch.linalg.solve(kernel(X) + noise * torch.eye(8), kernel(X, X_new))
    torch.testing.assert_close(difference, noise * weights.mT @ weights, rtol=1e-8, atol=1e-10)


def test_both_rates_agree_at_convergence(data):
    X, y, X_new = data
    one, other = (
        trained_law(NET, X, y, flow=GradientFlow(INF, ridge=0.1, rate=rate)).predictive(X_new)
        for rate in ("scaled", "fixed")
    )
    assert isinstance(other, Predictive)
    assert torch.equal(one.loc, other.loc)
    assert torch.equal(one.variance, other.variance)


def test_training_leaves_the_degrees_of_freedom_of_the_prior(data):
    X, y, X_new = data
    a, b = 1.5, 2.5
    law = trained_law(NET, X, y, flow=GradientFlow(0.5), scale_prior=InverseGamma(a, b))
    unit = trained_law(NET, X, y, flow=GradientFlow(0.5), scale_prior=Delta(1.0)).predictive(X_new)
    assert law.scale.df == pytest.approx(2 * a)
    want = stats.t(2 * a, unit.mean.numpy(), np.sqrt(b / a * unit.variance.numpy()))
    predictive = law.predictive(X_new)
    np.testing.assert_allclose(predictive.log_prob(y[:5]), want.logpdf(y[:5]), rtol=1e-11)
    np.testing.assert_allclose(predictive.quantile([0.01, 0.8])[:, 1], want.ppf(0.8), rtol=1e-10)


def test_a_fixed_rate_is_a_mixture_of_laws_over_the_scales(data):
    X, y, X_new = data
    target = torch.linspace(-1, 1, 5)
    prior = InverseGamma(2.5, 2.0)
    law = trained_law(NET, X, y, flow=GradientFlow(0.6, 0.5, 0.1, "fixed"), scale_prior=prior)
    found = law.predictive(X_new)
    assert isinstance(found, MixturePredictive)

    # A rule of its own over u = log s, of the laws given s that are checked against integrated flows above.
    u = torch.linspace(-5, 24, 1161)
    weights = (prior._log_prob_u(u).exp() / 40)[:, None]
    rows = law.solution.rows(*NET.nngp_ntk(X_new, X))
    loc = law.solution.location(rows, u.exp())[..., 0]
    variance = law.solution.variance(rows, NET.diag(X_new), u.exp()) * u.exp()[:, None]
    mean = (weights * loc).sum(0)
    # The part of the second moment beyond that range is e^(-1.5 * 24) = 2e-16.
    second = (weights * (variance + loc.square())).sum(0)
    given = torch.distributions.Normal(loc, variance.sqrt())
    torch.testing.assert_close(law.mean(X_new), mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.mean, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.variance, second - mean.square(), rtol=1e-10, atol=1e-12)
    density = (weights * given.log_prob(target).exp()).sum(0)
    torch.testing.assert_close(found.log_prob(target), density.log(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.cdf(target), (weights * given.cdf(target)).sum(0), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.cdf(found.quantile(0.07)), torch.full((5,), 0.07), rtol=0, atol=1e-10)


@pytest.mark.parametrize("train", ["all", "readout"])
@pytest.mark.parametrize(("rate", "time"), [("scaled", 0.5), ("fixed", 0.5), ("scaled", INF)])
def test_the_covariance_is_positive_and_its_diagonal_is_the_variance(gen, train, rate, time):
    X, X_new = torch.randn(20, 2, generator=gen), torch.randn(30, 2, generator=gen)
    X_new[:5] = X[:5]
    law = trained_law(NET, X, X[:, 0], flow=GradientFlow(time, rate=rate), train=train)
    cov = law.covariance(X_new)
    assert torch.equal(cov, cov.mT)
    assert torch.equal(cov.diagonal(), law.variance(X_new))
    eigenvalues = torch.linalg.eigvalsh(cov)
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]
    if time == INF:
        # On the training inputs the networks agree to rounding.
        assert law.variance(X_new[:5]).max() < 1e-11 * law.variance(X_new[5:]).max()


@pytest.mark.parametrize(("rate", "prior"), [("scaled", InverseGamma(5.0, 5.0)), ("fixed", LogNormal())])
def test_samples_have_the_mean_the_covariance_and_the_quantiles_of_the_law(data, gen, rate, prior):
    X, y, X_new = data
    law = trained_law(NET, X, y, flow=GradientFlow(0.4, rate=rate), scale_prior=prior)
    draws = law.sample(X_new, 40_000, generator=gen)
    mean, cov = law.mean(X_new), law.covariance(X_new)
    # Four standard errors; those of the covariance from the sample itself.
    assert bool(((draws.mean(0) - mean).abs() < 4 * (cov.diagonal() / 40_000).sqrt()).all())
    products = (draws - mean)[:, :, None] * (draws - mean)[:, None]
    assert bool(((products.mean(0) - cov).abs() < 4 * products.std(0) / 200).all())
    for q in (0.01, 0.3, 0.95):
        share = (draws < law.predictive(X_new).quantile(q)).double().mean(0)
        assert bool(((share - q).abs() < 4 * math.sqrt(q * (1 - q) / 40_000)).all())


def test_rows_of_a_draw_share_one_scale(gen):
    # Far apart under a short lengthscale outputs are uncorrelated, their squares are not.
    X = torch.tensor([[0.0]])
    law = trained_law(KernelPair(RBF(0.1)), X, torch.zeros(1), scale_prior=InverseGamma(5.0, 4.0), train="readout")
    draws = law.sample(torch.tensor([[10.0], [20.0]]), 200_000, generator=gen).square()
    # E s = 1 and E s^2 = 16/12; the squares have covariance E s^2 - 1 and variance 3 E s^2 - 1. With the eighth moment
    # of that Student-t law the standard error is about 0.005.
    want = (16 / 12 - 1) / (3 * 16 / 12 - 1)
    assert torch.corrcoef(draws.mT)[0, 1].item() == pytest.approx(want, abs=0.02)


def test_outputs_share_kernels_and_scale(data):
    X, y, X_new = data
    both = torch.stack([y, y.flip(0)], 1)
    for flow in (GradientFlow(0.4), GradientFlow(0.4, rate="fixed")):
        law = trained_law(NET, X, both, flow=flow)
        single = [trained_law(NET, X, column, flow=flow) for column in both.mT]
        torch.testing.assert_close(law.mean(X_new), torch.stack([one.mean(X_new) for one in single], 1))
        covs = torch.stack([one.covariance(X_new) for one in single], 2)
        torch.testing.assert_close(law.covariance(X_new), covs)
        quantiles = torch.stack([one.predictive(X_new).quantile([0.2, 0.7]) for one in single], 1)
        torch.testing.assert_close(law.predictive(X_new).quantile([0.2, 0.7]), quantiles)
        assert law.sample(X_new, 3).shape == (3, 5, 2)


def test_predictions_do_not_depend_on_the_blocks(data, monkeypatch):
    X, y, _ = data
    X_new = torch.linspace(-2, 2, 40).reshape(20, 2)
    for flow in (GradientFlow(0.4), GradientFlow(0.4, rate="fixed")):
        law = trained_law(NET, X, y, flow=flow)
        mean, variance = law.mean(X_new), law.variance(X_new)
        monkeypatch.setattr("stochproc.gp._trained.BLOCK_ELEMENTS", 1)
        torch.testing.assert_close(law.mean(X_new), mean)
        torch.testing.assert_close(law.variance(X_new), variance)
        monkeypatch.undo()


def test_float32_agrees_to_its_precision(data):
    X, y, X_new = data
    for flow in (GradientFlow(0.4), GradientFlow(0.4, rate="fixed"), GradientFlow(ridge=0.1)):
        law = trained_law(NET, X, y, flow=flow)
        short = trained_law(NET, X.float(), y.float(), flow=flow)
        assert short.mean(X_new.float()).dtype == torch.float32
        torch.testing.assert_close(short.mean(X_new.float()).double(), law.mean(X_new), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(short.variance(X_new.float()).double(), law.variance(X_new), rtol=1e-3, atol=1e-5)


def test_the_mean_is_differentiable_in_the_inputs(data):
    X, y, X_new = data
    law = trained_law(NET, X, y, flow=GradientFlow(0.4, rate="fixed"))
    assert torch.autograd.gradcheck(law.mean, X_new.requires_grad_())


@pytest.mark.parametrize("train", ["all", "readout"])
def test_repeated_rows_are_trained_towards_their_mean_and_said_to_be(data, train):
    X, y, X_new = data
    twice, targets = torch.cat([X, X[:2]]), torch.cat([y, y[:2] + 1])
    with pytest.warns(NumericalWarning, match="2 of 10 eigenvalues of the tangent kernel .* are zero to rounding"):
        law = trained_law(NET, twice, targets, train=train)
    middle = y.clone()
    middle[:2] += 0.5
    once = trained_law(NET, X, middle, train=train)
    torch.testing.assert_close(law.mean(X_new), once.mean(X_new), rtol=1e-9, atol=1e-10)
    # The root of the singular covariance has 1e-10 of its diagonal added.
    torch.testing.assert_close(law.variance(X_new), once.variance(X_new), rtol=1e-7, atol=1e-8)


def test_neither_a_ridge_nor_a_short_time_minds_repeated_rows(data):
    X, y, X_new = data
    twice, targets = torch.cat([X, X[:2]]), torch.cat([y, y[:2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laws = [trained_law(NET, twice, targets, flow=f) for f in (GradientFlow(ridge=1e-3), GradientFlow(10.0))]
    for law in laws:
        assert bool(law.predictive(X_new).std.isfinite().all())


def test_a_very_long_time_does_not_amplify_rounding(data):
    X, y, X_new = data
    twice, targets = torch.cat([X, X[:2]]), torch.cat([y, y[:2]])
    with pytest.warns(NumericalWarning, match="training moves nothing in those directions"):
        law = trained_law(NET, twice, targets, flow=GradientFlow(1e30))
    torch.testing.assert_close(law.mean(X_new), trained_law(NET, X, y).mean(X_new), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rate", ["scaled", "fixed"])
@pytest.mark.parametrize(
    "prior",
    [HalfCauchy(1.3), LogNormal(0.0, 25.0), LogNormal(0.0, 0.01), BurrXII(0.3, 2.0)],
    ids=["half_cauchy", "wide", "narrow", "burr"],
)
def test_the_prior_as_the_law_of_the_scale_is_exact_however_wide(data, prior, rate):
    # Without data and before training the density of one output is an evidence of N = 1.
    X, y, X_new = data
    law = trained_law(NET, X, y, flow=GradientFlow(1e-40, rate=rate), scale_prior=prior).predictive(X_new)
    v = NET.diag(X_new)
    for deviation in (1e-3, 1.0, 100.0):
        want = log_evidence(prior, 1, v.new_full((5,), deviation**2)) - v.log() / 2
        torch.testing.assert_close(law.log_prob(deviation * v.sqrt()), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prior", [HalfCauchy(), InverseGamma(0.9, 1.0)])
def test_moments_that_do_not_exist_are_an_error_and_quantiles_are_not(data, prior):
    X, y, X_new = data
    for rate in ("scaled", "fixed"):
        law = trained_law(NET, X, y, flow=GradientFlow(0.4, rate=rate), scale_prior=prior)
        with pytest.raises(ValueError, match="variance does not exist"):
            law.variance(X_new)
        with pytest.raises(ValueError, match="variance does not exist"):
            law.covariance(X_new)
        low, high = law.predictive(X_new).quantile([0.05, 0.95]).mT
        assert bool((low < high).all() and low.isfinite().all() and high.isfinite().all())


def test_matrices_are_solved_without_functions(data):
    X, y, X_new = data
    K, Th = NET.nngp_ntk(X)
    solution = FlowSolution.of(GradientFlow(0.4), K, Th, y)
    rows = solution.rows(*NET.nngp_ntk(X_new, X))
    law = trained_law(NET, X, y, flow=GradientFlow(0.4), scale_prior=Delta(1.0))
    torch.testing.assert_close(solution.location(rows)[:, 0], law.mean(X_new))
    torch.testing.assert_close(solution.variance(rows, NET.diag(X_new)), law.variance(X_new))


def test_the_law_is_a_copy(data):
    X, y, X_new = data
    kernel, prior = Matern(0.7), InverseGamma(2.0, 2.0)
    law = trained_law(KernelPair(kernel), X, y, scale_prior=prior, train="readout")
    before = law.mean(X_new)
    kernel.lengthscale, prior.b = 3.0, 9.0
    X.zero_()
    assert torch.equal(law.mean(X_new), before)
    assert law.scale_prior.b.item() == pytest.approx(2.0)


def test_networks_on_images_are_trained_as_well(gen):
    from stochproc.gp import arch

    images, new = torch.randn(6, 4, 4, 2, generator=gen), torch.randn(3, 4, 4, 2, generator=gen)
    net, y = arch.cnn(1), torch.linspace(-1, 1, 6)
    law = trained_law(net, images, y, flow=GradientFlow(2.0), scale_prior=Delta(1.0))
    K, Th = net.nngp_ntk(images)
    cross, cross_tangent = net.nngp_ntk(new, images)
    done = torch.linalg.solve(Th, torch.eye(6) - torch.linalg.matrix_exp(-2 * Th))
    weights = cross_tangent @ done
    cov = net.nngp(new) + weights @ K @ weights.mT - weights @ cross.mT - cross @ weights.mT
    torch.testing.assert_close(law.mean(new), weights @ y)
    torch.testing.assert_close(law.covariance(new), cov)
    assert law.sample(new, 2, generator=gen).shape == (2, 3)


@pytest.mark.bad_input
def test_bad_arguments_name_themselves(data):
    X, y, X_new = data
    with pytest.raises(ValueError, match=r"y must have shape \(8,\) or \(8, C\); got \(7,\)"):
        trained_law(NET, X, y[:7])
    with pytest.raises(ValueError, match="X must be finite"):
        trained_law(NET, X * math.nan, y)
    with pytest.raises(ValueError, match="y must be finite"):
        trained_law(NET, X, y * math.inf)
    with pytest.raises(ValueError, match="train must be one of 'all', 'readout'; got 'last'"):
        trained_law(NET, X, y, train="last")
    with pytest.raises(ValueError, match="a tangent kernel must be given"):
        trained_law(KernelPair("rbf"), X, y)
    prior = Mixture([Delta(1.0), InverseGamma()], [0.5, 0.5])
    with pytest.raises(ValueError, match="must have a scale_prior with a density, or Delta alone; got Mixture"):
        trained_law(NET, X, y, flow=GradientFlow(1.0, rate="fixed"), scale_prior=prior)
    with pytest.raises(TypeError, match="mixed dtypes"):
        trained_law(NET, X, y.float())
    law = trained_law(NET, X, y)
    with pytest.raises(ValueError, match=r"X must have shape \(m, 2\); got \(5, 1\)"):
        law.mean(X_new[:, :1])
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        law.sample(X_new, 0)
    with pytest.raises(ValueError, match=r"kernel must have shape \(n, n\) = \(8, 8\)"):
        FlowSolution.of(GradientFlow(), NET.nngp(X[:3]), None, y)
    with pytest.raises(ValueError, match="tangent must be given, as all layers were trained"):
        law.solution.rows(NET.nngp(X_new, X))


def test_an_indefinite_tangent_kernel_is_refused(data):
    X, y, _ = data
    with pytest.raises(NotPositiveDefiniteError, match=r"must be positive semi-definite; got eigenvalues from -"):
        trained_law(KernelPair(RBF(), lambda a, b: RBF()(a, b) - 0.9), X, y)


@pytest.mark.slow
def test_wide_finite_networks_trained_by_small_steps_are_that_law(gen):
    from stochproc.gp import arch

    n_networks, width, eta, steps, s = 500, 1024, 0.05, 60, 0.5
    X = torch.tensor([[-1.0, 0.3], [0.2, -0.5], [0.9, 1.1], [1.5, -1.0]])
    y, X_new = torch.tensor([0.5, -1.0, 0.3, 1.0]), torch.tensor([[0.0, 0.0], [1.0, 0.5], [-1.5, -1.0]])
    first = torch.randn(n_networks, 2, width, generator=gen).requires_grad_()
    bias = torch.randn(n_networks, 1, width, generator=gen).requires_grad_()
    last = torch.randn(n_networks, width, 1, generator=gen).requires_grad_()

    def outputs(x):
        hidden = (x @ first + bias).relu()
        return math.sqrt(s / width) * (hidden @ last)[..., 0]

    for _ in range(steps):
        loss = (outputs(X) - y).square().sum() / 2
        gradients = torch.autograd.grad(loss, [first, bias, last])
        with torch.no_grad():
            for parameter, gradient in zip((first, bias, last), gradients, strict=True):
                parameter -= eta * gradient
    net = arch.mlp(1, w_std=math.sqrt(2.0), b_std=1.0)
    law = trained_law(net, X, y, flow=GradientFlow(steps * eta, rate="fixed"), scale_prior=Delta(s))
    found = outputs(X_new).detach()
    mean, cov = law.mean(X_new), law.covariance(X_new)
    error = (cov.diagonal() / n_networks).sqrt()
    # Four standard errors, and a bias of a few percent: of order 1/width from the width, of order eta from the steps.
    assert bool(((found.mean(0) - mean).abs() < 4 * error + 0.02).all())
    assert bool(((found.var(0) / cov.diagonal() - 1).abs() < 4 * math.sqrt(2 / n_networks) + 0.05).all())
