"""Predictions with the noise outside the scale, against dense Gaussian laws integrated over the scale."""

import copy
import math
import pickle

import pytest
import torch
from scipy import stats

from stochproc.gp import BurrXII, Delta, HalfCauchy, IndependentNoiseGP, InverseGamma, ScaleMixtureGP
from stochproc.kernels import RBF
from tests.gp.independent_reference import Brute, data, model
from tests.gp.scale_reference import TwoPeaks

SOME_PRIORS = [InverseGamma(2.0, 2.0), HalfCauchy(1.3), BurrXII(0.3, 2.0), TwoPeaks()]


@pytest.fixture(params=SOME_PRIORS, ids=repr)
def case(request):
    """A posterior of two outputs, new inputs, and the brute force integrals."""
    X, y = data(7, n_outputs=2)
    gp = model(copy.deepcopy(request.param), n_outputs=2)
    return gp.condition(X, y), data(3, seed=1)[0], Brute(gp, X, y)


def test_means_and_covariances_are_those_of_brute_force_integration(case):
    posterior, X_new, brute = case
    mean, covariance = brute.moments(X_new)
    variance = covariance.diagonal().mT
    torch.testing.assert_close(posterior.mean(X_new), mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(posterior.variance(X_new), variance, rtol=1e-9, atol=0)
    torch.testing.assert_close(posterior.predictive(X_new).variance, variance + 0.1, rtol=1e-9, atol=0)
    torch.testing.assert_close(posterior.covariance(X_new), covariance, rtol=0, atol=1e-9)
    assert torch.equal(posterior.covariance(X_new), posterior.covariance(X_new).transpose(0, 1))


@pytest.mark.parametrize("noise", [True, False])
def test_densities_and_distribution_functions_are_those_of_brute_force_integration(case, noise):
    posterior, X_new, brute = case
    law = posterior.predictive(X_new, noise=noise)
    value = posterior.mean(X_new) + torch.tensor([[0.3, -1.0]])
    lower, _ = brute.tails(X_new, value, 0.1 * noise)
    torch.testing.assert_close(law.cdf(value), lower, rtol=0, atol=1e-11)
    means, covariances = brute.at(X_new)
    variances = covariances.diagonal(dim1=1, dim2=2)[..., None] + 0.1 * noise
    density = torch.distributions.Normal(means, variances.sqrt()).log_prob(value).sum(-1)
    exact = torch.logsumexp(brute.weights.log()[:, None] + density, 0)
    torch.testing.assert_close(law.log_prob(value), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise", [True, False])
def test_quantiles_have_their_probability_in_both_tails_by_brute_force_integration(case, noise):
    posterior, X_new, brute = case
    levels = [1e-8, 0.05, 0.5, 0.7, 1 - 1e-8]
    found = posterior.predictive(X_new, noise=noise).quantile(levels)
    for k, q in enumerate(levels):
        lower, upper = brute.tails(X_new, found[..., k], 0.1 * noise)
        # Relative to the smaller tail: the deep ones are exact, not small.
        torch.testing.assert_close(
            lower if q <= 0.5 else upper, torch.full_like(lower, min(q, 1 - q)), rtol=1e-9, atol=0
        )


@pytest.mark.parametrize("prior", [Delta(1.7), *SOME_PRIORS], ids=repr)
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_the_predictive_law_of_one_more_point_is_the_ratio_of_evidences(prior, n_outputs):
    X, y = data(8, n_outputs=n_outputs)
    gp = model(copy.deepcopy(prior), n_outputs=n_outputs)
    joint, rest = gp.log_marginal_likelihood(X, y), gp.log_marginal_likelihood(X[:-1], y[:-1])
    law = gp.condition(X[:-1], y[:-1]).predictive(X[-1:])
    assert law.log_prob(y[-1:]).item() == pytest.approx((joint - rest).item(), abs=1e-10)


@pytest.mark.parametrize("prior", [InverseGamma(2.0, 2.0), HalfCauchy(1.3)], ids=repr)
def test_an_outlier_moves_the_scale_beyond_its_nodes_and_keeps_ten_digits(prior):
    X, y = data(60)
    gp = model(copy.deepcopy(prior))
    far = torch.full((1,), 40.0)
    # Away from the data, where only a large s explains it.
    X_new = torch.full((1, 2), 50.0)
    joint = gp.log_marginal_likelihood(torch.cat([X, X_new]), torch.cat([y, far]))
    law = gp.condition(X, y).predictive(torch.cat([X_new, X[:1]]))
    found = law.log_prob(torch.cat([far, y[:1]]))
    assert found[0].item() == pytest.approx((joint - gp.log_marginal_likelihood(X, y)).item(), abs=1e-9)


@pytest.mark.parametrize("prior", [Delta(1.7), *SOME_PRIORS], ids=repr)
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_leave_one_out_is_conditioning_without_the_row(prior, n_outputs):
    X, y = data(8, n_outputs=n_outputs)
    # An outlier among them: without it the posterior of s is another one.
    y[3] = 9.0
    gp = model(copy.deepcopy(prior), n_outputs=n_outputs)
    mine = gp.condition(X, y).loo()
    for i in range(8):
        rest = torch.arange(8) != i
        law = gp.condition(X[rest], y[rest]).predictive(X[i : i + 1])
        assert mine[i].item() == pytest.approx(law.log_prob(y[i : i + 1]).item(), abs=1e-9)


def test_leaving_out_the_only_row_gives_the_prior():
    X, y = data(1)
    for prior in ("inverse_gamma", "half_cauchy", "delta"):
        gp = model(prior)
        assert gp.condition(X, y).loo().item() == pytest.approx(gp.log_marginal_likelihood(X, y).item(), abs=1e-10)


def test_a_known_scale_gives_the_gaussian_of_the_other_noise_model():
    from stochproc.gp import ScaleMixtureGP

    X, y = data(8, n_outputs=2)
    X_new, y_new = data(4, n_outputs=2, seed=1)
    ours = model(Delta(1.7), n_outputs=2).condition(X, y)
    twin = ScaleMixtureGP(RBF([0.8, 1.7]), Delta(1.7), noise=0.1 / 1.7, n_outputs=2)
    with torch.no_grad():
        twin.constant_mean += torch.linspace(0.3, 0.6, 2)
    a, b = ours.predictive(X_new), twin.condition(X, y).predictive(X_new)
    for found, exact in [(a.mean, b.mean), (a.std, b.std), (a.log_prob(y_new), b.log_prob(y_new))]:
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(a.cdf(y_new), b.cdf(y_new), rtol=0, atol=1e-12)
    torch.testing.assert_close(a.quantile([1e-8, 0.4]), b.quantile([1e-8, 0.4]), rtol=1e-11, atol=1e-11)


def test_moments_of_the_scale_are_integrals_and_may_be_infinite():
    X, y = data(6)
    for prior, finite in [(InverseGamma(2.0, 2.0), True), (HalfCauchy(1.3), False), (BurrXII(2.0, 1.0), True)]:
        gp = model(prior)
        posterior, brute = gp.condition(X, y), Brute(gp, X, y)
        assert posterior.scale.mean == pytest.approx((brute.weights @ brute.u.exp()).item(), rel=1e-10)
        # p(s) behaves as 1 / sqrt(s) at 0 under a half-Cauchy prior, and the likelihood as a constant.
        exact = (brute.weights @ (-brute.u).exp()).item() if finite else math.inf
        assert posterior.scale.inverse_mean == pytest.approx(exact, rel=1e-10)
        assert posterior.typical_scale == pytest.approx((brute.weights @ brute.u).exp().item(), rel=1e-10)


def test_the_mean_of_a_heavy_tail_is_exact():
    # p(s | y) falls as s^-2.1: half of E[s | y] lies beyond where the posterior has mass 1e-3.
    X, y = data(1)
    gp = model(BurrXII(2.0, 0.3), mean="zero")
    posterior = gp.condition(X, y)
    # Beyond exp(350) lies exp(-35) of the mean.
    brute = Brute(gp, X, y, high=350.0, n_nodes=20_000)
    assert posterior.scale.prior.tail_index == pytest.approx(1.1)
    assert posterior.scale.mean == pytest.approx((brute.weights @ brute.u.exp()).item(), rel=1e-10)
    X_new, _ = data(3, seed=1)
    exact = brute.moments(X_new)[1].diagonal()[0]
    torch.testing.assert_close(posterior.variance(X_new), exact, rtol=1e-10, atol=0)


def test_moments_that_do_not_exist_are_refused_and_quantiles_are_not():
    X, y = data(1)
    posterior = model(BurrXII(1.0, 0.2)).condition(X, y)
    law = posterior.predictive(X)
    assert law.mean.shape == (1,)
    for ask in (lambda: law.variance, lambda: law.std, lambda: posterior.covariance(X)):
        with pytest.raises(ValueError, match=r"does not exist: E\[s \| y\] is infinite"):
            ask()
    low, high = law.quantile([0.05, 0.95])[0]
    assert low < law.mean.item() < high


def test_quantiles_do_not_decrease_in_q():
    X, y = data(8)
    law = model("half_cauchy").condition(X, y).predictive(X[:2])
    q = torch.cat([torch.tensor([1e-300, 1e-12]), 0.3 + 1e-15 * torch.arange(50), torch.tensor([0.5, 1 - 1e-12])])
    found = law.quantile(q[torch.randperm(len(q), generator=torch.Generator().manual_seed(0))])
    assert bool((law.quantile(q).diff(dim=1) >= 0).all())
    torch.testing.assert_close(found.sort(1).values, law.quantile(q), rtol=0, atol=0)
    assert law.quantile(0.3).shape == (2,)
    assert law.quantile(torch.tensor([[0.1, 0.2]])).shape == (2, 1, 2)


@pytest.mark.parametrize("q", [0.0, 1.0, float("nan")])
def test_a_probability_outside_the_open_interval_is_refused(q):
    X, y = data(8)
    with pytest.raises(ValueError, match="q must lie strictly between 0 and 1"):
        model().condition(X, y).predictive(X).quantile(q)


def test_blocks_of_rows_change_nothing(monkeypatch):
    X, y = data(8, n_outputs=2)
    X_new, y_new = data(20, n_outputs=2, seed=1)
    posterior = model("half_cauchy", n_outputs=2).condition(X, y)

    def answers():
        law = posterior.predictive(X_new)
        return law.mean, law.std, law.log_prob(y_new), law.cdf(y_new), law.quantile([0.1, 0.9]), posterior.loo()

    whole = answers()
    monkeypatch.setattr("stochproc.gp._independent_posterior.BLOCK_ELEMENTS", 3000)
    assert posterior.rows_at_once < 4
    for a, b in zip(answers(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_mean_asks_for_no_variance_and_the_variance_for_no_covariance():
    class Watched(RBF):
        def forward(self, x, y=None):
            blocks.append((len(x), len(x if y is None else y)))
            return super().forward(x, y)

        def diag(self, x):
            diagonals.append(len(x))
            return super().diag(x)

    blocks, diagonals = [], []
    X, y = data(8)
    X_new, _ = data(30, seed=1)
    law = IndependentNoiseGP(Watched(1.0)).condition(X, y).predictive(X_new)
    blocks.clear()
    assert law.mean.shape == (30,)
    assert diagonals == []
    assert law.std.shape == (30,)
    assert blocks == [(30, 8)] * 2


@pytest.mark.parametrize("noise", [True, False])
def test_draws_have_the_marginals_of_the_predictive_law(noise):
    X, y = data(8, n_outputs=2)
    X_new, _ = data(3, seed=1)
    posterior = model(HalfCauchy(1.3), n_outputs=2).condition(X, y)
    draws = posterior.sample(X_new, 4000, noise=noise, generator=torch.Generator().manual_seed(1))
    assert draws.shape == (4000, 3, 2)
    law = posterior.predictive(X_new.repeat(4000, 1), noise=noise)
    uniform = law.cdf(draws.reshape(-1, 2)).reshape(4000, 6)
    for column in uniform.T:
        # Twelve tests at a fixed seed; by chance one seed in nine would fail.
        assert stats.kstest(column.numpy(), "uniform").pvalue > 0.01


def test_draws_have_the_predicted_covariance_and_share_one_scale():
    X, y = data(8)
    X_new = torch.tensor([[0.5, 0.5], [0.6, 0.4], [40.0, 0.0], [-40.0, 0.0]])
    posterior = model(InverseGamma(4.0, 4.0)).condition(X, y)
    draws = posterior.sample(X_new, 20_000, generator=torch.Generator().manual_seed(0))
    exact, mean = posterior.covariance(X_new), posterior.mean(X_new)
    # Five standard errors of a sample covariance of 20,000 draws of kurtosis below 6.
    error = (exact.diagonal()[:, None] * exact.diagonal()).sqrt() * math.sqrt(5 / 20_000)
    assert bool(((draws.T.cov() - exact).abs() < 5 * error).all())
    assert bool(((draws.mean(0) - mean).abs() < 5 * (exact.diagonal() / 20_000).sqrt()).all())
    # Far from everything the two values are sqrt(s) times independent normals: their squares are correlated, by
    # Var(s) / (3 E[s²] - E[s]²).
    log_s, log_weights = posterior.nodes
    first, second = (float(log_weights.exp() @ (k * log_s).exp()) for k in (1, 2))
    want = (second - first**2) / (3 * second - first**2)
    squares = (draws[:, 2:] - 0.3).square()
    # Its standard error is some 3 / sqrt(20,000) for such heavy squares.
    assert squares.T.corrcoef()[0, 1].item() == pytest.approx(want, abs=0.06)


def test_draws_at_known_points_without_noise_are_the_data():
    X, y = data(6)
    posterior = model(noise=0.0).condition(X, y)
    draws = posterior.sample(X, 3, generator=torch.Generator().manual_seed(0))
    # The jitter that is part of drawing: 1e-10 of the variance.
    torch.testing.assert_close(draws, y.expand(3, 6), rtol=0, atol=1e-3)
    # What is known has a density of infinity at one value, or of nothing.
    law = posterior.predictive(X, noise=False)
    assert bool((law.quantile([0.01, 0.99]) - y[:, None]).abs().max() < 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prior", [InverseGamma(2.0, 2.0), HalfCauchy(1.0)], ids=repr)
def test_ninety_percent_intervals_cover_ninety_percent_of_the_models_own_data(prior):
    gen = torch.Generator().manual_seed(0)
    X = torch.rand(40, 1, generator=gen) * 6
    gp = IndependentNoiseGP(RBF(0.7), prior, noise=0.3, mean="zero")
    root = torch.linalg.cholesky(gp.kernel(X, X).detach() + 1e-10 * torch.eye(40))
    inside = []
    # 625 data sets of 32 test points each; coverages of a data set vary by some 0.1, so the standard error is 0.004.
    for s in prior.sample(625, generator=gen):
        y = s.sqrt() * root @ torch.randn(40, generator=gen) + 0.3**0.5 * torch.randn(40, generator=gen)
        law = gp.condition(X[:8], y[:8]).predictive(X[8:])
        low, high = law.quantile([0.05, 0.95]).T
        inside.append(((low < y[8:]) & (y[8:] < high)).double().mean())
    assert torch.stack(inside).mean().item() == pytest.approx(0.9, abs=0.01)


def test_the_posterior_is_frozen_and_picklable():
    X, y = data(8)
    gp = model("half_cauchy")
    posterior = gp.condition(X, y)
    before = posterior.predictive(X).quantile([0.1, 0.5])
    with torch.no_grad():
        for parameter in gp.parameters():
            parameter += 1
    assert torch.equal(posterior.predictive(X).quantile([0.1, 0.5]), before)
    assert torch.equal(pickle.loads(pickle.dumps(posterior)).predictive(X).quantile([0.1, 0.5]), before)


def test_predictions_are_differentiable_in_the_inputs():
    X, y = data(6)
    posterior = model("half_cauchy").condition(X, y)
    X_new, y_new = data(2, seed=1)
    X_new.requires_grad_()
    for ask in (
        posterior.mean,
        posterior.variance,
        lambda x: posterior.predictive(x).log_prob(y_new),
        lambda x: posterior.predictive(x).cdf(y_new),
    ):
        assert torch.autograd.gradcheck(ask, X_new)


@pytest.mark.parametrize("kind", [ScaleMixtureGP, IndependentNoiseGP])
@pytest.mark.parametrize("n_outputs", [None, 2])
def test_no_rows_give_no_predictions(kind, n_outputs):
    X = torch.linspace(0, 1, 6)[:, None]
    shape = () if n_outputs is None else (n_outputs,)
    y = torch.sin(6 * X).expand(6, n_outputs or 1).reshape(6, *shape)
    posterior = kind(RBF(0.3), "half_cauchy", n_outputs=n_outputs or 1).condition(X, y)
    law = posterior.predictive(X[:0])
    assert law.mean.shape == law.variance.shape == (0, *shape)
    assert law.quantile([0.1, 0.9]).shape == (0, *shape, 2)
    assert law.log_prob(y[:0]).shape == (0,)
    assert posterior.sample(X[:0], 3).shape == (3, 0, *shape)
