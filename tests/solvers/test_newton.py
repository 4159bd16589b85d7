import itertools
import math

import pytest
import torch

from stochproc.exceptions import NotPositiveDefiniteError
from stochproc.solvers import CG, LineSearch, Newton, Status

EPS = torch.finfo(torch.float64).eps
LINEAR = [CG(), "cholesky"]


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def norm_of_gradient(fun, x):
    return float(torch.func.grad(fun)(x).double().norm())


def hessian(fun, x):
    return torch.func.hessian(fun)(x)


def quadratic(gen, n):
    B = torch.randn(n, n, generator=gen)
    A, b = B @ B.mT / n + torch.eye(n), torch.randn(n, generator=gen)
    return A, b, lambda x: 0.5 * x @ A @ x - b @ x


def logistic(gen, n=300, d=8):
    X = torch.randn(n, d, generator=gen)
    y = (torch.rand(n, generator=gen) < torch.sigmoid(X @ torch.randn(d, generator=gen))).double()
    return X, y, lambda w: torch.nn.functional.binary_cross_entropy_with_logits(X @ w, y, reduction="sum") + 0.5 * w @ w


@pytest.mark.parametrize("options", [{"linear": "cholesky"}, {"forcing": 1e-12, "linear": CG(rtol=1e-12)}])
def test_quadratic_takes_one_step(gen, options):
    A, b, fun = quadratic(gen, 12)
    result = Newton(**options)(fun, torch.randn(12, generator=gen))
    assert result.ok
    assert result.convergence.iterations == 1
    assert result.stats["steps"] == [1.0]
    # |x - x*| <= |g| / smallest eigenvalue, which is at least 1.
    assert float((result.value - torch.linalg.solve(A, b)).norm()) <= max(result.convergence.residual, 1e-13)


@pytest.mark.parametrize("linear", LINEAR)
def test_inexact_solves_reach_the_same_minimum(gen, linear):
    A, b, fun = quadratic(gen, 12)
    result = Newton(linear=linear)(fun, torch.zeros(12))
    assert result.ok
    assert result.convergence.residual == norm_of_gradient(fun, result.value) <= result.convergence.tolerance
    assert result.convergence.tolerance == pytest.approx(1e-8 * float(b.norm()))
    assert float((result.value - torch.linalg.solve(A, b)).norm()) <= result.convergence.residual


@pytest.mark.parametrize(("n", "linear"), [(2, CG()), (50, CG()), (2, "cholesky"), (20, "cholesky")])
def test_rosenbrock_reaches_a_gradient_of_1e_10(n, linear):
    x0 = torch.tensor([-1.2, 1.0]).repeat(n // 2)
    result = Newton(rtol=0.0, atol=1e-10, max_iter=200, linear=linear)(rosenbrock, x0)
    assert result.ok
    assert norm_of_gradient(rosenbrock, result.value) <= 1e-10
    assert bool((torch.linalg.eigvalsh(hessian(rosenbrock, result.value)) > 0).all())
    if n == 2:
        torch.testing.assert_close(result.value, torch.ones(2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("linear", LINEAR)
def test_logistic_regression_agrees_with_scipy(gen, linear):
    optimize = pytest.importorskip("scipy.optimize")
    _, _, fun = logistic(gen)
    result = Newton(rtol=1e-10, linear=linear)(fun, torch.zeros(8))
    assert result.ok

    def numpy(f):
        return lambda w: f(torch.from_numpy(w)).numpy()

    other = optimize.minimize(
        lambda w: float(fun(torch.from_numpy(w))),
        torch.zeros(8).numpy(),
        jac=numpy(torch.func.grad(fun)),
        hess=numpy(torch.func.hessian(fun)),
        method="trust-exact",
        options={"gtol": 1e-9},
    )
    x = torch.from_numpy(other.x)
    # The curvature is at least 1, so both are within the norms of their gradients of the minimum.
    allowed = result.convergence.residual + norm_of_gradient(fun, x)
    assert allowed < 1e-5
    assert float((result.value - x).norm()) <= allowed
    assert result.stats["fun"] == pytest.approx(other.fun, rel=1e-14)
    assert not any(result.stats["shifts"])


def test_cholesky_converges_quadratically(gen):
    _, _, fun = logistic(gen)
    result = Newton(rtol=1e-13, linear="cholesky")(fun, torch.zeros(8))
    errors = [e for e in result.convergence.history.tolist() if 1e-11 < e < 1e-1]
    assert len(errors) >= 2
    # e' <= C e² with one C of order one for all steps; linear convergence would need C = 1 / e.
    assert all(after <= before**2 for before, after in itertools.pairwise(errors))


def test_adaptive_forcing_converges_superlinearly(gen):
    _, _, fun = logistic(gen)
    result = Newton(rtol=1e-11)(fun, torch.zeros(8))
    assert result.ok
    ratios = (result.convergence.history[1:] / result.convergence.history[:-1]).tolist()
    assert ratios[-1] < 1e-2 < ratios[0]


def test_forcing_that_is_fixed_gives_its_rate(gen):
    _, _, fun = quadratic(gen, 30)
    result = Newton(forcing=0.1)(fun, torch.randn(30, generator=gen))
    history = result.convergence.history
    # On a quadratic the new gradient is the residual of the solve; the last is not asked for less than needed.
    assert bool((history[1:] <= 0.1 * history[:-1])[:-1].all())
    assert result.convergence.iterations >= 6


@pytest.mark.parametrize("linear", LINEAR)
def test_saddle_is_left_along_negative_curvature(linear):
    def fun(x):
        return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4

    result = Newton(linear=linear)(fun, torch.tensor([1.0, 1e-6]))
    assert result.ok
    # Minima are at (0, ±sqrt 2), with curvature 2 and 4.
    torch.testing.assert_close(result.value, torch.tensor([0.0, math.sqrt(2)]), rtol=0, atol=1e-8)
    assert result.stats["shifts"][0] == 0.0 or linear == "cholesky"
    assert max(result.stats["shifts"]) > 0.0
    assert result.stats["shifts"][-1] == 0.0


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("seed", range(5))
def test_non_convex_start_reaches_a_local_minimum(linear, seed):
    gen = torch.Generator().manual_seed(seed)
    B = torch.randn(12, 12, generator=gen)

    def fun(x):
        return (x**4).sum() / 4 + 0.5 * x @ (B + B.mT) @ x

    x0 = 0.1 * torch.randn(12, generator=gen)
    assert float(torch.linalg.eigvalsh(hessian(fun, x0))[0]) < -1
    result = Newton(max_iter=100, linear=linear)(fun, x0)
    assert result.ok
    assert any(result.stats["shifts"])
    assert float(torch.linalg.eigvalsh(hessian(fun, result.value))[0]) > 0


def test_shift_of_cholesky_turns_the_lowest_eigenvalue_around():
    result = Newton(linear="cholesky", max_iter=1)(lambda x: x[0] ** 2 - 1.5 * x[1] ** 2, torch.ones(2))
    assert result.stats["shifts"] == pytest.approx([6.0])
    torch.testing.assert_close(result.value, torch.tensor([1.0 - 2.0 / 8.0, 1.0 + 3.0 / 3.0]))


@pytest.mark.parametrize("linear", LINEAR)
def test_function_without_curvature_goes_downhill(linear):
    result = Newton(max_iter=3, linear=linear)(lambda x: x.sum(), torch.zeros(4))
    assert result.status is Status.MAX_ITER
    assert result.stats["fun"] < -3
    assert "raise max_iter" in result.convergence.message


@pytest.mark.parametrize("linear", LINEAR)
def test_singular_hessian_still_finds_a_minimum(linear):
    result = Newton(linear=linear)(lambda x: (x.sum() - 1) ** 2, torch.zeros(20))
    assert result.ok
    assert result.stats["fun"] <= 1e-14


@pytest.mark.parametrize("linear", LINEAR)
def test_barrier_keeps_every_iterate_inside_its_domain(gen, linear):
    c = 20 * torch.randn(10, generator=gen)
    seen = []

    def fun(x):
        inside = bool((x.abs() < 1).all())
        return c @ x - torch.log(1 - x**2).sum() if inside else x.sum() * math.inf

    def callback(state):
        seen.append(state.value)

    result = Newton(linear=linear)(fun, torch.zeros(10), callback=callback)
    assert result.ok
    assert all(bool((x.abs() < 1).all()) for x in seen)
    assert min(result.stats["steps"]) < 1
    # c + 2 x / (1 - x²) = 0.
    torch.testing.assert_close(result.value, (1 - (1 + c**2).sqrt()) / c, rtol=0, atol=1e-8)


def test_evaluations_that_raise_are_backed_away_from():
    def fun(x):
        if float(x.detach()) >= 2:
            raise NotPositiveDefiniteError("too far")
        return -20 * x - torch.log(2 - x)

    # The first step, 19.5 / 0.25, goes far beyond 2; the minimum is where 1 / (2 - x) = 20.
    result = Newton()(fun, torch.tensor(0.0))
    assert result.ok
    assert float(result.value) == pytest.approx(1.95, abs=1e-8)
    assert result.stats["failed_evaluations"] > 0
    assert result.stats["last_failure"] == "NotPositiveDefiniteError: too far"


@pytest.mark.parametrize("given", ["grad", "hvp", "both"])
@pytest.mark.parametrize("linear", LINEAR)
def test_given_derivatives_agree_with_autograd(gen, given, linear):
    X, y, fun = logistic(gen)

    def grad(w):
        return X.mT @ (torch.sigmoid(X @ w) - y) + w

    def hvp(w, v):
        p = torch.sigmoid(X @ w)
        return X.mT @ (p * (1 - p) * (X @ v)) + v

    kw = {"grad": grad} if given == "grad" else {"hvp": hvp} if given == "hvp" else {"grad": grad, "hvp": hvp}
    expected, found = Newton(linear=linear)(fun, torch.zeros(8)), Newton(linear=linear)(fun, torch.zeros(8), **kw)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-10)
    for key in ("evaluations", "gradients", "products", "steps"):
        assert found.stats[key] == expected.stats[key]


def test_function_need_not_be_differentiable_where_derivatives_are_given():
    def fun(x):
        with torch.no_grad():
            return (x - 3).square().sum()

    result = Newton(linear="cholesky")(fun, torch.zeros(2), grad=lambda x: 2 * (x - 3), hvp=lambda x, v: 2 * v)
    assert result.ok
    assert result.value.tolist() == pytest.approx([3.0, 3.0], rel=1e-15)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,)])
def test_shape_of_the_start_is_kept(shape):
    x0 = torch.full(shape, 0.5)
    result = Newton()(lambda x: (x.cosh() + x).sum(), x0)
    assert result.ok
    assert result.value.shape == shape
    torch.testing.assert_close(result.value, torch.full(shape, -math.asinh(1)), rtol=0, atol=1e-7)
    assert not result.value.requires_grad
    assert bool((x0 == 0.5).all())


@pytest.mark.parametrize("linear", LINEAR)
def test_float32_stays_float32(gen, linear):
    c = torch.randn(20, generator=gen).float()
    result = Newton(linear=linear)(lambda x: x.cosh().sum() + c @ x, torch.zeros(20, dtype=torch.float32))
    assert result.ok
    assert result.value.dtype == torch.float32
    # Curvature is at least 1.
    assert float((result.value + torch.asinh(c)).norm()) <= 1e-4 * float(c.norm()) + 20 * 1.2e-7


def test_callback_sees_each_step_and_stops():
    seen = []

    def callback(state):
        seen.append(state)
        return state.iteration == 4

    result = Newton()(rosenbrock, torch.tensor([-1.2, 1.0]), callback=callback)
    assert result.status is Status.STOPPED
    assert [s.iteration for s in seen] == [1, 2, 3, 4]
    assert torch.equal(seen[-1].value, result.value)
    assert [s.residual for s in seen] == result.convergence.history.tolist()
    assert seen[-1].residual == norm_of_gradient(rosenbrock, result.value)


def test_minimum_as_start_takes_no_step():
    result = Newton()(lambda x: x.square().sum(), torch.zeros(3))
    assert result.ok
    assert result.convergence.iterations == 0
    assert result.convergence.residual == 0.0
    assert Newton(atol=1e-3)(lambda x: x.square().sum(), torch.full((3,), 1e-4)).convergence.iterations == 0


def test_line_search_of_the_options_is_used():
    steps = Newton(line_search=LineSearch(shrink=0.1), max_iter=10)(rosenbrock, torch.tensor([-1.2, 1.0])).stats[
        "steps"
    ]
    assert min(steps) < 1
    assert all(math.log10(s) == pytest.approx(round(math.log10(s)), abs=1e-9) for s in steps)


def test_preconditioner_of_the_linear_solver_is_used(gen):
    d = torch.logspace(0, 6, 40)

    def fun(x):
        return 0.5 * (d * x.square()).sum() + x.sum() + (x**4).sum()

    plain = Newton(rtol=1e-10)(fun, torch.ones(40))
    better = Newton(rtol=1e-10, linear=CG(precond=lambda v: v / d))(fun, torch.ones(40))
    assert better.ok
    assert better.stats["linear_iterations"] < 0.3 * plain.stats["linear_iterations"]


def test_works_where_grad_mode_is_off():
    with torch.no_grad():
        assert Newton()(rosenbrock, torch.tensor([-1.2, 1.0])).ok


@pytest.mark.parametrize("linear", [CG(), "cholesky"])
def test_inference_mode_of_the_caller_changes_nothing(linear):
    fun, grad_modes = (lambda x: (x.cosh() + x).sum()), []
    plain = Newton(linear=linear)(fun, torch.zeros(2))
    with torch.inference_mode():
        inside = Newton(linear=linear)(fun, torch.zeros(2))
        assert torch.is_inference_mode_enabled()
    assert inside.ok
    assert torch.equal(inside.value, plain.value)
    assert not inside.value.is_inference()
    with torch.no_grad():
        Newton()(fun, torch.zeros(2), callback=lambda s: grad_modes.append(torch.is_grad_enabled()))
    assert not any(grad_modes)
