import itertools
import math

import pytest
import torch

from stochproc.solvers import CG, Newton, Status

LINEAR = [CG(), "cholesky"]


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("linear", LINEAR)
def test_end_of_floating_point_is_stagnation_at_the_minimum(gen, linear, dtype):
    c = torch.randn(20, generator=gen).to(dtype)
    result = Newton(rtol=0.0, linear=linear)(lambda x: x.cosh().sum() + c @ x + 10, torch.zeros(20, dtype=dtype))
    # With a gradient that happens to vanish in every bit it has converged instead.
    assert result.status is Status.STAGNATED or result.convergence.residual == 0.0
    # Near the minimum the gradient is good to a few roundings of its terms, though the value stopped falling
    # at the root of that: steps are still taken there.
    assert result.convergence.residual <= 20 * torch.finfo(dtype).eps
    assert "rounding" in result.convergence.message or result.convergence.residual == 0.0


def test_wrong_gradient_stagnates_at_the_start():
    x0 = torch.tensor([-1.2, 1.0])
    result = Newton()(rosenbrock, x0, grad=lambda x: -torch.func.grad(rosenbrock)(x))
    assert result.status is Status.STAGNATED
    assert torch.equal(result.value, x0)
    assert "check that fun is smooth" in result.convergence.message


def test_budget_ends_with_the_best_so_far():
    x0 = torch.tensor([-1.2, 1.0])
    result = Newton(max_iter=3)(rosenbrock, x0)
    assert result.status is Status.MAX_ITER
    assert not result.ok
    assert result.convergence.iterations == 3
    assert result.stats["fun"] == float(rosenbrock(result.value)) < float(rosenbrock(x0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fun", [lambda x: -x.square().sum(), lambda x: x.sum(), lambda x: -x.exp().sum()])
def test_function_without_a_minimum_is_told_from_a_budget_too_small(fun, dtype):
    result = Newton(max_iter=5)(fun, torch.tensor([1.0, 0.5, 0.3], dtype=dtype))
    assert result.status is Status.MAX_ITER
    assert "fun may be unbounded below" in result.convergence.message


def test_budget_too_small_is_not_blamed_on_the_function():
    result = Newton(max_iter=3)(rosenbrock, torch.tensor([-1.2, 1.0]))
    assert result.convergence.message.endswith("raise max_iter")


def test_values_never_rise():
    seen = []
    Newton(max_iter=100)(rosenbrock, torch.tensor([-1.2, 1.0] * 5), callback=lambda s: seen.append(rosenbrock(s.value)))
    assert len(seen) > 5
    assert all(after <= before for before, after in itertools.pairwise(seen))


@pytest.mark.parametrize("fun", [lambda x: x.log().sum(), lambda x: x.abs().sqrt().sum() / (x + 1).sum()])
def test_start_that_is_not_finite_is_reported(fun):
    x0 = -torch.ones(2)
    result = Newton()(fun, x0)
    assert result.status is Status.NONFINITE
    assert torch.equal(result.value, x0)
    assert result.convergence.residual == math.inf or math.isfinite(result.convergence.residual)
    assert "not finite at x0" in result.convergence.message


def test_nan_start_and_failing_start_are_reported():
    def fails(x):
        raise OverflowError("no")

    for fun, x0 in ((rosenbrock, torch.tensor([math.nan, 1.0])), (fails, torch.zeros(2))):
        result = Newton()(fun, x0)
        assert result.status is Status.NONFINITE
        assert result.convergence.iterations == 0


@pytest.mark.parametrize("linear", LINEAR)
def test_hessian_that_is_not_finite_is_reported(linear):
    result = Newton(linear=linear)(lambda x: (x.abs() ** 1.5).sum() + x.sum(), torch.zeros(2))
    assert result.status is Status.NONFINITE
    assert "Hessian product" in result.convergence.message


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("rtol", -1.0, "rtol must be non-negative"),
        ("rtol", 1.0, r"rtol must lie in \[0, 1\); got 1.0"),
        ("rtol", 2.0, r"rtol must lie in \[0, 1\)"),
        ("atol", math.nan, "atol must be non-negative"),
        ("max_iter", 0, "max_iter must be at least 1"),
        ("linear", "lu", "linear must be one of 'cholesky'"),
        ("forcing", 0.0, "forcing must be positive"),
        ("forcing", 1.0, r"forcing must lie in \(0, 1\)"),
    ],
)
def test_rejects_options_out_of_range(option, value, match):
    with pytest.raises(ValueError, match=match):
        Newton(**{option: value})


@pytest.mark.bad_input
@pytest.mark.parametrize(("option", "value"), [("linear", None), ("line_search", 0.5), ("max_iter", 2.0)])
def test_rejects_options_of_another_kind(option, value):
    with pytest.raises(TypeError, match=f"{option} must be"):
        Newton(**{option: value})


@pytest.mark.bad_input
@pytest.mark.parametrize("x0", [torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex128), [0.0]])
def test_rejects_other_starts(x0):
    with pytest.raises(TypeError, match="x0 must be"):
        Newton()(rosenbrock, x0)


@pytest.mark.bad_input
def test_rejects_functions_that_return_the_wrong_thing():
    x0 = torch.ones(3)
    with pytest.raises(ValueError, match=r"fun must return a 0-dim tensor; got shape \(3,\)"):
        Newton()(lambda x: x, x0)
    with pytest.raises(TypeError, match=r"fun must return a 0-dim torch\.Tensor; got float"):
        Newton()(lambda x: 1.0, x0)
    with pytest.raises(TypeError, match="the value of fun must be float32 or float64"):
        Newton()(lambda x: x.sum() * 1j, x0)
    with pytest.raises(ValueError, match="fun must depend on x"):
        Newton()(lambda x: torch.ones(()), x0)
    x0 = torch.zeros(3)
    with pytest.raises(ValueError, match="grad must return a tensor like x"):
        Newton()(rosenbrock, x0, grad=lambda x: x[:1])
    with pytest.raises(TypeError, match=r"hvp must return a torch\.Tensor"):
        Newton()(rosenbrock, x0, hvp=lambda x, v: 1.0)
