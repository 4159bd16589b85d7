import math
import pickle

import pytest
import torch

from stochproc.kernels._duals import Erf, Numeric, Relu
from stochproc.kernels._pair import Pair
from tests.kernels.test_duals import CASES


def square(u):
    return u * u


@pytest.mark.parametrize("name", [name for name in CASES if name != "rbf"])
def test_numeric_duals_agree_with_the_closed_forms(gen, name):
    dual, _, f, kinks = CASES[name]
    x = 0.4 * torch.randn(2, 3, generator=gen)
    y = torch.cat([x[:1], -x[:1], x[:1] + 1e-4, torch.zeros(1, 3), 0.4 * torch.randn(1, 3, generator=gen)])
    pair = Pair.from_points(x, y)
    numeric = Numeric(f, kinks=kinks)
    got, want = numeric(pair), dual(pair)
    close = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(got.q, want.q, **close)
    torch.testing.assert_close(got.D, want.D, **close)
    torch.testing.assert_close(got.r1, want.r1, **close)
    # f(u) - f(v) is off by eps: relative to the square of a distance of 1e-4, 1e-11.
    torch.testing.assert_close(got.sqdist, want.sqdist, rtol=1e-10, atol=1e-20 if not kinks else 1e-16)
    off_origin = [0, 1, 2, 4]
    torch.testing.assert_close(numeric.derivative(pair)[:, off_origin], dual.derivative(pair)[:, off_origin], **close)
    torch.testing.assert_close(numeric.diag(pair.r1**2), dual.diag(pair.r1**2), **close)


def test_a_kink_that_is_not_declared_costs_three_digits():
    pair = Pair.from_points(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]))
    error = (Numeric(torch.relu)(pair).q - Relu()(pair).q).abs().item()
    assert 1e-6 < error < 4e-4


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_numeric_duals_have_first_derivatives_at_coincident_points_too(gen, name):
    _, _, f, kinks = CASES[name]
    numeric = Numeric(f, kinks=kinks)
    x = 0.5 * torch.randn(1, 2, generator=gen)
    y = torch.cat([x, 0.5 * torch.randn(1, 2, generator=gen)])
    inputs = (x.requires_grad_(), y.requires_grad_())

    def value(x, y):
        return numeric(Pair.from_points(x, y)).q, numeric.diag(x.square().sum(-1))

    assert torch.autograd.gradcheck(value, inputs)
    (grad,) = torch.autograd.grad(value(*inputs)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_numeric_takes_a_slope_instead_of_differentiating(gen):
    pair = Pair.from_points(torch.randn(2, 3, generator=gen), torch.randn(3, 3, generator=gen))
    given = Numeric(torch.sin, slope=torch.cos, nodes=60)
    torch.testing.assert_close(given.derivative(pair), Numeric(torch.sin, nodes=60).derivative(pair))


def test_panels_resolve_steep_functions_where_plain_nodes_do_not():
    pair = Pair.from_points(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 2.0]]))
    want = Erf()(pair).q.item()
    assert abs(Numeric(torch.erf)(pair).q.item() - want) > 1e-9
    assert Numeric(torch.erf, kinks=(0.0,))(pair).q.item() == pytest.approx(want, abs=1e-13)


def test_numeric_duals_are_values():
    dual = Numeric(torch.nn.functional.softplus, kinks=(1.0, 0))
    assert dual.kinks == (0.0, 1.0)
    assert dual == Numeric(torch.nn.functional.softplus, kinks=(0.0, 1.0))
    assert len({dual, Numeric(torch.nn.functional.softplus)}) == 2
    assert pickle.loads(pickle.dumps(Numeric(square))) == Numeric(square)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Numeric(torch.tanh, kinks=(math.nan,)), "kinks must be finite"),
        (lambda: Numeric(torch.tanh, nodes=1), "nodes must be between 2 and 400"),
        (
            lambda: Numeric(torch.sum)(Pair.from_points(torch.ones(1, 1), torch.ones(1, 1))),
            "f must be elementwise",
        ),
    ],
)
def test_rejects_parameters_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bad_input
def test_rejects_functions_that_are_none():
    with pytest.raises(TypeError, match="f must be callable"):
        Numeric(3.0)
    with pytest.raises(TypeError, match="slope must be callable"):
        Numeric(torch.sin, slope=1.0)
