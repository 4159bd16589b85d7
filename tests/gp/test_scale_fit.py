import copy
import math

import pytest
import torch

from stochproc.exceptions import DataWarning
from stochproc.gp import (
    GIG,
    BurrXII,
    Delta,
    Gamma,
    HalfCauchy,
    HalfNormal,
    HalfStudentT,
    InverseGamma,
    LogNormal,
    Mixture,
    ScalePrior,
    fit_scale,
    log_evidence,
)
from tests.gp import scale_reference
from tests.gp.scale_reference import UserInverseGamma

PRIORS = [Delta(3.0), InverseGamma(2.0, 0.1), BurrXII(2.0, 1.0), BurrXII(0.3, 2.0, 9.0), HalfCauchy(0.2)]
LIGHTER = [
    LogNormal(0.4, 2.5),
    Gamma(1.5, 0.5),
    HalfNormal(3.0),
    HalfStudentT(3.5, 0.1),
    GIG(-0.7, 1.2, 0.8),
    GIG(3.0, 2.0, 1e-3),
    Mixture([HalfNormal(3.0), GIG()], [1, 2], 0.3),
    Mixture([Delta(2.0), HalfCauchy()], [1, 30]),
]


class TwoScaledPeaks(ScalePrior):
    """s / t has log density 0.2 N(-4, 1/4) + 0.8 N(4, 1/4) in log s."""

    scale_name = "t"

    def __init__(self):
        super().__init__()
        self.t = 1.0

    def log_prob(self, s):
        u = s.log() - math.log(self.t)
        low, high = math.log(0.2) - 2 * (u + 4).square(), math.log(0.8) - 2 * (u - 4).square()
        return torch.logaddexp(low, high) + math.log(2) - 0.5 * math.log(2 * math.pi) - s.log()


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
@pytest.mark.parametrize(("n_obs", "quad"), [(1, 0.3), (7, 50.0), (500, 1e-8), (10_000, 1e9)])
def test_the_slope_of_the_evidence_vanishes_at_the_fitted_scale(prior, n_obs, quad):
    check_slope(prior, n_obs, quad)


def check_slope(prior, n_obs, quad):
    prior, quad = copy.deepcopy(prior), torch.tensor(quad)
    fit_scale(prior, n_obs, quad)
    (parameter,) = [p for p in prior.parameters() if p.requires_grad]
    log_evidence(prior, n_obs, quad).backward()
    # d/dlog t is (S E[1/s] - N)/2 times the power: terms of size N/2, rounded, with quadrature good to 1e-12.
    assert parameter.grad.item() == pytest.approx(0, abs=2e-12 * n_obs + 1e-10)


@pytest.mark.parametrize("prior", LIGHTER, ids=repr)
@pytest.mark.parametrize(("n_obs", "quad"), [(1, 0.3), (500, 1e-8)])
def test_the_slope_vanishes_for_lighter_priors_too(prior, n_obs, quad):
    check_slope(prior, n_obs, quad)


@pytest.mark.parametrize("prior", [*PRIORS, *LIGHTER], ids=repr)
def test_no_other_scale_is_better(prior):
    prior, quad = copy.deepcopy(prior), torch.tensor(50.0)
    fit_scale(prior, 3, quad)
    best = log_evidence(prior, 3, quad).item()
    for factor in torch.logspace(-4, 4, 41).tolist():
        other = copy.deepcopy(prior)
        other.rescale(factor)
        assert log_evidence(other, 3, quad).item() <= best + 1e-12


def test_closed_forms_and_the_search_agree():
    quad = torch.tensor(50.0)
    known, closed, searched = Delta(), InverseGamma(2.0, 0.1), UserInverseGamma(17.0)
    for prior in (known, closed, searched):
        fit_scale(prior, 7, quad)
    assert known.value.item() == pytest.approx(50 / 7, rel=1e-14)
    assert closed.b.item() == pytest.approx(2 * 50 / 7, rel=1e-14)
    assert searched.b == pytest.approx(2 * 50 / 7, rel=1e-11)


@pytest.mark.parametrize("prior", [*PRIORS, *LIGHTER, UserInverseGamma()], ids=repr)
def test_the_best_evidence_is_a_constant_less_half_n_log_s(prior):
    # The theorem that lets kernel, noise and mean be found once for all priors.
    constants = []
    for quad in (1e-3, 1.0, 1e5):
        mine = copy.deepcopy(prior)
        fit_scale(mine, 20, torch.tensor(quad))
        constants.append(log_evidence(mine, 20, torch.tensor(quad)).item() + 10 * math.log(quad))
    assert constants == pytest.approx([constants[0]] * 3, abs=1e-10)


@pytest.mark.parametrize("n_obs", [1, 5, 500])
def test_the_higher_of_two_peaks_is_found(n_obs):
    prior, quad = TwoScaledPeaks(), torch.tensor(float(n_obs))
    fit_scale(prior, n_obs, quad)
    best = log_evidence(prior, n_obs, quad).item()
    for log_t in torch.linspace(-12, 12, 97).tolist():
        prior.t = math.exp(log_t)
        assert log_evidence(prior, n_obs, quad).item() <= best + 1e-12


def test_zero_residuals_keep_the_scale_and_say_so():
    prior = InverseGamma(2.0, 3.0)
    with pytest.warns(DataWarning, match="all residuals are exactly zero, so the best scale is zero; b is kept"):
        fit_scale(prior, 4, torch.tensor(0.0))
    assert prior.b.item() == pytest.approx(3.0)


def test_a_prior_without_a_scale_is_refused():
    with pytest.raises(TypeError, match="LogNormal declares no scale parameter"):
        fit_scale(scale_reference.LogNormal(), 4, torch.tensor(1.0))


@pytest.mark.parametrize("prior", [HalfCauchy(1e150), HalfNormal(1e200), HalfStudentT(3.0, 1e155), HalfCauchy(1e-148)])
def test_a_prior_whose_mass_is_beyond_all_numbers_is_refused_by_name(prior):
    name = type(prior).__name__
    with pytest.raises(ValueError, match=rf"t of {name} must put the mass of s within 1e-290 and 1e290, .* mass at s"):
        fit_scale(prior, 30, torch.tensor(20.0))


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_a_prior_far_from_the_data_is_found(scale):
    near, far = HalfCauchy(1.0), HalfCauchy(scale)
    for prior in (near, far):
        fit_scale(prior, 30, torch.tensor(20.0))
    assert far.t.item() == pytest.approx(near.t.item(), rel=1e-9)
