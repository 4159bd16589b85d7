"""Transport between images against linear programming, closed forms and the dense solver."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sklearn.exceptions import ConvergenceWarning

from stochproc.ot._emd import emd2
from stochproc.ot._newton import newton
from stochproc.ot._outcome import Tracker
from stochproc.ot._problem import Problem
from stochproc.ot._wasserstein_1d import wasserstein_1d
from stochproc.ot._wasserstein_grid import AxisCosts, Smoothing
from stochproc.ot._wasserstein_hist import wasserstein_hist

ROUNDING = 1e-12


def images(gen, *shape, zeros=0.0):
    out = []
    for _ in range(2):
        image = torch.rand(shape, generator=gen) ** 3
        image[torch.rand(shape, generator=gen) < zeros] = 0
        out.append(image / image.sum())
    return out


def spot(side, i, j, width=2.0):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.exp(-((rows - i) ** 2 + (columns - j) ** 2) / (2 * width**2))
    return image / image.sum()


def stored(shape, p, spacing):
    """The cost of all pairs, from the coordinates."""
    at = torch.cartesian_prod(*(h * torch.arange(s).double() for s, h in zip(shape, spacing, strict=True)))
    at = at.reshape(-1, len(shape))
    return ((at[:, None] - at).abs() ** p).sum(-1)


def exact(a, b, cost):
    a, b = (t.reshape(-1).numpy() for t in (a, b))
    n, m = cost.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    return linprog(cost.numpy().ravel(), A_eq=sums, b_eq=np.concatenate([a, b]), method="highs").fun


def entropic(a, b, cost, eps):
    """Dual value of the stored problem by the dense solver."""
    u, v = a.reshape(-1), b.reshape(-1)
    cost = cost[u > 0][:, v > 0]
    problem = Problem(cost, u[u > 0], v[v > 0], eps, float(cost.max() - cost.min()))
    out = newton(problem, Tracker(1e-12, 2000))
    return float(problem.a @ out.f + problem.b @ out.g)


@pytest.mark.parametrize("eps", [1.0, 0.01])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_a_sweep_along_the_axes_is_the_softmax_over_all_pairs(gen, p, eps):
    # At eps = 0.01 the kernel of an axis underflows, and the weights are stored.
    shape, spacing = (4, 1, 6), (1.0, 2.0, 0.5)
    costs = AxisCosts(shape, spacing, p, torch.device("cpu"))
    h = 3 * torch.randn(shape, generator=gen)
    h[1, 0, 2], h[2] = -torch.inf, -torch.inf
    q = torch.randn(shape, generator=gen)
    cost = stored(shape, p, spacing)
    z = h.reshape(-1) - cost / eps
    means = Smoothing(costs, h, eps)
    weights = z.softmax(1)
    for mine, dense in (
        (means.lse, z.logsumexp(1)),
        (means.mean(q), weights @ q.reshape(-1)),
        (means.mean_cost(q), (weights * cost) @ q.reshape(-1)),
        (costs.conjugate(q), (cost - q.reshape(-1)).amin(1)),
    ):
        # Exponents reach 1e3, each rounded to 1e-16 of that.
        torch.testing.assert_close(mine.reshape(-1), dense, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_values_are_those_of_the_stored_problem(gen, p, zeros):
    a, b = images(gen, 6, 7, zeros=zeros)
    cost, eps = stored((6, 7), p, (1.0, 1.0)), 0.3
    _, log = wasserstein_hist(a, b, p=p, reg=eps, tol=1e-12, log=True)
    # Values err by the square of the marginal error.
    assert log["value"].item() == pytest.approx(entropic(a, b, cost, eps), abs=1e-10)
    divergence = wasserstein_hist(a, b, p=p, reg=eps, debiased=True, tol=1e-12)
    own = [entropic(t, t, cost, eps) for t in (a, b)]
    assert divergence.item() == pytest.approx(log["value"].item() - sum(own) / 2, abs=1e-10)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debiased", [True, False, None])
def test_bounds_hold_the_exact_value(gen, p, debiased):
    a, b = images(gen, 6, 5, zeros=0.3)
    truth = exact(a, b, stored((6, 5), p, (1.0, 2.0)))
    value, log = wasserstein_hist(a, b, p=p, reg=0.02, spacing=(1.0, 2.0), debiased=debiased, log=True)
    # HiGHS ends at a vertex, exact to rounding of costs of size 50.
    assert log["lower_bound"] <= truth + 1e-10
    assert truth <= log["upper_bound"] + 1e-10
    # Entropy of at most log 30 for each of the terms.
    assert abs(value.item() - truth) <= 2 * 0.02 * np.log(30)
    f, g = log["f"].reshape(-1), log["g"].reshape(-1)
    assert float((f[:, None] + g - stored((6, 5), p, (1.0, 2.0))).max()) <= ROUNDING * 100
    assert log["lower_bound"].item() == pytest.approx(float(a.reshape(-1) @ f + b.reshape(-1) @ g), abs=1e-12)


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_a_single_axis_is_exact(gen, p):
    a, b = images(gen, 30, zeros=0.2)
    at = 0.5 * torch.arange(30)
    value, log = wasserstein_hist(a, b, p=p, spacing=0.5, log=True)
    torch.testing.assert_close(value, wasserstein_1d(at, at, a, b, p=p), rtol=0, atol=ROUNDING)
    assert log["lower_bound"] == log["upper_bound"] == value
    column = wasserstein_hist(a.reshape(1, 30, 1), b.reshape(1, 30, 1), p=p, spacing=(1.0, 0.5, 1.0))
    torch.testing.assert_close(column, value, rtol=0, atol=0)


def test_a_shifted_spot_costs_its_shift():
    # Spots of width 2 in the middle of 32 cells lose 1e-6 of their mass at the edges.
    a, b = spot(32, 12, 13), spot(32, 18, 17)
    assert wasserstein_hist(a, b).item() == pytest.approx(6**2 + 4**2, rel=1e-4)
    assert wasserstein_hist(a, b, p=1).item() == pytest.approx(6 + 4, rel=1e-4)


def test_a_widened_spot_costs_the_square_of_the_change():
    # W_2^2 of normal laws of equal mean is d (difference of scales)^2; the blur of default reg is 1.4 cells.
    a, b = spot(48, 24, 24, 3.0), spot(48, 24, 24, 5.0)
    assert wasserstein_hist(a, b).item() == pytest.approx(2 * 2.0**2, rel=0.02)


@pytest.mark.parametrize("p", [1, 2])
def test_equal_images_have_divergence_zero(gen, p):
    a, _ = images(gen, 8, 8)
    assert abs(wasserstein_hist(a, a.clone(), p=p, debiased=True).item()) <= 1e-12 * 98


@pytest.mark.slow
def test_the_sides_may_be_exchanged_and_axes_permuted(gen):
    a, b = images(gen, 5, 9)
    for debiased in (True, False):
        base = wasserstein_hist(a, b, debiased=debiased, tol=1e-11)
        # The rounded plan of an inexact solution depends on the side whose sums are exact, to first order in tol.
        for other in (wasserstein_hist(b, a, debiased=debiased, tol=1e-11),
                      wasserstein_hist(a.T, b.T, debiased=debiased, tol=1e-11)):  # fmt: skip
            torch.testing.assert_close(other, base, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_cost_and_mass_scale_the_value(gen):
    a, b = images(gen, 5, 6)
    for debiased in (True, False):
        base, log = wasserstein_hist(a, b, debiased=debiased, tol=1e-11, log=True)
        wide = wasserstein_hist(a, b, spacing=3.0, debiased=debiased, tol=1e-11)
        torch.testing.assert_close(wide, 9 * base, rtol=1e-9, atol=0)
        heavy = wasserstein_hist(4 * a, 4 * b, reg=log["reg"], debiased=debiased, tol=1e-11)
        torch.testing.assert_close(heavy, 4 * base, rtol=1e-9, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 2])
def test_the_gradient_of_the_divergence(gen, p):
    a, b = (t.log().requires_grad_() for t in images(gen, 3, 4))

    def divergence(u, v):
        soft = [t.reshape(-1).softmax(0).reshape(3, 4) for t in (u, v)]
        return wasserstein_hist(*soft, p=p, reg=0.5, debiased=True, tol=1e-13)

    assert torch.autograd.gradcheck(divergence, (a, b), eps=1e-5, atol=1e-7)


def test_the_gradient_of_the_divergence_at_empty_cells_is_its_slope(gen):
    a, b = images(gen, 4, 4, zeros=0.4)
    a = a.requires_grad_()
    (grad,) = torch.autograd.grad(wasserstein_hist(a, b, reg=0.5, debiased=True, tol=1e-13), a)
    a = a.detach()
    empty, full = (a == 0).nonzero()[0], (a > 0).nonzero()[0]
    step = 1e-6
    moved = a.clone()
    moved[tuple(empty)] += step
    moved[tuple(full)] -= step
    slope = (
        wasserstein_hist(moved, b, reg=0.5, debiased=True, tol=1e-13)
        - wasserstein_hist(a, b, reg=0.5, debiased=True, tol=1e-13)
    ) / step
    # The debiasing term has a kink like step log step in what it takes from an empty cell.
    assert slope.item() == pytest.approx((grad[tuple(empty)] - grad[tuple(full)]).item(), abs=1e-3)


def test_the_gradient_of_a_plan_is_a_feasible_dual(gen):
    a, b = (t.requires_grad_() for t in images(gen, 5, 4))
    value, log = wasserstein_hist(a, b, p=1, log=True)
    f, g = torch.autograd.grad(value, (a, b))
    torch.testing.assert_close(f, log["f"])
    torch.testing.assert_close(g, log["g"])
    assert log["upper_bound"] - log["lower_bound"] <= 0.02 * value.detach()


def test_second_derivatives_raise(gen):
    a, b = images(gen, 3, 3)
    a = a.requires_grad_()
    (grad,) = torch.autograd.grad(wasserstein_hist(a, b), a, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(grad.sum(), a)


def test_too_few_sweeps_warn_and_the_bounds_still_hold(gen):
    a, b = images(gen, 5, 5)
    truth = exact(a, b, stored((5, 5), 2, (1.0, 1.0)))
    with pytest.warns(ConvergenceWarning, match="budget max_iter=2 is spent"):
        _, log = wasserstein_hist(a, b, reg=1e-3, max_iter=2, log=True)
    assert log["status"] == "max_iter"
    assert log["lower_bound"] <= truth <= log["upper_bound"]


def test_kinds_and_flat_arrays(gen):
    a, b = images(gen, 4, 6)
    base = wasserstein_hist(a, b)
    flat = wasserstein_hist(a.reshape(-1).numpy(), b.reshape(-1).numpy(), shape=(4, 6))
    assert isinstance(flat, np.float64)
    assert flat == base.item()
    single = wasserstein_hist(a.float(), b.float())
    assert single.dtype == torch.float32
    # Rounding of the weights, 1e-7, times costs of up to 34.
    assert single.item() == pytest.approx(base.item(), abs=1e-5)


def test_single_cells_and_single_atoms(gen):
    a, b = torch.zeros(2, 5, 5)
    a[1, 2], b[4, 3] = 1, 1
    value, log = wasserstein_hist(a, b, log=True, debiased=False)
    assert value.item() == pytest.approx(10, abs=ROUNDING)
    assert log["lower_bound"].item() == pytest.approx(10, abs=ROUNDING)
    assert wasserstein_hist(torch.ones(1, 1), torch.ones(1, 1)).item() == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"b": np.ones((3, 2)) / 6}, ValueError, r"b must have shape \(2, 3\)"),
        ({"shape": (2, 2)}, ValueError, r"a must have shape \(2, 2\), or be flat"),
        ({"shape": ()}, ValueError, "shape must have at least one side"),
        ({"a": -np.ones((2, 3))}, ValueError, "a must be finite and non-negative"),
        ({"a": np.ones((2, 3))}, ValueError, "same total mass"),
        ({"p": 3}, ValueError, r"p must lie in \[1, 2\]; got 3"),
        ({"reg": -1.0}, ValueError, "reg must be positive"),
        ({"spacing": 0.0}, ValueError, "spacing must be positive"),
        ({"spacing": (1.0, 1.0, 1.0)}, ValueError, "spacing must be one number or one an axis, here 2; got 3"),
        ({"debiased": "yes"}, TypeError, "debiased must be True, False or None"),
        ({"tol": 0.0}, ValueError, "tol must be positive"),
        ({"b": None}, TypeError, "b must be an array"),
        ({"b": torch.ones(2, 3) / 6}, TypeError, "all NumPy or all torch"),
    ],
)
def test_refuses_what_is_no_pair_of_histograms(change, error, message):
    args = {"a": np.ones((2, 3)) / 6, "b": np.ones((2, 3)) / 6, **change}
    with pytest.raises(error, match=message):
        wasserstein_hist(**args)


@pytest.mark.bad_input
def test_sides_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match=r"shape must be an integer; got 2\.5"):
        wasserstein_hist(np.full(6, 1 / 6), np.full(6, 1 / 6), shape=(2.5, 3))


def test_small_grids_are_nearly_exact_by_default(gen):
    # reg is a tenth of the cost between neighbours: the plan mixes neighbours by exp(-10) or so.
    a, b = torch.rand(8, 8, generator=gen), torch.rand(8, 8, generator=gen)
    a, b = a / a.sum(), b / b.sum()
    at = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    exact = emd2(a.reshape(-1), b.reshape(-1), torch.cdist(at, at).square())
    assert 0 <= float(wasserstein_hist(a, b) - exact) <= 1e-4
