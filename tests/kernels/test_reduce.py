"""Soft and hard minima over pairs of points against dense float64 formulas."""

import math
import subprocess
import sys

import pytest
import torch

from stochproc.kernels import RBF, argmin, expsum, kmin, logsumexp, matvec
from tests import reference

COSTS = ["sqeuclidean", "euclidean", "cityblock"]
BACKENDS = ["dense", "chunked"]


def problem(gen, n=17, m=13, d=3, batch=(), dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*batch, *shape, generator=gen).to(dtype)

    return draw(n, d), draw(m, d), draw(n), draw(m), draw(m, 2)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cost", COSTS)
def test_soft_reductions_equal_the_dense_float64_sums(cost, dtype, backend, batch, gen):
    x, y, f, g, v = problem(gen, batch=batch, dtype=dtype)
    eps, tol = 0.3, 1e-12 if dtype == torch.float64 else 2e-5
    z = (g.double().unsqueeze(-2) - reference.cost(cost, x, y)) / eps
    got = logsumexp(cost, x, y, g, eps=eps, backend=backend, block_bytes=100)
    assert got.dtype == dtype
    want = z.logsumexp(-1)
    scale = z.abs().max()
    torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=tol)
    got = expsum(cost, x, y, f, g, v, eps=eps, backend=backend, block_bytes=100)
    plan = (z + f.double().unsqueeze(-1) / eps).exp()
    # An exponent of size z rounds to z eps, so that is the relative error of its exponential.
    torch.testing.assert_close(got.double(), plan @ v.double(), rtol=tol * float(scale), atol=tol * float(plan.max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cost", COSTS)
def test_hard_minima_equal_the_sorted_matrix(cost, backend, gen):
    x, y, _, g, _ = problem(gen)
    c = reference.cost(cost, x, y) - g
    want = c.sort(-1)
    values, indices = kmin(cost, x, y, 4, g=g, backend=backend, block_bytes=100)
    assert torch.equal(indices, want.indices[:, :4])
    torch.testing.assert_close(values, want.values[:, :4], rtol=1e-12, atol=1e-12)
    values, indices = argmin(cost, x, y, backend=backend, block_bytes=100)
    torch.testing.assert_close(values, reference.cost(cost, x, y).min(-1).values, rtol=1e-12, atol=1e-12)
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_hard_minima_of_a_batch_equal_a_loop(batch, gen):
    x, y, _, g, _ = problem(gen, batch=batch)
    values, indices = kmin("sqeuclidean", x, y, 3, g=g, backend="chunked", block_bytes=1)
    want = (reference.cost("sqeuclidean", x, y) - g.unsqueeze(-2)).sort(-1)
    assert torch.equal(indices, want.indices[..., :3])
    torch.testing.assert_close(values, want.values[..., :3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cost", COSTS)
def test_soft_reductions_pass_gradcheck_in_every_argument(cost, backend, gen):
    x, y, f, g, v = (t.requires_grad_() for t in problem(gen, 4, 3, 2))
    eps = torch.tensor(0.7, requires_grad=True)
    options = {"backend": backend, "block_bytes": 48}
    assert torch.autograd.gradcheck(lambda *a: logsumexp(cost, *a[:3], eps=a[3], **options), (x, y, g, eps))
    assert torch.autograd.gradcheck(lambda *a: expsum(cost, *a[:5], eps=a[5], **options), (x, y, f, g, v, eps))
    assert torch.autograd.gradcheck(lambda *a: kmin(cost, a[0], a[1], 2, g=a[2], **options)[0], (x, y, g))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_of_the_soft_minimum(backend, gen):
    x, y, _, g, _ = (t.requires_grad_() for t in problem(gen, 3, 3, 2))
    assert torch.autograd.gradgradcheck(
        lambda *a: logsumexp("sqeuclidean", *a, eps=0.7, backend=backend, block_bytes=48), (x, y, g)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cost", COSTS)
def test_minus_infinity_drops_a_column_and_a_row_without_columns_is_empty(cost, backend, gen):
    x, y, f, g, v = problem(gen)
    g[3:] = -math.inf
    g.requires_grad_()
    got = logsumexp(cost, x, y, g, eps=0.3, backend=backend)
    want = logsumexp(cost, x, y[:3], g.detach()[:3], eps=0.3, backend="dense")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got.sum().backward()
    assert torch.equal(g.grad[3:], torch.zeros(10))
    assert g.grad.isfinite().all()
    nothing = torch.full_like(g.detach(), -math.inf)
    assert torch.equal(logsumexp(cost, x, y, nothing, backend=backend), torch.full((17,), -math.inf))
    assert torch.equal(expsum(cost, x, y, f, nothing, v, backend=backend), torch.zeros(17, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_cost_drops_the_pair(backend, gen):
    x, y, _, g, _ = problem(gen)

    def forbidding(a, b):
        c = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
        return torch.where(c > 4, math.inf, c)

    got = logsumexp(forbidding, x, y, g, eps=0.3, backend=backend, block_bytes=100)
    z = (g - forbidding(x, y)) / 0.3
    torch.testing.assert_close(got, z.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_the_parameters_of_a_module_cost_get_gradients(gen):
    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 0.5]))

        def forward(self, a, b):
            return ((a.unsqueeze(-2) - b.unsqueeze(-3)).square() * self.weight).sum(-1)

    x, y, _, g, _ = problem(gen)
    grads = []
    for backend in BACKENDS:
        cost = Weighted()
        logsumexp(cost, x, y, g, backend=backend, block_bytes=100).sum().backward()
        grads.append(cost.weight.grad)
    torch.testing.assert_close(*grads)


def test_no_exponent_overflows_or_underflows(gen):
    x, y, _, g, _ = problem(gen, dtype=torch.float32)
    for eps in (1e-6, 1e6):
        out = logsumexp("sqeuclidean", x, y, g, eps=eps)
        assert out.isfinite().all()
    z = (g.double() - reference.cost("sqeuclidean", x, y)) / 1e-6
    got = logsumexp("sqeuclidean", x, y, g, eps=1e-6).double()
    torch.testing.assert_close(got, z.logsumexp(-1), rtol=2e-5, atol=0)
    shift = -logsumexp("sqeuclidean", x, y, 1e3 * g, eps=1e-3) * 1e-3
    rows = expsum("sqeuclidean", x, y, shift, 1e3 * g, torch.ones(13, 1, dtype=torch.float32), eps=1e-3)
    # shift has magnitude 1e3 and eps 1e-3: float32 leaves exponents of 1e6 an error of 0.1.
    torch.testing.assert_close(rows.double(), torch.ones(17, 1), rtol=0.3, atol=0)


@pytest.mark.slow
def test_long_float32_sums_are_accumulated_in_float64(gen):
    # 40,000 equal terms 1.1: float32 partial sums of this length alone would be off by about 1e-5.
    m = 40_000
    x, y, v = torch.zeros(2, 1).float(), torch.zeros(m, 1).float(), torch.full((m, 1), 1.1).float()
    got = matvec(RBF(), x, y, v, backend="chunked").double()
    want = m * v[0].double()
    torch.testing.assert_close(got, want.expand(2, 1), rtol=2e-7, atol=0)


@pytest.mark.slow
def test_memory_of_forward_and_backward_does_not_grow_with_the_matrix():
    # Four times the points are sixteen times the matrix (2 GB at 16,000 points); in a process of its own, since
    # the largest resident size is a property of the process.
    code = """
import resource, torch
from stochproc.kernels import RBF, matvec
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for n in (400, 4_000, 16_000):
    x = torch.randn(n, 3, dtype=torch.float64, requires_grad=True)
    matvec(RBF(), x, x, torch.ones(n, 1, dtype=torch.float64), backend="chunked").sum().backward()
    print(peak())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    _, small, large = map(float, done.stdout.split())
    assert large - small < 60, "extra memory in MB"


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sets_of_points_give_empty_sums(backend):
    x, y, v = torch.zeros(0, 2), torch.zeros(3, 2), torch.ones(3, 1)
    assert matvec(RBF(), x, y, v, backend=backend).shape == (0, 1)
    assert torch.equal(matvec(RBF(), y, x, torch.ones(0, 1), backend=backend), torch.zeros(3, 1))
    got = logsumexp("sqeuclidean", y, x, torch.zeros(0), backend=backend)
    assert torch.equal(got, torch.full((3,), -math.inf))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y, g: logsumexp("cosine", x, y, g), ValueError, "unknown cost 'cosine'; valid: sqeuclidean"),
        (lambda x, y, g: logsumexp(3, x, y, g), TypeError, "cost must be a string or a function"),
        (
            lambda x, y, g: logsumexp("euclidean", x, y, g, eps=0.0),
            ValueError,
            "eps must be positive and finite; got 0.0",
        ),
        (lambda x, y, g: logsumexp("euclidean", x, y, g, eps="1"), TypeError, "eps must be a number"),
        (lambda x, y, g: logsumexp("euclidean", x, y, g, eps=torch.ones(2)), ValueError, "0-dim tensor"),
        (
            lambda x, y, g: logsumexp("euclidean", x, y, g[:2]),
            ValueError,
            "g must have one entry a row of y, 3",
        ),
        (
            lambda x, y, g: logsumexp("euclidean", x, y, g.float()),
            TypeError,
            "mixed dtypes: x is torch.float64",
        ),
        (lambda x, y, g: logsumexp(lambda a, b: a, x, y, g), ValueError, r"cost must return a tensor of shape"),
        (lambda x, y, g: kmin("euclidean", x, y, 4), ValueError, "k must be between 1 and 3; got 4"),
        (lambda x, y, g: kmin("euclidean", x, y, 1.5), TypeError, "k must be an integer"),
        (lambda x, y, g: argmin("euclidean", x, y[:0]), ValueError, "y must have at least one row"),
        (lambda x, y, g: matvec(RBF(), x, y, g), ValueError, r"v must have shape \(\*batch, m, p\) with m = 3"),
        (lambda x, y, g: matvec("rbf", x, y, g[:, None]), TypeError, "as_kernel"),
        (
            lambda x, y, g: matvec(RBF(), x, y, g[:, None], backend="keos"),
            ValueError,
            "unknown backend 'keos'; valid: auto, chunked, dense, keops",
        ),
        (
            lambda x, y, g: expsum("euclidean", x, y, g, g, g[:, None]),
            ValueError,
            "f must have one entry a row of x, 4",
        ),
        (lambda x, y, g: matvec(RBF(), x.to("meta"), y, g[:, None]), TypeError, "mixed devices"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(3))
