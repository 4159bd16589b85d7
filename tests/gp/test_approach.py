"""The loss that sees the scale, and the first iterations of a search that use it."""

import math

import pytest
import torch

from stochproc.gp import ScaleMixtureGP
from stochproc.gp._approach import approach
from stochproc.kernels import RBF
from stochproc.solvers import LBFGS


def model_and_data(noise=0.2, mean="constant", unit=1.0):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(30, 2, generator=g)
    y = unit * (3 + torch.sin(2 * X[:, 0]) + 0.1 * torch.randn(30, generator=g))
    return ScaleMixtureGP(RBF([0.8, 1.3]), "delta", noise=noise, mean=mean), X, y


@pytest.mark.parametrize("mean", ["constant", "zero"])
def test_the_profile_loss_is_the_scaled_loss_at_its_minimum_over_the_scale(mean):
    model, X, y = model_and_data(mean=mean)
    log_scale = torch.zeros((), requires_grad=True)
    result = LBFGS()(lambda: model.scaled_loss(X, y, log_scale), [log_scale])
    assert result.ok
    # At the minimum the error of the loss is of second order: 1e-12 for a gradient of 1e-6 and curvature n / 2.
    torch.testing.assert_close(model.profile_loss(X, y).item(), result.value, rtol=1e-10, atol=1e-10)


def test_the_scaled_loss_is_the_evidence_of_a_gaussian_process_with_that_scale():
    model, X, y = model_and_data(mean="zero")
    model.scale_prior.value = 1.7
    log_scale = torch.tensor(1.7).log()
    torch.testing.assert_close(model.scaled_loss(X, y, log_scale), -model.log_marginal_likelihood(X, y))


def test_a_noise_variance_is_the_share_of_noise_times_the_scale():
    model, X, y = model_and_data(noise=0.2)
    log_scale = torch.tensor(0.4)
    variance = log_scale + math.log(0.2)
    torch.testing.assert_close(model.scaled_loss(X, y, log_scale, variance), model.scaled_loss(X, y, log_scale))


def run(model, X, y, max_iter=200):
    parameters = list(model.kernel.parameters())
    bounds = [(torch.full_like(p.detach(), -11.0), torch.full_like(p.detach(), 11.0)) for p in parameters]
    if model.log_noise.requires_grad:
        bounds.append((torch.tensor(-18.0), torch.tensor(11.0)))
    return approach(model, X, y, LBFGS(max_iter), parameters, bounds, None, 0)


@pytest.mark.parametrize("noise", [0.2, 0.0])
def test_the_approach_lowers_the_profile_loss_and_keeps_a_fixed_noise(noise):
    model, X, y = model_and_data(noise=noise)
    before = model.profile_loss(X, y).item()
    run(model, X, y)
    assert model.profile_loss(X, y).item() < before - 1
    assert (model.noise.item() == 0) == (noise == 0)


def test_the_approach_does_not_depend_on_the_unit_of_y():
    ends = []
    # A power of two scales y without rounding; only the scale's own logarithm rounds, 30 iterations long.
    for unit in (1.0, 2.0**20):
        model, X, y = model_and_data(unit=unit)
        run(model, X, y)
        ends.append(torch.cat([model.kernel.log_lengthscale, model.log_noise[None]]).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)


def test_a_search_of_one_iteration_is_left_to_itself():
    model, X, y = model_and_data()
    assert run(model, X, y, max_iter=1) is None
