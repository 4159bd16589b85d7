"""Matrices from plain covariances against those from defects, which the tests of ``arch`` hold to 50 digits."""

import pytest
import torch

from stochproc.gp import _arch_evaluate as evaluate
from stochproc.gp import arch
from stochproc.gp._arch_base import KernelState
from stochproc.gp._arch_plain import plain_enough
from stochproc.kernels import PlainPair, Rounding, duals

NETS = {
    "erf": lambda: arch.mlp(4, "erf", w_std=1.4, b_std=0.2),
    "gelu": lambda: arch.mlp(4, "gelu", w_std=1.4, b_std=0.2),
    "sin": lambda: arch.serial(arch.Dense(1.2, 0.3), arch.Sin(0.4), arch.Dense(1.1)),
    "rbf": lambda: arch.serial(arch.Dense(0.8), arch.Rbf(0.5), arch.Dense(1.1, 0.1)),
    "exp": lambda: arch.serial(arch.Dense(0.5, 0.1), arch.Exp(), arch.Dense(0.7)),
    "normalised": lambda: arch.serial(arch.Dense(1.4, 0.2), arch.Erf(), arch.LayerNorm(), arch.Scale(0.5), arch.Gelu()),
    "residual": lambda: arch.resmlp(3, activation="erf"),
    "rectified residual": lambda: arch.resmlp(3),
}


def points(n=30, d=5, seed=0):
    """Random points, and others from opposite, through 1e-6 away, to equal."""
    gen = torch.Generator().manual_seed(seed)
    x, step = (torch.randn(n, d, generator=gen, dtype=torch.float64) for _ in range(2))
    return x, torch.cat([x + 1e-6 * step, x + 0.1 * step, -x, x[:3], step])


def by_defects(net, x, y, kinds):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "plain_enough", lambda *args, **kwargs: False)
        return evaluate.dense_kernels(net, x, y, kinds)


@pytest.mark.parametrize("name", NETS)
def test_kernels_are_those_of_defects_to_the_growth_allowed(name):
    net, (x, y) = NETS[name](), points()
    rectified = name == "rectified residual"
    assert plain_enough(net, x, y, tangent=False, gradient=False)
    assert plain_enough(net, x, y, tangent=True, gradient=True) is not rectified
    kinds = ("nngp",) if rectified else ("nngp", "ntk")
    with torch.no_grad():
        for found, exact in zip(evaluate.dense_kernels(net, x, y, kinds), by_defects(net, x, y, kinds), strict=True):
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-14 * exact.abs().max().item())
        for found, exact in zip(
            evaluate.dense_kernels(net, x, None, kinds), by_defects(net, x, None, kinds), strict=True
        ):
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-14 * exact.abs().max().item())
            assert torch.equal(found, found.mT)


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_defects(name):
    net, (x, y) = NETS[name](), points(8)
    weight = torch.randn(len(x), len(y), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [x.requires_grad_(), y.requires_grad_(), *net.parameters()]

    def gradients(kernels):
        return torch.autograd.grad((kernels(net, x, y, ("nngp",))[0] * weight).sum(), leaves)

    for found, exact in zip(gradients(evaluate.dense_kernels), gradients(by_defects), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["erf", "gelu", "sin", "relu"])
@pytest.mark.parametrize("w_std", [0.5, 1.0, 1.3, 4.0])
def test_what_a_network_makes_of_roundings_is_bounded(w_std, activation):
    net = arch.mlp(10, activation, w_std=w_std, b_std=0.0)
    x, y = points(20)
    q = torch.cat([x, y]).square().sum(-1, keepdim=True) / x.shape[1]
    with torch.no_grad():
        bound = net.kernel(KernelState(Rounding.of_variances(q), None)).pair
        error = (evaluate._tile(net, ("nngp",), x, y, plain=True)[0] - by_defects(net, x, y, ("nngp",))[0]).abs().max()
    assert error <= bound.error.max() * 2.0**-52
    assert plain_enough(net, x, y, tangent=False, gradient=False) is bool((bound.error <= 300 * bound.q).all())


def test_vanishing_sines_and_chaotic_networks_keep_their_defects():
    x, y = points()
    # Sine is then a difference of two exponentials that are nearly 1.
    small = arch.mlp(10, "sin", w_std=0.5, b_std=0.0)
    # Doubling by layers that have no weights, hence no part in the tangent kernel.
    growing = arch.serial(*[layer for _ in range(12) for layer in (arch.Scale(3.0), arch.Erf())], arch.Dense(1.0))
    for net in (small, growing):
        assert not plain_enough(net, x, y, tangent=False, gradient=False)
        with torch.no_grad():
            assert torch.equal(net.nngp(x, y), by_defects(net, x, y, ("nngp",))[0])


def test_variances_that_underflow_between_layers_leave_no_nan():
    x = torch.tensor([[1e-70, 2e-70], [3e-70, -1e-70]], dtype=torch.float64)
    net = arch.serial(arch.residual(arch.Scale(1e-100), arch.Relu(), arch.Dense(1.0)))
    with torch.no_grad():
        torch.testing.assert_close(net.nngp(x), x @ x.mT / 2, rtol=1e-14, atol=0)


def test_a_nonlinearity_with_kernels_of_its_own_keeps_them():
    class Doubled(arch.Erf):
        def kernel(self, state):
            pair = state.pair.through(self.dual)
            return state._replace(pair=pair.affine(2.0, 0.0), ntk=None) if pair.A.numel() else state

    class Halved(arch.Relu):
        def kernel(self, state):
            return state._replace(pair=state.pair.through(self.dual).affine(0.5, 0.0))

    x, y = points()
    with torch.no_grad():
        for made, plain, factor in ((Doubled(), arch.Erf(), 2.0), (Halved(), arch.Relu(), 0.5)):
            found, without = (arch.serial(arch.Dense(1.2), a, arch.Dense(1.0)).nngp(x, y) for a in (made, plain))
            torch.testing.assert_close(found, factor * without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: arch.serial(arch.Dense(1.4), arch.Erf(), arch.Dropout(0.9), arch.Dense(1.0)),
        lambda: arch.serial(arch.Dense(1.4), arch.Sign(), arch.Dense(1.0)),
        lambda: arch.serial(arch.Dense(100.0), arch.Gelu(), arch.Dense(1.0)),
        lambda: arch.serial(arch.Dense(1.4), arch.Dense(1.0)),
    ],
    ids=["dropout", "sign", "large variances", "no nonlinearity"],
)
def test_other_networks_keep_their_defects(make):
    assert not plain_enough(make(), *points(), tangent=False, gradient=False)


def test_points_at_zero_keep_their_defects():
    x, y = points()
    assert not plain_enough(NETS["erf"](), torch.cat([x, 0 * x[:1]]), y, tangent=False, gradient=False)


def test_float32_points_lose_no_more_than_the_rounding_of_the_result():
    net, (x, y) = NETS["gelu"](), (z.float() for z in points())
    exact = by_defects(net, x.double(), y.double(), ("nngp",))[0]
    with torch.no_grad():
        torch.testing.assert_close(net.nngp(x, y).double(), exact, rtol=2.0**-23, atol=1e-9)


def test_a_nonlinearity_without_a_formula_in_covariances_is_refused():
    one = torch.ones(1, 1)
    with pytest.raises(TypeError, match="Sign has no formula in three covariances"):
        PlainPair(one, one, one).through(duals.Sign())
