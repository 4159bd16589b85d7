import pickle

import numpy as np
import pytest
import torch

from stochproc.exceptions import ArchitectureError
from stochproc.gp import ScaleMixtureGPRegressor, arch
from stochproc.gp._arch_pixels import pairs_of_images
from tests.gp import image_reference as reference
from tests.gp.image_reference import images

EPS = torch.finfo(torch.float64).eps
W, B = 1.3, 0.4
# w_std and b_std are stored as logarithms, so the variances are those after exp(log(.)).
W2, B2 = arch.Conv(W, B).w_std.item() ** 2, arch.Conv(W, B).b_std.item() ** 2


def check_against_loops(net, layers, x, y):
    K, T = net.nngp_ntk(x, y)
    whole = reference.evaluate(layers, *reference.start(torch.cat([x, y]).numpy()))
    for got, want, diagonal in zip((K, T), whole, (net.diag(x), net.ntk_diag(x)), strict=True):
        torch.testing.assert_close(got.detach(), torch.as_tensor(want[: len(x), len(x) :]), rtol=1e-12, atol=1e-14)
        own = torch.as_tensor(want.diagonal()[: len(x)].copy())
        torch.testing.assert_close(diagonal.detach(), own, rtol=1e-12, atol=1e-14)


# Against explicit loops over pixels and filter offsets.


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["zero", "circular", "valid"])
@pytest.mark.parametrize("pool", [False, True])
def test_a_convolution_is_the_mean_over_filter_offsets(padding, stride, pool):
    conv = arch.Conv(W, B, stride=stride, padding=padding)
    last = arch.GlobalAvgPool() if pool else arch.Flatten()
    net = arch.serial(conv, arch.Relu(), conv if padding != "valid" else arch.Conv(W, B, size=1), arch.Relu(), last)
    second = reference.conv(W2, B2, 3, stride, padding) if padding != "valid" else reference.conv(W2, B2, 1)
    end = reference.global_avg_pool if pool else reference.flatten
    layers = [reference.conv(W2, B2, 3, stride, padding), reference.relu, second, reference.relu, end]
    check_against_loops(net, layers, images(3, 5, 4, 2), images(2, 5, 4, 2, seed=1))


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_filters_of_any_size_are_placed_as_in_a_finite_network(size):
    net = arch.serial(arch.Conv(W, B, size=size), arch.Relu(), arch.Flatten())
    layers = [reference.conv(W2, B2, size), reference.relu, reference.flatten]
    check_against_loops(net, layers, images(2, 5, 5, 1), images(2, 5, 5, 1, seed=1))


def test_an_operator_takes_images_as_rows():
    net, X = arch.cnn(1), images(3, 2, 2, 1)
    with pytest.raises(ArchitectureError, match=r"takes rows of numbers.*begin with Image\(height, width, channels\)"):
        net.lazy(X)
    got = arch.serial(arch.Image(2, 2), net).lazy(X.flatten(1)) @ torch.eye(3)
    torch.testing.assert_close(got, net.nngp(X))


@pytest.mark.parametrize("pool", [False, True])
def test_a_filter_may_reach_beyond_both_edges(pool):
    last, end = (arch.GlobalAvgPool(), reference.global_avg_pool) if pool else (arch.Flatten(), reference.flatten)
    net = arch.serial(arch.Conv(W, B, size=7), arch.Relu(), last)
    layers = [reference.conv(W2, B2, 7), reference.relu, end]
    check_against_loops(net, layers, images(2, 2, 1, 1), images(2, 2, 1, 1, seed=1))


def test_blocks_of_pixels_are_averaged_over_the_pixels_of_both_images():
    net = arch.serial(
        arch.Conv(W, B),
        arch.Relu(),
        arch.AvgPool(2),
        arch.Conv(W, B),
        arch.Relu(),
        arch.AvgPool(3),
        arch.Relu(),
        arch.Flatten(),
    )
    conv = reference.conv(W2, B2)
    layers = [conv, reference.relu, reference.avg_pool(2), conv, reference.relu, reference.avg_pool(3), reference.relu]
    check_against_loops(net, [*layers, reference.flatten], images(2, 7, 6, 2), images(1, 7, 6, 2, seed=1))


@pytest.mark.parametrize("pool", [False, True])
def test_a_wide_resnet_is_its_blocks_with_strided_shortcuts(pool):
    net = arch.wide_resnet(1, pool=pool, w_std=W, b_std=B)

    def block(stride):
        main = [reference.relu, reference.conv(W2, B2, 3, stride), reference.relu, reference.conv(W2, B2)]
        short = reference.conv(W2, B2, 1, stride)

        def layer(K, T):
            (K1, T1), (K2, T2) = short(K, T), reference.evaluate(main, K, T)
            return K1 + K2, T1 + T2

        return layer

    end = reference.global_avg_pool if pool else reference.flatten
    layers = [reference.conv(W2, B2), block(1), block(2), block(2), reference.relu, end, reference.dense(1)]
    check_against_loops(net, layers, images(2, 5, 6, 2), images(1, 5, 6, 2, seed=1))


@pytest.mark.parametrize("pool", [False, True])
def test_a_residual_block_adds_the_kernels_of_its_branches(pool):
    end = [arch.GlobalAvgPool() if pool else arch.Flatten(), arch.Dense(2.0, 1.0)]
    net = arch.serial(
        arch.Conv(W, B), arch.residual(arch.Relu(), arch.Conv(W, B, padding="circular")), arch.Relu(), *end
    )
    inner = reference.residual(reference.relu, reference.conv(W2, B2, padding="circular"))
    layers = [reference.conv(W2, B2), inner, reference.relu, reference.global_avg_pool if pool else reference.flatten]
    check_against_loops(net, [*layers, reference.dense(4, 1)], images(3, 4, 4, 1), images(2, 4, 4, 1, seed=1))


# One matrix.


@pytest.mark.parametrize("net", [arch.cnn(2), arch.cnn(2, pool=True), arch.wide_resnet(1)], ids=["flat", "pool", "res"])
def test_the_diagonal_of_the_matrix_is_that_of_single_images_bit_for_bit(net):
    x = images(5, 4, 4, 2)
    for K, diagonal in zip(net.nngp_ntk(x), (net.diag(x), net.ntk_diag(x)), strict=True):
        assert torch.equal(K.diagonal(), diagonal)
        # That of two copies differs by rounding only.
    torch.testing.assert_close(net.nngp(x, x.clone().requires_grad_()), net.nngp(x), rtol=1e-13, atol=0)


@pytest.mark.parametrize("pool", [False, True])
def test_kernel_matrices_are_symmetric_and_positive(pool):
    x = images(12, 4, 4, 1)
    for K in arch.cnn(2, pool=pool, padding="circular").nngp_ntk(x):
        assert torch.equal(K, K.mT)
        values = torch.linalg.eigvalsh(K)
        assert values[0] > -1e-12 * values[-1]


def test_pooling_makes_the_kernel_blind_to_circular_shifts():
    x, y = images(2, 5, 5, 2), images(2, 5, 5, 2, seed=1)
    net = arch.cnn(2, pool=True, padding="circular")
    torch.testing.assert_close(net.nngp(x, y.roll((2, 1), (1, 2))), net.nngp(x, y), rtol=1e-13, atol=0)


def test_one_pixel_is_a_vector():
    x, y = images(3, 1, 1, 4), images(2, 1, 1, 4, seed=1)
    dense = arch.mlp(2, w_std=W, b_std=B)
    for net in (arch.cnn(2, size=1, w_std=W, b_std=B), arch.cnn(2, pool=True, size=1, w_std=W, b_std=B)):
        for got, want in zip(net.nngp_ntk(x, y), dense.nngp_ntk(x[:, 0, 0], y[:, 0, 0]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_dropout_in_front_of_pooling_acts_on_each_pixel_of_each_image():
    # Different images are dropped independently: means over windows of features with more variance and no more
    # covariance, so behind a linear pooling the kernel of two images is as without dropout.
    x = images(3, 4, 4, 2)
    with_dropout = arch.serial(arch.Conv(W, B), arch.Relu(), arch.Dropout(0.5), arch.AvgPool(2), arch.Flatten())
    without = arch.serial(arch.Conv(W, B), arch.Relu(), arch.AvgPool(2), arch.Flatten())
    K, plain = with_dropout.nngp(x), without.nngp(x)
    off = ~torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(K[off], plain[off], rtol=1e-13, atol=0)
    # Within an image a pixel gains q (1/keep - 1), of which the mean over a window of 4 keeps a quarter.
    equal = arch.serial(arch.Conv(W, B), arch.Relu(), arch.Flatten()).diag(x)
    torch.testing.assert_close(K.diagonal(), plain.diagonal() + equal / 4, rtol=1e-13, atol=0)
    # A rectifier behind needs the norm behind the pooling, which sees that.
    deep_diag = arch.serial(*with_dropout.parts[:-1], arch.Relu(), arch.Flatten())
    torch.testing.assert_close(deep_diag.diag(x), K.diagonal() / 2, rtol=1e-13, atol=0)
    r = pairs_of_images(x, x[:1], pairs=True, tangent=False)
    torch.testing.assert_close(with_dropout.kernel(r).pair.r1[:, 0].square(), K.diagonal(), rtol=1e-13, atol=0)


# Rows, shapes, errors.


def test_rows_are_images_with_the_channels_of_a_pixel_side_by_side():
    x, y = images(3, 4, 5, 2), images(2, 4, 5, 2, seed=1)
    net, rows = arch.cnn(2), arch.cnn(2, image_shape=(4, 5, 2))
    for got, want in zip(rows.nngp_ntk(x.flatten(1), y.flatten(1)), net.nngp_ntk(x, y), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(rows.diag(x.flatten(1)), net.diag(x))
    K = rows.nngp(x.flatten(1).requires_grad_())
    assert torch.equal(K.diagonal(), net.diag(x))
    assert torch.equal(rows.nngp(x), net.nngp(x))


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_kernels_and_estimators_take_rows_of_images(kind):
    net = arch.cnn(1, image_shape=(4, 4, 1))
    x, y = images(6, 16), images(3, 16, seed=1)
    kernel = arch.NetworkKernel(net, kind)
    want = getattr(net, kind)(x, y)
    torch.testing.assert_close(kernel(x, y), want, rtol=1e-13, atol=0)
    torch.testing.assert_close(kernel.diag(x), getattr(net, kind)(x).diagonal(), rtol=1e-13, atol=0)
    v = images(3, 2, seed=2)
    torch.testing.assert_close(kernel.operator(x, y, backend="chunked") @ v, want @ v, rtol=1e-12, atol=1e-13)
    model = ScaleMixtureGPRegressor(
        kernel=kernel, noise=0.1, scale_prior="delta", mean="zero", normalize_X=False, normalize_y=False, optimizer=None
    )
    target = images(6, seed=3)
    model.fit(x.numpy(), target.numpy())
    gram = getattr(net, kind)(x).detach() + 0.1 * torch.eye(6)
    mean = want.detach().mT @ torch.linalg.solve(gram, target)
    np.testing.assert_allclose(model.predict(y.numpy()), mean.numpy(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda: [arch.Dense(), arch.Flatten(), arch.Relu(), arch.Flatten()], "Flatten acts on images; got vectors"),
        (lambda: [arch.Image(4, 4), arch.Conv(size=5, padding="valid"), arch.Flatten()], "does not fit into 4 pixels"),
        (lambda: [arch.Image(4, 4), arch.Conv(size=11, padding="circular"), arch.Flatten()], "more than once"),
        (
            lambda: [arch.Image(4, 4), arch.AvgPool(5), arch.Flatten()],
            r"AvgPool\(size=\(5, 5\)\) does not fit into 4x4",
        ),
        (lambda: [arch.Conv(), arch.residual(arch.Conv(stride=2)), arch.Flatten()], "must have the same pixels"),
        (lambda: [arch.branches(arch.Flatten(), arch.Conv())], "must have the same pixels"),
    ],
)
def test_layers_that_do_not_fit_are_named_at_construction(layers, message):
    with pytest.raises(ArchitectureError, match=message):
        arch.serial(*layers())


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (arch.cnn(1), (3, 8), "images"),
        (arch.cnn(1, size=5, padding="valid"), (3, 4, 4, 1), "does not fit into 4 pixels"),
        (arch.serial(arch.Conv(), arch.Relu()), (3, 4, 4, 1), "put Flatten or GlobalAvgPool"),
        (arch.cnn(1, image_shape=(4, 4, 1)), (3, 15), r"Image\(4, 4, 1\) needs rows of 16 numbers"),
        (arch.cnn(1, image_shape=(4, 4, 1)), (3, 4, 5, 1), r"Image\(4, 4, 1\)"),
    ],
)
def test_images_that_do_not_fit_are_refused_at_the_call(net, shape, message):
    with pytest.raises(ArchitectureError, match=message):
        net.nngp(torch.zeros(shape))
    with pytest.raises(ArchitectureError, match=message):
        net.diag(torch.zeros(shape))


def test_an_image_is_made_of_inputs_only():
    net = arch.serial(arch.Image(2, 2), arch.Conv(), arch.Flatten(), arch.Image(1, 1), arch.Flatten())
    with pytest.raises(ArchitectureError, match=r"Image\(1, 1, 1\) must be the first layer"):
        net.nngp(torch.ones(3, 4))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: arch.Conv(size=0), ValueError, "size must be at least 1; got 0"),
        (lambda: arch.Conv(size=2.0), TypeError, "size must be an integer"),
        (lambda: arch.Conv(size=(1, 2, 3)), ValueError, "size must be one integer or two"),
        (lambda: arch.Conv(stride=-1), ValueError, "stride must be at least 1; got -1"),
        (
            lambda: arch.Conv(padding="reflect"),
            ValueError,
            "padding must be one of 'zero', 'same', 'circular', 'valid'",
        ),
        (lambda: arch.Conv(w_std=0.0), ValueError, "w_std must be positive"),
        (lambda: arch.AvgPool(0), ValueError, "size must be at least 1; got 0"),
        (lambda: arch.Image(0, 3), ValueError, "height must be at least 1; got 0"),
        (lambda: arch.cnn(0), ValueError, "depth must be at least 1; got 0"),
        (lambda: arch.cnn(1, activation="tanhh"), ArchitectureError, "unknown activation 'tanhh'"),
        (lambda: arch.wide_resnet(0), ValueError, "block_size must be at least 1; got 0"),
    ],
)
def test_arguments_out_of_range_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_tied_convolutions_share_their_parameters():
    assert len(list(arch.cnn(3).parameters())) == 3
    assert len(list(arch.cnn(3, tie=False).parameters())) == 7
    # Kinds of convolution: 3x3 and 1x1, with stride 1 and 2.
    assert len(list(arch.wide_resnet(2).parameters())) == 2 * 4 + 1
    assert len(list(arch.wide_resnet(2, tie=False).parameters())) == 2 * (1 + 3 * (2 * 2 + 1)) + 1


@pytest.mark.parametrize(
    "net",
    [
        arch.cnn(1, pool=True, image_shape=(4, 4, 1), size=(2, 3), padding="valid"),
        arch.serial(arch.Image(4, 4), arch.Conv(stride=(2, 1)), arch.AvgPool(2), arch.Flatten()),
        arch.wide_resnet(1, image_shape=(4, 4, 1)),
    ],
)
def test_networks_on_images_come_back_from_names_and_numbers(net):
    again = arch.from_config(net.config())
    x = images(3, 16)
    assert again.config() == net.config()
    torch.testing.assert_close(again.nngp(x), net.nngp(x), rtol=1e-13, atol=0)
    assert torch.equal(pickle.loads(pickle.dumps(net)).nngp(x), net.nngp(x))


def test_images_of_one_colour_have_the_kernel_of_the_colours():
    # With circular padding every pair of pixels has the kernel of the dense network on the two colours.
    c, d = images(1, 3), images(1, 3, seed=1)
    x, y = (z[:, None, None].expand(1, 4, 3, 3) for z in (c, d))
    want = arch.mlp(2, w_std=W, b_std=B).nngp_ntk(c, d)
    for pool in (False, True):
        got = arch.cnn(2, pool, padding="circular", w_std=W, b_std=B).nngp_ntk(x, y)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
