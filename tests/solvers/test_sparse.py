import math

import numpy as np
import pytest
import scipy.sparse
import torch

from stochproc.exceptions import NumericalWarning
from stochproc.solvers import SparseCG, Status
from stochproc.solvers import _sparse as module

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

WAYS = [{}, {"direct": "never"}, {"backend": "torch"}]


def grid(m):
    """Five-point Laplacian of an m x m grid plus the identity: condition number below 9."""
    T = scipy.sparse.diags_array([-np.ones(m - 1), np.full(m, 2.5), -np.ones(m - 1)], offsets=[-1, 0, 1])
    one = scipy.sparse.eye_array(m)
    return (scipy.sparse.kron(T, one) + scipy.sparse.kron(one, T)).tocsr()


def path(n):
    """Laplacian of a path: singular, with the constant vector as its null space."""
    d = np.full(n, 2.0)
    d[[0, -1]] = 1.0
    return scipy.sparse.diags_array([-np.ones(n - 1), d, -np.ones(n - 1)], offsets=[-1, 0, 1]).tocsr()


def residuals(A, x, b):
    """||b - A x|| by column, in float64."""
    return np.linalg.norm(b.double().numpy() - A.astype(np.float64) @ x.detach().double().numpy(), axis=0)


def csr(A, values=None):
    values = torch.tensor(A.data) if values is None else values
    return torch.sparse_csr_tensor(torch.tensor(A.indptr), torch.tensor(A.indices), values, A.shape)


def coo(A, values=None):
    A, own = A.tocoo(), torch.tensor(A.tocoo().data)
    return torch.sparse_coo_tensor(np.stack(A.coords), own if values is None else values, A.shape)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", [lambda A: A, csr, coo, lambda A: A.tocoo(), lambda A: A.tocsc()])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_every_way_and_form_solves_to_the_true_residual(gen, way, form, shape):
    A, b = grid(12), torch.randn(144, *shape, generator=gen)
    result = SparseCG(**way)(form(A), b)
    assert result.ok
    assert result.value.shape == b.shape
    true = residuals(A, result.value, b)
    assert (true <= 1e-8 * b.norm(dim=0).numpy()).all()
    np.testing.assert_allclose(result.stats["residual"], true, rtol=1e-3, atol=1e-13)
    torch.testing.assert_close(result.value, torch.linalg.solve(torch.tensor(A.toarray()), b), rtol=0, atol=1e-7)
    assert result.stats["iterations"].shape == shape
    assert result.stats["method"] == ("cg" if way else "direct")


def test_large_systems_take_conjugate_gradients_first(gen):
    A = grid(50)
    assert A.shape[0] > module.DIRECT_UP_TO
    b = torch.randn(2500, generator=gen)
    result = SparseCG()(A, b)
    assert result.ok
    assert result.stats["method"] == "cg"
    # sqrt(condition) / 2 * log(2 / rtol) = 29 with condition 9.
    assert 5 <= result.convergence.iterations <= 29


def test_factorisation_takes_over_where_conjugate_gradients_fail(gen, monkeypatch):
    monkeypatch.setattr(module, "DIRECT_UP_TO", 10)
    A, b = (path(300) + 1e-9 * scipy.sparse.eye_array(300)).tocsr(), torch.randn(300, generator=gen)
    cg_only = SparseCG(direct="never", max_iter=50)(A, b)
    assert cg_only.status is Status.MAX_ITER
    assert not cg_only.ok
    assert cg_only.convergence.iterations == 50
    assert cg_only.convergence.residual == pytest.approx(float(residuals(A, cg_only.value, b)), rel=1e-6)
    result = SparseCG(max_iter=50, rtol=1e-6)(A, b)
    assert result.ok
    assert result.stats["method"] == "cg, direct"


def test_indefinite_system_is_solved_by_the_factorisation_and_refused_by_the_recursion():
    A = scipy.sparse.csr_array(np.array([[0.0, 1.0], [1.0, 0.0]]))
    b = torch.tensor([2.0, -3.0])
    result = SparseCG()(A, b)
    assert result.ok
    assert result.value.tolist() == [-3.0, 2.0]
    assert SparseCG(backend="torch")(A, b).status is Status.BREAKDOWN


@pytest.mark.parametrize("way", WAYS)
def test_singular_consistent_system_is_solved(gen, way):
    L = path(20)
    b = torch.randn(20, generator=gen)
    b -= b.mean()
    result = SparseCG(**way)(L, b)
    assert result.ok
    assert residuals(L, result.value, b) <= 1e-8 * b.norm()


@pytest.mark.parametrize("way", WAYS)
def test_singular_inconsistent_system_is_never_a_success(gen, way):
    L, b = path(20), torch.randn(20, generator=gen).abs()
    result = SparseCG(**way)(L, b)
    assert not result.ok
    assert result.value.isfinite().all()
    assert result.convergence.residual >= float(b.sum()) / math.sqrt(20) * (1 - 1e-9)
    assert result.convergence.residual == pytest.approx(float(residuals(L, result.value, b)), rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_zero_and_empty_right_sides(way):
    A = grid(3)
    result = SparseCG(**way)(A, torch.zeros(9, 2))
    assert result.ok
    assert torch.equal(result.value, torch.zeros(9, 2))
    assert result.convergence.residual == 0
    assert SparseCG(**way)(A, torch.zeros(9, 0)).value.shape == (9, 0)
    one = scipy.sparse.csr_array(np.array([[4.0]]))
    assert SparseCG(**way)(one, torch.ones(1)).value.item() == pytest.approx(0.25)


@pytest.mark.parametrize("way", WAYS)
def test_nonfinite_input_is_reported_with_a_value_of_zero(way):
    A, b = grid(3), torch.ones(9)
    b[2] = math.nan
    result = SparseCG(**way)(A, b)
    assert result.status is Status.NONFINITE
    assert torch.equal(result.value, torch.zeros(9))
    assert result.convergence.message == "b holds NaN or infinity"
    A.data[3] = math.inf
    assert SparseCG(**way)(A, torch.ones(9)).convergence.message == "A holds NaN or infinity"


@pytest.mark.parametrize("way", WAYS)
def test_single_precision_is_honest(gen, way):
    A = grid(12).astype(np.float32)
    b = torch.randn(144, generator=gen, dtype=torch.float32)
    result = SparseCG(rtol=1e-6, **way)(A, b)
    assert result.ok
    assert result.value.dtype == torch.float32
    # Residuals of the torch backend are computed in float32: 100 roundings of a vector of size 1.
    assert residuals(A, result.value, b) <= 1e-6 * b.norm() * 1.1
    tight = SparseCG(rtol=1e-10, **way)(A, b)
    assert tight.status is Status.STAGNATED
    assert tight.convergence.residual > 1e-10 * b.norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", [csr, coo])
def test_gradients_in_values_and_right_side_equal_dense_autograd(gen, way, form):
    A = grid(4)
    rows, cols = A.tocoo().coords
    values = torch.tensor(A.data, requires_grad=True)
    b = torch.randn(16, 2, generator=gen, requires_grad=True)
    upstream = torch.randn(16, 2, generator=gen)
    x = SparseCG(rtol=1e-12, **way)(form(A, values), b).value
    ours = torch.autograd.grad(x, (values, b), upstream)
    dense = torch.zeros(16, 16).index_put((torch.tensor(rows), torch.tensor(cols)), values)
    expected = torch.autograd.grad(torch.linalg.solve(dense, b), (values, b), upstream)
    for o, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(o, e, rtol=1e-9, atol=1e-10)


def test_gradient_of_a_sparse_leaf_is_sparse(gen):
    A = csr(grid(3)).requires_grad_()
    SparseCG()(A, torch.randn(9, generator=gen)).value.sum().backward()
    assert A.grad.layout == torch.sparse_csr


def test_gradcheck_in_the_right_side(gen):
    A, b = grid(3), torch.randn(9, generator=gen, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: SparseCG(rtol=1e-13)(A, b).value, (b,))


def test_second_derivative_raises(gen):
    A, b = grid(3), torch.randn(9, generator=gen, requires_grad=True)
    g = torch.autograd.grad(SparseCG()(A, b).value.square().sum(), b, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(g.sum(), b)


def test_backward_that_does_not_converge_warns():
    L, b = path(5), torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0], requires_grad=True)
    x = SparseCG()(L, b).value
    with pytest.warns(NumericalWarning, match="backward solve of SparseCG ended"):
        x.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "rtol must be non-negative"),
        ({"rtol": 0.0}, "rtol and atol must not both be zero"),
        ({"max_iter": 0}, "max_iter must be at least 1"),
        ({"direct": "always"}, "direct must be one of 'auto', 'never'"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_rejects_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SparseCG(**options)


def test_rejects_matrices_that_do_not_fit():
    A = grid(2)
    with pytest.raises(ValueError, match=r"A must be square, \(n, n\); got shape \(4, 3\)"):
        SparseCG()(A[:, :3], torch.ones(4))
    with pytest.raises(ValueError, match=r"b must have shape \(n,\) or \(n, k\) with n = 4; got \(3,\)"):
        SparseCG()(A, torch.ones(3))
    lower = scipy.sparse.csr_array(np.array([[1.0, 0.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"A must be symmetric; got entries that differ .* by 1"):
        SparseCG()(lower, torch.ones(2))


@pytest.mark.bad_input
def test_rejects_other_kinds():
    with pytest.raises(TypeError, match=r"Use CG for a dense one"):
        SparseCG()(torch.eye(2), torch.ones(2))
    with pytest.raises(TypeError, match="A must be a torch sparse tensor or a SciPy sparse matrix; got ndarray"):
        SparseCG()(np.eye(2), torch.ones(2))
    with pytest.raises(TypeError, match="A must be float32 or float64; got int64"):
        SparseCG()(grid(2).astype(np.int64), torch.ones(4))
    with pytest.raises(TypeError, match="mixed dtypes"):
        SparseCG()(grid(2), torch.ones(4, dtype=torch.float32))
    with pytest.raises(TypeError, match="b must be float32 or float64"):
        SparseCG()(grid(2), torch.ones(4, dtype=torch.int64))


def test_device_solution_matches_the_dense_one(gen, device):
    A, b = grid(6), torch.randn(36, generator=gen)
    result = SparseCG()(csr(A).to(device), b.to(device))
    assert result.ok
    assert result.value.device.type == device.type
    torch.testing.assert_close(result.value.cpu(), torch.linalg.solve(torch.tensor(A.toarray()), b), rtol=0, atol=1e-7)
