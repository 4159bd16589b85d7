"""Unbalanced transport: penalties in the place of exact marginals."""

import math

import numpy as np
import pytest
import torch

from stochproc.ot._solve import solve
from tests.ot.unbalanced_reference import primal, swept, swept_plan

INF = math.inf
STRENGTHS = [(1.0, 1.0), (0.01, 0.01), (1e-4, 2.0), (0.3, 5.0), (INF, 0.5), (0.5, INF)]


def cloud(gen, n=40, m=30, ratio=1.3):
    X, Y = torch.rand(n, 2, generator=gen), torch.rand(m, 2, generator=gen) ** 2
    a, b = torch.rand(n, generator=gen) + 0.1, torch.rand(m, generator=gen) + 0.1
    return torch.cdist(X, Y) ** 2, a / a.sum(), ratio * b / b.sum()


@pytest.mark.parametrize("rho", STRENGTHS)
@pytest.mark.parametrize("reg", [0.5, 0.02])
@pytest.mark.parametrize("turned", [False, True])
def test_plan_and_potentials_are_the_fixed_point_of_the_sweeps(gen, reg, rho, turned):
    M, a, b = cloud(gen)
    if turned:
        M, a, b, rho = M.T.contiguous(), b, a, rho[::-1]
    f, g = swept(M, a, b, reg, *rho)
    out = solve(M, a, b, reg, unbalanced=rho, tol=1e-12)
    assert out.converged
    # The reference stops at steps of 1e-15, at most 600 contractions from its limit.
    torch.testing.assert_close(out.potential_a, f, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(out.potential_b, g, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(out.plan, swept_plan(M, a, b, reg, *rho), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("rho", STRENGTHS)
def test_dual_and_primal_values_agree(gen, rho):
    M, a, b = cloud(gen)
    out = solve(M, a, b, 0.05, unbalanced=rho, tol=1e-11)
    by_hand = primal(out.plan, M, a, b, 0.05, *rho)
    # Both are second order in err.
    assert float(out.value) == pytest.approx(float(by_hand), abs=1e-12)
    assert abs(out.gap) < 1e-12
    assert float(out.lower_bound) <= float(out.value)


def test_one_pair_has_a_closed_form():
    M, a, b, eps, ra, rb = 0.7, 2.0, 0.3, 0.05, 0.4, 3.0
    log_p = ((eps + ra) * math.log(a) + (eps + rb) * math.log(b) - M) / (eps + ra + rb)
    value = eps * a * b + ra * a + rb * b - (eps + ra + rb) * math.exp(log_p)
    out = solve(np.array([[M]]), np.array([a]), np.array([b]), eps, unbalanced=(ra, rb))
    # Two roundings of each term.
    assert out.plan[0, 0] == pytest.approx(math.exp(log_p), rel=1e-14)
    assert out.value == pytest.approx(value, rel=1e-14)


def test_no_other_plan_is_cheaper(gen):
    from scipy.optimize import minimize

    M, a, b = cloud(gen, 3, 2)
    rho, reg = (0.3, 0.8), 0.1

    def objective(z):
        P = torch.as_tensor(z).exp().reshape(3, 2).requires_grad_()
        value = primal(P, M, a, b, reg, *rho)
        (slope,) = torch.autograd.grad(value, P)
        return float(value.detach()), (slope * P.detach()).flatten().numpy()

    best = minimize(objective, np.log(np.full(6, 0.1)), jac=True, method="BFGS", options={"gtol": 1e-9})
    out = solve(M, a, b, reg, unbalanced=rho)
    # The minimum is flat: a gradient of 1e-9 is 1e-16 of the value.
    assert float(out.value) == pytest.approx(best.fun, abs=1e-13)


@pytest.mark.parametrize("reg", [0.05, 1e-3])
def test_strong_penalties_are_balanced_transport(gen, reg):
    M, a, b = cloud(gen, ratio=1.0)
    hard = solve(M, a, b, reg, tol=1e-12).plan
    soft = solve(M, a, b, reg, unbalanced=1e8, tol=1e-12).plan
    # The plan differs by O(range / rho) = 1e-8 relative at most; marginals by potentials / rho.
    assert float((hard - soft).abs().sum()) < 2e-8
    equal = solve(M, a, b, reg, unbalanced=INF, tol=1e-12)
    torch.testing.assert_close(equal.plan, hard, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("reg", "most"), [(0.05, 17), (1e-3, 45)])
@pytest.mark.parametrize("rho", [1.0, 1e2, 1e4, 1e6, 1e8])
def test_strength_does_not_cost_passes(gen, reg, most, rho):
    M, a, b = cloud(gen, 200, 200)
    out = solve(M, a, b, reg, unbalanced=rho, tol=1e-12)
    assert out.converged
    assert out.n_iter <= most


def test_masses_scale_like_the_reference_measure(gen):
    # s P against s^2 a b has log s less a pair than P against a b, which the cost can give back.
    M, a, b = cloud(gen)
    s, reg = 3.0, 0.05
    one = solve(M, a, b, reg, unbalanced=0.7, tol=1e-12).plan
    other = solve(M + reg * math.log(s), s * a, s * b, reg, unbalanced=0.7, tol=1e-12).plan
    torch.testing.assert_close(other, s * one, atol=0, rtol=1e-9)


def test_weights_of_zero_change_nothing(gen):
    M, a, b = cloud(gen)
    a[3], b[5] = 0.0, 0.0
    rows, columns = a > 0, b > 0
    out = solve(M, a, b, 0.05, unbalanced=0.7, tol=1e-12)
    less = solve(M[rows][:, columns], a[rows], b[columns], 0.05, unbalanced=0.7, tol=1e-12)
    assert float(out.value) == pytest.approx(float(less.value), rel=1e-14)
    torch.testing.assert_close(out.plan[rows][:, columns], less.plan)
    assert not bool(out.plan[3].any())
    f, _ = swept(M, a, b, 0.05, 0.7, 0.7)
    torch.testing.assert_close(out.potential_a, f, atol=1e-11, rtol=0)


def test_a_row_without_partners_is_destroyed(gen):
    M, a, b = cloud(gen)
    M[4] = INF
    rho, reg = 0.7, 0.05
    out = solve(M, a, b, reg, unbalanced=rho, tol=1e-12)
    rest = torch.arange(len(a)) != 4
    less = solve(M[rest], a[rest], b, reg, unbalanced=rho, tol=1e-12)
    assert not bool(out.plan[4].any())
    assert out.potential_a[4] == INF
    # Its mass is paid for: rho in the penalty, eps m_b in the divergence from a b.
    assert float(out.value) == pytest.approx(float(less.value + a[4] * (rho + reg * b.sum())), rel=1e-13)


def test_nothing_can_be_sent_at_all():
    out = solve(np.full((2, 3), INF), np.ones(2), np.ones(3), 0.1, unbalanced=(2.0, 3.0))
    assert not out.plan.any()
    assert out.value == pytest.approx(2 * 2 + 3 * 3 + 0.1 * 6)


def test_forbidden_pairs_carry_nothing(gen):
    M, a, b = cloud(gen)
    M[torch.rand(M.shape, generator=gen) < 0.4] = INF
    out = solve(M, a, b, 0.05, unbalanced=0.7, tol=1e-12)
    torch.testing.assert_close(out.plan, swept_plan(M, a, b, 0.05, 0.7, 0.7), atol=1e-12, rtol=1e-9)
    assert bool(torch.isfinite(out.value_linear))


@pytest.mark.parametrize("rho", [1e-6, 1e-3])
def test_masses_over_hundreds_of_decades_converge(gen, rho):
    M = torch.rand(12, 12, generator=gen)
    out = solve(M, reg=1e-4, unbalanced=rho)
    assert out.converged
    assert bool(torch.isfinite(out.potential_a).all())


def test_a_warm_start_saves_passes(gen):
    M, a, b = cloud(gen)
    cold = solve(M, a, b, 0.01, unbalanced=1.0)
    warm = solve(M, a, b, 0.01, unbalanced=1.0, potentials_init=cold.potentials)
    assert warm.n_iter == 1


def test_plan_equals_pot(gen):
    pot = pytest.importorskip("ot", reason="POT is a peer, not a dependency")
    M, a, b = cloud(gen)
    theirs = pot.unbalanced.sinkhorn_stabilized_unbalanced(
        a.numpy(), b.numpy(), M.numpy(), 0.05, 1.0, numItermax=100_000, stopThr=1e-15
    )
    np.testing.assert_allclose(solve(M, a, b, 0.05, unbalanced=1.0, tol=1e-12).plan.numpy(), theirs, atol=1e-12)


def small(gen, rho):
    M = torch.rand(4, 3, generator=gen, requires_grad=True)
    a, b = (0.2 + torch.rand(k, generator=gen) for k in (4, 3))
    strengths = [torch.tensor(r, requires_grad=math.isfinite(r)) for r in rho]
    return M, a.requires_grad_(), b.requires_grad_(), torch.tensor(0.1, requires_grad=True), *strengths


@pytest.mark.parametrize("rho", [(0.5, 2.0), (INF, 0.5)])
@pytest.mark.parametrize("name", ["value", "value_linear", "plan", "potentials"])
def test_first_derivatives_of_every_output_are_implicit(gen, name, rho):
    def output(M, a, b, reg, *strengths):
        return getattr(solve(M, a, b, reg, unbalanced=strengths, tol=1e-13), name)

    # Central differences of step 1e-6 are right to about 1e-9.
    assert torch.autograd.gradcheck(output, small(gen, rho), fast_mode=True, atol=1e-6)


def test_second_derivatives_of_the_value_are_exact(gen):
    def value(M, a, b, reg, *strengths):
        return solve(M, a, b, reg, unbalanced=strengths, tol=1e-13).value

    assert torch.autograd.gradgradcheck(value, small(gen, (0.5, 2.0)), fast_mode=True, atol=1e-5)


def test_derivatives_include_weights_of_zero_and_destroyed_rows(gen):
    M, a, b = cloud(gen, 5, 4)
    a[1], M[2] = 0.0, INF
    M.requires_grad_()
    weights = a.clone().requires_grad_()
    solve(M, weights, b, 0.1, unbalanced=0.6, tol=1e-13).value.backward()
    assert bool(torch.isfinite(M.grad).all())
    step = 1e-6
    base = solve(M.detach(), a, b, 0.1, unbalanced=0.6, tol=1e-13).value
    for i in (1, 2):
        moved = a + step * (torch.arange(5) == i)
        change = solve(M.detach(), moved, b, 0.1, unbalanced=0.6, tol=1e-13).value - base
        # One-sided: off by step times half the second derivative.
        assert float(weights.grad[i]) == pytest.approx(float(change) / step, abs=1e-4)


def test_second_derivatives_of_the_plan_raise(gen):
    M, a, b, reg, *rho = small(gen, (0.5, 2.0))
    plan = solve(M, a, b, reg, unbalanced=rho).plan
    (slope,) = torch.autograd.grad(plan.square().sum(), M, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are those of the value"):
        slope.sum().backward()


@pytest.mark.bad_input
@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan])
def test_rejects_strengths_that_are_not_positive(rho):
    with pytest.raises(ValueError, match="unbalanced must be positive"):
        solve(np.ones((2, 2)), reg=0.1, unbalanced=rho)


@pytest.mark.bad_input
def test_a_hard_row_without_partners_is_refused():
    M = np.array([[INF, INF], [0.0, 1.0]])
    with pytest.raises(ValueError, match="row 0 has none"):
        solve(M, reg=0.1, unbalanced=(INF, 1.0))
