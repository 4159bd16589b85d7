"""What the functional decompositions are measured against, and how one model is measured on held-out rows."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.interpolate import LinearNDInterpolator
from scipy.spatial import cKDTree
from scipy.stats import norm
from sklearn.ensemble import HistGradientBoostingRegressor
from tensor_data import Split

from stochproc.gp import ScaleMixtureGPRegressor
from stochproc.tensor import FunctionalCP, FunctionalTucker, StateSpaceGP

Row = dict[str, Any]


class Prediction(NamedTuple):
    """Of the test rows; log density and 90 % interval where the model has them."""

    mean: np.ndarray
    density: np.ndarray | None = None
    interval: np.ndarray | None = None


#: A column, or what makes one out of all.
Key = int | Callable[[np.ndarray], np.ndarray]
#: Learns from the training rows, and returns what predicts the test rows.
Model = Callable[[Split], Callable[[], Prediction]]


def measured(model: Model, data: Split) -> Row:
    """RMSE, mean log loss, coverage of 90 % intervals, and CPU seconds."""
    start = time.process_time()
    predict = model(data)
    fitted = time.process_time()
    found = predict()
    end = time.process_time()
    row: Row = {"rmse": math.sqrt(np.mean((found.mean - data.y_test) ** 2))}
    row["log loss"] = None if found.density is None else -float(np.mean(found.density))
    row["coverage"] = None
    if found.interval is not None:
        low, high = found.interval.T
        row["coverage"] = float(np.mean((low <= data.y_test) & (data.y_test <= high)))
    return row | {"fit s": fitted - start, "predict s": end - fitted}


def estimator(make: Callable[[Split], Any], column: int | None = None) -> Model:
    """One of our estimators, on all columns or on one."""

    def model(data: Split) -> Callable[[], Prediction]:
        X, X_test = (a if column is None else a[:, column] for a in (data.X, data.X_test))
        fitted = make(data).fit(X, data.y)
        return lambda: Prediction(
            fitted.predict(X_test),
            fitted.log_predictive_density(X_test, data.y_test),
            fitted.predict_interval(X_test),
        )

    return model


def cp(**options: Any) -> Model:
    return estimator(lambda data: FunctionalCP(**{"modes": data.modes} | options))


def tucker(**options: Any) -> Model:
    return estimator(lambda data: FunctionalTucker(**{"modes": data.modes} | options))


def constant(data: Split) -> Callable[[], Prediction]:
    return lambda: Prediction(np.full(len(data.y_test), data.y.mean()))


def interpolated_mean(column: int) -> Model:
    """Mean of the training rows that share a coordinate, interpolated over that coordinate."""

    def model(data: Split) -> Callable[[], Prediction]:
        points, index = np.unique(data.X[:, column], return_inverse=True)
        means = np.bincount(index, data.y) / np.bincount(index)
        return lambda: Prediction(np.interp(data.X_test[:, column], points, means))

    return model


def groups(keys: Sequence[Key], *arrays: np.ndarray) -> list[np.ndarray]:
    """Number the distinct combinations of the keys, in all arrays alike."""
    columns = [np.concatenate([X[:, k] if isinstance(k, int) else k(X) for X in arrays]) for k in keys]
    index = np.unique(np.column_stack(columns), axis=0, return_inverse=True)[1].ravel()
    return np.split(index, np.cumsum([len(X) for X in arrays])[:-1])


def additive(*terms: Sequence[Key]) -> Model:
    """Sum of means over groups, by backfitting; a term is 0 for a group without training rows."""

    def model(data: Split) -> Callable[[], Prediction]:
        centre = data.y.mean()
        fit, predicted = np.zeros((len(terms), len(data.y))), np.zeros((len(terms), len(data.y_test)))
        numbered = [groups(term, data.X, data.X_test) for term in terms]
        for _ in range(1 if len(terms) == 1 else 20):
            for t, (index, index_test) in enumerate(numbered):
                rest = data.y - centre - fit.sum(0) + fit[t]
                size = 1 + max(index.max(), index_test.max())
                means = np.bincount(index, rest, size) / np.maximum(np.bincount(index, minlength=size), 1)
                fit[t], predicted[t] = means[index], means[index_test]
        return lambda: Prediction(centre + predicted.sum(0))

    return model


def within(keys: Sequence[Key], column: int) -> Model:
    """Linear interpolation over one coordinate within each group."""

    def model(data: Split) -> Callable[[], Prediction]:
        index, index_test = groups(keys, data.X, data.X_test)
        mean = np.full(len(data.y_test), data.y.mean())
        for group in np.intersect1d(index, index_test):
            here, there = index == group, index_test == group
            order = np.argsort(data.X[here, column])
            mean[there] = np.interp(data.X_test[there, column], data.X[here, column][order], data.y[here][order])
        return lambda: Prediction(mean)

    return model


def regression_on_others(row: int, item: int) -> Model:
    """Bayesian ridge regression of each item on the other items of the row, what is missing filled in in turn."""

    def model(data: Split) -> Callable[[], Prediction]:
        from sklearn.experimental import enable_iterative_imputer  # noqa: F401
        from sklearn.impute import IterativeImputer

        (i, i_test), (j, j_test) = (groups([k], data.X, data.X_test) for k in (row, item))
        known = np.full((1 + max(i.max(), i_test.max()), 1 + max(j.max(), j_test.max())), np.nan)
        known[i, j] = data.y
        filled = IterativeImputer(max_iter=20, random_state=0).fit_transform(known)
        return lambda: Prediction(filled[i_test, j_test])

    return model


def between_points(linear: bool) -> Model:
    """The nearest of the training points, or linear interpolation between them, in (month, latitude, longitude).

    How many degrees a month counts for is chosen on a fifth of the training rows.
    """

    def at(data: Split, degrees: float) -> np.ndarray:
        unit = np.array([degrees, 1.0, 1.0])
        # Once more on either side of the seams.
        shifts = [(m, 0, lon) for m in (-12, 0, 12) for lon in (-360, 0, 360)]
        copies = np.concatenate([data.X + s for s in shifts])
        values = np.tile(data.y, len(shifts))
        margin = np.array([2.0, 0.0, 30.0])
        low, high = data.X.min(0) - margin, data.X.max(0) + margin
        near = ((copies >= low) & (copies <= high)).all(1)
        points, values, wanted = copies[near] * unit, values[near], data.X_test * unit
        found = values[cKDTree(points).query(wanted)[1]]
        if linear:
            # Outside the convex hull the nearest stays.
            between = LinearNDInterpolator(points, values)(wanted)
            found = np.where(np.isfinite(between), between, found)
        return found

    def model(data: Split) -> Callable[[], Prediction]:
        inner = data.validation()
        error = {d: np.mean((at(inner, d) - inner.y_test) ** 2) for d in (1.0, 2.0, 4.0, 8.0, 16.0)}
        best = min(error, key=lambda d: error[d])
        return lambda: Prediction(at(data, best))

    return model


def boosting(data: Split) -> Callable[[], Prediction]:
    """Gradient boosting of as many trees as a tenth of the training rows asks for."""
    return boosted(data.X, data.X_test, data)


def boosted(X: np.ndarray, X_test: np.ndarray, data: Split) -> Callable[[], Prediction]:
    kinds = [mode == "discrete" for mode in data.modes or [None] * data.X.shape[1]]
    kinds += [False] * (X.shape[1] - len(kinds))
    trees = HistGradientBoostingRegressor(
        max_iter=1000, early_stopping=True, categorical_features=kinds, random_state=0
    ).fit(X, data.y)
    return lambda: Prediction(trees.predict(X_test))


def boosting_with_mean(column: int) -> Model:
    """Gradient boosting that is also told the mean of the other training rows with an equal coordinate."""

    def model(data: Split) -> Callable[[], Prediction]:
        points, index = np.unique(data.X[:, column], return_inverse=True)
        count, total = np.bincount(index), np.bincount(index, data.y)
        # Of its own entry a row may not be told.
        others = np.where(count[index] > 1, (total[index] - data.y) / np.maximum(count[index] - 1, 1), np.nan)
        means = np.interp(data.X_test[:, column], points, total / count)
        return boosted(np.column_stack([data.X, others]), np.column_stack([data.X_test, means]), data)

    return model


def markov(column: int, kernel: str) -> Model:
    """A Gaussian process of one coordinate alone."""
    return estimator(lambda data: StateSpaceGP(kernel), column)


def exact_gp(kernel: str, subset: int = 1500, spread: bool = True) -> Model:
    """Exact regression with a lengthscale a column: learned on some rows, and conditioned on up to 6000."""

    def model(data: Split) -> Callable[[], Prediction]:
        order = np.random.default_rng(0).permutation(len(data.y))
        some, rows = order[:subset], order[:6000]
        shift, unit = data.X.mean(0), data.X.std(0)
        X, X_test = (data.X - shift) / unit, (data.X_test - shift) / unit
        options: Row = {"scale_prior": "delta", "normalize_X": False}
        first = ScaleMixtureGPRegressor(kernel, n_restarts=1, random_state=0, **options).fit(X[some], data.y[some])
        fitted = ScaleMixtureGPRegressor(
            first.kernel_, noise=first.noise_, optimizer=None, solver="cholesky", **options
        ).fit(X[rows], data.y[rows])
        if not spread:
            return lambda: Prediction(fitted.predict(X_test))
        return lambda: Prediction(
            fitted.predict(X_test),
            fitted.log_predictive_density(X_test, data.y_test),
            fitted.predict_interval(X_test),
        )

    return model


def svgp(data: Split) -> Callable[[], Prediction]:
    """Sparse variational GPyTorch, ARD Matern 1/2: 300 inducing points, batches of 512, Adam 0.01, 1500 steps."""
    import gpytorch

    generator = torch.Generator().manual_seed(0)
    shift, unit, centre, scale = data.X.mean(0), data.X.std(0), data.y.mean(), data.y.std()
    X, X_test = (torch.as_tensor((a - shift) / unit) for a in (data.X, data.X_test))
    y = torch.as_tensor((data.y - centre) / scale)
    inducing = X[torch.randperm(len(X), generator=generator)[:300]].clone()

    class Process(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            q = gpytorch.variational.CholeskyVariationalDistribution(len(inducing))
            super().__init__(gpytorch.variational.VariationalStrategy(self, inducing, q))
            self.mean_module = gpytorch.means.ConstantMean()
            base = gpytorch.kernels.MaternKernel(nu=0.5, ard_num_dims=X.shape[1])
            self.covar_module = gpytorch.kernels.ScaleKernel(base)

        def forward(self, x: Any) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    model, likelihood = Process().double(), gpytorch.likelihoods.GaussianLikelihood().double()
    objective = gpytorch.mlls.VariationalELBO(likelihood, model, len(y))
    model.train(), likelihood.train()
    adam = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.01)
    for _ in range(1500):
        some = torch.randint(len(y), (512,), generator=generator)
        adam.zero_grad()
        (-objective(model(X[some]), y[some])).backward()
        adam.step()
    model.eval(), likelihood.eval()

    def predict() -> Prediction:
        with torch.no_grad():
            law = likelihood(model(X_test))
        mean, std = law.mean.numpy() * scale + centre, law.stddev.numpy() * scale
        return Prediction(mean, norm.logpdf(data.y_test, mean, std), np.column_stack(norm.interval(0.9, mean, std)))

    return predict


def dense_grid(rank: int, core: bool = False, shape: tuple[int, ...] = (50, 50, 150)) -> Model:
    """Masked CP or Tucker of tensorly, 100 iterations, on the means of the training rows in the cells of a grid."""

    def model(data: Split) -> Callable[[], Prediction]:
        import tensorly
        from tensorly.decomposition import parafac
        from tensorly.decomposition import tucker as dense_tucker

        def cell(X: np.ndarray) -> tuple[np.ndarray, ...]:
            return tuple(np.minimum((x / 10 * size).astype(int), size - 1) for x, size in zip(X.T, shape, strict=True))

        count, total = np.zeros(shape), np.zeros(shape)
        np.add.at(count, cell(data.X), 1.0)
        np.add.at(total, cell(data.X), data.y)
        mask = (count > 0).astype(float)
        values = total / np.maximum(count, 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if core:
                found = dense_tucker(values, [rank] * 3, mask=mask, n_iter_max=100, random_state=0)
                full = tensorly.tucker_to_tensor(found)
            else:
                found = parafac(values, rank, mask=mask, n_iter_max=100, random_state=0)
                full = tensorly.cp_to_tensor(found)
        return lambda: Prediction(np.asarray(full)[cell(data.X_test)])

    return model
