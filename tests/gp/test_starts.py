"""Several starts of a search: how many, and that the best is kept."""

import math

import pytest
import torch

from stochproc.gp import ScaleMixtureGPRegressor, arch
from stochproc.gp._starts import best_of_starts, n_starts_of
from stochproc.kernels import RBF
from stochproc.solvers import LBFGS, Convergence, Result, Status


def valleys(x):
    # Two bells upside down, too far apart for one search to reach the other.
    return -(-4 * (x + 1).square()).exp() - 1.5 * (-4 * (x - 1).square()).exp()


def search(x, **options):
    def run():
        result = LBFGS()(lambda: valleys(x).sum(), [x], [(-4.0, 4.0)], **options)
        return result, result.convergence.iterations

    return run


def gen():
    return torch.Generator().manual_seed(3)


def test_the_lowest_of_the_valleys_that_the_starts_found_is_kept():
    x = torch.tensor([-1.1], requires_grad=True)
    other = torch.zeros(())
    single, _ = best_of_starts(search(x), [x], [(-4.0, 4.0)], other, 1, gen())
    assert x.item() < 0
    x.data.fill_(-1.1)
    result, iterations = best_of_starts(search(x), [x], [(-4.0, 4.0)], other, 30, gen())
    assert x.item() == pytest.approx(1.0, abs=0.02)
    assert result.value == pytest.approx(valleys(x).item(), abs=1e-12)
    assert result.value < single.value
    starts = result.stats["starts"]
    assert len(starts) == 30
    assert min(s.loss for s in starts) == starts[result.stats["best_start"]].loss
    assert iterations == sum(s.iterations for s in starts)


def test_starts_stay_inside_the_bounds_and_the_noise_between_its_shares():
    x, noise = (torch.tensor(v, requires_grad=True) for v in ([0.1, -0.1], math.log(0.5)))
    seen = []

    def run():
        seen.append((x.detach().clone(), noise.item()))
        result = LBFGS(max_iter=1)(lambda: x.square().sum() + noise * 0, [x, noise])
        return result, 1

    best_of_starts(run, [x, noise], [(-0.2, 0.2), None], noise, 50, gen())
    assert torch.equal(seen[0][0], torch.tensor([0.1, -0.1]))
    assert all(bool((t.abs() <= 0.2).all()) for t, _ in seen)
    drawn = [v for _, v in seen[1::2]]
    assert math.log(1e-3) <= min(drawn) < math.log(1e-2)
    assert -0.3 < max(drawn) <= 0


def test_every_other_start_is_near_the_best_optimum_with_its_noise():
    x, noise = (torch.tensor(v, requires_grad=True) for v in ([0.0] * 4, math.log(0.1)))
    losses, seen = iter([3.0, 1.0, *[2.0] * 30]), []

    def run():
        seen.append((x.detach().clone(), noise.item()))
        loss = next(losses)
        with torch.no_grad():
            # The second start ends far away, with two columns switched off.
            x.copy_(torch.tensor([2.0, -2.0, 50.0, 50.0]) if loss == 1.0 else x + 100)
            noise.fill_(math.log(0.5) if loss == 1.0 else 9.0)
        return Result(loss, Status.CONVERGED, Convergence(1, 0.0, 1.0)), 1

    best_of_starts(run, [x, noise], [None, None], noise, 32, gen())
    near = torch.stack([t for t, _ in seen[2::2]])
    assert all(v == math.log(0.5) for _, v in seen[2::2])
    # Means of 15 standard normals, four standard errors.
    torch.testing.assert_close(near.mean(0), torch.tensor([2.0, -2.0, 2.5, 2.5]), rtol=0, atol=4 / 15**0.5)
    assert torch.equal(x.detach(), torch.tensor([2.0, -2.0, 50.0, 50.0]))


def test_a_stop_asked_for_ends_all_starts_and_keeps_the_best():
    x = torch.tensor([-1.1], requires_grad=True)
    calls = []

    def stop_late(state):
        calls.append(state)
        return len(calls) > 12

    result, _ = best_of_starts(search(x, callback=stop_late), [x], [(-4.0, 4.0)], torch.zeros(()), 30, gen())
    assert result.status is Status.STOPPED
    assert "the callback stopped it" in result.convergence.message
    assert len(result.stats["starts"]) < 30
    assert valleys(x).item() == pytest.approx(min(s.loss for s in result.stats["starts"]), abs=1e-12)


def test_an_interruption_leaves_the_best_of_the_finished_starts():
    x = torch.tensor([-1.1], requires_grad=True)
    inner, count = search(x), []

    def run():
        count.append(1)
        if len(count) == 4:
            x.data.fill_(0.0)
            raise KeyboardInterrupt
        return inner()

    with pytest.raises(KeyboardInterrupt):
        best_of_starts(run, [x], [(-4.0, 4.0)], torch.zeros(()), 9, gen())
    assert valleys(x).item() < valleys(torch.tensor(0.0)).item() - 0.05


@pytest.mark.parametrize(("n_rows", "starts"), [(2, 10), (460, 10), (500, 8), (700, 2), (800, 1), (5000, 1)])
def test_few_rows_get_ten_starts_and_many_rows_one(n_rows, starts):
    kernel, network = RBF(), arch.NetworkKernel(arch.mlp(1))
    assert n_starts_of(ScaleMixtureGPRegressor(), n_rows, kernel) == starts
    assert n_starts_of(ScaleMixtureGPRegressor(), n_rows, network) == min(starts, 3)
    assert n_starts_of(ScaleMixtureGPRegressor(n_restarts=5), n_rows, network) == 5
    assert n_starts_of(ScaleMixtureGPRegressor(optimizer=LBFGS(n_restarts=4)), n_rows, kernel) == 1
