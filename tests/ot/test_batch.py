"""Many transport problems solved at once."""

import math

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch.utils._python_dispatch import TorchDispatchMode

from stochproc.ot import _batch as batch
from stochproc.ot import _batch_newton as machine
from stochproc.ot import solve
from stochproc.ot._batch import solve_batch
from stochproc.solvers import Status
from tests.ot.transport_reference import solved

INF = math.inf


def simplex(*shape, generator):
    w = torch.rand(shape, generator=generator) + 0.05
    return w / w.sum(-1, keepdim=True)


def mixed(B, n, m, generator):
    """Half random assignment, half clouds in the plane, costs in [0, 1], random weights."""
    M = torch.rand(B, n, m, generator=generator)
    x, y = torch.rand(B, n, 2, generator=generator), torch.rand(B, m, 2, generator=generator) ** 3
    M[B // 2 :] = torch.cdist(x, y)[B // 2 :].square()
    return M / M.amax((1, 2), keepdim=True), simplex(B, n, generator=generator), simplex(B, m, generator=generator)


def marginal_err(result, a, b):
    """The error of a batch, recomputed from the plans."""
    gaps = (result.plan.double().sum(-1) - a).abs().sum(-1) + (result.plan.double().sum(-2) - b).abs().sum(-1)
    return gaps / a.sum(-1)


def test_a_constant_cost_gives_the_product_of_the_weights_in_one_pass(gen):
    a, b = simplex(3, 4, generator=gen), simplex(3, 6, generator=gen)
    result = solve_batch(torch.tensor([0.0, -2.0, 7.0])[:, None, None].expand(3, 4, 6), a, b, reg=0.01)
    assert result.n_iter.tolist() == [1, 1, 1]
    torch.testing.assert_close(result.plan, a.unsqueeze(-1) * b.unsqueeze(-2), rtol=1e-13, atol=0)
    torch.testing.assert_close(result.value, torch.tensor([0.0, -2.0, 7.0]), rtol=1e-13, atol=1e-14)


def test_two_points_match_the_closed_form_at_every_reg():
    reg = torch.tensor([1e-3, 0.1, 1.0, 10.0])
    result = solve_batch((1 - torch.eye(2)).expand(4, 2, 2), reg=reg, tol=1e-13)
    stay = 0.5 / (1 + (-1 / reg).exp())
    torch.testing.assert_close(result.plan[:, 0, 0], stay, rtol=1e-12, atol=0)
    # <P, M> = 1 - 2 P_00, and the dual value -eps log((1 + exp(-1 / eps)) / 2).
    torch.testing.assert_close(result.value, -reg * ((1 + (-1 / reg).exp()) / 2).log(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("n", "m"), [(12, 12), (15, 9), (9, 15)])
@pytest.mark.parametrize("eta", [50, 1e3, 1e5])
def test_items_equal_single_solves(n, m, eta, gen):
    M, a, b = mixed(4, n, m, gen)
    together = solve_batch(M, a, b, reg=1 / eta, tol=1e-11)
    assert together.converged == [True] * 4
    for i in range(4):
        alone = solve(M[i], a[i], b[i], reg=1 / eta, tol=1e-11, method="newton")
        # Both plans are within 1e-11 of their marginals; spec section 8 asks for 1e-10.
        torch.testing.assert_close(together.plan[i], alone.plan, rtol=0, atol=1e-10)
        torch.testing.assert_close(together.value[i], alone.value, rtol=0, atol=1e-10)
        torch.testing.assert_close(together.value_linear[i], alone.value_linear, rtol=0, atol=1e-10)
        assert float(together.gap[i]) == pytest.approx(alone.gap, abs=1e-9)


def test_potentials_equal_those_of_a_slow_dense_solver(gen):
    M, a, b = mixed(4, 5, 7, gen)
    result = solve_batch(3 * M - 1, a, b, reg=0.2, tol=1e-13)
    for i in range(4):
        f, g = solved(3 * M[i] - 1, a[i], b[i], 0.2)
        torch.testing.assert_close(result.potential_a[i], f, rtol=0, atol=1e-11)
        torch.testing.assert_close(result.potential_b[i], g, rtol=0, atol=1e-11)
    torch.testing.assert_close((b * result.potential_b).sum(1), torch.zeros(4), rtol=0, atol=1e-13)


def test_each_item_takes_the_passes_it_takes_alone(gen):
    M, a, b = mixed(8, 16, 12, gen)
    reg = torch.tensor([10.0, 1e-2, 1e-3, 1e-4, 10.0, 1e-2, 1e-3, 1e-4])
    together = solve_batch(M, a, b, reg=reg)
    alone = [int(solve_batch(M[i : i + 1], a[i : i + 1], b[i : i + 1], reg=reg[i : i + 1]).n_iter) for i in range(8)]
    assert together.n_iter.tolist() == alone
    assert len(set(alone)) > 3
    assert together.stats["rounds"] == max(alone)


def test_the_order_of_the_items_does_not_matter(gen):
    M, a, b = mixed(7, 8, 8, gen)
    reg = torch.logspace(0, -4, 7)
    order = torch.randperm(7, generator=gen)
    first = solve_batch(M, a, b, reg=reg, tol=1e-12)
    second = solve_batch(M[order], a[order], b[order], reg=reg[order], tol=1e-12)
    torch.testing.assert_close(second.plan, first.plan[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(second.err, first.err[order], rtol=0, atol=1e-12)


def test_a_small_stack_that_is_refilled_gives_the_same_results(gen, monkeypatch):
    M, a, b = mixed(11, 8, 6, gen)
    reg = torch.logspace(0, -4, 11)
    whole = solve_batch(M, a, b, reg=reg, tol=1e-11)
    monkeypatch.setitem(machine.STACK_BYTES, "cpu", 3 * 8 * 6 * 8)
    queued = solve_batch(M, a, b, reg=reg, tol=1e-11)
    assert queued.stats["rounds"] > whole.stats["rounds"]
    assert queued.n_iter.tolist() == whole.n_iter.tolist()
    torch.testing.assert_close(queued.plan, whole.plan, rtol=0, atol=1e-11)


def test_a_shared_cost_equals_its_copies(gen):
    M, a, b = torch.rand(6, 9, generator=gen), simplex(5, 6, generator=gen), simplex(5, 9, generator=gen)
    shared = solve_batch(M, a, b, reg=0.01, tol=1e-12)
    copied = solve_batch(M.expand(5, 6, 9), a, b, reg=0.01, tol=1e-12)
    torch.testing.assert_close(shared.plan, copied.plan, rtol=0, atol=1e-12)
    torch.testing.assert_close(shared.gap, copied.gap, rtol=0, atol=1e-12)
    one_b = solve_batch(M, a, b[0], reg=0.01, tol=1e-12)
    torch.testing.assert_close(one_b.plan[0], shared.plan[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(solve_batch(M, reg=torch.tensor([0.01, 0.1])).plan.sum((1, 2)), torch.ones(2))


class Largest(TorchDispatchMode):
    """Notes the entries of the largest tensor that an operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.entries = max(self.entries, t.untyped_storage().nbytes() // 8)
        return out


def test_a_shared_cost_is_never_copied_for_all_items(gen, monkeypatch):
    B, n = 24, 12
    monkeypatch.setitem(machine.STACK_BYTES, "cpu", 8 * 8 * n * n)
    M, a, b = torch.rand(n, n, generator=gen), simplex(B, n, generator=gen), simplex(B, n, generator=gen)
    with Largest() as seen:
        result = solve_batch(M, a, b, reg=0.02)
    assert result.converged == [True] * B
    # Eight plans at work and their systems, or vectors of all items.
    assert seen.entries <= max(8 * n * n, B * n) < B * n * n


def test_problems_of_different_sizes_equal_single_solves(gen):
    sizes = [(3, 5), (17, 4), (6, 6), (5, 3), (1, 4), (20, 19), (2, 1)]
    Ms = [torch.rand(n, m, generator=gen) for n, m in sizes]
    a, b = [simplex(n, generator=gen) for n, _ in sizes], [simplex(m, generator=gen) for _, m in sizes]
    reg = torch.logspace(0, -3, 7)
    result = solve_batch(Ms, a, b, reg=reg, tol=1e-11)
    assert result.converged == [True] * 7
    for i in range(7):
        alone = solve(Ms[i], a[i], b[i], reg=reg[i], tol=1e-11, method="newton")
        torch.testing.assert_close(result.plan[i], alone.plan, rtol=0, atol=1e-10)
        torch.testing.assert_close(result.potential_a[i], alone.potential_a, rtol=0, atol=1e-9)
        torch.testing.assert_close(result.potential_b[i], alone.potential_b, rtol=0, atol=1e-9)
        torch.testing.assert_close(result.marginals[1][i], b[i], rtol=0, atol=1e-10)
        assert float(result.gap[i]) == pytest.approx(alone.gap, abs=1e-9)
        assert result.a_to_b()[i].shape == sizes[i]
    for name in ("value", "value_linear", "dual_value", "lower_bound"):
        alone = [getattr(solve(Ms[i], a[i], b[i], reg=reg[i], tol=1e-11), name) for i in range(7)]
        torch.testing.assert_close(getattr(result, name), torch.stack(alone), rtol=0, atol=1e-10)


def test_weights_of_zero_have_empty_rows_and_transforms_as_potentials(gen):
    M, a, b = mixed(4, 6, 7, gen)
    a[1, 2] = b[1, 4] = b[3, 0] = 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    result = solve_batch(M, a, b, reg=0.05, tol=1e-12)
    assert result.plan[1, 2].abs().max() == result.plan[1, :, 4].abs().max() == result.plan[3, :, 0].abs().max() == 0
    for i in range(4):
        alone = solve(M[i], a[i], b[i], reg=0.05, tol=1e-12, method="newton")
        torch.testing.assert_close(result.plan[i], alone.plan, rtol=0, atol=1e-11)
        torch.testing.assert_close(result.potential_a[i], alone.potential_a, rtol=0, atol=1e-11)
        torch.testing.assert_close(result.potential_b[i], alone.potential_b, rtol=0, atol=1e-11)


def test_forbidden_pairs_differ_by_item_and_carry_nothing(gen):
    M = torch.rand(3, 6, 6, generator=gen)
    M[0, 0, 1:] = M[1, 2, 3] = M[2].fill_diagonal_(INF)[0, 1] = INF
    result = solve_batch(M, reg=0.02, tol=1e-12)
    assert result.converged == [True] * 3
    assert result.plan[M == INF].abs().max() == 0
    for i in range(3):
        alone = solve(M[i], reg=0.02, tol=1e-12, method="newton")
        torch.testing.assert_close(result.plan[i], alone.plan, rtol=0, atol=1e-11)


def hall(generator):
    """Three problems; in the second, rows 0 and 1 have weight 2/3 and only a column of weight 1/3."""
    M = torch.rand(3, 3, 3, generator=generator)
    M[1, :2, 1:] = INF
    return M


def test_one_item_without_a_plan_is_reported_and_spoils_no_other(gen):
    M = hall(gen)
    with pytest.warns(ConvergenceWarning, match="1 of 3 .* item 1 .*unbounded: forbidden pairs") as caught:
        result = solve_batch(M, reg=0.01)
    assert len(caught) == 1
    assert result.status == [Status.CONVERGED, Status.STAGNATED, Status.CONVERGED]
    assert result.converged == [True, False, True]
    assert result.plan.isfinite().all()
    assert result.potential_a.isfinite().all()
    torch.testing.assert_close(result.err, marginal_err(result, torch.ones(3, 3) / 3, 1 / 3), rtol=1e-6, atol=1e-12)
    # At least a third of the mass has no place: 1/3 in the rows or columns, seen on one of the sides twice.
    assert float(result.err[1]) >= 2 / 3 - 1e-9
    assert float(result.err[[0, 2]].max()) <= 1e-9
    alone = solve(M[2], reg=0.01, method="newton")
    torch.testing.assert_close(result.plan[2], alone.plan, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_rounding_gives_exact_marginals_where_forbidden_pairs_allow_it(gen):
    M = hall(gen)
    result = solve_batch(M, reg=0.01, tol=1e-3, round=True)
    third = torch.full((2, 3), 1 / 3)
    for sums in result.marginals:
        # A few units in the last place.
        torch.testing.assert_close(sums[[0, 2]], third, rtol=1e-14, atol=0)
    assert result.gap[1] == INF
    assert float(result.gap[[0, 2]].min()) >= 0


@pytest.mark.parametrize("eta", [1e2, 1e4])
def test_the_certificates_hold(eta, gen):
    M, a, b = mixed(6, 10, 14, gen)
    result = solve_batch(M, a, b, reg=1 / eta)
    # The gap is about err times the range of the potentials, which is at most 2 here.
    assert float(result.gap.min()) >= -1e-15
    assert float(result.gap.max()) <= 1e-8
    assert bool((result.lower_bound <= result.value_linear + 1e-9).all())
    # Potentials of size 1 are rounded to 1e-16 and enter the plan in units of reg.
    torch.testing.assert_close(result.err, marginal_err(result, a, b), rtol=1e-3, atol=1e-16 * eta)


def test_any_mass_and_shift_and_unit_give_the_same_plan_up_to_that_mass(gen):
    M, a, b = mixed(3, 6, 5, gen)
    unit = solve_batch(M, a, b, reg=0.05, tol=1e-12)
    mass = torch.tensor([3.0, 0.2, 1.0]).unsqueeze(1)
    other = solve_batch(100 * M + 7, mass * a, mass * b, reg=5.0, tol=1e-12)
    torch.testing.assert_close(other.plan, mass.unsqueeze(2) * unit.plan, rtol=0, atol=1e-11)
    # Value: s value - eps s log s in the new unit and with the shift.
    s = mass.squeeze(1)
    torch.testing.assert_close(other.value, s * (100 * unit.value + 7) - 5 * s * s.log(), rtol=1e-11, atol=0)


def test_the_entropy_form_has_the_plan_of_the_kl_form_and_its_own_value(gen):
    M, a, b = mixed(3, 6, 5, gen)
    kl = solve_batch(M, a, b, reg=0.05)
    entropy = solve_batch(M, a, b, reg=0.05, reg_type="entropy")
    direct = entropy.value_linear + 0.05 * torch.xlogy(entropy.plan, entropy.plan).sum((1, 2))
    torch.testing.assert_close(entropy.value, direct, rtol=0, atol=1e-8)
    # The same solve; alignment of memory may change the order of sums.
    torch.testing.assert_close(entropy.plan, kl.plan, rtol=0, atol=1e-12)


def test_single_precision_is_honest_about_its_error(gen):
    M, a, b = mixed(20, 12, 10, gen)
    for eta in (50, 1e3):
        result = solve_batch(M.float(), a.float(), b.float(), reg=1 / eta)
        assert result.plan.dtype == torch.float32
        assert result.converged == [True] * 20
        # Plans are rounded to float32, 6e-8 relative an entry.
        assert float(marginal_err(result, a, b).max()) <= 1.1e-5
        exact = solve_batch(M, a, b, reg=1 / eta)
        # err bounds the distance of plans only up to the conditioning; values are second order in it.
        torch.testing.assert_close(result.value.double(), exact.value, rtol=1e-5, atol=1e-6)


def test_single_precision_goes_on_in_double_where_its_rounding_is_above_tol(gen):
    M, a, b = mixed(6, 12, 10, gen)
    M[0] = M[0] > 0.5
    result = solve_batch(M.float(), a.float(), b.float(), reg=torch.logspace(0, -5, 6), tol=1e-8)
    assert result.converged == [True] * 6
    assert float(result.err.max()) <= 1e-8


def test_tiny_reg_and_skewed_weights_converge_with_underflowing_columns(gen):
    M = torch.rand(4, 12, 12, generator=gen)
    a = torch.exp(-30 * torch.rand(4, 12, generator=gen))
    b = torch.exp(-30 * torch.rand(4, 12, generator=gen))
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    for reg in (1e-3, 1e-6):
        result = solve_batch(M, a, b, reg=reg)
        assert result.converged == [True] * 4
        # Potentials of size 1 are rounded to 1e-16 each, and enter the plan in units of reg.
        torch.testing.assert_close(result.err, marginal_err(result, a, b), rtol=1e-2, atol=1e-15 / reg)


def test_a_warm_start_takes_one_pass_and_a_wrong_one_does_no_harm(gen):
    M, a, b = mixed(4, 10, 8, gen)
    cold = solve_batch(M, a, b, reg=1e-3, tol=1e-10)
    again = solve_batch(M, a, b, reg=1e-3, tol=1e-9, potentials_init=cold.potentials)
    assert again.n_iter.tolist() == [1] * 4
    nearby = solve_batch(M + 1e-4 * M.square(), a, b, reg=1e-3, potentials_init=cold.potentials)
    assert bool((nearby.n_iter < cold.n_iter).all())
    wrong = tuple(1e3 * torch.randn(p.shape, generator=gen) for p in cold.potentials)
    result = solve_batch(M, a, b, reg=1e-3, tol=1e-10, potentials_init=wrong)
    # One pass finds the start useless, another may be a log-sum-exp over columns that underflowed.
    assert bool((result.n_iter <= cold.n_iter + 2).all())
    torch.testing.assert_close(result.plan, cold.plan, rtol=0, atol=1e-9)


def test_a_warm_start_of_a_list_takes_one_pass(gen):
    Ms = [torch.rand(3, 5, generator=gen), torch.rand(6, 4, generator=gen)]
    first = solve_batch(Ms, reg=0.01, tol=1e-10)
    assert solve_batch(Ms, reg=0.01, potentials_init=first.potentials).n_iter.tolist() == [1, 1]


def test_beyond_the_size_for_factorisations_items_are_solved_one_by_one(gen, monkeypatch):
    M, a, b = mixed(3, 9, 7, gen)
    reg = torch.tensor([0.1, 0.01, 0.001])
    factored = solve_batch(M, a, b, reg=reg, tol=1e-11)
    monkeypatch.setattr(batch, "FACTOR_UP_TO", 6)
    seen = []
    looped = solve_batch(M, a, b, reg=reg, tol=1e-11, callback=lambda state: seen.append(state.iteration))
    torch.testing.assert_close(looped.plan, factored.plan, rtol=0, atol=1e-10)
    assert looped.n_iter.shape == (3,)
    assert looped.converged == [True] * 3
    assert seen == list(range(1, len(seen) + 1))
    with pytest.warns(ConvergenceWarning, match="3 of 3"):
        stopped = solve_batch(M, a, b, reg=reg, callback=lambda state: True)
    assert stopped.status == [Status.STOPPED] * 3


def test_the_budget_is_each_items_own(gen):
    M, a, b = mixed(3, 10, 8, gen)
    with pytest.warns(ConvergenceWarning, match="2 of 3 .*max_iter=8 is spent"):
        result = solve_batch(M, a, b, reg=torch.tensor([1.0, 1e-3, 1e-4]), max_iter=8)
    assert result.status == [Status.CONVERGED, Status.MAX_ITER, Status.MAX_ITER]
    assert int(result.n_iter.max()) <= 9
    torch.testing.assert_close(result.err, marginal_err(result, a, b), rtol=1e-6, atol=1e-12)


def test_a_callback_sees_every_round_and_may_stop(gen):
    M, a, b = mixed(4, 10, 8, gen)
    seen = []
    result = solve_batch(M, a, b, reg=1e-3, callback=seen.append)
    assert [state.iteration for state in seen] == list(range(1, result.stats["rounds"] + 1))
    # The first round is at an eighth of the range of the costs, the last at reg.
    assert seen[0].eps > 0.1
    assert seen[-1].eps == pytest.approx(1e-3)
    with pytest.warns(ConvergenceWarning, match="4 of 4 .*'stopped'.*callback"):
        stopped = solve_batch(M, a, b, reg=1e-3, callback=lambda state: state.iteration == 3)
    assert stopped.status == [Status.STOPPED] * 4
    assert stopped.n_iter.tolist() == [3] * 4
    torch.testing.assert_close(stopped.err, marginal_err(stopped, a, b), rtol=1e-6, atol=1e-12)


def test_progress_is_shown_when_asked_for(gen, capsys):
    M, a, b = mixed(2, 4, 4, gen)
    solve_batch(M, a, b, reg=0.1, verbose=True)
    assert "transport" in capsys.readouterr().err


def test_a_batch_of_no_items_gives_empty_results():
    result = solve_batch(torch.zeros(0, 3, 4), reg=0.1)
    assert result.plan.shape == (0, 3, 4)
    assert result.value.shape == result.gap.shape == result.err.shape == (0,)
    assert result.status == []
    assert result.converged == []
    assert result.value_linear.shape == (0,)
    assert [p.shape for p in result.potentials] == [(0, 3), (0, 4)]


def test_sparse_plans_agree_with_dense_ones(gen):
    M, a, b = mixed(3, 6, 5, gen)
    result = solve_batch(M, a, b, reg=0.01)
    # Entries below 1e-12 of a weight are dropped.
    torch.testing.assert_close(result.sparse_plan.to_dense(), result.plan, rtol=0, atol=1e-12)
    arrays = solve_batch([M[0].numpy(), M[1, :4].numpy()], reg=0.01)
    for sparse, plan in zip(arrays.sparse_plan, arrays.plan, strict=True):
        np.testing.assert_allclose(sparse.toarray(), plan, rtol=0, atol=1e-12)
    stacked = solve_batch(M.numpy(), reg=0.01)
    np.testing.assert_allclose(stacked.sparse_plan[2].toarray(), stacked.plan[2], rtol=0, atol=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_finds_the_same_plans(gen):
    M, a, b = mixed(32, 24, 20, gen)
    reg = torch.logspace(-1, -4, 32)
    here = solve_batch(M, a, b, reg=reg, tol=1e-11)
    there = solve_batch(M.cuda(), a.cuda(), b.cuda(), reg=reg.cuda(), tol=1e-11)
    assert there.plan.is_cuda
    assert there.converged == [True] * 32
    torch.testing.assert_close(there.plan.cpu(), here.plan, rtol=0, atol=1e-10)
