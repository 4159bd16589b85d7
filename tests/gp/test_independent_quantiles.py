"""Quantiles of mixtures of Gaussians against brackets of scipy, far tails and wide ranges included."""

import pytest
import torch
from scipy import optimize, special

from stochproc.gp._independent_quantiles import mixture_quantile

LEVELS = [1e-12, 1e-8, 0.01, 0.3, 0.5, 0.7, 0.99, 1 - 1e-8]


def mixture(n_rows=6, n_nodes=40, spread=2.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    weights = torch.rand(n_nodes, generator=gen).log().mul(8).softmax(0)
    loc = 3 * torch.randn(n_rows, n_nodes, generator=gen)
    return weights, loc, (spread * torch.randn(n_rows, n_nodes, generator=gen)).exp()


def solved(weights, loc, sigma, q):
    """Brent's method on the logarithm of the smaller tail."""
    sign = -1 if q <= 0.5 else 1
    tail = min(q, 1 - q)

    def excess(z):
        return special.logsumexp(special.log_ndtr(-sign * (z - loc.numpy()) / sigma.numpy()), b=weights.numpy()) - (
            torch.tensor(tail).log().item()
        )

    each = loc + sigma * special.ndtri(q)
    return optimize.brentq(excess, each.min().item() - 1, each.max().item() + 1, xtol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("q", LEVELS)
@pytest.mark.parametrize("spread", [0.5, 8.0], ids=["alike", "over many magnitudes"])
def test_the_quantile_is_the_root_of_the_distribution_function(q, spread):
    weights, loc, sigma = mixture(spread=spread)
    found = mixture_quantile(weights, loc, sigma, torch.full((6,), q))
    for i in range(6):
        assert found[i].item() == pytest.approx(solved(weights, loc[i], sigma[i], q), rel=1e-10, abs=1e-10)


def test_one_component_is_the_gaussian_quantile():
    q = torch.tensor(LEVELS)
    found = mixture_quantile(torch.ones(1), torch.full((8, 1), 2.0), torch.full((8, 1), 3.0), q)
    torch.testing.assert_close(found, 2 + 3 * torch.as_tensor(special.ndtri(q.numpy())), rtol=1e-14, atol=1e-14)


def test_components_without_width_give_steps():
    weights, loc = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([[1.0, 2.0, 5.0]])
    found = [mixture_quantile(weights, loc, torch.zeros(1, 3), torch.tensor([q])).item() for q in (0.1, 0.4, 0.9)]
    assert found == pytest.approx([1.0, 2.0, 5.0], abs=1e-12)


def test_the_quantile_moves_and_stretches_with_the_law():
    weights, loc, sigma = mixture()
    q = torch.tensor([0.01, 0.2, 0.5, 0.6, 0.9, 0.999])
    moved = mixture_quantile(weights, 1e6 * loc - 3e6, 1e6 * sigma, q)
    # Digits lost to the offset.
    torch.testing.assert_close(moved, 1e6 * mixture_quantile(weights, loc, sigma, q) - 3e6, rtol=1e-9, atol=1e-3)


def test_a_heavy_tail_takes_few_steps_and_many_rows_are_solved_together():
    # sigma from 1 to exp(25) with weights as a power law: tail ~ 1/z.
    log_sigma = torch.linspace(0, 25, 200)
    weights = (-log_sigma).softmax(0)
    loc, sigma = torch.zeros(1000, 200), log_sigma.exp().expand(1000, 200)
    q = torch.linspace(1e-8, 0.5, 1000)
    found = mixture_quantile(weights, loc, sigma, q)
    tail = torch.as_tensor(special.ndtr((found[:, None] / sigma).numpy())) @ weights
    torch.testing.assert_close(tail, q, rtol=1e-12, atol=0)
