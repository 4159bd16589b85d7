"""Sinkhorn-Newton-Sparse as published: quadratic where nothing is lost, and honest about what it cannot do."""

import itertools

import pytest
import torch

from stochproc.ot._newton import newton
from stochproc.ot._outcome import Tracker
from stochproc.ot._sinkhorn import sinkhorn
from stochproc.ot._sns import largest_entries, sns
from stochproc.solvers import Status
from tests.ot.transport_problems import FAMILIES, assignment, cloud, image, uniform
from tests.ot.transport_reference import outcome_err, outcome_plan, problem_of, solved


def assert_honest(problem, outcome, tracker):
    assert bool(outcome.f.isfinite().all())
    assert bool(outcome.g.isfinite().all())
    # Exponents of size span / eps are known to so many digits.
    known = 1e-15 * (1 + problem.span / problem.eps) * (1 if problem.cost.dtype == torch.float64 else 1e9)
    assert outcome.err == pytest.approx(outcome_err(problem, outcome), rel=known, abs=known)
    assert (outcome.status is Status.CONVERGED) == (outcome.err <= tracker.tol)
    assert (outcome.message == "") == (outcome.status is Status.CONVERGED)
    assert all(err == err for _, err in tracker.log)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 5), (5, 1), (2, 2), (30, 30)])
@pytest.mark.parametrize("eps", [1.0, 0.05])
def test_potentials_equal_those_of_a_dense_newton_solve(gen, shape, eps):
    problem = problem_of(*cloud(*shape, 2, gen), eps)
    out = sns(problem, Tracker(1e-13, 2000))
    f, g = solved(problem.cost, problem.a, problem.b, eps)
    assert out.status is Status.CONVERGED
    torch.testing.assert_close(out.f, f, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.g, g, rtol=0, atol=1e-10)
    assert abs(float(problem.b @ out.g)) < 1e-15


def test_its_first_passes_are_sinkhorn_sweeps_from_zero(gen):
    problem = problem_of(*cloud(20, 30, 2, gen), 0.01)
    ours, theirs = Tracker(1e-9, 20), Tracker(1e-9, 20)
    sns(problem, ours)
    # y = 0 in the entropy form is g = -eps log b, up to a constant.
    sinkhorn(problem, theirs, -problem.eps * problem.b.log())
    torch.testing.assert_close(torch.tensor(ours.log), torch.tensor(theirs.log), rtol=1e-9, atol=1e-15)


def test_it_converges_quadratically_where_nothing_is_dropped(gen):
    problem = problem_of(*cloud(40, 30, 2, gen), 0.02)
    tracker = Tracker(1e-14, 200)
    out = sns(problem, tracker, n_sinkhorn=10, density=1.0)
    err = [e for _, e in tracker.log[10:]]
    assert out.status is Status.CONVERGED
    assert tracker.stats["newton"] <= 7
    # Each err is at most that of a fixed multiple of the square before it: P changes by exp of a step of size err.
    assert all(new <= 100 * old**2 + 1e-14 for old, new in itertools.pairwise(err) if old < 1e-2)


def test_dropped_links_between_blocks_make_convergence_linear(gen):
    problem = problem_of(*image(10, 2, gen), 0.02)
    sparse, full = Tracker(1e-9, 1000), Tracker(1e-9, 1000)
    assert sns(problem, sparse, n_sinkhorn=20).status is Status.CONVERGED
    assert sns(problem, full, n_sinkhorn=20, density=1.0).status is Status.CONVERGED
    assert full.stats["newton"] <= 8
    assert sparse.stats["newton"] >= 5 * full.stats["newton"]
    # A constant factor from step to step, where a quadratic method doubles the digits.
    err = torch.tensor([e for _, e in sparse.log[-15:]])
    assert float((err[1:] / err[:-1]).min()) > 0.3


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_near_permutations_cost_it_hundreds_of_inner_iterations(gen, eps):
    problem = problem_of(*assignment(60, 60, gen), eps)
    tracker = Tracker(1e-9, 40)
    out = sns(problem, tracker)
    assert_honest(problem, out, tracker)
    # Against at most 120 unknowns: conjugate gradients need about all their steps each time.
    assert tracker.stats["cg"] / tracker.stats["newton"] > 60
    assert newton(problem, Tracker(1e-9, 500)).status is Status.CONVERGED


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_sinkhorn", [0, 1, 20])
@pytest.mark.parametrize("eps", [1e-4, 1e-6])
def test_exponents_that_overflow_or_underflow_leave_finite_potentials(gen, eps, n_sinkhorn, dtype):
    problem = problem_of(*cloud(20, 15, 2, gen), eps, dtype)
    tracker = Tracker(1e-9, 40)
    out = sns(problem, tracker, n_sinkhorn=n_sinkhorn)
    assert_honest(problem, out, tracker)
    assert out.status is not Status.CONVERGED
    if dtype == torch.float64:
        assert newton(problem, Tracker(1e-9, 500)).status is Status.CONVERGED


@pytest.mark.parametrize("family", FAMILIES)
def test_newton_solves_what_it_leaves(gen, family):
    M, a, b = FAMILIES[family](gen)
    problem = problem_of(M[a > 0][:, b > 0], a[a > 0], b[b > 0], 1e-3)
    tracker = Tracker(1e-9, 60)
    out, reference = sns(problem, tracker), newton(problem, Tracker(1e-12, 1000))
    assert_honest(problem, out, tracker)
    assert reference.err <= 1e-12
    if out.status is Status.CONVERGED:
        P = outcome_plan(problem, reference)
        # Plans differ by err times the inverse of the smallest eigenvalue, here below 1e3.
        torch.testing.assert_close(outcome_plan(problem, out), P, rtol=0, atol=1e-6)


def test_forbidden_pairs_stay_empty(gen):
    M, _, _ = cloud(30, 20, 2, gen)
    M[torch.rand(30, 20, generator=gen) < 0.3] = torch.inf
    problem = problem_of(M, uniform(30), uniform(20), 0.05)
    out = sns(problem, Tracker(1e-11, 1000))
    reference = newton(problem, Tracker(1e-13, 500))
    assert out.status is Status.CONVERGED
    torch.testing.assert_close(outcome_plan(problem, out), outcome_plan(problem, reference), rtol=0, atol=1e-10)


def test_every_row_and_column_keeps_its_largest_entry(gen):
    plan = torch.rand(30, 20, generator=gen) * torch.logspace(0, -200, 30).unsqueeze(1)
    kept = largest_entries(plan, 40).toarray()
    dense = plan.numpy()
    assert ((kept == dense) | (kept == 0)).all()
    assert (kept.max(0) == dense.max(0)).all()
    assert (kept.max(1) == dense.max(1)).all()
    largest = torch.zeros_like(plan).flatten()
    index = plan.flatten().topk(40).indices
    largest[index] = plan.flatten()[index]
    assert (kept >= largest.view(30, 20).numpy()).all()


def test_a_warm_start_needs_no_newton_step(gen):
    problem = problem_of(*cloud(20, 30, 2, gen), 0.05)
    first = sns(problem, Tracker(1e-13, 1000))
    tracker = Tracker(1e-11, 1000)
    again = sns(problem, tracker, first.g)
    assert tracker.stats == {"passes": 1, "newton": 0, "cg": 0, "sinkhorn": 0, "line_search": 0}
    torch.testing.assert_close(again.g, first.g, rtol=0, atol=1e-12)


def test_a_callback_stops_it(gen):
    problem = problem_of(*cloud(20, 30, 2, gen), 1e-3)
    for at in (3, 25):
        tracker = Tracker(1e-12, 500, callback=lambda s, at=at: s.iteration == at)
        out = sns(problem, tracker)
        assert out.status is Status.STOPPED
        assert tracker.stats["passes"] == at
