"""The classifier: accuracy beside plain baselines, its contract, weights, files, interruption, bad input."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from stochproc.exceptions import NumericalWarning
from stochproc.gp import HalfCauchy, InverseGamma, ScaleMixtureGPClassifier, ScaleMixtureGPRegressor
from stochproc.kernels import RBF

LINKS = ["softmax", "robustmax", "logit", "probit", "gaussian"]


def data(n=60, n_classes=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 2))
    score = X[:, 0] + 0.3 * rng.normal(size=n)
    return X, np.digitize(score, [0.0] if n_classes == 2 else [-0.5, 0.5])


def quick(**options):
    """A few epochs of few samples; not converged, which is not what most tests are about."""
    if options.get("link") == "gaussian":
        return ScaleMixtureGPClassifier(**{"optimizer": None, **options})
    few = {"n_inducing": 15, "max_epochs": 3, "n_samples": 10, "n_samples_predict": 128, "random_state": 0}
    return ScaleMixtureGPClassifier(**(few | options))


def fit(model, X, y, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(X, y, **options)


@pytest.mark.parametrize("link", LINKS)
def test_predictions_agree_with_each_other(link):
    X, y = data()
    model = fit(quick(link=link), X, y)
    proba = model.predict_proba(X)
    assert proba.shape == (60, 2)
    np.testing.assert_allclose(proba.sum(1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.log(proba), model.predict_log_proba(X), rtol=1e-10)
    np.testing.assert_array_equal(model.predict(X), model.classes_[proba.argmax(1)])
    np.testing.assert_allclose(model.decision_function(X), np.log(proba[:, 1] / proba[:, 0]), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(proba, model.predict_proba(X))
    np.testing.assert_allclose(model.predict_proba(X[7:9]), proba[7:9], rtol=1e-10)
    assert model.score(X, y) == np.mean(model.predict(X) == y) > 0.8


@pytest.mark.parametrize("link", ["softmax", "robustmax", "gaussian"])
def test_several_classes_of_any_kind_of_label(link):
    X, y = data(n_classes=3)
    names = np.array(["low", "middle", "top"])
    model = fit(quick(link=link), X, names[y])
    assert list(model.classes_) == ["low", "middle", "top"]
    assert model.decision_function(X).shape == (60, 3)
    np.testing.assert_array_equal(model.predict(X), names[model.decision_function(X).argmax(1)])
    # Labels are noisy: the best rule is right in 84 % of the rows.
    assert model.score(X, names[y]) > 0.75
    by_number = fit(quick(link=link), X, 10 * y)
    np.testing.assert_array_equal(by_number.predict_proba(X), model.predict_proba(X))


@pytest.mark.slow
def test_a_trained_classifier_is_better_than_a_linear_one_on_iris():
    X, y = load_iris(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.4, random_state=0, stratify=y)
    model = ScaleMixtureGPClassifier(n_inducing=20, n_samples=20, tol=1e-2, random_state=0).fit(X, y)
    plain = LogisticRegression(max_iter=1000).fit(X, y)
    assert model.converged_
    assert model.n_iter_ == len(model.elbo_history_)
    assert model.elbo_history_[-1] > model.elbo_history_[0]
    # Sixty rows to test on: two of them are the difference between two good classifiers.
    assert model.score(X_test, y_test) > plain.score(X_test, y_test) - 0.034
    assert log_loss(y_test, model.predict_proba(X_test)) < log_loss(y_test, plain.predict_proba(X_test)) + 0.02


@pytest.mark.slow
def test_digits_are_told_apart_better_than_by_a_linear_model():
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=0, stratify=y)
    model = ScaleMixtureGPClassifier(normalize_X="global", max_epochs=15, n_samples=50, random_state=0)
    with pytest.warns(ConvergenceWarning):
        model.fit(X, y)
    plain = LogisticRegression(max_iter=5000, C=0.01).fit(X, y)
    # Measured: 0.983 and 0.108 against 0.976 and 0.117.
    assert model.score(X_test, y_test) > plain.score(X_test, y_test)
    assert log_loss(y_test, model.predict_proba(X_test)) < log_loss(y_test, plain.predict_proba(X_test))


def test_one_hot_regression_gives_the_probability_that_an_output_is_the_largest():
    X, y = data(n_classes=3)
    model = quick(link="gaussian", kernel=RBF(1.0)).fit(X, y)
    regressor = ScaleMixtureGPRegressor(RBF(1.0), normalize_y=False, optimizer=None).fit(X, np.eye(3)[y])
    assert model.elbo_history_[0] == pytest.approx(regressor.log_marginal_likelihood_ / 60)
    np.testing.assert_array_equal(model.predict(X), regressor.predict(X).argmax(1))
    draws = regressor.sample_y(X[:1], 40_000, random_state=0)[0]
    share = np.bincount(draws.argmax(0), minlength=3) / 40_000
    # A share has a standard error below 0.0025; 4 of them.
    np.testing.assert_allclose(model.predict_proba(X[:1])[0], share, atol=0.01)


@pytest.mark.parametrize("options", [{"kernel": "mlp-relu-2"}, {"kernel": "matern52"}, {"kernel": RBF(1.0)}], ids=repr)
def test_any_kernel_of_the_regressor_will_do(options):
    X, y = data()
    model = fit(quick(**options), X, y)
    assert model.score(X, y) > 0.8
    assert any(p.requires_grad is False for p in model.kernel_.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"coupling": "fixed"},
        {"covariance": "diag"},
        {"covariance": "lowrank", "scale_family": "lognormal"},
        {"scale_prior": HalfCauchy(1.0)},
        {"scale_prior": "delta", "dtype": "float32"},
        {"inducing": "kmeans++", "batch_size": 7},
    ],
    ids=repr,
)
def test_every_option_learns(options):
    X, y = data(n_classes=3)
    model = fit(quick(**options), X, y)
    assert model.score(X, y) > 0.75
    np.testing.assert_array_equal(fit(clone(model), X, y).predict_proba(X), model.predict_proba(X))


def test_without_an_optimizer_kernel_and_prior_are_kept():
    X, y = data()
    model = fit(quick(kernel=RBF(0.7), scale_prior=InverseGamma(2.0, 5.0), optimizer=None), X, y)
    assert model.kernel_.lengthscale.item() == pytest.approx(0.7)
    assert model.scale_prior_.b.item() == pytest.approx(5.0)
    learned = fit(quick(kernel=RBF(0.7), scale_prior=InverseGamma(2.0, 5.0)), X, y)
    assert learned.kernel_.lengthscale.item() != pytest.approx(0.7)
    assert learned.scale_prior_.b.item() != pytest.approx(5.0)


def test_rows_of_weight_zero_are_as_if_absent_and_class_weights_move_the_border():
    X, y = data()
    keep = np.arange(60) % 3 > 0
    some = fit(quick(), X[keep], y[keep]).predict_proba(X)
    np.testing.assert_array_equal(fit(quick(), X, y, sample_weight=keep.astype(float)).predict_proba(X), some)
    plain, favoured = (fit(quick(class_weight=w), X, y).predict(X).mean() for w in (None, {0: 1, 1: 20}))
    assert favoured > plain
    double = fit(quick(), X, y, sample_weight=np.where(y == 1, 20.0, 1.0))
    np.testing.assert_array_equal(double.predict(X), fit(quick(class_weight={0: 1, 1: 20}), X, y).predict(X))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 8},
        {"link": "probit", "inducing": "kmeans++"},
        {"normalize_X": "global", "class_weight": "balanced", "dtype": "float32"},
    ],
    ids=repr,
)
def test_a_weight_is_how_often_a_row_occurs_in_whatever_order(options):
    X, y = data()
    rng = np.random.default_rng(1)
    weight = rng.integers(0, 4, size=60)
    again, order = np.repeat(np.arange(60), weight), rng.permutation(60)
    repeated = fit(quick(**options), X[again], y[again])
    weighted = fit(quick(**options), X[order], y[order], sample_weight=weight[order])
    np.testing.assert_array_equal(weighted.predict_proba(X), repeated.predict_proba(X))
    np.testing.assert_array_equal(weighted.elbo_history_, repeated.elbo_history_)


def test_weights_of_one_are_no_weights():
    X, y = data()
    plain = fit(quick(), X, y).predict_proba(X)
    np.testing.assert_array_equal(fit(quick(), X, y, sample_weight=np.ones(60)).predict_proba(X), plain)


def test_parameters_set_after_a_fit_belong_to_the_next_one(tmp_path):
    X, y = data()
    model = fit(quick(), X, y)
    before = model.predict_proba(X)
    model.set_params(link="gaussian", coupling="fixed", covariance="diag", scale_family="lognormal")
    np.testing.assert_array_equal(model.predict_proba(X), before)
    model.save(tmp_path / "model.safetensors")
    again = ScaleMixtureGPClassifier.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.predict_proba(X), before)
    assert again.link == "gaussian"


def test_class_weights_go_into_a_file(tmp_path):
    X, y = data()
    model = fit(quick(class_weight={0: 1, 1: 2.5}), X, y)
    model.save(tmp_path / "model.safetensors")
    again = ScaleMixtureGPClassifier.load(tmp_path / "model.safetensors")
    assert again.class_weight == {0: 1, 1: 2.5}
    np.testing.assert_array_equal(fit(clone(again), X, y).predict_proba(X), model.predict_proba(X))


@pytest.mark.parametrize("link", ["softmax", "gaussian"])
def test_a_fit_that_the_callback_stopped_does_not_ask_for_more_epochs(link):
    X, y = data()
    model = quick(link=link, optimizer="adam")
    with pytest.warns(ConvergenceWarning, match=r"training did not converge: .*callback") as record:
        model.fit(X, y, callback=lambda state: True)
    assert not any("max_epochs" in str(w.message) for w in record)


@pytest.mark.parametrize("link", ["softmax", "logit", "gaussian"])
def test_a_fitted_classifier_survives_pickle_and_file(link, tmp_path):
    X, y = data()
    model = fit(quick(link=link), X, np.array(["a", "b"])[y])
    model.save(tmp_path / "model.safetensors")
    for again in (pickle.loads(pickle.dumps(model)), ScaleMixtureGPClassifier.load(tmp_path / "model.safetensors")):
        np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
        np.testing.assert_array_equal(again.predict(X), model.predict(X))
        np.testing.assert_array_equal(again.elbo_history_, model.elbo_history_)
        assert again.classes_.dtype == model.classes_.dtype
        assert (again.n_iter_, again.converged_, again.n_features_in_) == (model.n_iter_, model.converged_, 2)


def test_torch_in_gives_torch_out_and_the_same_numbers():
    X, y = data()
    model = fit(quick(), torch.tensor(X), torch.tensor(y))
    for name in ("predict_proba", "predict_log_proba", "decision_function", "predict"):
        got = getattr(model, name)(torch.tensor(X))
        assert isinstance(got, torch.Tensor)
        np.testing.assert_array_equal(got.numpy(), getattr(model, name)(X))
    assert model.predict_proba(torch.tensor(X).float()).dtype == torch.float32
    assert model.score(torch.tensor(X), torch.tensor(y)) == model.score(X, y)


def test_an_interruption_leaves_a_usable_estimator():
    X, y = data()

    def interrupt(state):
        if state.iteration == 2:
            raise KeyboardInterrupt

    model = quick(max_epochs=50)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y, callback=interrupt)
    assert (model.n_iter_, model.converged_, len(model.elbo_history_)) == (2, False, 2)
    assert model.score(X, y) > 0.8


def test_a_failed_fit_leaves_the_old_one():
    X, y = data()
    model = fit(quick(), X, y)
    before = model.predict_proba(X)

    def fail(state):
        raise LookupError("no such thing")

    with pytest.raises(LookupError, match="no such thing"):
        model.fit(X[:, :1], y, callback=fail)
    np.testing.assert_array_equal(model.predict_proba(X), before)


class LateIndefinite(RBF):
    """Has a slightly negative eigenvalue once told to, as rounding may give a kernel of large lengthscale."""

    late = False

    def forward(self, x, y=None):
        value = super().forward(x, y)
        if not (self.late and x is y):
            return value
        return value - (torch.linalg.eigvalsh(value)[0] + 3e-7) * torch.eye(len(x))


def test_jitter_that_the_model_needs_in_the_end_is_reported():
    X, y = data()

    def callback(state):
        state.value.kernel.late = True

    with pytest.warns(NumericalWarning, match="the inducing points is positive definite only with jitter"):
        fit(quick(kernel=LateIndefinite(1.0), max_epochs=1), X, y, callback=callback)


def test_a_fit_that_did_not_converge_says_so():
    X, y = data()
    with pytest.warns(ConvergenceWarning, match="the bound still grew after 3 epochs. Pass a larger max_epochs"):
        quick().fit(X, y)


def test_the_other_kind_of_fit_replaces_the_first():
    X, y = data()
    model = fit(quick(), X, y)
    fit(model.set_params(link="gaussian", optimizer=None), X, y)
    assert not hasattr(model, "model_")
    fit(model.set_params(link="softmax"), X, y)
    assert not hasattr(model, "regressor_")


@pytest.mark.bad_input
def test_bad_input_is_named():
    X, y = data()
    with pytest.raises(ValueError, match="y must have at least two classes; got one class"):
        quick().fit(X, np.zeros(60))
    with pytest.raises(ValueError, match="exactly 2 classes; got 3"):
        quick(link="logit").fit(*data(n_classes=3))
    with pytest.raises(ValueError, match="NaN"):
        quick().fit(np.where(X > 2, np.nan, X) * np.array([np.nan, 1]), y)
    with pytest.raises(ValueError, match="sample_weight must be 0 or 1 with link='gaussian'"):
        quick(link="gaussian").fit(X, y, sample_weight=np.full(60, 0.5))
    for class_weight, message in [
        ({0: -1.0, 1: 1.0}, "class_weight must be finite and non-negative; got -1.0"),
        ({0: float("nan"), 1: 1.0}, "class_weight must be finite and non-negative; got nan"),
        ({0: 0.0, 1: 0.0}, "class_weight must not be zero for all rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            quick(class_weight=class_weight).fit(X, y)
    with pytest.raises(ValueError, match="class_weight must be 0 or 1 with link='gaussian'"):
        quick(link="gaussian", class_weight={0: 1.0, 1: 2.0}).fit(X, y)
    with pytest.raises(NotFittedError):
        quick().predict(X)
    for options, message in [
        ({"link": "identity"}, "link must be one of 'softmax', 'robustmax', 'logit', 'probit', 'gaussian'"),
        ({"coupling": "loose"}, "coupling must be one of"),
        ({"covariance": "block"}, "covariance must be one of"),
        ({"scale_family": "gamma"}, "scale_family must be one of"),
        ({"inducing": "grid"}, "inducing must be one of"),
        ({"optimizer": "sgd"}, "optimizer must be one of 'adam', None"),
        ({"n_inducing": 0}, "n_inducing must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"max_epochs": 0}, "max_epochs must be at least 1; got 0"),
        ({"n_samples": 0}, "n_samples must be at least 1; got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"tol": -1.0}, "tol must be non-negative"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"scale_prior": "cauchy"}, "scale_prior must be a ScalePrior or one of"),
        ({"kernel": "spline"}, "kernel"),
    ]:
        with pytest.raises(ValueError, match=message):
            quick(**options).fit(X, y)
