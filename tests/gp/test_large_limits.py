"""Where the model by conjugate gradients must say that it is not exact; what it keeps between calls; bad input."""

import copy
import dataclasses
import pickle

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc.exceptions import NotPositiveDefiniteError, NumericalWarning
from stochproc.gp import (
    LargeScaleMixtureGP,
    log_evidence,
)
from stochproc.kernels import RBF, Matern
from stochproc.solvers import CG, Jacobi, PivotedCholesky
from tests.gp.test_large import data, exponential, pair


def test_a_budget_that_ends_warns_with_the_residual_reached():
    X, y, X_test = data(300)
    model = pair(RBF(1.0), noise=1e-3, solver=CG(max_iter=5, precond=None))[1]
    with (
        pytest.warns(ConvergenceWarning, match="budget ended at a relative residual of .* after 5 iterations"),
        pytest.warns(NumericalWarning, match="the estimate of log p"),
    ):
        posterior = model.condition(X, y)
    assert not posterior.converged
    true = y - (model.kernel(X) + 1e-3 * torch.eye(300)).detach() @ posterior.alpha[:, 0]
    assert posterior.residual == pytest.approx((true.norm() / y.norm()).item(), rel=1e-9)
    with pytest.warns(ConvergenceWarning, match="solves of 40 rows ended above their tolerance"):
        variance = posterior.variance(X_test)
    # Too large, as it says, and never too small.
    exact = model.exact().condition(X, y).variance(X_test)
    assert (variance >= exact * (1 - 1e-9)).all()


def test_float32_data_are_solved_as_float64_ones():
    X, y, X_test = (t.float() for t in data(300))
    exact, large = pair(RBF(1.5), noise=1e-3)
    posterior = large.condition(X, y)
    assert posterior.converged
    reference = exact.condition(X.double(), y.double())
    mean, variance = posterior.predict(X_test)
    assert mean.dtype == variance.dtype == torch.float32
    mean_64, variance_64 = reference.predict(X_test.double())
    # In float32 the Cholesky factor itself is 1e-2 off here.
    assert (mean - mean_64).abs().max() < 1e-5 * mean_64.abs().max()
    torch.testing.assert_close(variance.double(), variance_64, rtol=5e-6, atol=0)


def test_targets_that_equal_their_mean_are_solved_by_zero():
    X, y, X_test = data(100)
    posterior = pair(RBF(1.5), mean="zero")[1].condition(X, torch.zeros_like(y))
    assert posterior.converged
    assert torch.equal(posterior.mean(X_test), torch.zeros(40))


def test_duplicated_rows_are_legal():
    X, y, X_test = data(100)
    exact, large = (m.condition(X.repeat(2, 1), y.repeat(2)) for m in pair(RBF(1.5), noise=0.01))
    torch.testing.assert_close(large.variance(X_test), exact.variance(X_test), rtol=2e-6, atol=0)


@pytest.mark.filterwarnings("ignore:the estimate of log p:stochproc.exceptions.NumericalWarning")
def test_without_noise_a_rough_kernel_is_solved_and_a_smooth_one_refused():
    X, y, X_test = data(80)
    exact, large = (m.condition(X, y) for m in pair(Matern(1.0, nu=0.5), noise=0.0))
    torch.testing.assert_close(large.variance(X_test), exact.variance(X_test), rtol=1e-5, atol=0)
    # Singular to rounding.
    with pytest.raises(NotPositiveDefiniteError, match="more noise would help"):
        pair(RBF(20.0), noise=0.0)[1].condition(X, y)


@pytest.mark.parametrize("n", [1, 2, 60, 150])
@pytest.mark.parametrize("noise", [0.0, 1e-12])
def test_the_evidence_is_a_number_however_little_noise_there_is(noise, n):
    X, y, _ = data(n)
    exact, large = (m.condition(X, y) for m in pair(Matern(1.0, nu=0.5), noise=noise))
    error = abs(large.log_marginal_likelihood - exact.log_marginal_likelihood)
    # Up to 100 rows the preconditioner is the matrix, so that its log determinant is exact.
    assert error < (1e-4 if n <= 100 else 4 * large.log_marginal_likelihood_stderr)


def test_an_indefinite_or_infinite_kernel_is_an_error():
    X, y, _ = data(60)
    with pytest.raises(NotPositiveDefiniteError, match="not positive"):
        pair(lambda a, b: -exponential(a, b), noise=0.01, solver=CG(precond=None))[1].condition(X, y)
    with pytest.raises(NotPositiveDefiniteError, match="not finite"):
        pair(lambda a, b: exponential(a, b) / 0.0, solver=CG(precond=None))[1].condition(X, y)


def test_a_preconditioner_saves_iterations():
    X, y, _ = data(400)
    counts = []
    for precond in (None, Jacobi(), PivotedCholesky(100)):
        seen = []
        model = pair(RBF(1.5), noise=1e-2, solver=CG(precond=precond))[1]
        model.fit_mean_and_scale(X, y, progress=lambda iteration, excess, seen=seen: seen.append((iteration, excess)))
        counts.append(seen[-1][0])
        assert seen[-1][1] <= 1
    assert counts[2] < counts[0] / 2


def test_conditioning_after_fit_mean_and_scale_starts_at_the_solution():
    X, y, _ = data(300)
    model = pair(RBF(1.5), noise=0.01)[1]
    model.fit_mean_and_scale(X, y)
    seen = []
    model.condition(X, y, progress=lambda iteration, excess: seen.append(iteration))
    assert len(seen) <= 3


def test_conditioning_on_other_data_does_not_start_at_the_solution_of_the_old_ones():
    X, y, _ = data(200)
    fresh, used = (pair(RBF(1.5), noise=0.01)[1] for _ in range(2))
    used.fit_mean_and_scale(X, 1e9 * y.flip(0))
    used.load_state_dict(fresh.state_dict())
    counts = []
    for model in (fresh, used):
        seen = []
        posterior = model.condition(X, y, progress=lambda iteration, excess, seen=seen: seen.append(iteration))
        assert posterior.converged
        counts.append(len(seen))
    assert counts[0] == counts[1]


def test_a_mean_and_a_scale_of_a_solve_that_ended_early_are_not_passed_over():
    X, y, _ = data(300)
    model = pair(RBF(1.0), noise=1e-2, solver=CG(max_iter=110, precond=None))[1]
    model.fit_mean_and_scale(X, y)
    # Where that solve stopped this one goes on, and arrives.
    with pytest.warns(ConvergenceWarning, match="the solve that set mean and scale: the budget ended at a relative"):
        posterior = model.condition(X, y)
    assert posterior.residual <= 1e-6
    assert not posterior.converged
    # It is said of the hyperparameters it set: those of another call are as good as its own solve.
    model.solver = CG(precond=None)
    model.fit_mean_and_scale(X, y)
    assert model.condition(X, y).converged


def test_a_pickle_and_a_copy_hold_the_solution_and_not_the_preconditioner():
    X, y, X_test = data(200)
    posterior = pair(RBF(1.5), noise=0.01)[1].condition(X, y)
    before = len(pickle.dumps(posterior))
    variance = posterior.variance(X_test)
    written = pickle.dumps(posterior)
    assert len(written) < 1.01 * before
    for other in (pickle.loads(written), copy.deepcopy(posterior)):
        assert torch.equal(other.variance(X_test), variance)


def test_every_column_that_misses_its_tolerance_is_reported_whatever_the_others_do():
    X, y, X_test = data(150, d=1)
    exact, large = pair(RBF(1.0), noise=1.0, solver=CG(precond=None))
    posterior, truth = large.condition(X, y), exact.condition(X, y).variance(X_test)
    cross, prior = posterior.kernel(X, X_test), posterior.kernel.diag(X_test)
    # Variances far below the noise ask for more than the first pass does.
    wanted = (1e-6 * truth).sqrt()
    for budget in range(4, 16):
        short = dataclasses.replace(posterior, solver=CG(max_iter=budget, precond=None))
        found = short._certified(cross, prior)
        assert (found.norm[found.norm <= found.tolerance] <= 1.01 * wanted[found.norm <= found.tolerance]).all()
        assert found.ok or found.message


def test_a_posterior_survives_pickling_and_later_changes_of_the_model():
    X, y, X_test = data(100)
    model = pair(RBF(1.5), noise=0.01)[1]
    posterior = model.condition(X, y)
    before = posterior.predict(X_test)
    other = pickle.loads(pickle.dumps(posterior))
    model.kernel.lengthscale = 9.0
    X.zero_()
    for a, b, c in zip(before, posterior.predict(X_test), other.predict(X_test), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_exact_twin_shares_every_hyperparameter():
    model = LargeScaleMixtureGP(RBF(1.5), noise=0.01)
    twin = model.exact()
    model.noise = 0.5
    assert twin.noise.item() == pytest.approx(0.5)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}


def test_the_evidence_is_that_of_the_quadratic_form():
    X, y, _ = data(100)
    exact, large = (m.condition(X, y) for m in pair(RBF(1.5), noise=0.01))
    parts = [p.log_marginal_likelihood - log_evidence(p.scale_prior, 100, p.scale.quad).item() for p in (exact, large)]
    # The preconditioner has the rank of the matrix: each probe gives its log determinant.
    assert parts[1] == pytest.approx(parts[0], abs=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "cg"}, TypeError, "solver must be a CG object; got str"),
        ({"solver": CG(rtol=0.0, atol=1.0)}, ValueError, "solver.rtol must be positive and finite; got 0.0"),
        ({"solver": CG(precond=torch.nn.Identity())}, TypeError, "solver.precond must be 'auto', None, Pivoted"),
        ({"solver": CG(precond=PivotedCholesky)}, TypeError, "solver.precond must be .*; got type"),
        ({"solver": CG(project=lambda v: v)}, ValueError, "solver.project must be None"),
        ({"logdet": 3}, TypeError, "logdet must be a LanczosLogdet object; got int"),
        ({"noise": -1.0}, ValueError, r"noise must be non-negative and finite; got -1\.0"),
    ],
)
def test_bad_options_name_themselves(options, error, message):
    with pytest.raises(error, match=message):
        LargeScaleMixtureGP(RBF(), **options)


@pytest.mark.bad_input
def test_new_points_of_another_kind_are_refused():
    X, y, X_test = data(50)
    posterior = pair(RBF(1.5))[1].condition(X, y)
    with pytest.raises(ValueError, match=r"X must have shape \(m, 3\); got \(40, 2\)"):
        posterior.mean(X_test[:, :2])
    with pytest.raises(TypeError, match="mixed dtypes"):
        posterior.variance(X_test.float())
