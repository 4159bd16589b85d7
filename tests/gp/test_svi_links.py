"""Expected log likelihoods and probabilities against Monte Carlo, closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from stochproc.gp import Delta, LatentMarginals
from stochproc.gp._svi_links import (
    BinaryLink,
    RobustMax,
    ScaledGaussian,
    Softmax,
    _ExpectedNormaliser,
    as_link,
    log_largest_of_each,
    log_normal_cdf,
)
from stochproc.gp._svi_scale import Coupled, InverseGammaFamily, PointFamily

N_DRAWS = 60_000


def law(n_latent, n_points=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    mean = torch.randn(n_latent, n_points, generator=gen)
    return LatentMarginals(mean, 0.1 + torch.rand(n_latent, n_points, generator=gen))


def coupled(coupling):
    return Coupled(InverseGammaFamily(4.0, 5.0), coupling)


def draw(at, q, gen, n=N_DRAWS):
    """Latent values (n, latent, points) with independent scales."""
    s = torch.as_tensor(stats.invgamma(4.0, scale=5.0).ppf(torch.rand(n, generator=gen).numpy()))
    g = s.sqrt() if q.scaled else torch.ones_like(s)
    noise = torch.randn(n, *at.mean.shape, generator=gen)
    return g[:, None, None] * at.mean + (s[:, None, None] * at.variance).sqrt() * noise, s


def likelihood(link, f, y):
    """Log likelihoods of classes y, one a draw and point."""
    if isinstance(link, Softmax):
        return torch.log_softmax(f, 1).gather(1, y.expand(len(f), 1, -1))[:, 0]
    if isinstance(link, RobustMax):
        right = f.argmax(1) == y
        return torch.where(right, math.log(1 - link.eps), math.log(link.eps / (f.shape[1] - 1)))
    return link.log_sigma((2 * y - 1) * f[:, 0])


LINKS = [(Softmax(), 3), (RobustMax(0.05), 3), (BinaryLink("logit"), 1), (BinaryLink("probit"), 1)]
IDS = ["softmax", "robustmax", "logit", "probit"]


@pytest.mark.parametrize("coupling", ["scaled", "fixed"])
@pytest.mark.parametrize(("link", "n_latent"), LINKS, ids=IDS)
def test_expected_log_likelihoods_are_those_of_monte_carlo(link, n_latent, coupling, gen):
    at, q = law(n_latent), coupled(coupling)
    y, weight = torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 0.5])
    each = likelihood(link, draw(at, q, gen)[0], y) @ weight
    got = link.expected(at, q, y, weight, 20_000, gen).item()
    # Ours is stratified and mirrored over 20,000 draws, so no wider than twice the reference; 4 standard errors.
    # Quadrature at 32 nodes over a maximum of 3 errs by less than 1e-3.
    assert got == pytest.approx(each.mean().item(), abs=4 * 2.5 * each.std().item() / N_DRAWS**0.5 + 1e-3)


@pytest.mark.parametrize("coupling", ["scaled", "fixed"])
@pytest.mark.parametrize(("link", "n_latent"), LINKS, ids=IDS)
def test_probabilities_are_those_of_monte_carlo(link, n_latent, coupling, gen):
    at, q = law(n_latent), coupled(coupling)
    f = draw(at, q, gen)[0]
    n_classes = max(n_latent, 2)
    want = torch.stack([likelihood(link, f, torch.full((3,), c)).exp().mean(0) for c in range(n_classes)], 1)
    got = link.log_proba(at, q, 4096, 7).exp()
    # A probability over 60,000 draws has a standard error below 0.0021; 4 of them.
    torch.testing.assert_close(got, want, rtol=0.0, atol=8.5e-3)
    torch.testing.assert_close(got.sum(1), torch.ones(3), rtol=0.0, atol=1e-7)


def test_the_average_over_mirrored_draws_and_its_gradient():
    gen = torch.Generator().manual_seed(0)
    C, S, B = 3, 4, 5
    mean, std = torch.randn(C, B, generator=gen), torch.rand(C, B, generator=gen)
    location, width = torch.rand(S, generator=gen), torch.rand(S, generator=gen)
    share, noise, weight = torch.full((S,), 1 / S), torch.randn(C, S, B, generator=gen), torch.rand(B, generator=gen)
    f = [mean[:, None] * location[:, None] + k * std[:, None] * width[:, None] * noise for k in (1, -1)]
    want = torch.stack(f).logsumexp(1).mean((0, 1)) @ weight
    torch.testing.assert_close(_ExpectedNormaliser.apply(mean, std, location, width, share, noise, weight), want)
    leaves = [t.requires_grad_() for t in (mean, std, location, width)]
    assert torch.autograd.gradcheck(lambda *a: _ExpectedNormaliser.apply(*a, share, noise, weight), leaves)


def test_the_softmax_estimate_varies_less_than_independent_draws(gen):
    at, q, y, one = law(3), coupled("scaled"), torch.tensor([0, 1, 0]), torch.ones(3)
    plain = torch.stack([(likelihood(Softmax(), draw(at, q, gen, 20)[0], y) @ one).mean() for _ in range(100)])
    ours = torch.stack([Softmax().expected(at, q, y, one, 20, gen).detach() for _ in range(100)])
    # Measured: 0.18 over 2000. The ratio of two variances over 100 draws is known to 20 %.
    assert ours.var() < 0.5 * plain.var()


@pytest.mark.parametrize("coupling", ["scaled", "fixed"])
def test_the_gaussian_likelihood_has_its_closed_form(coupling, gen):
    at, q, noise = law(2), coupled(coupling), 0.3
    y = torch.randn(2, 3, generator=gen)
    f, s = draw(at, q, gen)
    each = torch.distributions.Normal(f, (noise * s).sqrt()[:, None, None]).log_prob(y).sum((1, 2))
    got = ScaledGaussian(noise).expected(at, q, y, torch.ones(3), 1, None).item()
    assert got == pytest.approx(each.mean().item(), abs=4 * each.std().item() / N_DRAWS**0.5)


def test_with_a_known_scale_the_probit_is_the_closed_form():
    at, q = law(1), Coupled(PointFamily(Delta(2.0)), "scaled")
    want = torch.special.ndtr(2**0.5 * at.mean[0] / (1 + 2 * at.variance[0]).sqrt())
    torch.testing.assert_close(BinaryLink("probit").log_proba(at, q, 1, 0)[:, 1].exp(), want, rtol=1e-9, atol=0.0)


def test_the_logit_is_scipys_quadrature():
    at, q = law(1), Coupled(PointFamily(Delta(1.0)), "fixed")
    m, sd = at.mean[0, 0].item(), at.variance[0, 0].item() ** 0.5
    want, _ = integrate.quad(lambda f: stats.norm(m, sd).pdf(f) * -math.log1p(math.exp(-f)), m - 9 * sd, m + 9 * sd)
    got = BinaryLink("logit").expected(at, q, torch.tensor([1, 1, 1]), torch.tensor([1.0, 0.0, 0.0]), 1, None)
    assert got.item() == pytest.approx(want, abs=1e-10)


def test_of_two_the_larger_one_is_a_normal_probability():
    at = law(2)
    q = Coupled(PointFamily(Delta(1.0)), "fixed")
    want = torch.special.ndtr((at.mean[0] - at.mean[1]) / at.variance.sum(0).sqrt())
    got = log_largest_of_each(at, q.nodes(21)).exp()[:, 0]
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-6)


def test_binary_probabilities_survive_the_far_tail():
    at = LatentMarginals(torch.tensor([[-800.0]]), torch.tensor([[1e-4]]))
    q = Coupled(PointFamily(Delta(1.0)), "fixed")
    assert BinaryLink("logit").log_proba(at, q, 1, 0)[0, 1].item() == pytest.approx(-800.0, abs=1e-3)


def test_equal_points_get_equal_probabilities_whatever_stands_beside_them():
    at, q = law(4, 6), coupled("scaled")
    whole = Softmax().log_proba(at, q, 64, 3)
    part = Softmax().log_proba(LatentMarginals(at.mean[:, 2:3], at.variance[:, 2:3]), q, 64, 3)
    torch.testing.assert_close(part, whole[2:3], rtol=0.0, atol=1e-14)


@pytest.mark.bad_input
def test_links_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="exactly 2 classes; got 3"):
        as_link("logit").n_latent(3)
    with pytest.raises(ValueError, match=r"eps must lie in \(0, 1\); got 1.5"):
        RobustMax(1.5)
    with pytest.raises(ValueError, match="link must be one of 'softmax'"):
        as_link("softplus")
    with pytest.raises(ValueError, match="noise must be positive"):
        ScaledGaussian(0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slope_of_the_normal_distribution_function_is_exact_in_both_tails(dtype):
    f = torch.tensor([-1e12, -1e8, -1e4, -30.0, -1.0, 0.0, 3.0, 50.0], dtype=dtype, requires_grad=True)
    log_normal_cdf(f).sum().backward()
    x = f.detach().double().numpy()
    # phi / Phi without a quotient of exponentials.
    want = np.sqrt(2 / np.pi) / special.erfcx(-x / np.sqrt(2))
    np.testing.assert_allclose(f.grad.numpy(), want, rtol=20 * torch.finfo(dtype).eps)
    np.testing.assert_allclose(want[:3], -x[:3], rtol=1e-7)
