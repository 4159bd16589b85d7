"""The estimators of functional decompositions: what goes in, what comes out, what is refused."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stochproc.exceptions import DataWarning
from stochproc.kernels import Matern, RationalQuadratic
from stochproc.tensor import FunctionalCP, FunctionalTucker, LatentDisplay, Mode, from_dense

KINDS = [FunctionalCP, FunctionalTucker]
# A tolerance that any change of the bound meets: four sweeps.
QUICK = {"rank": 2, "early_stopping": False, "n_init": 1, "tol": 1e6}
MODES = ["continuous", Mode("periodic", period=2.0), "discrete"]


def data(n=120, seed=0):
    """A continuous, a periodic and a discrete mode of four categories."""
    rng = np.random.default_rng(seed)
    X = np.stack([rng.uniform(0, 1, n), rng.uniform(0, 2, n), rng.integers(0, 4, n)], 1)
    y = np.sin(5 * X[:, 0]) * (1.5 + np.cos(math.pi * X[:, 1])) * (1 + X[:, 2]) + 0.1 * rng.normal(size=n) + 3
    return X, y


@pytest.fixture(scope="module", params=KINDS, ids=lambda k: k.__name__)
def fitted(request):
    X, y = data()
    torch.set_default_dtype(torch.float64)
    return request.param(modes=MODES, **QUICK).fit(X, y), X, y


def test_spread_of_rows_is_the_diagonal_of_their_covariance(fitted):
    model, X, _ = fitted
    for latent in (False, True):
        mean, std = model.predict(X[:9], return_std=True, latent=latent)
        same, cov = model.predict(X[:9], return_cov=True, latent=latent)
        np.testing.assert_allclose(same, mean, rtol=1e-12)
        np.testing.assert_allclose(np.sqrt(np.diag(cov)), std, rtol=1e-8)
        assert np.linalg.eigvalsh(cov).min() > -1e-8 * cov.max()
    noise = model.predict(X[:9], return_cov=True)[1] - cov
    np.testing.assert_allclose(noise, model.noise_variance_ * np.eye(9), rtol=0, atol=1e-12)


def test_draws_have_the_predicted_moments(fitted):
    model, X, _ = fitted
    X = np.concatenate([X[:4], [[3.0, 0.5, 7.0]]])
    mean, cov = model.predict(X, return_cov=True)
    draws = model.sample_y(X, 20_000, random_state=0)
    # Five standard errors; products of normals have kurtosis, which a doubled variance of the variance allows for.
    spread = np.sqrt(np.diag(cov))
    assert np.max(np.abs(draws.mean(1) - mean) / spread) < 5 / math.sqrt(20_000)
    assert np.max(np.abs(np.cov(draws) - cov) / np.outer(spread, spread)) < 5 * math.sqrt(12 / 20_000)
    np.testing.assert_array_equal(model.sample_y(X, 3, random_state=1), model.sample_y(X, 3, random_state=1))


def test_far_away_everything_returns_to_the_prior():
    X, y = data()
    model = FunctionalCP(modes=["continuous"] * 3, lengthscale=0.1, learn_hyperparameters=False, **QUICK).fit(X, y)
    mean, std = model.predict([[1e4, 1e4, 1e4]], return_std=True, latent=True)
    assert mean[0] == pytest.approx(y.mean(), abs=1e-9)
    # Two components of variance 0.3^3 each, in units of y.
    assert std[0] ** 2 == pytest.approx(2 * 0.3**3 * y.var(), rel=1e-9)
    tucker = FunctionalTucker(lengthscale=0.1, learn_hyperparameters=False, **QUICK).fit(X, y)
    mean, std = tucker.predict([[1e4, 1e4, 1e4]], return_std=True, latent=True)
    assert mean[0] == pytest.approx(y.mean(), abs=1e-9)
    # At the prior of the functions: 0.3^3 times the trace of E[W W'].
    link = tucker._model.link
    second = float(link.mean.square().sum() + link.cov.diagonal().sum())
    assert std[0] ** 2 == pytest.approx(0.3**3 * second * y.var(), rel=1e-9)


def test_unknown_categories_have_the_law_of_the_prior_or_are_refused(fitted):
    model, X, y = fitted
    mean, std = model.predict([[0.5, 0.5, 9.0], [0.5, 0.5, 1.0]], return_std=True)
    assert mean[0] == pytest.approx(y.mean())
    assert std[0] > std[1]
    strict = clone(model).set_params(handle_unknown="error").fit(X, y)
    with pytest.raises(ValueError, match=r"known categories in column 2; row 0"):
        strict.predict([[0.5, 0.5, 9.0]])


def test_a_periodic_mode_repeats(fitted):
    model, X, _ = fitted
    moved = X + np.array([0.0, 2.0, 0.0])
    np.testing.assert_allclose(model.predict(moved), model.predict(X), rtol=0, atol=1e-9)
    np.testing.assert_allclose(model.predict(moved - np.array([0.0, 10.0, 0.0])), model.predict(X), rtol=0, atol=1e-9)


def test_density_quantiles_and_intervals_are_those_of_the_normal_law(fitted):
    model, X, y = fitted
    mean, std = model.predict(X[:5], return_std=True)
    want = -0.5 * ((y[:5] - mean) / std) ** 2 - np.log(std * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(model.log_predictive_density(X[:5], y[:5]), want, rtol=1e-9)
    low, high = model.predict_interval(X[:5], 0.95).T
    np.testing.assert_allclose(high - low, 2 * 1.959963984540054 * std, rtol=1e-9)
    np.testing.assert_allclose(model.predict_quantiles(X[:5], 0.5)[:, 0], mean, rtol=1e-12)
    # Of twice the precision: noise of half the variance.
    latent = model.predict(X[:5], return_std=True, latent=True)[1]
    weighted = np.sqrt(latent**2 + model.noise_variance_ / 2)
    want = -0.5 * ((y[:5] - mean) / weighted) ** 2 - np.log(weighted * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(model.log_predictive_density(X[:5], y[:5], np.full(5, 2.0)), want, rtol=1e-9)


def test_grids_are_rows_in_another_shape(fitted):
    model, _, _ = fitted
    grid = [[0.9, 0.1], [0.3, 5.3, 0.3], [2.0, 11.0]]
    mean, std = model.to_dense(grid, return_std=True)
    rows = np.array([[a, b, c] for a in grid[0] for b in grid[1] for c in grid[2]])
    want = model.predict(rows, return_std=True)
    np.testing.assert_allclose(mean.ravel(), want[0], rtol=1e-9)
    np.testing.assert_allclose(std.ravel(), want[1], rtol=1e-7)
    np.testing.assert_allclose(model.to_dense(grid), mean, rtol=1e-12)
    with pytest.raises(ValueError, match="one entry a mode, 3; got 2"):
        model.to_dense(grid[:2])


def test_entries_of_a_dense_tensor_come_back():
    tensor = np.arange(24.0).reshape(2, 3, 4)
    tensor[0, 1, 2] = np.nan
    mask = np.ones((2, 3, 4), dtype=bool)
    mask[1, 0, 0] = False
    X, y = from_dense(tensor, mask)
    assert X.shape == (22, 3)
    np.testing.assert_array_equal(tensor[tuple(X.astype(int).T)], y)
    X, _ = from_dense(tensor, coords=[["b", "a"], [0.5, 1.5, 2.5], range(4)])
    assert X[0].tolist() == ["b", 0.5, 0]
    torch_X, torch_y = from_dense(torch.tensor(tensor))
    assert isinstance(torch_X, torch.Tensor)
    assert len(torch_y) == 23
    with pytest.raises(ValueError, match="shape of tensor"):
        from_dense(tensor, mask[:1])
    with pytest.raises(ValueError, match="one vector an axis"):
        from_dense(tensor, coords=[[0, 1]])
    with pytest.raises(ValueError, match="at least one observed"):
        from_dense(np.full((2, 2), np.nan))


def test_functions_of_a_mode_make_the_entries():
    X, y = data()
    model = FunctionalCP(modes=MODES, **QUICK).fit(X, y)
    product = model.latent(0, X[:, 0]) * model.latent(1, X[:, 1]) * model.latent(2, X[:, 2])
    np.testing.assert_allclose(product.sum(1) * y.std() + y.mean(), model.predict(X), rtol=1e-9)
    mean, std = model.latent(2, return_std=True)
    assert mean.shape == std.shape == (4, 2)
    assert (std > 0).all()
    with pytest.raises(ValueError, match="k must"):
        model.latent(3)
    with pytest.raises(ValueError, match=r"finite; got NaN in row 1 of column 0"):
        model.latent(0, [0.1, np.nan])
    tucker = FunctionalTucker(modes=MODES, **QUICK).fit(X, y)
    functions = [tucker.latent(k, X[:, k]) for k in range(3)]
    entries = np.einsum("abc,na,nb,nc->n", tucker.core_, *functions)
    np.testing.assert_allclose(entries * y.std() + y.mean(), tucker.predict(X), rtol=1e-9)


def test_files_keep_everything(fitted, tmp_path):
    model, X, y = fitted
    path = tmp_path / "model.safetensors"
    model.save(path)
    back = type(model).load(path)
    probe = np.concatenate([X, [[0.5, 0.5, 99.0]]])
    for got, want in zip(back.predict(probe, return_std=True), model.predict(probe, return_std=True), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(back.elbo_, model.elbo_)
    assert back.get_params().keys() == model.get_params().keys()
    assert back.converged_ == model.converged_
    assert back.rank_ == model.rank_
    new = X + np.array([0.01, 0.0, 1.0])
    want = pickle.loads(pickle.dumps(model)).partial_fit(new, y).predict(X)
    np.testing.assert_allclose(back.partial_fit(new, y).predict(X), want, rtol=0, atol=1e-12)


def test_a_loaded_model_learns_on_where_it_was(tmp_path):
    X, y = data()
    model = FunctionalCP(modes=MODES, **QUICK, warm_start=True).fit(X, y)
    model.save(tmp_path / "model.safetensors")
    back = FunctionalCP.load(tmp_path / "model.safetensors")
    np.testing.assert_allclose(back.fit(X, y).predict(X), model.fit(X, y).predict(X), rtol=0, atol=1e-12)


def test_kernels_of_the_user_are_used_and_saved(tmp_path):
    X, y = data()
    kernel = Matern(0.5, nu=0.5) + Matern(2.0, nu=2.5)
    model = FunctionalCP(modes=[Mode(kernel=kernel), "continuous", "discrete"], **QUICK).fit(X, y)
    assert model.score(X, y) > 0.8
    assert model.lengthscale_[0] is None
    model.save(tmp_path / "model.safetensors")
    back = FunctionalCP.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(back.predict(X), model.predict(X))
    kernel.kernels[0].lengthscale = 77.0
    np.testing.assert_array_equal(back.predict(X), model.predict(X))


def test_names_of_columns_and_text_categories():
    X, y = data()
    frame = pd.DataFrame({"depth": X[:, 0], "phase": X[:, 1], "site": np.array(list("wxyz"))[X[:, 2].astype(int)]})
    model = FunctionalCP(modes=MODES, **QUICK).fit(frame, y)
    numbers = FunctionalCP(modes=MODES, **QUICK).fit(X, y)
    np.testing.assert_allclose(model.predict(frame), numbers.predict(X), rtol=0, atol=1e-12)
    assert model.index_[2].tolist() == list("wxyz")
    with pytest.raises(ValueError, match=r"numbers in column 0 \('depth'\)"):
        model.predict(frame.assign(depth="deep"))
    with pytest.raises(ValueError, match=r"category in every row; got NaN in row 0 of column 2"):
        model.predict(frame.assign(site=None))
    assert model.plot_latent(2).ax_.get_xlabel() == "site"


@pytest.mark.slow
def test_streams_of_rows_get_close_to_one_fit():
    X, y = data(600)
    options = {"rank": 1, "modes": ["continuous", "continuous", "discrete"], "kernel": "matern32", "center": False}
    options |= {"tol": 1e-3}
    whole = FunctionalCP(**options).fit(X, y)
    stream = FunctionalCP(**options)
    for chunk in np.array_split(np.arange(600), 4):
        stream.partial_fit(X[chunk], y[chunk])
    test_X, test_y = data(300, seed=1)
    errors = [np.sqrt(np.mean((m.predict(test_X) - test_y) ** 2)) for m in (whole, stream)]
    assert errors[1] < 1.2 * errors[0]
    assert len(stream.index_[0]) == 600


def test_a_stream_may_bring_new_categories_in_any_order():
    X, y = data(240)
    old = X[:, 2] != 1
    model = FunctionalCP(modes=MODES, **QUICK).partial_fit(X[old], y[old])
    assert model.index_[2].tolist() == [0, 2, 3]
    before = model.latent(2)
    model.partial_fit(X[~old], y[~old])
    assert model.index_[2].tolist() == [0, 1, 2, 3]
    # What the others' rows said is still there.
    np.testing.assert_allclose(model.latent(2)[[0, 2, 3]], before, rtol=0, atol=0.2 * np.abs(before).max())
    assert np.corrcoef(model.predict(X[~old]), y[~old])[0, 1] > 0.9


def test_forgetting_multiplies_what_was_said():
    X, y = data()
    model = FunctionalCP(modes=MODES, **QUICK).fit(X, y)
    before = model._model.factors[0].Lam.clone()
    points = model._model.factors[0].points.clone()
    other = X[:1] + np.array([5.0, 0.0, 0.0])
    model.partial_fit(other, y[:1], forget=0.25)
    factor = model._model.factors[0]
    old = torch.searchsorted(factor.points, points)
    torch.testing.assert_close(factor.Lam[old], 0.25 * before)
    assert model._model.n == pytest.approx(0.25 * 120 + 1)
    for bad in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="forget"):
            model.partial_fit(X, y, forget=bad)


def test_a_warm_start_goes_on():
    X, y = data()
    model = FunctionalCP(modes=MODES, **QUICK, warm_start=True).fit(X, y)
    first = model.elbo_[-1]
    model.fit(X, y)
    assert model.elbo_[0] >= first - 1e-8 * abs(first)
    model.set_params(rank=3)
    with pytest.raises(ValueError, match="rank must be that of the present fit"):
        model.fit(X, y)


def test_rows_without_an_entry_or_a_weight_are_left_out():
    X, y = data()
    holes = y.copy()
    holes[[3, 50]] = np.nan
    with pytest.warns(DataWarning, match="2 of 120 rows"):
        model = FunctionalCP(modes=MODES, **QUICK).fit(X, holes)
    keep = np.ones(120, dtype=bool)
    keep[[3, 50]] = False
    want = FunctionalCP(modes=MODES, **QUICK).fit(X[keep], y[keep])
    np.testing.assert_array_equal(model.predict(X), want.predict(X))
    weighted = FunctionalCP(modes=MODES, **QUICK).fit(X, y, sample_weight=keep.astype(float))
    np.testing.assert_array_equal(weighted.predict(X), want.predict(X))
    with pytest.raises(ValueError, match="NaN in every row"):
        FunctionalCP().fit(X, np.full(120, np.nan))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 5.0, -1e-200, 1e150])
def test_a_constant_is_predicted_with_a_warning(kind, value):
    X, _ = data(30)
    with pytest.warns(DataWarning, match="does not vary"):
        model = kind(**QUICK).fit(X, np.full(30, value))
    np.testing.assert_allclose(model.predict(X), value, rtol=1e-6, atol=1e-200)


@pytest.mark.parametrize("unit", [1e-100, 1e100])
def test_units_of_y_change_nothing_else(unit):
    X, y = data()
    want = FunctionalCP(modes=MODES, **QUICK).fit(X, y)
    got = FunctionalCP(modes=MODES, **QUICK).fit(X, unit * y)
    np.testing.assert_allclose(got.predict(X) / unit, want.predict(X), rtol=1e-9)
    np.testing.assert_allclose(got.elbo_ + 120 * math.log(unit), want.elbo_, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mode_of_one_point_is_a_constant(kind):
    X, y = data()
    model = kind(
        rank=1, modes=["continuous", "continuous", "continuous"], **{k: v for k, v in QUICK.items() if k != "rank"}
    )
    X[:, 1] = 7.0
    model.fit(X, y)
    assert model.index_[1].tolist() == [7.0]
    assert np.isfinite(model.predict(X)).all()


def test_one_row_is_enough():
    model = FunctionalCP(rank=1)
    model.fit([[0.5, 1.0]], [3.0])
    assert model.predict([[0.5, 1.0]])[0] == pytest.approx(3.0, abs=1e-6)


def test_coarse_coordinates_warn():
    X, y = data()
    X[:, 0] = 1e9 + X[:, 0] * 1e-4
    with pytest.warns(DataWarning, match="column 0"):
        FunctionalCP(**QUICK).fit(X, y)


def test_torch_in_gives_torch_out(fitted):
    model, X, y = fitted
    tensor = torch.tensor(X[:5])
    mean, std = model.predict(tensor, return_std=True)
    assert isinstance(mean, torch.Tensor)
    assert isinstance(std, torch.Tensor)
    np.testing.assert_array_equal(mean.numpy(), model.predict(X[:5]))
    assert model.predict(tensor.float()).dtype == torch.float32
    assert isinstance(model.sample_y(tensor, 2), torch.Tensor)
    again = clone(model).fit(torch.tensor(X), torch.tensor(y))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


@pytest.mark.slow
def test_searches_and_pipelines_work():
    X, y = data()
    search = GridSearchCV(FunctionalCP(**QUICK), {"rank": [1, 2], "kernel": ["matern12", "matern32"]}, cv=2).fit(X, y)
    assert search.best_score_ > 0
    pipe = make_pipeline(StandardScaler(), FunctionalTucker(**QUICK)).fit(X, y)
    assert pipe.score(X, y) > 0.5


@pytest.mark.slow
def test_wide_cores_have_independent_entries_and_wider_ones_are_refused():
    X, y = data()
    X = X[:, [0, 1]]
    model = FunctionalTucker(rank=(33, 32), max_iter=1, early_stopping=False, n_init=1)
    with pytest.warns(match="max_iter=1"):
        model.fit(X, y)
    assert model._model.link.diagonal
    assert np.isfinite(model.predict(X, return_std=True)).all()
    with pytest.raises(ValueError, match=r"at most 4096 entries; got 4225 from \(65, 65\).*GiB"):
        FunctionalTucker(rank=65).fit(X, y)


def test_lines_of_progress_go_to_stderr(capsys):
    X, y = data()
    model = FunctionalCP(**QUICK, verbose=1).fit(X, y)
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == model.n_iter_ == 4
    assert all("bound" in line and "noise variance" in line for line in lines)


def test_pictures_of_each_kind_of_mode(fitted):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    model, _, _ = fitted
    for k in range(3):
        _, ax = plt.subplots()
        display = model.plot_latent(k, ax=ax)
        assert isinstance(display, LatentDisplay)
        assert display.ax_ is ax
        mean, std = model.latent(k, display.x, return_std=True)
        np.testing.assert_allclose(display.mean, mean)
        np.testing.assert_allclose(display.std, std)
    one = LatentDisplay.from_estimator(model, 0, n_points=50, coverage=0.5, components=[1])
    assert one.mean.shape == (50, 1)
    with pytest.raises(ValueError, match="coverage"):
        LatentDisplay.from_estimator(model, 0, coverage=1.0)
    plt.close("all")


BAD = {
    "rank": [0, -1],
    "variance": [0.0, -1.0, math.nan],
    "noise": [0.0, -0.1],
    "kernel": ["matern", "periodic"],
    "lengthscale": [0.0, -1.0, [1.0, 1.0]],
    "damping": [1.0, -0.1],
    "validation_fraction": [0.0, 1.0],
    "max_iter": [0],
    "tol": [-1.0],
    "n_init": [0],
    "init": ["polynomial"],
    "method": ["fast"],
    "chunk_size": [0],
    "batch_size": [0],
    "handle_unknown": ["ignore"],
    "center": ["yes"],
    "device": ["abacus"],
}


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_parameter_is_named(kind, name, value):
    X, y = data(30)
    with pytest.raises(ValueError, match=name):
        kind(**{name: value}).fit(X, y)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", "three"),
        ("rank", 2.5),
        ("kernel", 3),
        ("damping", "half"),
        ("modes", "continuous"),
        ("modes", [1, 2, 3]),
        ("init", 5),
        ("lengthscale", "long"),
    ],
)
def test_a_parameter_of_the_wrong_type_is_named(name, value):
    X, y = data(30)
    with pytest.raises(TypeError, match=name):
        FunctionalCP(**{name: value}).fit(X, y)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "modes must have one entry a column of X, 3; got 2", {"modes": ["continuous"] * 2}),
        (ValueError, r"modes\[0\] must say the period", {"modes": ["periodic", "discrete", "discrete"]}),
        (ValueError, r"modes\[1\]", {"modes": ["discrete", "round", "discrete"]}),
        (ValueError, "state space", {"kernel": RationalQuadratic()}),
        (ValueError, "batch_shape", {"kernel": Matern(torch.ones(2, 1), batch_shape=(2,))}),
        (ValueError, r"init must hold one array a mode, 3; got 1", {"init": [np.zeros((30, 3))]}),
        (ValueError, r"init\[0\] must have shape \(30, 3\)", {"init": [np.zeros((2, 3))] * 3}),
        (ValueError, "core_variance", {"core_variance": -1.0}),
        (ValueError, "one entry a column of X, 3; got 2", {"rank": (2, 2)}),
    ],
)
def test_what_does_not_fit_the_data_is_refused(error, match, options):
    X, y = data(30)
    with pytest.raises(error, match=match):
        FunctionalTucker(**options).fit(X, y)


@pytest.mark.bad_input
def test_bad_data_are_refused_by_row_and_column():
    X, y = data(30)
    for value, word in ((np.nan, "NaN"), (np.inf, "infinity")):
        bad = X.copy()
        bad[4, 1] = value
        with pytest.raises(ValueError, match=f"finite; got {word} in row 4 of column 1"):
            FunctionalCP().fit(bad, y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        FunctionalCP().fit(X, y[:-1])
    with pytest.raises(ValueError, match="0 sample"):
        FunctionalCP().fit(X[:0], y[:0])
    with pytest.raises(ValueError, match="infinity"):
        FunctionalCP().fit(X, np.where(y > 0, np.inf, y))
    with pytest.raises(ValueError, match="sample_weight must be non-negative; got -1"):
        FunctionalCP().fit(X, y, sample_weight=np.full(30, -1.0))
    with pytest.raises(ValueError, match="sample_weight must have one entry a row of X, 30"):
        FunctionalCP().fit(X, y, sample_weight=np.ones(29))
    with pytest.raises(ValueError, match="sample_weight must be positive in some row"):
        FunctionalCP().fit(X, y, sample_weight=np.zeros(30))
    model = FunctionalCP(**QUICK).fit(X, y)
    with pytest.raises(ValueError, match="3 features"):
        model.predict(X[:, :2])
    with pytest.raises(ValueError, match="must not both be True"):
        model.predict(X, return_std=True, return_cov=True)
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        model.predict_quantiles(X, 1.0)


@pytest.mark.bad_input
def test_nothing_works_before_fit():
    model = FunctionalCP()
    for call in (
        lambda: model.predict([[0.0, 1.0]]),
        lambda: model.latent(0),
        lambda: model.to_dense([[0.0], [1.0]]),
        lambda: model.score([[0.0, 1.0]], [0.0]),
        lambda: model.save("nowhere"),
        lambda: model.sample_y([[0.0, 1.0]]),
    ):
        with pytest.raises(NotFittedError):
            call()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "kind", {"kind": "round"}),
        (ValueError, "period must be given", {"kind": "periodic"}),
        (ValueError, "period must be None", {"period": 2.0}),
        (ValueError, "period must be positive", {"kind": "periodic", "period": -1.0}),
        (ValueError, "kernel must be None for a discrete", {"kind": "discrete", "kernel": "matern12"}),
        (ValueError, "lengthscale must be None for a discrete", {"kind": "discrete", "lengthscale": 1.0}),
        (ValueError, "kernel", {"kernel": "wave"}),
        (ValueError, "periodic kernel", {"kind": "periodic", "period": 1.0, "kernel": "matern12"}),
        (ValueError, "lengthscale", {"lengthscale": 0.0}),
        (TypeError, "kernel", {"kernel": 3}),
    ],
)
def test_a_mode_that_makes_no_sense_is_refused(error, match, options):
    with pytest.raises(error, match=match):
        Mode(**options)


@pytest.mark.cuda
def test_a_gpu_gives_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    X, y = data()
    for kind in KINDS:
        want = kind(modes=MODES, **QUICK).fit(X, y).predict(X, return_std=True)
        got = kind(modes=MODES, **QUICK, device="cuda").fit(X, y).predict(X, return_std=True)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)
