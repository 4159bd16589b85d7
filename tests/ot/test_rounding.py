"""Rounding makes a plan feasible, changes it by no more than twice its error, and spares forbidden pairs."""

import pytest
import torch

from stochproc.ot._rounding import round_plan


def almost_feasible(gen, *shape, noise=1e-2):
    """A plan, and the marginals of another one near it."""
    plan = torch.rand(*shape, generator=gen)
    plan = plan / plan.sum((-2, -1), keepdim=True)
    other = plan * (1 + noise * torch.randn(shape, generator=gen))
    other = other / other.sum((-2, -1), keepdim=True)
    return plan, other.sum(-1), other.sum(-2)


def err_of(plan, a, b):
    return (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 4), (3, 6, 4), (2, 3, 4, 5)])
def test_the_marginals_are_exact_up_to_rounding(gen, shape):
    plan, a, b = almost_feasible(gen, *shape)
    found = round_plan(plan, a, b)
    assert found.shape == plan.shape
    assert bool((found >= 0).all())
    # Sums of at most 7 terms of total 1, and the factors, in units of float64.
    assert float(err_of(found, a, b).max()) < 20 * 2.3e-16


def test_a_feasible_plan_stays_as_it_is(gen):
    plan = torch.rand(6, 4, generator=gen)
    plan = plan / plan.sum()
    before = plan.clone()
    found = round_plan(plan, plan.sum(1), plan.sum(0))
    torch.testing.assert_close(found, before, rtol=1e-14, atol=1e-17)
    assert torch.equal(plan, before)


@pytest.mark.parametrize("noise", [1e-1, 1e-4, 1e-8])
def test_the_distance_is_at_most_twice_the_error(gen, noise):
    plan, a, b = almost_feasible(gen, 50, 20, 30, noise=noise)
    moved = (round_plan(plan, a, b) - plan).abs().sum((-2, -1))
    # Lemma 7 of Altschuler, Weed and Rigollet, up to rounding of sums of 600 terms.
    assert bool((moved <= 2 * err_of(plan, a, b) + 1e-14).all())


def test_mass_that_only_a_forbidden_pair_could_take_leaves_no_plan():
    cost = torch.tensor([[0.0, torch.inf], [1.0, 0.0]])
    half = torch.full((2,), 0.5)
    plan = torch.tensor([[0.4, 0.0], [0.1, 0.4]])
    assert round_plan(plan, half, half, cost) is None
    assert round_plan(plan, half, half, cost == torch.inf) is None
    assert round_plan(plan, half, half)[0, 1] > 0


def test_forbidden_pairs_stay_empty_where_others_can_take_the_mass(gen):
    cost = torch.zeros(3, 3)
    cost[0, 2] = torch.inf
    plan = torch.rand(3, 3, generator=gen).masked_fill(cost == torch.inf, 0.0)
    plan = plan / plan.sum()
    a, b = plan.sum(1), plan.sum(0)
    a[2], b[1] = a[2] + 0.1, b[1] + 0.1
    found = round_plan(plan, a, b, cost)
    assert float(found[0, 2]) == 0
    assert float(err_of(found, a, b)) < 20 * 2.3e-16


def test_residuals_of_rounding_alone_ask_for_no_mass(gen):
    plan = torch.rand(40, 30, generator=gen)
    plan = plan / plan.sum()
    mask = torch.zeros(40, 30, dtype=torch.bool)
    mask[::2, ::2] = True
    plan = plan.masked_fill(mask, 0.0)
    assert round_plan(plan, plan.sum(1) * (1 + 4e-16), plan.sum(0), mask) is not None


def test_rows_and_columns_without_weight_become_empty():
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    found = round_plan(torch.tensor([[0.1, 0.0], [0.8, 0.1]]), a, b)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [1.0, 0.0]]), rtol=0, atol=1e-15)
    assert bool(round_plan(torch.zeros(2, 2), a * 0, b * 0).eq(0).all())


def test_float32_plans_stay_float32(gen):
    plan, a, b = almost_feasible(gen, 8, 9)
    found = round_plan(plan.float(), a, b)
    assert found.dtype == torch.float32
    assert float(err_of(found.double(), a, b)) < 20 * 1.2e-7
