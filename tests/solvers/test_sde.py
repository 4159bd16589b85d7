import math

import pytest
import torch

from stochproc.solvers import Status, brownian_increments, integrate, time_grid
from tests.solvers.sde_examples import (
    Equation,
    ExactOrnsteinUhlenbeck,
    Neural,
    coarsen,
    geometric,
    geometric_solution,
    slope,
)

KINDS = ("diagonal", "scalar", "additive", "general")
FACTORS = (1, 2, 4, 8, 16)


def strong_errors(equation, solution, shape, gen, *, n=256, method):
    """Mean error at the end of one path on grids of n / factor steps."""
    fine = brownian_increments([0.0, 1.0], shape, dt=1 / n, generator=gen)
    exact = solution(fine.sum(0))
    errors = []
    for k in FACTORS:
        y0 = torch.ones_like(exact)
        value = integrate(equation, y0, [0.0, 1.0], dt=k / n, noise=coarsen(fine, k), method=method).value[-1]
        errors.append((value - exact).norm(dim=-1).mean())
    return slope(FACTORS, errors)


def test_euler_has_strong_order_one_half_on_geometric_brownian_motion(gen):
    def solution(w):
        return geometric_solution(1.0, w, 1.0)

    order = strong_errors(geometric(), solution, (4000, 1), gen, method="euler")
    # 4000 paths, about 2 % standard error a level and common to all levels; the next term of the error adds some
    # sqrt(1/16) of an order at the coarse end.
    assert order == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("noise_type", ["diagonal", "general"])
def test_heun_has_strong_order_one_where_the_noise_commutes(gen, noise_type):
    def solution(w):
        return geometric_solution(1.0, w, 1.0, sde_type="stratonovich")

    equation = geometric(noise_type=noise_type, sde_type="stratonovich")
    assert strong_errors(equation, solution, (4000, 2), gen, method="heun") == pytest.approx(1.0, abs=0.1)


def test_heun_has_strong_order_one_on_a_rotation_driven_by_one_brownian_motion(gen):
    # dy = J y o dW turns (1, 1) by the angle W.
    J = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    equation = Equation(lambda t, y: 0 * y, lambda t, y: (y @ J.T).unsqueeze(-1), "scalar", "stratonovich")
    fine = brownian_increments([0.0, 1.0], (2000, 1), dt=1 / 256, generator=gen)
    w = fine.sum(0)
    exact = torch.cat([w.cos() - w.sin(), w.cos() + w.sin()], -1)
    errors = [
        (
            integrate(
                equation, torch.ones(2000, 2), [0.0, 1.0], dt=k / 256, noise=coarsen(fine, k), method="heun"
            ).value[-1]
            - exact
        )
        .norm(dim=-1)
        .mean()
        for k in FACTORS
    ]
    assert slope(FACTORS, errors) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_without_noise_the_methods_have_their_orders_as_ode_solvers(method, order):
    sde_type = "ito" if method == "euler" else "stratonovich"
    equation = Equation(lambda t, y: -y * torch.cos(t), lambda t, y: 0 * y, "diagonal", sde_type)
    steps = [2.0**-k for k in range(4, 9)]
    exact = math.exp(-math.sin(2.0))
    errors = [
        abs(integrate(equation, torch.ones(1), [0.0, 2.0], dt=h, method=method).value[-1].item() - exact) for h in steps
    ]
    assert slope(steps, errors) == pytest.approx(order, abs=0.05)  # next term: relative h = 1/16 at the coarse end


def test_heun_integrates_drift_and_additive_noise_linear_in_time_exactly(gen):
    equation = Equation(lambda t, y: (2 * t).expand_as(y), lambda t, y: (1 + t).expand(*y.shape, 1), "additive", "ito")
    dw = brownian_increments([1.0, 3.0], (5, 1), dt=0.5, generator=gen)
    value = integrate(equation, torch.zeros(5, 1), [1.0, 3.0], dt=0.5, noise=dw, method="heun").value
    middle = 1 + torch.tensor([1.25, 1.75, 2.25, 2.75])
    torch.testing.assert_close(value[-1], 8.0 + (middle[:, None, None] * dw).sum(0), rtol=1e-13, atol=1e-13)


def test_euler_on_ornstein_uhlenbeck_has_the_mean_and_variance_of_its_recursion(gen):
    theta, sigma, h, n, paths = 1.5, 0.6, 0.1, 20, 40_000
    equation = Equation(lambda t, y: -theta * y, lambda t, y: torch.full_like(y, sigma))
    value = integrate(equation, torch.full((paths, 1), 2.0), [0.0, 1.0, 2.0], dt=h, generator=gen).value
    a = 1 - theta * h
    for k, y in ((n // 2, value[1]), (n, value[2])):
        variance = sigma**2 * h * (1 - a ** (2 * k)) / (1 - a**2)
        # Four standard errors each: one false alarm in 4000 seeds for all four checks.
        assert float(y.mean()) == pytest.approx(2 * a**k, abs=4 * math.sqrt(variance / paths))
        assert float(y.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / paths))


def test_own_step_of_ornstein_uhlenbeck_is_exact_in_law_at_any_step(gen):
    paths, ts = 40_000, [0.0, 0.7, 2.0]
    sde = ExactOrnsteinUhlenbeck(1)
    value = integrate(sde, torch.full((paths, 1), 2.0), ts, method="step", generator=gen).value
    for t, y in zip(ts[1:], value[1:], strict=True):
        variance = sde.sigma**2 * (1 - math.exp(-2 * sde.theta * t)) / (2 * sde.theta)
        assert float(y.mean()) == pytest.approx(2 * math.exp(-sde.theta * t), abs=4 * math.sqrt(variance / paths))
        assert float(y.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / paths))


def test_own_step_follows_its_formula_on_the_normals_it_is_given(gen):
    sde, h = ExactOrnsteinUhlenbeck(3), 0.25
    noise = torch.randn(4, 5, 3, generator=gen)
    value = integrate(sde, torch.ones(5, 3), [0.0, 1.0], dt=h, method="step", noise=noise).value
    decay = math.exp(-sde.theta * h)
    std = sde.sigma * math.sqrt((1 - decay**2) / (2 * sde.theta))
    powers = torch.tensor([decay ** (3 - i) for i in range(4)])
    expected = decay**4 + std * (powers[:, None, None] * noise).sum(0)
    torch.testing.assert_close(value[-1], expected, rtol=1e-13, atol=1e-13)


def test_own_step_may_want_noise_of_any_shape_and_sees_equal_steps_as_equal(gen):
    class Wide:
        noise_shape = (2, 4)

        def __init__(self):
            self.seen = []

        def step(self, t, y, h, noise):
            self.seen.append((float(t), h))
            return y + noise.sum(-1)

    sde = Wide()
    noise = torch.randn(100, 6, 2, 4, generator=gen)
    value = integrate(sde, torch.zeros(6, 2), torch.linspace(0, 1, 11), dt=0.01, method="step", noise=noise).value
    torch.testing.assert_close(value[-1], noise.sum((0, -1)), rtol=1e-12, atol=1e-12)
    assert len({h for _, h in sde.seen}) == 1
    assert [t for t, _ in sde.seen] == time_grid(torch.linspace(0, 1, 11), 0.01).times[:-1].tolist()


def reference(sde, y, grid, dw, method):
    """One path at a time, by the textbook."""
    rows = [y.clone()]
    for i in range(grid.n_steps):
        t, after, h = grid.times[i], grid.times[i + 1], grid.times[i + 1] - grid.times[i]

        def increment(t, y, i=i, h=h):
            f, g = sde.drift(t, y), sde.diffusion(t, y)
            return torch.stack(
                [
                    f[b] * h + (torch.diag(g[b]) if sde.noise_type == "diagonal" else g[b]) @ dw[i, b]
                    for b in range(len(y))
                ]
            )

        k = increment(t, y)
        y = y + k if method == "euler" else y + (k + increment(after, y + k)) / 2
        rows.append(y)
    return torch.stack(rows)[list(grid.output)]


@pytest.mark.parametrize("noise_type", KINDS)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_every_kind_of_noise_follows_the_textbook_step(gen, noise_type, method):
    sde = Neural(3, noise_type, "ito" if method == "euler" else "stratonovich")
    ts = torch.tensor([0.1, 0.35, 1.0])
    dw = brownian_increments(ts, (4, sde.m), dt=0.1, generator=gen)
    y0 = torch.randn(4, 3, generator=gen)
    result = integrate(sde, y0, ts, dt=0.1, noise=dw, method=method)
    expected = reference(sde, y0, time_grid(ts, 0.1), dw, method)
    torch.testing.assert_close(result.value, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(result.value[0], y0)


@pytest.mark.parametrize("noise_type", KINDS)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_a_batch_is_its_paths_side_by_side(gen, noise_type, batch):
    sde = Neural(2, noise_type)
    y0 = torch.randn(*batch, 2, generator=gen)
    dw = brownian_increments([0.0, 1.0], (*batch, sde.m), dt=0.25, generator=gen)
    value = integrate(sde, y0, [0.0, 0.5, 1.0], dt=0.25, noise=dw).value
    assert value.shape == (3, *batch, 2)
    flat = integrate(
        sde, y0.reshape(-1, 2), [0.0, 0.5, 1.0], dt=0.25, noise=dw.reshape(4, *y0.reshape(-1, 2).shape[:1], sde.m)
    ).value
    torch.testing.assert_close(value.reshape(flat.shape), flat, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("noise_type", ["diagonal", "additive"])
def test_paths_with_their_own_times_are_those_integrated_alone(gen, noise_type, method):
    sde = Neural(2, noise_type, "ito" if method == "euler" else "stratonovich")
    ts = torch.tensor([[0.0, 0.5, 1.0], [1.0, 3.0, 3.5]])
    # Two steps an interval for both: the longer of the two decides.
    dw = brownian_increments(ts, (4, 2, 2), dt=1.0, generator=gen)
    y0 = torch.randn(4, 2, 2, generator=gen)
    together = integrate(sde, y0, ts, dt=1.0, noise=dw, method=method).value
    grid = time_grid(ts, 1.0)
    for b in range(2):
        alone = integrate(sde, y0[:, b], grid.times[:, b, 0], noise=dw[:, :, b], method=method).value
        torch.testing.assert_close(together[:, :, b], alone[list(grid.output)], rtol=1e-12, atol=1e-12)


def test_drift_sees_the_time_at_the_start_of_each_step():
    seen = []

    def drift(t, y):
        seen.append(t)
        return 0 * y

    ts = [0.0, 0.3, 1.0]
    integrate(Equation(drift, lambda t, y: 0 * y), torch.zeros(1), ts, dt=0.1)
    assert [float(t) for t in seen[1:]] == time_grid(ts, 0.1).times[:-1].tolist()  # the first call checks shapes
    assert all(t.shape == () and t.dtype == torch.float64 for t in seen)


def test_the_requested_times_do_not_change_the_path(gen):
    sde = Neural(2)
    dw = brownian_increments([0.0, 1.0], (3, 2), dt=0.125, generator=gen)
    all_times = integrate(sde, torch.zeros(3, 2), torch.linspace(0, 1, 9), noise=dw).value
    ends = integrate(sde, torch.zeros(3, 2), [0.0, 1.0], dt=0.125, noise=dw).value
    assert torch.equal(all_times[[0, -1]], ends)


@pytest.mark.parametrize("method", ["euler", "heun", "step"])
def test_state_keeps_its_dtype_on_times_of_either(gen, method):
    sde = (
        ExactOrnsteinUhlenbeck(2)
        if method == "step"
        else geometric(sde_type="ito" if method == "euler" else "stratonovich")
    )
    for dtype in (torch.float32, torch.float64):
        for times in (torch.float32, torch.float64):
            ts = torch.linspace(0, 1, 11, dtype=times)
            for own in (ts, ts.expand(3, -1)):
                if own.ndim > 1 and method == "step":
                    continue
                value = integrate(sde, torch.ones(3, 2, dtype=dtype), own, dt=0.01, generator=gen, method=method).value
                assert value.dtype == dtype


def test_single_precision_agrees_with_double_to_its_rounding(gen):
    sde = Neural(2)
    dw = brownian_increments([0.0, 1.0], (50, 2), dt=0.01, generator=gen)
    double = integrate(sde, torch.zeros(50, 2), [0.0, 1.0], dt=0.01, noise=dw).value
    single = integrate(sde.float(), torch.zeros(50, 2).float(), [0.0, 1.0], dt=0.01, noise=dw.float()).value
    # 100 steps of one rounding each, amplified by at most exp of the Lipschitz constant (about 2).
    torch.testing.assert_close(single.double(), double, rtol=0, atol=100 * 2**-24 * math.exp(2))


def test_one_seed_is_one_path_whoever_draws_it_and_in_whatever_pieces():
    def gen():
        return torch.Generator().manual_seed(3)

    sde, y0 = Neural(2), torch.zeros(5, 2, requires_grad=True)
    ts = torch.linspace(0, 1, 5)
    plain = integrate(sde, y0, ts, dt=0.01, generator=gen()).value
    dw = brownian_increments(ts, (5, 2), dt=0.01, generator=gen())
    assert torch.equal(plain, integrate(sde, y0, ts, dt=0.01, noise=dw).value)
    assert torch.equal(plain, integrate(sde, y0, ts, dt=0.01, generator=gen(), checkpoint_every=7).value)
    assert torch.equal(plain, integrate(sde, y0, ts, dt=0.01, generator=gen(), callback=lambda s: None).value)
    assert not torch.equal(plain, integrate(sde, y0, ts, dt=0.01).value)


def test_calls_with_one_generator_continue_its_stream(gen):
    sde, y0 = Neural(2), torch.zeros(5, 2)
    first, second = (integrate(sde, y0, [0.0, 1.0], generator=gen).value[-1] for _ in range(2))
    assert not torch.equal(first, second)


def test_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    integrate(Neural(2), torch.zeros(5, 2), [0.0, 1.0], dt=0.1, checkpoint_every=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_beyond_one_block_is_that_of_one_draw():
    def gen():
        return torch.Generator().manual_seed(3)

    shape = (3000, 7)  # 13 steps fill a block
    sde, y0 = geometric(), torch.ones(shape)
    dw = brownian_increments([0.0, 1.0], shape, dt=0.01, generator=gen())
    drawn = integrate(sde, y0, [0.0, 1.0], dt=0.01, generator=gen()).value
    assert torch.equal(drawn, integrate(sde, y0, [0.0, 1.0], dt=0.01, noise=dw).value)


def test_result_says_what_was_done(gen):
    result = integrate(geometric(), torch.ones(3, 2), [0.0, 0.3, 1.0], dt=0.2, generator=gen)
    assert result.ok
    assert result.convergence.iterations == 6
    assert (result.convergence.residual, result.convergence.tolerance) == (0.0, 0.0)
    stats = result.stats
    assert (stats["n_steps"], stats["n_times"], stats["method"], stats["backend"]) == (6, 3, "euler", "scan")
    assert stats["min_step"] == pytest.approx(0.15, rel=1e-14)
    assert stats["max_step"] == pytest.approx(0.175, rel=1e-14)
    assert stats["failed"].tolist() == [False] * 3


@pytest.mark.parametrize("backend", ["scan", "torchsde"])
def test_a_path_that_blows_up_is_reported_and_leaves_the_others_alone(backend):
    # dy = y^3 from 10 is infinite within a few Euler steps; from 0.1 it is not.
    equation = Equation(lambda t, y: y**3, lambda t, y: 0 * y)
    result = integrate(equation, torch.tensor([[0.1], [10.0]]), [0.0, 0.5, 1.0, 1.5], dt=0.1, backend=backend)
    assert result.status is Status.NONFINITE
    assert result.stats["failed"].tolist() == [False, True]
    assert result.value.shape == (4, 2, 1)
    assert result.value[:, 0].isfinite().all()
    assert not result.value[-1, 1].isfinite().all()
    bad = int((~result.value[:, 1, 0].isfinite()).nonzero()[0])
    assert f"from t = {0.5 * bad:.6g} on in 1 of 2 paths" in result.convergence.message
    assert result.convergence.residual == pytest.approx(1.5 - 0.5 * (bad - 1))


def test_large_finite_states_are_no_failure():
    assert integrate(Equation(lambda t, y: 0 * y, lambda t, y: 0 * y), torch.full((4,), 1e308), [0.0, 1.0]).ok


@pytest.mark.parametrize("backend", ["scan", "torchsde"])
@pytest.mark.parametrize("every", [None, 1, 4, 100])
def test_callback_sees_each_time_once_and_may_stop(gen, every, backend):
    sde, y0 = Neural(2), torch.zeros(3, 2)
    dw = brownian_increments([0.0, 1.0], (3, 2), dt=0.1, generator=gen)
    ts = [0.0, 0.2, 0.5, 1.0]
    full = integrate(sde, y0, ts, dt=0.1, noise=dw, backend=backend).value
    states = []
    options = {"dt": 0.1, "noise": dw, "checkpoint_every": every, "backend": backend}
    integrate(sde, y0, ts, callback=states.append, **options).value.sum().backward()
    assert [s.iteration for s in states] == [2, 5, 10]
    assert [s.residual for s in states] == pytest.approx([0.8, 0.5, 0.0])
    torch.testing.assert_close(torch.stack([s.value for s in states]), full[1:], rtol=1e-13, atol=1e-13)
    assert not any(s.value.requires_grad for s in states)
    stopped = integrate(sde, y0, ts, callback=lambda s: s.iteration >= 5, **options)
    assert stopped.status is Status.STOPPED
    torch.testing.assert_close(stopped.value, full[:3], rtol=1e-13, atol=1e-13)
    assert stopped.stats["n_times"] == 3
    assert stopped.convergence.iterations == 5
    assert stopped.convergence.residual == pytest.approx(0.5)
    assert "t = 0.5" in stopped.convergence.message


def test_state_and_noise_follow_the_device(device):
    y0 = torch.ones(4, 2, device=device)
    cpu = torch.Generator().manual_seed(0)
    value = integrate(geometric(), y0, [0.0, 1.0], dt=0.1, generator=cpu).value
    assert value.device.type == device.type
    expected = integrate(geometric(), y0.cpu(), [0.0, 1.0], dt=0.1, generator=torch.Generator().manual_seed(0)).value
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-13, atol=0)
    assert integrate(geometric(), y0, [0.0, 1.0], dt=0.1).value.device.type == device.type
