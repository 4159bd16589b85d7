"""q(s): quantiles and their derivatives, moments, divergences; draws and nodes."""

import math

import mpmath as mp
import pytest
import torch
from scipy import integrate, special, stats

from stochproc.gp import BurrXII, Delta, HalfCauchy, InverseGamma
from stochproc.gp._svi_scale import (
    Coupled,
    InverseGammaFamily,
    LogNormalFamily,
    PointFamily,
    normal_nodes,
    scale_family,
)

FAMILIES = [InverseGammaFamily(3.0, 4.0), InverseGammaFamily(0.8, 1.0), LogNormalFamily(0.3, 0.5)]


def in_scipy(family):
    if isinstance(family, LogNormalFamily):
        return stats.lognorm(family.log_variance.exp().item() ** 0.5, scale=family.mean.exp().item())
    return stats.invgamma(family.log_a.exp().item(), scale=family.log_b.exp().item())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_quantiles_are_those_of_scipy(family):
    z = torch.tensor([-8.0, -3.0, -0.2, 0.0, 1.0, 3.0])
    want = torch.tensor(in_scipy(family).ppf(special.ndtr(z.numpy())))
    torch.testing.assert_close(family.log_quantile(z).exp(), want, rtol=1e-10, atol=0.0)


def test_a_gamma_quantile_that_underflows_keeps_its_logarithm():
    # P(X < x) = x^a / Gamma(a + 1) for small x; here x is about 1e-1100.
    family = InverseGammaFamily(0.004, 1.0)
    z = torch.tensor([4.0])
    want = -(special.log_ndtr(-4.0) + special.gammaln(1.004)) / 0.004
    assert family.log_quantile(z).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("a", [0.3, 2.0, 50.0, 5000.0])
@pytest.mark.parametrize("z", [-3.0, 0.1, 4.0])
def test_the_derivative_of_a_gamma_quantile_is_the_implicit_one(a, z):
    family = InverseGammaFamily(a, 1.0)
    log_s = family.log_quantile(torch.tensor([z]))
    (got,) = torch.autograd.grad(log_s.sum(), family.log_a)
    with mp.workdps(30):
        x, shape = mp.e ** mp.mpf(-log_s.item()), mp.mpf(math.exp(family.log_a.item()))
        by_shape = mp.diff(lambda s: mp.gammainc(s, x, regularized=True), shape)
        by_log_x = -(x**shape) * mp.e**-x / mp.gamma(shape)
        want = float(shape * by_shape / by_log_x)
    # The five-point formula errs by 1e-11, the shape is known to its rounding.
    assert got.item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_moments_are_those_of_scipy(family):
    law = in_scipy(family)
    assert family.inverse_moment(1.0).item() == pytest.approx(law.expect(lambda s: 1 / s), rel=1e-6)
    assert family.inverse_moment(0.5).item() == pytest.approx(law.expect(lambda s: s**-0.5), rel=1e-6)
    z, weight = normal_nodes(64, family.mean_log())
    assert family.mean_log().item() == pytest.approx((weight @ family.log_quantile(z)).item(), abs=1e-12)


def test_nodes_integrate_under_a_normal_law():
    z, weight = normal_nodes(21, torch.zeros(()))
    assert float(weight.sum()) == pytest.approx(1.0, abs=1e-15)
    assert float(weight @ z**2) == pytest.approx(1.0, abs=1e-6)
    z, weight = normal_nodes(64, torch.zeros(()))
    assert float(weight @ (0.7 * z).exp()) == pytest.approx(math.exp(0.245), rel=1e-13)


def test_the_divergence_of_inverse_gammas_is_the_closed_form_of_the_specification():
    ah, bh, a, b = 3.0, 4.0, 2.0, 5.0
    want = (ah - a) * special.psi(ah) - special.gammaln(ah) + special.gammaln(a)
    want += a * (math.log(bh) - math.log(b)) + ah * (b - bh) / bh
    assert InverseGammaFamily(ah, bh).kl(InverseGamma(a, b)).item() == pytest.approx(want, abs=1e-13)


@pytest.mark.parametrize("prior", [InverseGamma(2.0, 5.0), BurrXII(), HalfCauchy(2.0)], ids=repr)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_the_divergence_is_that_of_scipys_quadrature(family, prior):
    law = in_scipy(family)

    def excess(u):
        log_q = law.logpdf(math.exp(u))
        return math.exp(log_q + u) * (log_q - prior.log_prob(torch.tensor(math.exp(u))).item())

    # In log s; beyond these ends q has less than 1e-13 of its mass.
    want, _ = integrate.quad(excess, -5.0, 40.0, points=[0.0, 3.0, 8.0], limit=200, epsabs=1e-11)
    assert family.kl(prior).item() == pytest.approx(want, abs=1e-8)


@pytest.mark.parametrize("prior", [InverseGamma(2.0, 5.0), HalfCauchy(2.0)], ids=repr)
@pytest.mark.parametrize("family", [InverseGammaFamily(3.0, 4.0), LogNormalFamily(0.3, 0.5)], ids=["ig", "ln"])
def test_the_divergence_has_the_gradient_of_finite_differences(family, prior):
    parameters = [p for p in (*family.parameters(), *prior.parameters()) if p.requires_grad]
    grads = torch.autograd.grad(family.kl(prior), parameters)
    for parameter, grad in zip(parameters, grads, strict=True):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step)
                values.append(family.kl(prior).item())
                parameter.sub_(step)
        assert grad.item() == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-8)


def test_the_divergence_from_itself_is_zero():
    assert InverseGammaFamily(2.5, 3.5).kl(InverseGamma(2.5, 3.5)).item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("name", ["inverse_gamma", "lognormal"])
@pytest.mark.parametrize("prior", [InverseGamma(2.0, 60.0), HalfCauchy(3.0)], ids=repr)
def test_q_starts_at_the_median_of_the_prior(name, prior):
    family = scale_family(name, prior)
    median = float(prior.sample(100_001, generator=torch.Generator().manual_seed(1)).median())
    # The median of 4001 draws has a standard error of about 2 % of log s times its spread.
    assert family.log_quantile(torch.zeros(1)).item() == pytest.approx(math.log(median), abs=0.2)
    before = family.log_quantile(torch.tensor([-1.0, 2.0]))
    family.rescale(7.0)
    torch.testing.assert_close(family.log_quantile(torch.tensor([-1.0, 2.0])), before + math.log(7.0))


def test_a_known_scale_is_shared_with_its_prior():
    prior = Delta(3.0)
    family = scale_family("inverse_gamma", prior)
    assert isinstance(family, PointFamily)
    assert not list(family.parameters())
    assert family.log_quantile(torch.zeros(2)).exp().tolist() == pytest.approx([3.0, 3.0])
    assert family.inverse_moment(0.5).item() == pytest.approx(3.0**-0.5)
    assert family.kl(prior).item() == 0
    prior.rescale(2.0)
    assert family.mean_log().exp().item() == pytest.approx(6.0)
    assert Coupled(family, "scaled").nodes(21).spread.tolist() == pytest.approx([6.0**0.5])


def test_draws_fall_one_in_each_stratum_and_average_without_bias(gen):
    family = InverseGammaFamily(3.0, 4.0)
    coupled = Coupled(family, "scaled")
    law = in_scipy(family)
    means = []
    for _ in range(300):
        s = coupled.draws(10, gen).spread.detach().square()
        # Largest s last: the quantile function is increasing.
        assert (law.cdf(s.numpy()) * 10).astype(int).tolist() == list(range(10))
        means.append(float(s.log().mean()))
    means = torch.tensor(means)
    # 4 standard errors: fails by chance once in 16,000.
    assert abs(float(means.mean()) - family.mean_log().item()) < 4 * float(means.std()) / 300**0.5
    # Independent draws would spread by psi'(3)^(1/2) / sqrt(10) = 0.199.
    assert float(means.std()) < 0.07


def test_coupling_says_how_the_mean_follows_the_scale():
    family = InverseGammaFamily(3.0, 4.0)
    z, weight = torch.tensor([0.5]), torch.ones(1)
    scaled, fixed = (Coupled(family, c).at(z, weight) for c in ("scaled", "fixed"))
    assert torch.equal(scaled.location, scaled.spread)
    assert fixed.location.tolist() == [1.0]
    assert Coupled(family, "scaled").mean_square().item() == 1.0
    # E[1/s] = a/b.
    assert Coupled(family, "fixed").mean_square().item() == pytest.approx(0.75)
    assert Coupled(LogNormalFamily(0.3, 0.5), "fixed").mean_square().item() == pytest.approx(math.exp(-0.3 + 0.25))
