import math

import pytest
import torch

from stochproc.solvers import brownian_increments, integrate
from tests.solvers.sde_examples import Equation, Neural, coarsen, geometric, geometric_solution, slope

KINDS = ("diagonal", "scalar", "additive", "general")
ITO = ("euler", "milstein", "srk")
STRATONOVICH = ("heun", "milstein", "midpoint", "euler_heun", "reversible_heun", "log_ode")


def both(sde, y0, ts, **options):
    return [integrate(sde, y0, ts, backend=b, **options).value for b in ("scan", "torchsde")]


@pytest.mark.parametrize("noise_type", KINDS)
@pytest.mark.parametrize(("method", "sde_type"), [("euler", "ito"), ("heun", "stratonovich")])
@pytest.mark.parametrize("dt", [1 / 16, 0.01])
def test_backends_agree_path_by_path(gen, noise_type, method, sde_type, dt):
    sde = Neural(3, noise_type, sde_type)
    y0 = torch.randn(4, 3, generator=gen)
    ts = [0.0, 0.25, 1.0]
    noise = brownian_increments(ts, (4, sde.m), dt=dt, generator=gen)
    ours, theirs = both(sde, y0, ts, dt=dt, noise=noise, method=method)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # the target of the library


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_agree_on_irregular_times_and_any_batch(gen, dtype):
    sde = Neural(2).to(dtype)
    y0 = torch.randn(3, 4, 2, generator=gen, dtype=dtype)
    ts = torch.tensor([0.0, 0.013, 0.3, 0.31, 1.0])
    ours, theirs = both(sde, y0, ts, dt=0.1, noise=brownian_increments(ts, y0.shape, dt=0.1, dtype=dtype))
    tol = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]  # the targets of the library
    torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)
    one, other = both(sde, y0[0, 0], ts, dt=0.1, noise=brownian_increments(ts, (2,), dt=0.1, dtype=dtype))
    torch.testing.assert_close(one, other, rtol=tol, atol=tol)


def test_backends_draw_the_same_path_from_one_seed():
    def gen():
        return torch.Generator().manual_seed(5)

    sde, y0 = Neural(2), torch.zeros(3, 2)
    ours, theirs = (
        integrate(sde, y0, [0.0, 1.0], dt=0.1, backend=b, generator=gen()).value for b in ("scan", "torchsde")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_backends_agree_in_their_gradients(gen):
    sde = Neural(2, "general")
    y0 = torch.randn(3, 2, generator=gen, requires_grad=True)
    noise = brownian_increments([0.0, 1.0], (3, 2), dt=0.1, generator=gen).requires_grad_()
    inputs = [y0, noise, *sde.parameters()]
    ours, theirs = (
        torch.autograd.grad(v.square().sum(), inputs) for v in both(sde, y0, [0.0, 1.0], dt=0.1, noise=noise)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_grid_of_torchsde_is_ours_where_its_own_sums_of_steps_would_miss(gen):
    torchsde = pytest.importorskip("torchsde")

    class Walk(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self):
            super().__init__()
            self.calls = 0

        def drift(self, t, y):
            self.calls += 1
            return torch.zeros_like(y)

        def diffusion(self, t, y):
            return torch.ones_like(y)

        f, g = drift, diffusion

    walk, ts = Walk(), torch.tensor([0.0, 1.0])
    noise = brownian_increments(ts, (2, 1), dt=0.1, generator=gen)
    value = integrate(walk, torch.zeros(2, 1), ts, dt=0.1, noise=noise, backend="torchsde").value
    torch.testing.assert_close(value[-1], noise.sum(0), rtol=1e-12, atol=1e-12)
    assert walk.calls == 12  # a step each, and two evaluations that check shapes
    walk.calls = 0
    torchsde.sdeint(walk, torch.zeros(2, 1), ts, dt=0.1, method="euler")
    assert walk.calls == 12  # one evaluation that checks shapes, so eleven steps: ten times 0.1 is below 1


@pytest.mark.parametrize(("method", "noise_type"), [("milstein", "diagonal"), ("log_ode", "general")])
def test_no_method_makes_a_graph_where_nothing_asks_for_one(method, noise_type):
    options = {"dt": 0.5, "method": method, "backend": "torchsde"}
    sde = Neural(2, noise_type, "stratonovich")
    y0 = torch.ones(3, 2, requires_grad=True)
    assert integrate(sde, y0.detach(), [0.0, 1.0], **options).value.requires_grad
    sde.requires_grad_(False)
    assert integrate(sde, y0, [0.0, 1.0], **options).value.requires_grad
    assert not integrate(sde, y0.detach(), [0.0, 1.0], **options).value.requires_grad


@pytest.mark.parametrize("method", ITO)
@pytest.mark.parametrize("noise_type", KINDS[:3])
def test_every_ito_method_of_torchsde_solves_every_noise_it_is_for(gen, method, noise_type):
    strong_error_falls(gen, method, noise_type, "ito")


# Milstein's scheme is not for general noise.
@pytest.mark.parametrize(
    ("method", "noise_type"), [(m, n) for m in STRATONOVICH for n in KINDS if (m, n) != ("milstein", "general")]
)
def test_every_stratonovich_method_of_torchsde_solves_every_noise_it_is_for(gen, method, noise_type):
    strong_error_falls(gen, method, noise_type, "stratonovich")


def strong_error_falls(gen, method, noise_type, sde_type):
    """At 64 steps the error against the exact solution is some hundredths; a wrong reading is off by sigma² / 2."""
    dw = brownian_increments([0.0, 1.0], (500, 1), dt=1 / 64, generator=gen)
    w = dw.sum(0)
    if noise_type == "additive":
        equation = Equation(lambda t, y: 0 * y, lambda t, y: torch.full((*y.shape, 1), 0.8), "additive", sde_type)
        exact = 1 + 0.8 * w
    else:
        equation = geometric(noise_type=noise_type, sde_type=sde_type)
        exact = geometric_solution(1.0, w, 1.0, sde_type=sde_type)
    options = {"dt": 1 / 64, "noise": dw, "method": method, "backend": "torchsde", "generator": gen}
    value = integrate(equation, torch.ones(500, 1), [0.0, 1.0], **options).value[-1]
    assert float((value - exact).abs().mean() / exact.abs().mean()) < 0.08


@pytest.mark.parametrize(("method", "order"), [("milstein", 1.0), ("srk", 1.5)])
def test_methods_of_torchsde_have_their_strong_order_on_our_path(gen, method, order):
    # The solution depends on W(1) alone, so any areas of the right law give a path it belongs to.
    fine = brownian_increments([0.0, 1.0], (2000, 1), dt=1 / 128, generator=gen)
    exact = geometric_solution(1.0, fine.sum(0), 1.0)
    factors = (1, 2, 4, 8)
    errors = []
    for k in factors:
        options = {"dt": k / 128, "noise": coarsen(fine, k), "method": method, "generator": gen}
        value = integrate(geometric(), torch.ones(2000, 1), [0.0, 1.0], backend="torchsde", **options).value[-1]
        errors.append((value - exact).abs().mean())
    assert slope(factors, errors) == pytest.approx(order, abs=0.15)  # next term sqrt(1/16), 3 % standard error


def test_areas_have_the_variance_of_levy_areas(gen):
    # dy3 = (y1 dW2 - y2 dW1) / 2: y3 is the area, which one step of the log-ODE method has exactly. Its variance
    # is t²/4 and its fourth moment 5 t⁴/16, so that 20,000 squares have a standard error of 0.0035 at t = 1.
    def diffusion(t, y):
        zero, one = torch.zeros_like(y[..., 0]), torch.ones_like(y[..., 0])
        columns = [torch.stack([one, zero, -y[..., 1] / 2], -1), torch.stack([zero, one, y[..., 0] / 2], -1)]
        return torch.stack(columns, -1)

    equation = Equation(lambda t, y: 0 * y, diffusion, "general", "stratonovich")
    value = integrate(
        equation, torch.zeros(20_000, 3), [0.0, 1.0, 3.0], method="log_ode", backend="torchsde", generator=gen
    ).value
    assert float(value[1, :, 2].square().mean()) == pytest.approx(0.25, abs=4 * 0.0035)
    assert float(value[2, :, 2].square().mean()) == pytest.approx(9 / 4, abs=4 * 0.0035 * 9)


def test_areas_are_repeated_by_the_seed_and_renewed_by_the_next_call():
    noise = brownian_increments([0.0, 1.0], (3, 1), dt=0.25)

    def run(gen, **options):
        options = {"method": "srk", "backend": "torchsde", "noise": noise, **options}
        return integrate(geometric(), torch.ones(3, 1), [0.0, 1.0], dt=0.25, generator=gen, **options).value

    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    first = run(one)
    assert torch.equal(first, run(other))
    assert torch.equal(run(one), run(other, checkpoint_every=3))
    assert not torch.equal(first, run(one))


@pytest.mark.parametrize("steps", [[0.0, 0.5, 1.0], [0.0, 0.2, 1.0]])
def test_adjoint_of_reversible_heun_is_its_exact_gradient(gen, steps):
    sde = Neural(2, "general", "stratonovich")
    y0 = torch.randn(3, 2, generator=gen, requires_grad=True)
    noise = brownian_increments(steps, (3, 2), dt=0.125, generator=gen)
    options = {"dt": 0.125, "noise": noise, "method": "reversible_heun", "backend": "torchsde"}
    inputs = [y0, *sde.parameters()]
    plain, adjoint = (
        torch.autograd.grad(integrate(sde, y0, steps, adjoint=a, **options).value.square().sum(), inputs)
        for a in (False, True)
    )
    for a, b in zip(adjoint, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # a dozen steps forth and back


def test_adjoint_of_another_method_approaches_its_gradient(gen):
    sde = Neural(2, "diagonal", "stratonovich")
    y0 = torch.randn(20, 2, generator=gen)
    fine = brownian_increments([0.0, 1.0], (20, 2), dt=1 / 256, generator=gen)
    errors = []
    for k in (1, 16):
        options = {"dt": k / 256, "noise": coarsen(fine, k), "method": "midpoint", "backend": "torchsde"}
        plain, adjoint = (
            torch.autograd.grad(
                integrate(sde, y0, [0.0, 1.0], adjoint=a, **options).value[-1].square().mean(), list(sde.parameters())
            )
            for a in (False, True)
        )
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(adjoint, plain, strict=True)))
    assert errors[0] < errors[1] / 4 < 0.05  # order 1: a factor of 16, less what chance takes
    assert math.isfinite(errors[1])
