import math
import re

import numpy as np
import pytest
import torch

from stochproc.gp import _arch_evaluate, _arch_rectified, arch
from stochproc.gp._arch_base import KernelState
from stochproc.kernels import Pair
from tests.gp import arch_reference as ref

ACTIVATIONS = {
    "relu": arch.Relu,
    "leaky": lambda: arch.LeakyRelu(0.2),
    "abs": arch.Abs,
    "abrelu": lambda: arch.ABRelu(-0.5, 2.0),
    "erf": arch.Erf,
    "gelu": arch.Gelu,
    "sin": arch.Sin,
    "sin_0.7": lambda: arch.Sin(0.7),
    "cos": arch.Cos,
    "rbf": lambda: arch.Rbf(0.5),
}
SMOOTH = ["erf", "gelu", "sin", "cos", "rbf"]
every = pytest.mark.parametrize("name", ACTIVATIONS)


def deep(name, depth, w_std=1.4, b_std=0.2):
    return arch.mlp(depth, ACTIVATIONS[name](), w_std=w_std, b_std=b_std)


def points_at(distance, gen, d=5):
    """Two random directions, the radial one and the one along which the norm stays."""
    x = torch.randn(4, d, generator=gen)
    step = torch.randn(4, d, generator=gen)
    step[2] = x[2]
    step[3] -= (step[3] @ x[3]) / (x[3] @ x[3]) * x[3]
    return x, x + distance * step / step.norm(dim=-1, keepdim=True)


def worst_errors(net, x, y):
    """Largest errors of covariance and tangent kernel over the pairs, relative to the values.

    A covariance smaller than a tenth of the norms is judged by that: it is a difference of larger terms.
    """
    K, T = (t.diagonal().tolist() for t in net.nngp_ntk(x, y))
    worst = [0.0, 0.0]
    for i in range(len(x)):
        k = ref.kernels(net, x[i], y[i])
        n = math.sqrt(k.q11 * k.q22)
        errors = abs(K[i] - k.q12) / max(abs(k.q12), n / 10), abs(T[i] - k.ntk) / abs(k.ntk)
        worst = [max(a, float(b)) for a, b in zip(worst, errors, strict=True)]
    return worst


@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("depth", [20])
@every
def test_kernels_in_float64_equal_50_digits(gen, name, depth, distance):
    nngp, ntk = worst_errors(deep(name, depth), *points_at(distance, gen))
    # A handful of roundings a layer.
    assert nngp < 1e-13
    assert ntk < 1e-12


@pytest.mark.parametrize("distance", [1.0, 1e-6])
@pytest.mark.parametrize("depth", [10])
@every
def test_kernels_in_float32_equal_50_digits(gen, name, depth, distance):
    x, y = (p.float() for p in points_at(distance, gen))
    nngp, ntk = worst_errors(deep(name, depth), x, y)
    assert nngp < 1e-6
    assert ntk < 1e-6


@every
def test_the_drop_towards_a_close_point_keeps_five_digits_in_float32(gen, name):
    x, y = (p.float() for p in points_at(1e-6, gen))
    net = deep(name, 5)
    pair = net.kernel(KernelState(Pair.from_points(x, y).affine(1 / 5, 0.0))).pair
    r1, D, A = (torch.broadcast_to(t, (4, 4)).diagonal().double() for t in (pair.r1, pair.D, pair.A))
    for i in range(4):
        k = ref.kernels(net, x[i], y[i])
        drop = float(k.q11 - k.q12)
        parts = float(k.q11 - ref.mp.sqrt(k.q11 * k.q22)), float(k.defect)
        # The drop is held to a rounding of the larger of its two parts.
        assert abs((r1 * D + A)[i].item() - drop) < 1e-5 * max(abs(drop), max(map(abs, parts)) / 10)


def residual_nets():
    dense, relu = arch.Dense(1.4, 0.3), arch.Relu()
    return {
        "resmlp": arch.resmlp(3, w_std=1.2, b_std=0.1),
        "untied": arch.resmlp(2, "erf", tie=False),
        "branches": arch.serial(
            dense,
            arch.branches(arch.serial(relu, arch.Dense(0.7, 0.2)), arch.serial(arch.Gelu(), arch.Dense(1.1))),
            relu,
            arch.Dense(1.0),
        ),
        "norm": arch.serial(dense, arch.LayerNorm(1e-3), relu, arch.LayerNorm(), arch.Erf(), arch.Scale(0.4)),
        "two in a row": arch.serial(dense, relu, arch.Sin(), arch.Identity(), dense),
        "chain": arch.serial(relu, arch.Scale(1.5), dense, arch.Abs(), arch.LeakyRelu(0.3), arch.Dense(0.8, 0.5)),
        "no bias": arch.mlp(3, b_std=0),
        "begins with bias": arch.mlp(3, "leakyrelu", b_std=0.3, tie=False),
        "sign": arch.serial(dense, arch.Sign(), arch.Dense(2.0)),
    }


@pytest.mark.parametrize("distance", [1.0, 1e-3])
@pytest.mark.parametrize("name", residual_nets())
def test_compositions_equal_the_plain_recursion(gen, name, distance):
    net = residual_nets()[name]
    x, y = points_at(distance, gen)
    if name == "sign":
        K = net.nngp(x, y).diagonal()

        angle = arch.Dense(1.4, 0.3).nngp(torch.cat([x, y]))
        cos = angle[:4, 4:].diagonal() / (angle.diagonal()[:4] * angle.diagonal()[4:]).sqrt()
        # The arccosine of a cosine near 1 has lost half of the digits.
        torch.testing.assert_close(K, 4 * (1 - 2 / math.pi * cos.clamp(max=1).acos()), atol=1e-7, rtol=1e-7)
        return
    nngp, ntk = worst_errors(net, x, y)
    assert nngp < 1e-13
    assert ntk < 1e-12


def mixed_points(gen):
    """Points with one at zero and, among the second ones, a copy, an opposite and a multiple of a first one."""
    x, y = torch.randn(7, 3, generator=gen), torch.randn(6, 3, generator=gen)
    x[0] = 0
    y[0], y[1], y[2], y[3] = 0, x[1], -x[2], 3 * x[3]
    return x, y


CHAINS = ["chain", "no bias", "begins with bias"]


def kernels_by_layers(monkeypatch, *args):
    with monkeypatch.context() as patch:
        patch.setattr(_arch_rectified, "plan", lambda *_: None)
        return args[0].nngp_ntk(*args[1:])


@pytest.mark.parametrize("name", CHAINS)
def test_the_fast_chain_equals_the_layers_one_by_one(gen, monkeypatch, name):
    net, (x, y) = residual_nets()[name], mixed_points(gen)
    if name != "begins with bias":
        x, y = x[1:], y[1:]
    assert _arch_rectified.plan(net, x, y) is not None
    for second in (y, None):
        fast = net.nngp_ntk(x, second)
        slow = kernels_by_layers(monkeypatch, net, x, second)
        # Both are wrong by some roundings of the norms.
        torch.testing.assert_close(fast, slow, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_gradients_of_the_fast_chain_equal_autograd(gen, monkeypatch, name, same):
    # Without a first bias the kernel has a kink at zero, which the chain leaves to the layers.
    net, (x, y) = residual_nets()[name], [p[name != "begins with bias" :] for p in mixed_points(gen)]
    assert _arch_rectified.plan(net, x, y) is not None
    weight = torch.randn(len(x), len(x if same else y), generator=gen)

    def gradients():
        leaves = [p.clone().requires_grad_() for p in ((x,) if same else (x, y))]
        return torch.autograd.grad((net.nngp(*leaves) * weight).sum(), [*leaves, *net.parameters()])

    fast = gradients()
    monkeypatch.setattr(_arch_rectified, "plan", lambda *_: None)
    slow = gradients()
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)


def test_extreme_norms_take_the_slow_way_and_stay_finite(gen):
    x = torch.randn(5, 2, generator=gen) * 1e60
    assert _arch_rectified.plan(arch.mlp(2), x, x) is None
    K = arch.mlp(2).nngp(x)
    assert K.isfinite().all()
    torch.testing.assert_close(K / 1e120, arch.mlp(2, b_std=0).nngp(x / 1e60))


@pytest.mark.parametrize("name", ["relu", "erf"])
@pytest.mark.parametrize(
    ("value", "dtype", "limit"),
    [
        (1e160, torch.float64, "1e+150"),
        (1e25, torch.float32, "1e+18"),
        (math.nan, torch.float64, "1e+150"),
        (-math.inf, torch.float32, "1e+18"),
    ],
)
def test_points_whose_squares_do_not_fit_are_refused_not_turned_into_nan(name, value, dtype, limit):
    net, x = arch.mlp(1, name), torch.ones(3, 2, dtype=dtype)
    bad = x.clone()
    bad[1, 1] = value
    said = re.escape(f"must be finite, of at most {limit} in size; got {bad.abs().max().item():.3g}")
    for ask in (net.nngp, net.ntk, net.diag, lambda points: net.lazy(points) @ x[:, :1]):
        with pytest.raises(ValueError, match="X1? " + said):
            ask(bad)
    with pytest.raises(ValueError, match="X2 " + said):
        net.nngp(x, bad)


class Kernels(torch.nn.Module):
    """Kernels as a forward pass, so that functional_call can replace the parameters."""

    def __init__(self, net, kind):
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x, y=None):
        return getattr(self.net, self.kind)(x, y)


def function_of(net, kind, same):
    module = Kernels(net, kind)
    names = [n for n, _ in module.named_parameters()]

    def function(x, y, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, parameters, (x,) if same else (x, y))

    return function, [p.detach().clone().requires_grad_() for p in module.parameters()]


@pytest.mark.parametrize("same", [False, True])
@every
def test_gradients_hold_at_coincident_points_too(gen, name, same):
    function, values = function_of(deep(name, 2), "nngp", same)
    x = torch.randn(3, 2, generator=gen)
    x[2] = x[1]
    y = torch.cat([x[:1], torch.randn(1, 2, generator=gen)])
    assert torch.autograd.gradcheck(function, [x.requires_grad_(), y.requires_grad_(not same), *values])


@every
def test_gradients_of_the_tangent_kernel_hold_at_distinct_points(gen, name):
    function, values = function_of(deep(name, 2), "ntk", False)
    x, y = torch.randn(3, 2, generator=gen), torch.randn(2, 2, generator=gen)
    assert torch.autograd.gradcheck(function, [x.requires_grad_(), y.requires_grad_(), *values])


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_networks_have_second_derivatives(gen, name, same):
    function, values = function_of(deep(name, 1), "nngp", same)
    x, y = torch.randn(2, 2, generator=gen), torch.randn(2, 2, generator=gen)
    assert torch.autograd.gradgradcheck(function, [x.requires_grad_(), y.requires_grad_(not same), *values])


@every
def test_matrices_are_symmetric_positive_semidefinite_with_the_diagonal_of_points(gen, name):
    net, X = deep(name, 3), torch.randn(60, 3, generator=gen)
    X[1] = X[0]
    with torch.no_grad():
        for matrix, diagonal in zip(net.nngp_ntk(X), (net.diag(X), net.ntk_diag(X)), strict=True):
            assert torch.equal(matrix, matrix.mT)
            assert torch.equal(matrix.diagonal(), diagonal)
            values = torch.linalg.eigvalsh(matrix)
            assert values[0] >= -1e-12 * values[-1]
        assert torch.equal(net.nngp(X, X.clone()), net.nngp(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_diagonal_is_kept_bit_for_bit_under_gradients(gen, dtype):
    net, X = arch.resmlp(2, "gelu"), torch.randn(9, 3, generator=gen).to(dtype)
    assert torch.equal(net.nngp(X).diagonal(), net.diag(X))
    assert net.nngp(X).dtype == net.diag(X).dtype == dtype


@pytest.mark.parametrize("net", [arch.mlp(2), arch.mlp(2, "erf")], ids=["chain", "layers"])
def test_tiles_change_nothing_but_memory(gen, monkeypatch, net):
    X, Y = torch.randn(23, 3, generator=gen), torch.randn(11, 3, generator=gen)
    weight = torch.randn(23, 23, generator=gen)

    def everything():
        x = X.clone().requires_grad_()
        K = net.nngp(x)
        return (K.detach(), net.ntk(X, Y), *torch.autograd.grad((K * weight).sum(), [x, *net.parameters()]))

    whole = everything()
    monkeypatch.setitem(_arch_evaluate._TILE, "cpu", 50)
    torch.testing.assert_close(everything(), whole, rtol=1e-12, atol=1e-12)


def test_batches_are_batches(gen):
    net = arch.mlp(2, "erf")
    X, Y = torch.randn(3, 1, 5, 2, generator=gen), torch.randn(4, 6, 2, generator=gen)
    K = net.nngp(X, Y)
    assert K.shape == (3, 4, 5, 6)
    torch.testing.assert_close(K[1, 2], net.nngp(X[1, 0], Y[2]))
    assert net.diag(X).shape == (3, 1, 5)


def test_dropout_raises_the_diagonal_alone(gen):
    X = torch.randn(5, 3, generator=gen)
    X[1] = X[0]
    plain = arch.serial(arch.Dense(1.2, 0.3), arch.Erf(), arch.Dense(0.9))
    dropped = arch.serial(arch.Dense(1.2, 0.3), arch.Erf(), arch.Dropout(0.8), arch.Dense(0.9))
    apart = ~torch.eye(5, dtype=torch.bool)
    for a, b in zip(dropped.nngp_ntk(X), plain.nngp_ntk(X), strict=True):
        torch.testing.assert_close(a[apart], b[apart])
    torch.testing.assert_close(dropped.nngp(X).diagonal(), plain.nngp(X).diagonal() / 0.8)
    assert torch.equal(dropped.nngp(X).diagonal(), dropped.diag(X))
    # After the layer that follows the variance stands in the norms, so that a nonlinearity sees smaller angles.
    deeper = arch.serial(dropped, arch.Relu())
    r = dropped.diag(X).sqrt()
    angle = (dropped.nngp(X) / r[:, None] / r)[0, 1].acos()
    expected = r[0] * r[1] * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    torch.testing.assert_close(deeper.nngp(X)[0, 1], expected)


def test_numeric_agrees_with_the_closed_form(gen):
    X = torch.randn(4, 2, generator=gen)
    exact = arch.serial(arch.Dense(0.8, 0.2), arch.Erf(), arch.Dense())
    numeric = arch.serial(arch.Dense(0.8, 0.2), arch.Numeric(torch.erf), arch.Dense())
    # Quadrature with 180 nodes of a smooth function of variance below 1.
    torch.testing.assert_close(numeric.nngp_ntk(X), exact.nngp_ntk(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in arch.ACTIVATION_NAMES if n != "sign"])
def test_each_activation_has_its_function(name):
    layer = arch.mlp(1, name).parts[1]
    z, w = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(150))
    mean_square = (w * layer.function(0.6 * z).square()).sum() / math.sqrt(2 * math.pi)
    # Plain Hermite nodes are good to 1e-3 at a kink and exact without.
    tolerance = 2e-3 if name in ("relu", "leakyrelu", "abs") else 1e-12
    torch.testing.assert_close(layer.dual.diag(torch.tensor(0.36)), mean_square, rtol=tolerance, atol=0.0)
