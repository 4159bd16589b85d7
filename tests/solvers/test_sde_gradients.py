import weakref

import pytest
import torch

from stochproc.solvers import brownian_increments, integrate
from tests.solvers.sde_examples import ExactOrnsteinUhlenbeck, Neural

KINDS = ("diagonal", "scalar", "additive", "general")


def gradients(sde, y0, ts, noise=None, **options):
    value = integrate(sde, y0, ts, noise=noise, **options).value
    inputs = [y0, *sde.parameters(), *([] if noise is None else [noise])]
    weights = torch.linspace(-1, 2, value.numel()).reshape(value.shape)
    return value, torch.autograd.grad((weights * value).sum(), inputs)


@pytest.mark.parametrize("noise_type", KINDS)
@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("every", [None, 2])
def test_gradients_of_state_noise_and_parameters_match_differences(gen, noise_type, method, every):
    sde = Neural(2, noise_type, "ito" if method == "euler" else "stratonovich")
    y0 = torch.randn(2, 2, generator=gen, requires_grad=True)
    noise = brownian_increments([0.0, 1.0], (2, sde.m), dt=0.25, generator=gen).requires_grad_()
    A, B = (p.detach().clone().requires_grad_() for p in sde.parameters())
    del sde.A, sde.B

    def value(y0, noise, A, B):
        sde.A, sde.B = A, B
        return integrate(sde, y0, [0.0, 0.5, 1.0], dt=0.25, noise=noise, method=method, checkpoint_every=every).value

    assert torch.autograd.gradcheck(value, (y0, noise, A, B))


@pytest.mark.parametrize("backend", ["scan", "torchsde"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("every", [1, 7, 10, 1000])
def test_checkpointing_changes_no_gradient(gen, backend, given, every):
    sde = Neural(3, "general")
    y0 = torch.randn(4, 3, generator=gen, requires_grad=True)
    ts = [0.0, 0.33, 0.5, 1.0]
    noise = brownian_increments(ts, (4, 2), dt=0.01, generator=gen).requires_grad_() if given else None
    results = []
    for k in (None, every):
        seeded = torch.Generator().manual_seed(1)
        results.append(gradients(sde, y0, ts, noise, dt=0.01, backend=backend, checkpoint_every=k, generator=seeded))
    (value, plain), (same, checkpointed) = results
    torch.testing.assert_close(same, value, rtol=1e-13, atol=1e-13)
    for a, b in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # the same sums in another order


@pytest.mark.parametrize("method", ["reversible_heun", "log_ode", "midpoint"])
def test_checkpointing_carries_what_a_method_of_torchsde_remembers(gen, method):
    sde = Neural(2, "general", "stratonovich")
    y0 = torch.randn(4, 2, generator=gen, requires_grad=True)
    results = [
        gradients(
            sde,
            y0,
            [0.0, 0.33, 1.0],
            dt=0.05,
            method=method,
            backend="torchsde",
            checkpoint_every=k,
            generator=torch.Generator().manual_seed(1),
        )
        for k in (None, 4)
    ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_checkpointing_an_own_step_repeats_its_noise(gen):
    class Learned(ExactOrnsteinUhlenbeck):
        scale = torch.tensor(0.5, requires_grad=True)

        def step(self, t, y, h, noise):
            return super().step(t, torch.sin(self.scale * y), h, self.scale * noise)

    def grad(every):
        y0 = torch.ones(3, 2)
        seeded = torch.Generator().manual_seed(1)
        value = integrate(
            Learned(2), y0, [0.0, 1.0], dt=0.1, method="step", generator=seeded, checkpoint_every=every
        ).value
        return torch.autograd.grad(value.sum(), Learned.scale)[0]

    torch.testing.assert_close(grad(3), grad(None), rtol=1e-13, atol=0)


def test_checkpointing_keeps_no_tensor_of_the_inner_steps():
    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def kept(every):
        boxes = weakref.WeakSet()

        def pack(tensor):
            box = Kept(tensor.detach())  # an output kept with its graph would be a cycle
            boxes.add(box)
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            value = integrate(Neural(3), torch.zeros(4, 3), [0.0, 1.0], dt=0.01, checkpoint_every=every).value
        return len(boxes) if value.requires_grad else None

    assert kept(None) >= 100
    assert kept(10) <= 10 * 3  # each segment: its first state and the two parameters


def test_a_second_derivative_goes_through_checkpoints(gen):
    sde = Neural(2)
    noise = brownian_increments([0.0, 1.0], (1, 2), dt=0.25, generator=gen)

    def value(y0):
        return integrate(sde, y0, [0.0, 1.0], dt=0.25, noise=noise, checkpoint_every=2).value

    assert torch.autograd.gradgradcheck(value, torch.randn(1, 2, generator=gen, requires_grad=True))


@pytest.mark.parametrize("every", [None, 3])
def test_without_gradients_there_is_no_graph(every):
    with torch.no_grad():
        value = integrate(Neural(2), torch.zeros(1, 2), [0.0, 1.0], dt=0.1, checkpoint_every=every).value
    assert not value.requires_grad


def test_gradient_with_own_times_is_that_of_each_path(gen):
    sde = Neural(2)
    ts = torch.tensor([[0.0, 1.0], [0.5, 3.0]])
    noise = brownian_increments(ts, (2, 2), dt=0.5, generator=gen)
    y0 = torch.randn(2, 2, generator=gen, requires_grad=True)
    value, (together, *_) = gradients(sde, y0, ts, noise.requires_grad_(), dt=0.5)
    for b in range(2):
        own = torch.linspace(float(ts[b, 0]), float(ts[b, 1]), 6)
        start = y0.detach()[b].requires_grad_()
        path = integrate(sde, start, own, noise=noise[:, b]).value[[0, -1]]
        weights = torch.linspace(-1, 2, value.numel()).reshape(value.shape)[:, b]
        (alone,) = torch.autograd.grad((weights * path).sum(), start)
        torch.testing.assert_close(together[b], alone, rtol=1e-12, atol=1e-12)
