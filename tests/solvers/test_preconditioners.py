import dataclasses
import math
import pickle

import pytest
import torch

from stochproc.kernels import RBF, Linear
from stochproc.solvers import CG, Jacobi, Nystrom, PivotedCholesky, Preconditioner
from tests.solvers.linear_reference import spd

OPTIONS = [PivotedCholesky(8), Nystrom(8), Jacobi()]


def dense(P):
    return P.factor @ P.factor.mT + torch.diag_embed(P.diagonal)


def points(gen, *shape):
    return torch.randn(*shape, 3, generator=gen)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("noise", ["number", "vector"])
def test_apply_and_logdet_are_those_of_the_dense_matrix(gen, option, batch, noise):
    K = RBF()(points(gen, *batch, 20))
    s = 0.1 if noise == "number" else 0.1 + torch.rand(*batch, 20, generator=gen)
    P = option.build(K, s)
    full = dense(P)
    v = torch.randn(*batch, 20, 3, generator=gen)
    torch.testing.assert_close(P.apply(v), torch.linalg.solve(full, v))
    torch.testing.assert_close(P.apply(v[..., 0]), torch.linalg.solve(full, v)[..., 0])
    torch.testing.assert_close(P.logdet, torch.logdet(full))
    assert P.logdet.shape == batch
    assert P.rank == (0 if isinstance(option, Jacobi) else 8)
    assert P.name == type(option).__name__


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_draws_have_covariance_p(gen, option, batch):
    P = option.build(RBF()(points(gen, *batch, 5)), 0.1)
    n_draws = 40_000
    z = P.sample(n_draws, gen)
    assert z.shape == (*batch, 5, n_draws)
    full = dense(P)
    variance = full.diagonal(dim1=-2, dim2=-1)
    # Each entry of the sample covariance has variance (P_ii P_jj + P_ij^2) / draws; 5 standard errors, so a
    # new seed fails once in 10,000 times.
    error = ((variance.unsqueeze(-1) * variance.unsqueeze(-2) + full.square()) / n_draws).sqrt()
    assert ((z @ z.mT / n_draws - full).abs() <= 5 * error).all()
    assert (z.mean(-1).abs() <= 5 * (variance / n_draws).sqrt()).all()


def test_draws_repeat_with_the_seed():
    P = Jacobi().build(torch.eye(3))
    first, second = (P.sample(2, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert P.sample(0).shape == (3, 0)


@pytest.mark.parametrize("option", [PivotedCholesky, Nystrom])
@pytest.mark.parametrize("rank", [12, 50])
def test_full_rank_is_exact(gen, option, rank):
    K = spd(gen, 12, low=1e-3)
    P = option(rank).build(K, 0.01)
    assert P.rank == 12
    # Backward error of a factorisation: n eps, with room for the random sketch.
    torch.testing.assert_close(dense(P), K + 0.01 * torch.eye(12), rtol=0, atol=1e-13)
    v = torch.randn(12, 2, generator=gen)
    torch.testing.assert_close(P.apply((K + 0.01 * torch.eye(12)) @ v), v, rtol=0, atol=1e-10)


def test_pivots_are_greedy():
    # Diagonal entries are the pivots, largest first.
    P = PivotedCholesky(2).build(torch.diag(torch.tensor([1.0, 9.0, 4.0])), 1.0)
    torch.testing.assert_close(dense(P), torch.diag(torch.tensor([1.0, 10.0, 5.0])))


def test_nystrom_error_is_bounded_by_the_tail(gen):
    values = torch.logspace(0, -8, 60)
    Q = torch.linalg.qr(torch.randn(60, 60, generator=gen))[0]
    K = (Q * values) @ Q.mT
    P = Nystrom(20).build((K + K.mT) / 2, 1e-6)
    error = torch.linalg.matrix_norm(K - P.factor @ P.factor.mT, 2).item()
    # Frangella, Tropp and Udell, proposition 2.2 with p = 10: (1 + 2 (10 / 9)) lambda_11 + (2 e² 20 / 99) times the
    # mean tail, in expectation.
    bound = (1 + 20 / 9) * values[10] + 2 * math.e**2 * 20 / 99 * values[10:].sum()
    assert error <= bound
    # An approximation from below, to the rounding of the shift.
    assert torch.linalg.eigvalsh(K - P.factor @ P.factor.mT).min() >= -1e-13


def test_nystrom_needs_products_only(gen):
    K = RBF().operator(points(gen, 300))
    with torch.no_grad():
        expected = Nystrom(5).build(K.to_dense(), 0.1)
        torch.testing.assert_close(dense(Nystrom(5).build(K, 0.1)), dense(expected), rtol=0, atol=1e-10)
    assert torch.equal(Nystrom(5, seed=1).build(K, 0.1).factor, Nystrom(5, seed=1).build(K, 0.1).factor)
    assert not torch.equal(Nystrom(5, seed=1).build(K, 0.1).factor, Nystrom(5, seed=2).build(K, 0.1).factor)


@pytest.mark.parametrize("option", [PivotedCholesky(20), Nystrom(20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [1e-12, 1e-4, 0.0])
@pytest.mark.parametrize("case", ["linear kernel", "equal points", "duplicates", "zero", "batch of both"])
def test_rank_deficient_matrices_are_safe(gen, option, dtype, noise, case):
    x = points(gen, 30)
    K = {
        "linear kernel": Linear()(x),
        "equal points": torch.ones(30, 30),
        "duplicates": RBF()(x[:6].repeat(5, 1)),
        "zero": torch.zeros(30, 30),
        "batch of both": torch.stack([torch.ones(30, 30), spd(gen, 30)]),
    }[case]
    K = K.detach().to(dtype)
    P = option.build(K, noise)
    v = torch.randn(*K.shape[:-1], 2, generator=gen).to(dtype)
    assert P.apply(v).dtype == dtype
    assert P.apply(v).isfinite().all()
    assert P.logdet.isfinite().all()
    # The inverse is positive definite as applied, on the largest eigenvector of P too.
    vectors = torch.linalg.eigh(dense(P))[1]
    assert ((vectors * P.apply(vectors)).sum(-2) > 0).all()
    deepest = {"linear kernel": 4, "equal points": 1, "duplicates": 6, "zero": 0}.get(case)
    if deepest is not None and isinstance(option, PivotedCholesky):
        assert P.rank == deepest


def test_tiny_noise_is_raised_to_what_rounding_allows():
    P = PivotedCholesky(3).build(torch.ones(5, 5), 1e-30)
    torch.testing.assert_close(P.diagonal, torch.full((5,), 5e-14), rtol=1e-6, atol=0)


def test_without_noise_the_mean_remainder_takes_its_place():
    P = PivotedCholesky(1).build(torch.diag(torch.tensor([4.0, 1.0, 1.0])))
    torch.testing.assert_close(P.diagonal, torch.full((3,), 2 / 3))


def test_single_precision_is_applied_in_double():
    # Eigenvalues 1e10 apart: in float32 the inverse would be indefinite by rounding.
    P = PivotedCholesky(1).build(torch.ones(1000, 1000, dtype=torch.float32), 1e-7)
    v = torch.ones(1000, dtype=torch.float32)
    # The identity loses eps times 1e10 = 2e-6 of the result by cancellation, times the norm of the vector, 32.
    torch.testing.assert_close(P.apply(v), v / 1000, rtol=1e-3, atol=0)


def test_jacobi_is_the_diagonal_and_mends_what_is_not_positive():
    P = Jacobi().build(torch.diag(torch.tensor([2.0, 0.0, -3.0])), torch.tensor([1.0, 0.0, 0.0]))
    assert P.diagonal.tolist() == [3.0, 1.0, 1.0]
    assert P.factor.shape == (3, 0)


def test_nothing_carries_a_graph(gen):
    kernel = RBF()
    x = points(gen, 10).requires_grad_()
    noise = torch.tensor(0.1, requires_grad=True)
    for option in OPTIONS:
        P = option.build(kernel.operator(x), noise)
        assert not any(t.requires_grad for t in (P.factor, P.diagonal, P.logdet))


@pytest.mark.slow
def test_preconditioning_divides_the_iterations_by_three_and_more(gen):
    x = points(gen, 1000)
    noise = 1e-4
    b = x.sin().sum(-1) + 0.01 * torch.randn(1000, generator=gen)
    with torch.no_grad():
        K = RBF()(x)
    A = K + noise * torch.eye(1000)
    patient = CG(rtol=1e-3, patience=1000, max_iter=3000)
    plain = patient(A, b)
    assert plain.ok
    for option in (PivotedCholesky(100), Nystrom(100)):
        result = dataclasses.replace(patient, precond=option.build(K, noise))(A, b)
        assert result.ok
        assert (b - A @ result.value).norm() <= 1e-3 * b.norm()
        assert result.convergence.iterations <= plain.convergence.iterations / 3
        assert (result.stats["preconditioner"], result.stats["preconditioner_rank"]) == (type(option).__name__, 100)


def test_solver_takes_the_noise_off_an_operator(gen):
    x = points(gen, 200)
    b = torch.randn(200, generator=gen)
    with torch.no_grad():
        op = RBF().operator(x)
        for A in (
            op.add_jitter(0.01),
            op.add_diagonal(torch.full((200,), 0.01)),
            op.add_jitter(0.005).add_jitter(0.005),
        ):
            result = CG(rtol=1e-10, precond=PivotedCholesky(200))(A, b)
            # The preconditioner is then all of A.
            assert result.ok
            assert result.convergence.iterations <= 3
            torch.testing.assert_close(result.value, torch.linalg.solve(A.to_dense(), b), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "name"), [(1999, "none"), (2000, "PivotedCholesky")])
def test_automatic_choice_starts_at_two_thousand_rows_of_a_kernel(gen, n, name):
    x = points(gen, n)
    with torch.no_grad():
        result = CG(rtol=0.1)(RBF().operator(x).add_jitter(1.0), x[:, 0])
    assert result.stats["preconditioner"] == name


def test_automatic_choice_is_none_for_anything_else(gen):
    linear_operator = pytest.importorskip("linear_operator")
    n = 2000
    b = torch.randn(n, generator=gen)
    with torch.no_grad():
        bare = RBF().operator(20 * points(gen, n))
        for A in (
            torch.eye(n),
            linear_operator.to_linear_operator(torch.eye(n)).add_jitter(1.0),
            bare,
            lambda v: 2 * v,
        ):
            assert CG(max_iter=1)(A, b).stats["preconditioner"] == "none"


def test_automatic_choice_does_not_raise_where_the_solve_will_break_down(gen):
    x = points(gen, 2000)
    with torch.no_grad():
        result = CG()(RBF().operator(x).add_jitter(-2.0), x[:, 0])
    assert result.status.value == "breakdown"


@pytest.mark.slow
def test_kernel_solve_with_the_automatic_preconditioner_equals_the_dense_one(gen):
    x = points(gen, 2100)
    b = torch.randn(2100, 2, generator=gen)
    with torch.no_grad():
        A = RBF().operator(x).add_jitter(0.1)
        result = CG(rtol=1e-10)(A, b)
        full = A.to_dense()
    assert result.ok
    assert result.stats["preconditioner_rank"] == 100
    assert ((b - full @ result.value).norm(dim=0) <= 2e-10 * b.norm(dim=0)).all()


def test_own_objects_with_a_build_method_are_welcome(gen):
    @dataclasses.dataclass(frozen=True)
    class Twice:
        def build(self, A, noise=0.0):
            return Preconditioner("twice", A.new_zeros(4, 0), torch.full((4,), 2.0))

    result = CG(precond=Twice())(spd(gen, 4), torch.ones(4))
    assert result.ok
    assert result.stats["preconditioner"] == "twice"


def test_preconditioner_survives_pickling():
    P = PivotedCholesky(2).build(torch.eye(4), 0.1)
    again = pickle.loads(pickle.dumps(P))
    assert torch.equal(again.apply(torch.ones(4)), P.apply(torch.ones(4)))


@pytest.mark.parametrize("option", [PivotedCholesky, Nystrom])
def test_rejects_a_rank_below_one(option):
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        option(rank=0)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("shape", "noise", "message"),
    [
        ((3, 2), 0.1, "A must be square"),
        ((3, 3), -0.1, "noise must be non-negative"),
        ((3, 3), math.nan, "noise must be non-negative"),
        ((3, 3), torch.ones(2), r"noise must broadcast to the diagonal of A, \(3,\); got shape \(2,\)"),
    ],
)
def test_rejects_matrices_and_noise_that_do_not_fit(option, shape, noise, message):
    with pytest.raises(ValueError, match=message):
        option.build(torch.ones(shape), noise)


def test_rejects_a_callable_to_build_from():
    with pytest.raises(TypeError, match="A must be a tensor or a LinearOperator; got function"):
        Nystrom().build(lambda v: v, 0.1)


@pytest.mark.bad_input
def test_rejects_factors_that_do_not_fit():
    with pytest.raises(ValueError, match="factor must have shape"):
        Preconditioner("mine", torch.ones(3, 1), torch.ones(2))
    with pytest.raises(ValueError, match="diagonal must be positive"):
        Preconditioner("mine", torch.ones(2, 1), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="v must have 2 rows"):
        Preconditioner("mine", torch.ones(2, 1), torch.ones(2)).apply(torch.ones(3))
    with pytest.raises(TypeError, match="factor must be float32 or float64"):
        Preconditioner("mine", torch.ones(2, 1, dtype=torch.int64), torch.ones(2))


def test_device_preconditioner_matches_the_dense_matrix(gen, device):
    K = RBF()(points(gen, 20)).detach().to(device)
    v = torch.randn(20, 2, generator=gen).to(device)
    for option in OPTIONS:
        P = option.build(K, 0.1)
        torch.testing.assert_close(P.apply(v), torch.linalg.solve(dense(P), v))
        assert P.sample(2, gen).device.type == device.type
