"""Corners of ``solve``, ``solve_sample`` and their results: extreme units, forbidden pairs, modes of autograd."""

import inspect
import math
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc import ot
from tests.ot.transport_problems import cloud


def caught(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return found


@pytest.mark.parametrize("scale", [1e-300, 1e-120, 1e120, 1e300])
def test_costs_in_extreme_units_have_the_same_plan(scale, gen):
    M, a, b = cloud(6, 5, 2, gen)
    seen = []
    one = ot.solve(M, a, b, 0.02, tol=1e-12, method="newton")
    other = ot.solve(scale * M, a, b, 0.02 * scale, tol=1e-12, callback=lambda s: seen.append(s.eps), method="newton")
    torch.testing.assert_close(other.plan, one.plan, rtol=0, atol=1e-11)
    torch.testing.assert_close(other.value / scale, one.value, rtol=1e-11, atol=0)
    assert seen[-1] == pytest.approx(0.02 * scale, rel=1e-14)
    warm = ot.solve(scale * M, a, b, 0.02 * scale, tol=1e-11, potentials_init=other.potentials, method="newton")
    assert warm.n_iter == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_costs_in_extreme_units_of_float32_have_the_same_plan(scale, gen):
    M, a, b = (t.float() for t in cloud(6, 5, 2, gen))
    one, other = ot.solve(M, a, b, 0.05), ot.solve(scale * M, a, b, 0.05 * scale)
    torch.testing.assert_close(other.plan, one.plan, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mass", [1e-300, 1e300])
def test_extreme_masses_scale_the_plan_of_points(mass, gen):
    X, Y = torch.rand(6, 2, generator=gen), torch.rand(5, 2, generator=gen)
    a, b = torch.full((6,), 1 / 6), torch.full((5,), 1 / 5)
    one = ot.solve_sample(X, Y, a, b, reg=0.05, lazy=True, tol=1e-10)
    other = ot.solve_sample(X, Y, mass * a, mass * b, reg=0.05, lazy=True, tol=1e-10)
    torch.testing.assert_close(other.plan / mass, one.plan, rtol=0, atol=1e-10)
    torch.testing.assert_close(other.sparse_plan.to_dense() / mass, one.plan, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
def test_points_in_extreme_units_cost_the_same_in_theirs(scale, gen):
    X, Y = torch.rand(6, 2, generator=gen), torch.rand(5, 2, generator=gen)
    one = ot.solve_sample(X, Y, reg=0.05, lazy=True, tol=1e-12)
    other = ot.solve_sample(scale * X, scale * Y, reg=0.05 * scale * scale, lazy=True, tol=1e-12)
    torch.testing.assert_close(other.plan, one.plan, rtol=0, atol=1e-11)
    torch.testing.assert_close(other.value_linear / scale / scale, one.value_linear, rtol=1e-10, atol=0)
    assert other.gap / scale / scale == pytest.approx(0, abs=1e-10)


def test_the_certificates_of_lazy_results_take_a_reg_that_needs_gradients(gen):
    X, Y = torch.rand(6, 2, generator=gen), torch.rand(5, 2, generator=gen)
    reg = torch.tensor(0.1, requires_grad=True)
    result = ot.solve_sample(X, Y, reg=reg, lazy=True, tol=1e-10)
    assert result.gap == pytest.approx(0, abs=1e-8)
    assert result.lower_bound <= result.value_linear
    assert result.sparse_plan.shape == (6, 5)


@pytest.mark.parametrize("lazy", [True, False])
def test_inference_mode_changes_no_number(lazy, gen):
    X, Y = torch.rand(6, 2, generator=gen), torch.rand(5, 2, generator=gen)
    outside = ot.solve_sample(X, Y, reg=0.1, lazy=lazy)
    with torch.inference_mode():
        X, Y = X.clone(), Y.clone()
        inside = ot.solve_sample(X, Y, reg=0.1, lazy=lazy)
        assert inside.value_linear == outside.value_linear
        assert inside.gap == outside.gap
    # Tensors of inference mode are ordinary inputs outside of it.
    later = ot.solve_sample(X, Y, reg=0.1, lazy=lazy)
    assert later.value_linear == outside.value_linear
    assert torch.equal(inside.plan, later.plan)


def test_a_look_without_gradients_does_not_cut_the_graph_of_a_result(gen):
    M = torch.rand(4, 5, generator=gen).requires_grad_()
    result = ot.solve(M, reg=0.1)
    with torch.no_grad():
        assert result.value > 0
    result.value.backward()
    torch.testing.assert_close(M.grad, result.plan.detach(), rtol=0, atol=1e-15)


def test_a_solve_without_gradients_has_none_wherever_it_is_looked_at(gen):
    M = torch.rand(4, 5, generator=gen).requires_grad_()
    with torch.no_grad():
        result = ot.solve(M, reg=0.1)
    assert not result.plan.requires_grad
    assert not result.value.requires_grad


@pytest.mark.parametrize("lazy", [True, False])
def test_images_have_finite_gradients_at_weights_of_zero(lazy, gen):
    X, Y = torch.rand(6, 2, generator=gen), torch.rand(5, 2, generator=gen)
    b = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0], requires_grad=True)
    ot.solve_sample(X, Y, None, b, reg=0.05, lazy=lazy).a_to_b().square().sum().backward()
    assert b.grad.isfinite().all()


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("distance", [1e3, 1e8, 1e12])
def test_images_of_far_points_are_means_of_the_targets(lazy, distance, gen):
    X, Y = torch.rand(6, 2, generator=gen), torch.rand(5, 2, generator=gen)
    result = ot.solve_sample(X, Y, reg=1e-3, lazy=lazy)
    far = distance * torch.tensor([[1.0, 0.3], [-0.2, 1.0], [0.0, -1.0]])
    ones = result.a_to_b(far, values=torch.ones(5, 1))
    # Below 1e-6 the softmax is left as it is.
    torch.testing.assert_close(ones, torch.ones(3, 1), rtol=0, atol=1e-6)
    image = result.a_to_b(far)
    assert (image >= Y.amin(0) - 1e-5).all()
    assert (image <= Y.amax(0) + 1e-5).all()


def short_of_rows(n, k, gen):
    """k columns that only k - 1 rows may serve."""
    M = torch.rand(n, n, generator=gen)
    M[k - 1 :, :k] = math.inf
    return M


@pytest.mark.parametrize("eps", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize(("n", "k"), [(10, 3), (60, 5)])
def test_newton_soon_sees_that_forbidden_pairs_leave_no_plan(n, k, eps, gen):
    with pytest.warns(ConvergenceWarning, match=f"leave no plan: some columns ask for {1 / n:.3g} more mass"):
        result = ot.solve(short_of_rows(n, k, gen), reg=eps, method="newton")
    assert result.status.value == "stagnated"
    # 50 passes before the first doubt, as many to confirm it, and those under way.
    assert result.n_iter <= 450
    assert result.plan.isfinite().all()
    assert all(t.isfinite().all() for t in result.potentials)


def test_auto_takes_newton_where_forbidden_pairs_slow_sinkhorn_down(gen):
    # Rows may only serve later columns, but for the first column and the last row.
    M = torch.where(torch.ones(60, 60).triu(1) > 0, torch.rand(60, 60, generator=gen), math.inf)
    M[:, 0], M[-1] = 1.0, 1.0
    result = ot.solve(M, reg=1.0)
    assert result.converged
    assert result.method == "newton"
    assert result.n_iter <= 30


@pytest.mark.parametrize("name", ["value", "value_linear", "plan", "potential_a", "potential_b", "marginal_b"])
def test_unrolled_gradients_are_those_of_the_optimum(name, gen):
    M, a, b = cloud(6, 5, 2, gen)
    reg = torch.tensor(0.1)
    found = []
    for grad, tol in (("unroll", 1e-14), ("implicit", 1e-14)):
        M, a, b, reg = (t.detach().clone().requires_grad_() for t in (M, a, b, reg))
        result = ot.solve(M, a, b, reg, grad=grad, tol=tol)
        out = getattr(result, name)
        weights = torch.linspace(-1, 2, out.numel()).reshape(out.shape)
        of_M, of_a, of_b, of_reg = torch.autograd.grad((out * weights).sum(), (M, a, b, reg))
        # In the weights along changes that keep both masses.
        found.append((out.detach(), of_M, of_a - of_a.mean(), of_b - of_b.mean(), of_reg))
        assert result.method == "sinkhorn" if grad == "unroll" else True
    for one, other in zip(*found, strict=True):
        # Sinkhorn forgets its start at the rate it converges, to 1e-14, over the curvature 1 / eps.
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_unrolled_results_have_second_derivatives_of_the_plan(gen):
    M, a, b = cloud(3, 4, 2, gen)
    M.requires_grad_()
    plan = ot.solve(M, a, b, 0.5, grad="unroll", tol=1e-13).plan
    (first,) = torch.autograd.grad(plan.square().sum(), M, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), M)
    assert second.isfinite().all()
    assert second.abs().max() > 0


def test_unrolled_results_go_through_points_zero_weights_and_forbidden_pairs(gen):
    X, Y = torch.rand(4, 2, generator=gen).requires_grad_(), torch.rand(5, 2, generator=gen)
    b = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0])
    result = ot.solve_sample(X, Y, None, b, reg=0.2, grad="unroll")
    (result.value + result.a_to_b().sum()).backward()
    assert X.grad.isfinite().all()
    assert result.converged
    M = torch.rand(4, 5, generator=gen)
    M[:, 0], M[0, 1] = math.inf, math.inf
    M.requires_grad_()
    result = ot.solve(M, None, b, 0.2, grad="unroll")
    (result.value + result.value_linear + result.plan.square().sum()).backward()
    assert M.grad.isfinite().all()
    assert all(t.isfinite().all() for t in result.potentials)


def test_unrolled_sweeps_are_counted_stopped_and_started_like_others(gen):
    M, a, b = cloud(6, 5, 2, gen)
    M.requires_grad_()
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        short = ot.solve(M, a, b, 0.05, grad="unroll", max_iter=3)
    assert short.n_iter == len(short.log) == 3
    full = ot.solve(M, a, b, 0.05, grad="unroll")
    assert ot.solve(M, a, b, 0.05, grad="unroll", potentials_init=full.potentials).n_iter <= 2
    with pytest.raises(ValueError, match="method must be 'auto' or 'sinkhorn' for grad='unroll'; got 'newton'"):
        ot.solve(M, a, b, 0.05, grad="unroll", method="newton")


@pytest.mark.parametrize("grad", ["implicit", "unroll"])
def test_a_rounded_plan_has_the_gradient_of_the_plan(grad, gen):
    M, a, b = cloud(6, 5, 2, gen)
    weights, found = torch.rand(6, 5, generator=gen), []
    for rounded in (False, True):
        cost = M.clone().requires_grad_()
        plan = ot.solve(cost, a, b, 0.1, grad=grad, round=rounded, tol=1e-12).plan
        (plan * weights).sum().backward()
        found.append(cost.grad)
    assert torch.equal(*found)


def test_one_warning_points_at_the_line_that_asked(gen):
    M, X = torch.rand(10, 10, generator=gen).numpy(), torch.rand(10, 2, generator=gen).numpy()
    short = {"max_iter": 2}
    calls = [
        lambda: ot.solve(M, reg=1e-3, **short),
        lambda: ot.solve(M, reg=1e-3, unbalanced=1.0, **short),
        lambda: ot.solve_sample(X, 2 * X, reg=1e-3, lazy=False, **short),
        lambda: ot.sinkhorn([], [], M, 1e-3, numItermax=2),
        lambda: ot.sinkhorn2([], [], M, 1e-3, numItermax=2),
        lambda: ot.solve_batch(M[None], reg=1e-3, **short),
        lambda: ot.SinkhornTransport(reg_e=1e-4, max_iter=2).fit(Xs=X, Xt=2 * X),
    ]
    for call in calls:
        (found,) = caught(call)
        assert found.category is ConvergenceWarning
        assert (found.filename, found.lineno) == (__file__, inspect.getsourcelines(call)[1])
    assert not caught(lambda: ot.sinkhorn([], [], M, 1e-3, numItermax=2, warn=False))


def test_scalings_of_lists_and_of_zero_weights_start_the_next_run():
    M = [[0.0, 1.0, 0.5], [1.0, 0.2, 0.4], [0.3, 0.6, 0.9]]
    for weights in ([], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]):
        _, found = ot.sinkhorn(weights, [0.2, 0.3, 0.5], M, 0.01, log=True)
        again = ot.sinkhorn(weights, [0.2, 0.3, 0.5], M, 0.01, warmstart=(found["log_u"], found["log_v"]), log=True)
        assert again[1]["niter"] == 1


@pytest.mark.bad_input
def test_what_does_not_fit_is_named():
    M = np.array([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match=r"warmstart must hold log u of shape \(2,\); got \(3,\)"):
        ot.sinkhorn([0.5, 0.5], [0.5, 0.5], M, 0.1, warmstart=(np.zeros(3), np.zeros(2)))
    with pytest.raises(TypeError, match=r"warmstart must be a pair \(log u, log v\); got ndarray"):
        ot.sinkhorn([0.5, 0.5], [0.5, 0.5], M, 0.1, warmstart=np.zeros(2))
    with pytest.raises(ValueError, match="M must be an array of numbers"):
        ot.solve([[1.0, 2.0], [3.0]], reg=0.1)
    with pytest.raises(TypeError, match=r"M must be a dense tensor; got layout torch\.sparse_coo"):
        ot.solve(torch.eye(2).to_sparse(), reg=0.1)
    with pytest.raises(TypeError, match="callback must be a function or None; got int"):
        ot.solve(M, reg=0.1, callback=3)
    with pytest.raises(ValueError, match=r"got 1 and 1\.000002\."):
        ot.solve(M, [0.5, 0.5], [0.5, 0.500002], reg=0.1)


def test_a_pair_of_penalties_may_be_an_array(gen):
    M, a, b = cloud(4, 5, 2, gen)
    one = ot.solve(M, a, 2 * b, 0.1, unbalanced=(0.5, 2.0))
    other = ot.solve(M, a, 2 * b, 0.1, unbalanced=np.array([0.5, 2.0]))
    assert torch.equal(one.plan, other.plan)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "points"])
def test_results_survive_a_file(kind, gen):
    M, X = torch.rand(4, 5, generator=gen), torch.rand(4, 2, generator=gen)
    if kind == "points":
        result = ot.solve_sample(X, M[:, :2], reg=0.1, lazy=True)
    else:
        result = ot.solve(M if kind == "tensors" else M.numpy(), reg=0.1)
    plan = result.plan
    again = pickle.loads(pickle.dumps(result))
    assert np.array_equal(np.asarray(again.plan), np.asarray(plan))
    assert again.status is result.status
    assert again.gap == result.gap


def test_two_threads_do_not_disturb_each_other(gen):
    M, a, b = cloud(30, 30, 2, gen)
    expected, found = ot.solve(M, a, b, 0.01).plan, []
    threads = [threading.Thread(target=lambda: found.append(ot.solve(M, a, b, 0.01).plan)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(plan, expected) for plan in found)
