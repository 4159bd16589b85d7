"""Moving clouds of points: what the map is, what labels and weights do to it."""

import math

import numpy as np
import pytest

from stochproc import ot
from stochproc.ot import SinkhornTransport
from stochproc.ot._dist import dist

# The error of the marginals is at most 1e-9; these problems multiply it by up to some hundreds.
CLOSE = {"rtol": 0, "atol": 1e-6}


def clouds(n=40, m=30, d=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), 0.5 * rng.normal(size=(m, d)) + 1.0


def lattice(side=5):
    """Points a distance 1 apart."""
    axis = np.arange(float(side))
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)


def barycentres(model):
    """Means of targets over the rows of the plan."""
    return model.coupling_ @ model.xt_ / model.coupling_.sum(1, keepdims=True)


def test_points_sent_to_themselves_stay_where_they_are():
    X = lattice()
    shuffled = X[np.random.default_rng(0).permutation(len(X))]
    # Neighbours get a share of exp(-1 / 0.02) = 2e-22.
    moved = SinkhornTransport(reg_e=0.02).fit(X, Xt=shuffled).transform(X)
    np.testing.assert_allclose(moved, X, **CLOSE)


@pytest.mark.parametrize("out_of_sample_map", ["continuous", "ferradans"])
def test_a_translation_is_recovered(out_of_sample_map):
    X, shift = lattice(), np.array([7.0, -3.0])
    model = SinkhornTransport(reg_e=0.02, out_of_sample_map=out_of_sample_map).fit(X, Xt=X + shift)
    np.testing.assert_allclose(model.transform(X), X + shift, **CLOSE)
    np.testing.assert_allclose(model.coupling_, np.eye(len(X)) / len(X), **CLOSE)


def test_the_map_along_with_the_nearest_point_continues_a_translation():
    X, shift = lattice(), np.array([7.0, -3.0])
    model = SinkhornTransport(reg_e=0.02, out_of_sample_map="ferradans").fit(X, Xt=X + shift)
    new = X + 0.3
    np.testing.assert_allclose(model.transform(new), new + shift, **CLOSE)
    np.testing.assert_allclose(model.inverse_transform(new + shift), new, **CLOSE)


def test_between_gaussians_the_map_is_the_linear_one_of_the_closed_form():
    # Quadrature by equidistant points, which for Gaussians converges exponentially: no sampling error.
    s, t, mean, eps = 1.0, 0.5, 3.0, 0.5
    grid = np.linspace(-7, 7, 101)[:, None]
    density = np.exp(-(grid[:, 0] ** 2) / 2)
    model = SinkhornTransport(reg_e=eps)
    model.fit(s * grid, Xt=t * grid + mean, sample_weight=density, sample_weight_t=density)
    # Covariance of the entropic plan for the cost |x - y|^2 (Janati et al., NeurIPS 2020).
    covariance = math.sqrt(s**2 * t**2 + eps**2 / 16) - eps / 4
    x = np.linspace(-2, 2, 9)[:, None]
    np.testing.assert_allclose(model.transform(x), mean + covariance / s**2 * x, **CLOSE)
    np.testing.assert_allclose(model.inverse_transform(mean + x), covariance / t**2 * x, **CLOSE)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cityblock", "chebyshev"])
@pytest.mark.parametrize("reg_m", [None, 1.0])
def test_known_points_go_to_their_barycentres_under_the_plan(metric, reg_m):
    Xs, Xt = clouds()
    model = SinkhornTransport(metric=metric, reg_m=reg_m).fit(Xs, Xt=Xt)
    # Both are exponentials of the same exponents: rounding alone, of exponents up to some 100.
    np.testing.assert_allclose(model.transform(Xs), barycentres(model), rtol=1e-11)
    back = model.coupling_.T @ Xs / model.coupling_.sum(0)[:, None]
    np.testing.assert_allclose(model.inverse_transform(Xt), back, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("out_of_sample_map", ["continuous", "ferradans"])
def test_fitting_and_moving_at_once_is_fitting_then_moving(out_of_sample_map):
    Xs, Xt = clouds()
    model = SinkhornTransport(out_of_sample_map=out_of_sample_map)
    np.testing.assert_array_equal(model.fit_transform(Xs, Xt=Xt), model.fit(Xs, Xt=Xt).transform(Xs))
    np.testing.assert_allclose(model.transform(Xs), barycentres(model), **CLOSE)


def test_the_way_back_is_the_way_there_of_the_opposite_problem():
    Xs, Xt = clouds()
    there, back = SinkhornTransport().fit(Xs, Xt=Xt), SinkhornTransport().fit(Xt, Xt=Xs)
    np.testing.assert_allclose(there.inverse_transform(Xt + 0.1), back.transform(Xt + 0.1), **CLOSE)
    np.testing.assert_allclose(there.coupling_, back.coupling_.T, rtol=0, atol=1e-9)


def test_the_plan_and_potentials_are_those_of_the_function():
    Xs, Xt = clouds()
    model = SinkhornTransport(reg_e=0.2).fit(Xs, Xt=Xt)
    result = ot.solve(dist(Xs, Xt), reg=0.2)
    np.testing.assert_allclose(model.coupling_, result.plan, rtol=0, atol=1e-9)
    np.testing.assert_allclose(model.potentials_[0], result.potentials[0], **CLOSE)
    np.testing.assert_allclose(model.cost_, dist(Xs, Xt), rtol=1e-12)
    np.testing.assert_allclose(model.coupling_.sum(1), model.mu_s, rtol=0, atol=1e-9)
    np.testing.assert_allclose(model.coupling_.sum(0), model.mu_t, rtol=0, atol=1e-9)
    assert model.converged_ is True
    assert model.n_iter_ == result.n_iter


def test_shifting_and_rotating_the_targets_shifts_and_rotates_the_images():
    Xs, Xt = clouds()
    moved = SinkhornTransport().fit(Xs, Xt=Xt).transform(Xs)
    shifted = SinkhornTransport().fit(Xs, Xt=Xt + 5.0).transform(Xs)
    np.testing.assert_allclose(shifted, moved + 5.0, **CLOSE)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = SinkhornTransport().fit(Xs @ turn, Xt=Xt @ turn).transform(Xs @ turn)
    np.testing.assert_allclose(turned, moved @ turn, **CLOSE)


def test_the_order_of_points_does_not_matter():
    Xs, Xt = clouds()
    rng = np.random.default_rng(1)
    p, q = rng.permutation(len(Xs)), rng.permutation(len(Xt))
    moved = SinkhornTransport().fit(Xs, Xt=Xt).transform(Xs)
    np.testing.assert_allclose(SinkhornTransport().fit(Xs[p], Xt=Xt[q]).transform(Xs), moved, **CLOSE)


def test_integer_weights_are_repetitions_and_their_scale_is_nothing():
    Xs, Xt = clouds()
    rng = np.random.default_rng(1)
    v, w = rng.integers(0, 4, len(Xs)), rng.integers(0, 4, len(Xt))
    repeated = SinkhornTransport().fit(Xs.repeat(v, 0), Xt=Xt.repeat(w, 0)).transform(Xs)
    for factor in (1, 10.0):
        model = SinkhornTransport().fit(Xs, Xt=Xt, sample_weight=factor * v, sample_weight_t=factor * w)
        np.testing.assert_allclose(model.transform(Xs), repeated, **CLOSE)
        np.testing.assert_allclose(model.mu_s, v / v.sum(), rtol=1e-15)


@pytest.mark.parametrize(
    ("norm", "measure"),
    [("max", np.max), ("mean", np.mean), ("median", np.median)],
    ids=["max", "mean", "median"],
)
def test_with_a_norm_the_unit_of_the_data_does_not_matter(norm, measure):
    Xs, Xt = clouds()
    model, bigger = (SinkhornTransport(0.02, norm=norm).fit(k * Xs, Xt=k * Xt) for k in (1, 1000))
    np.testing.assert_allclose(measure(model.cost_), 1, rtol=1e-12)
    np.testing.assert_allclose(bigger.transform(1000 * Xs), 1000 * model.transform(Xs), rtol=0, atol=1e-3)
    np.testing.assert_allclose(bigger.potentials_[0], model.potentials_[0], **CLOSE)
    absolute = SinkhornTransport(0.02 * measure(dist(Xs, Xt))).fit(Xs, Xt=Xt)
    np.testing.assert_allclose(absolute.coupling_, model.coupling_, rtol=0, atol=1e-9)


@pytest.mark.parametrize("times", [1, 2])
def test_logarithmic_norms_are_costs_of_their_own(times):
    Xs, Xt = clouds()
    cost = dist(Xs, Xt)
    for _ in range(times):
        cost = np.log1p(cost)
    model = SinkhornTransport(0.05, norm="log" * times).fit(Xs, Xt=Xt)
    np.testing.assert_allclose(model.cost_, cost, rtol=1e-12)
    np.testing.assert_allclose(model.coupling_, ot.solve(cost, reg=0.05).plan, rtol=0, atol=1e-9)
    np.testing.assert_allclose(model.transform(Xs), barycentres(model), rtol=1e-10)


def test_where_all_costs_are_0_a_norm_divides_by_1():
    X = np.ones((4, 2))
    np.testing.assert_allclose(SinkhornTransport(norm="max").fit(X, Xt=X[:3]).coupling_, np.full((4, 3), 1 / 12))


@pytest.mark.bad_input
def test_a_norm_that_is_0_is_refused():
    X = np.r_[np.zeros((5, 1)), np.ones((1, 1))]
    with pytest.raises(ValueError, match="norm must divide costs by a positive number; got 'median', which is 0"):
        SinkhornTransport(norm="median").fit(X, Xt=X)


def test_unbalanced_transport_destroys_what_is_too_far():
    Xs, Xt = clouds()
    Xs = np.r_[Xs, [[100.0, 100.0]]]
    model = SinkhornTransport(reg_e=0.1, reg_m=1.0).fit(Xs, Xt=Xt)
    result = ot.solve(dist(Xs, Xt), reg=0.1, unbalanced=1.0)
    np.testing.assert_allclose(model.coupling_, result.plan, rtol=0, atol=1e-9)
    assert model.coupling_[-1].sum() < 1e-12
    relative = SinkhornTransport(reg_e=0.1, reg_m=1.0, norm="max").fit(Xs, Xt=Xt)
    scale = dist(Xs, Xt).max()
    absolute = ot.solve(dist(Xs, Xt), reg=0.1 * scale, unbalanced=scale)
    np.testing.assert_allclose(relative.coupling_, absolute.plan, rtol=0, atol=1e-9)


def labelled(seed=0):
    """Two classes on either side, the targets' labels partly unknown."""
    Xs, Xt = clouds(40, 30, seed=seed)
    ys, yt = np.arange(40) % 2, np.full(30, -1)
    yt[:10] = np.arange(10) % 2
    return Xs, ys, Xt, yt


def across(ys, yt):
    return (ys[:, None] != -1) & (yt != -1) & (ys[:, None] != yt)


def test_no_mass_goes_to_another_class():
    Xs, ys, Xt, yt = labelled()
    model = SinkhornTransport().fit(Xs, ys, Xt, yt)
    assert (model.coupling_[across(ys, yt)] == 0).all()
    assert np.isinf(model.cost_[across(ys, yt)]).all()
    cost = np.where(across(ys, yt), np.inf, dist(Xs, Xt))
    np.testing.assert_allclose(model.coupling_, ot.solve(cost, reg=0.1).plan, rtol=0, atol=1e-9)
    free = SinkhornTransport().fit(Xs, Xt=Xt)
    assert free.coupling_[across(ys, yt)].sum() > 0.01


def test_with_all_labels_known_classes_are_problems_of_their_own():
    Xs, Xt = clouds(40, 30)
    ys, yt = np.arange(40) % 2, np.arange(30) % 2
    moved = SinkhornTransport().fit_transform(Xs, ys, Xt, yt)
    for label in (0, 1):
        alone = SinkhornTransport().fit(Xs[ys == label], Xt=Xt[yt == label])
        np.testing.assert_allclose(moved[ys == label], alone.transform(Xs[ys == label]), **CLOSE)


@pytest.mark.parametrize("out_of_sample_map", ["continuous", "ferradans"])
def test_labels_of_points_to_move_keep_them_to_targets_of_their_class(out_of_sample_map):
    Xs, ys, Xt, yt = labelled()
    model = SinkhornTransport(out_of_sample_map=out_of_sample_map)
    moved = model.fit_transform(Xs, ys, Xt, yt)
    np.testing.assert_allclose(moved, barycentres(model), rtol=1e-10)
    if out_of_sample_map == "continuous":
        np.testing.assert_allclose(model.transform(Xs[3:5], ys[3:5]), moved[3:5], rtol=1e-12)
        unknown = model.transform(Xs, np.full(len(Xs), -1))
        np.testing.assert_allclose(unknown, model.transform(Xs), rtol=1e-10)
    back = model.coupling_.T @ Xs / model.coupling_.sum(0)[:, None]
    np.testing.assert_allclose(model.inverse_transform(Xt, yt), back, rtol=1e-9, atol=1e-12)


def test_words_are_labels_and_one_side_of_labels_changes_nothing():
    Xs, ys, Xt, yt = labelled()
    model = SinkhornTransport().fit(Xs, ys, Xt, yt)
    words = np.array(["a", "b", -1], dtype=object)
    named = SinkhornTransport().fit(Xs, words[ys], Xt, words[yt])
    np.testing.assert_array_equal(named.coupling_, model.coupling_)
    free = SinkhornTransport().fit(Xs, Xt=Xt)
    for given in ({"ys": ys}, {"yt": yt}):
        np.testing.assert_array_equal(SinkhornTransport().fit(Xs, Xt=Xt, **given).coupling_, free.coupling_)


@pytest.mark.bad_input
def test_labels_that_leave_no_transport_are_refused():
    Xs, ys, Xt, yt = labelled()
    with pytest.raises(ValueError, match="ys must leave every source a partner; no targets with weight have label 7"):
        SinkhornTransport().fit(Xs, np.where(ys == 1, 7, 0), Xt, np.zeros(30))
    with pytest.raises(ValueError, match="yt must leave every target a partner; no sources with weight have label 7"):
        SinkhornTransport().fit(Xs, ys, Xt, np.where(np.arange(30) == 3, 7, yt))
    # Half of the sources are of class 0, a tenth of the targets is not of class 1.
    crowded = np.where(np.arange(30) < 3, 0, 1)
    with pytest.raises(ValueError, match=r"ys and yt must leave all mass a way; 0\.4 of the source mass"):
        SinkhornTransport().fit(Xs, ys, Xt, crowded)
    weights = np.where(ys == 0, 0.1 / 20, 0.9 / 20)
    fair = SinkhornTransport().fit(Xs, ys, Xt, crowded, sample_weight=weights)
    assert fair.converged_
    assert SinkhornTransport(reg_m=1.0).fit(Xs, ys, Xt, crowded).converged_
    with pytest.raises(ValueError, match=r"ys must have shape \(40,\), one label a point; got \(39,\)"):
        SinkhornTransport().fit(Xs, ys[1:], Xt, yt)
    with pytest.raises(ValueError, match="ys must hold labels that fit saw, or -1; got 5"):
        fair.transform(Xs[:1], [5])
    with pytest.raises(ValueError, match="ys must hold class labels, -1 where unknown; got NaN"):
        SinkhornTransport().fit(Xs, np.where(ys == 0, np.nan, 1.0), Xt, yt)
    with pytest.raises(ValueError, match="ys and yt must hold labels of one kind"):
        SinkhornTransport().fit(Xs, np.array(["a", "b"])[ys], Xt, yt)


def test_labels_are_carried_in_shares_that_sum_to_one():
    Xs, ys, Xt, yt = labelled()
    model = SinkhornTransport().fit(Xs, Xt=Xt)
    shares = model.transform_labels(ys)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-12)
    plan = model.coupling_
    np.testing.assert_allclose(shares[:, 1], plan[ys == 1].sum(0) / plan.sum(0), rtol=1e-10)
    back = model.inverse_transform_labels(np.array(["x", "y", "z"])[np.arange(30) % 3])
    assert back.shape == (40, 3)
    np.testing.assert_allclose(back.sum(1), 1, rtol=1e-12)
    # What comes from unlabelled points is missing.
    known = model.inverse_transform_labels(yt)
    np.testing.assert_allclose(known.sum(1), plan[:, yt >= 0].sum(1) / plan.sum(1), rtol=1e-10)


def test_labels_stay_in_their_class_where_the_plan_does():
    Xs, Xt = clouds(40, 30)
    ys, yt = np.arange(40) % 2, np.arange(30) % 2
    shares = SinkhornTransport().fit(Xs, ys, Xt, yt).transform_labels(ys)
    np.testing.assert_allclose(shares, np.eye(2)[yt], rtol=1e-12)


@pytest.mark.bad_input
def test_labels_to_carry_must_be_there():
    Xs, Xt = clouds()
    model = SinkhornTransport().fit(Xs, Xt=Xt)
    with pytest.raises(ValueError, match=r"ys must have shape \(40,\), one label a point; got \(30,\)"):
        model.transform_labels(np.zeros(30))
    with pytest.raises(ValueError, match="yt must hold at least one known label; got -1 only"):
        model.inverse_transform_labels(np.full(30, -1))


@pytest.mark.parametrize("norm", [None, "max", "median", "log", "loglog"])
@pytest.mark.parametrize("out_of_sample_map", ["continuous", "ferradans"])
def test_plan_and_maps_are_those_of_pot(norm, out_of_sample_map):
    pot = pytest.importorskip("ot", reason="POT is not installed")
    Xs, Xt = clouds()
    new = Xs[:7] + 0.05
    options = {"reg_e": 0.5, "norm": norm, "out_of_sample_map": out_of_sample_map}
    theirs = pot.da.SinkhornTransport(max_iter=100_000, tol=1e-12, **options).fit(Xs=Xs, Xt=Xt)
    ours = SinkhornTransport(**options).fit(Xs=Xs, Xt=Xt)
    np.testing.assert_allclose(ours.coupling_, theirs.coupling_, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.cost_, theirs.cost_, rtol=1e-9)
    np.testing.assert_allclose(ours.mu_s, theirs.mu_s)
    for points in (Xs, new):
        np.testing.assert_allclose(ours.transform(Xs=points), theirs.transform(Xs=points), **CLOSE)
    np.testing.assert_allclose(ours.inverse_transform(Xt=new), theirs.inverse_transform(Xt=new), **CLOSE)
    ys = np.arange(40) % 3
    np.testing.assert_allclose(ours.transform_labels(ys), theirs.transform_labels(ys), **CLOSE)
    yt = np.arange(30) % 2
    np.testing.assert_allclose(ours.inverse_transform_labels(yt), theirs.inverse_transform_labels(yt), **CLOSE)


# POT divides by sums that underflow at forbidden pairs.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_labels_forbid_what_they_forbid_in_pot():
    pot = pytest.importorskip("ot", reason="POT is not installed")
    Xs, ys, Xt, yt = labelled()
    theirs = pot.da.SinkhornTransport(reg_e=0.5, max_iter=100_000, tol=1e-12).fit(Xs=Xs, ys=ys, Xt=Xt, yt=yt)
    ours = SinkhornTransport(reg_e=0.5).fit(Xs=Xs, ys=ys, Xt=Xt, yt=yt)
    np.testing.assert_allclose(ours.coupling_, theirs.coupling_, rtol=0, atol=1e-9)
