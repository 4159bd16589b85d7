"""The kernel matrix as a LinearOperator: the same numbers and gradients as the dense matrix."""

import pytest
import torch

from stochproc.kernels import RBF, Kernel, KernelOperator, Linear, Matern, Scale, as_kernel
from tests import reference


def make(gen, n=9, m=6, d=3, batch=(), backend="chunked"):
    x, y = torch.randn(*batch, n, d, generator=gen), torch.randn(*batch, m, d, generator=gen)
    return Matern(0.8, nu=1.5).operator(x, y, backend=backend), reference.matern(x, y, 0.8, 1.5), x, y


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_products_transposes_and_dense_forms_agree(batch, gen):
    op, want, _, _ = make(gen, batch=batch)
    assert isinstance(op, KernelOperator)
    assert op.shape == want.shape
    v, w = torch.randn(*batch, 6, 2, generator=gen), torch.randn(*batch, 9, 2, generator=gen)
    torch.testing.assert_close(op @ v, want @ v)
    torch.testing.assert_close(op.mT @ w, want.mT @ w)
    torch.testing.assert_close(op.to_dense(), want)
    if not batch:
        torch.testing.assert_close(op @ v[:, 0], want @ v[:, 0])


@pytest.mark.parametrize(
    "index",
    [
        (slice(2, 5),),
        (slice(None), slice(0, 6, 2)),
        (3,),
        (torch.tensor([0, 4, 2]), torch.tensor([5, 1, 1])),
        (torch.tensor([0, 4, 2]), slice(1, 3)),
        (slice(1, None), torch.tensor([2, 0])),
        (2, 3),
    ],
)
def test_indices_select_as_in_a_tensor(index, gen):
    op, want, _, _ = make(gen)
    got = op[index]
    got = got.to_dense() if hasattr(got, "to_dense") else got
    torch.testing.assert_close(got, want[index])


@pytest.mark.parametrize(
    "index",
    [
        (1,),
        (slice(None), 2),
        (0, slice(None), slice(2, 5), slice(1, 3)),
        (torch.tensor([1, 0]),),
        (torch.tensor([1, 0]), torch.tensor([2, 1]), torch.tensor([3, 4]), torch.tensor([5, 0])),
        (..., slice(0, 4), 3),
    ],
)
@pytest.mark.parametrize("batched_parameters", [False, True])
def test_indices_of_batches_select_as_in_a_tensor(index, batched_parameters, gen):
    x, y = torch.randn(2, 3, 9, 3, generator=gen), torch.randn(2, 3, 6, 3, generator=gen)
    lengthscale = torch.rand(2, 3, 1, generator=gen) + 0.5 if batched_parameters else torch.tensor(0.8)
    kernel = RBF(lengthscale, batch_shape=(2, 3) if batched_parameters else ())
    want = reference.rbf(x, y, lengthscale.reshape(*lengthscale.shape[:-1], 1, 1, 1))
    got = kernel.operator(x, y)[index]
    got = got.to_dense() if hasattr(got, "to_dense") else got
    torch.testing.assert_close(got, want[index])


def test_the_diagonal_is_that_of_the_matrix_for_equal_and_different_points(gen):
    op, want, x, _ = make(gen, 6, 6)
    torch.testing.assert_close(op.diagonal(), want.diagonal())
    torch.testing.assert_close(Matern(0.8, nu=1.5).operator(x).diagonal(), torch.ones(6))
    kernel = Scale(RBF(torch.tensor([[0.5], [2.0]]), batch_shape=(2,)), 3.0)
    y = torch.randn(6, 3, generator=gen)
    want = 3 * torch.stack([reference.rbf(x, y, 0.5), reference.rbf(x, y, 2.0)])
    torch.testing.assert_close(kernel.operator(x, y).diagonal(), want.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_marginal_likelihood_gradients_equal_those_of_the_dense_matrix(backend, gen):
    x = torch.randn(30, 2, generator=gen)
    b = torch.randn(30, 1, generator=gen)
    kernel = Scale(RBF([0.8, 1.3]), 1.7) + Linear(0.2, 0.3)

    def value(matrix):
        quad, logdet = matrix.inv_quad_logdet(b, logdet=True)
        return quad + logdet

    xr = x.clone().requires_grad_()
    got = torch.autograd.grad(value(kernel.operator(xr, backend=backend).add_jitter(0.1)), [xr, *kernel.parameters()])
    xr = x.clone().requires_grad_()
    matrix = kernel(xr, xr) + 0.1 * torch.eye(30)
    loss = (b * torch.linalg.solve(matrix, b)).sum() + torch.logdet(matrix)
    want = torch.autograd.grad(loss, [xr, *kernel.parameters()])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)


def test_gradients_reach_hyperparameters_through_sums_and_slices(gen):
    x, v = torch.randn(12, 2, generator=gen), torch.randn(5, 1, generator=gen)
    a, b = RBF(0.7), Matern(1.2)
    op = a.operator(x, backend="chunked") + b.operator(x, backend="chunked")
    loss = (op[2:9, 4:9] @ v).sum()
    got = torch.autograd.grad(loss, [a.log_lengthscale, b.log_lengthscale])
    loss = ((a(x) + b(x))[2:9, 4:9] @ v).sum()
    want = torch.autograd.grad(loss, [a.log_lengthscale, b.log_lengthscale])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_change_of_dtype_carries_points_and_hyperparameters(gen):
    op, want, _, _ = make(gen)
    low = op.float()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.to_dense().double(), want, rtol=0, atol=2e-5)


def test_batch_dimensions_expand_unsqueeze_and_permute(gen):
    op, want, _, _ = make(gen, batch=(2, 3))
    torch.testing.assert_close(op.unsqueeze(0).to_dense(), want.unsqueeze(0))
    torch.testing.assert_close(op.permute(1, 0, -2, -1).to_dense(), want.permute(1, 0, 2, 3))
    torch.testing.assert_close(op.expand(4, 2, 3, 9, 6).to_dense(), want.expand(4, 2, 3, 9, 6))
    torch.testing.assert_close(op.sum(0).to_dense(), want.sum(0))


def test_the_backend_that_runs_is_visible(gen):
    x = torch.randn(2000, 2, generator=gen)
    assert RBF().operator(x[:10]).backend_used == "dense"
    assert RBF().operator(x).backend_used == "chunked"
    assert RBF().operator(x, backend="dense").backend_used == "dense"


def test_a_kernel_written_as_a_function_works_as_an_operator(gen):
    kernel = as_kernel(lambda a, b: torch.exp(-torch.cdist(a, b)))
    assert isinstance(kernel, Kernel)
    x, v = torch.randn(70, 2, generator=gen), torch.randn(70, 1, generator=gen)
    op = kernel.operator(x, backend="chunked")
    torch.testing.assert_close(op @ v, torch.exp(-torch.cdist(x, x)) @ v)
    torch.testing.assert_close(op.diagonal(), torch.ones(70))


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_products_have_second_derivatives(backend, gen):
    x = torch.randn(7, 2, generator=gen, requires_grad=True)
    kernel = Scale(RBF(0.7), 1.3).double()
    v = torch.randn(7, 2, generator=gen, requires_grad=True)
    inputs = [x, v, *kernel.parameters()]

    def second(product):
        first = torch.autograd.grad(product.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    want = second(kernel.dense(x) @ v)
    for got, exact in zip(second(kernel.operator(x, backend=backend) @ v), want, strict=True):
        torch.testing.assert_close(got, exact)


def test_products_check_shapes(gen):
    op, _, _, _ = make(gen)
    with pytest.raises((RuntimeError, ValueError)):
        op @ torch.ones(7, 2)
