import math

import pytest
import torch

from stochproc.exceptions import NotPositiveDefiniteError
from stochproc.solvers import LBFGS, Status


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


@pytest.mark.parametrize("wall", [2.02, 2.5, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_rosenbrock_with_a_wall_of_nan_still_reaches_its_minimum(wall, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(2, generator=gen) - torch.tensor([2.0, 0.0])
    x.requires_grad_()
    assert x.sum().item() < wall
    result = LBFGS()(lambda: rosenbrock(x) if x.sum().item() < wall else rosenbrock(x) * math.nan, [x])
    assert result.ok
    assert result.value < 1e-10
    assert result.stats["evaluations"] > result.stats["failed_evaluations"]


def test_failure_in_the_line_search_is_backed_away_from():
    # The first step, of length 1, ends beyond the wall at 0.5; the minimum 0.4 is in front of it.
    x = leaf(0.0)
    calls = []

    def loss():
        calls.append(x.item())
        if x.item() > 0.5:
            raise NotPositiveDefiniteError("beyond the wall")
        return 50 * (x - 0.4).square().sum()

    result = LBFGS()(loss, [x])
    assert calls[1] > 0.5
    assert result.ok
    assert x.item() == pytest.approx(0.4, abs=1e-7)
    assert result.stats["failed_evaluations"] == sum(c > 0.5 for c in calls) >= 1
    assert result.stats["last_failure"] == "NotPositiveDefiniteError: beyond the wall"
    assert result.stats["evaluations"] == len(calls)


def test_minimum_beyond_the_wall_stagnates_close_to_it():
    x = leaf(0.0, 0.0)
    result = LBFGS()(lambda: (x - 3).square().sum() * (1.0 if x.sum().item() < 2 else math.nan), [x])
    assert result.status is Status.STAGNATED
    assert "evaluations failed, the last: the loss is nan" in result.convergence.message
    # Each line search keeps at least 0.28 of the way to the wall, so the gap falls geometrically to rounding.
    torch.testing.assert_close(x.detach(), torch.ones(2), rtol=0, atol=1e-6)
    assert x.sum().item() < 2


def test_factorisation_error_of_torch_is_a_failed_evaluation():
    # log det of [[1, x], [x, 1]] exists for |x| < 1 only; steps beyond must be survived.
    x = leaf(0.9)

    def loss():
        L = torch.linalg.cholesky(torch.eye(2) + x * (1 - torch.eye(2)))
        return -L.diagonal().log().sum() - 1e-3 * x.sum()

    result = LBFGS()(loss, [x])
    # Derivative of -log(1 - x²)/2 - 1e-3 x is zero where x / (1 - x²) = 1e-3.
    assert result.ok
    assert x.item() == pytest.approx(1e-3, abs=2e-6)


def test_nonfinite_gradient_is_a_failed_evaluation():
    x = leaf(1.0)
    # sqrt has an infinite gradient at 0 though its value is finite there.
    result = LBFGS()(lambda: (x.clamp_min(0).sqrt() + x).sum(), [x], bounds=[(0.0, None)])
    assert result.stats["failed_evaluations"] > 0
    assert "gradient holds NaN or infinity" in result.stats["last_failure"]
    assert 0 < x.item() < 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_start_that_fails_ends_as_nonfinite_and_moves_nothing(bad):
    x = leaf(0.3, 0.7)
    result = LBFGS()(lambda: x.sum() * bad, [x])
    assert result.status is Status.NONFINITE
    assert result.value == math.inf
    assert x.tolist() == [0.3, 0.7]
    assert result.stats["evaluations"] == result.stats["failed_evaluations"] == 1
    assert "cannot be evaluated at the starting point" in result.convergence.message


def test_failed_first_start_is_data_when_a_later_one_succeeds(gen):
    x = leaf(-1.0)
    result = LBFGS(n_restarts=8)(
        lambda: (x - 1).square().sum() * (1.0 if x.item() > 0 else math.nan),
        [x],
        bounds=[(-1, 3)],
        generator=gen,
    )
    starts = result.stats["starts"]
    assert result.ok
    assert starts[0].status is Status.NONFINITE
    assert starts[0].loss == math.inf
    assert len(starts) == 8
    assert result.stats["best_start"] > 0
    assert x.item() == pytest.approx(1.0, abs=1e-6)


def test_overflowing_loss_keeps_the_best_point():
    x = leaf(0.0, 0.0)
    result = LBFGS()(lambda: 1e200 * (x - 3).square().sum(), [x])
    assert result.status is Status.STAGNATED
    assert math.isfinite(result.value)
    assert result.value == (1e200 * (x - 3).square().sum()).item()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_interrupt_restores_the_best_point_and_passes_on(error):
    x = leaf(-1.2, 1.0)
    losses = []

    def loss():
        if len(losses) == 12:
            raise error
        losses.append(rosenbrock(x).item())
        return rosenbrock(x)

    with pytest.raises(error):
        LBFGS()(loss, [x])
    assert rosenbrock(x).item() == min(losses) < losses[0]


def test_interrupt_before_any_value_leaves_the_parameters():
    x = leaf(7.0)

    def loss():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LBFGS()(loss, [x], bounds=[(0, 1)])
    assert x.item() == 7.0


def test_linear_operator_error_is_a_failed_evaluation():
    errors = pytest.importorskip("linear_operator.utils.errors")
    x = leaf(0.0)

    def loss():
        if x.item() > 0.5:
            raise errors.NotPSDError("not positive definite")
        return 50 * (x - 0.4).square().sum()

    result = LBFGS()(loss, [x])
    assert result.ok
    assert result.stats["failed_evaluations"] >= 1


def test_an_overflow_is_a_point_to_back_off_from():
    x = torch.zeros((), requires_grad=True)

    def loss():
        if x.item() > 0.7:
            raise OverflowError("too far")
        return (x - 0.5).square()

    result = LBFGS()(loss, [x])
    assert result.ok
    assert x.item() == pytest.approx(0.5)
