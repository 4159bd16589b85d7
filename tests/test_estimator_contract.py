"""Every public estimator through scikit-learn's own checks, and through the contract of this library."""

import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import validate_data

from stochproc._base import as_array
from stochproc.gp import ScaleMixtureGPClassifier, ScaleMixtureGPRegressor, TrainedEnsemble
from stochproc.ot import SinkhornTransport
from stochproc.solvers import LBFGS
from stochproc.tensor import FunctionalCP, FunctionalTucker, StateSpaceGP


class FirstColumn(StateSpaceGP):
    """Times are one column, and the checks pass several: this one takes the first of them and is the same else."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array = False, True
        # The targets of the checks depend on columns that it does not see.
        tags.regressor_tags.poor_score = True
        return tags

    def _validated_column(self, X, **options):
        return validate_data(self, as_array(X), dtype=[np.float64, np.float32], **options)[:, :1]


# Every estimator of the library, as cheap as it gets. An expected failure carries its reason.
ESTIMATORS = [
    ScaleMixtureGPRegressor(),
    ScaleMixtureGPRegressor(scale_prior="half_cauchy", optimizer=None),
    ScaleMixtureGPRegressor(noise_model="independent", n_restarts=1),
    ScaleMixtureGPRegressor(solver="cg", optimizer=None),
    TrainedEnsemble(),
    TrainedEnsemble(time=10.0, rate="fixed", train="readout"),
    FirstColumn("matern12", optimizer=None),
    FirstColumn(optimizer=LBFGS(max_iter=5)),
    SinkhornTransport(reg_e=1.0),
    SinkhornTransport(out_of_sample_map="ferradans", reg_m=1.0),
    FunctionalCP(rank=2, n_init=1, max_iter=5),
    FunctionalTucker(rank=1, n_init=1, max_iter=5),
    ScaleMixtureGPClassifier(n_inducing=20, max_epochs=2, n_samples=20, n_samples_predict=128, random_state=0),
]
WEIGHTS = "weights are known precisions of the noise, whose variance is learned from the number of rows"
EXPECTED_FAILURES = {
    "FunctionalCP": {"check_sample_weight_equivalence_on_dense_data": WEIGHTS},
    "FunctionalTucker": {"check_sample_weight_equivalence_on_dense_data": WEIGHTS},
    "SinkhornTransport": {"check_fit_score_takes_y": "the arguments of fit are called Xs, ys, Xt, yt, as in POT"},
}
REGRESSORS = [
    *ESTIMATORS[:6],
    FunctionalCP(rank=2, n_init=1, tol=1e6),
    FunctionalTucker(rank=2, n_init=1, tol=1e6),
    StateSpaceGP("matern12", optimizer=None),
    StateSpaceGP(optimizer=LBFGS(max_iter=5)),
]


@parametrize_with_checks(ESTIMATORS, expected_failed_checks=lambda e: EXPECTED_FAILURES.get(type(e).__name__, {}))
# The checks pass constant targets and single features on purpose.
@pytest.mark.filterwarnings("ignore::stochproc.exceptions.StochprocWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@pytest.mark.bad_input
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def data(n=40, d=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, 3 * np.sin(X[:, 0]) + 0.1 * rng.normal(size=n) + 50


@pytest.fixture(params=REGRESSORS, ids=repr)
def fitted(request):
    X, y = data(d=1 if isinstance(request.param, StateSpaceGP) else 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield clone(request.param).fit(X, y), X, y


def test_at_most_one_check_of_an_estimator_is_expected_to_fail():
    assert max(map(len, EXPECTED_FAILURES.values())) == 1


def test_signatures_of_the_contract(fitted):
    model, _, _ = fitted
    wanted = {
        "predict": ["X", "return_std", "return_cov"],
        "predict_quantiles": ["X", "q"],
        "predict_interval": ["X", "coverage"],
        "log_predictive_density": ["X", "y"],
        "sample_y": ["X", "n_samples", "random_state"],
        "score": ["X", "y"],
        "save": ["path"],
        "load": ["path"],
    }
    for name, arguments in wanted.items():
        assert list(inspect.signature(getattr(model, name)).parameters)[: len(arguments)] == arguments


def test_shapes_of_the_contract(fitted):
    model, X, y = fitted
    mean, std = model.predict(X[:7], return_std=True)
    _, cov = model.predict(X[:7], return_cov=True)
    assert mean.shape == std.shape == (7,)
    assert cov.shape == (7, 7)
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), std, rtol=1e-8)
    assert model.predict_quantiles(X[:7], [0.1, 0.5, 0.9]).shape == (7, 3)
    assert model.predict_interval(X[:7]).shape == (7, 2)
    assert model.log_predictive_density(X[:7], y[:7]).shape == (7,)
    assert model.sample_y(X[:7], 5, random_state=0).shape == (7, 5)
    assert isinstance(model.score(X, y), float)


def test_torch_in_gives_torch_out_and_the_same_numbers(fitted):
    model, X, y = fitted
    tensor = torch.tensor(X[:7])
    for name, extra in [("predict", ()), ("predict_quantiles", ([0.1],)), ("predict_interval", ())]:
        got = getattr(model, name)(tensor, *extra)
        assert isinstance(got, torch.Tensor)
        np.testing.assert_array_equal(got.numpy(), getattr(model, name)(X[:7], *extra))
    again = clone(model).fit(torch.tensor(X), torch.tensor(y))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert isinstance(again.predict(X), np.ndarray)
    assert model.predict(tensor.float()).dtype == torch.float32
    got = model.log_predictive_density(tensor, torch.tensor(y[:7]))
    assert isinstance(got, torch.Tensor)


def test_equal_seeds_give_equal_bits_and_fitting_twice_equals_once(fitted):
    model, X, y = fitted
    before = model.predict(X)
    np.testing.assert_array_equal(model.fit(X, y).predict(X), before)
    first, second = (model.sample_y(X, 3, random_state=7) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, model.sample_y(X, 3, random_state=8))


def test_a_fitted_estimator_survives_pickle_and_file(fitted, tmp_path):
    model, X, y = fitted
    model.save(tmp_path / "model.safetensors")
    for again in (pickle.loads(pickle.dumps(model)), type(model).load(tmp_path / "model.safetensors")):
        np.testing.assert_array_equal(again.predict(X), model.predict(X))
        np.testing.assert_array_equal(
            again.predict_quantiles(X, [0.01, 0.99]), model.predict_quantiles(X, [0.01, 0.99])
        )
        np.testing.assert_array_equal(again.log_predictive_density(X, y), model.log_predictive_density(X, y))
        assert again.get_params().keys() == model.get_params().keys()
        assert again.n_features_in_ == model.n_features_in_


@pytest.mark.bad_input
def test_an_unfitted_estimator_says_so(fitted, tmp_path):
    model, X, y = clone(fitted[0]), fitted[1], fitted[2]
    for call in (
        lambda: model.predict(X),
        lambda: model.predict_quantiles(X, 0.5),
        lambda: model.predict_interval(X),
        lambda: model.log_predictive_density(X, y),
        lambda: model.sample_y(X),
        lambda: model.save(tmp_path / "x"),
    ):
        with pytest.raises(NotFittedError):
            call()


@pytest.mark.bad_input
def test_levels_outside_zero_and_one_are_refused(fitted):
    model, X, _ = fitted
    for q in (0.0, 1.0, -0.1, float("nan"), [0.5, 2.0]):
        with pytest.raises(ValueError, match=r"q must lie in \(0, 1\); got"):
            model.predict_quantiles(X, q)
    with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\); got 1.5"):
        model.predict_interval(X, 1.5)


def test_works_in_a_pipeline_and_a_grid_search():
    X, y = data(30)
    pipeline = make_pipeline(StandardScaler(), ScaleMixtureGPRegressor(optimizer=None))
    grid = {"scalemixturegpregressor__noise": [0.01, 1.0], "scalemixturegpregressor__kernel": ["rbf", "matern32"]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(X, y)
    assert search.best_params_["scalemixturegpregressor__noise"] == 0.01


def test_column_names_of_a_frame_are_kept_and_checked():
    pd = pytest.importorskip("pandas")
    X, y = data()
    frame = pd.DataFrame(X, columns=["a", "b"])
    model = ScaleMixtureGPRegressor(optimizer=None).fit(frame, pd.Series(y, name="t"))
    assert list(model.feature_names_in_) == ["a", "b"]
    assert isinstance(model.predict(frame), np.ndarray)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.rename(columns={"a": "c"}))
