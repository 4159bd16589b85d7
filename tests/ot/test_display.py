"""The picture of a transport holds the data it draws."""

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from sklearn.exceptions import NotFittedError

from stochproc.ot import SinkhornTransport, TransportDisplay, _solve_sample


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def fitted(kind=np.asarray):
    rng = np.random.default_rng(0)
    Xs, Xt = rng.normal(size=(12, 3)), rng.normal(size=(9, 3)) + 2
    return SinkhornTransport(reg_e=0.5).fit(kind(Xs), Xt=kind(Xt))


def test_links_are_those_that_carry_enough_and_as_opaque_as_their_mass():
    model = fitted()
    display = TransportDisplay.from_estimator(model, threshold=0.3, features=(2, 0), linewidths=2.0)
    plan = model.coupling_
    wanted = np.argwhere(plan >= 0.3 * np.minimum(model.mu_s[:, None], model.mu_t))
    np.testing.assert_array_equal(display.links, wanted)
    np.testing.assert_array_equal(display.mass, plan[tuple(wanted.T)])
    np.testing.assert_array_equal(display.sources, model.xs_[:, [2, 0]])
    np.testing.assert_array_equal(display.targets, model.xt_[:, [2, 0]])
    (lines,) = (c for c in display.ax_.collections if isinstance(c, LineCollection))
    np.testing.assert_array_equal(lines.get_alpha(), display.mass / display.mass.max())
    assert lines.get_linewidths()[0] == 2.0
    np.testing.assert_array_equal(lines.get_segments()[0][0], display.sources[wanted[0, 0]])
    assert [t.get_text() for t in display.ax_.get_legend().get_texts()] == ["sources", "targets"]


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_a_plan_that_is_not_stored_has_the_same_links(kind, monkeypatch):
    dense = TransportDisplay.from_estimator(fitted())
    monkeypatch.setattr(_solve_sample, "free_bytes", lambda device: 1000)
    model = fitted(kind)
    assert not isinstance(model.coupling_, np.ndarray | torch.Tensor)
    lazy = TransportDisplay.from_estimator(model)
    np.testing.assert_array_equal(lazy.links, dense.links)
    # The lazy plan has an err of up to 1e-6.
    np.testing.assert_allclose(lazy.mass, dense.mass, rtol=0, atol=1e-6)


def test_it_is_drawn_where_asked_with_the_names_of_the_columns():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(np.eye(3), columns=["u", "v", "w"])
    model = SinkhornTransport(reg_e=0.01).fit(frame, Xt=frame)
    figure, ax = plt.subplots()
    display = TransportDisplay.from_estimator(model, ax=ax, features=(1, 2))
    assert display.ax_ is ax
    assert display.figure_ is figure
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("v", "w")
    assert display.plot().ax_ is not ax


@pytest.mark.bad_input
def test_bad_arguments_are_refused():
    model = fitted()
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\); got 0"):
        TransportDisplay.from_estimator(model, threshold=0)
    with pytest.raises(ValueError, match="features must be two of the 3 columns"):
        TransportDisplay.from_estimator(model, features=(0, 3))
    with pytest.raises(NotFittedError):
        TransportDisplay.from_estimator(SinkhornTransport())
