import math

import pytest
import torch

from stochproc.kernels import Matern
from stochproc.solvers import LanczosLogdet, PivotedCholesky
from stochproc.solvers._lanczos import logdet_from_probes
from tests.solvers.spd_systems import all_directions, dense, some_preconditioner, spd, spectrum

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("preconditioned", [False, True])
def test_all_steps_and_all_directions_give_the_exact_gradient(gen, preconditioned):
    n = 25
    A = spd(gen, n).requires_grad_()
    P = some_preconditioner(gen, n) if preconditioned else None
    z = all_directions(n) if P is None else torch.linalg.cholesky(dense(P)) @ all_directions(n)
    result = logdet_from_probes(LanczosLogdet(steps=n), A, z, P)
    (gradient,) = torch.autograd.grad(result.value.value, A)
    torch.testing.assert_close(gradient, torch.linalg.inv(A.detach()), rtol=0, atol=n * 100 * 100 * EPS)


def averaged(gradient_of_seed, exact, seeds=10):
    """Check that a mean of gradients is within 4.8 of its standard errors (t of 9 degrees: once in 1000)."""
    found = torch.stack([gradient_of_seed(s) for s in range(seeds)])
    assert bool(((found.mean(0) - exact).abs() <= 4.8 * found.std(0) / math.sqrt(seeds) + 1e-9).all())


@pytest.mark.parametrize("preconditioned", [False, True])
def test_gradient_of_hyperparameters_and_points_is_unbiased(gen, preconditioned):
    x = torch.rand(60, 2, generator=gen, requires_grad=True)
    direction = torch.randn(60, 2, generator=gen)
    kernel = Matern(0.3, nu=2.5)
    log_noise = torch.tensor(math.log(1e-2), requires_grad=True)
    wanted = [kernel.log_lengthscale, log_noise, x]

    def numbers(value):
        a, b, c = torch.autograd.grad(value, wanted)
        return torch.stack([a.sum(), b, (c * direction).sum()])

    def estimate(seed):
        K = kernel.operator(x)
        P = PivotedCholesky(15).build(K, 1e-2) if preconditioned else None
        result = LanczosLogdet(seed=seed, steps=60)(K.add_diagonal(log_noise.exp().unsqueeze(0)), P)
        assert result.ok
        return numbers(result.value.value)

    exact = numbers(torch.logdet(kernel(x, x) + log_noise.exp() * torch.eye(60)))
    averaged(estimate, exact)


def test_gradient_reaches_what_a_callable_captures(gen):
    A, t = spd(gen, 30), torch.tensor(0.7, requires_grad=True)

    def estimate(seed):
        result = LanczosLogdet(seed=seed, steps=30)(lambda V: A @ V + t.square() * V, like=A[0])
        return torch.autograd.grad(result.value.value, t)[0]

    exact = torch.autograd.grad(torch.logdet(A + t.square() * torch.eye(30)), t)[0]
    averaged(estimate, exact)


def test_gradient_in_a_batch_belongs_to_its_item(gen):
    A = spd(gen, 2, 10).requires_grad_()
    z = all_directions(10).expand(2, 10, 10)
    result = logdet_from_probes(LanczosLogdet(steps=10), A, z)
    (gradient,) = torch.autograd.grad(result.value.value, A, torch.tensor([2.0, -1.0]))
    expected = torch.linalg.inv(A.detach()) * torch.tensor([2.0, -1.0])[:, None, None]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-11)


def test_solves_of_the_gradient_are_refined_where_the_steps_were_too_few(gen):
    n = 80
    A = spectrum(gen, torch.logspace(-3, 1, n)).requires_grad_()
    options = LanczosLogdet(steps=20, solve_rtol=1e-8)
    result = logdet_from_probes(options, A, all_directions(n))
    assert float(result.stats["solve_residual"].max()) > 0.1
    assert result.stats["solve_iterations"] > 0
    (gradient,) = torch.autograd.grad(result.value.value, A)
    inverse = torch.linalg.inv(A.detach())
    # |A⁻¹z - x| <= |A⁻¹| |r| for each of the columns.
    assert float((gradient - inverse).norm()) <= 1e3 * 1e-8 * math.sqrt(n)


def test_no_solve_is_spent_where_no_gradient_is_wanted(gen):
    A = spectrum(gen, torch.logspace(-3, 1, 80))
    with torch.no_grad():
        result = LanczosLogdet(steps=20)(A.requires_grad_())
    assert result.stats["solve_iterations"] == 0
    assert result.stats["products"] == 20
    assert not result.value.value.requires_grad
    assert not LanczosLogdet(steps=20)(A.detach()).value.value.requires_grad


def test_only_the_value_carries_a_gradient(gen):
    result = LanczosLogdet()(spd(gen, 8).requires_grad_())
    assert result.value.value.requires_grad
    assert not result.value.stderr.requires_grad


@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_second_derivative_raises(gen, upstream):
    A, t = spd(gen, 6), torch.tensor(2.0, requires_grad=True)
    value = LanczosLogdet()(lambda V: A @ V + t.square() * V, like=A[0]).value.value
    loss = value if upstream == 1.0 else value.square()
    (first,) = torch.autograd.grad(loss, t, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(first, t)
