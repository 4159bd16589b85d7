"""Gradients of a solved transport problem: implicit, against differences, unrolled iterations and each other."""

import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from stochproc.exceptions import NumericalWarning
from stochproc.ot import _gradients as dense
from stochproc.ot import _gradients_lazy as lazy
from stochproc.ot import _gradients_systems as systems
from stochproc.ot._gradients_unrolled import unrolled
from tests.ot.transport_reference import plan_of, softmin, solved

OUTPUTS = ("plan", "value", "value_linear", "potentials")
EPS = (1.0, 0.1, 0.01)


def squared(x, y):
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def problem(gen, n=7, m=5, mass=1.0):
    """A cost and weights."""
    M = torch.rand(n, m, generator=gen)
    a, b = torch.rand(n, generator=gen) + 0.1, torch.rand(m, generator=gen) + 0.1
    return M, mass * a / a.sum(), mass * b / b.sum()


def free_problem(gen, eps, n=7, m=5):
    """A cost, two vectors that a softmax makes weights of, eps and the logarithm of the mass, all to be varied."""
    start = [torch.rand(n, m, generator=gen), torch.randn(n, generator=gen), torch.randn(m, generator=gen)]
    return [t.requires_grad_() for t in (*start, torch.tensor(eps), torch.tensor(0.3))]


def resolved(name, start):
    """An output as a function of what is varied, solved anew at each call."""

    def run(M, s, t, strength, log_mass):
        a, b = s.softmax(0) * log_mass.exp(), t.softmax(0) * log_mass.exp()
        f, g = solved(M, a, b, strength, start)
        return getattr(dense, name)(M, a, b, strength, f, g)

    return run


def start_of(free):
    M, s, t, eps, log_mass = (x.detach() for x in free)
    return solved(M, s.softmax(0) * log_mass.exp(), t.softmax(0) * log_mass.exp(), eps)[1]


def tangent(u, v):
    """Gradients with respect to both weights, up to the pair of constants that equal masses leave free."""
    return u - u.mean(), v - v.mean(), u.mean() + v.mean()


# Steps of differences below eps; their error is then about (step / eps)^2 of the derivative, plus 1e-13 / step.
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("along", ["random directions", pytest.param("all directions", marks=pytest.mark.slow)])
def test_first_derivatives_match_differences_in_cost_weights_eps_and_mass(gen, name, eps, shape, along):
    free = free_problem(gen, eps, *shape)
    options = {"eps": 1e-5 * min(eps * 10, 1), "atol": 1e-6, "rtol": 1e-5, "fast_mode": along == "random directions"}
    assert gradcheck(resolved(name, start_of(free)), free, **options)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("along", ["random directions", pytest.param("all directions", marks=pytest.mark.slow)])
def test_the_value_is_twice_differentiable_in_everything(gen, eps, along):
    free = free_problem(gen, eps)
    options = {"eps": 1e-5 * min(eps * 10, 1), "atol": 1e-5, "rtol": 1e-5, "fast_mode": along == "random directions"}
    assert gradgradcheck(resolved("value", start_of(free)), free, **options)


@pytest.mark.parametrize("name", ["lazy_value", "lazy_value_linear", "lazy_potentials"])
@pytest.mark.parametrize("eps", EPS)
def test_derivatives_in_points_match_differences(gen, name, eps):
    X, Y = (torch.rand(k, 2, generator=gen).requires_grad_() for k in (7, 5))
    _, a, b = problem(gen)
    start = solved(squared(X, Y), a, b, eps)[1]

    def run(X, Y):
        return getattr(lazy, name)("sqeuclidean", X, Y, a, b, eps, *solved(squared(X, Y), a, b, eps, start))

    options = {"eps": 1e-5 * min(eps * 10, 1), "rtol": 1e-5, "fast_mode": True}
    assert gradcheck(run, (X, Y), atol=1e-6, **options)
    if name == "lazy_value":
        assert gradgradcheck(run, (X, Y), atol=1e-5, **options)


@pytest.mark.parametrize("name", OUTPUTS)
def test_gradients_equal_those_of_unrolled_iterations(gen, name):
    M, a, b = problem(gen, mass=1.5)
    eps = torch.tensor(0.2)
    f, g = solved(M, a, b, eps)
    inputs = [t.requires_grad_() for t in (M, a, b, eps)]
    run = unrolled(M, a, b, eps, tol=1e-14, max_iter=400)
    other = {
        "plan": (run.plan,),
        "value": ((a * run.f).sum() + (b * run.g).sum(),),
        "value_linear": ((run.plan * M).sum(),),
        "potentials": (run.f, run.g),
    }[name]
    ours = getattr(dense, name)(*inputs, f, g)
    ours = ours if isinstance(ours, tuple) else (ours,)
    upstream = [torch.randn(t.shape, generator=gen) for t in ours]
    first, second = (grad(out, inputs, upstream) for out in (ours, other))
    first, second = ([t[0], *tangent(*t[1:3]), t[3]] for t in (first, second))
    for p, q in zip(first, second, strict=True):
        # Both solve to 1e-13; the unrolled one forgets its start at the rate of Sinkhorn.
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_unrolled_iterations_skip_zero_weights_and_forbidden_pairs(gen):
    M, a, b = problem(gen)
    M[0, 1], a[2], b[3] = math.inf, 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    eps = torch.tensor(0.2, requires_grad=True)
    inputs = [t.requires_grad_() for t in (M, a, b)]
    run = unrolled(M, a, b, eps, tol=1e-12)
    f, g = solved(M, a, b, eps)
    torch.testing.assert_close(run.plan, dense.plan(M, a, b, eps, f, g))
    torch.testing.assert_close(run.g, g)
    found = grad((run.plan * torch.rand(7, 5, generator=gen)).sum() + run.f.sum(), [*inputs, eps])
    assert all(bool(t.isfinite().all()) for t in found)


@pytest.mark.parametrize("mass", [1.0, 2.5])
def test_the_value_has_the_plan_as_gradient_and_the_mass_as_its_sum(gen, mass):
    M, a, b = problem(gen, mass=mass)
    f, g = solved(M, a, b, 0.1)
    M.requires_grad_()
    (P,) = grad(dense.value(M, a, b, 0.1, f, g), M)
    torch.testing.assert_close(P, dense.plan(M, a, b, 0.1, f, g).detach())
    torch.testing.assert_close((P.sum(1), P.sum(0), P.sum()), (a, b, torch.tensor(mass)))


def test_mass_scales_plan_value_and_potentials_as_documented(gen):
    M, a, b = problem(gen)
    s, eps = 2.5, 0.1
    f, g = solved(M, a, b, eps)
    scaled = f - eps * math.log(s), g
    torch.testing.assert_close(dense.plan(M, s * a, s * b, eps, *scaled), s * dense.plan(M, a, b, eps, f, g))
    value = dense.value(M, a, b, eps, f, g)
    expected = s * value - eps * s * math.log(s)
    torch.testing.assert_close(dense.value(M, s * a, s * b, eps, *scaled), expected)
    # The same number from the primal problem.
    P = s * dense.plan(M, a, b, eps, f, g)
    primal = (P * M).sum() + eps * (P * (P / (s * s * a.unsqueeze(1) * b)).log()).sum()
    torch.testing.assert_close(primal, expected)
    torch.testing.assert_close(solved(M, s * a, s * b, eps), scaled)


def test_entropy_form_differs_by_the_entropies_of_the_weights(gen):
    M, a, b = problem(gen)
    f, g = solved(M, a, b, 0.1)
    a.requires_grad_()
    value, P = dense.value(M, a, b, 0.1, f, g, reg_type="entropy"), dense.plan(M, a, b, 0.1, f, g).detach()
    torch.testing.assert_close(value.detach(), (P * M).sum() + 0.1 * torch.xlogy(P, P).sum())
    torch.testing.assert_close(grad(value, a)[0], f + 0.1 * (a.log() + 1))


def test_envelope_gradients_are_the_potentials(gen):
    M, a, b = problem(gen)
    f, g = solved(M, a, b, 0.1)
    a.requires_grad_(), b.requires_grad_()
    torch.testing.assert_close(grad(dense.value(M, a, b, 0.1, f, g), (a, b)), (f, g - 0.1))


@pytest.mark.parametrize("name", OUTPUTS)
def test_zero_weights_give_the_derivatives_of_a_small_weight(gen, name):
    M, a, b = problem(gen)
    a[2] = b[1] = 0.0
    a, b = a / a.sum(), b / b.sum()
    u = {k: torch.randn(s, generator=gen) for k, s in (("plan", (7, 5)), ("f", 7), ("g", 5))}

    def run(a, b):
        out = getattr(dense, name)(M, a, b, 0.2, *solved(M, a, b, 0.2))
        if name == "potentials":
            return (u["f"] * out[0]).sum() + (u["g"] * out[1]).sum()
        return (u["plan"] * out).sum() if name == "plan" else out

    leaf = a.requires_grad_(), b.requires_grad_()
    da, db = grad(run(*leaf), leaf)
    assert bool(da.isfinite().all() and db.isfinite().all())
    # One-sided differences of second order, into the positive orthant, with the mass kept.
    for d, w, at in ((da, a, 2), (db, b, 1)):
        h = 1e-5
        move = torch.zeros_like(w)
        move[at], move[0] = 1.0, -1.0
        values = [
            run(*((w.detach() + k * h * move, b.detach()) if w is a else (a.detach(), w.detach() + k * h * move)))
            for k in range(3)
        ]
        slope = (-3 * values[0] + 4 * values[1] - values[2]) / (2 * h)
        # Truncation h^2 / w^2 and rounding 1e-13 / h.
        torch.testing.assert_close((d * move).sum(), slope.detach(), rtol=1e-5, atol=1e-6)


def test_zero_weights_give_exactly_zero_rows_and_finite_potentials(gen):
    M, a, b = problem(gen)
    a[2] = b[1] = 0.0
    a, b = a / a.sum(), b / b.sum()
    f, g = solved(M, a, b, 0.01)
    P = dense.plan(M, a, b, 0.01, f, g)
    assert float(P[2].abs().max()) == float(P[:, 1].abs().max()) == 0.0
    found = dense.potentials(M, a, b, 0.01, f, g)
    torch.testing.assert_close(found[0], softmin(M, g, b, 0.01))
    torch.testing.assert_close(found[1], softmin(M.mT, f, a, 0.01))


@pytest.mark.parametrize("name", OUTPUTS)
def test_forbidden_pairs_take_no_part(gen, name):
    M, a, b = problem(gen)
    M[0, 1] = M[3, 2] = M[4, 4] = math.inf
    f, g = solved(M, a, b, 0.1)
    huge = torch.where(M == math.inf, 50.0, M)
    u = torch.rand(7, 5, generator=gen)
    found = []
    for cost in (M, huge):
        inputs = [t.clone().requires_grad_() for t in (cost, a, b, torch.tensor(0.1))]
        out = getattr(dense, name)(*inputs, f, g)
        out = (u * out).sum() if name == "plan" else out
        out = (u[:, 0] * out[0]).sum() + (u[0] * out[1]).sum() if name == "potentials" else out
        found.append(grad(out, inputs))
    assert float(found[0][0][M == math.inf].abs().max()) == 0.0
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_batch_equals_the_loop(gen, name):
    items = [problem(gen) for _ in range(3)]
    eps = torch.tensor([0.05, 0.1, 1.0])
    for i in (0, 2):
        items[i][1][i] = 0.0
    items = [(M, a / a.sum(), b) for M, a, b in items]
    found = [solved(*item, e) for item, e in zip(items, eps, strict=True)]
    stacked = [torch.stack(t).requires_grad_() for t in zip(*items, strict=True)] + [eps.clone().requires_grad_()]
    f, g = (torch.stack(t) for t in zip(*found, strict=True))
    out = getattr(dense, name)(*stacked, f, g)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [torch.randn(t.shape, generator=gen) for t in out]
    together = grad(out, stacked, upstream)
    for i, item in enumerate(items):
        inputs = [t.clone().requires_grad_() for t in (*item, eps[i])]
        alone = getattr(dense, name)(*inputs, *found[i])
        alone = alone if isinstance(alone, tuple) else (alone,)
        torch.testing.assert_close(tuple(t[i] for t in out), alone)
        torch.testing.assert_close(tuple(t[i] for t in together), grad(alone, inputs, [u[i] for u in upstream]))


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_shared_cost_gets_the_sum_of_the_gradients(gen, name):
    M, a, b = problem(gen)
    others = torch.stack([a, torch.full((7,), 1 / 7)])
    found = [solved(M, w, b, 0.1) for w in others]
    f, g = (torch.stack(t) for t in zip(*found, strict=True))
    M.requires_grad_()
    b = b.expand(2, -1)

    def scalar(out):
        return sum(t.square().sum() for t in out) if isinstance(out, tuple) else out.square().sum()

    (together,) = grad(scalar(getattr(dense, name)(M, others, b, 0.1, f, g)), M)
    apart = [grad(scalar(getattr(dense, name)(M, others[i], b[i], 0.1, *found[i])), M)[0] for i in range(2)]
    torch.testing.assert_close(together, apart[0] + apart[1])


def test_potentials_come_in_the_gauge_whatever_went_in(gen):
    M, a, b = problem(gen)
    f, g = solved(M, a, b, 0.1)
    torch.testing.assert_close(dense.potentials(M, a, b, 0.1, f + 3.0, g - 3.0), (f, g))
    X, Y = torch.rand(7, 2, generator=gen), torch.rand(5, 2, generator=gen)
    f, g = solved(squared(X, Y), a, b, 0.1)
    torch.testing.assert_close(lazy.lazy_potentials("sqeuclidean", X, Y, a, b, 0.1, f + 3.0, g - 3.0), (f, g))


@pytest.mark.parametrize("name", ["plan", "value_linear", "potentials"])
@pytest.mark.parametrize("only_weights", [False, True])
def test_a_second_derivative_of_an_implicit_output_raises(gen, name, only_weights):
    M, a, b = problem(gen)
    f, g = solved(M, a, b, 0.1)
    wanted = a.requires_grad_() if only_weights else M.requires_grad_()
    out = getattr(dense, name)(M, a, b, 0.1, f, g)
    (first,) = grad((out[0] if isinstance(out, tuple) else out).sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad(first.square().sum(), wanted)


def test_a_third_derivative_of_the_value_raises_as_does_a_second_of_the_lazy_cost(gen):
    X, Y = torch.rand(7, 2, generator=gen).requires_grad_(), torch.rand(5, 2, generator=gen)
    _, a, b = problem(gen)
    f, g = solved(squared(X, Y), a, b, 0.1)
    for linear, out in (
        (False, dense.value(squared(X, Y), a, b, 0.1, f, g)),
        (False, lazy.lazy_value("sqeuclidean", X, Y, a, b, 0.1, f, g)),
        (True, lazy.lazy_value_linear("sqeuclidean", X, Y, a, b, 0.1, f, g)),
    ):
        (t,) = grad(out, X, create_graph=True)
        if not linear:
            (t,) = grad(t.square().sum(), X, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            grad(t.square().sum(), X)


@pytest.mark.parametrize("name", OUTPUTS)
def test_float32_inputs_get_float32_gradients_of_double_accuracy(gen, name):
    M, a, b = (t.float() for t in problem(gen))
    f, g = solved(M, a, b.double() * (a.double().sum() / b.double().sum()), 0.05)
    u = torch.rand(7, 5, generator=gen)
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in (M, a, b, torch.tensor(0.05, dtype=torch.float32))]
        out = getattr(dense, name)(*inputs, f, g)
        out = out if isinstance(out, tuple) else (out,)
        assert all(t.dtype == dtype for t in out)
        total = sum((t * u.to(dtype)).sum() if t.ndim == 2 else (t * t.detach()).sum() for t in out)
        found.append(grad(total, inputs))
        assert all(t.dtype == dtype for t in found[-1])
    for p, q in zip(*found, strict=True):
        # Roundings of the upstream gradient, amplified by 1 / eps.
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", ["cg", "factor", "sparse"])
@pytest.mark.parametrize("eps", [0.05, 0.002])
def test_conjugate_gradients_and_factorisations_agree(gen, monkeypatch, route, eps):
    x, y = torch.rand(40, 2, generator=gen), torch.rand(30, 2, generator=gen)
    _, a, b = problem(gen, 40, 30)
    a[5] = b[3] = 0.0
    M, a, b = squared(x, y).requires_grad_(), (a / a.sum()).requires_grad_(), (b / b.sum()).requires_grad_()
    f, g = solved(M, a, b, eps)
    u = torch.rand(40, 30, generator=gen)
    expected = grad((u * dense.plan(M, a, b, eps, f, g)).sum(), (M, a, b))
    monkeypatch.setattr(systems, "DENSE_UP_TO", 0)
    monkeypatch.setattr(systems, "DENSE_AT_MOST", 0 if route != "factor" else 2048)
    monkeypatch.setattr(systems, "PATIENT", 500 if route == "cg" else 2)
    found = grad((u * dense.plan(M, a, b, eps, f, g)).sum(), (M, a, b))
    for p, q in zip(found, expected, strict=True):
        # 1e-10 relative residual, times the condition of the Laplacian.
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8 * float(q.abs().max()))


def test_a_solve_that_falls_short_is_reported(gen, monkeypatch):
    x, y = torch.rand(40, 2, generator=gen), torch.rand(30, 2, generator=gen)
    _, a, b = problem(gen, 40, 30)
    M = squared(x, y).requires_grad_()
    f, g = solved(M, a, b, 0.01)
    monkeypatch.setattr(systems, "DENSE_UP_TO", 0)
    monkeypatch.setattr(systems, "DENSE_AT_MOST", 0)
    monkeypatch.setattr(systems, "PATIENT", 1)
    monkeypatch.setattr(systems, "MAX_CG", 1)
    monkeypatch.setattr(systems, "TRUNCATION", 1e-2)
    with pytest.warns(NumericalWarning, match="this gradient is inexact"):
        dense.plan(M, a, b, 0.01, f, g).square().sum().backward()
    monkeypatch.setattr(lazy, "MAX_CG", 1)
    x.requires_grad_()
    with pytest.warns(NumericalWarning, match="this gradient is inexact"):
        lazy.lazy_value_linear("sqeuclidean", x, y, a, b, 0.01, f, g).backward()


def test_an_unreachable_point_of_weight_zero_keeps_its_infinite_potential(gen):
    M, a, b = problem(gen)
    M[2], a[2] = math.inf, 0.0
    a = a / a.sum()
    f, g = solved(M, a, b, 0.1)
    assert float(f[2]) == math.inf
    inputs = [t.requires_grad_() for t in (M, a, b)]
    assert dense.potentials(*inputs, 0.1, f, g)[0][2].item() == math.inf
    for name in ("plan", "value", "value_linear"):
        out = getattr(dense, name)(*inputs, 0.1, f, g)
        assert all(bool(t.isfinite().all()) for t in grad(out.square().sum(), inputs))


def test_results_are_off_the_graph_where_nothing_requires_a_gradient(gen):
    X, Y = torch.rand(7, 2, generator=gen), torch.rand(5, 2, generator=gen)
    _, a, b = problem(gen)
    M = squared(X, Y)
    f, g = solved(M, a, b, 0.1)
    P = plan_of(M, a, b, 0.1, f, g)
    torch.testing.assert_close(dense.plan(M, a, b, 0.1, f, g), P)
    torch.testing.assert_close(lazy.lazy_plan("sqeuclidean", X, Y, a, b, 0.1, f, g), P)
    linear = lazy.lazy_value_linear("sqeuclidean", X, Y, a, b, 0.1, f, g)
    torch.testing.assert_close(linear, (P * M).sum())
    assert not linear.requires_grad
    M.requires_grad_()
    with torch.no_grad():
        assert not any(getattr(dense, k)(M, a, b, 0.1, f, g).requires_grad for k in OUTPUTS[:3])
