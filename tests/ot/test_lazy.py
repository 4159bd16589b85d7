"""Transport between point clouds without their costs, against small problems that are solved to rounding."""

import pytest
import torch

from stochproc.kernels import softmax_pass
from stochproc.ot._lazy import solve_lazy
from stochproc.ot._newton import newton
from stochproc.ot._outcome import Tracker
from stochproc.ot._problem import Problem
from stochproc.solvers import Status
from tests.ot.transport_reference import solved


def clouds(n, m, d, kind="uniform", seed=0):
    gen = torch.Generator().manual_seed(seed)
    X, Y = torch.rand(n, d, generator=gen), torch.rand(m, d, generator=gen)
    if kind == "clusters":
        centres = torch.tensor([[0.25], [0.7]])[torch.randint(2, (m,), generator=gen)]
        Y = centres + 0.1 * torch.randn(m, d, generator=gen)
    return X, Y


def even(n):
    return torch.full((n,), 1 / n)


def costs(X, Y, metric="sqeuclidean"):
    if callable(metric):
        return metric(X, Y)
    p = 1.0 if metric == "cityblock" else 2.0
    out = torch.cdist(X.double(), Y.double(), p=p, compute_mode="donot_use_mm_for_euclid_dist")
    return out.square() if metric == "sqeuclidean" else out


def run(X, Y, eps, *, a=None, b=None, metric="sqeuclidean", tol=1e-9, max_iter=2000, g0=None, callback=None):
    a, b = even(len(X)) if a is None else a, even(len(Y)) if b is None else b
    tracker = Tracker(tol, max_iter, callback)
    return solve_lazy(X, Y, a, b, eps, metric, tracker, g0), tracker, a, b


def err_of(X, Y, a, b, eps, outcome, metric="sqeuclidean"):
    """Of the plan written out, both marginals."""
    exponent = (outcome.f[:, None] + outcome.g - costs(X, Y, metric)) / eps
    P = a[:, None] * b * exponent.exp()
    return float((P.sum(1) - a).abs().sum() + (P.sum(0) - b).abs().sum())


def lopsided(x, y):
    """A cost that is not symmetric: a wind along the first axis."""
    return (x[:, None, :] - y[None, :, :]).square().sum(-1) + 0.3 * (x[:, None, 0] - y[None, :, 0]).relu()


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cityblock", lopsided])
@pytest.mark.parametrize("d", [1, 2, 3, 5, 20])
def test_potentials_are_those_of_the_dense_reference(metric, d):
    X, Y = clouds(40, 30, d)
    eps = 0.03 * float(costs(X, Y, metric).max())
    out, _, a, b = run(X, Y, eps, metric=metric, tol=1e-11)
    f, g = solved(costs(X, Y, metric), a, b, eps)
    assert out.status is Status.CONVERGED
    # The plan has err 1e-11; potentials off by more than that over the smallest coupling would show.
    torch.testing.assert_close(out.g - b @ out.g, g - b @ g, rtol=0, atol=1e-6 * eps)
    torch.testing.assert_close(out.f + b @ out.g, f + b @ g, rtol=0, atol=1e-6 * eps)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "rel"), [(2, 1e-3), (2, 1e-4), (3, 1e-3), (5, 1e-2)])
@pytest.mark.parametrize("kind", ["uniform", "clusters"])
def test_large_enough_problems_agree_with_the_dense_solver(d, rel, kind):
    X, Y = clouds(2500, 2000, d, kind)
    eps = rel * d
    out, tracker, a, b = run(X, Y, eps, tol=1e-9)
    cost = costs(X, Y)
    dense = newton(Problem(cost, a, b, eps, float(cost.max())), Tracker(1e-11, 2000))
    assert out.status is Status.CONVERGED
    assert tracker.stats["rule"] == ("two-grid" if d <= 3 else "newton")
    torch.testing.assert_close(out.g - b @ out.g, dense.g - b @ dense.g, rtol=0, atol=1e-6 * d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_err_is_that_of_a_plan_computed_from_scratch(dtype):
    # From 4e6 pairs on, sweeps run in float32 on a pattern of blocks.
    X, Y = clouds(2100, 2000, 2, "clusters")
    X, Y = X.to(dtype), Y.to(dtype)
    out, tracker, a, b = run(X, Y, 2e-3, tol=1e-4)
    assert tracker.stats["density"] < 0.3
    found = softmax_pass("sqeuclidean", X.double(), Y.double(), out.g + 2e-3 * b.log(), a, eps=2e-3)
    assert out.err <= 1e-4
    # Both are sums of 2000 float64 terms of size 1 / 2000, in another order; the exponents reach 1000.
    assert abs(float((found.mass - b).abs().sum()) - out.err) < 1e-10
    torch.testing.assert_close(out.f, -2e-3 * found.lse, rtol=0, atol=1e-12)


def test_few_sweeps_suffice_in_the_plane():
    X, Y = clouds(2000, 2000, 2)
    _, tracker, *_ = run(X, Y, 2e-3, tol=1e-4)
    # 8e-3, 1.4e-4, 4.6e-6 in the measurements of the two-grid iteration, and the certificate.
    assert tracker.stats["passes"] <= 5
    assert tracker.stats["coarse_passes"] > 0


@pytest.mark.parametrize("rel", [1e-5, 1e-6])
def test_tiny_regularisation_converges(rel):
    X, Y = clouds(300, 250, 2)
    out, _, a, b = run(X, Y, rel * 2.0, tol=1e-8)
    assert out.status is Status.CONVERGED
    assert err_of(X, Y, a, b, rel * 2.0, out) <= 2e-8


CASES = {
    "one point against many": (lambda g: (torch.rand(1, 2, generator=g), torch.rand(50, 2, generator=g))),
    "many against one": (lambda g: (torch.rand(50, 2, generator=g), torch.rand(1, 2, generator=g))),
    "all points equal": (lambda g: (torch.ones(20, 2), torch.ones(30, 2))),
    "duplicates": (lambda g: (torch.rand(10, 2, generator=g).repeat(8, 1), torch.rand(60, 2, generator=g))),
    "a line": (
        lambda g: (torch.rand(90, 1, generator=g) * torch.ones(2), torch.rand(80, 1, generator=g).expand(80, 2))
    ),
    "very different sizes": (lambda g: (torch.rand(700, 2, generator=g), torch.rand(8, 2, generator=g))),
    "a far outlier": (
        lambda g: (torch.cat([torch.rand(99, 2, generator=g), torch.full((1, 2), 1e3)]), torch.rand(80, 2, generator=g))
    ),
    "far apart": (lambda g: (torch.rand(80, 2, generator=g), 30 + torch.rand(70, 2, generator=g))),
}


@pytest.mark.parametrize("eps", [1e-3, 1e-1, 1e4])
@pytest.mark.parametrize("case", CASES)
def test_degenerate_clouds_are_solved(case, eps, gen):
    X, Y = CASES[case](gen)
    out, _, a, b = run(X, Y, eps, tol=1e-8)
    assert out.status is Status.CONVERGED
    # Exponents of size span / eps are rounded to 1e-16 of that.
    rounding = 1e-14 * float(costs(X, Y).max()) / eps
    assert err_of(X, Y, a, b, eps, out) <= 1e-8 + 10 * rounding


@pytest.mark.parametrize("d", [2, 5])
def test_weights_over_twelve_decades_are_met(d, gen):
    X, Y = clouds(200, 150, d)
    a, b = (torch.exp(-27.6 * torch.rand(n, generator=gen)) for n in (200, 150))
    a, b = a / a.sum(), b / b.sum()
    out, *_ = run(X, Y, 1e-2, a=a, b=b, tol=1e-9)
    assert out.status is Status.CONVERGED
    assert err_of(X, Y, a, b, 1e-2, out) <= 2e-9


def test_a_common_offset_changes_nothing():
    X, Y = clouds(100, 90, 2)
    # Multiples of 2^-20: an offset of 2^20 is then exact.
    X, Y = ((t * 2**20).round() / 2**20 for t in (X, Y))
    here, *_ = run(X, Y, 1e-2)
    there, *_ = run(X + 2.0**20, Y + 2.0**20, 1e-2)
    torch.testing.assert_close(there.g, here.g, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("metric", "power"), [("sqeuclidean", 2), ("euclidean", 1), ("cityblock", 1)])
@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_scaling_points_scales_potentials(metric, power, scale):
    X, Y = clouds(60, 50, 2)
    plain, *_ = run(X, Y, 1e-2, metric=metric)
    scaled, *_ = run(scale * X, scale * Y, 1e-2 * scale**power, metric=metric)
    # Potentials of err 1e-9 in the unit of eps.
    torch.testing.assert_close(scaled.g / scale**power, plain.g, rtol=0, atol=1e-7)


def test_exchanging_the_clouds_exchanges_the_potentials():
    X, Y = clouds(120, 100, 2)
    one, _, _, b = run(X, Y, 5e-3, tol=1e-11)
    two, *_ = run(Y, X, 5e-3, tol=1e-11)
    shift = b @ two.f
    torch.testing.assert_close(one.g - b @ one.g, two.f - shift, rtol=0, atol=1e-8)


def test_a_warm_start_saves_sweeps_and_a_bad_one_is_dropped():
    X, Y = clouds(1500, 1500, 2)
    cold, first, *_ = run(X, Y, 2e-3)
    warm, second, *_ = run(X, Y, 2e-3, g0=cold.g)
    assert warm.status is Status.CONVERGED
    assert second.stats["passes"] == 1 < first.stats["passes"]
    bad, *_ = run(X, Y, 2e-3, g0=torch.linspace(0, 5, 1500))
    assert bad.status is Status.CONVERGED


@pytest.mark.parametrize("d", [2, 5])
def test_a_callback_stops_and_the_reported_err_is_still_true(d):
    X, Y = clouds(2100, 2000, d)
    out, tracker, a, b = run(X, Y, 1e-2 * d, callback=lambda state: state.iteration == 1)
    assert out.status is Status.STOPPED is tracker.ended
    assert "callback" in out.message
    found = softmax_pass("sqeuclidean", X, Y, out.g + 1e-2 * d * b.log(), a, eps=1e-2 * d)
    assert abs(float((found.mass - b).abs().sum()) - out.err) < 1e-10


def test_a_spent_budget_is_said():
    X, Y = clouds(300, 300, 5)
    out, *_ = run(X, Y, 1e-3, max_iter=3)
    assert out.status is Status.MAX_ITER
    assert "max_iter=3" in out.message


@pytest.mark.slow
def test_a_tolerance_below_rounding_stagnates_and_says_so():
    X, Y = clouds(60, 50, 2)
    out, tracker, *_ = run(X, Y, 1e-4, tol=1e-18)
    assert out.status is Status.STAGNATED
    assert out.message
    # It ends at the best point soon after rounding is met, and does not wander on until the budget is spent.
    assert out.err < 1e-11
    assert len(tracker.log) < 500


def test_three_rules_are_named():
    assert run(*clouds(50, 50, 2), 1e-2)[1].stats["rule"] == "two-grid"
    assert run(*clouds(50, 50, 5), 1e-2)[1].stats["rule"] == "newton"
    assert run(*clouds(50, 50, 2), 1.0)[1].stats["rule"] == "sinkhorn"


def test_a_cost_defined_on_the_given_points_alone_is_asked_about_no_others():
    X, Y = clouds(200, 150, 2)
    known = {tuple(p) for p in torch.cat([X, Y]).tolist()}

    def stored(x, y):
        assert all(tuple(p) in known for p in torch.cat([x, y]).tolist())
        return costs(x, y)

    out, *_ = run(X, Y, 1e-2, metric=stored)
    assert out.status is Status.CONVERGED


def test_a_float32_function_gets_float32_points():
    X, Y = (t.float() for t in clouds(200, 150, 2))
    seen = set()

    def cost(x, y):
        seen.add((x.dtype, y.dtype))
        return (x[:, None] - y).square().sum(-1)

    out, *_ = run(X, Y, 1e-1, metric=cost, tol=1e-5)
    assert out.status is Status.CONVERGED
    assert seen == {(torch.float32, torch.float32)}


def test_points_are_not_written_to():
    X, Y = clouds(100, 100, 2)
    before = X.clone(), Y.clone()
    run(X, Y, 1e-2)
    assert torch.equal(X, before[0])
    assert torch.equal(Y, before[1])
