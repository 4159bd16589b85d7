"""The inner solver of Newton methods: last iterates, directions of ascent, honest ends."""

import math

import pytest
import torch

from stochproc.solvers import Status, truncated_cg


def spd(n, gen):
    A = torch.randn(n, n, generator=gen)
    return A @ A.T / n + 0.1 * torch.eye(n)


def test_solves_to_the_relative_residual_it_is_asked_for(gen):
    A, b = spd(30, gen), torch.randn(30, generator=gen)
    for rtol in (0.5, 1e-3, 1e-10):
        result = truncated_cg(lambda p: A @ p, b, rtol=rtol)
        assert result.ok
        left = float(torch.linalg.vector_norm(b - A @ result.value))
        assert left <= rtol * float(torch.linalg.vector_norm(b)) * (1 + 1e-6)
        assert result.convergence.residual == pytest.approx(left, rel=1e-4)


def test_n_distinct_eigenvalues_take_n_iterations(gen):
    d = torch.tensor([1.0, 3.0, 10.0]).repeat(5)
    assert truncated_cg(lambda p: d * p, torch.randn(15, generator=gen), rtol=1e-12).convergence.iterations == 3


def test_the_exact_inverse_as_preconditioner_takes_one_iteration(gen):
    A, b = spd(12, gen), torch.randn(12, generator=gen)
    inverse = torch.linalg.inv(A)
    assert truncated_cg(lambda p: A @ p, b, precond=lambda r: inverse @ r, rtol=1e-8).convergence.iterations == 1


def test_a_singular_system_is_solved_off_its_null_space(gen):
    W = torch.rand(10, 10, generator=gen)
    W = W + W.T
    L = torch.diag(W.sum(1)) - W
    b = torch.randn(10, generator=gen)
    result = truncated_cg(lambda p: L @ p, b, project=lambda v: v - v.mean(), rtol=1e-12)
    expected = torch.linalg.pinv(L) @ b
    # Rounding times a condition number below 100.
    torch.testing.assert_close(result.value, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("budget", [1, 2, 5, 50])
def test_every_iterate_is_a_direction_of_ascent_of_lower_energy(budget, gen):
    # Nearly separate parts: the residual stays above that of zero for many iterations.
    d = torch.logspace(-11, 0, 40)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=gen)).Q
    A, b = (Q * d) @ Q.T, torch.randn(40, generator=gen)
    result = truncated_cg(lambda p: A @ p, b, rtol=1e-6, max_iter=budget)
    x = result.value
    assert result.status is Status.MAX_ITER
    assert result.convergence.iterations == budget
    assert float(b @ x) > 0
    assert float(0.5 * x @ A @ x - b @ x) < 0


def test_negative_curvature_ends_at_the_iterate_before_it():
    d = torch.tensor([2.0, -1.0])
    first = truncated_cg(lambda p: d * p, torch.tensor([0.0, 1.0]))
    assert first.status is Status.BREAKDOWN
    torch.testing.assert_close(first.value, torch.tensor([0.0, 1.0]))
    later = truncated_cg(lambda p: d * p, torch.tensor([1.0, 0.5]), rtol=1e-10)
    assert later.status is Status.BREAKDOWN
    assert later.convergence.iterations == 1
    assert float(torch.tensor([1.0, 0.5]) @ later.value) > 0


def test_a_product_that_is_not_finite_is_reported():
    result = truncated_cg(lambda p: p * math.nan, torch.ones(3))
    assert result.status is Status.NONFINITE
    assert bool(result.value.isfinite().all())


def test_zero_takes_no_iteration():
    result = truncated_cg(lambda p: p, torch.zeros(4))
    assert result.ok
    assert result.convergence.iterations == 0
    torch.testing.assert_close(result.value, torch.zeros(4))


def test_b_is_not_written_to(gen):
    b = torch.randn(5, generator=gen)
    before = b.clone()
    truncated_cg(lambda p: 2 * p, b, rtol=1e-8)
    torch.testing.assert_close(b, before, rtol=0, atol=0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rtol": 0.0}, ValueError, "rtol must be positive"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
    ],
)
def test_options_out_of_range_are_named(options, error, message):
    with pytest.raises(error, match=message):
        truncated_cg(lambda p: p, torch.ones(2), **options)


@pytest.mark.bad_input
def test_a_vector_of_integers_is_refused():
    with pytest.raises(TypeError, match="b must be float32 or float64"):
        truncated_cg(lambda p: p, torch.ones(2, dtype=torch.int64))
