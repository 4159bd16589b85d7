import pytest
import torch
from torch.utils.checkpoint import checkpoint

from stochproc.solvers import _recompute
from stochproc.solvers._recompute import recompute


def grads_of(function, inputs, tensors):
    outputs = function(*inputs)
    loss = sum((k + 1) * out.square().sum() for k, out in enumerate(outputs))
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def same_gradients(function, inputs, tensors):
    plain = grads_of(function, inputs, tensors)
    again = grads_of(lambda *x: recompute(function, *x), inputs, tensors)
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)  # the same sums in another order


def leaves(gen, n):
    return [torch.randn(3, generator=gen, requires_grad=True) for _ in range(n)]


@pytest.fixture(autouse=True)
def fallbacks(monkeypatch, request):
    """Calls of ``torch.utils.checkpoint``, which only the tests of the fallback may make."""
    made = []

    def counting(*args, **options):
        made.append(args)
        return checkpoint(*args, **options)

    monkeypatch.setattr(_recompute, "checkpoint", counting)
    yield made
    assert bool(made) == ("fallback" in request.node.name)


def test_gradients_reach_inputs_and_everything_closed_over(gen):
    x, y, leaf, base = leaves(gen, 4)
    inner = base.exp()

    def function(x, y):
        return torch.sin(x * leaf) + inner, torch.stack([y, inner * x])

    same_gradients(function, (x, y), [x, y, leaf, base])
    same_gradients(function, (x.detach(), y.detach()), [leaf, base])


def test_what_is_closed_over_may_be_used_by_several_calls_in_a_chain(gen):
    x, base = leaves(gen, 2)
    inner, other = base.exp().split([1, 2])

    def step(x):
        return (torch.tanh(x * inner).roll(1) + torch.cat([other, inner]),)

    def chain(call):
        def run(x):
            for _ in range(3):
                (x,) = call(x)
            return (x,)

        return run

    plain = grads_of(chain(step), (x,), [x, base])
    inner, other = base.exp().split([1, 2])
    again = grads_of(chain(lambda x: recompute(step, x)), (x,), [x, base])
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_an_output_may_be_an_input_or_be_closed_over_or_constant(gen):
    x, leaf, base = leaves(gen, 3)
    inner = base.exp()
    same_gradients(lambda x: (x, leaf, inner, torch.ones(3), x * 2), (x,), [x, leaf, base])


def test_backward_accumulates_as_usual(gen):
    x, leaf = leaves(gen, 2)
    for _ in range(2):
        recompute(lambda x: (x * leaf,), x)[0].sum().backward()
    torch.testing.assert_close(x.grad, 2 * leaf.detach())
    torch.testing.assert_close(leaf.grad, 2 * x.detach())


def test_second_derivatives_are_right(gen):
    x, leaf, base = leaves(gen, 3)

    def value(x, leaf, base):
        inner = base.exp()
        return recompute(lambda x: (torch.sin(x * leaf) * inner,), x)[0]

    assert torch.autograd.gradcheck(value, (x, leaf, base))
    assert torch.autograd.gradgradcheck(value, (x, leaf, base))


def test_an_unused_output_costs_no_gradient(gen):
    x, leaf = leaves(gen, 2)
    first, _ = recompute(lambda x: (x * 2, x * leaf), x)
    gx, gl = torch.autograd.grad(first.sum(), [x, leaf], allow_unused=True)
    torch.testing.assert_close(gx, torch.full((3,), 2.0))
    assert gl is None or not gl.any()


def test_dropout_repeats_its_mask_and_the_global_state_moves_on_once():
    x = torch.ones(1000, requires_grad=True)
    before = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        (out,) = recompute(lambda x: (torch.nn.functional.dropout(x),), x)
        after = torch.get_rng_state()
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad, out)
        assert torch.equal(torch.get_rng_state(), after)
        torch.manual_seed(0)
        torch.nn.functional.dropout(x)
        assert torch.equal(torch.get_rng_state(), after)
    finally:
        torch.set_rng_state(before)


def test_without_gradients_it_is_the_function(gen):
    x, leaf = leaves(gen, 2)
    with torch.no_grad():
        assert not recompute(lambda x: (x * leaf,), x)[0].requires_grad
    assert not recompute(lambda x: (x * 2,), x.detach())[0].requires_grad


def test_fallback_serves_what_was_not_seen(gen, monkeypatch):
    def blind(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(_recompute._Seen, "__torch_function__", blind)
    x, leaf, base = leaves(gen, 3)
    inner = base.exp()
    same_gradients(lambda x: (torch.sin(x * inner), x * leaf), (x,), [x, leaf, base])


def test_fallback_serves_autocast(gen):
    x, leaf = leaves(gen, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=True):
        same_gradients(lambda x: (x * leaf,), (x,), [x, leaf])
