import math

import pytest
import torch

from stochproc.exceptions import SolverError
from stochproc.solvers import CG, Jacobi, Status
from tests.solvers.linear_reference import centre, laplacian, relative_residual, spd


def test_two_unknowns_match_the_closed_form():
    result = CG(rtol=1e-12)(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0]))
    assert result.ok
    # Cramer's rule: (3 - 2, 8 - 1) / 11.
    torch.testing.assert_close(result.value, torch.tensor([1.0, 7.0]) / 11)
    assert result.convergence.iterations == 2


def test_iterations_are_at_most_the_number_of_distinct_eigenvalues(gen):
    Q = torch.linalg.qr(torch.randn(40, 40, generator=gen))[0]
    A = (Q * torch.tensor([1.0, 2.0, 5.0, 9.0]).repeat(10)) @ Q.mT
    result = CG(rtol=1e-10)(A, torch.randn(40, generator=gen))
    assert result.ok
    assert result.convergence.iterations == 4


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-12])
def test_converged_means_that_the_true_residual_is_small(gen, rtol):
    A, b = spd(gen, 50, low=1e-3), torch.randn(50, generator=gen)
    result = CG(rtol=rtol)(A, b)
    assert result.ok
    true = (b - A @ result.value).norm().item()
    assert true <= rtol * b.norm().item() * (1 + 1e-12)
    # Recomputed by the same product: equal to rounding of the norm.
    assert result.convergence.residual == pytest.approx(true, rel=1e-3, abs=1e-14)
    assert result.convergence.tolerance == pytest.approx(rtol * b.norm().item(), rel=1e-14)
    assert result.convergence.message == ""
    assert result.unwrap() is result.value


def test_absolute_tolerance_is_in_the_unit_of_b(gen):
    A, b = spd(gen, 30, low=1e-3), 1e3 * torch.randn(30, generator=gen)
    result = CG(rtol=0, atol=0.5)(A, b)
    assert result.ok
    assert (b - A @ result.value).norm() <= 0.5
    assert result.convergence.tolerance == 0.5
    assert CG(rtol=0, atol=2 * b.norm().item())(A, b).stats["iterations"] == 0


def test_callable_and_operator_give_what_the_tensor_gives(gen):
    operators = pytest.importorskip("linear_operator")
    A, b = spd(gen, 20), torch.randn(20, generator=gen)
    expected = CG()(A, b)
    assert torch.equal(CG()(lambda v: A @ v, b).value, expected.value)
    assert torch.equal(CG()(operators.to_linear_operator(A), b).value, expected.value)
    assert expected.stats["products"] == expected.convergence.iterations + 1


def test_without_verification_the_last_product_is_saved(gen):
    A, b = spd(gen, 20), torch.randn(20, generator=gen)
    result = CG(verify=False)(A, b)
    assert result.ok
    assert result.stats["products"] == result.convergence.iterations
    assert relative_residual(A, result.value[:, None], b[:, None]) <= 1.01e-6


def test_warm_start_takes_fewer_iterations(gen):
    A, b = spd(gen, 100, low=1e-4), torch.randn(100, generator=gen)
    exact = torch.linalg.solve(A, b)
    cold = CG(rtol=1e-8)(A, b)
    warm = CG(rtol=1e-8)(A, b, exact + 1e-6 * torch.randn(100, generator=gen))
    assert warm.ok
    assert warm.convergence.iterations < cold.convergence.iterations
    done = CG(rtol=1e-8)(A, b, exact)
    assert done.convergence.iterations == 0
    assert torch.equal(done.value, exact)


def test_zero_right_side_gives_exactly_zero(gen):
    A = spd(gen, 5)
    for x0 in (None, torch.ones(5)):
        result = CG()(A, torch.zeros(5), x0)
        assert result.ok
        assert result.convergence.iterations == 0
        assert result.convergence.residual == 0
        assert torch.equal(result.value, torch.zeros(5))


def test_one_unknown():
    result = CG()(torch.tensor([[4.0]]), torch.tensor([2.0]))
    assert result.ok
    assert result.value.tolist() == [0.5]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)])
def test_empty_systems_are_solved(shape):
    n = shape[0]
    result = CG()(torch.eye(n), torch.zeros(shape))
    assert result.ok
    assert result.value.shape == shape


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_scale_of_the_right_side_does_not_matter(gen, scale):
    A, b = spd(gen, 20), torch.randn(20, generator=gen)
    expected = CG(rtol=1e-10)(A, b).value
    result = CG(rtol=1e-10)(A, scale * b)
    assert result.ok
    torch.testing.assert_close(result.value / scale, expected, rtol=1e-9, atol=1e-12)


def test_scale_of_a_single_precision_right_side_does_not_matter(gen):
    A, b = spd(gen, 20, dtype=torch.float32), torch.randn(20, generator=gen, dtype=torch.float32)
    # 1e-36 times the tolerance lies below the smallest normal number, 1.2e-38.
    result = CG(rtol=1e-4)(A, 1e-36 * b)
    assert relative_residual(A, 1e36 * result.value.double()[:, None], b[:, None]) <= 1.1e-4


def test_max_iter_of_one_is_not_a_success(gen):
    A, b = spd(gen, 20), torch.randn(20, generator=gen)
    result = CG(max_iter=1)(A, b)
    assert result.status is Status.MAX_ITER
    assert not result.ok
    assert result.convergence.iterations == 1
    # One step of steepest descent from zero, or zero, whichever has the smaller residual.
    step = b.dot(b) / b.dot(A @ b) * b
    best = min((torch.zeros(20), step), key=lambda x: (b - A @ x).norm())
    torch.testing.assert_close(result.value, best)
    assert result.convergence.residual == pytest.approx((b - A @ best).norm().item(), rel=1e-12)
    with pytest.raises(SolverError, match=r"max_iter.*raise max_iter"):
        result.unwrap()


def test_value_is_the_best_iterate_and_not_the_last(gen):
    # Residual norms of conjugate gradients rise and fall where the spectrum is wide.
    A, b = spd(gen, 40, low=1e-6), torch.randn(40, generator=gen)
    iterates = []
    result = CG(rtol=1e-14, max_iter=25, keep_history=True)(A, b, callback=lambda s: iterates.append(s.value.clone()))
    norms = torch.tensor([(b - A @ x).norm() for x in [torch.zeros(40), *iterates]])
    assert norms.argmin() < 25
    assert result.status is Status.MAX_ITER
    assert result.convergence.residual == pytest.approx(norms.min().item(), rel=1e-6)
    # The recursion follows the true residual to rounding here.
    torch.testing.assert_close(result.convergence.history, norms, rtol=1e-6, atol=1e-10)


def test_singular_consistent_system_with_its_null_space_projected_out(gen):
    L = laplacian(30)
    x = centre(torch.randn(30, generator=gen))
    result = CG(rtol=1e-10, project=centre)(L, L @ x)
    assert result.ok
    # Condition number of the path's Laplacian is about (2 n / pi)^2 = 365.
    torch.testing.assert_close(result.value, x, rtol=0, atol=1e-6)
    assert abs(result.value.sum().item()) < 1e-12


def test_projection_removes_the_null_part_of_a_start(gen):
    L, b = laplacian(10), centre(torch.randn(10, generator=gen))
    result = CG(project=centre)(L, b, torch.full((10,), 7.0))
    assert result.ok
    assert abs(result.value.sum().item()) < 1e-12


@pytest.mark.parametrize(("project", "verify"), [(None, True), (centre, True), (centre, False)])
def test_singular_inconsistent_system_is_never_a_success(gen, project, verify):
    L, b = laplacian(30), centre(torch.randn(30, generator=gen)) + 0.1
    result = CG(project=project, verify=verify)(L, b)
    assert not result.ok
    assert result.status in (Status.BREAKDOWN, Status.STAGNATED)
    # Least squares leaves 0.1 in each of 30 entries.
    assert result.convergence.residual >= 0.1 * math.sqrt(30) * (1 - 1e-6)
    if project is not None:
        assert result.status is Status.STAGNATED
        assert "outside the range" in result.convergence.message
        best = torch.linalg.lstsq(L, b[:, None], driver="gelsd").solution[:, 0]
        torch.testing.assert_close(result.value, best, rtol=0, atol=1e-3)


def test_negative_curvature_at_once_gives_the_preconditioned_residual():
    A, b = torch.diag(torch.tensor([1.0, -4.0])), torch.tensor([0.5, 1.0])
    assert b @ A @ b < 0
    result = CG(precond=lambda v: v / 2)(A, b)
    assert result.status is Status.BREAKDOWN
    assert result.convergence.iterations == 0
    assert torch.equal(result.value, b / 2)
    assert result.convergence.residual == pytest.approx((b - A @ b / 2).norm().item())
    assert "not positive definite" in result.convergence.message


def test_negative_curvature_at_once_keeps_a_start_that_was_given():
    A, b = torch.diag(torch.tensor([1.0, -4.0])), torch.tensor([0.5, 1.0])
    x0 = torch.tensor([0.5, 0.0])
    result = CG()(A, b, x0)
    assert result.status is Status.BREAKDOWN
    assert torch.equal(result.value, x0)


def test_negative_curvature_later_gives_the_current_iterate():
    A, b = torch.diag(torch.tensor([1.0, 1.0, -1.0])), torch.ones(3)
    result = CG()(A, b)
    assert result.status is Status.BREAKDOWN
    assert result.convergence.iterations == 1
    # First step: length b'b / b'Ab = 3.
    torch.testing.assert_close(result.value, torch.full((3,), 3.0))


def test_indefinite_preconditioner_is_named(gen):
    A, b = spd(gen, 5), torch.randn(5, generator=gen)
    result = CG(precond=lambda v: -v)(A, b)
    assert result.status is Status.BREAKDOWN
    assert "the preconditioner is not positive definite" in result.convergence.message


def test_residual_that_does_not_halve_within_the_patience_stagnates(gen):
    # With this condition number the residual first rises, for 166 iterations, before it falls for good.
    A, b = spd(gen, 200, low=1e-5), torch.randn(200, generator=gen)
    result = CG(patience=100)(A, b)
    assert result.status is Status.STAGNATED
    assert result.convergence.iterations == 100
    assert "has not halved in 100 iterations" in result.convergence.message
    assert result.convergence.residual == pytest.approx((b - A @ result.value).norm().item(), rel=1e-10)
    # So 100 iterations would be too few by default.
    assert CG(max_iter=2000)(A, b).ok


def test_drift_of_the_recursion_is_found_and_mended(gen):
    A = spd(gen, 60, low=1e-4)
    b = A @ torch.randn(60, generator=gen)
    # From a start a million times too large the residual falls by 1e-18, of which rounding hides the last part.
    x0 = 1e6 * torch.randn(60, generator=gen)
    believed = CG(rtol=1e-12, verify=False)(A, b, x0)
    assert believed.ok
    assert (b - A @ believed.value).norm() > 1e-11 * b.norm()
    checked = CG(rtol=1e-12)(A, b, x0)
    assert checked.ok
    assert checked.stats["restarts"] >= 1
    assert (b - A @ checked.value).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-6, 1e-7, 1e-9])
@pytest.mark.parametrize("low", [1e-1, 1e-3, 1e-4])
def test_single_precision_never_claims_more_than_it_has(gen, rtol, low):
    A = spd(gen, 100, low=low, dtype=torch.float32)
    b = torch.randn(100, generator=gen, dtype=torch.float32)
    result = CG(rtol=rtol, patience=300, max_iter=5000)(A, b)
    assert result.value.dtype == torch.float32
    true = (b.double() - A.double() @ result.value.double()).norm().item()
    # The residual is computed in float32: an error of n eps ||A|| ||x|| at most, of its root by chance.
    slack = math.sqrt(100) * 1.2e-7 * result.value.norm().item()
    if result.ok:
        assert true <= rtol * b.norm().item() + slack
    else:
        assert result.status is Status.STAGNATED
        assert rtol * b.norm().item() < 10 * slack
    assert result.convergence.residual == pytest.approx(true, abs=slack)


def test_single_precision_reaches_its_tolerance_on_a_good_matrix(gen):
    A, b = spd(gen, 200, dtype=torch.float32), torch.randn(200, generator=gen, dtype=torch.float32)
    result = CG(rtol=1e-6)(A, b)
    assert result.ok
    assert result.stats["dtype"] == "float32"
    assert relative_residual(A, result.value[:, None], b[:, None]) <= 2e-6


def test_callback_sees_each_iterate_and_stops(gen):
    A, b = spd(gen, 30), torch.randn(30, generator=gen)
    states = []

    def callback(state):
        states.append(state)
        return state.iteration == 3

    result = CG(keep_history=True)(A, b, callback=callback)
    assert result.status is Status.STOPPED
    assert [s.iteration for s in states] == [1, 2, 3]
    for state in states:
        assert state.residual == pytest.approx((b - A @ state.value).norm().item(), rel=1e-12)
    assert torch.equal(result.value, states[-1].value)
    assert result.convergence.history.shape == (4,)
    assert result.convergence.history[1:].tolist() == [s.residual for s in states]
    assert result.convergence.history[0] == b.norm()


def test_first_step_that_overflows_is_not_finite(gen):
    # 1e308 times 4 equal entries overflows in the product.
    result = CG()(torch.full((4, 4), 1e308), torch.ones(4))
    assert result.status is Status.NONFINITE
    assert torch.equal(result.value, torch.zeros(4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_input_is_reported_with_a_value_of_zero(gen, bad):
    A, b = spd(gen, 4), torch.ones(4)
    wrong = b.clone()
    wrong[2] = bad
    for args in ((A, wrong), (A, b, wrong)):
        result = CG()(*args)
        assert result.status is Status.NONFINITE
        assert torch.equal(result.value, torch.zeros(4))
        assert result.convergence.residual == math.inf
        assert "b or x0 holds NaN or infinity" in result.convergence.message
    A[1, 1] = bad
    result = CG()(A, b)
    assert result.status is Status.NONFINITE
    assert result.value.isfinite().all()
    assert "a product with A" in result.convergence.message


@pytest.mark.parametrize("flexible", [True, 5])
def test_flexible_recursion_takes_a_preconditioner_that_varies(gen, flexible):
    A, b = spd(gen, 200, low=1e-4), torch.randn(200, generator=gen)
    inverse = torch.linalg.inv(A + 1e-3 * torch.eye(200))
    noise = torch.Generator().manual_seed(1)

    def precond(v):
        # Not symmetric, and another one each time.
        return inverse @ v * (1 + 0.5 * torch.rand(200, generator=noise))

    result = CG(rtol=1e-8, precond=precond, flexible=flexible)(A, b)
    assert result.ok
    plain = CG(rtol=1e-8, precond=None)(A, b)
    assert result.convergence.iterations < plain.convergence.iterations / 2


def test_flexible_recursion_equals_the_usual_one_for_a_fixed_preconditioner(gen):
    A, b = spd(gen, 30), torch.randn(30, generator=gen)
    usual = CG(rtol=1e-10, precond=Jacobi())(A, b)
    for flexible in (True, 4):
        result = CG(rtol=1e-10, precond=Jacobi(), flexible=flexible)(A, b)
        assert result.convergence.iterations == usual.convergence.iterations
        # In exact arithmetic beta and the length of the step are the same numbers.
        torch.testing.assert_close(result.value, usual.value, rtol=0, atol=1e-9)


def test_coefficients_are_those_of_the_lanczos_matrix(gen):
    from stochproc.solvers._cg_iteration import descend

    n = 8
    A, b = spd(gen, n), torch.randn(n, 2, generator=gen)
    found = []
    state = descend(
        b,
        torch.full((2,), 1e-30),
        torch.zeros(2, dtype=torch.int64),
        product=lambda V: A @ V,
        precondition=None,
        budget=n,
        coefficients=found,
    )
    alpha, beta = (torch.stack(t) for t in zip(*found, strict=True))
    assert alpha.shape == beta.shape == (n, 2)
    for j in range(2):
        diagonal = 1 / alpha[:, j]
        diagonal[1:] += beta[:-1, j] / alpha[:-1, j]
        off = beta[:-1, j].sqrt() / alpha[:-1, j]
        T = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
        # After n steps the Krylov space is everything, so T is similar to A.
        torch.testing.assert_close(torch.linalg.eigvalsh(T), torch.linalg.eigvalsh(A), rtol=1e-6, atol=0)
    torch.testing.assert_close(state.solution(), torch.linalg.solve(A, b))


def test_device_solution_matches_the_dense_one(gen, device):
    A, b = spd(gen, 40).to(device), torch.randn(40, 3, generator=gen).to(device)
    result = CG(rtol=1e-10)(A, b)
    assert result.ok
    assert result.value.device.type == device.type
    torch.testing.assert_close(result.value, torch.linalg.solve(A, b), rtol=0, atol=1e-7)
