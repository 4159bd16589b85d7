"""Exact transport against the full linear programme, assignments and closed forms."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from stochproc.ot._emd import emd, emd2
from stochproc.ot._emd_lp import assignment_duals, solve_exact
from stochproc.ot._wasserstein_1d import wasserstein_1d

# Costs of size one: what a sum of 100 terms in float64 may be off.
ROUNDING = 1e-13


def problem(kind, seed, n=30, m=22):
    rng = np.random.default_rng(seed)
    a, b = rng.random(n), rng.random(m)
    if kind == "random":
        M = rng.random((n, m))
    elif kind == "uniform":
        M, a, b = rng.random((n, m)), np.ones(n), np.ones(m)
    elif kind == "assignment":
        m = n
        M, a, b = rng.random((n, n)), np.ones(n), np.ones(n)
    elif kind == "cloud":
        M = ((rng.random((n, 1, 2)) - rng.random((m, 2)) ** 2) ** 2).sum(-1)
    elif kind == "city block":
        grid = np.stack(np.mgrid[:5, :5], -1).reshape(-1, 2)
        M = np.abs(grid[:, None] - grid).sum(-1) / 8
        a, b = rng.random((2, 25)) ** 3
    elif kind == "integers":
        M = rng.integers(0, 5, (n, m)) / 4.0
    elif kind == "zero or one":
        M = 1.0 - np.eye(n, m)
    elif kind == "skewed":
        M, a, b = rng.random((n, m)), np.exp(-30 * a), np.exp(-30 * b)
    elif kind == "some zero":
        M, a, b = rng.random((n, m)), a * (rng.random(n) > 0.3), b * (rng.random(m) > 0.3)
    else:
        M = rng.random((n, m)) - 0.5
        M[rng.random((n, m)) < 0.3] = np.inf
    return a / a.sum(), b / b.sum(), M


KINDS = ["random", "uniform", "assignment", "cloud", "city block", "integers", "zero or one", "skewed", "some zero"]


@pytest.fixture(params=["whole", "by parts"])
def route(request, monkeypatch):
    """Both ways to a solution: the programme of all pairs, and of a support that grows."""
    if request.param == "by parts":
        monkeypatch.setattr("stochproc.ot._emd_lp.SMALL", 0)


def by_programme(a, b, M):
    """The linear programme over all finite pairs."""
    rows, columns = np.nonzero(np.isfinite(M))
    A = np.zeros((len(a) + len(b), len(rows)))
    A[rows, np.arange(len(rows))] = A[len(a) + columns, np.arange(len(rows))] = 1
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    return linprog(M[rows, columns], A_eq=A, b_eq=np.concatenate([a, b]), method="highs-ds", options=options).fun


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [*KINDS, "forbidden pairs"])
@pytest.mark.usefixtures("route")
def test_the_cost_is_that_of_the_full_programme(kind, seed):
    a, b, M = problem(kind, seed)
    plan, log = emd(a, b, M, log=True)
    cost = plan[plan > 0] @ M[plan > 0]
    # The tolerance of the full programme is 1e-10 in masses, which counts where weights are smaller than that.
    assert cost == pytest.approx(by_programme(a, b, M), abs=1e-10 if kind == "skewed" else 1e-12)
    assert emd2(a, b, M) == pytest.approx(cost, abs=ROUNDING)
    assert plan.min() >= 0
    np.testing.assert_allclose(plan.sum(1), a, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(plan.sum(0), b, rtol=0, atol=ROUNDING)
    assert (plan > 0).sum() <= len(a) + len(b) - 1
    # The certificate, checked from scratch.
    u, v = log["u"], log["v"]
    assert (u[:, None] + v - M).max() <= ROUNDING
    assert a @ u + b @ v == pytest.approx(cost, abs=1e-12)
    assert 0 <= log["gap"] <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_is_that_of_pot(kind):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    for seed in range(8):
        a, b, M = problem(kind, 100 + seed, 60, 50)
        assert emd2(a, b, M) == pytest.approx(ot.emd2(a, b, M), abs=1e-12)


def test_larger_problems_are_solved_exactly():
    a, b, M = problem("cloud", 0, 150, 140)
    plan, log = emd(a, b, M, log=True)
    assert log["gap"] <= 1e-14
    np.testing.assert_allclose(plan.sum(1), a, rtol=0, atol=ROUNDING)
    a, b, M = problem("assignment", 0, 200)
    rows, columns = linear_sum_assignment(M)
    assert emd2(a, b, M) == pytest.approx(M[rows, columns].mean(), abs=ROUNDING)


def test_the_line_is_solved_by_sorting():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(40), rng.standard_normal(35)
    a, b = rng.dirichlet(np.ones(40)), rng.dirichlet(np.ones(35))
    M = np.subtract.outer(x, y) ** 2
    assert emd2(a, b, M) == pytest.approx(wasserstein_1d(x, y, a, b, p=2), abs=1e-12)


def test_pricing_mends_potentials_that_start_it_wrong(monkeypatch):
    a, b, M = problem("random", 3)
    monkeypatch.setattr("stochproc.ot._emd_lp.SMALL", 0)
    monkeypatch.setattr("stochproc.ot._emd_lp._start", lambda cost, a, b, eps, span: np.zeros_like(b))
    monkeypatch.setattr("stochproc.ot._emd_lp.FEWEST", 1)
    out = solve_exact(M, a, b)
    assert out.rounds > 1
    assert out.cost == pytest.approx(by_programme(a, b, M), abs=1e-12)


def test_shortest_paths_prove_an_assignment():
    rng = np.random.default_rng(1)
    M = rng.integers(0, 4, (20, 20)).astype(float)
    M[rng.random((20, 20)) < 0.2] = np.inf
    np.fill_diagonal(M, 3.0)
    rows, columns = linear_sum_assignment(M)
    g = assignment_duals(M, columns)
    f = (M - g).min(1)
    assert f.sum() + g.sum() == M[rows, columns].sum()


def test_transposing_permuting_and_scaling():
    a, b, M = problem("random", 5)
    cost = emd2(a, b, M)
    assert emd2(b, a, M.T) == pytest.approx(cost, abs=ROUNDING)
    rng = np.random.default_rng(0)
    i, j = rng.permutation(len(a)), rng.permutation(len(b))
    np.testing.assert_allclose(emd(a[i], b[j], M[np.ix_(i, j)]), emd(a, b, M)[np.ix_(i, j)], rtol=0, atol=ROUNDING)
    assert emd2(5 * a, 5 * b, 2 * M - 7) == pytest.approx(10 * cost - 35, abs=10 * ROUNDING)


@pytest.mark.parametrize("kind", ["random", "some zero", "assignment"])
def test_gradients_are_the_plan_and_the_potentials(kind):
    a, b, M = (torch.tensor(t).requires_grad_() for t in problem(kind, 7))
    cost, log = emd2(a, b, M, log=True, return_matrix=True)
    grads = torch.autograd.grad(cost, (a, b, M))
    for grad, known in zip(grads, (log["u"], log["v"], log["G"]), strict=True):
        torch.testing.assert_close(grad, known, rtol=0, atol=1e-15)
    a, b = a.detach(), b.detach()
    torch.testing.assert_close(a @ log["u"], b @ log["v"], rtol=0, atol=ROUNDING)
    uncentred = emd2(a, b, M, log=True, center_dual=False)[1]
    assert abs(float(b @ uncentred["v"])) <= ROUNDING


@pytest.mark.slow
def test_gradcheck_where_the_plan_is_unique(gen):
    a, b = (torch.randn(k, generator=gen).requires_grad_() for k in (5, 4))
    M = torch.rand(5, 4, generator=gen, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, M: emd2(a.softmax(0), b.softmax(0), M), (a, b, M))


def test_second_derivatives_raise(gen):
    M = torch.rand(3, 3, generator=gen, requires_grad=True)
    (grad,) = torch.autograd.grad(emd2(None, None, M) ** 2, M, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_potentials_without_weight_are_the_conjugate_of_the_others():
    a, b, M = problem("some zero", 2)
    log = emd(a, b, M, log=True)[1]
    empty = b == 0
    expected = (M[a > 0] - log["u"][a > 0, None]).min(0)
    np.testing.assert_allclose(log["v"][empty], expected[empty], rtol=0, atol=ROUNDING)


def test_kinds_of_arrays():
    M = [[0, 2], [1, 0]]
    assert emd(None, [], np.array(M)).tolist() == [[0.5, 0], [0, 0.5]]
    assert isinstance(emd2([1, 1], [1, 1], M), np.float64)
    assert emd([1, 3], [2, 2], M).tolist() == [[1, 0], [1, 2]]
    out = emd(torch.ones(2), torch.ones(2), torch.tensor(M, dtype=torch.float32))
    assert out.dtype == torch.get_default_dtype()
    single = emd(*(torch.tensor(t, dtype=torch.float32) for t in ([0.5, 0.5], [0.5, 0.5], M)))
    assert single.dtype == torch.float32
    assert emd([1.0], [1.0], [[3.0]]).tolist() == [[1.0]]
    assert emd([1.0], [0.25, 0.75], [[3.0, 4.0]]).tolist() == [[0.25, 0.75]]
    np.testing.assert_allclose(emd([0.3, 0.7], [0.6, 0.4], np.ones((2, 2))).sum(1), [0.3, 0.7], rtol=0, atol=1e-15)


@pytest.mark.parametrize("uniform", [True, False])
def test_forbidden_pairs_that_leave_no_plan_are_named(uniform):
    # Rows 0, 1 and 2 may only go to columns 0 and 1.
    M = np.random.default_rng(0).random((4, 4))
    M[:3, 2:] = np.inf
    a = None if uniform else [0.3, 0.3, 0.3, 0.1]
    b = None if uniform else [0.35, 0.35, 0.2, 0.1]
    held, left = ("0.75", "0.5") if uniform else ("0.9", "0.7")
    with pytest.raises(ValueError, match=f"the 3 rows 0, 1, 2 .* hold {held} of the mass, .* hold only {left}"):
        emd(a, b, M)
    # As many forbidden pairs, and yet a plan.
    M[2, 3] = M[2, 2] = 1.0
    emd(a, b, M) if uniform else emd([0.3, 0.3, 0.3, 0.1], [0.35, 0.35, 0.2, 0.1], M)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([0.5, 0.5], [1.0], np.zeros((2, 2))), ValueError, r"b must have shape \(2,\)"),
        (([-0.5, 1.5], None, np.zeros((2, 2))), ValueError, "a must be finite and non-negative"),
        (([1.0, 1.0], [1.0, 2.0], np.zeros((2, 2))), ValueError, "same total mass"),
        ((None, None, np.full((2, 2), np.nan)), ValueError, "M must hold numbers"),
        ((None, None, np.array([[np.inf, np.inf], [0, 0]])), ValueError, "row 0 has weight"),
        ((None, None, None), TypeError, "M must be an array of costs"),
        (([0.5, 0.5], None, torch.zeros(2, 2)), TypeError, "all NumPy or all torch"),
    ],
)
def test_refuses_what_is_no_problem(args, error, message):
    for function in (emd, emd2):
        with pytest.raises(error, match=message):
            function(*args)


def test_masses_are_matched_when_they_are_not_checked():
    plan = emd([1.0, 1.0], [1.0, 3.0], np.array([[0.0, 1.0], [1.0, 0.0]]), check_marginals=False)
    assert plan.tolist() == [[0.5, 0.5], [0.0, 1.0]]


@pytest.mark.parametrize("huge", [1e6, 1e12, 1e15])
@pytest.mark.parametrize("shape", [(30, 20), (12, 40)])
def test_huge_costs_hide_no_others(huge, shape):
    # Pairs meant to be forbidden: the exact answer is that of +inf, up to rounding of costs of size 1.
    rng = np.random.default_rng(5)
    M = rng.random(shape)
    M[rng.random(shape) < 0.1] = huge
    a, b = (rng.random(k) + 0.01 for k in shape)
    a, b = a / a.sum(), b / b.sum()
    forbidden = np.where(M < huge, M, np.inf)
    assert abs(emd2(a, b, M) - emd2(a, b, forbidden)) <= 1e-14
