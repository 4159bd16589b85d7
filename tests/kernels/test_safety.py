"""What could go wrong in silence: gradients of equal points, shared kernels, dropped columns, sliced batches."""

import copy
import math
import subprocess
import sys
import threading

import gpytorch
import pytest
import torch

from stochproc.kernels import (
    RBF,
    ArcCosine,
    Kernel,
    KernelOperator,
    Linear,
    Matern,
    Polynomial,
    Radial,
    RationalQuadratic,
    Scale,
    Sum,
    as_gpytorch,
    as_kernel,
    expsum,
    logsumexp,
    matvec,
)
from stochproc.kernels._distance import safe_sqrt
from tests import reference


def test_products_of_large_operators_are_exact():
    # Above its Cholesky limit linear_operator multiplies low-rank roots.
    x = torch.linspace(0, 1, 1100)[:, None]
    a, b = Matern(0.05, nu=0.5), RBF(0.1)
    want = reference.matern(x, x, 0.05, 0.5)
    op = a.operator(x)
    torch.testing.assert_close((op * op).to_dense(), want**2, rtol=1e-12, atol=1e-12)
    product = op * b.operator(x)
    assert isinstance(product, KernelOperator)
    torch.testing.assert_close(product.to_dense(), want * reference.rbf(x, x, 0.1), rtol=1e-12, atol=1e-12)
    inside = (as_gpytorch(a) * as_gpytorch(b))(x).to_dense()
    torch.testing.assert_close(inside, want * reference.rbf(x, x, 0.1), rtol=1e-12, atol=1e-12)


def test_gradients_of_points_that_happen_to_be_equal_are_those_of_different_points(gen):
    x = torch.rand(5, 1, generator=gen).requires_grad_()
    y = x.detach().clone()
    for function in (
        lambda k, x, y: k.operator(x, y).to_dense().square().sum(),
        lambda k, x, y: k.operator(x, y).diagonal().sum(),
        lambda k, x, y: as_gpytorch(k)(x, y, diag=True).sum(),
    ):
        got = torch.autograd.grad(function(Linear(), x, y), x)[0]
        want = torch.autograd.grad(function(Linear(), x, y + 1e-9), x)[0]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rough_kernels_keep_their_gradient_at_near_pairs(dtype, gen):
    class Own(Radial):
        rough = True

        def profile(self, sq):
            return torch.exp(-safe_sqrt(sq))

    x = torch.randn(30, 2, generator=gen).to(dtype)
    step = 1e-6 if dtype == torch.float64 else 1e-3
    y = x + step * torch.randn(30, 2, generator=gen).to(dtype)
    want_at = x.double().requires_grad_()
    want = torch.autograd.grad(reference.matern(want_at, y.double(), 1.0, 0.5).sum(), want_at)[0]
    for kernel in (Own(), Matern(nu=0.5)):
        leaf = x.clone().requires_grad_()
        got = torch.autograd.grad(kernel(leaf, y).sum(), leaf)[0].double()
        # A direction known to eps / step, summed over 30 pairs of size one.
        torch.testing.assert_close(got, want, rtol=0, atol=100 * torch.finfo(dtype).eps / step)


def test_threads_that_share_a_kernel_do_not_disturb_it(gen):
    kernel, x = RBF(), torch.randn(30, 2, generator=gen)
    want = (kernel(x) @ torch.ones(30, 1)).detach()
    wrong = []

    def work():
        for _ in range(60):
            out = kernel.operator(x) @ torch.ones(30, 1)
            if not torch.allclose(out, want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert isinstance(kernel.log_lengthscale, torch.nn.Parameter)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_a_frozen_hyperparameter_changed_before_backward_is_an_error_not_a_wrong_gradient(backend, gen):
    x, v = torch.randn(6, 2, generator=gen), torch.randn(6, 1, generator=gen)
    kernel = RationalQuadratic(alpha=1.0)
    kernel.log_alpha.requires_grad_(False)
    out = matvec(kernel, x, None, v, backend=backend).sum()
    kernel.alpha = 5.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_slice_of_a_batch_with_a_frozen_hyperparameter_has_gradients(gen):
    x, v = torch.randn(6, 2, generator=gen), torch.randn(6, 1, generator=gen)
    kernel = RationalQuadratic(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [3.0]]), batch_shape=(2,))
    kernel.log_alpha.requires_grad_(False)
    (kernel.operator(x, backend="chunked")[1] @ v).sum().backward()
    single = RationalQuadratic(2.0, 3.0)
    (single(x) @ v).sum().backward()
    torch.testing.assert_close(kernel.log_lengthscale.grad[1], single.log_lengthscale.grad)


def test_the_gradient_in_eps_is_finite_where_columns_and_rows_are_dropped(gen):
    x = torch.randn(3, 2, generator=gen)
    g, f = torch.tensor([0.0, -math.inf, 0.0]), torch.tensor([0.0, -math.inf, 1.0])
    keep = torch.tensor([0, 2])
    for backend in ("dense", "chunked"):
        eps = torch.tensor(0.5, requires_grad=True)
        (got,) = torch.autograd.grad(logsumexp("sqeuclidean", x, x, g, eps=eps, backend=backend).sum(), eps)
        (want,) = torch.autograd.grad(logsumexp("sqeuclidean", x, x[keep], g[keep], eps=eps).sum(), eps)
        torch.testing.assert_close(got, want)
        one = torch.ones(3, 1)
        (got,) = torch.autograd.grad(expsum("euclidean", x, x, f, g, one, eps=eps, backend=backend).sum(), eps)
        (want,) = torch.autograd.grad(
            expsum("euclidean", x[keep], x[keep], f[keep], g[keep], one[keep], eps=eps).sum(), eps
        )
        torch.testing.assert_close(got, want)


def test_one_far_point_does_not_spoil_the_others_in_float32():
    x = torch.tensor([[0.0], [0.3], [1e5]], dtype=torch.float32)
    torch.testing.assert_close(RBF()(x).double(), reference.rbf(x, x), rtol=0, atol=2e-5)


def test_a_batch_of_kernels_can_be_indexed_in_gpytorch(gen):
    x = torch.randn(5, 2, generator=gen)
    kernel = RBF(torch.tensor([[0.5], [2.0]]), batch_shape=(2,)) + Linear(batch_shape=(2,))
    torch.testing.assert_close(as_gpytorch(kernel)[1](x).to_dense(), kernel(x)[1])
    torch.testing.assert_close(as_gpytorch(kernel)(x)[1].to_dense(), kernel(x)[1])


def test_composites_of_batched_gpytorch_kernels_have_the_right_shape(gen):
    x = torch.randn(5, 2, generator=gen)
    base = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2])).double()
    for kernel in (as_kernel(base) + RBF(), 2.0 * as_kernel(base)):
        op = kernel.operator(x)
        assert op.shape == (2, 5, 5)
        torch.testing.assert_close(op.to_dense(), kernel(x))


def test_a_slice_of_a_batch_of_kernels_is_an_operator_in_full(gen):
    x = torch.randn(12, 2, generator=gen)
    kernel = Scale(RBF(torch.tensor([[0.3], [0.6]]), batch_shape=(2,)), 2.0)
    op, want = kernel.operator(x)[0], 2 * reference.rbf(x, x, 0.3)
    torch.testing.assert_close(op.to_dense(), want)
    torch.testing.assert_close(op.diagonal(), want.diagonal())
    b = torch.randn(12, 1, generator=gen)
    torch.testing.assert_close(op.add_jitter(0.1).solve(b), torch.linalg.solve(want + 0.1 * torch.eye(12), b))
    copied = copy.deepcopy(kernel.operator(x))
    torch.testing.assert_close(copied.to_dense(), kernel(x))


def test_potentials_may_have_a_batch_that_the_points_have_not(gen):
    x, y, g = torch.randn(4, 2, generator=gen), torch.randn(3, 2, generator=gen), torch.randn(5, 3, generator=gen)
    for cost in ("sqeuclidean", "euclidean"):
        got = logsumexp(cost, x, y, g, eps=0.3)
        want = torch.stack([logsumexp(cost, x, y, row, eps=0.3) for row in g])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_empty_batches_and_empty_sets_give_empty_results(backend):
    x, v = torch.zeros(0, 4, 2), torch.zeros(0, 4, 1)
    assert matvec(RBF(), x, None, v, backend=backend).shape == (0, 4, 1)
    assert ArcCosine()(torch.zeros(0, 2), torch.ones(3, 2)).shape == (0, 3)


def test_kernels_add_up_by_sum_and_show_their_numbers():
    total = sum([RBF(), Linear(), Matern()])
    assert isinstance(total, Sum)
    assert len(total.kernels) == 3
    assert repr(RBF(0.5)) == "RBF(lengthscale=0.5)"
    assert repr(Matern([1.0, 2.0], nu=1.5)) == "Matern(lengthscale=[1.0, 2.0], nu=1.5)"


def test_the_origin_is_at_a_right_angle_to_every_point():
    assert ArcCosine(0)(torch.zeros(1, 2), torch.ones(1, 2)).item() == pytest.approx(0.5)
    assert ArcCosine(0).diag(torch.zeros(1, 2)).item() == 1.0


def test_a_block_gradient_of_none_means_autograd(gen):
    class Undecided(Kernel):
        def forward(self, x, y):
            return (-(x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)).exp()

        def block_vjp(self, x, y, g):
            return None

    x, y, v = (torch.randn(*s, generator=gen).requires_grad_() for s in ((4, 2), (3, 2), (3, 1)))
    assert torch.autograd.gradcheck(lambda *a: matvec(Undecided(), *a, backend="chunked", block_bytes=48), (x, y, v))


@pytest.mark.slow
def test_wrapping_a_gpytorch_kernel_prints_nothing():
    code = "from stochproc.kernels import RBF, as_gpytorch; as_gpytorch(RBF())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: setattr(RBF(), "lengthscale", [1.0, 2.0]),
            ValueError,
            "lengthscale must be one number or have shape",
        ),
        (lambda x: RBF().diag([[1.0]]), TypeError, "x must be a torch.Tensor"),
        (lambda x: RBF().diag(x[0]), ValueError, "x must have shape"),
        (lambda x: RBF([]), ValueError, "lengthscale must have at least one entry"),
        (lambda x: RBF(batch_shape=2), TypeError, "batch_shape must be a tuple of int"),
        (lambda x: matvec(RBF(), x, None, [[1.0]]), TypeError, "v must be a torch.Tensor"),
        (
            lambda x: matvec(RBF(), x, None, x, backend="chunked", block_bytes=0),
            ValueError,
            "block_bytes must be at least 1",
        ),
        (
            lambda x: matvec(RBF(), x, None, x, backend="chunked", block_bytes="a"),
            TypeError,
            "block_bytes must be an integer",
        ),
        (lambda x: RBF(batch_shape=(2,)) + RBF(batch_shape=(3,)), ValueError, r"broadcast; got \(2,\), \(3,\)"),
        (lambda x: RBF().operator(x, backend="foo"), ValueError, "unknown backend 'foo'"),
        (lambda x: RBF()(x * math.nan), ValueError, "x and y must be finite"),
        (lambda x: RBF()(1e200 * (x + torch.arange(3.0)[:, None])), OverflowError, "less than 1e154 lengthscales"),
        (lambda x: logsumexp("euclidean", x, x, x[:, 0] * math.nan), ValueError, "g must be finite or -inf"),
        (lambda x: logsumexp("euclidean", x, x, x[:, 0] + math.inf), ValueError, "g must be finite or -inf; got 3"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3, 2))


def test_frozen_hyperparameters_leave_the_gradient_in_the_points_alone(gen):
    x, v = torch.randn(5, 2, generator=gen), torch.randn(5, 1, generator=gen)
    kernel = Polynomial(3, 0.7)
    kernel.log_offset.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    got = [torch.autograd.grad(matvec(kernel, leaf, None, v, backend=b).sum(), leaf)[0] for b in ("dense", "chunked")]
    torch.testing.assert_close(*got)
