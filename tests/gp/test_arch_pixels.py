import subprocess
import sys

import mpmath as mp
import pytest
import torch

from stochproc.gp import arch
from stochproc.gp._arch_average import average, mean_over_pixels
from stochproc.gp._arch_pixels import pairs_of_images
from stochproc.kernels import Pair
from tests.gp import image_reference as reference
from tests.gp.image_reference import images

EPS = torch.finfo(torch.float64).eps
W, B = 1.3, 0.4


# Without cancellation.


def exact_kernels(layers, x, y):
    with mp.workdps(50):
        Z = reference.exact(torch.cat([x, y]).double().numpy())
        K, T = reference.evaluate(layers, *reference.start(Z))
        return K[0, 1], T[0, 1], K[0, 0] + K[1, 1] - 2 * K[0, 1]


def relative(got, want):
    return abs(float(got / want - 1))


def near(distance, kind, dtype):
    x = images(1, 3, 3, 2, dtype=dtype)
    step = x if kind == "brighter" else images(1, 3, 3, 2, seed=1, dtype=dtype)
    return x, x + distance * step


def deep(read_out):
    convs = [arch.Conv(W, B), arch.Relu(), *[arch.Conv(W, B, padding="circular"), arch.Relu()] * 2]
    with mp.workdps(50):
        w2, b2 = (mp.mpf(getattr(convs[0], name).item()) ** 2 for name in ("w_std", "b_std"))
    inner = [reference.conv(w2, b2, padding="circular"), reference.relu] * 2
    layers = [reference.conv(w2, b2), reference.relu, *inner]
    if read_out == "flatten":
        return arch.serial(*convs, arch.Flatten()), [*layers, reference.flatten]
    return arch.serial(*convs, arch.GlobalAvgPool()), [*layers, reference.global_avg_pool]


@pytest.mark.parametrize("kind", ["other", "brighter"])
@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-6])
def test_kernels_and_distances_of_near_images_keep_their_digits(distance, kind):
    x, y = near(distance, kind, torch.float64)
    net, layers = deep("flatten")
    K, T, sq = exact_kernels(layers, x, y)
    state = net.kernel(pairs_of_images(x, y, pairs=False, tangent=True))
    assert relative(state.pair.q.item(), K) < 1e-13
    assert relative(state.ntk.item(), T) < 1e-12
    # Relative to the distance itself, which is 1e-13 of the variance: no convolution subtracted.
    assert relative(state.pair.sqdist.item(), sq) < 1e-13


@pytest.mark.parametrize("distance", [1.0, 1e-6])
def test_float32_keeps_what_it_can_hold(distance):
    x, y = near(distance, "other", torch.float32)
    net, layers = deep("flatten")
    K, T, sq = exact_kernels(layers, x, y)
    state = net.kernel(pairs_of_images(x, y, pairs=False, tangent=True))
    assert state.pair.A.dtype == torch.float32
    assert relative(state.pair.q.item(), K) < 1e-6
    assert relative(state.ntk.item(), T) < 1e-6
    assert relative(state.pair.sqdist.item(), sq) < 1e-5


@pytest.mark.parametrize("distance", [1.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pooled_kernels_of_near_images_keep_their_digits(distance, dtype):
    x, y = near(distance, "other", dtype)
    net, layers = deep("pool")
    K, T, _ = exact_kernels(layers, x, y)
    got_K, got_T = net.nngp_ntk(x, y)
    assert got_K.dtype == dtype
    # Pairs of pixels are float64; one rounding to the dtype comes at the end.
    assert relative(got_K.item(), K) < 1e-13 + torch.finfo(dtype).eps
    assert relative(got_T.item(), T) < 1e-12 + torch.finfo(dtype).eps


def test_a_rectifier_behind_pooling_costs_digits_of_the_tangent_kernel_only_as_documented():
    x, y = near(1e-6, "other", torch.float64)
    conv = [arch.Conv(W, B), arch.Relu(), arch.AvgPool(2), arch.Conv(W, B, size=1), arch.Relu(), arch.Flatten()]
    with mp.workdps(50):
        w2, b2 = (mp.mpf(getattr(conv[0], name).item()) ** 2 for name in ("w_std", "b_std"))
    layers = [reference.conv(w2, b2), reference.relu, reference.avg_pool(2), reference.conv(w2, b2, 1), reference.relu]
    K, T, _ = exact_kernels([*layers, reference.flatten], x, y)
    got_K, got_T = arch.serial(*conv).nngp_ntk(x, y)
    assert relative(got_K.item(), K) < 1e-13
    assert relative(got_T.item(), T) < 1e-8


@pytest.mark.parametrize("distance", [1.0, 1e-6, 0.0])
def test_the_average_of_two_kernels_is_their_sum_by_halves(distance):
    x, y = images(5, 3), images(4, 3, seed=1)
    parts = [Pair.from_points(x, x[:4] + distance * y), Pair.from_points(2 * x.cos(), 2 * (x[:4] + distance * y).cos())]
    got, want = average(parts), parts[0].plus(parts[1]).affine(0.5, 0.0)
    for name in Pair._fields:
        # Both are within a few roundings of the distance; D cancels between the two summands.
        size = getattr(want, name).abs()
        atol = 8 * EPS * (want.sqdist.sqrt() if name == "D" else want.sqdist)
        assert bool(((getattr(got, name) - getattr(want, name)).abs() <= atol + 8 * EPS * size).all()), name


def test_the_mean_over_an_axis_is_the_average_of_its_entries():
    pair = Pair.from_points(images(4, 5, 3), images(4, 2, 3, seed=1))
    got = mean_over_pixels(Pair(*(t.movedim(0, -1) for t in pair)))
    want = average([Pair(*(t[i] for t in pair)) for i in range(4)])
    for name in Pair._fields:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-14, atol=1e-15)


def test_black_pixels_and_black_images_are_at_the_origin():
    x = images(3, 4, 4, 1)
    x[0] = 0
    x[1, :2] = 0
    x.requires_grad_()
    for net in (arch.cnn(2, b_std=0.0), arch.cnn(2, pool=True, b_std=0.0)):
        K = net.nngp(x)
        assert torch.equal(K[0], torch.zeros(3))
        (gradient,) = torch.autograd.grad(K.sum(), x)
        assert bool(gradient.isfinite().all())


# Gradients.


@pytest.mark.parametrize(
    "net",
    [
        arch.serial(arch.Conv(W, B, size=2), arch.Erf(), arch.Flatten(), arch.Dense(W)),
        arch.serial(arch.Conv(W, B, stride=2), arch.Gelu(), arch.GlobalAvgPool(), arch.Dense(W)),
        arch.serial(arch.Conv(W, B, padding="circular"), arch.Relu(), arch.AvgPool(2), arch.Relu(), arch.Flatten()),
        arch.serial(arch.Conv(W), arch.Relu(), arch.Conv(W, B), arch.Flatten()),
    ],
    ids=["flat", "pool", "avg", "no-bias"],
)
def test_gradients_are_those_of_differences(net):
    x, y = (images(n, 3, 3, 1, seed=n).requires_grad_() for n in (2, 1))
    assert torch.autograd.gradcheck(lambda x, y, *_: net.nngp(x, y), (x, y, *net.parameters()), atol=1e-8)
    # One direction is enough for the diagonal, which is the rest of a matrix of one set.
    assert torch.autograd.gradcheck(lambda x, *_: net.nngp(x), (x, *net.parameters()), atol=1e-6, fast_mode=True)


def test_the_tangent_kernel_has_gradients():
    net = arch.serial(arch.Conv(W, B), arch.Erf(), arch.GlobalAvgPool(), arch.Dense(W))
    x, y = (images(1, 3, 3, 1, seed=s).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda x, y, *_: net.ntk(x, y), (x, y, *net.parameters()), atol=1e-8)


def test_second_derivatives_of_a_smooth_network_are_those_of_differences():
    net = arch.serial(arch.Conv(W, B), arch.Erf(), arch.Flatten())
    x, y = (images(1, 2, 2, 1, seed=s).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradgradcheck(lambda x, y: net.nngp(x, y), (x, y), atol=1e-7)


# Memory.


@pytest.mark.slow
def test_pairs_of_pixels_are_never_held_whole():
    # In a process of its own, since the largest resident size is a property of the process.
    code = """
import resource, torch
from stochproc.gp import ScaleMixtureGPRegressor, arch
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
net = arch.cnn(1, pool=True, size=1)
for n in (20, 20, 60):
    x = torch.randn(n, 8, 8, 1, dtype=torch.float64, requires_grad=True)
    net.nngp(x).sum().backward()
    net.diag(x.repeat(10, 1, 1, 1)).sum().backward()
    print(peak())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    _, small, large = map(float, done.stdout.split())
    # One array of all pairs of pixels of 60 images is 118 MB, of 600 images with themselves 20 MB, and a gradient
    # would keep some ten of them.
    assert large - small < 60, "extra memory in MB"
