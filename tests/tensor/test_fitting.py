"""Starts, stopping, hyperparameters and ranks."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc.tensor import FunctionalCP, FunctionalTucker, Mode
from stochproc.tensor._coordinate_ascent import Decomposition, Rows
from stochproc.tensor._fitting import Outcome, _Batches, _is_better
from stochproc.tensor._hyperparameters import improve
from stochproc.tensor._priors import MarkovPrior
from stochproc.tensor._starts import basis_functions, degree_start, exponents, find_anchor, greedy_start, of_degree
from tests.tensor.reference import markov, random_messages, smooth_products


def rows_of(X, y):
    found = [np.unique(X[:, k], return_inverse=True) for k in range(X.shape[1])]
    index = tuple(torch.as_tensor(i) for _, i in found)
    return Rows(torch.as_tensor(y), torch.ones(len(y)), index), [torch.as_tensor(p) for p, _ in found]


def test_exponents_run_through_total_degree():
    assert exponents(2, 4) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert exponents(1, 4) == [(0,), (1,), (2,), (3,)]
    assert exponents(0, 2) == [(), ()]
    for n_modes, degree in ((2, 3), (3, 2), (4, 4)):
        found = of_degree(n_modes, degree)
        assert len(set(found)) == len(found) == math.comb(degree + n_modes - 1, degree)
        assert all(sum(e) == degree for e in found)


def test_polynomials_of_the_distribution_are_orthogonal_over_the_rows():
    rng = np.random.default_rng(0)
    rows, points = rows_of(rng.exponential(size=(4000, 1)), rng.normal(size=4000))
    table = basis_functions(rows, 0, Mode(), points[0], 4)[rows.index[0]]
    gram = table.mT @ table / 4000
    # Legendre polynomials: squares integrate to 1 / (2 d + 1). Midpoints of 4000 ranks err by 1e-6.
    torch.testing.assert_close(gram, torch.diag(1 / (2 * torch.arange(4.0) + 1)), rtol=0, atol=1e-5)


def test_categories_start_in_the_order_of_their_means():
    X = np.repeat([0.0, 1.0, 2.0], 5)[:, None]
    rows, points = rows_of(X, np.repeat([3.0, -1.0, 1.0], 5))
    line = basis_functions(rows, 0, Mode("discrete"), points[0], 2)[:, 1]
    assert line.argsort().tolist() == [1, 2, 0]


def test_periodic_modes_start_as_waves():
    points = torch.linspace(0, 2, 9)[:-1]
    table = basis_functions(
        rows_of(points[:, None].numpy(), np.zeros(8))[0], 0, Mode("periodic", period=2.0), points, 3
    )
    angle = math.pi * points
    torch.testing.assert_close(table, torch.stack([torch.ones(8), angle.cos(), angle.sin()], 1))


def test_the_anchor_is_the_mode_that_explains_most():
    rng = np.random.default_rng(0)
    X = rng.uniform(0, 1, (300, 3))
    rows, points = rows_of(X, np.sin(8 * X[:, 1]) + 0.1 * rng.normal(size=300))
    priors = [markov(0.5, 0.5, (0.3,)) for _ in range(3)]
    assert find_anchor(rows, priors, points) == 1
    start = degree_start(rows, [Mode()] * 3, points, priors, 2)
    assert start.anchor == 1
    assert not bool(start.means[1].any())
    torch.testing.assert_close(start.means[0][:, 0], torch.ones(300))


def test_greedy_start_finds_the_polynomial_of_a_product():
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (500, 2))
    y = np.sin(3 * X[:, 0]) * (1.5 * X[:, 1] ** 2 - 0.5)
    rows, points = rows_of(X, y)
    start = greedy_start(rows, [Mode()] * 2, points, [markov(0.5, 1.5, (0.3,)) for _ in range(2)], 1)
    assert start.anchor == 0
    # The second Legendre polynomial, of ranks that are uniform but for the draw.
    want = 1.5 * points[1] ** 2 - 0.5
    assert float(torch.corrcoef(torch.stack([start.means[1][:, 0], want]))[0, 1]) > 0.99
    assert float(torch.corrcoef(torch.stack([start.means[0][:, 0], torch.sin(3 * points[0])]))[0, 1]) > 0.99


def test_a_single_lengthscale_reaches_its_maximum_and_never_gets_worse(gen):
    points = torch.rand(80, generator=gen).sort().values
    Lam, eta = random_messages(80, 2, gen)
    prior = markov(3.0, 0.5)
    prior.learn_from({"_parts.0.kernel.log_lengthscale": (0.7, (1e-3, 10.0))})
    (parameter,) = prior.learned().values()

    def objective():
        return (prior.posterior(points, Lam, eta).log_z + prior.log_prior()).item()

    curvature, values = [], [objective()]
    for _ in range(6):
        found = improve(prior, points, Lam, eta, curvature)
        values.append(objective())
        torch.testing.assert_close(found.mean, prior.posterior(points, Lam, eta).mean, rtol=0, atol=1e-12)
    assert all(b >= a for a, b in itertools.pairwise(values))
    with torch.no_grad():
        best = values[-1]
        for step in (-0.3, -0.1, 0.1, 0.3):
            parameter.add_(step)
            # What a step of less than 0.02 nat is worth is not searched for.
            assert objective() < best + 0.05
            parameter.sub_(step)


def test_several_hyperparameters_never_get_worse(gen):
    points = torch.rand(60, generator=gen).sort().values
    Lam, eta = random_messages(60, 2, gen)
    prior = markov(3.0, 1.5, shared=False)
    names = [n for n, _ in prior.named_parameters()]
    prior.learn_from({n: (0.7, (1e-3, 10.0)) for n in names})
    before = (prior.posterior(points, Lam, eta).log_z + prior.log_prior()).item()
    for _ in range(3):
        improve(prior, points, Lam, eta, [])
    assert (prior.posterior(points, Lam, eta).log_z + prior.log_prior()).item() > before


def test_held_out_rows_stop_the_fit_and_all_rows_refit_it():
    X, y, grid, truth = smooth_products(1, 0, n=300, noise=0.3)
    model = FunctionalCP(rank=2).fit(X, y)
    best = int(model.validation_score_.argmax()) + 1
    assert model.converged_
    assert model.n_iter_ == best == len(model.elbo_)
    # The last four gained no thousandth of a nat on the best before them.
    assert model.validation_score_[-4:].max() <= model.validation_score_[:-4].max() + 1e-3
    assert np.sqrt(np.mean((model.predict(grid) - truth) ** 2)) < 0.2
    assert len(model.index_[0]) == 300


def test_few_rows_stop_by_the_change_of_the_bound():
    X, y, _, _ = smooth_products(1, 0, n=150)
    model = FunctionalCP(rank=1, kernel="matern32", tol=1e-4).fit(X, y)
    assert len(model.validation_score_) == 0
    change = np.abs(np.diff(model.elbo_))[-3:] / np.abs(model.elbo_[-3:])
    # elbo_ is in the units of y, which shifts it by a constant: the rule is in scaled ones.
    assert model.converged_
    assert np.all(change < 1e-3)


def test_too_few_sweeps_warn_and_say_so():
    X, y, _, _ = smooth_products(2, 0, n=150)
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        model = FunctionalCP(rank=2, max_iter=3, tol=0).fit(X, y)
    assert not model.converged_
    assert model.n_iter_ == 3


def test_the_callback_sees_every_sweep_and_can_stop():
    X, y, _, _ = smooth_products(1, 0, n=150)
    seen = []

    def callback(state):
        seen.append(state)
        return len(seen) == 5

    with pytest.warns(ConvergenceWarning, match="callback"):
        model = FunctionalCP(rank=1, n_init=1).fit(X, y, callback=callback)
    assert [s.iteration for s in seen] == [1, 2, 3, 4, 5]
    assert model.n_iter_ == 5
    assert not model.converged_
    assert np.isfinite(model.predict(X)).all()


def test_an_interruption_leaves_a_usable_estimator():
    X, y, _, _ = smooth_products(1, 0, n=150)

    def interrupt(state):
        if state.iteration == 6:
            raise KeyboardInterrupt

    model = FunctionalCP(rank=1)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y, callback=interrupt)
    assert not model.converged_
    assert model.score(X, y) > 0.5


def test_a_failure_leaves_the_old_fit():
    X, y, _, _ = smooth_products(1, 0, n=150)
    model = FunctionalCP(rank=1).fit(X, y)
    before = model.predict(X)

    def fail(state):
        raise RuntimeError("of the callback")

    with pytest.raises(RuntimeError, match="of the callback"):
        model.fit(X, -y, callback=fail)
    np.testing.assert_array_equal(model.predict(X), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_more_starts_are_tried_and_equal_seeds_give_equal_bits():
    X, y, _, _ = smooth_products(2, 0, n=150)
    for init in ("degree", "greedy", "random"):
        options = {"rank": 2, "init": init, "n_init": 3, "max_iter": 5}
        one, two = (FunctionalCP(**options, random_state=5).fit(X, y) for _ in range(2))
        np.testing.assert_array_equal(one.predict(X), two.predict(X))
        assert one.start_.startswith(init)


def test_random_cosines_perturb_later_starts():
    X, y, _, _ = smooth_products(2, 0, n=150)
    options = {"rank": 2, "init": "random", "n_init": 1, "max_iter": 4, "tol": 1.0}
    one, two = (FunctionalCP(**options, random_state=seed).fit(X, y).predict(X) for seed in (0, 1))
    assert not np.allclose(one, two)


@pytest.mark.slow
def test_mini_batches_reach_the_fit_of_all_rows():
    X, y, grid, truth = smooth_products(1, 1, n=600)
    options = {"rank": 1, "kernel": "matern32", "center": False}
    whole = FunctionalCP(**options).fit(X, y)
    batches = FunctionalCP(**options, batch_size=150).fit(X, y)
    errors = [np.sqrt(np.mean((m.predict(grid) - truth) ** 2)) for m in (whole, batches)]
    assert errors[1] <= 1.5 * errors[0] + 0.01


def test_lengthscales_stay_within_their_bounds():
    rng = np.random.default_rng(0)
    X = np.stack([np.linspace(0, 100, 250), rng.uniform(0, 1, 250)], 1)
    model = FunctionalCP(rank=1).fit(X, rng.normal(size=250))
    gap = np.median(np.diff(model.index_[0]))
    assert np.all(model.lengthscale_[0] >= gap / 3 * (1 - 1e-9))
    assert np.all(model.lengthscale_[0] <= 1000 * (1 + 1e-9))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_separate_lengthscales_differ():
    X, y, _, _ = smooth_products(2, 0, n=100)
    options = {"rank": 2, "max_iter": 3, "n_init": 1}
    model = FunctionalCP(**options, share_lengthscale=False).fit(X, y)
    assert model.lengthscale_[0].shape == (2,)
    assert model.lengthscale_[0][0] != model.lengthscale_[0][1]
    shared = FunctionalCP(**options).fit(X, y)
    assert shared.lengthscale_[0][0] == shared.lengthscale_[0][1]
    assert isinstance(shared._model.factors[0].prior, MarkovPrior)


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_stop_before_the_core_leaves_what_cp_has_learned(stop):
    X, y, _, _ = smooth_products(1, 0, n=150)
    model = FunctionalTucker(rank=(1, 2), n_init=1)
    with pytest.warns(ConvergenceWarning, match="callback"):
        model.fit(X, y, callback=lambda state: state.iteration == stop)
    assert model.core_.shape == (1, 2)
    assert model.score(X, y) > 0.5
    assert model.n_iter_ == len(model.elbo_) == max(1, stop - 5)
    assert not model.converged_


def test_an_interrupted_refit_leaves_the_fit_before_it():
    X, y, _, _ = smooth_products(1, 0, n=300, noise=0.3)
    count = []
    whole = FunctionalCP(rank=1, n_init=1).fit(X, y, callback=lambda state: count.append(state.iteration))
    before_refit = len(whole.validation_score_)
    assert len(count) == before_refit + whole.n_iter_

    model = FunctionalCP(rank=1, n_init=1)
    with pytest.warns(ConvergenceWarning, match="callback"):
        model.fit(X, y, callback=lambda state: state.iteration == before_refit + 1)
    assert model.n_iter_ == before_refit
    # In the units of y the bound shifts by the rows that it is of, nine in ten.
    inner = model._model
    assert inner.n == 270
    bound = model.elbo_[-1] + 270 * np.log(y.std())
    assert bound == pytest.approx(-270 / 2 * np.log(2 * np.pi / inner.noise.precision) - 135, abs=120)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_names_of_categories_do_not_matter_to_perturbed_starts():
    X, y, _, _ = smooth_products(1, 0, n=100)
    X[:, 1] = np.round(4 * X[:, 1])
    options = {"rank": 2, "modes": ["continuous", "discrete"], "init": "degree", "n_init": 3, "max_iter": 5, "tol": 0}
    one = FunctionalCP(**options).fit(X, y)
    other = np.stack([X[:, 0], np.array([3, 1, 4, 0, 2])[X[:, 1].astype(int)]], 1)
    two = FunctionalCP(**options).fit(other, y)
    np.testing.assert_allclose(two.predict(other), one.predict(X), rtol=0, atol=1e-8)
    assert two.start_ == one.start_


def test_batches_go_on_with_smaller_steps_after_a_trial(gen):
    rows = Rows(torch.randn(20, generator=gen), torch.ones(20), (torch.arange(20) % 4,))
    assert _Batches(rows, 5, sweeps_done=0).step == 0
    assert _Batches(rows, 5, sweeps_done=4).step == 16


class Predicting(Decomposition):
    """A stand-in for a decomposition that gives held-out rows these densities."""

    def __init__(self, density):
        self.density = density

    def log_density(self, rows):
        return self.density


@pytest.mark.parametrize(("gain", "taken"), [(0.0, False), (0.2, False), (0.5, True), (-0.5, False), (math.nan, False)])
def test_a_later_start_must_be_clearly_better_on_held_out_rows(gain, taken, gen):
    # 100 rows whose differences have a standard deviation of 1: a standard error of 0.1.
    base, spread = torch.randn(100, generator=gen), torch.randn(100, generator=gen)
    spread = (spread - spread.mean()) / spread.std()
    rows = Rows(torch.zeros(100), torch.ones(100), ())
    first = Outcome(Predicting(base), bounds=[-5.0])
    later = Outcome(Predicting(base + spread + gain), bounds=[-9.0])
    assert _is_better(later, first, rows) is taken
    # Without held-out rows the bound decides, and one that is not a number never wins.
    assert not _is_better(later, first, None)
    assert _is_better(first, later, None)
    assert _is_better(later, Outcome(Predicting(base), bounds=[math.nan]), rows)
    assert not _is_better(Outcome(Predicting(base), bounds=[math.nan]), first, rows)
