"""Safe and Sparse Newton: what it drops is bounded, and it solves what the default method solves."""

import mpmath
import pytest
import torch

from stochproc.ot._newton import newton
from stochproc.ot._outcome import Tracker
from stochproc.ot._ssns import Kept, _eliminate, safe_entries, ssns
from stochproc.solvers import Status
from tests.ot.transport_problems import FAMILIES, assignment, cloud, uniform
from tests.ot.transport_reference import outcome_err, outcome_plan, problem_of, solved


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 5), (5, 1), (2, 2), (30, 30)])
@pytest.mark.parametrize("eps", [1.0, 0.05, 0.005])
def test_potentials_equal_those_of_a_dense_newton_solve(gen, shape, eps):
    problem = problem_of(*cloud(*shape, 2, gen), eps)
    out = ssns(problem, Tracker(1e-13, 2000))
    f, g = solved(problem.cost, problem.a, problem.b, eps)
    assert out.status is Status.CONVERGED
    torch.testing.assert_close(out.f, f, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.g, g, rtol=0, atol=1e-10)
    assert abs(float(problem.b @ out.g)) < 1e-15


def test_three_by_four_equals_fifty_digits(gen):
    problem = problem_of(*cloud(3, 4, 2, gen), 0.02)
    out = ssns(problem, Tracker(1e-14, 3000))
    with mpmath.workdps(50):
        a, b = ([mpmath.mpf(x) for x in t.tolist()] for t in (problem.a, problem.b))
        K = [[mpmath.exp(-mpmath.mpf(x) / mpmath.mpf(0.02)) for x in row] for row in problem.cost.tolist()]
        u, v = [mpmath.mpf(1)] * 3, [mpmath.mpf(1)] * 4
        for _ in range(3000):
            u = [a[i] / mpmath.fsum(K[i][j] * v[j] for j in range(4)) for i in range(3)]
            v = [b[j] / mpmath.fsum(K[i][j] * u[i] for i in range(3)) for j in range(4)]
        exact = torch.tensor([[float(u[i] * K[i][j] * v[j]) for j in range(4)] for i in range(3)])
    torch.testing.assert_close(outcome_plan(problem, out), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eps", [1e-2, 1e-4])
def test_plans_equal_those_of_the_default_method(gen, family, eps):
    M, a, b = FAMILIES[family](gen, 30)
    problem = problem_of(M[a > 0][:, b > 0], a[a > 0], b[b > 0], eps)
    out = ssns(problem, Tracker(1e-11, 2000))
    reference = newton(problem, Tracker(1e-11, 2000))
    assert out.status is Status.CONVERGED
    assert out.err == pytest.approx(outcome_err(problem, out), abs=1e-14 + 1e-15 / eps)
    # Both errs are at most 1e-11; a plan differs by that times the condition of the Laplacian, below 1e4 here.
    torch.testing.assert_close(outcome_plan(problem, out), outcome_plan(problem, reference), rtol=0, atol=1e-7)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_overflows_at_a_millionth_of_the_range(gen, eps, dtype):
    for measures in (cloud(30, 20, 2, gen), assignment(30, 30, gen)):
        problem, tracker = problem_of(*measures, eps, dtype), Tracker(1e-9, 150)
        out = ssns(problem, tracker)
        assert bool(out.f.isfinite().all())
        assert bool(out.g.isfinite().all())
        assert all(err == err for _, err in tracker.log)
        assert (out.status is Status.CONVERGED) == (out.err <= 1e-9)


def test_float32_stagnates_at_its_rounding_and_says_so(gen):
    problem = problem_of(*cloud(30, 20, 2, gen), 0.05, torch.float32)
    out = ssns(problem, Tracker(1e-10, 2000))
    assert out.status is Status.STAGNATED
    assert out.err < 1e-5
    assert "float32" in out.message


def test_forbidden_pairs_stay_empty_and_an_impossible_pattern_ends(gen):
    M, _, _ = cloud(30, 20, 2, gen)
    M[torch.rand(30, 20, generator=gen) < 0.3] = torch.inf
    problem = problem_of(M, uniform(30), uniform(20), 1e-3)
    out = ssns(problem, Tracker(1e-11, 1000))
    assert out.status is Status.CONVERGED
    assert float(outcome_plan(problem, out)[M.isinf()].abs().sum()) == 0
    M = torch.rand(4, 5, generator=gen)
    M[1:, :3] = torch.inf
    out = ssns(problem_of(M, uniform(4), uniform(5), 0.05), Tracker(1e-9, 500))
    assert out.status in (Status.STAGNATED, Status.MAX_ITER)
    assert bool(out.f.isfinite().all())


@pytest.mark.parametrize("mass", [1e-3, 1e-6, 1e-12])
def test_no_row_and_no_column_loses_more_than_it_may(gen, mass):
    plan = (torch.rand(40, 60, generator=gen) * 200 - 200).exp()
    plan = plan / plan.sum()
    kept = safe_entries(plan, mass)
    lost = plan - torch.from_numpy(kept.entries.toarray())
    rows, columns = lost.sum(1), lost.sum(0)
    # Sums of 60 terms.
    assert float(rows.max()) <= mass * (1 + 1e-13)
    assert float(columns.max()) <= mass * (1 + 1e-13)
    torch.testing.assert_close(kept.dropped_rows, rows, rtol=1e-12, atol=1e-25)
    torch.testing.assert_close(kept.dropped_columns, columns, rtol=1e-12, atol=1e-25)
    # Nothing more could go: what is kept is more than its row, or else its column, can spare.
    for line, at in zip(*kept.entries.nonzero(), strict=True):
        value = plan[line, at]
        of_row, of_column = plan[line], plan[:, at]
        less = of_row[of_row <= value].sum(), of_column[of_column <= value].sum()
        assert float(max(less)) > mass * (1 - 1e-12)


def test_a_plan_that_spares_little_is_kept_whole(gen):
    plan = torch.rand(30, 20, generator=gen)
    kept = safe_entries(plan, 1e-9)
    assert torch.equal(kept.entries, plan)
    assert float(kept.dropped_rows.sum() + kept.dropped_columns.sum()) == 0


@pytest.mark.parametrize("sparse", [False, True])
def test_elimination_solves_the_whole_shifted_system(gen, sparse):
    plan = (torch.rand(9, 7, generator=gen) * 80 - 80).exp()
    plan[torch.arange(9), torch.arange(9) % 7] = 1.0
    rows, columns, sigma = plan.sum(1), plan.sum(0), 1e-4
    kept = safe_entries(plan, 1e-3) if sparse else Kept(plan, torch.zeros(9), torch.zeros(7))
    used = torch.from_numpy(kept.entries.toarray()) if sparse else plan
    x, y = torch.randn(9, generator=gen), torch.randn(7, generator=gen)
    dx, dy = _eliminate(kept, rows + sigma, sigma, x, y)
    H = torch.cat([torch.cat([rows.diag(), used], 1), torch.cat([used.T, columns.diag()], 1)]) + sigma * torch.eye(16)
    exact = torch.linalg.solve(H, torch.cat([x, y]))
    torch.testing.assert_close(torch.cat([dx, dy]), exact, rtol=1e-8, atol=1e-8)


def test_the_unit_of_the_cost_does_not_matter(gen):
    M, a, b = cloud(30, 20, 2, gen)
    one, other = Tracker(1e-9, 500), Tracker(1e-9, 500)
    first = ssns(problem_of(M, a, b, 1e-3), one)
    # A power of two changes no digit.
    second = ssns(problem_of(1024 * M, a, b, 1.024), other)
    assert one.stats["passes"] == other.stats["passes"]
    torch.testing.assert_close(1024 * first.g, second.g, rtol=1e-6, atol=1e-9)


def test_a_warm_start_needs_no_newton_step_and_a_callback_stops(gen):
    problem = problem_of(*cloud(20, 30, 2, gen), 1e-2)
    first = ssns(problem, Tracker(1e-13, 1000))
    tracker = Tracker(1e-11, 1000)
    again = ssns(problem, tracker, first.g)
    assert tracker.stats["passes"] == 1
    torch.testing.assert_close(again.g, first.g, rtol=0, atol=1e-12)
    for at in (3, 50):
        tracker = Tracker(1e-14, 500, callback=lambda s, at=at: s.iteration == at)
        assert ssns(problem_of(*cloud(20, 30, 2, gen), 1e-4), tracker).status is Status.STOPPED
        assert tracker.stats["passes"] >= at
