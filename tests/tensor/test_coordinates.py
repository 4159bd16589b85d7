"""Columns of X: categories of any type are the same ones, dates are no numbers."""

import math

import numpy as np
import pandas as pd
import pytest

from stochproc.exceptions import DataWarning
from stochproc.tensor import FunctionalCP
from tests.tensor.test_functional import MODES, QUICK, data


def text_and_numbers(values, n=24):
    table = np.empty((n, 2), dtype=object)
    table[:, 0] = np.linspace(0, 1, n)
    for row in range(n):
        table[row, 1] = values[row % len(values)]
    return table


@pytest.mark.parametrize(
    ("fitted", "asked"),
    [(["1", "2"], [1, 2.0]), ([1, "a", 2.5], [1, 2.5]), ([1, 2], ["1", "2.0"]), ([True, "no"], [1, "no"])],
    ids=str,
)
def test_numbers_and_text_name_the_same_categories(fitted, asked):
    X = text_and_numbers(fitted)
    y = np.arange(24.0) % len(fitted)
    model = FunctionalCP(modes=["continuous", "discrete"], handle_unknown="error", **QUICK).fit(X, y)
    Q = text_and_numbers(asked, len(asked))
    want = text_and_numbers(fitted, len(fitted))[[0, -1]]
    Q[:, 0] = want[:, 0] = 0.5
    np.testing.assert_array_equal(model.predict(Q), model.predict(want))
    model.partial_fit(Q, [0.0, 1.0])
    assert len(model.index_[1]) == len(fitted)


def test_categories_that_cannot_be_told_apart_are_refused():
    y = np.arange(24.0)
    options = {"modes": ["continuous", "discrete"], **QUICK}
    with pytest.raises(ValueError, match=r"below 2\*\*53 in size .* got 9007199254740993 in row 1"):
        FunctionalCP(**options).fit(text_and_numbers([1, 2**53 + 1]), y)
    frame = pd.DataFrame({"x": np.linspace(0, 1, 24), "id": [1, 2**53 + 1] * 12})
    with pytest.raises(ValueError, match=r"got 9007199254740993 in row 1 of column 1 \('id'\)"):
        FunctionalCP(**options).fit(frame, y)
    for missing in (None, pd.NA, math.nan):
        with pytest.raises(ValueError, match="category in every row; got NaN in row 1"):
            FunctionalCP(**options).fit(text_and_numbers(["a", missing]), y)
    model = FunctionalCP(**options).fit(text_and_numbers([1, 2]), y)
    with pytest.raises(ValueError, match=r"numbers in column 1, as in fit.*'a'"):
        model.predict(text_and_numbers(["a", "b"]))


def test_dates_are_refused_as_numbers_and_taken_as_categories():
    y = np.arange(24.0)
    dates = pd.date_range("2020-01-01", periods=24)
    with pytest.raises(TypeError, match="numbers in column 0; got dates"):
        FunctionalCP().fit(np.asarray(dates)[:, None], y)
    frame = pd.DataFrame({"x": np.linspace(0, 1, 24), "day": dates})
    with pytest.raises(TypeError, match=r"numbers in column 1 \('day'\); got dates"):
        FunctionalCP().fit(frame, y)
    model = FunctionalCP(modes=["continuous", "discrete"], **QUICK).fit(frame, y)
    assert len(model.index_[1]) == 24


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


def test_coarse_coordinates_warn():
    X, y = data()
    X[:, 0] = 1e9 + X[:, 0] * 1e-4
    with pytest.warns(DataWarning, match="column 0"):
        FunctionalCP(**QUICK).fit(X, y)
