"""The transport estimator among scikit-learn's tools: kinds of arrays, files, pipelines, large problems, refusals."""

import pickle

import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from stochproc.exceptions import DataWarning
from stochproc.ot import SinkhornTransport, _solve_sample


def clouds(n=40, m=30, d=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), 0.5 * rng.normal(size=(m, d)) + 1.0


def two_classes(n=60, seed=0):
    """A labelled cloud, and the same classes turned by 40 degrees and moved, as another domain."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    X = rng.normal(size=(2, n, 2)) * [0.3, 1.0] + np.where(y == 1, 2.0, -2.0)[:, None] * [1.0, 0.0]
    c, s = np.cos(np.deg2rad(40)), np.sin(np.deg2rad(40))
    return X[0], y, X[1] @ np.array([[c, s], [-s, c]]) + [4.0, 1.0], y


@pytest.fixture
def little_memory(monkeypatch):
    """Hardly any memory: nothing of size n x m may be stored."""
    monkeypatch.setattr(_solve_sample, "free_bytes", lambda device: 1000)


@pytest.mark.parametrize("options", [{}, {"norm": "max"}, {"norm": "mean"}, {"norm": "median"}, {"norm": "log"}])
def test_a_problem_too_large_to_store_has_the_same_maps(little_memory, options):
    Xs, Xt = clouds()
    lazy = SinkhornTransport(tol=1e-9, **options).fit(Xs, Xt=Xt)
    dense = SinkhornTransport(method="ssns", **options).fit(Xs, Xt=Xt)
    # err of 1e-9, times a condition of some hundreds.
    close = {"rtol": 0, "atol": 1e-6}
    assert isinstance(dense.coupling_, np.ndarray)
    assert not isinstance(lazy.coupling_, np.ndarray)
    assert not hasattr(lazy, "cost_")
    np.testing.assert_allclose(np.asarray(lazy.coupling_), dense.coupling_, rtol=0, atol=1e-8)
    np.testing.assert_allclose(lazy.coupling_ @ Xt / (lazy.coupling_ @ np.ones(30))[:, None], lazy.transform(Xs))
    np.testing.assert_allclose(lazy.transform(Xs + 0.1), dense.transform(Xs + 0.1), **close)
    np.testing.assert_allclose(lazy.inverse_transform(Xt), dense.inverse_transform(Xt), **close)
    np.testing.assert_allclose(lazy.transform_labels(Xs[:, 0] > 0), dense.transform_labels(Xs[:, 0] > 0), **close)
    np.testing.assert_allclose(lazy.potentials_[1], dense.potentials_[1], **close)


def test_a_plan_that_is_not_stored_is_of_the_kind_that_came(little_memory):
    Xs, Xt = (torch.tensor(points, dtype=torch.float32) for points in clouds())
    plan = SinkhornTransport().fit(Xs, Xt=Xt).coupling_
    assert plan.dtype == torch.float32
    assert (plan @ Xt).dtype == torch.float32


def test_torch_in_gives_torch_out_and_the_same_numbers():
    Xs, Xt = clouds()
    ys = np.arange(40) % 2
    model = SinkhornTransport().fit(Xs, Xt=Xt)
    tensors = SinkhornTransport().fit(torch.tensor(Xs), Xt=torch.tensor(Xt))
    for name in ("coupling_", "cost_", "mu_s", "mu_t", "xs_", "xt_"):
        assert isinstance(getattr(tensors, name), torch.Tensor)
        np.testing.assert_array_equal(getattr(tensors, name).numpy(), getattr(model, name))
    assert isinstance(tensors.potentials_[0], torch.Tensor)
    # The kind is that of the argument.
    for fitted in (model, tensors):
        assert isinstance(fitted.transform(Xs), np.ndarray)
        moved = fitted.transform(torch.tensor(Xs))
        np.testing.assert_array_equal(moved.numpy(), model.transform(Xs))
        np.testing.assert_array_equal(fitted.inverse_transform(torch.tensor(Xt)).numpy(), model.inverse_transform(Xt))
        np.testing.assert_array_equal(fitted.transform_labels(torch.tensor(ys)).numpy(), model.transform_labels(ys))
    together = SinkhornTransport().fit(torch.tensor(Xs), torch.tensor(ys), torch.tensor(Xt), torch.arange(30) % 2)
    assert float(together.coupling_[torch.tensor(ys) == 0][:, 1::2].sum()) == 0


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_single_precision_comes_back_single_and_is_computed_in_double(kind):
    Xs, Xt = (points.astype(np.float32) for points in clouds())
    model = SinkhornTransport().fit(kind(Xs), Xt=kind(Xt))
    double = SinkhornTransport().fit(Xs.astype(float), Xt=Xt.astype(float))
    for got, wanted in ((model.coupling_, double.coupling_), (model.transform(kind(Xs)), double.transform(Xs))):
        assert str(got.dtype).endswith("float32")
        # Single precision has 7 digits down to 1e-38.
        np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-6, atol=1e-37)
    assert str(model.potentials_[0].dtype).endswith("float32")
    assert str(model.transform_labels(np.arange(40) % 2).dtype) == "float32"
    assert SinkhornTransport().fit(kind(Xs), Xt=kind(Xt.astype(float))).coupling_.dtype == kind(Xt.astype(float)).dtype


def test_frames_give_frames_where_asked_and_names_are_checked():
    pd = pytest.importorskip("pandas")
    Xs, Xt = clouds()
    frame, target = (pd.DataFrame(points, columns=["u", "v"]) for points in (Xs, Xt))
    frame.index = frame.index + 100
    model = SinkhornTransport().fit(frame, Xt=target)
    assert isinstance(model.transform(frame), np.ndarray)
    assert list(model.get_feature_names_out()) == list(model.feature_names_in_) == ["u", "v"]
    for moved in (
        model.set_output(transform="pandas").transform(Xs=frame),
        clone(model).set_output(transform="pandas").fit_transform(frame, Xt=target),
    ):
        assert list(moved.columns) == ["u", "v"]
        assert list(moved.index) == list(frame.index)
        np.testing.assert_array_equal(moved.to_numpy(), SinkhornTransport().fit(Xs, Xt=Xt).transform(Xs))
    for call in (
        lambda: model.transform(frame.rename(columns={"u": "w"})),
        lambda: model.inverse_transform(target[["v", "u"]]),
        lambda: clone(model).fit(frame, Xt=target.rename(columns={"u": "w"})),
    ):
        with pytest.raises(ValueError, match="feature names"):
            call()


@pytest.mark.parametrize("case", ["plain", "labels", "log", "lazy", "frame"])
def test_a_fitted_transport_survives_pickle_and_file(case, tmp_path, request):
    Xs, Xt = clouds()
    arguments = {"Xt": Xt}
    if case == "labels":
        words = np.array(["a", "b", -1], dtype=object)
        arguments |= {"ys": words[np.arange(40) % 2], "yt": words[np.arange(30) % 3]}
    if case == "lazy":
        request.getfixturevalue("little_memory")
    if case == "frame":
        pd = pytest.importorskip("pandas")
        Xs, arguments = pd.DataFrame(Xs, columns=["u", "v"]), {"Xt": pd.DataFrame(Xt, columns=["u", "v"])}
    model = SinkhornTransport(norm="log" if case == "log" else "max", reg_m=(1.0, 2.0))
    model = (SinkhornTransport(norm="max") if case == "lazy" else model).fit(Xs, **arguments)
    model.save(tmp_path / "model.safetensors")
    # The file has no matrix in it.
    assert (tmp_path / "model.safetensors").stat().st_size < 5000
    for again in (pickle.loads(pickle.dumps(model)), SinkhornTransport.load(tmp_path / "model.safetensors")):
        np.testing.assert_array_equal(again.transform(Xs), model.transform(Xs))
        np.testing.assert_array_equal(np.asarray(again.coupling_), np.asarray(model.coupling_))
        np.testing.assert_array_equal(again.potentials_[0], model.potentials_[0])
        np.testing.assert_array_equal(again.mu_t, model.mu_t)
        assert (again.n_iter_, again.converged_, again.n_features_in_) == (model.n_iter_, model.converged_, 2)
        assert again.get_params().keys() == model.get_params().keys()
        if case == "labels":
            np.testing.assert_array_equal(again.transform(Xs[:2], ["a", "b"]), model.transform(Xs[:2], ["a", "b"]))
        if case == "frame":
            assert list(again.feature_names_in_) == ["u", "v"]


@pytest.mark.bad_input
def test_a_metric_of_the_users_own_works_but_cannot_be_saved(tmp_path):
    Xs, Xt = clouds()
    model = SinkhornTransport(metric=lambda x, y: torch.cdist(x, y) ** 2).fit(Xs, Xt=Xt)
    np.testing.assert_allclose(model.transform(Xs), SinkhornTransport().fit(Xs, Xt=Xt).transform(Xs), atol=1e-6)
    with pytest.raises(TypeError, match="metric cannot be saved"):
        model.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_fitting_twice_equals_fitting_once_and_a_clone_is_unfitted():
    Xs, Xt = clouds()
    model = SinkhornTransport(reg_e=0.3).fit(Xs, Xt=Xt)
    before = model.transform(Xs)
    np.testing.assert_array_equal(model.fit(Xs, Xt=Xt).transform(Xs), before)
    copy = clone(model)
    assert copy.get_params() == model.get_params()
    assert not hasattr(copy, "coupling_")
    np.testing.assert_array_equal(copy.fit(Xs, Xt=Xt).transform(Xs), before)


@pytest.mark.bad_input
def test_a_failing_fit_leaves_the_old_one():
    Xs, Xt = clouds()
    model = SinkhornTransport().fit(Xs, Xt=Xt)
    before = model.transform(Xs)
    for bad in ({"Xt": Xt[:, :1]}, {"Xt": Xt * np.nan}, {"Xt": Xt, "sample_weight": -np.ones(40)}):
        with pytest.raises(ValueError, match=r"Xt|sample_weight"):
            model.fit(Xs, **bad)
        np.testing.assert_array_equal(model.transform(Xs), before)
    with pytest.raises(ValueError, match="Xt must have as many columns as Xs, 3; got 2"):
        model.fit(np.zeros((4, 3)), Xt=Xt)
    assert model.n_features_in_ == 2


@pytest.mark.bad_input
def test_an_unfitted_transport_says_so(tmp_path):
    Xs, _ = clouds()
    model = SinkhornTransport()
    for call in (
        lambda: model.transform(Xs),
        lambda: model.inverse_transform(Xs),
        lambda: model.transform_labels(Xs[:, 0]),
        lambda: model.inverse_transform_labels(Xs[:, 0]),
        lambda: model.coupling_,
        lambda: model.mu_s,
        lambda: model.save(tmp_path / "x"),
    ):
        with pytest.raises(NotFittedError):
            call()


def test_a_search_that_stops_early_warns_once():
    Xs, Xt = clouds()
    with pytest.warns(ConvergenceWarning) as caught:
        model = SinkhornTransport(reg_e=1e-3, max_iter=2).fit(Xs, Xt=Xt)
    assert len(caught) == 1
    assert model.converged_ is False
    assert model.n_iter_ == 2
    assert np.isfinite(model.transform(Xs)).all()


def test_without_targets_points_are_smoothed_among_themselves_with_a_warning():
    Xs, _ = clouds()
    with pytest.warns(DataWarning, match="Xt is None: the sources are transported onto themselves"):
        model = SinkhornTransport().fit(Xs)
    np.testing.assert_array_equal(model.transform(Xs), SinkhornTransport().fit(Xs, Xt=Xs).transform(Xs))
    np.testing.assert_allclose(model.coupling_, model.coupling_.T, rtol=0, atol=1e-9)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg_e": 0.0}, "reg_e must be positive and finite; got 0.0"),
        ({"norm": "min"}, "norm must be one of None, 'max', 'median', 'mean', 'log', 'loglog'; got 'min'"),
        ({"out_of_sample_map": "nearest"}, "out_of_sample_map must be one of 'continuous', 'ferradans'; got 'nearest'"),
        ({"method": "emd"}, "method must be one of"),
        ({"method": "sns", "reg_m": 1.0}, "method must be 'auto' or 'newton' for an unbalanced problem; got 'sns'"),
        ({"tol": -1.0}, "tol must be positive"),
        ({"max_iter": 0}, "max_iter must be at least 1; got 0"),
        ({"reg_m": -1.0}, "reg_m must be positive"),
        ({"metric": "nonsense"}, "metric must be one of"),
        ({"metric": "seuclidean"}, "metric must not depend on the data"),
    ],
)
def test_parameters_out_of_range_are_refused_by_fit(options, message):
    Xs, Xt = clouds()
    with pytest.raises(ValueError, match=message):
        SinkhornTransport(**options).fit(Xs, Xt=Xt)


@pytest.mark.bad_input
def test_data_that_do_not_fit_are_refused_by_name():
    from scipy.sparse import csr_array

    Xs, Xt = clouds()
    model = SinkhornTransport()
    for error, message, call in (
        (TypeError, "Xs must be an array of points; got None", lambda: model.fit(Xt=Xt)),
        (TypeError, "must be both NumPy", lambda: model.fit(torch.tensor(Xs), Xt=Xt)),
        (TypeError, "ys and y are two names", lambda: model.fit(Xs, [0] * 40, Xt, y=[0] * 40)),
        (TypeError, "Sparse data was passed", lambda: model.fit(csr_array(Xs), Xt=Xt)),
        (TypeError, "Sparse data was passed for Xt", lambda: model.fit(Xs, Xt=csr_array(Xt))),
        (ValueError, "Input Xt contains NaN", lambda: model.fit(Xs, Xt=Xt * np.nan)),
        (ValueError, "Xt must have as many columns as Xs, 2; got 1", lambda: model.fit(Xs, Xt=Xt[:, :1])),
        (ValueError, "Xt must be given where yt", lambda: model.fit(Xs, yt=[0] * 30)),
        (
            ValueError,
            "sample_weight must be finite and non-negative",
            lambda: model.fit(Xs, Xt=Xt, sample_weight=-Xs[:, 0]),
        ),
        (ValueError, "sample_weight_t must have shape", lambda: model.fit(Xs, Xt=Xt, sample_weight_t=[1.0])),
        (ValueError, "sample_weight must not be zero everywhere", lambda: model.fit(Xs, Xt=Xt, sample_weight=[0] * 40)),
        (ValueError, "X has 3 features", lambda: model.fit(Xs, Xt=Xt).transform(np.zeros((2, 3)))),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_classifier_trained_on_moved_sources_knows_the_other_domain():
    Xs, ys, Xt, yt = two_classes()
    alone = LogisticRegression().fit(Xs, ys).score(Xt, yt)
    pipeline = make_pipeline(SinkhornTransport(0.05, norm="max"), LogisticRegression())
    pipeline.fit(Xs, ys, sinkhorntransport__Xt=Xt)
    # The classes are 4 apart and 0.3 wide across; untouched, the border lies elsewhere.
    assert alone < 0.8
    assert pipeline[-1].score(Xt, yt) == 1.0
    assert pipeline.score(Xs, ys) == 1.0


def test_routing_sends_targets_through_the_steps_before():
    Xs, ys, Xt, _ = two_classes()
    with sklearn.config_context(enable_metadata_routing=True):
        transport = SinkhornTransport().set_fit_request(Xt=True)
        steps = [("scale", StandardScaler()), ("move", transport), ("classify", LogisticRegression())]
        pipeline = Pipeline(steps, transform_input=["Xt"]).fit(Xs, ys, Xt=Xt)
    scaler = StandardScaler().fit(Xs)
    np.testing.assert_array_equal(pipeline["move"].xt_, scaler.transform(Xt))
    np.testing.assert_array_equal(pipeline["move"].xs_, scaler.transform(Xs))


def test_a_grid_search_chooses_its_parameters():
    Xs, ys, Xt, _ = two_classes()
    # With reg_e of 1e3 every point goes to the mean of the targets, and no classifier can tell them apart.
    pipeline = make_pipeline(SinkhornTransport(norm="max"), LogisticRegression())
    grid = {"sinkhorntransport__reg_e": [1e3, 0.05], "sinkhorntransport__out_of_sample_map": ["continuous"]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(Xs, ys, sinkhorntransport__Xt=Xt[:50])
    assert search.best_params_["sinkhorntransport__reg_e"] == 0.05
    assert len(search.best_estimator_[0].xt_) == 50
