import math

import pytest
import torch

from stochproc.solvers import Jacobi, LanczosLogdet, Nystrom, PivotedCholesky, Preconditioner, Status
from stochproc.solvers._lanczos import logdet_from_probes
from stochproc.solvers._lanczos_basis import lanczos
from tests.solvers.spd_systems import all_directions, dense, kernel_system, some_preconditioner, spd, spectrum

EPS = torch.finfo(torch.float64).eps


def test_basis_is_orthonormal_and_reproduces_the_matrix(gen):
    A, start = spd(gen, 30), torch.randn(30, 2, generator=gen)
    basis = lanczos(lambda V: A @ V, start, 12)
    Q = basis.W
    torch.testing.assert_close(Q @ Q.mT, torch.eye(12).expand(2, 12, 12), rtol=0, atol=1e-14)
    torch.testing.assert_close(Q @ A @ Q.mT, basis.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(Q[:, 0], (start / start.norm(dim=0)).mT)


def test_preconditioned_basis_is_that_of_the_preconditioned_matrix(gen):
    A, start = spd(gen, 20), torch.randn(20, 3, generator=gen)
    P = some_preconditioner(gen, 20)
    basis = lanczos(lambda V: A @ V, start, 8, P.apply)
    R = torch.linalg.cholesky(dense(P))
    M = torch.linalg.solve(R, torch.linalg.solve(R, A).mT)
    plain = lanczos(lambda V: M @ V, torch.linalg.solve(R, start), 8)
    torch.testing.assert_close(basis.T, plain.T, rtol=0, atol=1e-11 * float(plain.T.max()))


@pytest.mark.parametrize("preconditioned", [False, True])
def test_all_steps_and_all_directions_give_the_exact_value(gen, preconditioned):
    n = 25
    A = spd(gen, n)
    P = some_preconditioner(gen, n) if preconditioned else None
    z = all_directions(n) if P is None else torch.linalg.cholesky(dense(P)) @ all_directions(n)
    result = logdet_from_probes(LanczosLogdet(steps=n), A, z, P)
    assert result.ok
    assert result.convergence.residual == 0.0
    # Ritz values lose n * condition * eps; the condition of both matrices is below 100.
    assert float(result.value.value) == pytest.approx(float(A.logdet()), abs=n * n * 100 * EPS)


def test_exhausted_space_of_a_preconditioned_matrix_adds_nothing(gen):
    # Pivots are matched exactly, so M has the eigenvalue 1 thirty times and its spaces 71 dimensions.
    K, A, exact = kernel_system("matern", 100, 1e-2)
    P = PivotedCholesky(30).build(K, 1e-2)
    z = torch.linalg.cholesky(dense(P)) @ all_directions(100)
    result = logdet_from_probes(LanczosLogdet(steps=100), A.to_dense().detach(), z, P)
    assert result.ok
    assert int(result.stats["steps"].max()) < 100
    assert float(result.stats["smallest_ritz"]) == pytest.approx(1.0, abs=1e-8)
    # Applications of P lose its condition, 1e4, in each of 100 logarithms.
    assert float(result.value.value) == pytest.approx(exact, abs=100 * 1e4 * 100 * EPS)


def test_length_of_a_probe_does_not_matter(gen):
    A, z = spd(gen, 12).requires_grad_(), torch.randn(12, 4, generator=gen)
    found = [logdet_from_probes(LanczosLogdet(steps=6), A, z * s).value.value for s in (1.0, 7.3)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(*(torch.autograd.grad(v, A)[0] for v in found))


@pytest.mark.parametrize("n", [1, 7, 200])
def test_identity_is_exact_in_one_step(n):
    result = LanczosLogdet()(torch.eye(n))
    assert result.ok
    assert float(result.value.value) == pytest.approx(0.0, abs=n * 4 * EPS)
    assert float(result.value.stderr) <= n * 4 * EPS
    assert result.convergence.iterations == 1
    assert result.convergence.residual == 0.0


def test_one_row_is_exact():
    result = LanczosLogdet()(torch.tensor([[3.0]]))
    assert result.ok
    assert float(result.value.value) == pytest.approx(math.log(3), rel=4 * EPS)
    assert float(result.value.stderr) == 0.0


def test_signs_are_exact_for_a_diagonal_matrix(gen):
    # w' log(D) w is the trace for every vector of signs.
    d = 0.1 + torch.rand(40, generator=gen)
    result = LanczosLogdet(steps=40)(torch.diag(d))
    assert result.ok
    assert float(result.value.value) == pytest.approx(float(d.log().sum()), abs=1e-12)
    assert float(result.value.stderr) <= 1e-12


def test_probe_stops_exactly_on_an_invariant_subspace(gen):
    # Three distinct eigenvalues: every Krylov space has dimension three.
    d = torch.tensor([0.5, 2.0, 8.0]).repeat(20)
    z = torch.randn(60, 6, generator=gen)
    result = logdet_from_probes(LanczosLogdet(), torch.diag(d), z)
    assert result.ok
    assert result.stats["steps"].tolist() == [3] * 6
    assert result.stats["products"] == 3
    assert result.convergence.residual == 0.0
    exact = 60 * (d.log().unsqueeze(-1) * (z / z.norm(dim=0)).square()).sum(0)
    torch.testing.assert_close(result.stats["probe_values"], exact, rtol=0, atol=60 * 60 * 16 * EPS)


def test_invariant_subspace_blurred_by_rounding_is_as_exact(gen):
    A, z = spectrum(gen, torch.tensor([0.5, 2.0, 8.0]).repeat(20)), torch.randn(60, 6, generator=gen)
    result = logdet_from_probes(LanczosLogdet(), A, z)
    assert result.ok
    values, Q = torch.linalg.eigh(A)
    exact = 60 * (values.log().unsqueeze(-1) * (Q.mT @ (z / z.norm(dim=0))).square()).sum(0)
    torch.testing.assert_close(result.stats["probe_values"], exact, rtol=0, atol=60 * 60 * 16 * EPS)
    assert result.convergence.residual <= 60 * 60 * 16 * EPS


def test_probes_of_one_call_may_stop_at_different_steps():
    A = torch.diag(torch.arange(1.0, 9.0))
    z = torch.ones(8, 3)
    z[1:, 1] = 0.0
    z[2:, 2] = 0.0
    result = logdet_from_probes(LanczosLogdet(), A, z)
    assert result.ok
    assert result.stats["steps"].tolist() == [8, 1, 2]
    expected = torch.tensor([math.lgamma(9), 8 * math.log(1), 4 * math.log(2)])
    torch.testing.assert_close(result.stats["probe_values"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1e200])
def test_scale_of_the_matrix_only_adds_to_the_value(gen, scale):
    A = spd(gen, 15)
    plain, scaled = (LanczosLogdet(steps=15)(A * s) for s in (1.0, scale))
    assert scaled.ok
    assert float(scaled.value.value) == pytest.approx(float(plain.value.value) + 15 * math.log(scale), rel=1e-11)
    assert float(scaled.value.stderr) == pytest.approx(float(plain.value.stderr), rel=1e-9)


@pytest.mark.parametrize("name", ["rbf", "matern"])
@pytest.mark.parametrize(("noise", "steps"), [(1e-2, 60), (1e-4, 150)])
def test_estimate_is_within_its_standard_error_of_the_dense_value(name, noise, steps):
    _, A, exact = kernel_system(name, 300, noise)
    A = A.to_dense().detach()
    for seed in range(3):
        result = LanczosLogdet(steps=steps, seed=seed)(A)
        assert result.ok
        # t with 15 degrees of freedom: beyond 4 once in 860; 12 fixed draws in all.
        assert abs(float(result.value.value) - exact) <= 4 * float(result.value.stderr)


@pytest.mark.parametrize(
    ("name", "noise", "factor"), [("rbf", 1e-2, 100), ("rbf", 1e-4, 10), ("matern", 1e-2, 3), ("matern", 1e-4, 2)]
)
def test_pivoted_cholesky_cuts_the_standard_error(name, noise, factor):
    K, A, exact = kernel_system(name, 300, noise)
    P = PivotedCholesky(100).build(K, noise)
    A = A.to_dense().detach()
    # The spread of w' log(A) w over signs is 2 |log A|² less its diagonal, in closed form.
    values, Q = torch.linalg.eigh(A)
    log_A = (Q * values.log()) @ Q.mT
    plain = math.sqrt(2 / 16) * float((log_A - torch.diag(log_A.diagonal())).norm())
    for seed in range(3):
        result = LanczosLogdet(seed=seed)(A, P)
        assert result.ok
        # 12 fixed draws; rounding of P at condition 1e6 stands in where the spread is less.
        assert abs(float(result.value.value) - exact) <= 4 * float(result.value.stderr) + 1e-8
        assert float(result.value.stderr) < plain / factor


@pytest.mark.parametrize("option", [Jacobi(), Nystrom(30), PivotedCholesky(30)])
def test_every_preconditioner_leaves_the_expectation_alone(gen, option):
    K, _, _ = kernel_system("matern", 100, 1e-2)
    scale = torch.diag(0.5 + torch.rand(100, generator=gen))
    K = scale @ K.to_dense().detach() @ scale
    A = K + 1e-2 * torch.eye(100)
    result = LanczosLogdet(probes=32, steps=60)(A, option.build(K, 1e-2))
    assert result.ok
    assert abs(float(result.value.value) - float(A.logdet())) <= 4 * float(result.value.stderr) + 1e-9


def test_exact_preconditioner_leaves_no_spread(gen):
    P = some_preconditioner(gen, 30)
    result = LanczosLogdet()(dense(P), P)
    assert result.ok
    assert float(result.value.value) == pytest.approx(float(dense(P).logdet()), abs=1e-12)
    assert float(result.value.stderr) < 1e-12


def test_batch_agrees_with_its_items(gen):
    A, z = spd(gen, 2, 3, 9), torch.randn(2, 3, 9, 5, generator=gen)
    P = some_preconditioner(gen, 9, 2, 3)
    for precond in (None, P):
        result = logdet_from_probes(LanczosLogdet(steps=7), A, z, precond)
        assert result.value.value.shape == result.value.stderr.shape == (2, 3)
        for i in range(2):
            for j in range(3):
                one = precond and Preconditioner("one", P.factor[i, j], P.diagonal[i, j])
                single = logdet_from_probes(LanczosLogdet(steps=7), A[i, j], z[i, j], one)
                torch.testing.assert_close(result.value.value[i, j], single.value.value, rtol=1e-11, atol=1e-11)
                torch.testing.assert_close(result.value.stderr[i, j], single.value.stderr, rtol=1e-9, atol=1e-11)
                torch.testing.assert_close(
                    result.stats["truncation"][i, j], single.stats["truncation"], rtol=1e-5, atol=0
                )


def test_batch_shares_an_unbatched_preconditioner(gen):
    A = spd(gen, 4, 12)
    result = LanczosLogdet(probes=200, steps=12)(A, some_preconditioner(gen, 12))
    assert result.ok
    # 4 normal deviates: beyond 4 once in 16,000.
    assert bool(((result.value.value - A.logdet()).abs() <= 4 * result.value.stderr).all())


def test_tensor_operator_and_callable_give_the_same_estimate():
    _, A, _ = kernel_system("rbf", 120, 1e-2)
    matrix = A.to_dense().detach()
    found = [
        LanczosLogdet()(A).value,
        LanczosLogdet()(matrix).value,
        LanczosLogdet()(lambda V: matrix @ V, like=matrix[0]).value,
    ]
    for other in found[1:]:
        # Condition 1e4 in the smallest Ritz values.
        torch.testing.assert_close(other.value.detach(), found[0].value.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(other.stderr, found[0].stderr, rtol=1e-6, atol=0)


def test_equal_seeds_give_equal_bits(gen):
    A = spd(gen, 20)
    P = some_preconditioner(gen, 20)
    for precond in (None, P):
        first, second, other = (LanczosLogdet(seed=s)(A, precond).value for s in (3, 3, 4))
        assert torch.equal(first.value, second.value)
        assert torch.equal(first.stderr, second.stderr)
        assert not torch.equal(first.value, other.value)


def test_generator_replaces_the_seed_and_moves_on(gen):
    A = spd(gen, 20)
    stream = torch.Generator().manual_seed(5)
    first, second = (LanczosLogdet()(A, generator=stream).value.value for _ in range(2))
    assert torch.equal(first, LanczosLogdet(seed=5)(A).value.value)
    assert not torch.equal(first, second)


def test_spread_of_seeds_is_the_standard_error(gen):
    A = spd(gen, 20)
    found = [LanczosLogdet(probes=8, steps=12, seed=s)(A).value for s in range(100)]
    values = torch.stack([f.value for f in found])
    claimed = torch.stack([f.stderr for f in found]).square().mean().sqrt()
    # A ratio of standard deviations with 100 and 700 degrees of freedom: 7.6 % is one sigma.
    assert float(values.std() / claimed) == pytest.approx(1.0, abs=0.3)
    assert abs(float(values.mean() - A.logdet())) <= 4 * float(values.std()) / 10


def test_float32_stays_float32_and_close():
    _, A, exact = kernel_system("matern", 200, 1e-2)
    A = A.to_dense().detach()
    wide, narrow = LanczosLogdet()(A), LanczosLogdet()(A.float().requires_grad_())
    assert narrow.ok
    assert narrow.value.value.dtype == narrow.value.stderr.dtype == torch.float32
    assert narrow.stats["probe_values"].dtype == torch.float64
    # Rounding moves each of 200 eigenvalues by about eps |A| = 1e-5, 1e-3 of the smallest.
    assert float(narrow.value.value.detach()) == pytest.approx(float(wide.value.value), abs=0.2)
    assert abs(float(narrow.value.value.detach()) - exact) <= 4 * float(narrow.value.stderr)
    P = PivotedCholesky(50).build(A.float() - 1e-2 * torch.eye(200, dtype=torch.float32), 1e-2)
    better = LanczosLogdet()(A.float(), P)
    assert better.ok
    assert better.value.value.dtype == torch.float32
    assert abs(float(better.value.value) - exact) <= 4 * float(better.value.stderr) + 0.2


@pytest.mark.parametrize("low", [-1e-3, 0.0])
def test_indefinite_or_singular_matrix_breaks_down(gen, low):
    values = torch.linspace(1.0, 2.0, 20)
    values[3] = low
    A = torch.stack([spd(gen, 20), spectrum(gen, values)]).requires_grad_()
    result = LanczosLogdet()(A)
    assert result.status is Status.BREAKDOWN
    assert result.stats["failed"].tolist() == [False, True]
    assert bool(result.value.value[1].isnan())
    assert float(result.value.stderr[1]) == math.inf
    assert result.convergence.residual == math.inf
    assert "not positive definite beyond rounding" in result.convergence.message
    assert "1 of 2 matrices, the first at (1,)" in result.convergence.message
    # The good item is what it would be alone, and its gradient survives.
    (gradient,) = torch.autograd.grad(result.value.value[0], A)
    assert bool(gradient.isfinite().all())
    assert bool(gradient[0].any())
    assert not bool(gradient[1].any())


@pytest.mark.parametrize("A", [torch.zeros(3, 3), -torch.eye(3), torch.ones(50, 50)])
def test_plain_cases_that_are_not_definite_break_down(A):
    result = LanczosLogdet()(A.double())
    assert result.status is Status.BREAKDOWN
    assert bool(result.value.value.isnan())


def test_asymmetric_matrix_breaks_down(gen):
    A = 40 * torch.eye(30) + torch.randn(30, 30, generator=gen)
    result = LanczosLogdet()(A)
    assert result.status is Status.BREAKDOWN
    assert "not symmetric" in result.convergence.message


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_product_is_reported(gen, bad):
    A = spd(gen, 2, 5)
    A[0, 2, 1] = bad
    result = LanczosLogdet()(A)
    assert result.status is Status.NONFINITE
    assert result.stats["failed"].tolist() == [True, False]
    assert bool(result.value.value[0].isnan())
    assert bool(result.value.value[1].isfinite())
    assert "holds NaN or infinity (1 of 2 matrices, the first at (0,))" in result.convergence.message


def test_input_is_not_modified(gen):
    A = spd(gen, 6)
    before = A.clone()
    LanczosLogdet()(A)
    assert torch.equal(A, before)


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("probes", 1, "probes must be at least 2"),
        ("steps", 0, "steps must be at least 1"),
        ("seed", -1, "seed must be at least 0"),
        ("rtol", -1.0, "rtol must be non-negative"),
        ("solve_rtol", 0.0, "solve_rtol must be positive"),
    ],
)
def test_rejects_options_out_of_range(option, value, match):
    with pytest.raises(ValueError, match=match):
        LanczosLogdet(**{option: value})


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0)])
def test_rejects_what_is_not_square(shape):
    with pytest.raises(ValueError, match="A must"):
        LanczosLogdet()(torch.ones(shape))


@pytest.mark.bad_input
@pytest.mark.parametrize("A", [torch.eye(2, dtype=torch.int64), torch.eye(2, dtype=torch.complex128), [[1.0]], None])
def test_rejects_other_kinds(A):
    with pytest.raises(TypeError, match="A must be"):
        LanczosLogdet()(A)


@pytest.mark.bad_input
def test_rejects_a_callable_without_the_shape_of_its_vectors():
    with pytest.raises(ValueError, match="like must be given"):
        LanczosLogdet()(lambda V: V)
    with pytest.raises(ValueError, match="like must be None for a matrix"):
        LanczosLogdet()(torch.eye(2), like=torch.ones(2))
    with pytest.raises(TypeError, match="like must be float32 or float64"):
        LanczosLogdet()(lambda V: V, like=torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="A must return the shape"):
        LanczosLogdet()(lambda V: V[:1], like=torch.ones(2))


@pytest.mark.bad_input
def test_rejects_what_is_no_preconditioner(gen):
    with pytest.raises(TypeError, match="precond must be None or a Preconditioner"):
        LanczosLogdet()(torch.eye(3), PivotedCholesky())
    with pytest.raises(ValueError, match="precond must fit the batch"):
        LanczosLogdet()(torch.eye(3), some_preconditioner(gen, 3, 2))
    with pytest.raises(ValueError, match="precond must have 3 rows"):
        LanczosLogdet()(torch.eye(3), some_preconditioner(gen, 4))
