"""Gradients of a solved transport problem between points whose costs are never stored."""

import pytest
import torch
from torch.autograd import grad

from stochproc.ot import _gradients as dense
from stochproc.ot import _gradients_lazy as lazy
from tests.ot.test_gradients import problem, squared, tangent
from tests.ot.transport_reference import solved


@pytest.mark.parametrize("metric", ["sqeuclidean", squared])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("zeros", [False, True])
def test_lazy_gradients_equal_dense_ones(gen, metric, shape, zeros):
    X, Y = (torch.rand(k, 2, generator=gen).requires_grad_() for k in shape)
    _, a, b = problem(gen, *shape)
    if zeros:
        a[1] = a[3] = 0
    a, b = (1.7 * w / w.sum() for w in (a, b))
    eps = torch.tensor(0.1)
    f, g = solved(squared(X, Y), a, b, eps)
    inputs = [X, Y, *(t.requires_grad_() for t in (a, b, eps))]
    u = [torch.randn(k, generator=gen) for k in shape]

    def scalar(out):
        return out if isinstance(out, torch.Tensor) else (u[0] * out[0]).sum() + (u[1] * out[1]).sum()

    for name in ("value", "value_linear", "potentials"):
        ours = scalar(getattr(lazy, f"lazy_{name}")(metric, X, Y, a, b, eps, f, g))
        theirs = scalar(getattr(dense, name)(squared(X, Y), a, b, eps, f, g))
        torch.testing.assert_close(ours, theirs)
        first = [list(grad(out, inputs, create_graph=name == "value")) for out in (ours, theirs)]
        if name == "value":
            w = [torch.randn(t.shape, generator=gen) for t in inputs]
            second = [list(grad(sum((p * q).sum() for p, q in zip(w, f, strict=True)), inputs)) for f in first]
            _assert_same(*second)
        _assert_same(*first)


def _assert_same(ours, theirs):
    # 1e-9: both solve their systems to a relative residual of 1e-10.
    ours, theirs = ([*t[:2], *tangent(*t[2:4]), t[4]] for t in (ours, theirs))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_parameters_of_a_metric_are_differentiated(gen):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.3))

        def forward(self, x, y):
            return self.scale * squared(x, y)

    metric = Scaled()
    X, Y = torch.rand(7, 2, generator=gen), torch.rand(5, 2, generator=gen)
    _, a, b = problem(gen)
    f, g = solved(metric(X, Y), a, b, 0.1)
    for name in ("value", "value_linear"):
        (ours,) = grad(getattr(lazy, f"lazy_{name}")(metric, X, Y, a, b, 0.1, f, g), metric.scale)
        (theirs,) = grad(getattr(dense, name)(metric(X, Y), a, b, 0.1, f, g), metric.scale)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradient_in_points_that_are_both_clouds_counts_both_sides(gen):
    X = torch.rand(6, 2, generator=gen).requires_grad_()
    a = torch.full((6,), 1 / 6)
    f, g = solved(squared(X, X), a, a, 0.1)
    ours, theirs = lazy.lazy_value("sqeuclidean", X, X, a, a, 0.1, f, g), dense.value(squared(X, X), a, a, 0.1, f, g)
    (first,), (other,) = grad(ours, X, create_graph=True), grad(theirs, X, create_graph=True)
    torch.testing.assert_close(first, other)
    torch.testing.assert_close(*(grad(t.square().sum(), X)[0] for t in (first, other)), rtol=1e-9, atol=1e-9)
