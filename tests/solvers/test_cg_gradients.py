import warnings

import pytest
import torch

from stochproc.exceptions import NumericalWarning
from stochproc.kernels import RBF, Matern
from stochproc.solvers import CG, Jacobi, PivotedCholesky
from tests.solvers.linear_reference import centre, laplacian, spd

TIGHT = CG(rtol=1e-13)


def symmetric(S):
    return S @ S.mT + torch.eye(S.shape[-1])


@pytest.mark.parametrize("shape", [(), (2,)])
def test_gradcheck_of_tensor_and_right_side(gen, shape):
    S = torch.randn(*shape, 4, 4, generator=gen, requires_grad=True)
    b = torch.randn(*shape, 4, 2, generator=gen, requires_grad=True)
    assert torch.autograd.gradcheck(lambda S, b: TIGHT(symmetric(S), b).value, (S, b))


def test_gradient_equals_dense_autograd(gen):
    A, b = spd(gen, 10).requires_grad_(), torch.randn(10, generator=gen, requires_grad=True)
    upstream = torch.randn(10, generator=gen)
    ours = torch.autograd.grad(TIGHT(A, b).value, (A, b), upstream)
    dense = torch.autograd.grad(torch.linalg.solve(A, b), (A, b), upstream)
    # Condition number 10 times the tolerance of two solves.
    for o, d in zip(ours, dense, strict=True):
        torch.testing.assert_close(o, d, rtol=1e-10, atol=1e-11)


def test_gradient_of_a_broadcast_matrix_is_summed(gen):
    A, b = spd(gen, 1, 5).requires_grad_(), torch.randn(3, 5, 2, generator=gen)
    ours = torch.autograd.grad(TIGHT(A, b).value.square().sum(), A)[0]
    dense = torch.autograd.grad(torch.linalg.solve(A, b).square().sum(), A)[0]
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("precond", [None, PivotedCholesky(10), Jacobi()])
@pytest.mark.parametrize("kernel", [RBF(lengthscale=0.7), 2.0 * Matern(lengthscale=[0.5, 1.5], nu=1.5)])
def test_kernel_operator_has_gradients_in_hyperparameters_points_and_noise(gen, kernel, precond):
    x = torch.randn(30, 2, generator=gen, requires_grad=True)
    b = torch.randn(30, 2, generator=gen, requires_grad=True)
    noise = torch.tensor(0.1, requires_grad=True)
    leaves = [x, b, noise, *kernel.parameters()]
    upstream = torch.randn(30, 2, generator=gen)
    ours = CG(rtol=1e-12, precond=precond)(kernel.operator(x).add_diagonal(noise), b).value
    dense = torch.linalg.solve(kernel(x) + noise * torch.eye(30), b)
    torch.testing.assert_close(ours, dense, rtol=1e-8, atol=1e-9)
    for o, d in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(dense, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(o, d, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("start", [False, True])
def test_closure_has_gradients_in_what_it_captures(gen, verify, start):
    A = spd(gen, 8)
    d = torch.rand(8, generator=gen).requires_grad_()
    b = torch.randn(8, generator=gen)
    x0 = torch.ones(8) if start else None
    x = CG(rtol=1e-13, verify=verify)(lambda v: A @ v + d * v, b, x0).value
    dense = torch.linalg.solve(A + torch.diag(d), b)
    ours, expected = (torch.autograd.grad(v.square().sum(), d)[0] for v in (x, dense))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_gradient_reaches_the_right_side_from_an_exact_start_and_from_zero(gen):
    A, b = spd(gen, 6), torch.randn(6, generator=gen)
    inverse = torch.linalg.inv(A)
    for right, x0 in ((b, torch.linalg.solve(A, b)), (torch.zeros(6), None)):
        leaf = right.clone().requires_grad_()
        result = CG(rtol=1e-12)(A, leaf, x0)
        assert result.convergence.iterations == 0
        torch.testing.assert_close(torch.autograd.grad(result.value.sum(), leaf)[0], inverse.sum(0))


def test_projected_solve_has_the_gradient_of_the_pseudo_inverse(gen):
    L, b = laplacian(8), torch.randn(8, generator=gen, requires_grad=True)
    x = CG(rtol=1e-12, project=centre)(L, centre(b)).value
    upstream = torch.randn(8, generator=gen)
    expected = torch.linalg.pinv(L) @ upstream
    torch.testing.assert_close(torch.autograd.grad(x, b, upstream)[0], expected, rtol=1e-8, atol=1e-9)


def test_second_derivative_raises_on_every_path(gen):
    A = spd(gen, 4).requires_grad_()
    d = torch.ones(4, requires_grad=True)
    b = torch.randn(4, generator=gen, requires_grad=True)
    for operator in (A, lambda v: A @ v + d * v):
        for leaf in (A, b):
            # A constant upstream gradient is the case in which torch's own decorator says nothing.
            g = torch.autograd.grad(CG()(operator, b).value.sum(), leaf, create_graph=True)[0]
            with pytest.raises(RuntimeError, match="cannot be differentiated again"):
                torch.autograd.grad(g.square().sum(), leaf)
    kernel = RBF()
    x = torch.randn(6, 2, generator=gen)
    g = torch.autograd.grad(
        CG()(kernel.operator(x).add_jitter(0.1), torch.ones(6)).value.sum(),
        kernel.log_lengthscale,
        create_graph=True,
    )[0]
    # linear_operator's own backward breaks the graph before ours is asked.
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again|does not require grad"):
        torch.autograd.grad(g.sum(), kernel.log_lengthscale)


def test_nothing_that_requires_a_gradient_costs_no_product(gen):
    A, b = spd(gen, 10), torch.randn(10, generator=gen)
    calls = []

    def product(v):
        calls.append(torch.is_grad_enabled())
        return A @ v

    result = CG(verify=False)(product, b)
    assert len(calls) == result.stats["products"] == result.convergence.iterations
    assert not result.value.requires_grad
    # The one product with the graph shows what the closure captures.
    assert calls == [True] + [False] * (len(calls) - 1)
    A.requires_grad_()
    with torch.no_grad():
        assert not CG()(A, b).value.requires_grad
    tracked = CG()(A, b)
    assert tracked.value.requires_grad
    assert tracked.stats["products"] == tracked.convergence.iterations + 1


def test_backward_solve_uses_the_tolerance_relative_to_the_upstream_gradient(gen):
    A, b = spd(gen, 20, low=1e-3), torch.randn(20, generator=gen, requires_grad=True)
    upstream = 1e-9 * torch.randn(20, generator=gen)
    g = torch.autograd.grad(CG(rtol=0, atol=1e-6)(A, b).value, b, upstream)[0]
    assert (A @ g - upstream).norm() <= 1.01e-6 * upstream.norm()


def test_backward_that_does_not_converge_warns(gen):
    A, b = spd(gen, 40, low=1e-3), torch.linalg.eigh(spd(gen, 40))[1][:, 0]
    b = (A @ b).requires_grad_()
    x0 = torch.linalg.solve(A, b.detach())
    x = CG(max_iter=2)(A, b, x0).value
    with pytest.warns(NumericalWarning, match=r"backward solve of CG ended with status 'max_iter'.*residual"):
        x.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CG()(A, b).value.sum().backward()


def test_matrix_changed_in_place_before_the_backward_raises(gen):
    A, b = spd(gen, 5), torch.randn(5, generator=gen, requires_grad=True)
    x = CG()(A, b).value
    A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_gradients_work_in_single_precision_and_for_tiny_upstream(gen):
    A = spd(gen, 10, dtype=torch.float32)
    b = torch.randn(10, generator=gen, dtype=torch.float32).requires_grad_()
    g = torch.autograd.grad(CG()(A, b).value, b, torch.full((10,), 1e-30, dtype=torch.float32))[0]
    expected = torch.linalg.solve(A.double(), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(1e30 * g.double(), expected, rtol=1e-4, atol=1e-4)
