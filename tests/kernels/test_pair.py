import mpmath as mp
import pytest
import torch

from stochproc.kernels._pair import Pair
from tests.kernels import dual_reference as ref

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


def close_points(gen, n, d, distance, dtype, radial=False):
    x = torch.randn(n, d, generator=gen)
    step = x if radial else torch.randn(n, d, generator=gen)
    y = x + distance * step / step.norm(dim=-1, keepdim=True)
    return x.to(dtype), y.to(dtype)


def exact(pair, i, j, x, y):
    """Values of the pair and of 50-digit arithmetic on the same floats."""
    k = ref.from_points(x[i].tolist(), y[j].tolist())
    r1, r2 = mp.sqrt(k.q11), mp.sqrt(k.q22)
    full = [t.expand(pair.A.shape)[i, j].item() for t in pair]
    return full, k, (r1 - r2, k.defect)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("d", [1, 2, 3, 64])
def test_distances_and_norm_differences_are_accurate_relative_to_themselves(gen, d, distance, dtype):
    x, y = close_points(gen, 6, d, distance, dtype)
    pair = Pair.from_points(x, y)
    # cdist sums d squares one by one: up to d/2 + 3 roundings.
    tol = (8 + d / 2) * EPS[dtype]
    for i in range(6):
        for j in range(6):
            (_, _, D, A), k, (exact_D, _) = exact(pair, i, j, x, y)
            sq = mp.mpf(D) ** 2 + 2 * mp.mpf(A)
            assert abs(sq - k.sqdist) <= tol * k.sqdist
            assert abs(mp.mpf(D) - exact_D) <= 4 * EPS[dtype] * abs(exact_D)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [0.3, 1e-2, 1e-5])
def test_a_cluster_far_from_the_origin_keeps_its_distances(gen, spread, dtype):
    # All or many angles are small: these come from differences, not from the product of matrices.
    x = (torch.randn(20, generator=gen) + spread * torch.randn(5, 20, generator=gen)).to(dtype)
    pair = Pair.from_points(x, x.clone())
    for i in range(5):
        for j in range(i):
            (_, _, D, A), k, _ = exact(pair, i, j, x, x)
            assert abs(mp.mpf(D) ** 2 + 2 * mp.mpf(A) - k.sqdist) <= 20 * EPS[dtype] * k.sqdist


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("radial", [True, False])
@pytest.mark.parametrize("distance", [3.0, 1e-1, 1e-3, 1e-6])
def test_angles_are_accurate_to_a_few_roundings_also_for_collinear_points(gen, distance, radial, dtype):
    x, y = close_points(gen, 6, 5, distance, dtype, radial)
    pair = Pair.from_points(x, y)
    for i in range(6):
        for j in range(6):
            k = ref.from_points(x[i].tolist(), y[j].tolist())
            cosine = k.q12 / mp.sqrt(k.q11 * k.q22)
            assert abs(pair.angle[i, j].item() - mp.acos(min(1, cosine))) < 16 * EPS[dtype]


@pytest.mark.parametrize("ratio", [1e8, -1e8, 3.0, -3.0])
def test_multiples_of_a_point_have_angle_zero_or_pi(gen, ratio):
    x = torch.randn(1, 4, generator=gen)
    pair = Pair.from_points(x, ratio * x)
    if ratio > 0:
        torch.testing.assert_close(pair.angle.item(), 0.0, atol=4 * EPS[torch.float64], rtol=0)
    else:
        # Next to pi the defect 2 n - n p^2 / 2 holds p to the square root of a rounding only.
        torch.testing.assert_close(pair.angle.item(), torch.pi, atol=1e-7, rtol=0)


def test_many_collinear_pairs_take_the_dense_route_to_the_same_values(gen):
    line = torch.randn(1, 3, generator=gen)
    x = torch.linspace(0.1, 5, 20)[:, None] * line
    assert Pair.from_points(x, x).angle.max() < 8 * EPS[torch.float64]
    few = torch.cat([x[:2], torch.randn(40, 3, generator=gen)])
    assert Pair.from_points(few, few).angle[0, 1] < 8 * EPS[torch.float64]


def test_points_on_a_line_are_exact():
    x = torch.tensor([[0.1], [-0.3], [0.0]])
    pair = Pair.from_points(x, x)
    product = x.abs() * x.abs().mT
    assert torch.equal(pair.A, torch.where(x * x.mT < 0, 2 * product, 0.0))
    assert torch.equal(pair.D, x.abs() - x.abs().mT)


@pytest.mark.parametrize("d", [1, 3, 10, 40])
def test_a_block_with_itself_is_symmetric_with_zero_diagonal_to_the_bit(gen, d):
    x = torch.randn(30, d, generator=gen)
    pair = Pair.from_points(x, x)
    assert torch.equal(pair.A, pair.A.mT)
    assert torch.equal(pair.D, -pair.D.mT)
    assert not pair.A.diagonal().any()
    assert not pair.D.diagonal().any()
    torch.testing.assert_close(pair.q, x @ x.mT, rtol=1e-13, atol=1e-13)


def test_the_origin_has_a_right_angle_with_other_points_and_none_with_itself():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    pair = Pair.from_points(x, x)
    torch.testing.assert_close(pair.angle, torch.tensor([[0.0, torch.pi / 2], [torch.pi / 2, 0.0]]))
    torch.testing.assert_close(pair.cos, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(pair.q, torch.tensor([[0.0, 0.0], [0.0, 25.0]]))


@pytest.mark.parametrize("scale", [1e-140, 1e-100, 1.0, 1e150])
def test_angles_do_not_depend_on_the_scale_of_the_points(gen, scale):
    x, y = torch.randn(4, 3, generator=gen), torch.randn(5, 3, generator=gen)
    pair = Pair.from_points(scale * x, scale * y)
    torch.testing.assert_close(pair.angle, Pair.from_points(x, y).angle, rtol=1e-14, atol=1e-14)
    assert all(t.isfinite().all() for t in pair)


def test_identities_between_the_derived_quantities(gen):
    x, y = torch.randn(2, 4, 3, generator=gen), torch.randn(1, 5, 3, generator=gen)
    pair = Pair.from_points(x, y)
    assert pair.A.shape == (2, 4, 5)
    dot = x @ y.mT
    q11, q22 = x.square().sum(-1)[..., None], y.square().sum(-1)[..., None, :]
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(pair.q, dot, **close)
    torch.testing.assert_close(pair.det, q11 * q22 - dot**2, **close)
    torch.testing.assert_close(pair.sqdist, q11 + q22 - 2 * dot, **close)
    torch.testing.assert_close(pair.difference, q11 - q22, **close)
    torch.testing.assert_close(pair.cos, pair.angle.cos(), **close)
    torch.testing.assert_close(pair.cos, dot / (q11 * q22).sqrt(), **close)


def test_gram_and_distance_constructors_agree_with_the_points(gen):
    x, y = torch.randn(2, 4, 3, generator=gen), torch.randn(2, 5, 3, generator=gen)
    want = Pair.from_points(x, y)
    g_xx, g_yy = x.square().sum(-1), y.square().sum(-1)
    sq = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    for got in (Pair.from_gram(x @ y.mT, g_xx, g_yy), Pair.from_sqdist(sq, g_xx, g_yy)):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_small_squared_distances_survive_the_distance_constructor():
    one = torch.ones(1)
    pair = Pair.from_sqdist(torch.full((1, 1), 1e-30), one, one)
    assert pair.sqdist.item() == 1e-30


def test_rounding_below_zero_keeps_the_gradient_of_a_gram_block():
    g_xy = torch.full((1, 1), 1 + 1e-15, requires_grad=True)
    pair = Pair.from_gram(g_xy, torch.ones(1), torch.ones(1))
    assert pair.A.item() == 0
    pair.q.backward()
    assert g_xy.grad.item() == 1


@pytest.mark.parametrize("distance", [1.0, 1e-6])
def test_dense_layers_and_sums_keep_relative_accuracy(gen, distance):
    x, y = close_points(gen, 1, 3, distance, torch.float64)
    u, v = close_points(gen, 1, 2, distance, torch.float64)
    a, b = Pair.from_points(x, y), Pair.from_points(u, v)
    k, k2 = (ref.from_points(s[0].tolist(), t[0].tolist()) for s, t in ((x, y), (u, v)))
    cases = [
        (a.affine(1.96, 0.04), ref.dense(k, 1.96, 0.04)),
        (a.affine(1.96, 0.0), ref.dense(k, 1.96, 0)),
        (a + b, ref.Cov(*(s + t for s, t in zip(k, k2, strict=True)))),
    ]
    for pair, want in cases:
        sq = 2 * mp.mpf(pair.A.item()) + mp.mpf(pair.D.item()) ** 2
        assert abs(sq - want.sqdist) < 1e-14 * want.sqdist
        assert abs(pair.A.item() - want.defect) < 1e-13 * want.defect
        assert abs(pair.q.item() - want.q12) < 1e-14 * mp.sqrt(want.q11 * want.q22)


def test_a_dense_layer_is_the_sum_with_the_constant_kernel(gen):
    pair = Pair.from_points(torch.randn(4, 3, generator=gen), torch.randn(5, 3, generator=gen))
    one = torch.ones(1, 1)
    constant = Pair(0.3 * one, 0.3 * one, 0 * one, 0 * one)
    for total in (pair.affine(2.0, 0.0) + constant, constant.plus(pair.affine(2.0, 0.0))):
        for a, b in zip(total, pair.affine(2.0, 0.09), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_tensor_variances_equal_numbers_and_have_gradients(gen):
    pair = Pair.from_points(torch.randn(3, 2, generator=gen), torch.randn(4, 2, generator=gen))
    w, b = torch.tensor(1.5, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    torch.testing.assert_close(pair.affine(w, b).q, pair.affine(1.5, 0.2).q)
    assert torch.autograd.gradcheck(lambda w, b: pair.affine(w, b)[2:], (w, b))
    at_zero = Pair.from_points(torch.zeros(1, 2), torch.zeros(1, 2)).affine(w, 0 * b).q
    assert all(g.isfinite() for g in torch.autograd.grad(at_zero.sum(), (w, b)))


def special_points(gen, d):
    """Coincident, opposite, collinear, generic points and the origin."""
    x = torch.randn(3, d, generator=gen)
    return x, torch.cat([x[:1], -x[1:2], 2 * x[2:], torch.zeros(1, d), torch.randn(1, d, generator=gen)])


@pytest.mark.parametrize("d", [1, 3])
def test_covariances_and_distances_have_the_gradient_of_the_plain_formulas(gen, d):
    x, y = special_points(gen, d)
    inputs = (x.requires_grad_(), y.requires_grad_())

    def outputs(x, y):
        pair = Pair.from_points(x, y).affine(1.5, 0.3)
        return pair.q, pair.sqdist, pair.difference, pair.det

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("d", [1, 2])
def test_second_derivatives_are_those_of_the_plain_formulas(gen, d):
    x, y = special_points(gen, d)
    x, origin = x[:2].requires_grad_(), y[3:].clone().requires_grad_()
    y = y[:2].clone().requires_grad_()

    def outputs(x, y):
        pair = Pair.from_points(x, y).affine(1.5, 0.3)
        return pair.q, pair.sqdist

    assert torch.autograd.gradgradcheck(outputs, (x, y))
    # The norm has no second derivative at the origin, and squared norms inherit that.
    assert torch.autograd.gradgradcheck(lambda x, y: outputs(x, y)[0], (x, origin))


def test_gradients_are_finite_everywhere_and_the_angle_has_none_where_it_is_unbounded(gen):
    x, y = special_points(gen, 3)
    x.requires_grad_()
    pair = Pair.from_points(x, y.requires_grad_())

    def grads(value):
        found = torch.autograd.grad(value, (x, y), retain_graph=True, allow_unused=True)
        return [g for g in found if g is not None]

    for value in (*pair, pair.angle, pair.cos):
        assert all(g.isfinite().all() for g in grads(value.sum()))
    assert not any(g.any() for g in grads(pair.angle[0, 0]))


def test_the_angle_has_the_gradient_of_the_arc_cosine_elsewhere(gen):
    x, y = (torch.randn(n, 3, generator=gen, requires_grad=True) for n in (2, 3))
    assert torch.autograd.gradcheck(lambda x, y: Pair.from_points(x, y).angle, (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: Pair.from_points(x, y).angle, (x, y))


def test_a_pair_refuses_to_be_joined_with_something_else():
    pair = Pair.from_points(torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(TypeError):
        pair + 1.0


@pytest.mark.bad_input
def test_rejects_points_of_unlike_kind_or_shape():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="mixed dtypes"):
        Pair.from_points(x, x.float())
    with pytest.raises(ValueError, match="same number of columns"):
        Pair.from_points(x, torch.ones(2, 2))
    with pytest.raises(ValueError, match="must be matrices"):
        Pair.from_points(x[0], x)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_rejects_negative_variances(bad):
    one = torch.ones(1)
    pair = Pair.from_gram(torch.ones(1, 1), one, one)
    with pytest.raises(ValueError, match="g_yy must be non-negative"):
        Pair.from_gram(torch.ones(1, 1), one, bad * one)
    with pytest.raises(ValueError, match="weight_variance must be non-negative"):
        pair.affine(bad, 0.0)
    with pytest.raises(ValueError, match="bias_variance must be non-negative"):
        pair.affine(1.0, bad)


def test_transforms_of_torch_func_go_through(gen):
    x, y = torch.randn(6, 5, generator=gen), torch.randn(4, 5, generator=gen)

    def loss(x):
        return Pair.from_points(x, y).sqdist.sin().sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])


def test_views_of_one_memory_are_not_taken_for_one_set(gen):
    z = torch.complex(torch.randn(4, 5, generator=gen), torch.randn(4, 5, generator=gen))
    x, y = z.imag, z.conj().imag
    torch.testing.assert_close(Pair.from_points(x, y).q, x @ y.mT)
