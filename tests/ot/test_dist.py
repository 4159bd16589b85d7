"""Cost matrices against scipy, and their gradients."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from stochproc.ot._dist import dist

NAMED = ["sqeuclidean", "euclidean", "cityblock"]


@pytest.fixture
def points(gen):
    return torch.randn(9, 3, generator=gen), torch.randn(7, 3, generator=gen) + 1


@pytest.mark.parametrize("metric", [*NAMED, "chebyshev", "cosine", "correlation", "canberra"])
def test_equals_scipy(points, metric):
    x, y = (t.numpy() for t in points)
    # A few operations on numbers of size 10 in float64.
    np.testing.assert_allclose(dist(x, y, metric), cdist(x, y, metric), rtol=0, atol=1e-13)
    torch.testing.assert_close(dist(*points, metric), torch.tensor(cdist(x, y, metric)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_minkowski_equals_scipy_with_and_without_weights(points, p):
    x, y = (t.numpy() for t in points)
    w = np.array([0.5, 2.0, 0.0])
    np.testing.assert_allclose(dist(x, y, "minkowski", p), cdist(x, y, "minkowski", p=p), rtol=0, atol=1e-13)
    np.testing.assert_allclose(dist(x, y, "minkowski", p, w), cdist(x, y, "minkowski", p=p, w=w), rtol=0, atol=1e-13)


@pytest.mark.parametrize("metric", [*NAMED, "chebyshev"])
def test_weights_of_columns_are_those_of_scipy(points, metric):
    x, y = (t.numpy() for t in points)
    w = np.array([0.5, 2.0, 1.0])
    np.testing.assert_allclose(dist(x, y, metric, w=w), cdist(x, y, metric, w=w), rtol=0, atol=1e-13)


def test_equals_pot(points):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    for metric in NAMED:
        torch.testing.assert_close(dist(*points, metric), ot.dist(*points, metric=metric), rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", NAMED)
def test_one_set_alone_is_compared_with_itself(points, metric):
    x = points[0]
    out = dist(x, metric=metric)
    torch.testing.assert_close(out, dist(x, x.clone(), metric), rtol=0, atol=0)
    # Euclidean distances too, though the root of a rounded square would be 1e-8.
    assert float(out.diagonal().abs().max()) <= 1e-14


@pytest.mark.parametrize("metric", [*NAMED, "minkowski"])
def test_gradients(points, metric):
    x, y = (t.requires_grad_() for t in points)
    assert torch.autograd.gradcheck(lambda x, y: dist(x, y, metric, 3), (x, y))
    if metric != "minkowski":
        assert torch.autograd.gradgradcheck(lambda x, y: dist(x, y, metric), (x, y))


@pytest.mark.parametrize("metric", NAMED)
def test_gradients_are_zero_where_points_coincide(metric):
    x = torch.ones(1, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(dist(x, torch.ones(1, 2), metric).sum(), x)
    assert torch.equal(grad, torch.zeros(1, 2))


def test_a_function_of_two_blocks(points):
    def half(x, y):
        return torch.cdist(x, y) / 2

    torch.testing.assert_close(dist(*points, half), dist(*points, "euclidean") / 2, rtol=0, atol=1e-13)
    assert isinstance(dist(points[0].numpy(), metric=half), np.ndarray)


def test_dtypes_follow_the_points(points):
    x, y = (t.float() for t in points)
    assert dist(x, y).dtype == torch.float32
    assert dist(x.numpy(), y.numpy(), "cosine").dtype == np.float32
    assert dist(x, y.double()).dtype == torch.float64
    assert dist(np.array([[0, 0], [3, 4]])).tolist() == [[0.0, 25.0], [25.0, 0.0]]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.zeros(3),), r"X must have shape \(n, d\); got \(3,\). Write X.reshape"),
        ((np.zeros((2, 2)), np.zeros((2, 3))), "same number of columns; got 2 and 3"),
        ((np.array([[np.nan]]),), "X must be finite"),
        ((np.zeros((2, 2)), None, "sqeucl"), "metric must be one of 'sqeuclidean'.*got 'sqeucl'"),
        ((np.zeros((2, 2)), None, "minkowski", 0.5), "p must be at least 1; got 0.5"),
        ((np.zeros((2, 2)), None, "sqeuclidean", 2, np.ones(3)), r"w must have shape \(2,\)"),
        ((np.zeros((2, 2)), None, "seuclidean", 2, np.ones(2)), "takes no weights"),
        ((np.zeros((2, 2)), None, lambda x, y: x), r"metric must return a tensor of shape \(2, 2\)|got \(2, 2\)"),
    ],
)
def test_refuses_what_it_cannot_measure(args, message):
    if callable(args[-1]):
        args = (np.zeros((2, 3)), None, lambda x, y: x)
    with pytest.raises(ValueError, match=message):
        dist(*args)


@pytest.mark.bad_input
def test_refuses_metrics_without_a_gradient_and_mixed_kinds(points):
    x = points[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="metric 'cosine' has no gradient"):
        dist(x, metric="cosine")
    with pytest.raises(TypeError, match="all NumPy or all torch"):
        dist(x, np.zeros((2, 3)))
    with pytest.raises(TypeError, match="metric must be a string or a function"):
        dist(x, metric=3)


@pytest.mark.parametrize("unit", [1e-200, 1e-130, 1e160, 1e300])
def test_distances_keep_their_digits_where_squares_do_not(points, unit):
    x, y = points
    torch.testing.assert_close(
        dist(x * unit, y * unit, "euclidean") / unit, dist(x, y, "euclidean"), rtol=1e-14, atol=0
    )
    x = (x * unit).requires_grad_()
    (grad,) = torch.autograd.grad(dist(x, y * unit, "euclidean").sum(), x)
    diff = points[0][:, None] - y
    expected = (diff / diff.norm(dim=-1, keepdim=True)).sum(1)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-13)


@pytest.mark.bad_input
def test_the_order_must_be_a_number():
    with pytest.raises(TypeError, match="p must be a number; got str"):
        dist(np.zeros((2, 2)), metric="minkowski", p="3")
