import copy
import math
import pickle

import pytest
import torch
from scipy import special

from stochproc.gp import (
    GIG,
    Delta,
    HalfCauchy,
    InverseGamma,
    LogNormal,
    Mixture,
    ScalePrior,
    fit_scale,
    log_evidence,
    scale_posterior,
    scale_prior_from_config,
)
from stochproc.gp._scale_quadrature import log_integral

EPS = torch.finfo(torch.float64).eps
PARTS = [InverseGamma(1.5, 0.7), HalfCauchy(1.3), GIG(-0.7, 1.2, 0.8), LogNormal(0.4, 2.5)]


class Density(ScalePrior):
    """The density of another prior alone, so that it goes through the quadrature."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def log_prob(self, s):
        return self.own.log_prob(s)


@pytest.mark.parametrize(("n_obs", "quad"), [(1, 0.7), (50, 61.0)])
def test_the_sum_over_components_is_the_quadrature_of_their_sum(n_obs, quad):
    prior = Mixture(PARTS, [4, 3, 2, 1], 1.5)
    whole, parts = (scale_posterior(p, n_obs, torch.tensor(quad)) for p in (Density(prior), prior))
    exact, mine = (log_evidence(p, n_obs, torch.tensor(quad)).item() for p in (Density(prior), prior))
    # 1e-12 is where the rule stops; more in moments and tails of which it is a ratio.
    assert mine == pytest.approx(exact, abs=1e-11)
    assert parts.inverse_mean == pytest.approx(whole.inverse_mean, rel=1e-10)
    q = torch.tensor([1e-12, 1e-3, 0.4])
    torch.testing.assert_close(parts.quantile(q), whole.quantile(q), rtol=1e-10, atol=0)
    squares = torch.tensor([0.1, 9.0])
    torch.testing.assert_close(parts.log_density(squares, 2), whole.log_density(squares, 2), rtol=0, atol=1e-11)
    z = torch.tensor([-2.0, 0.3])
    torch.testing.assert_close(parts.cdf(z), whole.cdf(z), rtol=1e-11, atol=0)
    assert parts.has_location == whole.has_location
    assert parts.missing_variance == whole.missing_variance


def test_one_component_is_that_component():
    for part in [*PARTS, Delta(2.0)]:
        mine, known = (scale_posterior(p, 5, torch.tensor(4.0)) for p in (Mixture([part]), part))
        q = torch.tensor([1e-10, 0.2])
        torch.testing.assert_close(mine.quantile(q), known.quantile(q), rtol=1e-11, atol=0)
        assert mine.mean == pytest.approx(known.mean, rel=1e-13)


def test_two_point_masses_give_two_gaussians():
    prior, quad = Mixture([Delta(1.0), Delta(9.0)], [1, 3]), torch.tensor(6.0)
    log_p = [-5 / 2 * math.log(2 * math.pi * s) - 6 / (2 * s) for s in (1, 9)]
    terms = [math.log(0.25) + log_p[0], math.log(0.75) + log_p[1]]
    total = math.log(sum(math.exp(t) for t in terms))
    assert log_evidence(prior, 5, quad).item() == pytest.approx(total, rel=8 * EPS)
    scale = scale_posterior(prior, 5, quad)
    share = math.exp(terms[0] - total)
    assert scale.mean == pytest.approx(share + 9 * (1 - share), rel=1e-14)
    assert scale.inverse_mean == pytest.approx(share + (1 - share) / 9, rel=1e-14)

    def cdf(z):
        return torch.as_tensor(share * special.ndtr(z.numpy()) + (1 - share) * special.ndtr(z.numpy() / 3))

    z = torch.tensor([-7.0, 0.5])
    torch.testing.assert_close(scale.cdf(z), cdf(z), rtol=0, atol=1e-15)
    q = torch.tensor([1e-200, 0.01, 0.7])
    torch.testing.assert_close(cdf(scale.quantile(q)), q, rtol=1e-10, atol=0)


def test_draws_have_the_shares_of_the_components(gen):
    prior = Mixture([Delta(1.0), Delta(9.0)], [1, 3], 2.0)
    s = prior.sample(10_000, generator=gen)
    assert set(s.tolist()) <= {prior.scale.item() * d.value.item() for d in prior.components}
    # Four standard errors of a share.
    assert (s < 3).double().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 10_000) ** 0.5)
    scale = scale_posterior(prior, 2, torch.tensor(8.0))
    drawn = scale.sample(10_000, generator=gen)
    share = scale.log_weights[0].exp().item()
    assert (drawn < 3).double().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / 10_000) ** 0.5)


@pytest.mark.parametrize("n_obs", [3, 2000])
def test_the_best_scale_is_found_at_a_point_mass_or_beside_it(n_obs):
    prior, quad = Mixture([LogNormal(0.0, 9.0), Delta(3.3)], [20, 1]), torch.tensor(float(n_obs))
    fit_scale(prior, n_obs, quad)
    best = log_evidence(prior, n_obs, quad).item()
    for log_c in torch.linspace(-4, 4, 81).tolist():
        other = copy.deepcopy(prior)
        other.scale = math.exp(log_c)
        assert log_evidence(other, n_obs, quad).item() <= best + 1e-12
    if n_obs == 2000:
        # The spike explains these data best: scale times 3.3 is S/N, up to the slope of what surrounds it.
        assert prior.scale.item() == pytest.approx(1 / 3.3, rel=1e-2)


def test_a_point_mass_leaves_no_density():
    for prior in (Mixture([Delta(), HalfCauchy()]), Mixture([Mixture([Delta(2.0)]), HalfCauchy()])):
        with pytest.raises(TypeError, match="a Mixture with a Delta has no density"):
            prior.log_prob(torch.ones(1))
        with pytest.raises(TypeError, match="a Mixture with a Delta has no density"):
            log_integral(prior, 1.0, torch.tensor(1.0))


def test_components_are_copies_whose_numbers_are_kept():
    part = HalfCauchy(1.3)
    prior = Mixture([part, part])
    part.t = 100.0
    assert [p.t.item() for p in prior.components] == pytest.approx([1.3, 1.3])
    assert part.log_t.requires_grad
    assert [n for n, p in prior.named_parameters() if p.requires_grad] == ["log_scale"]


def test_copies_pickles_and_configs_are_the_same_mixture():
    inner = Mixture([Delta(2.0), GIG(0.3, 2.0, 7.0)], [1, 2], 0.5)
    prior = Mixture([inner, HalfCauchy(1.3)], [3, 7], 1.5)
    for twin in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior)), scale_prior_from_config(prior.config())):
        assert repr(twin) == repr(prior)
        assert [n for n, p in twin.named_parameters() if p.requires_grad] == ["log_scale"]
        quad = torch.tensor(3.0)
        # The numbers go through exp and log once.
        assert log_evidence(twin, 4, quad).item() == pytest.approx(log_evidence(prior, 4, quad).item(), rel=20 * EPS)


def test_a_mixture_with_a_prior_of_the_user_cannot_be_saved():
    with pytest.raises(TypeError, match="Density is not a prior of this library"):
        Mixture([Density(HalfCauchy()), Delta()]).config()
    with pytest.raises(ValueError, match="config must have a class among"):
        scale_prior_from_config({"class": "Mixture", "components": [{"class": "Density"}]})
    with pytest.raises(ValueError, match="at least one prior"):
        scale_prior_from_config({"class": "Mixture"})


def test_repr_is_one_line():
    prior = Mixture([Delta(), HalfCauchy()], [1, 3], 2.0)
    assert repr(prior) == "Mixture([Delta(value=1), HalfCauchy(t=1)], weights=[0.25, 0.75], scale=2)"
