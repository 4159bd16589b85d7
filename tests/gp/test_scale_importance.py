import math

import numpy as np
import pytest
import torch
from scipy import stats

from stochproc.exceptions import NumericalWarning
from stochproc.gp import (
    BurrXII,
    Delta,
    Gamma,
    HalfCauchy,
    HalfNormal,
    HalfStudentT,
    InverseGamma,
    LogNormal,
    Mixture,
    ScalePosterior,
    importance_posterior,
    log_evidence,
    scale_posterior,
)
from stochproc.gp._scale_importance import pareto_shape

PRIORS = [LogNormal(0.4, 2.5), Gamma(1.5, 0.7), BurrXII(), HalfCauchy(1.3), HalfStudentT(3.5)]


def draw(prior, n_obs, quad, seed=0, n_samples=10_000):
    generator = torch.Generator().manual_seed(seed)
    return importance_posterior(prior, n_obs, torch.tensor(quad), n_samples, generator=generator)


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
@pytest.mark.parametrize(("n_obs", "quad"), [(5, 3.0), (200, 230.0)])
def test_the_evidence_is_within_four_of_its_standard_errors(prior, n_obs, quad):
    drawn = draw(prior, n_obs, quad)
    exact = log_evidence(prior, n_obs, torch.tensor(quad)).item()
    # Fixed seed; one in 16,000 would fail. The error itself is small, of order 1/N with the proposal's curvature.
    assert drawn.log_evidence == pytest.approx(exact, abs=4 * drawn.log_evidence_error)
    assert drawn.log_evidence_error < 0.01 * 5 / n_obs
    assert drawn.ess > 9000
    assert drawn.k_hat < 0.7


def test_the_standard_error_is_the_spread_over_seeds():
    drawn = [draw(HalfCauchy(), 5, 3.0, seed, 1000) for seed in range(200)]
    spread = np.std([d.log_evidence for d in drawn])
    claimed = np.sqrt(np.mean([d.log_evidence_error**2 for d in drawn]))
    # The relative error of a standard deviation from 200 values is 1/20; four of them.
    assert claimed == pytest.approx(spread, rel=0.2)


def test_predictions_are_those_of_the_exact_posterior_up_to_the_draws():
    prior, n_obs, quad = HalfCauchy(1.3), 20, 17.0
    drawn, exact = draw(prior, n_obs, quad), scale_posterior(prior, n_obs, torch.tensor(quad))
    assert isinstance(drawn, ScalePosterior)
    # The standard deviation of log s is sqrt(2/20); four standard errors of a mean of 10,000 draws.
    tolerance = 4 * (2 / n_obs) ** 0.5 / 100
    assert drawn.mean == pytest.approx(exact.mean, rel=tolerance)
    assert drawn.inverse_mean == pytest.approx(exact.inverse_mean, rel=tolerance)
    q = torch.tensor([1e-3, 0.2, 0.975])
    torch.testing.assert_close(drawn.quantile(q), exact.quantile(q), rtol=tolerance, atol=0)
    torch.testing.assert_close(drawn.cdf(drawn.quantile(q)), q, rtol=1e-9, atol=1e-12)
    squares = torch.tensor([0.1, 9.0])
    torch.testing.assert_close(
        drawn.log_density(squares, 2), exact.log_density(squares, 2), rtol=0, atol=tolerance * 10
    )
    assert drawn.df is None


def test_an_inverse_gamma_posterior_is_its_own_proposal():
    drawn = draw(InverseGamma(2.0, 2.0), 30, 25.0)
    # The proposal has mode and curvature of the posterior, here from differences: its shape is good to 1e-5.
    assert drawn.ess == pytest.approx(10_000, rel=1e-6)
    exact = log_evidence(InverseGamma(2.0, 2.0), 30, torch.tensor(25.0)).item()
    assert drawn.log_evidence == pytest.approx(exact, abs=1e-6)
    assert drawn.log_evidence_error < 1e-6


def test_resampled_draws_follow_the_posterior(gen):
    prior, n_obs, quad = Gamma(1.5, 0.7), 10, 8.0
    s = draw(prior, n_obs, quad, n_samples=100_000).sample(5000, generator=gen)
    exact = scale_posterior(prior, n_obs, torch.tensor(quad))
    z = torch.randn(5000, generator=gen) * s.sqrt()
    # One seed in a hundred would fail.
    assert stats.kstest(z.numpy(), lambda x: exact.cdf(torch.as_tensor(x)).numpy()).pvalue > 0.01


@pytest.mark.parametrize("prior", [HalfCauchy(), HalfNormal()], ids=repr)
def test_a_posterior_that_no_inverse_gamma_covers_is_reported(prior):
    # Between S = 1e-8 and the prior's scale the posterior is a plateau of 18 units of log s.
    with pytest.warns(NumericalWarning, match="importance sampling of the scale is unreliable: k_hat = .* > 0.7"):
        drawn = draw(prior, 1, 1e-8)
    assert drawn.k_hat > 0.7
    assert drawn.ess < 5000


def test_moments_that_do_not_exist_are_infinite_for_finitely_many_draws_too():
    drawn = draw(HalfCauchy(), 1, 0.7)
    assert drawn.mean == math.inf
    assert drawn.missing_variance
    assert drawn.has_location
    assert draw(HalfCauchy(), 2, 0.7).mean < math.inf


def test_a_point_mass_needs_no_draws():
    drawn, exact = draw(Delta(2.0), 7, 5.0), scale_posterior(Delta(2.0), 7, torch.tensor(5.0))
    assert drawn.log_evidence == log_evidence(Delta(2.0), 7, torch.tensor(5.0)).item()
    assert drawn.log_evidence_error == 0
    assert drawn.mean == pytest.approx(exact.mean, rel=1e-15)
    q = torch.tensor([1e-8, 0.3])
    torch.testing.assert_close(drawn.quantile(q), exact.quantile(q), rtol=1e-12, atol=0)


def test_equal_seeds_give_equal_bits():
    first, second, other = (draw(HalfCauchy(), 7, 5.0, seed) for seed in (3, 3, 4))
    assert torch.equal(first.log_s, second.log_s)
    assert torch.equal(first.log_weights, second.log_weights)
    assert not torch.equal(first.log_s, other.log_s)


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.5, 0.9])
def test_the_shape_of_a_pareto_tail_is_recovered(shape):
    weights = stats.genpareto(shape).rvs(100_000, random_state=1)
    # Standard error (1 + k) / sqrt(M) with M = 949 in the tail; four of them, and the pull of 0.01 towards 1/2.
    assert pareto_shape(np.log(weights + 1e-300)) == pytest.approx(shape, abs=4 * (1 + shape) / 949**0.5 + 0.01)


def test_the_shape_does_not_depend_on_the_unit_and_equal_weights_have_none():
    log_weights = np.log(stats.genpareto(0.4).rvs(1000, random_state=2))
    assert pareto_shape(log_weights + 700) == pytest.approx(pareto_shape(log_weights), rel=1e-10)
    assert pareto_shape(np.full(100, -3.0)) == -math.inf


def test_bad_arguments_are_refused():
    quad = torch.tensor(1.0)
    with pytest.raises(ValueError, match="n_samples must be at least 25; got 24"):
        importance_posterior(HalfCauchy(), 3, quad, 24)
    with pytest.raises(ValueError, match="n_obs must be at least 1; got 0"):
        importance_posterior(HalfCauchy(), 0, quad)
    with pytest.raises(ValueError, match="quad must be 0 or between"):
        importance_posterior(HalfCauchy(), 3, -quad)
    with pytest.raises(TypeError, match="a Mixture with a Delta has no density"):
        importance_posterior(Mixture([Delta(), HalfCauchy()]), 3, quad)
    with pytest.raises(ValueError, match="residuals are exactly zero"):
        importance_posterior(HalfCauchy(), 3, 0 * quad)
