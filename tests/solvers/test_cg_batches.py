import math

import pytest
import torch

from stochproc.kernels import RBF
from stochproc.solvers import CG, Jacobi, PivotedCholesky, Preconditioner, Status
from stochproc.solvers._cg_iteration import descend
from tests.solvers.linear_reference import relative_residual, spd


def test_batch_of_very_different_conditioning_matches_dense_solves(gen):
    A = torch.stack([spd(gen, 60, low=low) for low in (0.5, 1e-2, 1e-4)])
    b = torch.randn(3, 60, 4, generator=gen)
    result = CG(rtol=1e-12, max_iter=2000)(A, b)
    assert result.ok
    assert relative_residual(A, result.value, b) <= 1.01e-12
    expected = torch.linalg.solve(A, b)
    # Error of x at most condition number times relative residual, and that of the dense solve.
    torch.testing.assert_close(result.value, expected, rtol=0, atol=2e-12 * 1e4 * expected.norm().item())
    iterations = result.stats["iterations"]
    assert iterations.shape == (3, 4)
    assert iterations[0].max() < iterations[1].min() < iterations[2].min()
    assert result.convergence.iterations == iterations.max()


def test_each_column_equals_its_own_solve(gen):
    A, b = spd(gen, 40, low=1e-3), torch.randn(40, 5, generator=gen)
    b[:, 2] = torch.linalg.eigh(A)[1][:, 0]
    b[:, 3] = 0
    together = CG(rtol=1e-8)(A, b)
    assert together.stats["iterations"][2] == 1
    assert together.stats["iterations"][3] == 0
    for j in range(5):
        alone = CG(rtol=1e-8)(A, b[:, j])
        # Products with one and five columns round differently.
        assert abs(alone.stats["iterations"] - together.stats["iterations"][j]) <= 2
        torch.testing.assert_close(together.value[:, j], alone.value, rtol=1e-6, atol=1e-10)


def test_columns_that_have_converged_leave_the_product(gen):
    A = spd(gen, 64, low=1e-4)
    vectors = torch.linalg.eigh(A)[1]
    # Seven columns of one eigenvector each end after one iteration, the last takes many.
    b = torch.cat([vectors[:, :7], torch.randn(64, 1, generator=gen)], 1)
    widths = []

    def product(V):
        widths.append(V.shape[-1])
        return A @ V

    tol = 1e-8 * b.norm(dim=0)
    code = torch.zeros(8, dtype=torch.int64)
    state = descend(b, tol, code, product=product, precondition=None, budget=500, shrink=True)
    assert widths[0] == 8
    assert set(widths[1:]) == {1}
    assert relative_residual(A, state.solution(), b) <= 1.1e-8
    assert (state.iterations[:7] == 1).all()
    # A callable may treat columns differently, so it always sees all of them.
    seen = set()

    def by_column(V):
        seen.add(V.shape[-1])
        return A @ V * scale

    scale = torch.linspace(1, 2, 8)
    result = CG(rtol=1e-8)(by_column, b)
    assert result.ok
    assert seen == {8}
    assert relative_residual(A, result.value * scale, b) <= 1.01e-8


def test_history_keeps_the_norms_of_columns_that_have_left(gen):
    A = spd(gen, 30, low=1e-3)
    b = torch.cat([torch.linalg.eigh(A)[1][:, :3], torch.randn(30, 1, generator=gen)], 1)
    result = CG(keep_history=True)(A, b)
    history = result.convergence.history
    assert history.shape == (result.convergence.iterations + 1, 4)
    assert (history[1:, :3] == history[1, :3]).all()
    torch.testing.assert_close(history[-1], result.stats["residual"], rtol=1e-3, atol=1e-12)


def test_number_of_dimensions_tells_vectors_from_columns(gen):
    A = torch.stack([spd(gen, 3), spd(gen, 3), spd(gen, 3)])
    b = torch.randn(3, 3, generator=gen)
    vectors = CG(rtol=1e-12)(A, b)
    assert vectors.stats["iterations"].shape == (3,)
    torch.testing.assert_close(vectors.value, torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1))
    columns = CG(rtol=1e-12)(A[0], b)
    torch.testing.assert_close(columns.value, torch.linalg.solve(A[0], b))
    both = CG(rtol=1e-12)(A, b.expand(3, 3, 3))
    torch.testing.assert_close(both.value, torch.linalg.solve(A, b.expand(3, 3, 3)))


def test_batch_shapes_broadcast(gen):
    A, b = spd(gen, 2, 1, 6), torch.randn(1, 4, 6, 2, generator=gen)
    result = CG(rtol=1e-12)(A, b, torch.randn(6, 2, generator=gen))
    assert result.ok
    torch.testing.assert_close(result.value, torch.linalg.solve(A, b))


def test_callable_sees_the_shape_of_b(gen):
    A = spd(gen, 7)
    for shape in ((7,), (7, 3), (2, 7, 3)):
        seen = set()

        def record(v, seen=seen):
            seen.add(tuple(v.shape))
            return A @ v

        result = CG(precond=lambda v, seen=seen: seen.add(tuple(v.shape)) or v)(
            record, torch.randn(*shape, generator=gen)
        )
        assert result.ok
        assert seen == {shape}


def test_one_bad_column_does_not_spoil_the_others(gen):
    A, b = spd(gen, 20), torch.randn(20, 3, generator=gen)
    b[4, 1] = math.nan
    result = CG(rtol=1e-10)(A, b)
    assert result.status is Status.NONFINITE
    assert (result.value[:, 1] == 0).all()
    good = [0, 2]
    assert relative_residual(A, result.value[:, good], b[:, good]) <= 1e-10
    assert result.stats["residual"].isfinite().tolist() == [True, False, True]
    assert "1 of 3 columns" in result.convergence.message


def test_status_is_that_of_the_worst_matrix(gen):
    A = torch.stack([spd(gen, 5), -spd(gen, 5)])
    b = torch.randn(2, 5, generator=gen)
    result = CG(rtol=1e-10)(A, b)
    assert result.status is Status.BREAKDOWN
    assert result.stats["status"].tolist() == [1, 5]
    assert relative_residual(A[0], result.value[0, :, None], b[0, :, None]) <= 1e-10
    A[1] = math.nan
    result = CG(rtol=1e-10)(A, b)
    assert result.status is Status.NONFINITE
    assert relative_residual(A[0], result.value[0, :, None], b[0, :, None]) <= 1e-10
    assert result.value.isfinite().all()


def test_singular_batch_with_a_projection(gen):
    L = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 1.0]])
    b = torch.randn(4, 3, 2, generator=gen)
    b = b - b.mean(-2, keepdim=True)
    result = CG(project=lambda v: v - v.mean(-2, keepdim=True))(L.expand(4, 3, 3), b)
    assert result.ok
    assert relative_residual(L, result.value, b) <= 1e-6
    assert result.value.sum(-2).abs().max() < 1e-12


@pytest.mark.parametrize("precond", ["auto", None, Jacobi(), PivotedCholesky(20)])
def test_batch_of_kernel_operators_equals_dense_solves(gen, precond):
    x = torch.randn(2, 50, 3, generator=gen)
    K = RBF(lengthscale=torch.tensor([[0.5], [2.0]]), batch_shape=(2,)).operator(x).add_jitter(1e-2)
    b = torch.randn(2, 50, 3, generator=gen)
    with torch.no_grad():
        dense = K.to_dense()
        result = CG(rtol=1e-10, precond=precond)(K, b)
    assert result.ok
    assert relative_residual(dense, result.value, b) <= 1.01e-10
    torch.testing.assert_close(result.value, torch.linalg.solve(dense, b), rtol=0, atol=1e-5)


def test_rejects_a_batched_preconditioner_for_a_single_system():
    P = Preconditioner("mine", torch.zeros(2, 3, 0), torch.ones(2, 3))
    with pytest.raises(ValueError, match="precond has batch shape"):
        CG(precond=P)(torch.eye(3), torch.ones(3))
