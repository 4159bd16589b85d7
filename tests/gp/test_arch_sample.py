import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from stochproc.exceptions import ArchitectureError
from stochproc.gp import Delta, InverseGamma, arch
from tests.gp.image_reference import padding_of

W, B = 1.3, 0.4


def points(*shape, seed=0):
    # Drawn at import, where the default dtype is not yet that of the tests.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(net, width, seeds, X, **options):
    """Outputs (seeds, n, n_outputs) of one network a seed."""
    with torch.no_grad():
        return torch.stack([net.sample_network(width, seed=seed, **options)(X) for seed in seeds])


def shape_of(X):
    return {"n_features": X.shape[1]} if X.ndim == 2 else {"image_shape": tuple(X.shape[1:])}


def unbiased(found, width):
    """Mean over seeds, and its standard error, of 2 f(2 width) - f(width): what is of order 1/width cancels."""
    mean, square = 0.0, 0.0
    for factor, w in ((-1, width), (2, 2 * width)):
        f = found(w)
        mean = mean + factor * f.mean(0)
        square = square + factor**2 * f.var(0) / len(f)
    return mean, square**0.5


# The prior of the outputs. Seeds are fixed; by chance one of some 50 entries below would be 4 standard errors off in
# 0.3 per cent of choices of seeds.


@pytest.mark.parametrize(
    ("net", "X", "width", "n_seeds"),
    [
        (arch.mlp(2, "erf", w_std=W, b_std=B), points(3, 2), 24, 250),
        (arch.resmlp(1, "relu", w_std=W, b_std=B), points(3, 2), 24, 250),
        (arch.serial(arch.Dense(W, B), arch.LayerNorm(0.1), arch.Sin(0.3), arch.Dense(W)), points(3, 4), 24, 200),
        (arch.serial(arch.Dense(W), arch.Relu(), arch.Scale(2.0), arch.Dense(W, B)), points(3, 4), 24, 200),
        (arch.cnn(2, w_std=W, b_std=B), points(2, 3, 3, 2), 16, 150),
        (arch.cnn(1, pool=True, padding="circular", w_std=W, b_std=B), points(2, 4, 4, 1), 16, 200),
        (
            arch.serial(
                arch.Dense(W, B),
                arch.branches(arch.serial(arch.Dense(), arch.Relu()), arch.serial(arch.Dense(), arch.Erf())),
                arch.Dense(),
            ),
            points(3, 2),
            16,
            200,
        ),
        (
            arch.serial(
                arch.Conv(W, B), arch.Relu(), arch.AvgPool(2), arch.Conv(W), arch.Relu(), arch.Flatten(), arch.Dense()
            ),
            points(2, 4, 4, 1),
            16,
            150,
        ),
    ],
    ids=["mlp", "resmlp", "norm", "scale", "cnn", "pool", "odd", "avg"],
)
def test_the_covariance_of_outputs_over_seeds_is_the_kernel(net, X, width, n_seeds):
    def squares(w):
        f = samples(net, w, range(n_seeds), X, n_outputs=32, **shape_of(X))
        return torch.einsum("sio,sjo->sij", f, f) / 32

    mean, error = unbiased(squares, width)
    assert bool(((mean - net.nngp(X).detach()).abs() < 4 * error).all())
    # So that the test can fail: the error is small beside what it measures.
    assert bool((error.diagonal() < 0.1 * mean.diagonal()).all())


@pytest.mark.parametrize(
    ("net", "X"),
    [
        (arch.mlp(2, "erf", w_std=W, b_std=B), points(3, 2)),
        (arch.serial(arch.Conv(W, B, stride=2), arch.Relu(), arch.GlobalAvgPool(), arch.Dense(W)), points(2, 4, 4, 1)),
    ],
    ids=["mlp", "cnn"],
)
def test_the_gram_matrix_of_the_jacobian_is_the_tangent_kernel(net, X):
    def grams(width):
        found = []
        for seed in range(60):
            model = net.sample_network(width, seed=seed, **shape_of(X))
            parameters = {k: p.detach() for k, p in model.named_parameters()}
            jacobian = torch.func.jacrev(lambda p, m=model: torch.func.functional_call(m, p, X)[:, 0])(parameters)
            rows = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
            found.append(rows @ rows.mT)
        return torch.stack(found)

    mean, error = unbiased(grams, 48)
    assert bool(((mean - net.ntk(X).detach()).abs() < 4 * error).all())
    assert bool((error.diagonal() < 0.1 * mean.diagonal()).all())


def test_one_scale_multiplies_all_outputs():
    net, X = arch.mlp(1), points(4, 3)
    for seed in range(5):
        plain = net.sample_network(16, seed=seed, n_features=3, n_outputs=2)
        scaled = net.sample_network(16, seed=seed, n_features=3, n_outputs=2, scale_prior="inverse_gamma")
        assert plain.scale.item() == 1.0
        torch.testing.assert_close(scaled(X), plain(X) * scaled.scale.sqrt(), rtol=1e-14, atol=0)
    assert net.sample_network(16, n_features=3, scale_prior=Delta(2.5)).scale.item() == pytest.approx(2.5, rel=1e-15)


def test_fourth_moments_over_seeds_are_those_of_the_scale_mixture():
    # A linear network is Gaussian given the scale at any width: E[f^2 g^2] = E[s^2] K_ff K_gg for two outputs, which
    # are independent given s, and 3 E[s^2] K_ff^2 for one.
    prior, net, X = InverseGamma(12.0, 11.0), arch.Dense(W, B), points(1, 2)
    n_seeds = 2_000
    f = samples(net, 1, range(n_seeds), X, n_features=2, n_outputs=6, scale_prior=prior)[:, 0]
    K = net.nngp(X).item()
    second = 11.0**2 / (11.0 * 10.0)
    pairs = (f.square().sum(1).square() - f.pow(4).sum(1)) / (6 * 5 * K**2)
    fourth = f.pow(4).mean(1) / K**2
    for value, want in ((f.square().mean(1) / K, 1.0), (pairs, second), (fourth, 3 * second)):
        assert abs(value.mean().item() - want) < 4 * value.std().item() / math.sqrt(n_seeds)
    assert (pairs.std() / math.sqrt(n_seeds)).item() < 0.05


def test_scales_and_weights_have_their_laws():
    prior = InverseGamma(3.0, 2.0)
    models = [arch.Dense(W, B).sample_network(1, seed=s, n_features=3, scale_prior=prior) for s in range(400)]
    scales = [m.scale.item() for m in models]
    assert stats.kstest(scales, stats.invgamma(3.0, scale=2.0).cdf).pvalue > 0.01
    weights = torch.cat([p.detach().flatten() for m in models for p in m.parameters()])
    assert len(weights) == 400 * 4
    assert stats.kstest(weights.numpy(), stats.norm.cdf).pvalue > 0.01


# The layers themselves.


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["zero", "circular", "valid"])
def test_a_finite_convolution_is_a_sum_over_filter_offsets(padding, stride):
    X = points(2, 5, 4, 3)
    model = arch.Conv(W, B, size=3, stride=stride, padding=padding).sample_network(
        7, seed=0, image_shape=(5, 4, 3), n_outputs=2
    )
    weight, bias = (p.detach().numpy() for p in model.parameters())
    (top, _, h), (left, _, w) = (padding_of(3, stride, padding, n) for n in (5, 4))
    want = np.zeros((2, h, w, 2)) + B * bias
    for i, j, a, b in np.ndindex(h, w, 3, 3):
        y, x = i * stride + a - top, j * stride + b - left
        if padding == "circular":
            y, x = y % 5, x % 4
        elif not (0 <= y < 5 and 0 <= x < 4):
            continue
        want[:, i, j] += W / math.sqrt(27) * X[:, y, x].numpy() @ weight[:, :, a, b].T
    torch.testing.assert_close(model(X).detach(), torch.as_tensor(want), rtol=1e-12, atol=1e-13)


def test_width_is_that_of_hidden_layers_and_residual_branches_fit():
    model = arch.wide_resnet(1).sample_network(8, seed=0, image_shape=(5, 5, 3), n_outputs=4)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if "weight" in name]
    assert shapes[0] == (8, 3, 3, 3)
    assert shapes[-1] == (4, 8)
    assert {s[:2] for s in shapes[1:-1]} == {(8, 8)}
    # A network that ends with a residual block: the branch has as many outputs as its input.
    last = arch.serial(arch.Dense(), arch.residual(arch.Relu(), arch.Dense()))
    assert last.sample_network(8, seed=0, n_features=2, n_outputs=3)(points(4, 2)).shape == (4, 3)
    flat = arch.cnn(1).sample_network(8, seed=0, image_shape=(4, 4, 1))
    assert [tuple(p.shape) for p in flat.parameters()] == [(8, 1, 3, 3), (8,), (1, 128)]


def test_dropout_drops_in_training_only():
    net = arch.serial(arch.Dense(), arch.Relu(), arch.Dropout(0.5), arch.Dense())
    model, X = net.sample_network(64, seed=0, n_features=2), points(3, 2)
    assert not torch.equal(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X))


# As a module.


def test_equal_seeds_give_equal_bits():
    net, X = arch.mlp(2), points(3, 2)
    first, again, other = (net.sample_network(8, seed=s, n_features=2) for s in (0, 0, 1))
    assert torch.equal(first(X), again(X))
    assert not torch.equal(first(X), other(X))
    stream = torch.Generator().manual_seed(0)
    torch.testing.assert_close(net.sample_network(8, seed=stream, n_features=2)(X), first(X), rtol=0, atol=0)
    assert not torch.equal(net.sample_network(8, seed=stream, n_features=2)(X), first(X))


def test_weights_are_drawn_at_the_first_call_where_the_inputs_are_not_known():
    X = points(3, 2)
    later = arch.mlp(2).sample_network(8, seed=0, scale_prior="half_cauchy")
    assert not list(later.parameters())
    out = later(X)
    now = arch.mlp(2).sample_network(8, seed=0, scale_prior="half_cauchy", n_features=2)
    assert torch.equal(out, now(X))
    assert torch.equal(later(X), out)
    assert arch.mlp(2).sample_network(8, seed=0)(X.float()).dtype == torch.float32


@pytest.mark.parametrize("twice", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_network_whose_weights_are_not_drawn_yet_can_be_copied(twice):
    X = points(3, 2)
    model = arch.mlp(2).sample_network(8, seed=3, scale_prior="half_cauchy")
    other = twice(model)
    assert torch.equal(other(X), model(X))
    assert not list(twice(arch.mlp(1).sample_network(8)).parameters())


def test_standard_deviations_and_dtype_are_those_of_the_call_that_made_the_network():
    net, X = arch.mlp(2), points(3, 2)
    later = net.sample_network(8, seed=0)
    expected = net.sample_network(8, seed=0, n_features=2)(X)
    with torch.no_grad():
        net.parts[0].log_w_std.fill_(3.0)
    torch.testing.assert_close(later(X), expected, rtol=0, atol=0)
    narrow = net.sample_network(8, seed=0, dtype=torch.float32).materialise((2,))
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    narrow = net.sample_network(8, seed=0, dtype=torch.float32)
    assert narrow(X.float()).dtype == torch.float32
    with pytest.raises(RuntimeError, match="dtype"):
        net.sample_network(8, seed=0, dtype=torch.float32)(X)


def test_a_state_dict_makes_another_network_the_same():
    net, X = arch.cnn(2, image_shape=(4, 4, 1)), points(3, 16)
    a, b = (net.sample_network(8, seed=s, scale_prior="inverse_gamma") for s in (0, 1))
    assert not torch.equal(a(X), b(X))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(X), b(X))
    assert "scale" in a.state_dict()
    assert torch.equal(pickle.loads(pickle.dumps(a))(X), a(X))


def test_a_network_changes_its_dtype():
    net, X = arch.wide_resnet(1), points(3, 4, 4, 1)
    wide = net.sample_network(8, seed=0, image_shape=(4, 4, 1))
    narrow = net.sample_network(8, seed=0, image_shape=(4, 4, 1), dtype=torch.float32)
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    assert torch.equal(narrow(X.float()), wide.float()(X.float()))
    # Depth times a few roundings.
    torch.testing.assert_close(
        narrow.double()(X), net.sample_network(8, seed=0, image_shape=(4, 4, 1))(X), rtol=1e-4, atol=1e-5
    )


def test_every_weight_has_the_gradient_of_differences():
    net, X = (
        arch.serial(arch.Conv(W, B), arch.Erf(), arch.AvgPool(2), arch.Flatten(), arch.Dense(W)),
        points(2, 2, 2, 1),
    )
    model = net.sample_network(2, seed=0, image_shape=(2, 2, 1))
    names = [name for name, _ in model.named_parameters()]

    def evaluate(X, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), X)

    inputs = [t.detach().requires_grad_() for t in (X, *model.parameters())]
    assert torch.autograd.gradcheck(evaluate, inputs)
    model(X).sum().backward()
    assert all(bool((p.grad != 0).any()) for p in model.parameters())


def test_training_the_network_leaves_the_kernel_as_it_was():
    net = arch.mlp(1)
    model = net.sample_network(4, seed=0, n_features=2)
    ours = {id(p) for p in net.parameters()}
    assert not ours & {id(p) for p in model.parameters()}


# Errors.


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (arch.serial(arch.Relu(), arch.Dense()), "Relu acts on units that are not Gaussian"),
        (arch.serial(arch.Dense(), arch.Relu(), arch.Erf(), arch.Dense()), "Erf acts on units that are not Gaussian"),
        (arch.serial(arch.Dense(), arch.branches(arch.Identity(), arch.Relu())), "they are not independent"),
        # Two rectified branches between dense layers: over seeds 6.2 on the diagonal where the kernel has 4.7.
        (
            arch.branches(arch.serial(arch.Dense(), arch.Relu()), arch.serial(arch.Dense(), arch.Gelu())),
            "both have a mean other than 0",
        ),
        (arch.branches(arch.Identity(), arch.serial(arch.Dense(), arch.Relu())), "both have a mean other than 0"),
        (arch.Identity(), "the network has 3 outputs where n_outputs=1 are wanted"),
    ],
)
def test_networks_without_a_limit_are_refused(net, message):
    with pytest.raises(ArchitectureError, match=message):
        net.sample_network(4, seed=0, n_features=3)


def test_a_nonlinearity_on_flattened_pixels_is_refused():
    net = arch.serial(arch.Conv(), arch.Flatten(), arch.LayerNorm(), arch.Erf(), arch.Dense())
    with pytest.raises(ArchitectureError, match="pixels joined by Flatten"):
        net.sample_network(4, seed=0, image_shape=(3, 3, 1))
    net.sample_network(4, seed=0, image_shape=(1, 1, 1))


def test_images_of_another_shape_are_refused():
    model = arch.cnn(1, image_shape=(4, 4, 1)).sample_network(4, seed=0)
    with pytest.raises(ArchitectureError, match="needs rows of 16 numbers"):
        model(points(3, 15))
    with pytest.raises(ArchitectureError, match="takes images"):
        arch.cnn(1).sample_network(4, seed=0)(points(3, 16))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 0}, ValueError, "width must be at least 1; got 0"),
        ({"width": 2.5}, TypeError, "width must be an integer"),
        ({"n_outputs": 0}, ValueError, "n_outputs must be at least 1; got 0"),
        ({"n_features": 0}, ValueError, "n_features must be at least 1; got 0"),
        ({"seed": -1}, ValueError, "random_state must be a non-negative integer"),
        ({"scale_prior": "gauss"}, ValueError, "gauss"),
    ],
)
def test_arguments_out_of_range_are_named(options, error, message):
    with pytest.raises(error, match=message):
        arch.mlp(1).sample_network(**options)
