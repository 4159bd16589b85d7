"""Transport on the line against closed forms, linear programming and other libraries."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance

from stochproc.ot._wasserstein_1d import wasserstein_1d

# Sums of at most 60 terms of size one in float64.
ROUNDING = 1e-13


def atoms(gen, n, m):
    x, y = torch.randn(n, generator=gen), 1.5 * torch.randn(m, generator=gen) + 0.3
    a, b = (torch.rand(k, generator=gen).softmax(0) for k in (n, m))
    return x, y, a, b


def exact(x, y, a, b, p):
    """The linear programme over all plans."""
    cost = np.abs(np.subtract.outer(x, y)) ** p
    n, m = cost.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    return linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([a, b]), method="highs").fun


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_a_shift_costs_its_size_to_the_power_p(gen, p):
    x = torch.randn(40, generator=gen)
    assert wasserstein_1d(x, x - 0.7, p=p).item() == pytest.approx(0.7**p, abs=ROUNDING)


@pytest.mark.parametrize("p", [1, 2])
def test_all_mass_moves_to_a_single_atom(gen, p):
    x, _, a, _ = atoms(gen, 15, 2)
    expected = (a * (x - 2).abs() ** p).sum()
    torch.testing.assert_close(wasserstein_1d(x, torch.tensor([2.0]), a, p=p), expected, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize(("n", "m"), [(1, 7), (12, 12), (9, 20)])
def test_equals_the_linear_programme(gen, n, m, p):
    args = [t.numpy() for t in atoms(gen, n, m)]
    # HiGHS stops at feasibilities of 1e-7, and these problems end at a vertex, exact to rounding.
    assert wasserstein_1d(*args, p=p) == pytest.approx(exact(*args, p), abs=1e-12)


def test_equals_scipy_at_order_one(gen):
    x, y, a, b = (t.numpy() for t in atoms(gen, 30, 25))
    assert wasserstein_1d(x, y, a, b) == pytest.approx(wasserstein_distance(x, y, a, b), abs=ROUNDING)


@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_equals_pot(gen, p):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    x, y = torch.randn(20, 3, generator=gen), torch.randn(14, 3, generator=gen)
    a, b = torch.rand(20, 3, generator=gen).softmax(0), torch.rand(14, 3, generator=gen).softmax(0)
    torch.testing.assert_close(wasserstein_1d(x, y, a, b, p=p), ot.wasserstein_1d(x, y, a, b, p=p), rtol=0, atol=1e-12)


def test_normal_quantiles_approach_the_distance_of_two_normal_laws():
    # W_2^2 = (mean difference)^2 + (difference of scales)^2; midpoint quantiles lose the tails, O(log n / n).
    q = torch.special.ndtri((torch.arange(20_000) + 0.5) / 20_000)
    assert wasserstein_1d(q, 1 + 2 * q, p=2).item() == pytest.approx(2.0, abs=1e-3)


def test_a_batch_is_a_loop_over_its_problems(gen):
    x, y = torch.randn(8, 2, 3, generator=gen), torch.randn(5, 3, generator=gen)
    a = torch.rand(8, generator=gen).softmax(0)
    out = wasserstein_1d(x, y, a, p=2)
    assert out.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(out[i, j], wasserstein_1d(x[:, i, j], y[:, j], a, p=2), rtol=0, atol=ROUNDING)


def test_order_of_atoms_and_split_atoms_do_not_matter(gen):
    x, y, a, b = atoms(gen, 9, 6)
    base = wasserstein_1d(x, y, a, b, p=2)
    turn = torch.randperm(9, generator=gen)
    torch.testing.assert_close(wasserstein_1d(x[turn], y, a[turn], b, p=2), base, rtol=0, atol=ROUNDING)
    split = wasserstein_1d(torch.cat([x, x]), y, torch.cat([a / 4, 3 * a / 4]), b, p=2)
    torch.testing.assert_close(split, base, rtol=0, atol=ROUNDING)


def test_weights_of_zero_change_nothing_and_mass_scales_the_cost(gen):
    x, y, a, b = atoms(gen, 9, 6)
    base = wasserstein_1d(x, y, a, b, p=2)
    more = wasserstein_1d(torch.cat([x, torch.tensor([50.0])]), y, torch.cat([a, torch.zeros(1)]), b, p=2)
    torch.testing.assert_close(more, base, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(wasserstein_1d(x, y, 3 * a, 3 * b, p=2), 3 * base, rtol=0, atol=3 * ROUNDING)


@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_gradients_in_positions_and_weights(gen, p):
    x, y, a, b = (t.requires_grad_() for t in atoms(gen, 6, 4))

    def cost(x, y, u, v):
        # Directions of mass zero: the weights are a softmax.
        return wasserstein_1d(x, y, u.softmax(0), v.softmax(0), p=p)

    assert torch.autograd.gradcheck(cost, (x, y, a, b))


def test_the_gradient_in_the_weights_is_a_dual_solution(gen):
    # Uniform weights: cumulative sums agree everywhere, the degenerate case.
    x, y = torch.randn(7, generator=gen), torch.randn(7, generator=gen)
    a, b = (torch.full((7,), 1 / 7).requires_grad_() for _ in range(2))
    value = wasserstein_1d(x, y, a, b, p=2)
    f, g = torch.autograd.grad(value, (a, b))
    assert float((f[:, None] + g - (x[:, None] - y) ** 2).max()) <= ROUNDING
    torch.testing.assert_close((a * f).sum() + (b * g).sum(), value, rtol=0, atol=ROUNDING)
    assert abs(float((b.detach() * g).sum())) <= ROUNDING


def test_numpy_goes_out_as_it_came_in():
    out = wasserstein_1d(np.array([0.0, 1.0], dtype=np.float32), np.array([1.0, 2.0], dtype=np.float32))
    assert isinstance(out, np.float32)
    assert isinstance(wasserstein_1d([0, 1], [1, 2]), np.float64)
    assert wasserstein_1d(torch.tensor([0, 1]), torch.tensor([1, 2])).dtype == torch.get_default_dtype()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.array([0.0, np.nan])}, "x must be finite; got nan at index "),
        ({"x": np.zeros(0)}, "x must have shape"),
        ({"a": np.array([1.0, -1.0])}, "a must be finite and non-negative; got -1.0 at index 1"),
        ({"a": np.zeros(2)}, "a must have positive total mass"),
        ({"a": np.ones(3)}, "a must have 2 weights"),
        ({"a": np.ones(2), "b": np.ones(3)}, "same total mass"),
        ({"y": np.zeros((3, 2)), "x": np.zeros((2, 5))}, "broadcast"),
        ({"p": 0.5}, "p must be finite and at least 1; got 0.5"),
        ({"p": float("inf")}, "p must be finite"),
    ],
)
def test_refuses_what_is_no_pair_of_measures(change, message):
    args = {"x": np.array([0.0, 1.0]), "y": np.array([0.0, 1.0, 2.0]), **change}
    with pytest.raises(ValueError, match=message):
        wasserstein_1d(**args)


@pytest.mark.bad_input
def test_refuses_mixed_kinds():
    with pytest.raises(TypeError, match="all NumPy or all torch"):
        wasserstein_1d(np.zeros(2), torch.zeros(2))
    with pytest.raises(TypeError, match="p must be a number"):
        wasserstein_1d(np.zeros(2), np.zeros(2), p="1")


def test_an_atom_without_weight_may_be_any_distance_away():
    x, y = np.array([0.0, 1.0, 1e300]), np.array([0.0, 3.0])
    # Its squared distance is no number; half of the mass goes from 1 to 3.
    assert wasserstein_1d(x, y, np.array([0.5, 0.5, 0.0]), p=2) == 2.0
    assert wasserstein_1d(x, y, p=2) == np.inf


@pytest.mark.parametrize(("p", "expected"), [(1.5, 0.0), (2, 2 / 3), (3, 0.0)])
def test_second_derivatives_are_finite_where_atoms_coincide(p, expected):
    # Of |d| ** p / 3 at d = 0: 2 / 3 for p = 2; infinite for p < 2, and 0 here.
    x = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(wasserstein_1d(x, x.detach().clone(), p=p), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, expected), rtol=1e-15, atol=0)
