import math

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats

from stochproc import gp
from stochproc.exceptions import NumericalWarning
from stochproc.gp import (
    GIG,
    BurrXII,
    Delta,
    Gamma,
    HalfCauchy,
    HalfNormal,
    HalfStudentT,
    InverseGamma,
    Mixture,
    ScalePrior,
    log_evidence,
    scale_posterior,
)
from stochproc.gp._scale_quadrature import log_integral
from tests.gp.scale_reference import LIGHTER, PRIORS, LogNormal, TwoPeaks, UserInverseGamma, log_evidence_mp

EPS = torch.finfo(torch.float64).eps
DATA = [(1, 0.7), (3, 2.0), (500, 431.0), (3, 1e6), (3, 1e-300), (500, 1e300)]


def posterior(prior, n_obs, quad):
    return scale_posterior(prior, n_obs, torch.tensor(quad))


def close_to(value, n_obs, quad):
    """1e-10, or a few roundings of the numbers that make up an extreme log p(y)."""
    size = abs(value) + n_obs * abs(math.log(quad)) + 8 * math.log(quad / n_obs) ** 2
    return pytest.approx(value, abs=max(1e-10, 4 * EPS * size), rel=0)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize(("n_obs", "quad"), DATA)
def test_the_evidence_is_the_integral_to_ten_digits(name, n_obs, quad):
    make, density = PRIORS[name]
    exact = float(log_evidence_mp(density, n_obs, quad))
    assert log_evidence(make(), n_obs, torch.tensor(quad)).item() == close_to(exact, n_obs, quad)


@pytest.mark.parametrize("name", LIGHTER)
@pytest.mark.parametrize(("n_obs", "quad"), [(1, 0.7), (500, 431.0), (3, 1e4)])
def test_the_evidence_of_lighter_priors_is_the_integral_to_ten_digits(name, n_obs, quad):
    make, density = LIGHTER[name]
    exact = float(log_evidence_mp(density, n_obs, quad))
    assert log_evidence(make(), n_obs, torch.tensor(quad)).item() == close_to(exact, n_obs, quad)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("quad", [1e-300, 1e300])
def test_the_evidence_of_one_observation_is_right_up_to_the_ends_of_the_range(name, quad):
    # The integrand of the half-Cauchy prior is flat over 690 units of log s here.
    make, density = PRIORS[name]
    if name == "user_inverse_gamma" and quad == 1e300:
        with pytest.raises(ValueError, match="reaches beyond the floating-point range"):
            log_evidence(make(), 1, torch.tensor(quad))
        return
    exact = float(log_evidence_mp(density, 1, quad))
    assert log_evidence(make(), 1, torch.tensor(quad)).item() == close_to(exact, 1, quad)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize(("n_obs", "quad"), [(1, 0.7), (3, 2.0), (500, 431.0)])
def test_the_predictive_density_is_a_ratio_of_integrals_to_ten_digits(name, n_obs, quad):
    make, density = PRIORS[name]
    squares = [2.0, 1e5]
    mine = posterior(make(), n_obs, quad).log_density(torch.tensor(squares), 2)
    with mp.workdps(30):
        base = log_evidence_mp(density, n_obs, quad)
        exact = [float(log_evidence_mp(density, n_obs + 2, mp.mpf(quad) + x) - base) for x in squares]
    # The last one lies far outside what the data allow: its integral has nodes of its own.
    torch.testing.assert_close(mine, torch.tensor(exact), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LIGHTER)
@pytest.mark.parametrize(("n_obs", "quad"), [(1, 0.7), (500, 431.0)])
def test_the_predictive_density_of_lighter_priors_is_a_ratio_of_integrals_to_ten_digits(name, n_obs, quad):
    make, density = LIGHTER[name]
    squares = [2.0, 1e3]
    mine = posterior(make(), n_obs, quad).log_density(torch.tensor(squares), 2)
    with mp.workdps(30):
        base = log_evidence_mp(density, n_obs, quad)
        exact = [float(log_evidence_mp(density, n_obs + 2, mp.mpf(quad) + x) - base) for x in squares]
    torch.testing.assert_close(mine, torch.tensor(exact), rtol=0, atol=1e-10)


def test_the_point_mass_gives_the_gaussian():
    quad = torch.tensor(3.0)
    exact = -7 / 2 * math.log(2 * math.pi * 0.4) - 3 / 0.8
    assert log_evidence(Delta(0.4), 7, quad).item() == pytest.approx(exact, rel=4 * EPS)
    scale = scale_posterior(Delta(0.4), 7, quad)
    q = torch.tensor([1e-12, 0.3, 0.9])
    torch.testing.assert_close(
        scale.quantile(q), torch.as_tensor(stats.norm.ppf(q.numpy(), scale=0.4**0.5)), rtol=1e-13, atol=0
    )
    assert scale.df == math.inf


@pytest.mark.parametrize(("n_obs", "quad"), DATA)
def test_inverse_gamma_by_quadrature_is_its_closed_form_to_eleven_digits(n_obs, quad):
    closed, mine = (log_evidence(p, n_obs, torch.tensor(quad)).item() for p in (InverseGamma(), UserInverseGamma()))
    assert mine == pytest.approx(closed, abs=max(1e-11, 4 * EPS * abs(closed)))


def test_many_evidences_at_once_are_those_one_by_one():
    quad = torch.tensor([[0.1, 3.0], [100.0, 1e9]])
    for prior in (Delta(), InverseGamma(), HalfCauchy(), TwoPeaks()):
        one_by_one = torch.stack([log_evidence(prior, 4, q) for q in quad.reshape(-1)]).reshape(2, 2)
        # 1e-12 is where the levels of the rule stop.
        torch.testing.assert_close(log_evidence(prior, 4, quad), one_by_one, rtol=1e-13, atol=2e-12)


@pytest.mark.parametrize(
    "prior",
    [
        Delta(0.7),
        InverseGamma(3.0, 0.5),
        InverseGamma(40.0),
        BurrXII(0.5, 2.0),
        HalfCauchy(),
        gp.LogNormal(0.4, 2.5),
        Gamma(1.5, 0.5),
        Gamma(40.0, 30.0),
        HalfNormal(1.3),
        HalfStudentT(3.5, 0.1),
        GIG(-0.7, 1.2, 0.8),
        GIG(30.0, 2.0, 0.8),
        Mixture([GIG(-0.7), HalfCauchy(), Delta()], [1, 2, 3], 0.5),
    ],
    ids=repr,
)
def test_gradients_of_the_evidence_are_those_of_differences(prior):
    for parameter in prior.parameters():
        parameter.requires_grad_()
    parameters = tuple(prior.parameters())
    quad = torch.tensor(5.0, requires_grad=True)

    def evidence(quad, *values):
        named = dict(zip([n for n, _ in prior.named_parameters()], values, strict=True))
        return torch.func.functional_call(Evidence(prior), {f"prior.{n}": v for n, v in named.items()}, (quad,))

    class Evidence(torch.nn.Module):
        def __init__(self, prior):
            super().__init__()
            self.prior = prior

        def forward(self, quad):
            return log_evidence(self.prior, 6, quad)

    assert torch.autograd.gradcheck(evidence, (quad, *parameters))


@pytest.mark.parametrize("name", [*PRIORS, *LIGHTER])
def test_the_slope_of_the_evidence_is_the_mean_of_one_over_s(name):
    prior = (PRIORS | LIGHTER)[name][0]()
    quad = torch.tensor(2.0, requires_grad=True)
    log_evidence(prior, 3, quad).backward()
    assert scale_posterior(prior, 3, quad).inverse_mean == pytest.approx(-2 * quad.grad.item(), rel=1e-11)


@pytest.mark.parametrize("name", PRIORS)
def test_moments_of_the_posterior_are_those_of_its_nodes(name):
    scale = posterior(PRIORS[name][0](), 7, 5.0)
    if scale.df is not None:
        assert scale.mean == pytest.approx((2 + 5.0 / 2) / (2 + 7 / 2 - 1), rel=1e-14)
        return
    assert scale.log_weights.logsumexp(0).item() == pytest.approx(0, abs=1e-13)
    assert scale.mean == pytest.approx((scale.log_weights + scale.log_s).exp().sum().item(), rel=1e-10)


@pytest.mark.parametrize(
    ("prior", "n_obs", "exists"),
    [
        (InverseGamma(0.5), 1, False),
        (InverseGamma(0.5), 2, True),
        (HalfCauchy(), 1, False),
        (HalfCauchy(), 2, True),
        (BurrXII(0.3, 1.0), 1, False),
        (BurrXII(0.3, 2.0), 1, True),
        (LogNormal(), 1, True),
        (Delta(), 1, True),
    ],
)
def test_the_mean_of_s_exists_if_tail_index_plus_half_the_data_exceed_one(prior, n_obs, exists):
    scale = posterior(prior, n_obs, 1.0)
    assert math.isfinite(scale.mean) == exists
    assert bool(scale.missing_variance) == (not exists)


@pytest.mark.parametrize("name", [*PRIORS, *LIGHTER])
@pytest.mark.parametrize("n_obs", [1, 500])
def test_quantiles_invert_the_distribution_function(name, n_obs):
    scale = posterior((PRIORS | LIGHTER)[name][0](), n_obs, 0.9 * n_obs)
    q = torch.tensor([1e-8, 1e-3, 0.2, 0.5 - 1e-9, 0.5, 0.7, 0.975, 1 - 1e-8])
    torch.testing.assert_close(scale.cdf(scale.quantile(q)), q, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["inverse_gamma", "half_cauchy", "two_peaks"])
def test_quantiles_are_odd_about_one_half_and_grow_with_q(name):
    scale = posterior(PRIORS[name][0](), 3, 2.0)
    q = torch.cat([torch.logspace(-15, -1, 60), torch.linspace(0.11, 0.5, 60)])
    z = scale.quantile(q)
    assert bool((z.diff() > 0).all())
    assert z[-1] == 0
    # 1 - q is exact where q is a multiple of 1/8.
    assert torch.equal(scale.quantile(torch.tensor([0.125])), -scale.quantile(torch.tensor([0.875])))


def test_student_t_quantiles_are_those_of_scipy_and_of_the_quadrature():
    q = torch.tensor([1e-300, 1e-15, 1e-8, 0.05, 0.4, 0.5 - 1e-12, 0.9])
    closed, mixture = posterior(InverseGamma(), 3, 2.0), posterior(UserInverseGamma(), 3, 2.0)
    exact = stats.t.ppf(q[1:].numpy(), 7, scale=(3 / 3.5) ** 0.5)
    torch.testing.assert_close(closed.quantile(q[1:]), torch.as_tensor(exact), rtol=1e-12, atol=0)
    # 1e-6: near 1/2 the probability's own rounding, 1e-16 of 1e-12, is a relative 1e-4 of z at most.
    torch.testing.assert_close(mixture.quantile(q[:5]), closed.quantile(q[:5]), rtol=1e-11, atol=0)
    torch.testing.assert_close(mixture.quantile(q[5:]), closed.quantile(q[5:]), rtol=1e-11, atol=1e-15)


def test_cdf_and_density_of_student_t_are_those_of_scipy():
    scale = posterior(InverseGamma(), 3, 2.0)
    law = stats.t(7, scale=(3 / 3.5) ** 0.5)
    z = torch.linspace(-30, 30, 31)
    torch.testing.assert_close(scale.cdf(z), torch.as_tensor(law.cdf(z.numpy())), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        scale.log_density(z.square(), 1), torch.as_tensor(law.logpdf(z.numpy())), rtol=1e-13, atol=1e-14
    )
    torch.testing.assert_close(posterior(UserInverseGamma(), 3, 2.0).cdf(z), scale.cdf(z), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dim", [1, 4])
def test_the_joint_density_is_the_multivariate_student_t(dim, gen):
    scale = posterior(InverseGamma(), 3, 2.0)
    y = torch.randn(6, dim, generator=gen)
    exact = stats.multivariate_t(np.zeros(dim), 3 / 3.5 * np.eye(dim), df=7).logpdf(y.numpy())
    mine = scale.log_density(y.square().sum(1), dim)
    torch.testing.assert_close(mine, torch.as_tensor(exact), rtol=1e-13, atol=1e-13)


def test_student_t_tends_to_the_gaussian():
    # The relative distance is O(N/a): 500^2 / 1e12 nats.
    sharp, quad = InverseGamma(1e12, 1e12), torch.tensor(431.0)
    assert log_evidence(sharp, 500, quad).item() == pytest.approx(log_evidence(Delta(), 500, quad).item(), abs=1e-6)
    q = torch.tensor([1e-6, 0.3])
    torch.testing.assert_close(
        scale_posterior(sharp, 5, quad).quantile(q), scale_posterior(Delta(), 5, quad).quantile(q), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("a", [15.0, 25.0, 1e8])
def test_the_evidence_of_a_sharp_inverse_gamma_keeps_its_digits(a):
    prior = InverseGamma(a, a)
    with mp.workdps(40):
        shape, rate, half, quad = (mp.mpf(v) for v in (prior.a.item(), prior.b.item(), 250, 431))
        exact = mp.loggamma(shape + half) - mp.loggamma(shape) + shape * mp.log(rate) - half * mp.log(2 * mp.pi)
        exact -= (shape + half) * mp.log(rate + quad / 2)
    mine = log_evidence(prior, 500, torch.tensor(431.0)).item()
    # log(a) and log(b) are stored with relative error eps: 250 log(a) eps.
    assert mine == pytest.approx(float(exact), abs=1e-11)


def test_no_data_give_back_the_prior():
    for prior in (InverseGamma(), HalfCauchy(), LogNormal()):
        assert log_evidence(prior, 0, torch.tensor(0.0)).item() == pytest.approx(0, abs=1e-12)
    assert posterior(LogNormal(), 0, 0.0).mean == pytest.approx(math.exp(0.5), rel=1e-12)
    assert not posterior(HalfCauchy(), 0, 0.0).has_location
    assert not posterior(InverseGamma(0.5), 0, 0.0).has_location


def test_zero_residuals_are_explained_where_the_prior_allows_it():
    zero = torch.tensor(0.0, requires_grad=True)
    exact = math.lgamma(4) - math.lgamma(2) + 2 * math.log(2) - 4 * math.log(2) - 2 * math.log(2 * math.pi)
    for prior in (InverseGamma(), UserInverseGamma()):
        value = log_evidence(prior, 4, zero)
        assert value.item() == pytest.approx(exact, rel=1e-13)
        assert torch.autograd.grad(value, zero)[0].item() == pytest.approx(-1.0, rel=1e-12)
    with pytest.raises(ValueError, match="residuals are exactly zero"):
        log_evidence(HalfCauchy(), 4, zero)


@pytest.mark.parametrize("quad", [-1.0, math.nan, math.inf, 1e-305])
def test_a_square_sum_out_of_range_is_refused(quad):
    with pytest.raises(ValueError, match="quad must be 0 or between"):
        log_evidence(InverseGamma(), 4, torch.tensor(quad))


@pytest.mark.bad_input
def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="n_obs must be at least 0; got -1"):
        log_evidence(InverseGamma(), -1, torch.tensor(1.0))
    with pytest.raises(ValueError, match="0-dim"):
        scale_posterior(InverseGamma(), 1, torch.ones(2))


@pytest.mark.parametrize("q", [0.0, 1.0, -0.1, math.nan])
def test_a_probability_outside_the_open_interval_is_refused(q):
    with pytest.raises(ValueError, match="q must lie strictly between 0 and 1"):
        posterior(InverseGamma(), 3, 2.0).quantile(torch.tensor([0.5, q]))


class Uniform(ScalePrior):
    """Uniform on [1, 1.2]: narrower in log s than the first grid, with jumps that no trapezoid rule resolves."""

    def log_prob(self, s):
        return torch.where((s >= 1) & (s <= 1.2), math.log(5), -math.inf)


def test_a_rule_that_has_not_converged_says_by_how_much():
    with pytest.warns(NumericalWarning, match="has not converged with 8193 nodes: two levels differ by"):
        value = log_integral(Uniform(), 0.0, torch.tensor(0.0))
    # First order in a jump: the range over 8192, relative.
    assert value.item() == pytest.approx(0, abs=2 / 8192)


def test_a_narrow_prior_with_a_lot_of_data_is_found():
    class Narrow(ScalePrior):
        def log_prob(self, s):
            return -0.5 * ((s.log() - 1.23) / 1e-3).square() - s.log() - math.log(1e-3) - 0.5 * math.log(2 * math.pi)

    scale = posterior(Narrow(), 10, 10.0)
    # The likelihood moves a log scale of variance 1e-6 by 1e-6 times its slope, about 4.
    assert scale.mean == pytest.approx(math.exp(1.23), rel=1e-5)


@pytest.mark.parametrize("n_obs", [10**6, 10**9])
def test_very_many_observations_give_the_laplace_limit(n_obs):
    quad = 1.7 * n_obs
    scale = posterior(LogNormal(), n_obs, quad)
    # Mean of s: S/N plus O(1/N).
    assert scale.mean == pytest.approx(1.7, rel=4 / n_obs)


@pytest.mark.parametrize(
    "name", ["inverse_gamma", "half_cauchy", "burr_xii", "log_normal", "two_peaks", "gamma", "gig", "mixture"]
)
@pytest.mark.parametrize("n_obs", [1, 50])
def test_samples_of_the_scale_follow_its_posterior(name, n_obs, gen):
    scale = posterior((PRIORS | LIGHTER)[name][0](), n_obs, 0.9 * n_obs)
    s = scale.sample(20_000, generator=gen)
    z = torch.randn(20_000, generator=gen) * s.sqrt()
    # Through the predictive law, whose distribution function is checked above. One seed in a hundred would fail.
    assert stats.kstest(z.numpy(), lambda x: scale.cdf(torch.as_tensor(x)).numpy()).pvalue > 0.01


def test_joint_draws_share_one_scale(gen):
    # Given s the two are independent normal, so E[y1² y2²] = E[s²] and E[y1⁴] = 3 E[s²].
    scale = posterior(InverseGamma(), 8, 8.0)
    a, b, n = scale.a, scale.b, 200_000
    first, second = b / (a - 1), b**2 / ((a - 1) * (a - 2))
    theory = (second - first**2) / (3 * second - first**2)
    root = torch.linalg.cholesky(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    y = scale.sample_joint(torch.zeros(2), root, n, generator=gen)
    squares = (y.square() / torch.tensor([1.0, 4.0])).T
    found = torch.corrcoef(squares)[0, 1].item()
    # Standard error of the correlation from 100 batches of 2000 draws; four of them.
    batches = torch.stack([torch.corrcoef(part)[0, 1] for part in squares.split(2000, dim=1)])
    assert found == pytest.approx(theory, abs=4 * batches.std().item() / 10)
    assert stats.kstest(y[:, 1].numpy() / 2, lambda x: scale.cdf(torch.as_tensor(x)).numpy()).pvalue > 0.01


def test_joint_draws_have_the_covariance_of_the_factor(gen):
    scale = posterior(HalfCauchy(), 9, 8.0)
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    loc = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    y = scale.sample_joint(loc, root, 100_000, generator=gen)
    assert y.shape == (100_000, 2, 2)
    moments = (y - loc)[:, 0, 0] * (y - loc)[:, 1, 0]
    error = moments.std().item() / 100_000**0.5
    assert moments.mean().item() == pytest.approx(0.8 * scale.mean, abs=4 * error)
    across = (y - loc)[:, 0, 0] * (y - loc)[:, 0, 1]
    assert across.mean().item() == pytest.approx(0, abs=4 * across.std().item() / 100_000**0.5)


def test_a_wide_prior_without_data_is_resolved_finely_enough_for_gaussians():
    # log s has standard deviation 100: its own integral needs nodes 30 apart. P(|z| < 1) is P(log s < 0) smoothed.
    scale = posterior(gp.LogNormal(0.0, 1e4), 0, 0.0)
    log_s = torch.linspace(-900.0, 900.0, 90_001)
    weights = (-log_s.square() / 2e4).exp()
    exact = (weights * torch.special.ndtr((-log_s / 2).exp())).sum() / weights.sum()
    assert scale.cdf(torch.ones(1)).item() == pytest.approx(exact.item(), abs=1e-12)


def test_the_posterior_does_not_change_with_the_prior_it_came_from():
    prior = HalfCauchy()
    scale = posterior(prior, 3, 2.0)
    before = scale.mean
    prior.t = 100.0
    assert scale.mean == before
