"""Several outputs: each is what it would be alone, given the hyperparameters that they share or have for themselves."""

import math

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel
from sklearn.gaussian_process.kernels import Matern as SklearnMatern

from stochproc.exceptions import DataWarning
from stochproc.kernels import Matern, Periodic, Scale
from stochproc.tensor import StateSpaceGP

QUERY = np.array([3.3, -1.0, 7.5, 12.0])


def several(n=50, seed=0):
    """Times with ties and a gap, three outputs of unlike units with single values missing, a variance a value."""
    rng = np.random.default_rng(seed)
    times = rng.uniform(0, 10, n)
    times[times > 6] += 2
    times[:4] = times[4:8]
    y = np.stack([np.sin(2 * times), 30 + 10 * np.cos(times), -2 + 0.1 * times], axis=1)
    y += rng.normal(size=y.shape) * [0.1, 2.0, 0.05]
    y[rng.uniform(size=y.shape) < 0.15] = np.nan
    y[11] = np.nan
    return times, y, rng.uniform(0.01, 0.2, y.shape) * [1.0, 100.0, 0.01]


def alone(times, y, known, *, kernel, **options):
    """A fit of each output by itself."""
    return [
        StateSpaceGP(kernel, **options).fit(times, y[:, k], noise=None if known is None else known[:, k])
        for k in range(y.shape[1])
    ]


def assert_same(together, singles, times, y, rtol=1e-11):
    """Every answer about all outputs is that of the fits of each."""

    def stacked(answer):
        return np.stack([answer(single) for single in singles], axis=-1)

    close = {"rtol": rtol, "atol": rtol}
    for name in ("predict", "predict_derivative"):
        found = getattr(together, name)(QUERY, return_std=True)
        for part in (0, 1):
            expected = stacked(lambda one, name=name, part=part: getattr(one, name)(QUERY, return_std=True)[part])
            np.testing.assert_allclose(found[part], expected, **close)
    cov = together.predict(QUERY, return_cov=True)[1]
    np.testing.assert_allclose(cov, stacked(lambda one: one.predict(QUERY, return_cov=True)[1]), **close)
    quantiles = together.predict_quantiles(QUERY, [0.1, 0.7], latent=True)
    np.testing.assert_allclose(
        quantiles, stacked(lambda one: one.predict_quantiles(QUERY, [0.1, 0.7], latent=True)), **close
    )
    np.testing.assert_allclose(
        together.predict_interval(QUERY), stacked(lambda one: one.predict_interval(QUERY)), **close
    )
    np.testing.assert_allclose(
        together.predict_components(QUERY), stacked(lambda one: one.predict_components(QUERY)), **close
    )
    losses = stacked(lambda one: one.loo())
    expected = np.where(np.isnan(losses).all(1), np.nan, np.nansum(losses, 1))
    np.testing.assert_allclose(together.loo(), expected, **close)
    density = sum(one.log_predictive_density(QUERY, QUERY + k, noise=0.1) for k, one in enumerate(singles))
    target = np.stack([QUERY + k for k in range(len(singles))], axis=1)
    np.testing.assert_allclose(together.log_predictive_density(QUERY, target, noise=0.1), density, **close)
    scores = [one.score(times, y[:, k]) for k, one in enumerate(singles)]
    np.testing.assert_allclose(together.score(times, y), np.mean(scores), **close)
    np.testing.assert_allclose(
        together.log_marginal_likelihood(), sum(one.log_marginal_likelihood() for one in singles), **close
    )
    np.testing.assert_allclose(
        together.log_marginal_likelihood(times, y, noise=1.0),
        sum(one.log_marginal_likelihood(times, y[:, k], noise=1.0) for k, one in enumerate(singles)),
        **close,
    )
    for name in ("mean_", "noise_variance_"):
        np.testing.assert_allclose(getattr(together, name), [getattr(one, name) for one in singles], **close)
    assert together.n_observed_ == sum(one.n_observed_ for one in singles)


@pytest.mark.parametrize("method", ["sequential", "scan"])
def test_with_given_hyperparameters_each_output_is_what_it_is_alone(method):
    times, y, known = several()
    kernel = Scale(Matern(0.7, nu=1.5), 1.3) + Matern(5.0, nu=2.5)
    options = {"kernel": kernel, "noise": 0.05, "optimizer": None, "method": method}
    together = StateSpaceGP(**options).fit(times, y, noise=known)
    assert_same(together, alone(times, y, known, **options), times, y)


def test_known_variances_of_rows_hold_for_all_outputs():
    times, y, known = several()
    options = {"kernel": Matern(0.7, nu=1.5), "noise": 0.0, "optimizer": None}
    rows = known[:, 0]
    together = StateSpaceGP(**options).fit(times, y, noise=rows)
    singles = alone(times, y, np.stack([rows] * 3, axis=1), **options)
    for k, one in enumerate(singles):
        np.testing.assert_allclose(together.predict(QUERY)[:, k], one.predict(QUERY), rtol=1e-12)


@pytest.mark.slow
def test_outputs_with_hyperparameters_of_their_own_are_fitted_as_if_alone():
    times, y, known = several()
    together = StateSpaceGP(share_hyperparameters=False).fit(times, y, noise=known)
    singles = alone(times, y, known, kernel="matern32")
    # The same searches; a batch is summed in another order.
    assert_same(together, singles, times, y, rtol=1e-9)
    scales = together.kernel_.kernel.lengthscale
    assert scales.shape == (3, 1)
    assert scales.flatten().tolist() == [one.kernel_.kernel.lengthscale.item() for one in singles]
    assert together.n_iter_ == sum(one.n_iter_ for one in singles)
    assert len(together.optimizer_result_) == 3


def test_shared_hyperparameters_are_those_of_scikit_learn():
    rng = np.random.default_rng(3)
    times = np.sort(rng.uniform(0, 20, 80))
    y = np.stack([np.sin(times), np.cos(1.3 * times)], axis=1) + 0.2 * rng.normal(size=(80, 2))
    ours = StateSpaceGP("matern32", mean="zero", normalize_y=False).fit(times, y)
    kernel = ConstantKernel(1.0, (1e-5, 1e5)) * SklearnMatern(1.0, (1e-5, 1e5), nu=1.5) + WhiteKernel(0.1, (1e-8, 1e5))
    theirs = GaussianProcessRegressor(kernel).fit(times[:, None], y)
    # Both stop at a gradient of about 1e-5 nats in the logarithms.
    np.testing.assert_allclose(ours.log_marginal_likelihood_, theirs.log_marginal_likelihood_value_, atol=1e-4)
    mean, std = theirs.predict(times[:, None] + 0.05, return_std=True)
    found, spread = ours.predict(times + 0.05, return_std=True)
    np.testing.assert_allclose(found, mean, atol=1e-3)
    np.testing.assert_allclose(spread, std, atol=1e-3)
    assert isinstance(ours.noise_, float)


@pytest.mark.parametrize("share", [True, False])
def test_draws_have_the_law_of_each_output_and_outputs_are_independent(share):
    times, y, known = several(20)
    scales = torch.tensor([[0.5], [1.0], [4.0]])
    kernel = Matern(0.7, nu=1.5) if share else Matern(scales, nu=1.5, batch_shape=(3,))
    options = {"share_hyperparameters": share, "noise": 0.05, "optimizer": None}
    model = StateSpaceGP(kernel, **options).fit(times, y, noise=known)
    n = 2000
    draws = model.sample(QUERY, n, random_state=0)
    assert draws.shape == (4, 3, n)
    mean, cov = model.predict(QUERY, return_cov=True, latent=True)
    spread = np.sqrt(np.diagonal(cov).T)
    # Five standard errors of a mean and of a covariance of n draws: by chance once in 1e5 runs with other seeds.
    assert (np.abs(draws.mean(-1) - mean) <= 5 * spread / math.sqrt(n)).all()
    flat = (draws / spread[..., None]).transpose(1, 0, 2).reshape(12, n)
    expected = np.zeros((3, 4, 3, 4))
    for k in range(3):
        expected[k, :, k] = cov[..., k] / np.outer(spread[:, k], spread[:, k])
    assert (np.abs(np.cov(flat) - expected.reshape(12, 12)) <= 5 * np.sqrt(2 / n)).all()
    noisy = model.sample_y(QUERY, n, random_state=0)
    np.testing.assert_allclose(noisy.var(-1), spread**2 + model.noise_variance_, rtol=5 * math.sqrt(2 / n))


def test_a_batch_of_kernels_is_one_an_output():
    times, y, known = several()
    scales = [0.5, 1.0, 4.0]
    kernel = Matern(torch.tensor(scales)[:, None], nu=2.5, batch_shape=(3,))
    options = {"noise": 0.05, "optimizer": None}
    together = StateSpaceGP(kernel, share_hyperparameters=False, **options).fit(times, y, noise=known)
    singles = [
        StateSpaceGP(Matern(scale, nu=2.5), **options).fit(times, y[:, k], noise=known[:, k])
        for k, scale in enumerate(scales)
    ]
    assert_same(together, singles, times, y)


def test_parts_of_a_kernel_that_share_a_hyperparameter_go_on_sharing_it_by_output():
    times, y, _ = several()
    first, second = Matern(1.0, nu=0.5), Matern(1.0, nu=1.5)
    second.log_lengthscale = first.log_lengthscale
    model = StateSpaceGP(first + second, share_hyperparameters=False, optimizer=None).fit(times, y)
    a, b = model.kernel_.kernels
    assert a.log_lengthscale is b.log_lengthscale
    assert a.log_lengthscale.shape == (3, 1)
    assert first.log_lengthscale.shape == (1,)


def test_one_column_of_targets_stays_a_column():
    times, y, _ = several()
    column, vector = (StateSpaceGP(optimizer=None).fit(times, target) for target in (y[:, :1], y[:, 0]))
    np.testing.assert_allclose(column.predict(QUERY), vector.predict(QUERY)[:, None])
    assert column.predict_interval(QUERY).shape == (4, 2, 1)
    assert column.score(times, y[:, 0]) == pytest.approx(vector.score(times, y[:, :1]))


def test_torch_and_frames_of_targets_are_taken():
    pd = pytest.importorskip("pandas")
    times, y, _ = several()
    model = StateSpaceGP(optimizer=None).fit(torch.tensor(times), torch.tensor(y))
    assert model.predict(torch.tensor(QUERY)).shape == (4, 3)
    assert isinstance(model.loo(), torch.Tensor)
    frame = pd.DataFrame(y, columns=["a", "b", "c"])
    np.testing.assert_array_equal(StateSpaceGP(optimizer=None).fit(times, frame).predict(QUERY), model.predict(QUERY))


@pytest.mark.parametrize("share", [True, False])
def test_saving_keeps_every_output(tmp_path, share):
    times, y, known = several(30)
    kernel = Scale(Matern(1.0, nu=1.5)) * Periodic(period=3.0)
    model = StateSpaceGP(kernel, share_hyperparameters=share, optimizer=None).fit(times, y, noise=known)
    with torch.no_grad():
        model.kernel_.kernels[0].log_outputscale += 0.1234
    model.save(tmp_path / "model.safetensors")
    loaded = StateSpaceGP.load(tmp_path / "model.safetensors")
    for ours, theirs in zip(model.predict(QUERY, return_std=True), loaded.predict(QUERY, return_std=True), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(model.loo(), loaded.loo())
    np.testing.assert_array_equal(model.noise_, loaded.noise_)


def test_an_interruption_keeps_what_was_learned_of_the_outputs_before():
    times, y, _ = several()
    ends = []

    def interrupt(state):
        if state.iteration == 1:
            ends.append(state)
        if len(ends) == 2:
            raise KeyboardInterrupt

    model = StateSpaceGP(share_hyperparameters=False)
    with pytest.raises(KeyboardInterrupt):
        model.fit(times, y, callback=interrupt)
    assert np.isfinite(model.predict(QUERY)).all()
    assert not model.converged_
    first = StateSpaceGP().fit(times, y[:, 0])
    assert model.kernel_.kernel.lengthscale[0].item() == first.kernel_.kernel.lengthscale.item()


def test_a_callback_stops_all_outputs():
    times, y, _ = several()
    calls = []

    def stop(state):
        calls.append(state)
        return True

    with pytest.warns(ConvergenceWarning, match="the callback stopped it"):
        model = StateSpaceGP(share_hyperparameters=False).fit(times, y, callback=stop)
    assert len(calls) == 1
    assert not model.converged_
    assert np.isfinite(model.predict(QUERY)).all()


@pytest.mark.parametrize("share", [True, False])
def test_an_output_that_does_not_vary_warns_and_takes_no_part(share):
    times, y, _ = several()
    y[:, 1] = 7.0
    with pytest.warns(DataWarning, match="output 1 of y does not vary"):
        model = StateSpaceGP(share_hyperparameters=share).fit(times, y)
    rest = StateSpaceGP(share_hyperparameters=share).fit(times, y[:, [0, 2]])
    np.testing.assert_allclose(model.predict(QUERY)[:, 1], 7.0)
    # The searches see losses that differ by rounding, and stop at a gradient of 1e-5.
    np.testing.assert_allclose(model.predict(QUERY)[:, [0, 2]], rest.predict(QUERY), rtol=1e-4)


def test_a_clone_keeps_the_parameters_of_outputs():
    model = clone(StateSpaceGP(share_hyperparameters=False, hyper_subset=100))
    assert model.share_hyperparameters is False
    assert model.hyper_subset == 100


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "fit", "match"),
    [
        ({}, {"y": np.full((4, 2), [1.0, np.nan])}, "output 1 of y must hold at least one observed"),
        ({}, {"y": np.ones((4, 2, 2))}, "y must have shape"),
        ({}, {"y": np.full((4, 2), [1.0, 1e300])}, "output 1 of y must have entries between"),
        ({}, {"noise": np.ones((4, 3))}, r"one a value of y, \(4, 2\)"),
        ({}, {"noise": np.full((4, 2), -1.0)}, "noise must be non-negative"),
        ({"noise": 0.0}, {"noise": np.array([[0.1, 0.0]] * 4)}, "noise must be positive in all"),
        ({"share_hyperparameters": "no"}, {}, "share_hyperparameters must be one of"),
        ({"hyper_subset": 1}, {}, "hyper_subset must be at least 2"),
        ({"kernel": Matern(torch.ones(2, 1), batch_shape=(2,))}, {}, "without batch_shape"),
        (
            {"kernel": Matern(torch.ones(3, 1), batch_shape=(3,)), "share_hyperparameters": False},
            {},
            r"or one an output, with batch_shape \(2,\); got a batch of shape \(3,\)",
        ),
    ],
)
def test_bad_input_is_named(options, fit, match):
    arguments = {"X": [0.0, 1.0, 2.0, 3.0], "y": np.eye(4)[:, :2], **fit}
    with pytest.raises(ValueError, match=match):
        StateSpaceGP(**{"optimizer": None, **options}).fit(**arguments)


@pytest.mark.bad_input
def test_after_the_fit_the_number_of_outputs_is_checked():
    model = StateSpaceGP(optimizer=None).fit([0.0, 1.0, 2.0], np.eye(3)[:, :2])
    for call in (model.score, model.log_predictive_density, model.log_marginal_likelihood):
        with pytest.raises(ValueError, match=r"y must have 2 output\(s\) as in fit"):
            call([0.0, 1.0, 2.0], np.eye(3))
    with pytest.raises(ValueError, match="output 1 of y must hold"):
        model.score([0.0, 1.0], [[1.0, np.nan], [2.0, np.nan]])
