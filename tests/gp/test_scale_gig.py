import math

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats

from stochproc.gp import GIG, Gamma, InverseGamma, ScalePrior, log_evidence, scale_posterior
from tests.gp.scale_reference import UserInverseGamma

EPS = torch.finfo(torch.float64).eps


class UserGIG(ScalePrior):
    """The density of a GIG alone, so that it goes through the quadrature."""

    def __init__(self, *numbers):
        super().__init__()
        self.own = GIG(*numbers)

    def log_prob(self, s):
        return self.own.log_prob(s)


def posterior(prior, n_obs, quad):
    return scale_posterior(prior, n_obs, torch.tensor(quad))


@pytest.mark.parametrize("numbers", [(-0.5, 1.0, 1.0), (0.0, 1e-3, 5.0), (7.0, 0.3, 1e-4), (-40.0, 1e-4, 80.0)])
@pytest.mark.parametrize(("n_obs", "quad"), [(1, 0.7), (50, 61.0), (500, 1e-8), (100_000, 3e5)])
def test_the_closed_form_is_the_quadrature(numbers, n_obs, quad):
    closed, mine = (log_evidence(p, n_obs, torch.tensor(quad)).item() for p in (GIG(*numbers), UserGIG(*numbers)))
    # Where the two agree to 1e-12 but for the rounding of N/2 log s at the nodes.
    assert mine == pytest.approx(closed, abs=1e-11 + 4 * EPS * n_obs * (1 + abs(math.log(quad / n_obs))))


@pytest.mark.parametrize(
    ("p", "a", "b", "n_obs", "quad"),
    [
        (-1e6, 2.0, 2e6, 3, 4.0),
        (1e6, 2e6, 2.0, 3, 4.0),
        (-3.0, 1e-80, 2.0, 1000, 800.0),
        (2.0, 1.0, 1e-80, 7, 1e-60),
        (0.3, 1e8, 1e8, 100, 90.0),
        (400.0, 2.0, 2.0, 3000, 4.0),
        (1e4, 2.0, 1e4, 5, 2e4),
    ],
)
def test_the_evidence_keeps_its_digits_for_extreme_numbers(p, a, b, n_obs, quad):
    prior = GIG(p, a, b)
    with mp.workdps(60):
        order, omega, scale, half = (
            mp.mpf(p),
            mp.exp(mp.mpf(prior.log_omega.item())),
            mp.exp(mp.mpf(prior.log_scale.item())),
            mp.mpf(n_obs) / 2,
        )
        growth = mp.log1p(mp.mpf(quad) / (omega * scale)) / 2

        def log_k(nu, x):
            # By its integral, scaled at the saddle point.
            nu = abs(nu)
            top, width = mp.asinh(nu / x), 1 / mp.sqrt(mp.hypot(nu, x))
            level = nu * top - mp.hypot(nu, x)
            ends = [top + k * width for k in range(-40, 41, 4) if top + k * width > 0]
            ends = [mp.mpf(0), *ends] if top < 40 * width else ends
            f = lambda t: mp.exp(-x * mp.cosh(t) - level) * mp.cosh(nu * t)  # noqa: E731
            return mp.log(mp.quad(f, [*ends, ends[-1] + 40 * width])) + level

        with mp.workdps(30):
            exact = log_k(order - half, omega * mp.exp(growth)) - log_k(order, omega)
        exact += (order - half) * growth - half * (mp.log(2 * mp.pi) + mp.log(scale))
    mine = log_evidence(prior, n_obs, torch.tensor(quad)).item()
    assert mine == pytest.approx(float(exact), abs=1e-10)


@pytest.mark.parametrize(("n_obs", "quad"), [(1, 0.7), (500, 431.0)])
def test_the_limits_are_inverse_gamma_and_gamma(n_obs, quad):
    q, squares = torch.tensor([1e-3, 0.2]), torch.tensor([0.5, 30.0])
    for limit, prior in (
        (InverseGamma(2.5, 3.0), GIG(-2.5, 1e-14, 6.0)),
        (Gamma(2.5, 3.0), GIG(2.5, 6.0, 1e-14)),
    ):
        # The distance is of first order in what was sent to zero, 1e-14 times E[s] or E[1/s].
        exact = log_evidence(limit, n_obs, torch.tensor(quad)).item()
        assert log_evidence(prior, n_obs, torch.tensor(quad)).item() == pytest.approx(exact, abs=1e-11)
        known, mine = posterior(limit, n_obs, quad), posterior(prior, n_obs, quad)
        torch.testing.assert_close(mine.quantile(q), known.quantile(q), rtol=1e-11, atol=0)
        torch.testing.assert_close(mine.log_density(squares, 3), known.log_density(squares, 3), rtol=0, atol=1e-11)
        assert mine.mean == pytest.approx(known.mean, rel=1e-10)


def test_the_posterior_is_the_law_of_its_own_class():
    scale = posterior(GIG(0.7, 1.2, 0.8), 7, 5.0)
    law = GIG(0.7 - 3.5, 1.2, 0.8 + 5.0)
    s = torch.logspace(-2, 2, 9)
    torch.testing.assert_close(scale.law.log_prob(s), law.log_prob(s), rtol=1e-13, atol=1e-13)
    assert scale.mean == pytest.approx(law.mean, rel=1e-13)
    weights = scale.log_weights.exp()
    assert scale.mean == pytest.approx((weights * scale.log_s.exp()).sum().item(), rel=1e-12)
    assert scale.inverse_mean == pytest.approx((weights * (-scale.log_s).exp()).sum().item(), rel=1e-12)


def test_the_predictive_law_is_scipys_generalised_hyperbolic():
    p, a, b = -0.7, 1.2, 0.8
    scale = posterior(GIG(p, a, b), 0, 0.0)
    law = stats.genhyperbolic(p, (a * b) ** 0.5, 0.0, scale=b**0.5)
    z = torch.linspace(-6.0, 6.0, 13)
    torch.testing.assert_close(
        scale.log_density(z.square(), 1), torch.as_tensor(law.logpdf(z.numpy())), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(scale.cdf(z[:4]), torch.as_tensor(law.cdf(z[:4].numpy())), rtol=1e-7, atol=1e-10)


def test_far_tails_fall_off_as_an_exponential():
    # P(z > x) ~ exp(-sqrt(a) x) x^p': the slope of log q against the quantile tends to sqrt(a).
    scale = posterior(GIG(0.5, 4.0, 1.0), 1, 1.0)
    q = torch.tensor([1e-200, 1e-100])
    near, far = scale.quantile(q).abs().flip(0).tolist()
    # (p' = 0 - 1)/x of the power is 1e-2.
    assert 100 * math.log(10) / (far - near) == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize(("p", "omega"), [(-5e4, 1e3), (-3.0, 1e-6), (0.3, 1e6), (7.0, 1.0), (2.0, 1e-50)])
def test_samples_follow_the_law_for_extreme_numbers(p, omega):
    prior = GIG(p, omega, omega)
    u = prior.sample(4000, generator=torch.Generator().manual_seed(1)).log().numpy()
    scale = posterior(prior, 0, 0.0)
    weights = scale.log_weights.exp().numpy()
    cdf = np.cumsum(weights) - weights / 2
    # Linear between some hundred nodes. One seed in a hundred would fail.
    assert stats.kstest(u, lambda v: np.interp(v, scale.log_s.numpy(), cdf)).pvalue > 0.01


@pytest.mark.parametrize("quad", [1e20, 1e100, 1e300])
def test_residuals_far_beyond_the_prior_give_the_saddle_point(quad):
    # s = sqrt(S/a) up to S^(-1/4) relative.
    scale = posterior(GIG(-0.5, 1.0, 1.0), 3, quad)
    assert scale.mean == pytest.approx(quad**0.5, rel=1e-5)
    z = scale.quantile(torch.tensor([0.9])).item()
    assert z == pytest.approx(stats.norm.ppf(0.9) * quad**0.25, rel=1e-5)


def test_the_numbers_are_those_given():
    prior = GIG(p=1.3, a=0.5, b=2.0)
    assert [prior.a.item(), prior.b.item()] == pytest.approx([0.5, 2.0], rel=8 * EPS)
    assert repr(prior) == "GIG(p=1.3, a=0.5, b=2)"
    assert [prior.omega.item(), prior.scale.item()] == pytest.approx([1.0, 2.0], rel=8 * EPS)


def test_zero_residuals_are_explained():
    mine = log_evidence(GIG(-2.0, 1e-14, 4.0), 4, torch.tensor(0.0)).item()
    assert mine == pytest.approx(log_evidence(UserInverseGamma(), 4, torch.tensor(0.0)).item(), abs=1e-11)
