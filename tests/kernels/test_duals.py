import math
import pickle
from functools import partial

import mpmath as mp
import numpy as np
import pytest
import torch

from stochproc.kernels._dual_steps import angle_minus_sine, sine_minus_chord
from stochproc.kernels._duals import ABRelu, Abs, Cos, Erf, Exp, Gelu, LeakyRelu, Rbf, Relu, Sign, Sin
from stochproc.kernels._pair import Pair
from tests.kernels import dual_reference as ref

# name: dual, closed form at 50 digits, function, kinks
CASES = {
    "relu": (Relu(), ref.ab_relu(0, 1), torch.relu, (0.0,)),
    "leaky": (LeakyRelu(0.2), ref.ab_relu(0.2, 1), partial(torch.nn.functional.leaky_relu, negative_slope=0.2), (0.0,)),
    "abs": (Abs(), ref.ab_relu(-1, 1), torch.abs, (0.0,)),
    "abrelu": (ABRelu(-0.5, 2.0), ref.ab_relu(-0.5, 2), lambda u: torch.where(u > 0, 2 * u, -u / 2), (0.0,)),
    "erf": (Erf(), ref.erf(), torch.erf, ()),
    "gelu": (Gelu(), ref.gelu(), torch.nn.functional.gelu, ()),
    "sin": (Sin(), ref.sin(0), torch.sin, ()),
    "sin_0.7": (Sin(0.7), ref.sin(0.7), lambda u: torch.sin(u + 0.7), ()),
    "sin_1.2": (Sin(1.2), ref.sin(1.2), lambda u: torch.sin(u + 1.2), ()),
    "cos": (Cos(), ref.cos(), torch.cos, ()),
    "rbf": (Rbf(0.5), ref.rbf(0.5), None, ()),
    "exp": (Exp(), ref.exp(), torch.exp, ()),
}
SMOOTH = ["erf", "gelu", "sin", "sin_0.7", "sin_1.2", "cos", "rbf", "exp"]
RECTIFIERS = ["relu", "leaky", "abs", "abrelu"]
DEEP = [name for name in CASES if name not in ("exp", "sin_1.2")]
W2, B2 = 1.96, 0.04

every = pytest.mark.parametrize("name", CASES)


def points_at(distance, gen, d=5):
    """Two random directions, the radial one and the one along which the norm stays."""
    x = torch.randn(4, d, generator=gen) / d**0.5
    step = torch.randn(4, d, generator=gen)
    step[2] = x[2]
    step[3] -= (step[3] @ x[3]) / (x[3] @ x[3]) * x[3]
    return x, x + distance * step / step.norm(dim=-1, keepdim=True)


def deep(dual, pair, depth, w2, b2):
    ntk = torch.zeros_like(pair.A)
    for _ in range(depth):
        pair = pair.affine(w2, b2)
        ntk = (w2 * ntk + pair.q) * dual.derivative(pair)
        pair = dual(pair)
    pair = pair.affine(w2, b2)
    return pair, w2 * ntk + pair.q


def deep_errors(name, depth, distance, dtype, gen):
    """Largest relative errors of K, of the tangent kernel and of K(x,x) - K(x,y).

    The pair holds K to a rounding of sqrt(K(x,x) K(y,y)) and the difference to one of the larger of its two parts
    r1 D and A, so these are the scales where cancellation makes the value itself smaller than a tenth of them.
    """
    dual, forms = CASES[name][:2]
    w2, b2 = (torch.tensor(v, dtype=dtype).item() for v in (W2, B2))
    x, y = (p.to(dtype) for p in points_at(distance, gen))
    worst = [0.0, 0.0, 0.0]
    for i in range(len(x)):
        k = ref.deep(ref.from_points(x[i].tolist(), y[i].tolist()), *forms, depth, w2, b2)
        pair, ntk = deep(dual, Pair.from_points(x[i : i + 1], y[i : i + 1]), depth, w2, b2)
        r1, D, A = (mp.mpf(t.item()) for t in (pair.r1, pair.D, pair.A))
        n, e1, e2 = mp.sqrt(k.q11 * k.q22), mp.sqrt(k.q11), mp.sqrt(k.q22)
        drop, parts = k.q11 - k.q12, e1 * abs(e1 - e2) + k.defect
        errors = (
            abs(pair.q.item() - k.q12) / max(abs(k.q12), n / 10),
            abs(ntk.item() - k.ntk) / abs(k.ntk),
            abs(r1 * D + A - drop) / max(abs(drop), parts / 10),
        )
        worst = [max(a, float(b)) for a, b in zip(worst, errors, strict=True)]
    return worst


@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("depth", [1, 10, 20])
@pytest.mark.parametrize("name", DEEP)
def test_deep_recursion_in_float64_equals_50_digits(gen, name, depth, distance):
    nngp, ntk, drop = deep_errors(name, depth, distance, torch.float64, gen)
    # Asked: 1e-13 and 1e-12. A handful of roundings a layer gives some 20 eps.
    assert nngp < 2e-14
    assert ntk < 5e-14
    assert drop < 1e-13


@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("depth", [1, 10])
@pytest.mark.parametrize("name", DEEP)
def test_deep_recursion_in_float32_equals_50_digits(gen, name, depth, distance):
    nngp, ntk, drop = deep_errors(name, depth, distance, torch.float32, gen)
    # Rounding the state once a layer, with exact arithmetic in between, already gives 2e-6 for the GELU, whose
    # variance map multiplies errors; the sine is chaotic for these weights and doubles them in its slopes.
    limit = {"gelu": 4e-6, "sin": 2e-6}.get(name, 1e-6)
    assert nngp < limit
    assert ntk < limit
    assert drop < 1e-5


def test_the_exponential_keeps_its_digits_where_it_does_not_overflow(gen):
    x, y = points_at(1e-6, gen)
    pair = Pair.from_points(x / 2, y / 2)
    out, ntk = deep(Exp(), pair, 2, 0.25, 0.04)
    for i in range(len(x)):
        k = ref.from_points((x[i] / 2).tolist(), (y[i] / 2).tolist())
        k = ref.deep(k, *ref.exp(), 2, 0.25, 0.04)
        assert abs(out.q[i, i].item() - k.q12) < 1e-14 * k.q12
        assert abs(ntk[i, i].item() - k.ntk) < 1e-14 * k.ntk
        assert abs(out.sqdist[i, i].item() - k.sqdist) < 1e-14 * k.sqdist


@pytest.mark.parametrize("norm", [1e-3, 1e-1, 1.0, 10.0, 1e2])
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-6])
@every
def test_squared_distances_after_a_layer_are_accurate_relative_to_themselves(gen, name, norm, distance):
    if name == "exp":
        norm = min(norm, 3.0)
    dual, (value, _) = CASES[name][:2]
    x, y = points_at(distance, gen)
    scale = norm / x.norm(dim=-1, keepdim=True)
    x, y = scale * x, scale * y
    for i in range(len(x)):
        k = ref.activate(ref.from_points(x[i].tolist(), y[i].tolist()), value, lambda *q: 0)
        out = dual(Pair.from_points(x[i : i + 1], y[i : i + 1]))
        sq = 2 * mp.mpf(out.A.item()) + mp.mpf(out.D.item()) ** 2
        # Exponents hold absolute errors of some eps q: the value of sin, cos, rbf and exp inherits them.
        spread = 1 + (3 * norm**2 if name[:3] in ("sin", "cos", "exp") else 0)
        assert abs(sq - k.sqdist) < 2e-14 * spread * k.sqdist
        assert abs(out.D.item() - (mp.sqrt(k.q11) - mp.sqrt(k.q22))) < 2e-15 * spread * mp.sqrt(k.sqdist)


@every
def test_closed_forms_equal_the_integral_over_two_gaussians(name):
    if name == "rbf":
        pytest.skip("not of the form E f(u) f(v) with real f")
    dual, forms, f, kinks = CASES[name]
    for k in (ref.Cov(0.8, 0.3, 0.5), ref.Cov(0.7, -0.6, 0.9), ref.Cov(0.01, 0.02, 0.5)):
        want = ref.expectation(lambda u: f(torch.from_numpy(u)).numpy(), k, kinks)
        g11, g12, g22 = (torch.tensor([float(q)]) for q in k[:3])
        got = dual(Pair.from_gram(g12[None], g11, g22)).q.item()
        assert got == pytest.approx(want, abs=1e-12)
        assert float(forms[0](*map(mp.mpf, k[:3]))) == pytest.approx(want, abs=1e-12)


def test_the_gaussian_dual_is_the_expectation_of_random_features():
    # E over w ~ N(0, 2 gamma), phase b uniform, of 2 cos(w u + b) cos(w v + b); one-dimensional u, v.
    z, weights = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(60))
    u, v, gamma = 0.7, -0.4, 0.5
    want = (weights * torch.cos(2 * gamma**0.5 * z * (u - v))).sum() / math.sqrt(math.pi)
    got = Rbf(gamma)(Pair.from_points(torch.tensor([[u]]), torch.tensor([[v]]))).q
    assert got.item() == pytest.approx(want.item(), abs=1e-14)


@every
def test_derivative_duals_are_the_slope_of_the_value_in_the_covariance(name):
    # Price's theorem: d k' / d k = E f'(u) f'(v).
    dual = CASES[name][0]
    g = torch.tensor([[0.3, -0.2], [0.1, 0.25]], requires_grad=True)
    pair = Pair.from_gram(g, torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.7]))
    (slope,) = torch.autograd.grad(dual(pair).q.sum(), g)
    torch.testing.assert_close(slope, dual.derivative(pair), rtol=1e-12, atol=1e-12)


def special_points(gen):
    """Coincident, close, opposite, collinear and generic points."""
    x = torch.randn(2, 3, generator=gen) / 2
    return x, torch.cat([x[:1], x[1:] + 1e-3, -x[:1], 1.5 * x[1:], torch.randn(1, 3, generator=gen) / 2])


@every
def test_two_layers_have_the_right_gradient_at_coincident_points_too(gen, name):
    dual = CASES[name][0]
    inputs = [p.requires_grad_() for p in special_points(gen)]

    def value(x, y, w, b):
        # Small norms, lest two exponentials in a row make large numbers of small differences.
        out = dual(dual(Pair.from_points(x / 2, y / 2).affine(w, b)).affine(w / 2, b))
        return out.q, out.sqdist, dual.diag(x.square().sum(-1))

    variances = [torch.tensor(v, requires_grad=True) for v in (0.7, 0.1)]
    assert torch.autograd.gradcheck(value, (*inputs, *variances))


@every
def test_the_origin_has_the_right_gradient_without_a_bias(gen, name):
    dual = CASES[name][0]
    x = torch.zeros(1, 3, requires_grad=True)
    y = torch.randn(2, 3, generator=gen, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: dual(Pair.from_points(x, y)).q, (x, y))


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_duals_have_second_derivatives_and_differentiable_slopes(gen, name):
    dual = CASES[name][0]
    x, y = special_points(gen)
    inputs = (x.requires_grad_(), y[:3].clone().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x, y: dual(Pair.from_points(x, y).affine(0.7, 0.1)).q, inputs)
    assert torch.autograd.gradcheck(lambda x, y: dual.derivative(Pair.from_points(x, y).affine(0.7, 0.1)), inputs)


@pytest.mark.parametrize("name", RECTIFIERS)
def test_rectifiers_have_second_derivatives_between_distinct_directions(gen, name):
    dual = CASES[name][0]
    inputs = [torch.randn(n, 3, generator=gen, requires_grad=True) for n in (2, 2)]
    assert torch.autograd.gradgradcheck(lambda x, y: dual(Pair.from_points(x, y)).q, inputs)
    assert torch.autograd.gradcheck(lambda x, y: dual.derivative(Pair.from_points(x, y)), inputs)


@pytest.mark.parametrize("name", RECTIFIERS)
def test_the_slope_of_a_rectifier_has_gradient_zero_at_coincident_points(gen, name):
    x = torch.randn(1, 3, generator=gen, requires_grad=True)
    slope = CASES[name][0].derivative(Pair.from_points(x, x.detach()))
    assert not torch.autograd.grad(slope.sum(), x)[0].any()


@every
def test_the_diagonal_map_equals_the_value_at_coincident_points_to_the_bit(gen, name):
    dual = CASES[name][0]
    x = torch.randn(37, 3, generator=gen) / 10
    pair, q = Pair.from_points(x, x), None
    for _ in range(2):
        q = pair.q.diagonal()
        pair = dual(pair)
        assert torch.equal(dual.diag(q), pair.q.diagonal())


@pytest.mark.parametrize("name", [*CASES, "sign"])
def test_kernel_matrices_are_symmetric_and_positive_semidefinite(gen, name):
    dual = Sign() if name == "sign" else CASES[name][0]
    x = torch.randn(40, 3, generator=gen) / 2
    x = torch.cat([x, x[:3], -x[:3], x[:2] + 1e-6, torch.zeros(1, 3)])
    pair = Pair.from_points(x, x).affine(0.6, 0.0)
    out = dual(pair)
    matrices = [out.q]
    if name != "sign":
        matrices.append(pair.q * dual.derivative(pair) + out.q)
    for K in matrices:
        assert torch.equal(K, K.mT)
        values = torch.linalg.eigvalsh(K)
        assert values[0] > -1e-12 * values[-1]


@every
def test_pairs_may_be_full_blocks_in_batches_or_come_from_gram_matrices(gen, name):
    dual = CASES[name][0]
    x, y = torch.randn(2, 4, 3, generator=gen) / 2, torch.randn(2, 5, 3, generator=gen) / 2
    pair = Pair.from_points(x, y)
    full = Pair(*(t.expand(2, 4, 5).contiguous() for t in pair))
    gram = Pair.from_gram(x @ y.mT, x.square().sum(-1), y.square().sum(-1))
    want = dual(pair)
    one = dual(Pair.from_points(x[1], y[1]))
    for other in (dual(full), dual(gram)):
        torch.testing.assert_close(other.q, want.q, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(other.D.expand(2, 4, 5), want.D.expand(2, 4, 5), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(one.q, want.q[1], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(dual.derivative(full), dual.derivative(pair))


@every
def test_large_blocks_equal_their_small_parts(gen, name):
    dual = CASES[name][0]
    x, y = torch.randn(2, 150, 3, generator=gen) / 2, torch.randn(1, 301, 3, generator=gen) / 2
    pair = Pair.from_points(x, y)
    for whole in (pair, Pair(*(t.expand(pair.A.shape) for t in pair))):
        part = Pair(*(t[..., -2:, :] if t.shape[-2] > 1 else t for t in whole))
        for a, b in zip(dual(whole), dual(part), strict=True):
            torch.testing.assert_close(a[..., -2:, :] if a.shape[-2] > 1 else a, b, rtol=1e-14, atol=1e-15)


@every
def test_opposite_points_and_the_origin_match_50_digits(gen, name):
    dual, (value, slope) = CASES[name][:2]
    x = torch.randn(1, 3, generator=gen)
    y = torch.cat([-x, torch.zeros(1, 3)])
    pair = Pair.from_points(x, y)
    out, kdot = dual(pair), dual.derivative(pair)
    assert out.A.isfinite().all()
    assert (out.A >= 0).all()
    k = ref.from_points(x[0].tolist(), y[0].tolist())
    n = float(value(k.q11, k.q11, k.q11))
    assert out.q[0, 0].item() == pytest.approx(float(value(*k[:3])), abs=4e-15 * max(1, n))
    # Next to the angle pi the defect holds the angle to sqrt(eps).
    assert kdot[0, 0].item() == pytest.approx(float(slope(*k[:3])), abs=3e-8)
    k = ref.from_points(x[0].tolist(), y[1].tolist())
    assert out.q[0, 1].item() == pytest.approx(float(value(*k[:3])), abs=1e-14 * max(1, n))


@pytest.mark.parametrize("name", RECTIFIERS)
@pytest.mark.parametrize("scale", [1e-140, 1e150])
def test_rectifiers_are_homogeneous_over_the_whole_range(gen, name, scale):
    dual = CASES[name][0]
    x, y = torch.randn(3, 4, generator=gen), torch.randn(5, 4, generator=gen)
    small, big = dual(Pair.from_points(x, y)), dual(Pair.from_points(scale * x, scale * y))
    torch.testing.assert_close(big.A / scale / scale, small.A, rtol=1e-13, atol=1e-13)
    inputs = [(scale * p).requires_grad_() for p in (x, y)]
    grads = torch.autograd.grad(dual(Pair.from_points(*inputs)).q.sum() / scale, inputs)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", ["erf", "gelu", "sin", "cos", "rbf"])
@pytest.mark.parametrize("scale", [1e-140, 1e-60, 1e-8, 1e49])
def test_smooth_duals_are_finite_over_their_range_with_finite_gradients(gen, name, scale):
    dual = CASES[name][0]
    x = (scale * torch.randn(3, 4, generator=gen)).requires_grad_()
    y = torch.cat([x.detach(), -x.detach(), scale * torch.randn(2, 4, generator=gen)])
    pair = Pair.from_points(x, y)
    out = dual(pair)
    for t in (*out, out.q, dual.derivative(pair)):
        assert t.isfinite().all()
    unit = max(1.0, dual.diag(pair.r1**2).max().item())
    assert torch.autograd.grad((out.q / unit).sum(), x)[0].isfinite().all()
    if name == "gelu":
        q = out.q.detach()
        limit = Relu()(pair).q if scale > 1 else pair.q / 4
        torch.testing.assert_close(q / scale**2, limit.detach() / scale**2, rtol=1e-7, atol=1e-7)
    if name == "erf" and scale > 1:
        torch.testing.assert_close(out.q, Sign()(pair).q, rtol=0, atol=1e-7)


def test_the_exponential_and_the_sigmoids_refuse_norms_that_overflow():
    pair = Pair.from_points(torch.tensor([[20.0]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="Exp overflows: variances must be at most 354"):
        Exp()(pair)
    huge = Pair.from_points(torch.tensor([[1e70]]), torch.ones(1, 1))
    for dual in (Erf(), Gelu()):
        with pytest.raises(ValueError, match=f"{type(dual).__name__}: norms must be at most 1e"):
            dual(huge)


@pytest.mark.parametrize("name", ["erf", "gelu"])
def test_float32_sigmoids_keep_their_digits_up_to_the_largest_norm(gen, name):
    dual = CASES[name][0]
    x, y = (2e5 * torch.randn(n, 3, generator=gen) for n in (4, 5))
    wide, narrow = (dual(Pair.from_points(x.to(t), y.to(t))) for t in (torch.float64, torch.float32))
    unit = wide.n.max()
    torch.testing.assert_close(narrow.q.double() / unit, wide.q / unit, rtol=0, atol=1e-6)


def test_sign_is_the_limit_of_steep_error_functions(gen):
    x, y = torch.randn(3, 2, generator=gen), torch.randn(4, 2, generator=gen)
    steep = Erf()(Pair.from_points(1e9 * x, 1e9 * y)).q
    torch.testing.assert_close(Sign()(Pair.from_points(x, y)).q, steep, rtol=0, atol=1e-8)
    k = ref.from_points(x[0].tolist(), y[0].tolist())
    assert Sign()(Pair.from_points(x, y)).q[0, 0].item() == pytest.approx(float(ref.sign()[0](*k[:3])), abs=1e-15)


def test_sign_of_the_origin_is_zero():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert torch.equal(Sign()(Pair.from_points(x, x)).q, torch.diag(torch.tensor([0.0, 1.0])))


def test_sign_has_no_tangent_kernel():
    with pytest.raises(ValueError, match="Sign has no tangent kernel"):
        Sign().derivative(Pair.from_points(torch.ones(1, 1), torch.ones(1, 1)))


def test_odd_series_keep_full_relative_accuracy_on_both_sides_of_their_threshold():
    t = torch.cat([torch.logspace(-8, 0, 200), torch.linspace(0.9, math.pi, 50)])
    exact_h = [mp.sin(v) - v * mp.cos(v) for v in map(mp.mpf, t.tolist())]
    exact_excess = [v - mp.sin(v) for v in map(mp.mpf, t.tolist())]
    for got, want in ((sine_minus_chord(t), exact_h), (angle_minus_sine(t), exact_excess)):
        errors = [abs(a - b) / b for a, b in zip(got.tolist(), want, strict=True)]
        # At the thresholds 1/2 and 1 the plain differences lose a factor 12 and 6.
        assert max(errors) < 16 * 2.0**-52


def test_duals_are_values():
    for dual in [case[0] for case in CASES.values()] + [Sign()]:
        copy = pickle.loads(pickle.dumps(dual))
        assert copy == dual
        assert hash(copy) == hash(dual)
    assert repr(LeakyRelu(0.2)) == "LeakyRelu(slope=0.2)"
    assert repr(Relu()) == "Relu()"
    assert repr(Cos()) == "Cos()"
    assert repr(Rbf(0.5)) == "Rbf(gamma=0.5)"
    assert LeakyRelu(0.1) != LeakyRelu(0.2)
    assert Erf() != Gelu()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ABRelu(math.inf, 1.0), "a must be finite"),
        (lambda: ABRelu(0.0, math.nan), "b must be finite"),
        (lambda: ABRelu(0.0, 0.0), "must not both be 0"),
        (lambda: LeakyRelu(math.nan), "slope must be finite"),
        (lambda: Sin(math.inf), "c must be finite"),
        (lambda: Rbf(0.0), "gamma must be positive"),
    ],
)
def test_rejects_parameters_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
