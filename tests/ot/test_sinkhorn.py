"""Sinkhorn iterations: exact where they converge, monotone always, honest where they stop."""

import mpmath
import pytest
import torch

from stochproc.ot._dense_pass import RowUpdate
from stochproc.ot._joint_dual import JointDual
from stochproc.ot._outcome import Tracker
from stochproc.ot._sinkhorn import hall_shortage, sinkhorn
from stochproc.solvers import Status
from tests.ot.transport_reference import outcome_err as true_err
from tests.ot.transport_reference import outcome_plan as plan
from tests.ot.transport_reference import plan_of, problem_of, solved


def cloud(gen, n, m, eps, dtype=torch.float64):
    """Points in the unit square and weights of one order of magnitude."""
    X, Y = torch.rand(n, 2, generator=gen), torch.rand(m, 2, generator=gen) ** 2
    a, b = torch.rand(n, generator=gen) + 0.1, torch.rand(m, generator=gen) + 0.1
    return problem_of(torch.cdist(X, Y).square(), a, b, eps, dtype)


def assignment(gen, n, eps, dtype=torch.float64):
    return problem_of(torch.rand(n, n, generator=gen), torch.ones(n), torch.ones(n), eps, dtype)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 5), (5, 1), (30, 30)])
@pytest.mark.parametrize("eps", [1.0, 0.05])
def test_potentials_equal_those_of_a_dense_newton_solve(gen, shape, eps):
    problem = cloud(gen, *shape, eps)
    out = sinkhorn(problem, Tracker(1e-13, 5000))
    f, g = solved(problem.cost, problem.a, problem.b, eps)
    assert out.status is Status.CONVERGED
    torch.testing.assert_close(out.f, f, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.g, g, rtol=0, atol=1e-10)
    assert abs(float(problem.b @ out.g)) < 1e-15


def test_three_by_four_equals_fifty_digits(gen):
    problem = cloud(gen, 3, 4, 0.05)
    out = sinkhorn(problem, Tracker(1e-15, 3000))
    with mpmath.workdps(50):
        a, b = ([mpmath.mpf(x) for x in t.tolist()] for t in (problem.a, problem.b))
        total = mpmath.fsum(a), mpmath.fsum(b)
        a, b = [x / total[0] for x in a], [x / total[1] for x in b]
        K = [[mpmath.exp(-mpmath.mpf(x) / mpmath.mpf(0.05)) for x in row] for row in problem.cost.tolist()]
        u, v = [mpmath.mpf(1)] * 3, [mpmath.mpf(1)] * 4
        for _ in range(400):
            u = [a[i] / mpmath.fsum(K[i][j] * v[j] for j in range(4)) for i in range(3)]
            v = [b[j] / mpmath.fsum(K[i][j] * u[i] for i in range(3)) for j in range(4)]
        exact = torch.tensor([[float(u[i] * K[i][j] * v[j]) for j in range(4)] for i in range(3)])
    torch.testing.assert_close(plan(problem, out), exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("eps", [0.1, 1e-2, 1e-4, 1e-6])
def test_the_dual_value_never_falls_and_err_never_rises(gen, eps):
    problem = cloud(gen, 30, 20, eps)
    seen = []
    tracker = Tracker(1e-9, 200, callback=lambda state: seen.append((state.dual_value, state.err)))
    sinkhorn(problem, tracker)
    phi, err = torch.tensor(seen).T
    # Rounding of a value of size 1, and of exponents of size 1 / eps.
    assert float(phi.diff().min()) >= -1e-15
    assert float(err.diff().max()) <= 1e-15 + 1e-16 / eps


def test_reported_err_is_that_of_the_returned_potentials(gen):
    for eps in (0.1, 1e-3, 1e-5):
        problem = cloud(gen, 20, 30, eps)
        out = sinkhorn(problem, Tracker(1e-9, 60))
        assert abs(out.err - true_err(problem, out)) <= 1e-14 + 1e-15 / eps
        assert out.status in (Status.CONVERGED, Status.MAX_ITER)


def test_one_sweep_is_one_pass(gen):
    problem, tracker = cloud(gen, 30, 20, 0.1), Tracker(1e-9, 2000)
    sinkhorn(problem, tracker)
    assert tracker.stats["passes"] == len(tracker.log) == tracker.stats["sinkhorn"] + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("anneal", [False, True])
def test_nothing_overflows_at_a_millionth_of_the_range(gen, dtype, anneal):
    for problem in (cloud(gen, 40, 30, 1e-6, dtype), assignment(gen, 40, 1e-6, dtype)):
        tracker = Tracker(1e-9, 100)
        out = sinkhorn(problem, tracker, anneal=anneal)
        assert bool(out.f.isfinite().all())
        assert bool(out.g.isfinite().all())
        assert all(err <= 2 + 1e-6 for _, err in tracker.log)


def test_annealing_reaches_at_small_eps_what_plain_sweeps_do_not(gen):
    problem = assignment(gen, 60, 1e-6)
    assert sinkhorn(problem, Tracker(1e-4, 300)).status is Status.MAX_ITER
    assert sinkhorn(problem, Tracker(1e-4, 300), anneal=True).status is Status.CONVERGED


def test_underflowed_columns_get_their_exact_update(gen):
    problem = cloud(gen, 20, 10, 1e-5)
    room = torch.empty(20, 10)
    sweep = RowUpdate(problem, torch.linspace(0, -0.5, 10), 1e-5, room.__getitem__)
    assert float(sweep.c.min()) == 0
    ratio, swept = sweep.log_ratio()
    z = (sweep.f.unsqueeze(1) + sweep.g - problem.cost) / 1e-5 + problem.a.log().unsqueeze(1)
    assert swept
    # Exponents of size 1e5.
    torch.testing.assert_close(ratio, -torch.logsumexp(z, 0), rtol=1e-12, atol=1e-9)


def test_a_tolerance_below_rounding_stagnates_and_says_so(gen):
    problem = cloud(gen, 30, 30, 0.1)
    out = sinkhorn(problem, Tracker(1e-18, 100_000))
    assert out.status is Status.STAGNATED
    assert "rounding in float64" in out.message
    out = sinkhorn(cloud(gen, 30, 30, 0.1, torch.float32), Tracker(1e-12, 100_000))
    assert out.status is Status.STAGNATED
    # A few units of float32 at exponents of size 10.
    assert out.err < 1e-5


def test_a_pattern_without_a_plan_is_recognised_by_halls_condition(gen):
    cost = torch.rand(4, 5, generator=gen)
    cost[1:, :3] = torch.inf
    problem = problem_of(cost, torch.ones(4), torch.ones(5), 0.05)
    out = sinkhorn(problem, Tracker(1e-9, 5000))
    assert out.status is Status.STAGNATED
    assert "forbidden pairs" in out.message
    # Three columns of weight 1/5 see one row of weight 1/4.
    assert hall_shortage(problem, problem.b.new_tensor([2.0, 2.0, 2.0, 0.0, 0.0])) == pytest.approx(0.35)
    assert bool(out.f.isfinite().all())
    assert bool(out.g.isfinite().all())


def test_forbidden_pairs_that_leave_a_plan_stay_empty(gen):
    cost = torch.rand(12, 10, generator=gen)
    cost[torch.rand(12, 10, generator=gen) < 0.3] = torch.inf
    problem = problem_of(cost, torch.rand(12, generator=gen) + 1, torch.rand(10, generator=gen) + 1, 0.1)
    out = sinkhorn(problem, Tracker(1e-12, 5000))
    assert out.status is Status.CONVERGED
    assert float(plan(problem, out)[cost.isinf()].abs().sum()) == 0


def test_a_warm_start_at_the_solution_takes_one_pass(gen):
    problem = cloud(gen, 20, 30, 0.05)
    first = sinkhorn(problem, Tracker(1e-12, 5000))
    tracker = Tracker(1e-11, 5000)
    again = sinkhorn(problem, tracker, first.g + 3.0)
    assert tracker.stats["passes"] == 1
    torch.testing.assert_close(again.g, first.g, rtol=0, atol=1e-14)


def test_a_callback_stops_it(gen):
    problem = cloud(gen, 20, 30, 1e-4)
    out = sinkhorn(problem, Tracker(1e-12, 500, callback=lambda s: s.iteration == 7), anneal=True)
    assert out.status is Status.STOPPED
    assert out.err == pytest.approx(true_err(problem, out), abs=1e-10)


def test_the_entropy_form_of_the_joint_dual_is_the_kl_form_shifted(gen):
    problem = cloud(gen, 6, 5, 0.05)
    f, g = torch.randn(6, generator=gen) * 0.02, torch.randn(5, generator=gen) * 0.02
    tracker = Tracker(1e-9, 10)
    dual = JointDual(problem, tracker)
    point = dual.at(f + dual.lift_x, g + dual.lift_y)
    P = plan_of(problem.cost, problem.a, problem.b, problem.eps, f, g)
    torch.testing.assert_close(dual.plan, P, rtol=1e-12, atol=0)
    x, y, eps = point.x, point.y, problem.eps
    exponents = (x.unsqueeze(1) + y - problem.cost) / eps - 1
    F = problem.a @ x + problem.b @ y - eps * exponents.exp().sum()
    assert point.value == pytest.approx(float(F), abs=1e-14)
    kl = problem.a @ f + problem.b @ g - eps * (P.sum() - 1)
    assert point.value - dual.entropy == pytest.approx(float(kl), abs=1e-14)
    out = dual.outcome(point)
    torch.testing.assert_close(plan(problem, out), P, rtol=1e-12, atol=0)
    assert abs(float(problem.b @ out.g)) < 1e-15
