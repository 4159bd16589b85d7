"""Displays hold the data they draw."""

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from stochproc.gp import GPDisplay, ScaleMixtureGPRegressor


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def fitted(d):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20, d))
    y = np.sin(X[:, 0])
    return ScaleMixtureGPRegressor(optimizer=None).fit(X, y), X, y


def test_one_feature_gives_a_curve_in_its_band():
    model, X, y = fitted(1)
    display = GPDisplay.from_estimator(model, X, y, n_grid=50, margin=0.0)
    np.testing.assert_array_equal(display.grid, np.linspace(X.min(), X.max(), 50))
    np.testing.assert_array_equal(display.mean, model.predict(display.grid[:, None]))
    np.testing.assert_array_equal(display.interval, model.predict_interval(display.grid[:, None]))
    assert [t.get_text() for t in display.ax_.get_legend().get_texts()] == ["90 % interval", "mean", "data"]


def test_several_features_give_predicted_against_observed():
    model, X, y = fitted(3)
    display = GPDisplay.from_estimator(model, torch.tensor(X), torch.tensor(y), coverage=0.5)
    np.testing.assert_array_equal(display.mean, model.predict(X))
    np.testing.assert_array_equal(display.interval, model.predict_interval(X, 0.5))
    assert display.ax_.get_xlabel() == "observed y"


def test_a_display_draws_on_given_axes_and_again_elsewhere():
    model, X, y = fitted(1)
    _, ax = plt.subplots()
    display = GPDisplay.from_estimator(model, X, y, ax=ax)
    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    assert display.plot().ax_ is not ax


def test_names_of_a_frame_become_labels():
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"depth": rng.normal(size=20)})
    y = pd.Series(np.sin(frame["depth"]), name="salinity")
    model = ScaleMixtureGPRegressor(optimizer=None).fit(frame, y)
    ax = GPDisplay.from_estimator(model, frame, y).ax_
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("depth", "salinity")


@pytest.mark.bad_input
def test_bad_arguments_are_named():
    model, X, y = fitted(1)
    with pytest.raises(ValueError, match="coverage must lie in"):
        GPDisplay.from_estimator(model, X, y, coverage=1.0)
    with pytest.raises(ValueError, match="one output a picture"):
        GPDisplay.from_estimator(model, X, y[:, None])
