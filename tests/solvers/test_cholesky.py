import math
import warnings

import pytest
import torch

from stochproc.exceptions import NotPositiveDefiniteError, NumericalWarning
from stochproc.solvers import Status, cholesky_or_raise, safe_cholesky


def spd(gen, *shape, dtype=torch.float64):
    B = torch.randn(*shape, shape[-1], generator=gen, dtype=dtype)
    return B @ B.mT + torch.eye(shape[-1], dtype=dtype)


def indefinite(n=3, dtype=torch.float64):
    A = torch.eye(n, dtype=dtype)
    A[-1, -1] = -1.0
    return A


def backward_error(A, L):
    return float((A - L @ L.mT).norm() / A.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (2, 3, 4)])
def test_factor_of_a_definite_matrix_needs_no_jitter(gen, shape, dtype):
    A = spd(gen, *shape, dtype=dtype)
    result = safe_cholesky(A)
    assert result.ok
    assert result.convergence.iterations == 1
    assert not result.stats["jitter"].any()
    assert not result.stats["rescued"].any()
    assert result.stats["jitter"].shape == A.shape[:-2]
    # Higham, Theorem 10.3: |A - L Lᵀ| <= (n + 1) eps |L| |Lᵀ| to first order.
    assert backward_error(A, result.value) <= (A.shape[-1] + 1) ** 2 * torch.finfo(dtype).eps
    assert result.convergence.residual <= result.convergence.tolerance
    torch.testing.assert_close(result.value, torch.linalg.cholesky(A), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "first"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_singular_matrix_gets_the_first_amount_of_its_dtype(dtype, first):
    A = 4 * torch.ones(3, 3, dtype=dtype)
    result = safe_cholesky(A)
    assert result.ok
    assert result.stats["relative_jitter"].item() == first
    assert result.stats["jitter"].item() == pytest.approx(4 * first, rel=1e-6)  # float32 rounding
    assert result.convergence.iterations == 2
    jittered = A + 4 * first * torch.eye(3, dtype=dtype)
    assert backward_error(jittered, result.value) <= 16 * torch.finfo(dtype).eps


def test_jitter_grows_tenfold_until_it_exceeds_the_negative_eigenvalue():
    A = torch.diag(torch.tensor([1.0, 1.0, 1.0, -3e-8]))
    result = safe_cholesky(A)
    # Mean |diagonal| is 0.75: 1e-10 ... 1e-8 are too little, 1e-7 is enough.
    assert result.stats["relative_jitter"].item() == pytest.approx(1e-7, rel=1e-12)
    assert result.convergence.iterations == 5
    assert bool(result.stats["rescued"])


def test_only_the_failing_matrix_of_a_batch_gets_jitter(gen):
    A = spd(gen, 3, 4)
    A[1] = torch.ones(4, 4)
    result = safe_cholesky(A)
    assert result.ok
    assert result.stats["relative_jitter"].tolist() == [0.0, 1e-10, 0.0]
    assert result.stats["rescued"].tolist() == [False, True, False]
    torch.testing.assert_close(result.value[[0, 2]], torch.linalg.cholesky(A[[0, 2]]), rtol=0, atol=0)
    assert "1 of 3 matrices, the first at (1,)" in result.convergence.message


def test_jitter_is_relative_to_the_diagonal_of_each_matrix():
    A = torch.ones(2, 3, 3) * torch.tensor([1e-200, 1e200])[:, None, None]
    result = safe_cholesky(A)
    assert result.ok
    torch.testing.assert_close(result.stats["jitter"], torch.tensor([1e-210, 1e190]), rtol=1e-12, atol=0)
    assert result.convergence.residual < 1e-14


def test_jitter_asked_for_is_not_a_rescue():
    result = safe_cholesky(torch.ones(3, 3), jitter=1e-4)
    assert result.stats["relative_jitter"].item() == 1e-4
    assert not bool(result.stats["rescued"])
    assert bool(safe_cholesky(indefinite() + 0.9999 * torch.eye(3), jitter=1e-5).stats["rescued"])


def test_indefinite_matrix_breaks_down_and_leaves_no_half_factor(gen):
    A = torch.stack([spd(gen, 3), indefinite()])
    result = safe_cholesky(A)
    assert result.status is Status.BREAKDOWN
    assert not result.ok
    assert result.convergence.residual == math.inf
    assert result.stats["failed"].tolist() == [False, True]
    assert result.value[1].isnan().all()
    torch.testing.assert_close(result.value[0], torch.linalg.cholesky(A[0]), rtol=0, atol=0)
    assert "jitter up to 1e-06" in result.convergence.message
    assert result.convergence.iterations == 6


@pytest.mark.parametrize("tries", [0, 2])
def test_tries_bounds_the_number_of_amounts(tries):
    result = safe_cholesky(indefinite(), tries=tries)
    assert result.status is Status.BREAKDOWN
    assert result.convergence.iterations == 1 + tries


def test_zero_matrix_breaks_down():
    assert safe_cholesky(torch.zeros(2, 2)).status is Status.BREAKDOWN


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(0, 0), (2, 1), (1, 2)])
def test_nonfinite_matrix_is_reported_without_tries(gen, bad, where):
    A = spd(gen, 2, 3)
    A[1][where] = bad
    result = safe_cholesky(A)
    assert result.status is Status.NONFINITE
    assert result.convergence.iterations == 1
    assert result.stats["failed"].tolist() == [False, True]
    assert result.value[0].isfinite().all()
    assert result.value[1].isnan().all()


def test_upper_triangle_that_disagrees_breaks_down(gen):
    A = spd(gen, 5)
    result = safe_cholesky(A.tril())
    assert result.status is Status.BREAKDOWN
    assert "not symmetric" in result.convergence.message


def test_asymmetry_of_rounding_size_is_accepted(gen):
    A = spd(gen, 20, dtype=torch.float32)
    noise = torch.randn(20, 20, generator=gen, dtype=torch.float32)
    assert safe_cholesky(A * (1 + 8 * torch.finfo(torch.float32).eps * noise)).ok


def test_residual_of_a_centred_matrix_is_measured_against_its_size(gen):
    # 1 is an eigenvector of eigenvalue 1e-12; against |A 1| rounding would look like an error of 1e-4.
    n = 50
    H = torch.eye(n) - 1 / n
    result = safe_cholesky(H @ spd(gen, n) @ H + 1e-12 * torch.eye(n))
    assert result.ok
    assert result.convergence.residual < 1e-13


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 3, 3)])
def test_empty_matrix_has_an_empty_factor(shape):
    result = safe_cholesky(torch.zeros(shape))
    assert result.ok
    assert result.value.shape == shape
    assert result.convergence.residual == 0.0


def test_input_is_not_modified(gen):
    A = torch.stack([spd(gen, 3), torch.ones(3, 3), indefinite()])
    before = A.clone()
    safe_cholesky(A)
    assert torch.equal(A, before)


def test_non_contiguous_matrix_gives_the_same_factor(gen):
    A = spd(gen, 6)
    wide = torch.zeros(6, 12)
    wide[:, ::2] = A
    torch.testing.assert_close(safe_cholesky(wide[:, ::2]).value, safe_cholesky(A).value, rtol=0, atol=0)


def test_gradient_without_jitter(gen):
    B = torch.randn(2, 4, 4, generator=gen, requires_grad=True)
    assert torch.autograd.gradcheck(lambda B: safe_cholesky(B @ B.mT + torch.eye(4)).value, B)
    assert torch.autograd.gradgradcheck(lambda B: safe_cholesky(B @ B.mT + torch.eye(4)).value, B)


def test_gradient_where_one_matrix_of_the_batch_needed_jitter(gen):
    # Rank two in four dimensions: relative jitter 1e-3 is needed and is itself differentiated.
    B = torch.randn(2, 4, 4, generator=gen)
    B[1, :, 2:] = 0.0
    B.requires_grad_()

    def factor(B):
        mask = torch.ones(2, 4, 4)
        mask[1, :, 2:] = 0.0
        shift = torch.tensor([1.0, -1e-5])[:, None, None] * torch.eye(4)
        return safe_cholesky((B * mask) @ (B * mask).mT + shift, jitter=1e-3).value

    result = safe_cholesky((B @ B.mT - 1e-5 * torch.eye(4)).detach(), jitter=1e-3)
    assert result.stats["relative_jitter"][1] == 1e-3
    assert torch.autograd.gradcheck(factor, B)


def test_gradient_of_the_good_matrices_survives_a_failed_one(gen):
    A = torch.stack([spd(gen, 3), indefinite()]).requires_grad_()
    good = A.detach()[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(safe_cholesky(A).value[0].sum(), A)
    (expected,) = torch.autograd.grad(torch.linalg.cholesky(good).sum(), good)
    torch.testing.assert_close(grad[0], expected)


def test_safe_cholesky_never_warns(gen):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        safe_cholesky(torch.stack([spd(gen, 3), torch.ones(3, 3), indefinite()]))
    assert not caught


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2)])
def test_rejects_what_is_not_square(shape):
    with pytest.raises(ValueError, match="A must be square"):
        safe_cholesky(torch.ones(shape))


@pytest.mark.bad_input
@pytest.mark.parametrize("A", [torch.eye(2, dtype=torch.int64), torch.eye(2, dtype=torch.float16), [[1.0]]])
def test_rejects_other_dtypes(A):
    with pytest.raises(TypeError, match="A must be"):
        safe_cholesky(A)


@pytest.mark.parametrize("jitter", [0.0, -1e-6, math.nan])
def test_rejects_jitter_that_is_not_positive(jitter):
    with pytest.raises(ValueError, match="jitter must be positive"):
        safe_cholesky(torch.eye(2), jitter=jitter)


def test_rejects_negative_tries():
    with pytest.raises(ValueError, match="tries must be at least 0"):
        safe_cholesky(torch.eye(2), tries=-1)


def test_rescue_is_announced_once_with_its_amount():
    A = torch.ones(2, 3, 3)
    with pytest.warns(NumericalWarning, match=r"K is positive definite only with jitter 1e-10 .*2 of 2") as record:
        L = cholesky_or_raise(A, "K")
    assert len(record) == 1
    torch.testing.assert_close(L @ L.mT, A + 1e-10 * torch.eye(3))


def test_jitter_of_the_model_is_not_announced():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cholesky_or_raise(torch.ones(3, 3), "K", jitter=1e-6)
    assert not caught


def test_failure_names_the_eigenvalues_and_the_closest_points():
    x = torch.tensor([[0.0], [5.0], [1.0], [5.5]])
    A = torch.diag(torch.tensor([1.0, 2.0, 4.0, -0.5]))
    with pytest.raises(NotPositiveDefiniteError, match="K: not positive definite") as error:
        cholesky_or_raise(A, "K", points=x)
    assert "eigenvalues from -0.5 to 4 (condition about 8.0e+00)" in str(error.value)
    assert "rows 1 and 3, at distance 0.5" in str(error.value)


def test_failure_in_a_batch_describes_the_first_failed_matrix(gen):
    A = torch.stack([spd(gen, 3), indefinite()])
    x = torch.tensor([[[0.0], [1.0], [3.0]], [[0.0], [9.0], [9.0]]])
    with pytest.raises(NotPositiveDefiniteError, match=r"the first at \(1,\).*from -1 to 1.*rows 1 and 2"):
        cholesky_or_raise(A, "K", points=x)


def test_nonfinite_matrix_raises_without_eigenvalues():
    with pytest.raises(NotPositiveDefiniteError, match="K: holds NaN or infinite entries"):
        cholesky_or_raise(torch.full((2, 2), math.nan), "K")


def test_eigenvalues_of_a_large_matrix_are_estimated(monkeypatch):
    # Lanczos to 1 % of the largest eigenvalue.
    monkeypatch.setattr("stochproc.solvers._cholesky.DENSE_EIGENVALUES_UP_TO", 100)
    values = torch.linspace(0.0, 10.0, 300)
    values[200] = -2.0
    with pytest.raises(NotPositiveDefiniteError) as error:
        cholesky_or_raise(torch.diag(values), "K")
    low, high = (float(word) for word in str(error.value).split("from ")[1].split(" (")[0].split(" to "))
    assert low == pytest.approx(-2.0, abs=0.1)
    assert high == pytest.approx(10.0, abs=0.1)
