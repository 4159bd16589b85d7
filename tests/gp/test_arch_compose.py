import pickle

import pytest
import torch

from stochproc.exceptions import ArchitectureError
from stochproc.gp import arch

NETS = {
    "mlp": lambda: arch.mlp(3, "gelu"),
    "untied": lambda: arch.mlp(2, arch.LeakyRelu(0.3), tie=False, w_last=0.7),
    "resmlp": lambda: arch.resmlp(2, "sin"),
    "others": lambda: arch.serial(
        arch.Dense(0.9, 0.1, trainable=False),
        arch.LayerNorm(1e-4),
        arch.ABRelu(0.5, -1),
        arch.Dropout(0.9),
        arch.Rbf(0.3),
        arch.Scale(2),
        arch.branches(arch.Identity(), arch.Abs(), arch.Cos(), arch.Exp()),
        arch.Sign(),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_survives_its_config_and_pickle(gen, name):
    net, X = NETS[name](), torch.randn(4, 3, generator=gen) / 4
    again = arch.from_config(net.config())
    # Standard deviations go through logarithms once more.
    torch.testing.assert_close(again.nngp(X), net.nngp(X), rtol=1e-14, atol=1e-14)
    assert len(list(again.parameters())) == len(list(net.parameters()))
    assert again.config().keys() == net.config().keys()
    assert torch.equal(pickle.loads(pickle.dumps(net)).nngp(X), net.nngp(X))


def test_a_network_survives_its_state_dict(gen):
    X = torch.randn(4, 3, generator=gen)
    net, other = arch.resmlp(2, w_std=1.1, b_std=0.3), arch.resmlp(2)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.nngp(X), net.nngp(X))


def test_a_config_keeps_what_is_frozen():
    again = arch.from_config(arch.serial(arch.Dense(1.2, 0.1, trainable=False), arch.Dense()).config())
    assert [p.requires_grad for p in again.parameters()] == [False, False, True]


def test_a_function_cannot_be_written_as_numbers():
    with pytest.raises(TypeError, match="Numeric is not made of names and numbers"):
        arch.serial(arch.Numeric(torch.tanh)).config()


def test_a_layer_of_the_users_own_cannot_be_written_as_numbers():
    class Mine(arch.Identity):
        pass

    with pytest.raises(TypeError, match="Mine is not made of names and numbers"):
        arch.serial(Mine()).config()


def test_only_layers_of_the_library_are_made_from_a_config():
    with pytest.raises(ValueError, match=r"unknown layer class 'os.system'"):
        arch.from_config({"class": "Serial", "layers": [{"class": "os.system"}]})


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class": "Dense", "width": 3}, "config of Dense has entries that are not its own: .*'width'"),
        ({"class": "Serial", "layers": [{"again": 5}]}, "config refers to layer 5 of 0"),
        (3, r"config must be what config\(\) of a layer returned; got 3"),
        ({"class": "Serial", "layers": 3}, r"config must be what config\(\) of a layer returned"),
    ],
)
def test_a_damaged_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        arch.from_config(config)


def test_tied_layers_share_parameters_and_not_weights(gen):
    X = torch.randn(4, 3, generator=gen)
    tied, untied = arch.mlp(3, b_std=0.3), arch.mlp(3, b_std=0.3, tie=False)
    assert len(list(tied.parameters())) == 3
    assert len(list(untied.parameters())) == 7
    assert torch.equal(tied.nngp(X), untied.nngp(X))
    # The gradient in the shared parameter is the sum of those in the others.
    (total,) = torch.autograd.grad(tied.nngp(X).sum(), [tied.parts[0].log_w_std])
    each = torch.autograd.grad(untied.nngp(X).sum(), [layer.log_w_std for layer in untied.parts[:6:2]])
    torch.testing.assert_close(total, sum(each))


def test_no_bias_means_no_parameter():
    assert [n for n, _ in arch.Dense(1.0, 0).named_parameters()] == ["log_w_std"]
    assert arch.Dense(1.0).b_std.item() == 0


def test_a_tangent_kernel_of_sign_names_the_layer():
    net = arch.serial(arch.Dense(), arch.residual(arch.Sign(), arch.Dense()))
    X = torch.ones(2, 2)
    assert net.nngp(X).shape == (2, 2)
    for ask in (net.ntk, net.nngp_ntk, net.ntk_diag, lambda X: net.lazy(X, kind="ntk")):
        with pytest.raises(ArchitectureError, match="Sign has no tangent kernel"):
            ask(X)
    with pytest.raises(ArchitectureError, match="Sign has no tangent kernel"):
        arch.NTKKernel(net)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (arch.serial, ArchitectureError, "Serial needs at least one layer"),
        (lambda: arch.serial(arch.Relu), TypeError, "argument 0 of Serial must be a layer.*It is a class"),
        (lambda: arch.branches(arch.Relu(), 3), TypeError, "argument 1 of Branches must be a layer; got int"),
        (lambda: arch.Dense(0.0), ValueError, "w_std must be positive"),
        (lambda: arch.Dense(1.0, -0.1), ValueError, "b_std must be non-negative"),
        (lambda: arch.Dropout(0.0), ValueError, r"keep must lie in \(0, 1\]; got 0.0"),
        (lambda: arch.Scale(-1), ValueError, "s must be positive"),
        (lambda: arch.LayerNorm(0), ValueError, "eps must be positive"),
        (lambda: arch.mlp(0), ValueError, "depth must be at least 1"),
        (lambda: arch.mlp(2, "tanh"), ArchitectureError, "unknown activation 'tanh'; valid: abs"),
        (lambda: arch.mlp(2, ["relu"]), TypeError, "activation must be a name or a layer; got list"),
        (lambda: arch.mlp(2, arch.Relu), TypeError, "activation must be a name or a layer; got type. It is a class"),
        (lambda: arch.ABRelu("a", 1), TypeError, "a must be a number; got 'a'"),
        (lambda: arch.LeakyRelu(None), TypeError, "slope must be a number; got None"),
        (lambda: arch.Sin("x"), TypeError, "c must be a number; got 'x'"),
        (lambda: arch.Rbf([1.0]), TypeError, "gamma must be a number"),
        (lambda: arch.Dense(1e200), ValueError, r"w_std must lie between 1e-140 and 1e\+140; got 1e\+200"),
        (lambda: arch.Dense(1.0, 1e-200), ValueError, r"b_std must be 0 or lie between 1e-140 and 1e\+140; got 1e-200"),
        (lambda: arch.Scale(1e-170), ValueError, r"s must lie between 1e-140 and 1e\+140; got 1e-170"),
        (lambda: arch.NetworkKernel(torch.nn.Linear(1, 1)), TypeError, "net must be a layer"),
        (lambda: arch.NetworkKernel(arch.mlp(1), "ntk2"), ValueError, "kind must be one of"),
        (lambda: arch.mlp(1).nngp(torch.ones(3)), ValueError, r"X1 must have shape \(\*batch, n, d\)"),
        (lambda: arch.mlp(1).nngp(torch.ones(3, 2), torch.ones(3, 4)), ValueError, "points of one kind"),
        (lambda: arch.mlp(1).nngp(torch.ones(3, 2), torch.ones(3, 2).float()), TypeError, "mixed dtypes"),
        (
            lambda: arch.mlp(1).nngp(torch.ones(2, 3, 2), torch.ones(4, 3, 2)),
            ValueError,
            r"the batch shapes of X1 and X2 must broadcast; got \(2,\) and \(4,\)",
        ),
    ],
)
def test_wrong_arguments_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_namespace_holds_what_it_says():
    assert all(getattr(arch, name) is not None for name in arch.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Conv7'"):
        _ = arch.Conv7
