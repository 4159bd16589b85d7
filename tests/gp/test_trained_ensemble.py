"""The estimator in the units of y; what its network can be; bad input; files."""

import copy
import math

import numpy as np
import pytest
import torch

from stochproc.exceptions import DataWarning, NumericalWarning
from stochproc.gp import BurrXII, Delta, GradientFlow, InverseGamma, KernelPair, TrainedEnsemble, trained_law
from stochproc.kernels import RBF, ArcCosine, Linear, Matern, Scale
from tests.gp.trained_reference import NET, covariance, tangent


def data(n=30, d=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, 3 * np.sin(X[:, 0]) + 50


def as_given(net=NET, **options):
    return TrainedEnsemble(net, normalize_X=False, normalize_y=False, **options)


def test_predictions_are_those_of_the_law():
    X, y = data()
    X_test = torch.tensor(X[:6] + 0.2)
    model = as_given(time=2.0, ridge=0.1, scale_prior=InverseGamma(3.0, 2.0)).fit(X, y)
    law = trained_law(
        NET,
        torch.tensor(X),
        torch.tensor(y),
        flow=GradientFlow(2.0, ridge=0.1),
        scale_prior=InverseGamma(3.0, 2.0),
    )
    mean, std = model.predict(X_test, return_std=True)
    torch.testing.assert_close(mean, law.mean(X_test))
    torch.testing.assert_close(std, law.variance(X_test).sqrt())
    torch.testing.assert_close(model.predict(X_test, return_cov=True)[1], law.covariance(X_test))
    target = mean + 0.1
    torch.testing.assert_close(model.log_predictive_density(X_test, target), law.predictive(X_test).log_prob(target))
    torch.testing.assert_close(model.predict_quantiles(X_test, [0.3]), law.predictive(X_test).quantile([0.3]))


@pytest.mark.parametrize("rate", ["scaled", "fixed"])
@pytest.mark.parametrize("prior", ["inverse_gamma", "burr_xii"])
def test_a_change_of_units_changes_nothing_but_units(rate, prior):
    X, y = data()
    options = {"time": 3.0, "rate": rate, "scale_prior": prior}
    model = TrainedEnsemble(**options).fit(X, y)
    other = TrainedEnsemble(**options).fit(1000 * X + 5, 1e-3 * y - 7)
    X_test = X[:5] + 0.1
    there = 1000 * X_test + 5
    for one, two in zip(model.predict(X_test, return_cov=True), other.predict(there, return_cov=True), strict=True):
        shift = -7 if one.ndim == 1 else 0
        np.testing.assert_allclose(two, 1e-3 ** (one.ndim) * one + shift, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(other.predict_interval(there), 1e-3 * model.predict_interval(X_test) - 7, rtol=1e-7)
    density = model.log_predictive_density(X_test, y[:5])
    np.testing.assert_allclose(
        other.log_predictive_density(there, 1e-3 * y[:5] - 7), density + math.log(1e3), rtol=1e-5
    )


def test_converged_networks_meet_their_targets_and_a_ridge_keeps_them_off():
    X, y = data()
    exact, kept = TrainedEnsemble().fit(X, y), TrainedEnsemble(ridge=1.0).fit(X, y)
    np.testing.assert_allclose(exact.predict(X), y, rtol=1e-9)
    assert exact.predict(X, return_std=True)[1].max() < 1e-6
    assert np.abs(kept.predict(X) - y).max() > 0.1
    assert exact.score(X, y) > kept.score(X, y) > 0.9


def test_the_degrees_of_freedom_stay_those_of_the_prior():
    X, y = data()
    model = TrainedEnsemble(scale_prior=InverseGamma(2.5)).fit(X, y)
    assert model.scale_posterior_.df == 5.0
    low, high = model.predict_interval(X[:4] + 0.3, 0.5).T
    std = model.predict(X[:4] + 0.3, return_std=True)[1]
    from scipy import stats

    want = 2 * stats.t(5).ppf(0.75) * std * math.sqrt(3 / 5)
    np.testing.assert_allclose(high - low, want, rtol=1e-9)


def test_a_network_can_be_given_in_every_way():
    X, y = data()
    pair = (ArcCosine(1), ArcCosine(1) + ArcCosine(0) * Linear(bias=1e-9))
    wanted = as_given(KernelPair(*pair)).fit(X, y).predict(X + 0.1)
    np.testing.assert_array_equal(as_given(pair).fit(X, y).predict(X + 0.1), wanted)
    np.testing.assert_array_equal(as_given(list(pair)).fit(X, y).predict(X + 0.1), wanted)
    named, made, one_of_pair = (
        TrainedEnsemble(net, train="readout").fit(X, y).predict(X + 0.1)
        for net in ("matern32", Matern([1.0, 1.0], nu=1.5), (Matern(nu=1.5), None))
    )
    np.testing.assert_array_equal(named, made)
    np.testing.assert_allclose(one_of_pair, made, rtol=1e-9)
    function = as_given((covariance, tangent)).fit(X, y)
    np.testing.assert_array_equal(function.predict(X + 0.1), as_given().fit(X, y).predict(X + 0.1))


def test_a_name_is_the_network_of_that_name():
    from stochproc.gp import arch

    X, y = data()
    named, made = (TrainedEnsemble(net, time=2.0).fit(X, y) for net in ("mlp-erf-2", arch.mlp(2, "erf")))
    np.testing.assert_array_equal(named.predict(X + 0.1, return_std=True), made.predict(X + 0.1, return_std=True))
    Z, t = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    law = trained_law(arch.mlp(2, "erf"), torch.tensor(Z), torch.tensor(t), flow=GradientFlow(2.0))
    there = torch.tensor((X + 0.1 - X.mean(0)) / X.std(0))
    np.testing.assert_allclose(named.predict(X + 0.1), y.mean() + y.std() * law.mean(there).numpy(), rtol=1e-12)


def test_what_is_given_is_copied_not_changed():
    X, y = data()
    kernel, prior = Scale(RBF(0.7), 2.0), BurrXII(2.0, 1.5)
    before = copy.deepcopy((kernel.state_dict(), prior.state_dict()))
    model = TrainedEnsemble(kernel, prior, train="readout", ridge=0.1).fit(X, y)
    assert model.net_.covariance is not kernel
    assert model.scale_prior_ is not prior
    assert before == (kernel.state_dict(), prior.state_dict())
    assert all(p.requires_grad for p in kernel.parameters())


def test_several_outputs_share_network_and_scale():
    X, y = data()
    both = np.stack([y, -2 * np.cos(X[:, 1])], 1)
    for rate in ("scaled", "fixed"):
        model = TrainedEnsemble(time=2.0, rate=rate).fit(X, both)
        single = TrainedEnsemble(time=2.0, rate=rate).fit(X, both[:, 1])
        mean, cov = model.predict(X[:4] + 0.1, return_cov=True)
        assert mean.shape == (4, 2)
        assert cov.shape == (4, 4, 2)
        np.testing.assert_allclose(cov[..., 1], single.predict(X[:4] + 0.1, return_cov=True)[1], rtol=1e-9)
        quantiles = model.predict_quantiles(X[:4] + 0.1, [0.1, 0.6])
        np.testing.assert_allclose(quantiles[..., 1], single.predict_quantiles(X[:4] + 0.1, [0.1, 0.6]), rtol=1e-9)
        assert model.sample_y(X[:4], 3, random_state=0).shape == (4, 2, 3)
        assert model.log_predictive_density(X[:4] + 0.1, both[:4]).shape == (4,)


def test_a_draw_is_a_network_that_meets_its_targets():
    X, y = data()
    draws = TrainedEnsemble(random_state=3).fit(X, y).sample_y(X, 4)
    np.testing.assert_allclose(draws, np.repeat(y[:, None], 4, 1), atol=1e-3)


def test_the_seed_of_the_estimator_is_the_default_of_its_draws():
    X, y = data()
    model = TrainedEnsemble(time=1.0, random_state=3).fit(X, y)
    np.testing.assert_array_equal(model.sample_y(X, 2), model.sample_y(X, 2, random_state=3))
    assert not np.array_equal(model.sample_y(X, 2), model.sample_y(X, 2, random_state=4))


def test_there_is_no_leave_one_out_density():
    X, y = data()
    assert not hasattr(TrainedEnsemble().fit(X, y), "loo")


def test_float32_agrees_to_its_precision():
    X, y = data()
    short, long = (TrainedEnsemble(time=5.0, dtype=dtype).fit(X, y) for dtype in ("float32", "float64"))
    mean, std = short.predict(X + 0.1, return_std=True)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, long.predict(X + 0.1), rtol=1e-5)
    # Some 1e-6 of the prior variance, through the root of a variance 1e4 times smaller.
    np.testing.assert_allclose(std, long.predict(X + 0.1, return_std=True)[1], rtol=1e-3, atol=1e-4)


def test_targets_that_do_not_vary_are_named():
    X, _ = data()
    with pytest.warns(DataWarning, match="y does not vary"):
        model = TrainedEnsemble().fit(X, np.full(30, 4.0))
    np.testing.assert_allclose(model.predict(X[:3] + 0.1), 4.0)


def test_repeated_rows_are_legal_and_said_to_stay_untrained():
    X, y = data()
    with pytest.warns(NumericalWarning, match="5 of 35 eigenvalues"):
        model = TrainedEnsemble().fit(np.vstack([X, X[:5]]), np.concatenate([y, y[:5]]))
    np.testing.assert_allclose(model.predict(X), y, rtol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"net": "resmlp-erf-1", "time": 2.0, "rate": "fixed"},
        {"net": (Scale(ArcCosine(1), 2.0), ArcCosine(1) + Linear(0.3)), "ridge": 0.2},
        {"net": Matern([1.0, 2.0]), "train": "readout", "scale_prior": BurrXII(0.7, 3.0)},
    ],
)
def test_a_file_holds_the_fit_and_not_what_was_set_since(options, tmp_path):
    X, y = data()
    model = TrainedEnsemble(**options).fit(X, y)
    before = model.predict(X, return_std=True)
    model.set_params(time=0.1, rate="scaled").save(tmp_path / "m")
    again = TrainedEnsemble.load(tmp_path / "m")
    np.testing.assert_array_equal(again.predict(X, return_std=True), before)
    assert again.get_params()["time"] == 0.1
    assert again.posterior_.solution.flow == model.posterior_.solution.flow


def test_predictions_from_a_file_are_the_same_to_the_last_bit_whatever_its_header(tmp_path):
    X, _ = data(d=4)
    y = np.sin(X[:, 0]) + 50
    # Each digit of the seed makes the header longer, so that the tensors behind lie at other places in memory.
    for digits in range(1, 17):
        model = TrainedEnsemble("mlp-relu-3", train="readout", random_state=int("1" * digits)).fit(X, y)
        model.save(tmp_path / "m")
        np.testing.assert_array_equal(TrainedEnsemble.load(tmp_path / "m").predict(X), model.predict(X))


def test_a_network_object_is_saved_with_its_hyperparameters(tmp_path):
    from stochproc.gp import arch

    X, y = data()
    model = TrainedEnsemble(arch.mlp(2, w_std=1.1, b_std=0.3)).fit(X, y)
    model.save(tmp_path / "m")
    np.testing.assert_array_equal(TrainedEnsemble.load(tmp_path / "m").predict(X + 0.1), model.predict(X + 0.1))


@pytest.mark.parametrize("tangent", [None, Matern(0.8, nu=1.5)], ids=["readout", "all"])
def test_a_pair_of_kernels_is_saved_with_its_hyperparameters(tmp_path, tangent):
    X, y = data()
    net, train = KernelPair(RBF(0.7), tangent), "all" if tangent else "readout"
    net.covariance.get_parameter("log_lengthscale").requires_grad_(False)
    model = TrainedEnsemble(net, train=train).fit(X, y)
    model.save(tmp_path / "m")
    loaded = TrainedEnsemble.load(tmp_path / "m")
    np.testing.assert_array_equal(loaded.predict(X + 0.1), model.predict(X + 0.1))
    assert isinstance(loaded.net, KernelPair)
    assert not loaded.net.covariance.get_parameter("log_lengthscale").requires_grad
    with pytest.raises(TypeError, match="net cannot be saved"):
        TrainedEnsemble(KernelPair(lambda a, b: RBF()(a, b)), train="readout").fit(X, y).save(tmp_path / "m")


def test_a_function_cannot_be_saved(tmp_path):
    X, y = data()
    model = as_given((covariance, tangent)).fit(X, y)
    with pytest.raises(TypeError, match="net cannot be saved"):
        model.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"net": "mlp"}, ValueError, "net must be a network, its name such as 'mlp-relu-2'.*; got 'mlp'"),
        ({"net": "rbf"}, ValueError, 'net must be a pair of kernels to train all layers; .*train="readout"'),
        ({"net": 3}, TypeError, "net must be a network, its name or kernels; got int"),
        ({"net": (RBF(), RBF(), RBF())}, ValueError, r"net must be a pair of kernels .*; got 3 entries"),
        ({"scale_prior": "student"}, ValueError, "scale_prior must be a ScalePrior or one of"),
        ({"time": -1.0}, ValueError, "time must be non-negative"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate must be positive and finite; got inf"),
        ({"ridge": math.nan}, ValueError, "ridge must be non-negative and finite; got nan"),
        ({"rate": "slow"}, ValueError, "rate must be one of 'scaled', 'fixed'; got 'slow'"),
        ({"train": "first"}, ValueError, "train must be one of 'all', 'readout'; got 'first'"),
        ({"normalize_X": "rows"}, ValueError, "normalize_X must be one of"),
        ({"normalize_y": 2}, ValueError, "normalize_y must be one of"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of"),
        ({"device": "nowhere"}, ValueError, "device must be None or a device"),
    ],
)
def test_bad_parameters_name_themselves_and_leave_the_estimator_unfitted(options, error, message):
    X, y = data(10)
    model = TrainedEnsemble(**options)
    with pytest.raises(error, match=message):
        model.fit(X, y)
    assert not hasattr(model, "posterior_")
    assert not hasattr(model, "n_features_in_")


@pytest.mark.bad_input
def test_a_network_without_a_tangent_kernel_trains_its_readout_only():
    X, y = data(10)
    with pytest.raises(ValueError, match="Sign has no tangent kernel"):
        TrainedEnsemble("mlp-sign-1").fit(X, y)
    assert TrainedEnsemble("mlp-sign-1", train="readout").fit(X, y).predict(X).shape == (10,)


@pytest.mark.bad_input
def test_moments_that_do_not_exist_are_an_error_and_quantiles_are_not():
    X, y = data(10)
    for rate in ("scaled", "fixed"):
        model = TrainedEnsemble(scale_prior="half_cauchy", time=1.0, rate=rate).fit(X, y)
        with pytest.raises(ValueError, match="the predictive mean does not exist"):
            model.predict(X)
        assert np.isfinite(model.predict_interval(X)).all()
    known = TrainedEnsemble(scale_prior=Delta(2.0), time=1.0, rate="fixed").fit(X, y)
    assert np.isfinite(known.predict(X, return_std=True)).all()
