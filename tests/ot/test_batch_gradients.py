"""Derivatives of a batch of transport problems."""

import pytest
import torch

from stochproc.ot import solve
from stochproc.ot._batch import solve_batch

OUTPUTS = {
    "plan": lambda r: r.plan,
    "value": lambda r: r.value,
    "value_linear": lambda r: r.value_linear,
    "potentials": lambda r: r.potentials,
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_the_optimum(output, shared, gen):
    B, n, m = 2, 4, 3
    M = torch.rand(*(() if shared else (B,)), n, m, generator=gen)
    logits = torch.randn(B, n, generator=gen), torch.randn(B, m, generator=gen)
    reg = torch.tensor([0.3, 0.1])

    def outputs(M, x, y, reg):
        # Weights through a softmax keep their mass.
        return OUTPUTS[output](solve_batch(M, x.softmax(1), y.softmax(1), reg=reg, tol=1e-13))

    arguments = [t.clone().requires_grad_() for t in (M, *logits, reg)]
    # Central differences at 1e-6 of solutions to 1e-13: 1e-7 at best.
    assert torch.autograd.gradcheck(outputs, arguments, eps=1e-6, atol=1e-6)


def test_the_value_of_a_batch_is_twice_differentiable(gen):
    M = torch.rand(2, 3, 3, generator=gen).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda M: solve_batch(M, reg=0.3, tol=1e-13).value, (M,), atol=1e-5)


def test_gradients_reach_the_matrices_of_a_list(gen):
    Ms = [torch.rand(n, m, generator=gen, requires_grad=True) for n, m in ((3, 4), (9, 2), (4, 3))]
    result = solve_batch(Ms, reg=0.2, tol=1e-13)
    together = torch.autograd.grad(sum(p.square().sum() for p in result.plan) + result.value.sum(), Ms)
    for M, found in zip(Ms, together, strict=True):
        alone = solve(M, reg=0.2, tol=1e-13)
        (wanted,) = torch.autograd.grad(alone.plan.square().sum() + alone.value, M)
        # Backward solves to 1e-10.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


def test_envelope_gradients_reach_the_value_alone(gen):
    M = torch.rand(2, 3, 4, generator=gen, requires_grad=True)
    result = solve_batch(M, reg=0.2, grad="envelope")
    (found,) = torch.autograd.grad(result.value.sum(), M)
    torch.testing.assert_close(found, result.plan, rtol=0, atol=1e-12)
    assert not result.plan.requires_grad
    assert not result.value_linear.requires_grad


def test_one_reg_for_all_may_require_a_gradient(gen):
    # Warnings are errors here: torch has one for numbers taken from a graph.
    M, a = torch.rand(4, 3, generator=gen), torch.rand(2, 4, generator=gen) + 0.1
    a = a / a.sum(1, keepdim=True)
    reg = torch.tensor(0.3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda reg: solve_batch(M, a, reg=reg, tol=1e-13).value, (reg,))
