"""Starts, stopping, hyperparameters and ranks."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc.tensor import FunctionalCP, FunctionalTucker, Mode
from stochproc.tensor._coordinate_ascent import Decomposition, Rows
from stochproc.tensor._factor import Factor
from stochproc.tensor._hyperparameters import improve
from stochproc.tensor._links import CPLink
from stochproc.tensor._noise import Noise
from stochproc.tensor._priors import DiscretePrior, MarkovPrior
from stochproc.tensor._rank import redundancies
from stochproc.tensor._starts import basis_functions, degree_start, exponents, find_anchor, greedy_start, of_degree
from tests.tensor.reference import markov, random_messages


def smooth_products(rank, seed, n=600, noise=0.05):
    """Sums of products of two smooth functions each, of unit variance, with noise; and the truth on a grid."""
    rng = np.random.default_rng(seed)
    phases, sizes = rng.uniform(0, 2 * math.pi, (rank, 2, 6)), rng.normal(size=(rank, 2, 6)) / (1 + np.arange(6))

    def f(X):
        waves = np.cos(math.pi * np.arange(6) * X[:, None, :, None] + phases) * sizes
        functions = waves.sum(-1)
        return functions.prod(-1).sum(-1)

    grid = rng.uniform(0, 1, (2000, 2))
    unit, X = f(grid).std(), rng.uniform(0, 1, (n, 2))
    return X, f(X) / unit + noise * rng.normal(size=n), grid, f(grid) / unit


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


def fitted_cp(means, rows, points, noise=None):
    factors = [
        Factor.from_means(DiscretePrior(torch.ones(m.shape[1])), p, m, 0.01) for m, p in zip(means, points, strict=True)
    ]
    return Decomposition(factors, CPLink(means[0].shape[1], len(means)), Noise(fixed=noise), 0)


def test_a_redundant_component_moves_to_the_others_without_changing_the_function(gen):
    points = [torch.arange(8.0)] * 3
    rows = Rows(torch.zeros(60), torch.ones(60), tuple(torch.randint(8, (60,), generator=gen) for _ in range(3)))
    means = [torch.randn(8, 3, generator=gen) for _ in range(3)]
    # Component 2 is component 0 in modes 1 and 2, up to factors.
    means[1][:, 2], means[2][:, 2] = -2 * means[1][:, 0], 0.5 * means[2][:, 0]
    model = fitted_cp(means, rows, points)
    before, _ = model.moments(rows)
    (found, *_) = redundancies(model, rows)
    assert (found.s, found.k) == (2, 0)
    assert found.cosine == pytest.approx(1.0)
    torch.testing.assert_close(found.coefficients, torch.tensor([-1.0, 0.0, 0.0]))
    moved = [m.clone() for m in means]
    moved[0] = moved[0] + moved[0][:, 2:] * found.coefficients
    after, _ = fitted_cp([m[:, :2] for m in moved], rows, points).moments(rows)
    torch.testing.assert_close(after, before)


def test_with_two_modes_combinations_of_several_are_redundant(gen):
    points = [torch.arange(8.0)] * 2
    rows = Rows(torch.zeros(60), torch.ones(60), tuple(torch.randint(8, (60,), generator=gen) for _ in range(2)))
    means = [torch.randn(8, 3, generator=gen) for _ in range(2)]
    means[1][:, 1] = 2 * means[1][:, 0] - 3 * means[1][:, 2]
    model = fitted_cp(means, rows, points)
    before, _ = model.moments(rows)
    found = next(f for f in redundancies(model, rows) if f.s == 1)
    moved = means[0] + means[0][:, 1:2] * found.coefficients
    after, _ = fitted_cp([moved[:, [0, 2]], means[1][:, [0, 2]]], rows, points).moments(rows)
    assert found.k == 0
    torch.testing.assert_close(after, before)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_pruning_finds_the_rank_and_costs_no_accuracy(rank):
    X, y, grid, truth = smooth_products(rank, 10 + rank)
    options = {"center": False, "kernel": "matern32", "early_stopping": False, "max_iter": 30, "tol": 1e-4}
    pruned = FunctionalCP(rank=6, ard=True, **options).fit(X, y)
    exact = FunctionalCP(rank=rank, init="greedy", n_init=1, **options).fit(X, y)
    errors = [np.sqrt(np.mean((m.predict(grid) - truth) ** 2)) for m in (pruned, exact)]
    assert abs(pruned.rank_ - rank) <= 1
    assert errors[0] <= 1.15 * errors[1]
    assert errors[0] <= 0.04
    assert pruned.predict(grid).shape == (2000,)


@pytest.mark.slow
def test_pruning_drops_a_component_without_use():
    X, y, _, _ = smooth_products(1, 3, n=250)
    model = FunctionalCP(rank=3, ard=True, center=False, kernel="matern32", early_stopping=False, tol=1e-4).fit(X, y)
    assert model.rank_ == 1
    assert model.core_.shape == (1, 1)
    assert [len(v) for v in model.variance_] == [1, 1]


@pytest.mark.slow
def test_pruning_of_tucker_works_mode_by_mode():
    X, y, _, _ = smooth_products(1, 3, n=250)
    model = FunctionalTucker(rank=(3, 2), ard=True, center=False, kernel="matern32", early_stopping=False, tol=1e-4)
    model.fit(X, y)
    assert model.core_.shape == model.rank_
    assert np.prod(model.rank_) < 6
    assert model.score(X, y) > 0.99


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
