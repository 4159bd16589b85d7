"""Functions of a mode given messages, against dense normal laws."""

import math

import pytest
import torch

from stochproc.kernels import Linear, Matern, Periodic
from stochproc.tensor._factor import Factor
from stochproc.tensor._packed import multiplicity, outer, pack, unpack
from stochproc.tensor._priors import DiscretePrior, MarkovPrior
from tests.tensor.reference import dense_posterior, markov, prior_covariance, random_messages

PRIORS = {
    "matern12": lambda: markov(nu=0.5),
    "matern32": lambda: markov(nu=1.5),
    "own lengthscales": lambda: markov(shared=False),
    "sum": lambda: MarkovPrior(
        (Matern(0.5, nu=0.5) + Matern(2.0, nu=2.5)).double(), torch.tensor([0.5, 1.0]), shared=True, method="auto"
    ),
    "linear": lambda: MarkovPrior(Linear(0.5, 0.8).double(), torch.tensor([0.5, 1.0]), shared=True, method="auto"),
    "periodic": lambda: MarkovPrior(Periodic(1.0, 2.0).double(), torch.tensor([0.5, 1.0]), shared=True, method="auto"),
    "discrete": lambda: DiscretePrior(torch.tensor([0.5, 1.0])),
}


@pytest.fixture(params=PRIORS)
def case(request, gen):
    prior = PRIORS[request.param]()
    points = torch.rand(12, generator=gen).sort().values * 2
    query = torch.tensor([-1.0, 0.3, float(points[4]), 3.0])
    if request.param == "discrete":
        points, query = torch.arange(12.0), torch.tensor([2.0, 5.0, 14.0])
    # The Fourier series of the periodic kernel lacks 1e-8 of its variance.
    tolerance = 1e-6 if request.param == "periodic" else 1e-10
    return prior, points, query, *random_messages(12, 2, gen), tolerance


def test_posterior_is_that_of_dense_matrices(case):
    prior, points, query, Lam, eta, tolerance = case
    cov = prior_covariance(prior, torch.cat([points, query]))
    found = prior.posterior(points, Lam, eta, query)
    mean, joint, log_z = dense_posterior(cov, unpack(Lam, 2), eta, slice(12, None))
    m = range(len(query))
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(unpack(found.cov, 2), joint[m, :, m], rtol=0, atol=tolerance)
    assert found.log_z.item() == pytest.approx(log_z.item(), abs=10 * tolerance)
    at_points = prior.posterior(points, Lam, eta)
    want = dense_posterior(cov, unpack(Lam, 2), eta, slice(0, 12))[0]
    torch.testing.assert_close(at_points.mean, want, rtol=0, atol=tolerance)


def test_joint_covariance_is_that_of_dense_matrices(case):
    prior, points, query, Lam, eta, tolerance = case
    mean, cov = prior.joint(points, Lam, eta, query)
    want = dense_posterior(prior_covariance(prior, torch.cat([points, query])), unpack(Lam, 2), eta, slice(12, None))
    torch.testing.assert_close(mean, want[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(cov, want[1].transpose(1, 2), rtol=0, atol=tolerance)


def test_evidence_of_scalar_messages_is_that_of_one_component(case):
    prior, points, _, _, _, tolerance = case
    lam, eta = torch.rand(3, 12), torch.randn(3, 12)
    log_z, means = prior.evidence(points, lam, eta)
    cov = prior_covariance(prior, points)[:, :1, :, :1]
    for c in range(3):
        mean, _, want = dense_posterior(cov, lam[c][:, None, None], eta[c][:, None], slice(0, 12))
        assert log_z[c].item() == pytest.approx(want.item(), abs=10 * tolerance)
        torch.testing.assert_close(means[c], mean[:, 0], rtol=0, atol=tolerance)


def test_gradient_of_the_evidence_is_that_of_differences(case):
    prior, points, _, Lam, eta, _ = case
    for parameter in prior.parameters():
        parameter.requires_grad_(True)
        (got,) = torch.autograd.grad(prior.posterior(points, Lam, eta).log_z, parameter)
        with torch.no_grad():
            step = torch.zeros_like(parameter)
            step.view(-1)[0] = 1e-5
            values = []
            for sign in (1, -1):
                parameter.add_(sign * step)
                values.append(prior.posterior(points, Lam, eta).log_z.item())
                parameter.sub_(sign * step)
        # Central differences: their error is of the order of the squared step, and of rounding over it.
        assert got.view(-1)[0].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("few", [True, False], ids=["joint law", "corrected paths"])
def test_draws_have_the_posterior_law(few, gen, monkeypatch):
    monkeypatch.setattr("stochproc.tensor._factor._JOINT_UP_TO", 1000 if few else 0)
    Lam, eta = random_messages(12, 2, gen)
    points, query = torch.rand(12, generator=gen).sort().values * 2, torch.tensor([0.3, 2.5])
    factor = Factor(markov(), points, torch.zeros(12, 2), torch.zeros(12, 3), Lam, eta)
    draws = factor.draw(query, 20_000, gen)
    mean, cov = factor.joint(query)
    flat = draws.flatten(1)
    cov = cov.permute(0, 2, 1, 3).reshape(4, 4)
    # Five standard errors of 20,000 draws; a false alarm has a chance of 1e-5.
    spread = cov.diagonal().sqrt()
    error = (flat.mean(0) - mean.flatten()).abs() / (spread / math.sqrt(20_000))
    assert error.max() < 5
    correlation_error = (flat.T.cov() - cov).abs() / (spread[:, None] * spread * math.sqrt(2 / 20_000))
    assert correlation_error.max() < 5


def test_divergence_is_that_of_two_normal_laws(gen):
    prior, points = markov(), torch.rand(9, generator=gen).sort().values
    Lam, eta = random_messages(9, 2, gen)
    factor = Factor(prior, points, torch.zeros(9, 2), torch.zeros(9, 3), Lam, eta)
    factor.absorb(Lam, eta, learn=False)
    K = prior_covariance(prior, points)
    mean, cov, _ = dense_posterior(K, unpack(Lam, 2), eta, slice(0, 9))
    q = torch.distributions.MultivariateNormal(mean.flatten(), cov.reshape(18, 18))
    p = torch.distributions.MultivariateNormal(torch.zeros(18), K.reshape(18, 18))
    assert factor.divergence() == pytest.approx(torch.distributions.kl_divergence(q, p).item(), rel=1e-8)


def test_inserted_points_change_nothing_at_the_old_ones(gen):
    Lam, eta = random_messages(9, 2, gen)
    points = torch.rand(9, generator=gen).sort().values
    factor = Factor(markov(), points, torch.zeros(9, 2), torch.zeros(9, 3), Lam, eta)
    factor.absorb(Lam, eta, learn=False)
    before, log_z = factor.mean.clone(), factor.log_z
    where = factor.insert(torch.tensor([float(points[3]), -1.0, 0.5]))
    assert len(factor.points) == 11
    torch.testing.assert_close(factor.mean[where], before, rtol=0, atol=1e-12)
    factor.absorb(factor.Lam, factor.eta, learn=False)
    assert factor.log_z == pytest.approx(log_z, abs=1e-10)
    torch.testing.assert_close(factor.mean[where], before, rtol=0, atol=1e-12)


def test_kept_components_are_those_of_the_marginal_messages(gen):
    Lam, eta = random_messages(5, 3, gen)
    factor = Factor(DiscretePrior(torch.tensor([1.0, 2.0, 3.0])), torch.arange(5.0), eta.clone(), Lam.clone(), Lam, eta)
    factor.keep(torch.tensor([2, 0]))
    assert factor.rank == 2
    torch.testing.assert_close(factor.prior.variance, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(unpack(factor.Lam, 2)[:, 0, 1], unpack(Lam, 3)[:, 2, 0])


def test_packing_is_undone_and_counts_both_orders(gen):
    root = torch.randn(4, 3, 3, generator=gen)
    matrix = root @ root.mT
    torch.testing.assert_close(unpack(pack(matrix), 3), matrix, rtol=0, atol=0)
    other = torch.randn(4, 3, generator=gen)
    torch.testing.assert_close(unpack(outer(other), 3), other[:, :, None] * other[:, None], rtol=0, atol=0)
    total = (pack(matrix) * outer(other)) @ multiplicity(3, other)
    torch.testing.assert_close(total, torch.einsum("ni,nij,nj->n", other, matrix, other))


def test_kept_components_take_their_searches_along():
    prior = markov(shared=False, variance=(0.5, 1.0, 2.0))
    names = [name for name, _ in prior.named_parameters()]
    prior.learn_from({name: (0.1 * (1 + at), (1e-3, 1e3)) for at, name in enumerate(names)})
    spreads = {name: spread for name, (_, spread, _) in prior.search_record().items()}
    starts = [float(part.log_outputscale.detach()) for part in prior.parts]
    prior.keep(torch.tensor([2, 0]))
    found = prior.search_record()
    assert prior.log_prior().item() == 0.0
    for new, old in enumerate((2, 0)):
        start, spread, _ = found[f"_parts.{new}.log_outputscale"]
        assert float(start) == starts[old]
        assert spread == spreads[f"_parts.{old}.log_outputscale"]
    assert set(found) == set(prior.learned())


def test_many_queries_are_answered_in_pieces(gen, monkeypatch):
    Lam, eta = random_messages(6, 2, gen)
    points = torch.linspace(0, 1, 6)
    factor = Factor(markov(), points, eta, Lam, Lam, eta)
    query = torch.linspace(-0.5, 1.5, 40)
    whole = factor.at(query)
    monkeypatch.setattr("stochproc.tensor._factor._NUMBERS_AT_ONCE", 1)
    pieces = factor.at(query)
    torch.testing.assert_close(pieces.mean, whole.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(pieces.cov, whole.cov, rtol=0, atol=1e-12)


def test_packing_first_used_in_inference_mode_still_has_gradients():
    with torch.inference_mode():
        pack(torch.eye(17))
        unpack(torch.ones(153), 17)
    triangle = torch.ones(153, requires_grad=True)
    unpack(triangle, 17).sum().backward()
    torch.testing.assert_close(triangle.grad, multiplicity(17, triangle))
