"""Late truncation: the same solutions from sweeps over the support, and the right fallbacks."""

import pytest
import torch

from stochproc import ot
from stochproc.ot import _newton
from stochproc.ot._dense_pass import DensePasses
from stochproc.ot._problem import Problem
from stochproc.ot._sparse_pass import SparsePasses
from tests.ot.transport_problems import FAMILIES, cloud, err_of


@pytest.mark.parametrize("eta", [300.0, 1e4])
@pytest.mark.parametrize("family", FAMILIES)
def test_solutions_are_those_of_stored_costs(family, eta, gen):
    M, a, b = FAMILIES[family](gen)
    sparse, dense = (ot.solve(M, a, b, 1 / eta, storage=s, tol=1e-10) for s in ("sparse", "dense"))
    assert sparse.converged
    assert err_of(M, a, b, 1 / eta, *sparse.potentials) <= 1e-10 + 1e-15 * eta
    # Values have errors of second order in err; plans are as far apart as both errs allow at most.
    torch.testing.assert_close(sparse.value, dense.value, rtol=0, atol=1e-12)


def test_most_sweeps_of_the_last_stage_are_over_the_support(gen):
    M, a, b = cloud(80, 80, 2, gen)
    sparse, dense = (ot.solve(M, a, b, 1e-3, storage=s) for s in ("sparse", "dense"))
    assert sparse.stats["sparse_passes"] > 2
    assert sparse.stats["passes"] < dense.stats["passes"]
    assert len(sparse.log) == sparse.stats["passes"] + sparse.stats["sparse_passes"]


def test_a_plan_without_small_entries_stays_dense(gen):
    M, a, b = cloud(40, 40, 2, gen)
    result = ot.solve(M, a, b, 0.5, storage="sparse", method="newton")
    assert result.converged
    assert "sparse_passes" not in result.stats


def test_what_a_support_leaves_out_is_found_by_the_full_sweep(gen, monkeypatch):
    # A support this small moves the solution: full sweeps have to see that and finish.
    monkeypatch.setattr(_newton, "SPARSE_LEVEL", 0.3)
    M, a, b = cloud(50, 50, 2, gen)
    result = ot.solve(M, a, b, 1e-3, storage="sparse")
    assert result.converged
    assert err_of(M, a, b, 1e-3, *result.potentials) <= 1.01e-9


@pytest.mark.parametrize(("n", "m"), [(30, 30), (40, 25)])
def test_a_sweep_over_a_whole_support_knows_what_a_dense_one_knows(n, m, gen, monkeypatch):
    monkeypatch.setattr("stochproc.ot._dense_pass.CROWDED", 1.0)
    M, a, b = cloud(n, m, 2, gen)
    problem = Problem(M - M.amin(1, keepdim=True), a, b, 0.004, 1.0)
    g = 0.01 * torch.randn(m, generator=gen)
    dense = DensePasses(problem).at(g, problem.eps)
    kept = dense.truncated(1e-12)
    sparse = SparsePasses(problem, kept).at(g, problem.eps)
    p = torch.randn(m, generator=gen)
    # Entries below 1e-12 of a weight are left out.
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(sparse.f, dense.f, **close)
    torch.testing.assert_close(sparse.c, dense.c, **close)
    torch.testing.assert_close(sparse.product(p), dense.product(p), **close)
    torch.testing.assert_close(sparse.self_mass(), dense.self_mass(), **close)
    torch.testing.assert_close(sparse.gram(), dense.gram(), **close)
    assert sparse.phi == pytest.approx(dense.phi, abs=1e-11)
    torch.testing.assert_close(sparse.log_ratio()[0], dense.log_ratio()[0], rtol=1e-9, atol=1e-11)
    # Tighter truncation: a subset with the largest entry of each row and column.
    coarse = sparse.truncated(0.2).toarray()
    plan = torch.exp((dense.f[:, None] + g - problem.cost) / problem.eps) * a[:, None] * b
    torch.testing.assert_close(torch.from_numpy(coarse).amax(0), plan.amax(0), **close)
    torch.testing.assert_close(torch.from_numpy(coarse).amax(1), plan.amax(1), **close)


def test_large_problems_choose_it_themselves(gen):
    M = torch.rand(1000, 1001, generator=gen)
    assert ot.solve(M, reg=1 / 300).stats.get("sparse_passes", 0) > 0
