"""Components that are dropped or merged, and what is left of them."""

import numpy as np
import pytest
import torch

from stochproc.tensor import FunctionalCP, FunctionalTucker, Mode
from stochproc.tensor._coordinate_ascent import Decomposition, Rows
from stochproc.tensor._factor import Factor
from stochproc.tensor._links import CPLink
from stochproc.tensor._noise import Noise
from stochproc.tensor._packed import pack, unpack
from stochproc.tensor._priors import DiscretePrior
from stochproc.tensor._rank import SWEEPS, Pruner, redundancies
from stochproc.tensor._starting_parts import Grid, Settings, start_cp, start_tucker
from tests.tensor.reference import smooth_products


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
def test_pruning_works_with_separate_lengthscales():
    X, y, _, _ = smooth_products(1, 3, n=60)
    options = {"ard": True, "share_lengthscale": False, "center": False, "max_iter": 8, "n_init": 1}
    model = FunctionalCP(rank=3, **options).fit(X, y)
    assert model.rank_ < 3
    assert [len(v) for v in model.lengthscale_] == [model.rank_] * 2


def test_after_pruning_evidence_and_bound_are_those_of_what_is_left(gen):
    points = [torch.arange(5.0), torch.arange(4.0)]
    index = tuple(torch.randint(0, len(p), (60,), generator=gen) for p in points)
    rows = Rows(torch.randn(60, generator=gen), torch.ones(60), index)
    means = [torch.randn(len(p), 3, generator=gen) for p in points]
    model = fitted_cp(means, rows, points)
    for _ in range(3):
        model.sweep(rows, learn=False)
    pruner = Pruner(model)
    pruner._small = [torch.tensor([0, SWEEPS - 1, 0])]
    model.factors[0].mean[:, 1] = model.factors[1].mean[:, 1] = 0.0
    for factor in model.factors:
        full = unpack(factor.cov, 3).clone()
        full[:, 1] = full[:, :, 1] = 0.0
        factor.cov = pack(full)
    pruner.after_sweep(rows, learn=False)
    assert model.link.ranks == (2, 2)
    for factor in model.factors:
        again = factor.prior.posterior(factor.points, factor.Lam, factor.eta)
        assert factor.log_z == pytest.approx(again.log_z.item(), abs=1e-10)
        torch.testing.assert_close(factor.mean, again.mean)
    before = model.bound(rows)
    model.sweep(rows, learn=False)
    assert model.bound(rows) >= before - 1e-8 * abs(before)


def test_components_that_cp_lost_before_tucker_have_no_part_in_the_core(gen):
    points = [torch.linspace(0, 1, 7)] * 2
    index = tuple(torch.randint(0, 7, (40,), generator=gen) for _ in range(2))
    rows = Rows(torch.randn(40, generator=gen), torch.ones(40), index)
    grid, settings = Grid([Mode(), Mode()], points), Settings(True, (3, 4), lengthscale=(None, None), ard=True)
    model = start_cp("degree", rows, grid, settings, gen)
    model.sweep(rows, learn=False)
    for factor in model.factors:
        factor.keep(torch.tensor([0, 2]))
    model.link = CPLink(2, 2)
    before, _ = model.moments(rows)
    start_tucker(model, rows, grid, settings)
    assert model.link.ranks == (3, 4)
    after, _ = model.moments(rows)
    torch.testing.assert_close(after, before)
