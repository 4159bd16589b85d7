"""The estimators of functional decompositions: what they refuse, and how they say so."""

import math

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from stochproc.kernels import Matern, RationalQuadratic
from stochproc.tensor import FunctionalCP, FunctionalTucker, Mode
from tests.tensor.test_functional import KINDS, QUICK, data

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


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_entries_whose_squares_leave_float64_are_refused(unit):
    X, y = data(30)
    with pytest.raises(ValueError, match="y must have a spread between 1e-150 and 1e150"):
        FunctionalCP(**QUICK).fit(X, unit * y)


def test_pictures_of_no_mode_are_refused():
    model = FunctionalCP(**QUICK).fit(*data(30))
    with pytest.raises(ValueError, match="k must be between 0 and 2"):
        model.plot_latent(3)
    with pytest.raises(NotFittedError):
        FunctionalCP().plot_latent(0)
