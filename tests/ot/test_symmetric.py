"""Transport of weights to themselves."""

import math

import pytest
import torch

from stochproc.ot._outcome import Tracker
from stochproc.ot._symmetric import PointSweeps, StoredSweeps, symmetric, symmetric_value
from tests.ot.transport_reference import solved
from tests.ot.unbalanced_reference import swept


def cloud(gen, n, d=2):
    X, a = torch.rand(n, d, generator=gen), torch.rand(n, generator=gen) + 0.05
    cost = torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    return X, cost, a / a.sum(), float(cost.max())


@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("relative", [0.1, 1e-2, 1e-3, 1e-4])
def test_forty_passes_reach_rounding(gen, n, relative):
    _, cost, a, span = cloud(gen, n)
    tracker = Tracker(1e-13, 40)
    out = symmetric(StoredSweeps(cost, span), a, relative * span, math.inf, tracker)
    assert out.err <= 1e-13


@pytest.mark.parametrize("relative", [0.1, 1e-2])
def test_value_equals_that_of_two_potentials(gen, relative):
    _, cost, a, span = cloud(gen, 12)
    eps = relative * span
    f, g = solved(cost, a, a, eps)
    out = symmetric(StoredSweeps(cost, span), a, eps, math.inf, Tracker(1e-13, 200))
    assert symmetric_value(out.f, a, eps, math.inf, 1.0) == pytest.approx(float(a @ f + a @ g), abs=5e-13 * span)


@pytest.mark.parametrize("rho", [1e-3, 0.3, 5.0])
def test_unbalanced_potential_is_the_fixed_point_of_the_sweeps(gen, rho):
    _, cost, a, span = cloud(gen, 20)
    a, eps = 1.7 * a, 0.1 * span
    out = symmetric(StoredSweeps(cost, span), a, eps, rho, Tracker(1e-13, 200))
    f, g = swept(cost, a, a, eps, rho, rho)
    # Where penalties are strong, sweeps contract by 1 / (1 + eps / rho) and stop 1e-15 rho / eps away.
    atol = 1e-12 * max(1.0, rho / eps)
    torch.testing.assert_close(out.f, f, atol=atol, rtol=0)
    torch.testing.assert_close(out.f, g, atol=atol, rtol=0)


@pytest.mark.parametrize("rho", [math.inf, 0.5])
def test_recomputed_costs_give_the_same_potential(gen, rho):
    X, cost, a, span = cloud(gen, 150)
    stored = symmetric(StoredSweeps(cost, span), a, 0.01, rho, Tracker(1e-12, 200))
    points = symmetric(PointSweeps(X, "sqeuclidean", span), a, 0.01, rho, Tracker(1e-12, 200))
    # Costs agree to 1e-15.
    torch.testing.assert_close(points.f, stored.f, atol=1e-12, rtol=0)


def test_the_budget_is_kept(gen):
    _, cost, a, span = cloud(gen, 50)
    tracker = Tracker(1e-13, 3)
    out = symmetric(StoredSweeps(cost, span), a, 1e-3 * span, math.inf, tracker)
    assert out.status.value == "max_iter"
    assert bool(torch.isfinite(out.f).all())
    assert "max_iter=3" in out.message
