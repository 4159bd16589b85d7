"""Training: that it reaches the optimum of the bound, stops, survives failures; where inducing points start."""

import math

import numpy as np
import pytest
import torch

from stochproc.exceptions import NotPositiveDefiniteError
from stochproc.gp import Delta, InverseGamma, ScaleMixtureSVGP
from stochproc.gp._svi_inducing import choose_inducing_points, proportional_counts
from stochproc.gp._svi_train import Training, start, train
from stochproc.kernels import RBF
from stochproc.solvers import LBFGS


def problem(n=40):
    gen = torch.Generator().manual_seed(0)
    X = torch.randn(n, 2, generator=gen)
    return X, (X[:, 0] + 0.5 * torch.randn(n, generator=gen) > 0).long()


def a_model(X, **options):
    return ScaleMixtureSVGP(RBF(1.0), X[:10], 2, InverseGamma(2.0, 2.0), link="logit", **options)


def seeded(k=0):
    return torch.Generator().manual_seed(k)


@pytest.mark.slow
def test_training_reaches_the_optimum_that_lbfgs_finds():
    X, y = problem()
    exact = a_model(X)
    exact.start(X, y)
    LBFGS(max_iter=150, tol=1e-5)(lambda: -exact.elbo(X, y), [p for p in exact.parameters() if p.requires_grad])
    model, progress = a_model(X), Training()
    start(model, X, y, generator=seeded())
    train(model, X, y, progress, generator=seeded(), learning_rate=0.05, tol=1e-4, max_epochs=300)
    # Adam ends with steps between 0.003 and 0.05, around a maximum at which the bound is flat.
    assert progress.history[-1] == pytest.approx(exact.elbo(X, y).item() / 40, abs=3e-3)


def test_start_takes_the_scale_with_the_largest_bound():
    X = torch.linspace(-3, 3, 60)[:, None]
    y = (X[:, 0] > 0).long()
    model = ScaleMixtureSVGP(RBF(1.0), X[::6], 2, InverseGamma(2.0, 2.0), link="logit")
    start(model, X, y, generator=seeded())
    chosen, b = model.elbo(X, y).item(), model.scale_prior.b.item()
    assert b > 2.0
    for factor in (0.25, 4.0):
        other = ScaleMixtureSVGP(RBF(1.0), X[::6], 2, InverseGamma(2.0, b * factor), link="logit")
        other.start(X, y)
        assert other.elbo(X, y).item() < chosen


def test_start_keeps_a_scale_that_is_not_learned():
    X, y = problem()
    model = ScaleMixtureSVGP(RBF(1.0), X[:10], 2, InverseGamma(2.0, 2.0).requires_grad_(False), link="logit")
    start(model, X, y, generator=seeded())
    assert model.scale_prior.b.item() == pytest.approx(2.0)


def test_training_stops_on_a_plateau_and_says_so(monkeypatch):
    monkeypatch.setattr("stochproc.gp._svi_train._WINDOW_STEPS", 2)
    X, y = problem()
    model, progress = a_model(X), Training()
    start(model, X, y, generator=seeded())
    train(model, X, y, progress, generator=seeded(), tol=10.0)
    assert progress.converged
    assert "stopped growing" in progress.message
    # A first window that is the best, then five halvings after three windows each of 2 epochs.
    assert len(progress.history) == 2 * (1 + 3 * 5)


def test_training_that_runs_out_of_epochs_has_not_converged():
    X, y = problem()
    model, progress = a_model(X), Training()
    train(model, X, y, progress, generator=seeded(), max_epochs=3)
    assert not progress.converged
    assert len(progress.history) == 3
    assert "still grew after 3 epochs" in progress.message


def test_a_callback_sees_each_epoch_and_can_stop():
    X, y = problem()
    model, progress, seen = a_model(X), Training(), []

    def callback(state):
        seen.append((state.iteration, -state.residual))
        return state.iteration == 2 or None

    train(model, X, y, progress, generator=seeded(), callback=callback, batch_size=16)
    assert [k for k, _ in seen] == [1, 2]
    assert [v for _, v in seen] == progress.history
    assert "callback" in progress.message


def test_equal_seeds_give_equal_bits():
    X, y = problem()
    found = []
    for k in (0, 0, 1):
        model, progress = ScaleMixtureSVGP(RBF(1.0), X[:10], 2), Training()
        train(model, X, y, progress, generator=seeded(k), max_epochs=3, batch_size=16, n_samples=10)
        found.append((progress.history, model.mean.detach().clone()))
    assert found[0][0] == found[1][0] != found[2][0]
    assert torch.equal(found[0][1], found[1][1])


class Breaking(RBF):
    """Refuses lengthscales below 0.9, as a kernel matrix of another kernel might become indefinite."""

    def forward(self, x, y=None):
        value = super().forward(x, y)
        return value if self.lengthscale.item() > 0.9 else -value


def test_a_step_that_went_too_far_is_taken_back():
    X, y = problem()
    model, progress = ScaleMixtureSVGP(Breaking(1.0), X[:10], 2, Delta(30.0), link="logit"), Training()
    model.start(X, y)
    train(model, X, y, progress, generator=seeded(), max_epochs=60, learning_rate=0.2)
    assert model.kernel.lengthscale.item() > 0.9
    assert math.isfinite(model.elbo(X, y).item())


def test_what_cannot_be_evaluated_at_the_start_is_an_error():
    X, y = problem()
    with pytest.raises(NotPositiveDefiniteError):
        start(ScaleMixtureSVGP(Breaking(0.5), X[:10], 2), X, y, generator=seeded())


@pytest.mark.parametrize("how", ["random", "kmeans++"])
def test_inducing_points_are_distinct_rows_of_each_class_in_proportion(how):
    X = torch.randn(90, 2, generator=seeded())
    X = torch.cat([X, X[:30]])
    y = torch.tensor([0] * 60 + [1] * 20 + [2] * 10 + [0] * 30)
    Z = choose_inducing_points(X, y, 18, how, seeded(1))
    assert torch.equal(Z, choose_inducing_points(X, y, 18, how, seeded(1)))
    rows = [int((X == z).all(1).nonzero()[0]) for z in Z]
    assert len(set(rows)) == 18
    assert torch.bincount(y[rows]).tolist() == [12, 4, 2]


def test_all_distinct_rows_are_taken_where_there_are_no_more():
    X = torch.tensor([[0.0], [1.0], [0.0], [2.0]])
    Z = choose_inducing_points(X, torch.tensor([0, 1, 1, 0]), 10, "random", seeded())
    assert Z[:, 0].tolist() == [0.0, 1.0, 2.0]


def test_kmeans_plus_plus_spreads_points_out():
    X = torch.cat([0.01 * torch.randn(95, 1, generator=seeded()), torch.arange(1.0, 6.0)[:, None] * 10])
    Z = choose_inducing_points(X, torch.zeros(100, dtype=torch.long), 6, "kmeans++", seeded())
    # Six clusters, one of them with 95 % of the rows: a uniform choice would hardly leave it.
    assert Z[:, 0].sub(0.0).div(10).round().unique().numel() == 6


@pytest.mark.parametrize(
    ("sizes", "total", "want"),
    [([50, 30, 1], 8, [4, 3, 1]), ([5, 5], 3, [2, 1]), ([1000, 1, 1], 10, [8, 1, 1]), ([2, 98], 99, [2, 97])],
)
def test_counts_are_in_proportion(sizes, total, want):
    assert proportional_counts(np.array(sizes), total).tolist() == want
