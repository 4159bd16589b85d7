"""Written-out costs: against explicit differences, over batches, and their gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stochproc.kernels import cost_matrix

NAMED = ["sqeuclidean", "euclidean", "cityblock"]


def explicit(name, x, y):
    diff = x.unsqueeze(-2) - y.unsqueeze(-3)
    if name == "cityblock":
        return diff.abs().sum(-1)
    return diff.square().sum(-1) if name == "sqeuclidean" else diff.square().sum(-1).sqrt()


def squares(x, y):
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


@pytest.mark.parametrize("name", NAMED)
def test_equals_explicit_differences_with_broadcast_batch_axes(name, gen):
    x, y = torch.randn(2, 1, 5, 3, generator=gen), torch.randn(4, 6, 3, generator=gen)
    out = cost_matrix(name, x, y)
    assert out.shape == (2, 4, 5, 6)
    # A few operations on numbers of size 10 in float64.
    torch.testing.assert_close(out, explicit(name, x, y), rtol=0, atol=1e-13)
    torch.testing.assert_close(cost_matrix(name, y), explicit(name, y, y), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMED)
def test_near_pairs_of_far_clusters_keep_their_digits(name, dtype, gen):
    # Two clusters 1e4 apart: the product form alone would lose 1e8 ulps of the small squares.
    x = torch.randn(6, 2, generator=gen).to(dtype)
    x[3:] += 1e4
    near = x + 0.25
    # Centring rounds coordinates of size 1e4 in float64, and the least difference of a coordinate is near 0.1.
    tol = max(4 * torch.finfo(dtype).eps, 1e-10)
    exact = explicit(name, x.double(), near.double())
    torch.testing.assert_close(cost_matrix(name, x, near).double(), exact, rtol=tol, atol=0)


@pytest.mark.parametrize("cost", [*NAMED, squares])
def test_gradients_with_broadcast_batch_axes(cost, gen):
    x = torch.randn(2, 3, 2, generator=gen, requires_grad=True)
    y = torch.randn(4, 2, generator=gen, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: cost_matrix(cost, x, y), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: cost_matrix(cost, x, y), (x, y))


@pytest.mark.parametrize("name", NAMED)
def test_gradients_are_zero_where_points_coincide(name):
    x = torch.ones(1, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(cost_matrix(name, x, torch.ones(1, 2)).sum(), x)
    assert torch.equal(grad, torch.zeros(1, 2))


class _BlocksAlive(TorchDispatchMode):
    """Counts the results of one size that are alive at a time."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.alive, self.most = numel, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.numel:
            self.alive.append(torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage()))
            self.alive = [ref for ref in self.alive if not ref.expired()]
            self.most = max(self.most, len({ref.cdata for ref in self.alive}))
        return out


def test_the_gradient_of_cityblock_stores_no_block_a_column(gen):
    x = torch.randn(11, 40, generator=gen, requires_grad=True)
    out = cost_matrix("cityblock", x, torch.randn(13, 40, generator=gen))
    with _BlocksAlive(out.numel()) as mode:
        out.backward(torch.ones_like(out))
    # A difference, its sign and the product, of this column and the last; 40 columns would make more.
    assert 0 < mode.most <= 6


def test_parameters_of_a_module_are_differentiated(gen):
    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x, y):
            return ((x.unsqueeze(-2) - y.unsqueeze(-3)).square() * self.weight).sum(-1)

    module, x, y = Weighted(), torch.randn(3, 2, generator=gen), torch.randn(4, 2, generator=gen)
    cost_matrix(module, x, y).sum().backward()
    expected = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum((0, 1))
    torch.testing.assert_close(module.weight.grad, expected, rtol=0, atol=1e-13)


def test_the_dtype_is_that_of_the_points():
    x = torch.zeros(2, 3, dtype=torch.float32)
    for cost in (*NAMED, lambda x, y: torch.ones(2, 2, dtype=torch.int64)):
        assert cost_matrix(cost, x).dtype == torch.float32


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("cost", "x", "error", "message"),
    [
        ("manhattan", torch.zeros(2, 3), ValueError, "unknown cost 'manhattan'"),
        (3, torch.zeros(2, 3), TypeError, "cost must be a string or a function"),
        ("euclidean", torch.zeros(3), ValueError, "x must have shape"),
        ("euclidean", torch.full((2, 3), torch.nan), ValueError, "x and y must be finite"),
        ("cityblock", torch.full((2, 3), torch.inf), ValueError, "x and y must be finite"),
        ("sqeuclidean", torch.tensor([[0.0], [1e200]], dtype=torch.float64), OverflowError, "less than 1e154 apart"),
        (lambda x, y: x, torch.zeros(2, 3), ValueError, "cost must return a tensor of shape"),
        (lambda x, y: torch.zeros(5, 2, 2), torch.zeros(2, 3), ValueError, r"shape \(2, 2\), .* got \(5, 2, 2\)"),
        (lambda x, y: torch.zeros(2, 2) + 1j, torch.zeros(2, 3), TypeError, "cost must return real numbers"),
    ],
)
def test_says_what_is_wrong(cost, x, error, message):
    with pytest.raises(error, match=message):
        cost_matrix(cost, x)
