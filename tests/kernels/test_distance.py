"""The product form of squared distances: where it loses digits, and that the limits in force prevent it."""

import pytest
import torch

from stochproc.kernels._distance import augment, inverse_or_zero, safe_sqrt, sqdist_block, stable_exp
from tests import reference


def cloud(gen, n, radius, d=3):
    x = torch.randn(n, d, generator=gen)
    return radius * x / x.norm(dim=-1, keepdim=True)


def plain_product(x, y):
    """The product form in the dtype of the points, without any limit on their norm."""
    return ((x * x).sum(-1)[:, None] - 2 * x @ y.T + (y * y).sum(-1)).clamp(min=0)


def worst_rbf_error(sq, x, y):
    return float((torch.exp(-sq.double() / 2) - reference.rbf(x, y)).abs().max())


def test_float32_products_miss_2e_5_a_thousand_lengthscales_out_and_ours_do_not(gen):
    # spec/kernel_layer 3.1 allows the float32 product up to norms of 1e3; there it is wrong by O(1).
    x = cloud(gen, 200, 900.0).float()
    y = x + 0.5 * torch.randn(200, 3, generator=gen).float()
    assert worst_rbf_error(plain_product(x, y), x, y) > 1e-2
    a, b, _ = augment(x, y)
    assert a.dtype == torch.float64
    assert worst_rbf_error(sqdist_block(a, b, torch.float32), x, y) < 2e-5


def test_float32_products_are_kept_where_they_reach_2e_5(gen):
    x = cloud(gen, 500, 9.3).float()
    y = x + 0.1 * torch.randn(500, 3, generator=gen).float()
    a, b, _ = augment(x, y)
    assert a.dtype == torch.float32
    assert worst_rbf_error(sqdist_block(a, b, torch.float32), x, y) < 2e-5


@pytest.mark.parametrize("radius", [1.0, 30.0, 1e3, 1e5])
def test_refined_distances_of_near_pairs_keep_their_digits(radius, gen):
    x = cloud(gen, 100, radius)
    y = torch.cat([x[:50], x[50:] + 1e-3 * torch.randn(50, 3, generator=gen)])
    a, b, _ = augment(x, y)
    got = sqdist_block(a, b, torch.float64, refine=True)
    want = reference.distance(x, y) ** 2
    assert torch.equal(got.diagonal()[:50], torch.zeros(50))
    # Centring rounds each coordinate once: an error of eps * radius in a difference of 1e-3.
    torch.testing.assert_close(got.sqrt(), want.sqrt(), rtol=1e-11, atol=4e-16 * radius)


def test_clusters_far_apart_are_refined_in_one_pass(gen):
    x = torch.cat([torch.randn(20, 2, generator=gen) * 1e-6 + c for c in (0.0, 1.0, 2.0)])
    a, b, _ = augment(x, x)
    got = sqdist_block(a, b, torch.float64, refine=True)
    want = reference.distance(x, x) ** 2
    near = want < 1e-6
    torch.testing.assert_close(got[near], want[near], rtol=1e-8, atol=1e-24)


def test_stable_exp_never_returns_subnormals_and_agrees_with_exp():
    z = -torch.tensor([0.0, 1e-3, 1.0, 30.0, 80.0, 1e3, 1e6])
    for dtype, tiny in ((torch.float32, 2.0**-120), (torch.float64, 2.0**-1000)):
        got = stable_exp(z.to(dtype))
        assert got.min() == tiny
        # exp2 of a rounded product: the relative error is |z| eps.
        rtol = 100 * torch.finfo(dtype).eps
        torch.testing.assert_close(got[:5].double(), z[:5].exp(), rtol=rtol, atol=0)


def test_square_roots_and_inverses_have_finite_derivatives_at_zero():
    z = torch.tensor([0.0, 4.0], requires_grad=True)
    (first,) = torch.autograd.grad(safe_sqrt(z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    torch.testing.assert_close(first.detach(), torch.tensor([0.0, 0.25]))
    torch.testing.assert_close(second, torch.tensor([0.0, -1 / 32]))
    (slope,) = torch.autograd.grad(inverse_or_zero(z).sum(), z)
    torch.testing.assert_close(slope, torch.tensor([0.0, -1 / 16]))
