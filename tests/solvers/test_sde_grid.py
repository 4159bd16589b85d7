import math

import pytest
import torch

from stochproc.solvers import brownian_increments, time_grid


@pytest.mark.parametrize("dt", [0.5, 0.25, 0.1, 0.01, 0.001, 1 / 3, 1 / 128])
def test_a_divisor_of_one_gives_its_number_of_equal_steps(dt):
    grid = time_grid([0.0, 1.0], dt)
    assert grid.n_steps == round(1 / dt)
    assert grid.steps.unique().numel() == 1
    # Each point is one rounded division away from k / n.
    torch.testing.assert_close(grid.times, torch.arange(grid.n_steps + 1) / grid.n_steps, rtol=0, atol=0)


@pytest.mark.parametrize(("dt", "expected"), [(0.1, 3), (0.01, 30), (0.001, 300), (0.15, 2), (0.2, 2), (0.31, 1)])
@pytest.mark.parametrize("end", [0.3, 0.1 + 0.2, 0.3 * (1 - 2e-16)])
def test_rounding_of_decimal_times_adds_no_step(end, dt, expected):
    assert time_grid([0.0, end], dt).n_steps == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dt", [0.01, 0.005, 0.0025, 0.001])
def test_decimal_times_in_either_precision_give_the_decimal_count(dt, dtype):
    grid = time_grid(torch.linspace(0, 1, 101, dtype=dtype), dt)
    assert grid.n_steps == round(1 / dt)


def test_times_that_repeat_one_step_give_one_step_size_to_the_last_bit():
    assert time_grid(torch.linspace(0, 1, 1001)).steps.unique().numel() == 1
    assert time_grid([k * 0.1 for k in range(100)], 0.05).steps.unique().numel() == 1


def test_single_precision_times_give_one_step_size_that_keeps_their_span():
    grid = time_grid(torch.linspace(0, 1, 1001, dtype=torch.float32))
    assert grid.steps.unique().numel() == 1
    assert float(grid.steps.sum()) == pytest.approx(1.0, abs=1e-13)  # a thousand roundings


def test_steps_that_differ_by_more_than_rounding_stay_apart():
    grid = time_grid([0.0, 0.1, 0.2 + 1e-9, 0.3])
    assert grid.steps.unique().numel() == 3


def test_irregular_times_are_hit_exactly_by_the_fewest_equal_steps_within_dt(gen):
    ts = torch.rand(50, generator=gen).cumsum(0) - 3
    dt = 0.07
    grid = time_grid(ts, dt)
    assert torch.equal(grid.times[list(grid.output)], ts)
    counts = torch.tensor(grid.output).diff()
    gaps = ts.diff()
    assert bool((gaps / counts <= dt * (1 + 1e-12)).all())
    assert bool(((counts == 1) | (gaps / (counts - 1) > dt)).all())
    torch.testing.assert_close(grid.times.diff(), grid.steps, rtol=1e-9, atol=0)  # cancellation: eps * 25 / 0.02
    inside = grid.times[grid.output[7] : grid.output[8] + 1].diff()
    torch.testing.assert_close(inside, inside.mean().expand_as(inside), rtol=1e-9, atol=0)


def test_without_dt_the_grid_is_the_requested_times():
    ts = torch.tensor([0.0, 0.1, 1.0, 1.5])
    grid = time_grid(ts)
    assert torch.equal(grid.times, ts)
    assert grid.output == (0, 1, 2, 3)


def test_each_path_may_have_its_own_times():
    ts = torch.tensor([[0.0, 1.0, 1.5], [2.0, 2.2, 4.0]])
    grid = time_grid(ts, 0.5)
    # Common counts: two from the first row's first gap, four from the second row's last.
    assert grid.output == (0, 2, 6)
    assert grid.times.shape == (7, 2, 1)
    assert grid.steps.shape == (6, 2, 1)
    assert torch.equal(grid.times[[0, 2, 6], :, 0].T, ts)
    torch.testing.assert_close(grid.times.diff(dim=0), grid.steps, rtol=1e-12, atol=0)


def test_negative_and_large_times_need_no_special_care():
    assert time_grid([-1.0, 0.0], 0.1).n_steps == 10
    assert time_grid([1e6, 1e6 + 0.3], 0.1).n_steps == 3


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("ts", "message"),
    [
        ([0.0], r"ts must hold at least two times; got shape \(1,\)"),
        (torch.tensor(1.0), "ts must hold at least two times"),
        ([0.0, 1.0, 1.0], r"ts must be strictly increasing; got 1.0 at index \(2,\) after 1.0"),
        ([0.0, 1.0, 0.5], "ts must be strictly increasing; got 0.5"),
        ([0.0, math.nan], "ts must be finite"),
        ([0.0, math.inf], "ts must be finite"),
        (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), r"index \(1, 1\)"),
        (torch.tensor([0.0, 1.0], requires_grad=True), "ts must not require gradients"),
    ],
)
def test_rejects_times_that_are_no_grid(ts, message):
    with pytest.raises(ValueError, match=message):
        time_grid(ts)


@pytest.mark.bad_input
def test_rejects_integer_times():
    with pytest.raises(TypeError, match="ts must be float32 or float64"):
        time_grid(torch.arange(3))


@pytest.mark.parametrize("dt", [0.0, -0.1, math.nan, math.inf])
def test_rejects_dt_that_is_not_positive(dt):
    with pytest.raises(ValueError, match="dt must be positive"):
        time_grid([0.0, 1.0], dt)


@pytest.mark.parametrize("dt", [1e-11, 1e-300])
def test_rejects_steps_below_the_rounding_of_the_times(dt):
    with pytest.raises(ValueError, match="dt must be larger than the rounding of ts"):
        time_grid([1e6, 1e6 + 1e-9], dt)


def test_increments_have_the_steps_as_variances(gen):
    ts = [0.0, 0.5, 2.0]
    dw = brownian_increments(ts, (20_000, 2), dt=0.5, generator=gen)
    assert dw.shape == (4, 20_000, 2)
    dw = brownian_increments(ts, (20_000, 2), generator=gen)
    # 40,000 normals: the relative standard error of a variance is sqrt(2 / 40000) = 0.7 %; four of them.
    torch.testing.assert_close(dw.square().mean((1, 2)), torch.tensor([0.5, 1.5]), rtol=0.028, atol=0)
    assert abs(float((dw[0] * dw[1]).mean())) < 4 * math.sqrt(0.5 * 1.5 / 40_000)


def test_increments_of_own_times_have_the_own_steps_as_variances(gen):
    ts = torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    dw = brownian_increments(ts, (10_000, 2, 1), generator=gen)
    torch.testing.assert_close(dw.square().mean((0, 1, 3)), torch.tensor([1.0, 4.0]), rtol=0.057, atol=0)  # 4 s.e.


def test_increments_have_the_kind_of_the_times_unless_told():
    assert brownian_increments(torch.linspace(0, 1, 3, dtype=torch.float32), (2,)).dtype == torch.float32
    assert brownian_increments([0, 1], (2,)).dtype == torch.float64
    assert brownian_increments([0, 1], (2,), dtype=torch.float32).dtype == torch.float32


def test_equal_seeds_give_equal_increments_and_no_seed_fresh_ones():
    def draw(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return brownian_increments([0.0, 1.0], (3,), dt=0.1, generator=generator)

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(None), draw(None))
    assert torch.equal(torch.get_rng_state(), before)
