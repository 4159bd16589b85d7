"""The estimators of functional decompositions: what goes in and what comes out."""

import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stochproc.exceptions import DataWarning
from stochproc.kernels import Matern
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


@pytest.mark.cuda
def test_a_gpu_gives_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    X, y = data()
    for kind in KINDS:
        want = kind(modes=MODES, **QUICK).fit(X, y).predict(X, return_std=True)
        got = kind(modes=MODES, **QUICK, device="cuda").fit(X, y).predict(X, return_std=True)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)


def test_a_warm_start_takes_new_noise_and_refuses_new_modes():
    X, y = data()
    model = FunctionalTucker(modes=MODES, **QUICK, warm_start=True).fit(X, y)
    model.set_params(noise=0.25, core_variance=2.0).fit(X, y)
    assert model.noise_variance_ == pytest.approx(0.25 * y.var())
    assert model._model.link.prior_variance == 2.0
    model.set_params(noise=None, core_variance="learn").fit(X, y)
    assert model.noise_variance_ < 0.2 * y.var()
    assert model._model.link.prior_variance != 2.0
    model.set_params(modes=["continuous", "continuous", "discrete"])
    with pytest.raises(ValueError, match="modes must be those of the present fit"):
        model.fit(X, y)
