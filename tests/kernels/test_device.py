"""The same numbers on every device; the CUDA half skips where there is none."""

import pytest
import torch

from stochproc.gp import ScaleMixtureGPRegressor
from stochproc.kernels import RBF, ArcCosine, Linear, Matern, RationalQuadratic, keops_status, logsumexp, matvec

KERNELS = [RBF(0.8), Matern(0.8, nu=0.5), RationalQuadratic(0.8, 0.7), ArcCosine(1), 2.0 * RBF() + Linear()]


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_products_and_gradients_on_the_device_equal_the_dense_ones_on_the_cpu(kernel, device, gen):
    x, y, v = (torch.randn(*s, generator=gen) for s in ((40, 3), (30, 3), (30, 2)))
    want_at = x.clone().requires_grad_()
    want = kernel(want_at, y) @ v
    (want_grad,) = torch.autograd.grad(want.square().sum(), want_at)
    backends = ["dense", "chunked"]
    if device.type == "cuda" and keops_status(x.dtype, device) is None:
        backends.append("keops")
    for backend in backends:
        leaf = x.to(device).requires_grad_()
        got = matvec(kernel, leaf, y.to(device), v.to(device), backend=backend, block_bytes=2000)
        (grad,) = torch.autograd.grad(got.square().sum(), leaf)
        assert got.device.type == device.type
        torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grad.cpu(), want_grad, rtol=1e-9, atol=1e-9)


def test_soft_minima_on_the_device_equal_those_on_the_cpu(device, gen):
    x, y, g = torch.randn(40, 3, generator=gen), torch.randn(30, 3, generator=gen), torch.randn(30, generator=gen)
    want = logsumexp("sqeuclidean", x, y, g, eps=0.3, backend="dense")
    for backend in ("dense", "chunked"):
        got = logsumexp("sqeuclidean", x.to(device), y.to(device), g.to(device), eps=0.3, backend=backend)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-10)


def test_a_regressor_on_the_device_predicts_as_on_the_cpu(device, gen):
    X = torch.randn(40, 2, generator=gen)
    y = torch.sin(X[:, 0]) + 0.1 * torch.randn(40, generator=gen)
    here, there = (ScaleMixtureGPRegressor(device=d).fit(X.numpy(), y.numpy()) for d in ("cpu", str(device)))
    # Two searches of one likelihood whose rounding differs: each ends within 0.1 nat of the optimum.
    assert there.log_marginal_likelihood_ == pytest.approx(here.log_marginal_likelihood_, abs=0.1)
    got, want = (m.predict_interval(X.numpy()) for m in (there, here))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0.02, atol=0.02)
