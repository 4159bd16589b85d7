import math

import pytest
import torch

from stochproc.exceptions import NotPositiveDefiniteError
from stochproc.solvers import LBFGS, Status


def leaf(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def projected_gradient(loss, x, low=-math.inf, high=math.inf):
    (g,) = torch.autograd.grad(loss(), x)
    low, high = torch.as_tensor(low, dtype=x.dtype), torch.as_tensor(high, dtype=x.dtype)
    return (x - (x - g).clamp(low, high)).abs().max().item()


def test_quadratic_reaches_the_closed_form(gen):
    B = torch.randn(6, 6, generator=gen)
    A, b = B @ B.mT + torch.eye(6), torch.randn(6, generator=gen)
    x = torch.zeros(6, requires_grad=True)
    result = LBFGS(tol=1e-9)(lambda: 0.5 * x @ A @ x - b @ x, [x])
    solution = torch.linalg.solve(A, b)
    assert result.ok
    # |x - x*| <= |g| / smallest eigenvalue, which is at least 1.
    assert float((x.detach() - solution).norm()) <= math.sqrt(6) * result.convergence.residual
    assert result.convergence.residual <= 2e-8
    assert result.value == pytest.approx(float(-0.5 * b @ solution), rel=1e-12)


def test_rosenbrock_reaches_its_minimum():
    x = leaf(-1.2, 1.0)
    result = LBFGS()(lambda: rosenbrock(x), [x])
    assert result.ok
    residual = projected_gradient(lambda: rosenbrock(x), x)
    assert result.convergence.residual == residual <= result.convergence.tolerance == 1e-6
    assert result.value == rosenbrock(x).item() < 1e-12
    assert result.convergence.history.shape == (result.convergence.iterations,)
    assert result.convergence.history[-1] == result.value


def test_minimum_on_a_bound_has_zero_projected_gradient():
    # The constrained minimum of Rosenbrock with x_0 <= 0.5 is (0.5, 0.25).
    x = leaf(-1.2, 1.0)
    result = LBFGS()(lambda: rosenbrock(x), [x], bounds=[(None, torch.tensor([0.5, math.inf]))])
    assert result.ok
    torch.testing.assert_close(x.detach(), torch.tensor([0.5, 0.25]), rtol=0, atol=1e-7)
    assert projected_gradient(lambda: rosenbrock(x), x, high=torch.tensor([0.5, math.inf])) <= 1e-6


def test_start_outside_the_bounds_is_clipped():
    x = leaf(9.0)
    seen = []

    def loss():
        seen.append(x.item())
        return (x + 3).square().sum()

    assert LBFGS()(loss, [x], bounds=[(-1.0, 2.0)]).ok
    assert x.item() == -1.0
    assert min(seen) >= -1.0
    assert max(seen) <= 2.0


@pytest.mark.parametrize("slope", [1.0, -10.0])
def test_no_point_outside_a_bound_that_float32_cannot_hold(slope):
    # Rounded to nearest, 0.1 goes up and 0.7 down, 0.3 and 0.6 the other way: all must go inwards.
    for low, high in ((0.1, 0.7), (0.3, 0.6)):
        x = leaf(0.45, dtype=torch.float32)
        seen = []

        def loss(x=x, seen=seen):
            seen.append(x.item())
            return (x.square() + slope * x).sum()

        assert LBFGS()(loss, [x], bounds=[(low, high)]).ok
        assert min(seen) >= low
        assert max(seen) <= high
        assert x.item() == pytest.approx(low if slope > 0 else high, rel=2**-23)


def test_equal_bounds_fix_an_entry():
    x = leaf(3.0, 3.0)
    assert LBFGS()(lambda: rosenbrock(x), [x], bounds=[(torch.tensor([2.0, -9.0]), torch.tensor([2.0, 9.0]))]).ok
    torch.testing.assert_close(x.detach(), torch.tensor([2.0, 4.0]), rtol=0, atol=1e-6)


def test_parameters_of_several_shapes_and_dtypes_move_together(gen):
    a = torch.zeros((), requires_grad=True)
    b = torch.zeros(2, 3, requires_grad=True)
    c = torch.zeros(4, dtype=torch.float32, requires_grad=True)
    frozen = torch.zeros(2)
    target_b, target_c = torch.randn(2, 3, generator=gen), torch.randn(4, generator=gen)

    def loss():
        return (a - 2) ** 2 + (b - target_b).square().sum() + (c.double() - target_c).square().sum() + frozen.sum()

    result = LBFGS()(loss, iter([a, b, frozen, c]), bounds=[None, (None, 0.0), (5, 6), None])
    assert result.ok
    assert a.item() == pytest.approx(2.0, abs=1e-6)
    torch.testing.assert_close(b.detach(), target_b.clamp_max(0.0), rtol=0, atol=1e-6)
    # Rounding of c to float32 leaves gradients of up to 2 * 6e-8 * |c|.
    torch.testing.assert_close(c.detach().double(), target_c, rtol=2e-7, atol=1e-6)
    assert c.dtype == torch.float32
    assert torch.equal(frozen, torch.zeros(2))
    assert a.grad is None


def test_float32_converges_to_what_its_rounding_allows(gen):
    B = torch.randn(20, 5, generator=gen, dtype=torch.float32)
    y = torch.randn(20, generator=gen, dtype=torch.float32)
    x = torch.zeros(5, dtype=torch.float32, requires_grad=True)
    result = LBFGS(tol=1e-12)(lambda: (B @ x - y).square().sum(), [x])
    assert result.ok
    assert 1e-12 < result.convergence.residual <= result.convergence.tolerance
    assert result.convergence.tolerance == pytest.approx(math.sqrt(2**-23) * result.value, rel=1e-6)
    exact = torch.linalg.lstsq(B.double(), y.double()[:, None]).solution[:, 0]
    # Gap of a quadratic: |g|² / (2 lambda_min of the Hessian).
    lowest = float(torch.linalg.eigvalsh(2 * B.double().mT @ B.double())[0])
    gap = 5 * result.convergence.tolerance**2 / (2 * lowest)
    assert result.value - float((B.double() @ exact - y).square().sum()) <= gap + 1e-5


def test_loss_over_many_data_ends_within_a_tenth_of_a_nat(gen):
    # 1e6 data of scale e^1; a second direction is worth only 1e-4 nat of curvature.
    n, log_scale, weak = 1e6, leaf(3.0), leaf(40.0)
    result = LBFGS()(
        lambda: (n * (log_scale + 0.5 * torch.exp(2 - 2 * log_scale)) + 0.5e-4 * weak.square()).sum(),
        [log_scale, weak],
    )
    assert result.ok
    assert result.value - n * 1.5 < 0.1


def test_start_at_the_minimum_takes_no_iteration():
    x = leaf(1.0, 1.0)
    result = LBFGS()(lambda: rosenbrock(x), [x])
    assert result.ok
    assert result.convergence.iterations == 0
    assert result.stats["starts"][0].status is Status.CONVERGED


def test_one_iteration_is_not_enough_for_rosenbrock():
    x = leaf(-1.2, 1.0)
    result = LBFGS(max_iter=1)(lambda: rosenbrock(x), [x])
    assert result.status is Status.MAX_ITER
    assert not result.ok
    assert result.convergence.iterations == 1
    assert result.convergence.residual == projected_gradient(lambda: rosenbrock(x), x) > 1e-6
    assert "raise max_iter" in result.convergence.message


def test_kink_stagnates():
    x = leaf(0.7, -0.3)
    result = LBFGS()(lambda: x.abs().sum() + 0.1 * x.square().sum(), [x])
    assert result.status is Status.STAGNATED
    assert result.value < 1e-3


def double_well(x):
    return ((x**2 - 1) ** 2 + 0.3 * x).sum()


def test_restarts_find_the_lower_well_and_are_reproducible():
    found = []
    for _ in range(2):
        x = leaf(1.0)
        result = LBFGS(n_restarts=6)(
            lambda x=x: double_well(x), [x], bounds=[(-2, 2)], generator=torch.Generator().manual_seed(3)
        )
        found.append((x.item(), result.value, [s.loss for s in result.stats["starts"]]))
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(-1.0355, abs=1e-3)
    assert len(set(found[0][2])) > 1
    assert min(found[0][2]) == found[0][1]


def test_first_of_several_starts_is_the_current_value():
    one, many = leaf(1.0), leaf(1.0)
    alone = LBFGS()(lambda: double_well(one), [one])
    result = LBFGS(n_restarts=3)(lambda: double_well(many), [many], generator=torch.Generator().manual_seed(0))
    assert result.stats["starts"][0] == alone.stats["starts"][0]


def test_later_starts_follow_the_documented_rule():
    seen = []
    x = torch.full((3000,), 5.0, requires_grad=True)
    high = torch.full((3000,), math.inf)
    high[:1000] = 2.0
    low = torch.full((3000,), -math.inf)
    low[:1000] = -1.0
    low[1000:2000] = 5.0

    def loss():
        seen.append(x.detach().clone())
        raise NotPositiveDefiniteError("never")

    LBFGS(n_restarts=2)(loss, [x], bounds=[(low, high)], generator=torch.Generator().manual_seed(0))
    boxed, half, free = seen[1].split(1000)
    # Means and deviations within 4 standard errors for 1000 draws; chance of failure 2e-4 at a new seed.
    assert boxed.min() >= -1
    assert boxed.max() <= 2
    assert boxed.mean().item() == pytest.approx(0.5, abs=4 * 3 / math.sqrt(12 * 1000))
    assert free.mean().item() == pytest.approx(5.0, abs=4 / math.sqrt(1000))
    assert free.std().item() == pytest.approx(1.0, abs=4 / math.sqrt(2000))
    assert half.min() == 5.0
    assert (half == 5.0).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(1000))


def test_callback_sees_every_iterate_and_stops():
    x = leaf(-1.2, 1.0)
    states = []

    def callback(state):
        states.append(state)
        assert state.value == rosenbrock(x).item()
        assert state.residual == projected_gradient(lambda: rosenbrock(x), x)
        return state.iteration == 4

    result = LBFGS(n_restarts=3)(lambda: rosenbrock(x), [x], callback=callback, generator=torch.Generator())
    assert result.status is Status.STOPPED
    assert [s.iteration for s in states] == [1, 2, 3, 4]
    assert result.convergence.history.tolist() == [s.value for s in states]
    assert len(result.stats["starts"]) == 1
    assert result.value == rosenbrock(x).item() == min(s.value for s in states)


def test_nothing_to_learn_is_one_evaluation():
    x = torch.ones(2)
    result = LBFGS()(lambda: x.sum(), [x])
    assert result.ok
    assert result.value == 2.0
    assert result.stats["evaluations"] == 1


def test_works_inside_no_grad():
    x = leaf(0.0)
    with torch.no_grad():
        assert LBFGS()(lambda: (x - 1).square().sum(), [x]).ok


def test_unused_parameter_stays():
    x, unused = leaf(0.0), leaf(4.0)
    assert LBFGS()(lambda: (x - 1).square().sum(), [x, unused]).ok
    assert unused.item() == 4.0


def test_progress_goes_to_stderr(capsys):
    x = leaf(-1.2, 1.0)
    LBFGS(max_iter=3)(lambda: rosenbrock(x), [x], verbose=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "start 1/1" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iter": 0}, "max_iter must be at least 1"),
        ({"tol": -1.0}, "tol must be non-negative"),
        ({"memory": 0}, "memory must be at least 1"),
        ({"n_restarts": 0}, "n_restarts must be at least 1"),
    ],
)
def test_rejects_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LBFGS(**options)


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        LBFGS().tol = 1.0


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([], "bounds must have one entry a parameter; got 0 for 1"),
        ([(2.0, 1.0)], r"bounds\[0\] must have low <= high"),
        ([(math.nan, 1.0)], r"bounds\[0\] must not be NaN"),
    ],
)
def test_rejects_bounds_that_do_not_fit(bounds, message):
    x = leaf(0.0)
    with pytest.raises(ValueError, match=message):
        LBFGS()(lambda: x.sum(), [x], bounds)


def test_rejects_a_parameter_that_is_not_a_leaf():
    x = leaf(0.0)
    with pytest.raises(ValueError, match=r"parameters\[1\] must be a leaf"):
        LBFGS()(lambda: x.sum(), [x, 2 * x])


def test_rejects_the_same_parameter_twice():
    x = leaf(0.0)
    with pytest.raises(ValueError, match="must be distinct"):
        LBFGS()(lambda: x.sum(), [x, x])


def test_rejects_a_loss_that_is_not_a_number():
    x = leaf(0.0, 1.0)
    with pytest.raises(ValueError, match="0-dim floating tensor; got"):
        LBFGS()(lambda: x, [x])
    with pytest.raises(ValueError, match="must depend on the parameters"):
        LBFGS()(lambda: x.detach().sum(), [x])
    with pytest.raises(TypeError, match=r"loss must return a 0-dim torch\.Tensor; got float"):
        LBFGS()(lambda: 1.0, [x])


@pytest.mark.bad_input
def test_rejects_parameters_that_are_not_floating_tensors():
    with pytest.raises(TypeError, match=r"parameters\[0\] must be float32 or float64"):
        LBFGS()(lambda: torch.zeros(()), [torch.zeros(2, dtype=torch.int64)])


def test_cuda_parameters_reach_the_closed_form(device):
    x = torch.zeros(3, device=device, requires_grad=True)
    target = torch.tensor([1.0, -2.0, 3.0], device=device)
    result = LBFGS()(lambda: (x - target).square().sum(), [x])
    assert result.ok
    torch.testing.assert_close(x.detach(), target, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["unknown", "number", "callable"])
def test_the_rounding_that_a_caller_states_decides_what_gradient_counts_as_none(how):
    # The value is rounded to single precision and the gradient is off by 0.01, as of a loss computed in float32.
    eps = torch.finfo(torch.float32).eps
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss():
        smooth = 1000 + (x - 0.1).square()
        return smooth + (smooth.detach().float().double() - smooth.detach()) + 0.01 * (x - x.detach())

    result = LBFGS(tol=1e-15)(loss, [x], eps={"unknown": None, "number": eps, "callable": lambda: eps}[how])
    assert result.status is (Status.STAGNATED if how == "unknown" else Status.CONVERGED)
    # Values are equal to rounding within sqrt(1000 eps) = 0.011 of the minimum.
    assert x.item() == pytest.approx(0.1, abs=0.011)


@pytest.mark.bad_input
def test_a_rounding_that_is_not_positive_is_refused():
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="eps must be positive"):
        LBFGS()(lambda: x.square().sum(), [x], eps=-1.0)
