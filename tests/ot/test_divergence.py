"""The Sinkhorn divergence."""

import math

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc.ot._divergence import sinkhorn_divergence
from stochproc.ot._solve_sample import solve_sample

METRICS = ["sqeuclidean", "euclidean", "cityblock"]


def clouds(gen, n=40, m=30, d=2):
    X, Y = torch.rand(n, d, generator=gen), torch.rand(m, d, generator=gen) ** 2
    a, b = torch.rand(n, generator=gen), torch.rand(m, generator=gen)
    return X, Y, a / a.sum(), b / b.sum()


def rounded_distance(x, y):
    return ((x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1) + 0.01).sqrt()


@pytest.mark.parametrize("metric", [*METRICS, "chebyshev"])
@pytest.mark.parametrize("unbalanced", [None, 0.5])
def test_it_is_the_combination_of_three_problems(gen, metric, unbalanced):
    X, Y, a, b = clouds(gen)
    b = b if unbalanced is None else 1.4 * b

    def ot(x, y, u, v):
        return float(solve_sample(x, y, u, v, metric, 0.05, unbalanced=unbalanced, tol=1e-12).value)

    expected = ot(X, Y, a, b) - 0.5 * ot(X, X, a, a) - 0.5 * ot(Y, Y, b, b)
    expected += 0.0 if unbalanced is None else 0.5 * 0.05 * (1 - 1.4) ** 2
    found = sinkhorn_divergence(X, Y, 0.05, a, b, metric=metric, unbalanced=unbalanced)
    assert float(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reg", [1.0, 0.05, 1e-3])
def test_a_shifted_cloud_is_at_the_squared_shift(gen, reg):
    # The squared distance splits off the shift, so that all plans stay what they are.
    X, _, a, _ = clouds(gen)
    shift = torch.tensor([0.3, -0.4])
    assert float(sinkhorn_divergence(X, X + shift, reg, a, a)) == pytest.approx(0.25, abs=1e-12)


def test_strong_regularisation_leaves_the_distance_of_the_means(gen):
    X, Y, a, b = clouds(gen)
    means = float((a @ X - b @ Y).square().sum())
    # The plan is a b^T up to O(1 / reg).
    assert float(sinkhorn_divergence(X, Y, 1e5, a, b)) == pytest.approx(means, abs=1e-5)


def test_weak_regularisation_leaves_the_transport_cost():
    x, y = torch.arange(4.0).unsqueeze(1), torch.arange(4.0).unsqueeze(1) + 0.25
    # Costs of other pairs are 0.5 and more higher: the bias of either term is eps times an entropy that cancels.
    assert float(sinkhorn_divergence(x, y, 0.01, metric="euclidean")) == pytest.approx(0.25, abs=1e-10)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("unbalanced", [None, 0.3, (0.2, math.inf)])
@pytest.mark.parametrize("reg", [1.0, 0.01])
def test_it_is_positive_and_symmetric(gen, metric, unbalanced, reg):
    X, Y, a, b = clouds(gen)
    found = float(sinkhorn_divergence(X, Y, reg, a, b, metric=metric, unbalanced=unbalanced))
    turned = unbalanced[::-1] if isinstance(unbalanced, tuple) else unbalanced
    assert found > 0
    assert float(sinkhorn_divergence(Y, X, reg, b, a, metric=metric, unbalanced=turned)) == pytest.approx(
        found, abs=1e-12
    )


@pytest.mark.parametrize("unbalanced", [None, 0.3])
@pytest.mark.parametrize("reg", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("lazy", [False, True])
def test_equal_weights_in_another_order_are_at_zero(gen, unbalanced, reg, lazy):
    X, _, a, _ = clouds(gen)
    order = torch.randperm(len(X), generator=gen)
    found = sinkhorn_divergence(X, X[order], reg, a, a[order], unbalanced=unbalanced, lazy=lazy, tol=1e-10)
    assert 0 <= float(found) <= 1e-12


def test_equal_arguments_take_no_solve(gen):
    X, _, a, _ = clouds(gen)
    X.requires_grad_()
    # A budget of one pass would warn.
    value = sinkhorn_divergence(X, X.detach().clone(), 1e-3, a, a.clone(), max_iter=1)
    value.backward()
    assert float(value.detach()) == 0
    assert not bool(X.grad.any())


@pytest.mark.parametrize("metric", [*METRICS, rounded_distance])
@pytest.mark.parametrize("unbalanced", [None, 0.5, (0.2, math.inf)])
def test_recomputed_costs_give_the_same_value_and_gradient(gen, metric, unbalanced):
    X, Y, a, b = clouds(gen)
    a[:5], b[3] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    found = []
    for lazy in (False, True):
        inputs = [t.clone().requires_grad_() for t in (X, Y, a, b)]
        reg = torch.tensor(0.05, requires_grad=True)
        value = sinkhorn_divergence(
            *inputs[:2], reg, *inputs[2:], metric=metric, unbalanced=unbalanced, lazy=lazy, tol=1e-10
        )
        value.backward()
        # Derivatives in balanced weights are defined up to a constant.
        centre = 1.0 if unbalanced is None else 0.0
        weights = [t.grad - centre * t.grad.mean() for t in inputs[2:]]
        found.append([value.detach(), inputs[0].grad, inputs[1].grad, reg.grad, *weights])
    for stored, recomputed in zip(*found, strict=True):
        # err of 1e-10 over the smallest eigenvalue of the balanced problem.
        torch.testing.assert_close(recomputed, stored, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_derivatives_match_differences(gen, lazy):
    X, Y, a, b = clouds(gen, 4, 3)
    inputs = [t.requires_grad_() for t in (X, Y, a, b, torch.tensor(0.1))]

    def value(X, Y, a, b, reg):
        return sinkhorn_divergence(X, Y, reg, a.softmax(0), b.softmax(0), lazy=lazy, tol=1e-12)

    assert torch.autograd.gradcheck(value, inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_derivatives_of_unbalanced_problems_match_differences(gen, lazy):
    X, Y, a, b = clouds(gen, 4, 3)
    numbers = [torch.tensor(value) for value in (0.1, 0.5, 2.0)]
    inputs = [t.requires_grad_() for t in (X, Y, a, b, *numbers)]

    def value(X, Y, a, b, reg, *rho):
        return sinkhorn_divergence(X, Y, reg, a, b, unbalanced=rho, lazy=lazy, tol=1e-12)

    assert torch.autograd.gradcheck(value, inputs, fast_mode=True, atol=1e-6)


def test_second_derivatives_with_stored_costs_match_differences(gen):
    X, Y, *_ = clouds(gen, 4, 3)

    def value(X, Y):
        return sinkhorn_divergence(X, Y, 0.1, tol=1e-12)

    assert torch.autograd.gradgradcheck(value, (X.requires_grad_(), Y.requires_grad_()), fast_mode=True, atol=1e-5)


def test_the_gradient_is_zero_where_the_clouds_coincide(gen):
    X, *_ = clouds(gen)
    order = torch.randperm(len(X), generator=gen)
    X.requires_grad_()
    sinkhorn_divergence(X, X.detach()[order], 0.05).backward()
    # err of 1e-10 in the plans.
    assert float(X.grad.abs().max()) < 1e-9


def test_mass_multiplies_the_balanced_divergence(gen):
    X, Y, a, b = clouds(gen)
    one = float(sinkhorn_divergence(X, Y, 0.05, a, b))
    assert float(sinkhorn_divergence(X, Y, 0.05, 3 * a, 3 * b)) == pytest.approx(3 * one, rel=1e-11)


def test_numpy_gives_numpy_and_single_precision_keeps_its_digits(gen):
    X, Y, a, b = clouds(gen)
    double = sinkhorn_divergence(X.numpy(), Y.numpy(), 0.01, a.numpy(), b.numpy())
    single = sinkhorn_divergence(*(t.float().numpy() for t in (X, Y)), 0.01, *(t.float().numpy() for t in (a, b)))
    assert isinstance(double, np.float64)
    assert isinstance(single, np.float32)
    # The inputs were rounded to 6e-8.
    assert single == pytest.approx(double, rel=1e-5)


def test_a_spent_budget_warns_once(gen):
    X, Y, a, b = clouds(gen)
    with pytest.warns(ConvergenceWarning, match="max_iter=2") as caught:
        sinkhorn_divergence(X, Y, 1e-3, a, b, max_iter=2)
    assert len(caught) == 1


@pytest.mark.bad_input
def test_rejects_a_metric_that_is_not_symmetric(gen):
    X, Y, *_ = clouds(gen)
    with pytest.raises(ValueError, match="metric must give"):
        sinkhorn_divergence(X, Y, 0.1, metric=lambda x, y: (x[:, None] - y[None]).sum(-1).exp())


@pytest.mark.bad_input
@pytest.mark.parametrize("lazy", ["no", None])
def test_rejects_an_unknown_way_of_storing(gen, lazy):
    with pytest.raises(ValueError, match="lazy must be one of"):
        sinkhorn_divergence(*clouds(gen)[:2], 0.1, lazy=lazy)


def test_far_clouds_are_no_failure(gen):
    # Rounding leaves err 1e-17 times the range of the costs over reg, here more than 1e-10. Squared distances of means
    # alone remain, and half of the difference of the spreads, of size 1.
    x, y = torch.rand(6, 2, generator=gen), torch.rand(5, 2, generator=gen) + 1e4
    value = sinkhorn_divergence(x, y, 0.1)
    assert abs(float(value) / float((x.mean(0) - y.mean(0)).square().sum()) - 1) <= 1e-8


@pytest.mark.parametrize("unit", [1e-200, 1e-160, 1e200])
def test_the_unit_of_distances_is_free(unit, gen):
    x, y = torch.rand(6, 2, generator=gen), torch.rand(5, 2, generator=gen)
    expected = sinkhorn_divergence(x, y, 0.1, metric="euclidean")
    value = sinkhorn_divergence(x * unit, y * unit, 0.1 * unit, metric="euclidean") / unit
    # Differences of terms of size 1, each to 1e-10 squared.
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@pytest.mark.bad_input
def test_messages_name_the_points_as_the_arguments_do():
    with pytest.raises(ValueError, match=r"X must have shape \(n, d\)"):
        sinkhorn_divergence(np.zeros(3), np.zeros((3, 1)), 0.1)
    with pytest.raises(ValueError, match="Y must be finite"):
        sinkhorn_divergence(np.zeros((3, 1)), np.full((3, 1), np.nan), 0.1)
    with pytest.raises(ValueError, match="X and Y must have the same number of columns; got 1 and 2"):
        sinkhorn_divergence(np.zeros((3, 1)), np.zeros((3, 2)), 0.1)
