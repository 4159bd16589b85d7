"""Facts about solutions of ``solve`` with stored costs, whatever the method."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc import ot
from tests.ot.transport_problems import FAMILIES, assignment, cloud, err_of
from tests.ot.transport_reference import plan_of, solved

ETAS = [50.0, 1e3, 1e4, 1e5]


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_reach_their_tolerance_in_float64(family, eta, gen):
    M, a, b = FAMILIES[family](gen)
    result = ot.solve(M, a, b, reg=1 / eta)
    assert result.converged
    # Rounding of exponents of size eta: eta * 1e-16 of the mass.
    assert err_of(M, a, b, 1 / eta, *result.potentials) <= 1e-9 + 1e-15 * eta
    assert result.err == pytest.approx(err_of(M, a, b, 1 / eta, *result.potentials), abs=1e-15 * eta)


@pytest.mark.slow
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_reach_their_tolerance_at_a_realistic_size(family, eta, gen):
    M, a, b = FAMILIES[family](gen, n=225)
    result = ot.solve(M, a, b, reg=1 / eta)
    assert result.converged
    assert err_of(M, a, b, 1 / eta, *result.potentials) <= 1e-9 + 1e-15 * eta


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_that_of_a_slow_reference(family, gen):
    M, a, b = FAMILIES[family](gen, n=16)
    f, g = solved(M, a, b, 0.01)
    result = ot.solve(M, a, b, reg=0.01, tol=1e-13)
    torch.testing.assert_close(result.plan, plan_of(M, a, b, 0.01, f, g), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mass", [1e-6, 1.0, 37.0])
def test_mass_and_units_scale_as_they_should(mass, gen):
    M, a, b = FAMILIES["cloud in the plane"](gen, n=20)
    eps = 0.02
    one = ot.solve(M, a, b, reg=eps, tol=1e-13)
    scaled = ot.solve(1e3 * M - 7, mass * a, mass * b, reg=1e3 * eps, tol=1e-13)
    torch.testing.assert_close(scaled.plan, mass * one.plan, rtol=0, atol=1e-12 * mass)
    torch.testing.assert_close(scaled.value_linear, mass * (1e3 * one.value_linear - 7), rtol=1e-10, atol=0)
    # KL(sP | s^2 ab) = s KL(P | ab) - s log s.
    expected = mass * (1e3 * one.value - 7) - 1e3 * eps * mass * math.log(mass)
    torch.testing.assert_close(scaled.value, expected, rtol=1e-9, atol=0)
    assert scaled.err <= 1e-13


def test_transposing_exchanges_the_sides(gen):
    M, a, b = assignment(9, 14, gen)
    one, other = ot.solve(M, a, b, reg=0.01, tol=1e-13), ot.solve(M.T, b, a, reg=0.01, tol=1e-13)
    torch.testing.assert_close(one.plan, other.plan.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.value, other.value, rtol=1e-12, atol=0)
    assert float(b @ one.potential_b) == pytest.approx(0, abs=1e-14)
    assert float(a @ other.potential_b) == pytest.approx(0, abs=1e-14)


def test_permuting_rows_and_columns_permutes_the_plan(gen):
    M, a, b = cloud(15, 11, 2, gen)
    p, q = torch.randperm(15, generator=gen), torch.randperm(11, generator=gen)
    one, other = ot.solve(M, a, b, 0.005, tol=1e-13), ot.solve(M[p][:, q], a[p], b[q], 0.005, tol=1e-13)
    torch.testing.assert_close(one.plan[p][:, q], other.plan, rtol=0, atol=1e-12)


def test_adding_a_number_to_a_row_moves_its_potential_alone(gen):
    M, a, b = cloud(8, 8, 2, gen)
    shift = torch.linspace(-3, 3, 8)
    one, other = ot.solve(M, a, b, 0.05, tol=1e-13), ot.solve(M + shift[:, None], a, b, 0.05, tol=1e-13)
    torch.testing.assert_close(other.plan, one.plan, rtol=0, atol=1e-12)
    torch.testing.assert_close(other.potential_a, one.potential_a + shift, rtol=0, atol=1e-11)
    torch.testing.assert_close(other.potential_b, one.potential_b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("eps", [1e-3, 0.1, 10.0])
def test_two_points_match_the_closed_form(eps):
    half = torch.full((2,), 0.5)
    result = ot.solve(1 - torch.eye(2), half, half, eps)
    stay = 0.5 / (1 + math.exp(-1 / eps))
    torch.testing.assert_close(result.plan.diagonal(), torch.full((2,), stay), rtol=1e-9, atol=0)
    # -eps log sum_j b_j exp(-M_ij / eps), the potential of both sides.
    value = -eps * math.log((1 + math.exp(-1 / eps)) / 2)
    assert float(result.value) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
def test_one_point_on_a_side_takes_one_pass(shape, gen):
    n, m = shape
    M, a, b = torch.rand(n, m, generator=gen), torch.rand(n, generator=gen), torch.rand(m, generator=gen)
    b = b * a.sum() / b.sum()
    result = ot.solve(M, a, b, 1e-4)
    torch.testing.assert_close(result.plan, a[:, None] * b / a.sum(), rtol=1e-9, atol=0)
    assert result.n_iter == 1


def test_constant_costs_give_the_product_plan_in_one_pass(gen):
    a, b = torch.rand(5, generator=gen), torch.rand(7, generator=gen)
    b = b * a.sum() / b.sum()
    result = ot.solve(torch.full((5, 7), 3.0), a, b, 0.1)
    torch.testing.assert_close(result.plan, a[:, None] * b / a.sum(), rtol=1e-13, atol=0)
    assert result.n_iter == 1


def test_the_two_forms_of_the_value_differ_by_the_entropies(gen):
    M, a, b = cloud(12, 9, 2, gen)
    a, b = 2 * a, 2 * b
    kl, entropy = (ot.solve(M, a, b, 0.03, reg_type=t, tol=1e-13) for t in ("KL", "entropy"))
    P = kl.plan
    torch.testing.assert_close(kl.value, (P * M).sum() + 0.03 * (P * (P / (a[:, None] * b)).log()).sum())
    torch.testing.assert_close(entropy.value, (P * M).sum() + 0.03 * (P * P.log()).sum())
    torch.testing.assert_close(kl.plan, entropy.plan, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_certificates_enclose_what_they_certify(family, gen):
    M, a, b = FAMILIES[family](gen, n=16)
    rough = ot.solve(M, a, b, 0.02, tol=1e-3)
    best = ot.solve(M, a, b, 0.02, tol=1e-13)
    # Three digits above rounding of sums of 256 terms of size 1.
    assert rough.dual_value <= best.value + 1e-13
    assert best.value <= rough.dual_value + rough.gap + 1e-13
    assert -1e-13 <= best.gap <= 1e-11
    assert best.lower_bound <= best.value_linear + 1e-13


def test_a_small_reg_brackets_the_cost_without_it(gen):
    from scipy.optimize import linear_sum_assignment

    M, a, b = assignment(40, 40, gen)
    result = ot.solve(M, a, b, 1e-4)
    rows, columns = linear_sum_assignment(M.numpy())
    exact = float(M[rows, columns].mean())
    assert float(result.lower_bound) <= exact + 1e-12
    assert exact <= float(result.value_linear) + 1e-9
    # The entropic excess is at most eps times the entropy of the coupling, log 40.
    assert float(result.value_linear) - exact <= 1e-4 * math.log(40)


@pytest.mark.parametrize("eta", [20.0, 1e4])
def test_forbidden_pairs_get_nothing(eta, gen):
    M, a, b = cloud(20, 20, 2, gen)
    blocked = torch.rand(20, 20, generator=gen) < 0.4
    blocked.fill_diagonal_(False)
    a = b = torch.full((20,), 0.05)
    M = M.masked_fill(blocked, math.inf)
    result = ot.solve(M, a, b, 1 / eta)
    assert result.converged
    assert bool((result.plan[blocked] == 0).all())
    assert math.isfinite(float(result.value_linear))
    assert err_of(M, a, b, 1 / eta, *result.potentials) <= 1e-9 + 1e-15 * eta


def test_a_pattern_without_a_plan_ends_stagnated_and_finite():
    # Two rows share the one column that they may use: Hall's condition fails.
    inf = math.inf
    M = torch.tensor([[0.0, inf, inf], [0.0, inf, inf], [1.0, 1.0, 1.0]])
    with pytest.warns(ConvergenceWarning, match="forbidden pairs"):
        result = ot.solve(M, reg=0.1)
    assert result.status.value == "stagnated"
    assert all(bool(p.isfinite().all()) for p in (*result.potentials, result.plan))
    # One third of the mass has no place, on both sides of its column.
    assert result.err == pytest.approx(2 / 3, abs=0.02)
    assert result.gap == math.inf


def test_zero_weights_are_as_if_the_points_were_not_there(gen):
    M, a, b = FAMILIES["30 % zero weights"](gen, n=18)
    result = ot.solve(M, a, b, 0.01, tol=1e-13)
    kept = ot.solve(M[a > 0][:, b > 0], a[a > 0], b[b > 0], 0.01, tol=1e-13)
    torch.testing.assert_close(result.plan[a > 0][:, b > 0], kept.plan, rtol=0, atol=1e-13)
    assert float(result.plan[a == 0].sum() + result.plan[:, b == 0].sum()) == 0
    f, g = result.potentials
    transform = -0.01 * torch.logsumexp((g - M) / 0.01 + b.log(), 1)
    torch.testing.assert_close(f[a == 0], transform[a == 0], rtol=0, atol=1e-10)


def test_a_warm_start_saves_passes_and_a_bad_one_costs_one(gen):
    M, a, b = cloud(60, 60, 2, gen)
    cold = ot.solve(M, a, b, 1e-3)
    near = M + 1e-5 * torch.rand(M.shape, generator=gen)
    again = ot.solve(near, a, b, 1e-3, potentials_init=cold.potentials)
    assert again.converged
    assert again.n_iter < 0.5 * cold.n_iter
    bad = ot.solve(M, a, b, 1e-3, potentials_init=(torch.rand(60, generator=gen), torch.rand(60, generator=gen)))
    assert bad.converged
    assert bad.n_iter == cold.n_iter + 1


def test_rounding_gives_marginals_to_the_last_digit(gen):
    M, a, b = cloud(30, 25, 2, gen)
    result = ot.solve(M, a, b, 0.01, tol=1e-3, round=True)
    P = result.plan
    torch.testing.assert_close(P.sum(1), a, rtol=1e-14, atol=1e-17)
    torch.testing.assert_close(P.sum(0), b, rtol=1e-14, atol=1e-17)
    assert float((P - ot.solve(M, a, b, 0.01, tol=1e-3).plan).abs().sum()) <= 2 * result.err


def test_the_sparse_plan_is_the_plan(gen):
    M, a, b = cloud(40, 30, 2, gen)
    result = ot.solve(M, a, b, 1e-4)
    sparse = result.sparse_plan
    assert sparse._nnz() < 0.3 * M.numel()
    torch.testing.assert_close(sparse.to_dense(), result.plan, rtol=0, atol=1e-12)
    array = ot.solve(M.numpy(), a.numpy(), b.numpy(), 1e-4).sparse_plan
    assert array.format == "coo"
    np.testing.assert_array_equal(array.toarray(), sparse.to_dense().numpy())


@pytest.mark.parametrize("method", ["newton", "sinkhorn", "sns", "ssns"])
def test_methods_agree(method, gen):
    M, a, b = cloud(25, 20, 2, gen)
    result = ot.solve(M, a, b, 0.05, method=method, tol=1e-11)
    assert result.method == method
    torch.testing.assert_close(result.plan, ot.solve(M, a, b, 0.05, tol=1e-13).plan, rtol=0, atol=1e-10)


def test_auto_is_sinkhorn_where_costs_hardly_differ(gen):
    M, a, b = cloud(10, 10, 2, gen)
    assert ot.solve(M, a, b, 0.2).method == "sinkhorn"
    assert ot.solve(M, a, b, 0.01).method == "newton"


@pytest.mark.parametrize("seed", range(60))
def test_float32_never_returns_nan(seed):
    gen = torch.Generator().manual_seed(seed)
    name = list(FAMILIES)[seed % len(FAMILIES)]
    eta = [10.0, 300.0, 1e4, 1e5, 1e6][seed % 5]
    M, a, b = (t.float() for t in FAMILIES[name](gen, n=36))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = ot.solve(M, a, b * a.sum() / b.sum(), 1 / eta)
    assert result.plan.dtype == torch.float32
    for part in (result.plan, result.value, result.value_linear, *result.potentials):
        assert bool(part.isfinite().all())
    # The default tolerance of float32; 36 rounded weights of the plan add their own 1e-7 each.
    assert result.err <= 1e-5


def test_float32_beyond_its_reach_is_solved_in_float64(gen):
    M, a, b = (t.float() for t in cloud(30, 30, 2, gen))
    result = ot.solve(M, a, b, 1e-5, tol=1e-9)
    assert result.converged
    assert result.potential_a.dtype == torch.float32
    assert float(result.value.double() - ot.solve(M.double(), a.double(), b.double(), 1e-5).value) < 1e-6


def test_regularisation_of_a_millionth_runs_without_a_warning(gen):
    M, a, b = cloud(40, 40, 2, gen)
    result = ot.solve(M, a, b, 1e-6)
    assert result.converged
    assert bool(result.plan.isfinite().all())


def test_anchors_of_real_images():
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    digits = load_digits()
    sides = []
    for k in (0, 1):
        x = zoom(digits.images[digits.target == k][0], 3.5, order=1).clip(0)
        x = x + 1e-3 * x.max()
        sides.append((x / x.sum()).ravel())
    grid = np.stack(np.meshgrid(np.arange(28.0), np.arange(28.0), indexing="ij"), -1).reshape(-1, 2)
    M = ((grid[:, None] - grid) ** 2).sum(-1)
    result = ot.solve(M / M.max(), *sides, reg=1 / 1200)
    # Computed by independent solvers to ten digits.
    assert result.value_linear == pytest.approx(0.0080988208, abs=1e-9)
    assert result.n_iter <= 30
    assert result.lower_bound <= 0.0074984542 + 1e-9


@pytest.mark.slow
def test_anchor_of_a_random_assignment():
    M = np.random.default_rng(0).random((500, 500))
    result = ot.solve(M, reg=1 / 1200)
    assert result.value_linear == pytest.approx(0.0034504129, abs=1e-9)
    assert result.lower_bound <= 0.0032219526 + 1e-9
    assert result.n_iter <= 30
