import math

import pytest
import torch
from torch.autograd import grad

from stochproc.kernels import Linear, Matern, Product, Scale, Sum
from stochproc.solvers import kalman_smoother, messages

from .kalman_examples import awkward_series, dense_posterior, matern, random_messages, state_spaces

METHODS = ("sequential", "scan")


def covariance(kernel, times):
    """The covariance matrix from explicit differences, which autograd goes through."""
    match kernel:
        case Sum():
            return sum(covariance(k, times) for k in kernel.kernels)
        case Product():
            return math.prod(covariance(k, times) for k in kernel.kernels)
        case Scale():
            return kernel.outputscale * covariance(kernel.kernel, times)
        case Linear():
            return kernel.bias + kernel.variance * times[:, None] * times
        case Matern():
            a = math.sqrt(2 * kernel.nu) * (times[:, None] - times).abs() / kernel.lengthscale
            return {0.5: 1.0, 1.5: 1 + a, 2.5: 1 + a + a**2 / 3}[kernel.nu] * torch.exp(-a)


def dense_log_p(kernel, times, y, noise):
    """log p(y) by a Cholesky factor that autograd goes through."""
    L = torch.linalg.cholesky(covariance(kernel, times) + torch.diag(noise))
    z = torch.linalg.solve_triangular(L, y[:, None], upper=False)
    return -0.5 * z.square().sum() - L.diagonal().log().sum() - 0.5 * len(y) * math.log(2 * math.pi)


KERNELS = {
    "Matern 1/2": lambda: 0.7 * matern(0.5),
    "Matern 3/2": lambda: 0.7 * matern(1.5),
    "Matern 5/2": lambda: 0.7 * matern(2.5),
    "sum": lambda: matern(0.5, 0.1) + 2.0 * matern(2.5, 1.5),
    "product": lambda: matern(0.5, 2.0) * matern(1.5),
    "trend and Matern": lambda: Linear(0.5, 1.0) + matern(1.5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KERNELS)
def test_gradient_in_hyperparameters_noise_data_and_times_is_that_of_the_dense_process(gen, name, method):
    kernel = KERNELS[name]()
    times, y, noise, _ = awkward_series(gen)
    # A kernel of a distance has no derivative in a time that occurs twice; the step of 1e-9 stays.
    times = times.unique()
    y, noise = y[: len(times)], noise[: len(times)]
    assert times.diff().min() < 1.1e-9
    leaves = [t.requires_grad_() for t in (times, y, noise)] + list(kernel.parameters())
    expected = grad(dense_log_p(kernel, times, y, noise), leaves)
    found = messages(y, noise)
    out = kalman_smoother(kernel.state_space(), times, found.Lam, found.eta, method=method).unwrap()
    got = grad(out.log_z + found.constant, leaves)
    for a, b in zip(got, expected, strict=True):
        # Relative to the largest entry: the rounding of the dense reference is of that size times its condition.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_agrees_with_central_differences(gen, method):
    kernel = matern(1.5)
    times, y, noise, _ = awkward_series(gen, 60)
    found = messages(y, noise)
    parameter = kernel.log_lengthscale

    def log_z():
        return kalman_smoother(kernel.state_space(), times, *found[:2], method=method).unwrap().log_z

    (got,) = grad(log_z(), parameter)
    # Truncation h², rounding of log Z (1e-13) over h.
    h, values = 1e-5, []
    with torch.no_grad():
        for sign in (1, -1):
            parameter += sign * h
            values.append(log_z())
            parameter -= sign * h
    difference = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close(got.squeeze(), difference.squeeze(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["two functions", "trend", "walk from a known point", "many states"])
def test_gradient_in_messages_offset_and_mean_is_that_of_the_dense_normaliser(gen, name, method):
    ss = state_spaces()[name]
    n, r = 40, ss.n_outputs
    times = (torch.rand(n, generator=gen) * 3).sort().values
    Lam, eta = random_messages(gen, n, r, rank=1)
    Lam[::4] = 0.0
    offset, mean = torch.randn(n, r, generator=gen), torch.randn(r, generator=gen)
    leaves = [x.requires_grad_() for x in (Lam, eta, offset, mean)]
    expected = grad(dense_posterior(ss, times, Lam, eta, offset - mean).log_z, leaves)
    out = kalman_smoother(ss, times, Lam, eta, offset=offset, mean=mean, method=method).unwrap()
    got = grad(out.log_z, leaves)
    # Of Lam the symmetric part is what a symmetric change sees.
    for a, b in zip(got, ((expected[0] + expected[0].mT) / 2, *expected[1:]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_where_times_repeat_is_finite_and_that_of_merged_messages(gen, method):
    kernel = matern(1.5)
    times = torch.tensor([0.0, 0.5, 0.5, 0.5, 2.0])
    Lam, eta = random_messages(gen, 5, 1)
    merged = torch.tensor([0.0, 0.5, 2.0])

    def merge(x):
        return torch.stack([x[0], x[1:4].sum(0), x[4]])

    out = kalman_smoother(kernel.state_space(), times, Lam, eta, method=method).unwrap()
    same = kalman_smoother(kernel.state_space(), merged, merge(Lam), merge(eta), method=method).unwrap()
    parameters = list(kernel.parameters())
    got, expected = grad(out.log_z, parameters), grad(same.log_z, parameters)
    torch.testing.assert_close(out.log_z, same.log_z, rtol=0, atol=1e-13)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_a_batch_is_weighted_item_by_item(gen, method):
    kernel = Matern(torch.tensor([[0.3], [0.9]]), nu=2.5, batch_shape=(2,))
    times = (torch.rand(50, generator=gen) * 3).sort().values
    Lam, eta = random_messages(gen, 2, 50, 1)
    weights = torch.tensor([2.0, -3.0])
    out = kalman_smoother(kernel.state_space(), times, Lam, eta, method=method).unwrap()
    (got,) = grad(out.log_z @ weights, kernel.log_lengthscale)
    for i in range(2):
        one = Matern(kernel.lengthscale[i].item(), nu=2.5)
        item = kalman_smoother(one.state_space(), times, Lam[i], eta[i], method=method).unwrap()
        (own,) = grad(item.log_z, one.log_lengthscale)
        torch.testing.assert_close(got[i], weights[i] * own.reshape(1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [30, 300])
def test_regular_grid_has_the_gradient_of_its_times_jittered_by_rounding(gen, n):
    # Equal steps share one transition; steps that differ by 1e-12 do not.
    kernel = matern(2.5)
    times = torch.arange(float(n)) / 8
    close = times + 1e-12 * torch.rand(n, generator=gen)
    Lam, eta = random_messages(gen, n, 1)
    got, expected = (
        grad(kalman_smoother(kernel.state_space(), t, Lam, eta).unwrap().log_z, list(kernel.parameters()))
        for t in (times, close)
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_gradient_passes_through_queries_to_times_of_the_data(gen):
    kernel = matern(1.5)
    times, y, noise, _ = awkward_series(gen, 60)
    times = times.unique()
    found = messages(y[: len(times)], noise[: len(times)])
    query = torch.rand(20, generator=gen) * 10
    times.requires_grad_()
    query.requires_grad_()
    out = kalman_smoother(kernel.state_space(), times, *found[:2], query=query).unwrap()
    alone = kalman_smoother(kernel.state_space(), times, *found[:2]).unwrap()
    of_times, of_query = grad(out.log_z, (times, query))
    (expected,) = grad(alone.log_z, times)
    torch.testing.assert_close(of_times, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    # Points without a message do not change the evidence, wherever they are.
    torch.testing.assert_close(of_query, torch.zeros(20), rtol=0, atol=1e-9)


def test_a_second_derivative_raises_instead_of_being_wrong(gen):
    kernel = matern(1.5)
    Lam, eta = (x.requires_grad_() for x in random_messages(gen, 10, 1))
    log_z = kalman_smoother(kernel.state_space(), torch.arange(10.0), Lam, eta).unwrap().log_z
    first = grad(log_z, (kernel.log_lengthscale, eta), create_graph=True)
    for value in first:
        with pytest.raises(RuntimeError, match="only once"):
            grad(value.sum(), kernel.log_lengthscale, retain_graph=True)
        with pytest.raises(RuntimeError, match="only once"):
            value.sum().backward(retain_graph=True)


def test_no_reference_cycle_keeps_the_buffers_alive(gen):
    import gc
    import weakref

    kernel = matern(1.5)
    Lam, eta = random_messages(gen, 10, 1)
    out = kalman_smoother(kernel.state_space(), torch.arange(10.0), Lam, eta).unwrap()
    buffers = weakref.ref(out._run)
    gc.disable()
    try:
        del out
        assert buffers() is None
    finally:
        gc.enable()
