import math

import pytest
import torch

from stochproc.kernels import Linear, StateSpace
from stochproc.solvers import Status, _kalman, kalman_smoother, messages

from .kalman_examples import awkward_series, matern, random_messages, state_spaces

FIELDS = ("mean", "cov", "log_z", "state_mean", "state_cov", "filtered_mean", "filtered_cov", "predicted_mean")
FIELDS += ("predicted_cov", "lag_one_cov")


@pytest.mark.parametrize("name", state_spaces())
def test_scan_and_sequential_recursion_agree(gen, name):
    ss = state_spaces()[name]
    times, *_, missing = awkward_series(gen, 300)
    Lam, eta = random_messages(gen, 300, ss.n_outputs)
    Lam[missing], eta[missing] = 0.0, 0.0
    a, b = (kalman_smoother(ss, times, Lam, eta, method=m).unwrap() for m in ("scan", "sequential"))
    for field in FIELDS:
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65])
def test_no_length_of_the_series_or_of_a_block_is_special(gen, monkeypatch, n, length):
    monkeypatch.setattr(_kalman, "SHORT_BLOCKS", length)
    ss = state_spaces()["two functions"]
    times = (torch.rand(n, generator=gen) * 3).sort().values
    Lam, eta = random_messages(gen, n, 2, rank=1)
    result = kalman_smoother(ss, times, Lam, eta, method="scan")
    a, b = result.unwrap(), kalman_smoother(ss, times, Lam, eta, method="sequential").unwrap()
    assert result.convergence.residual < 1e-12
    for field in FIELDS:
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=0, atol=1e-12)


def test_gradients_do_not_see_the_blocks(gen, monkeypatch):
    times = (torch.rand(77, generator=gen) * 5).sort().values
    Lam, eta = random_messages(gen, 77, 1)
    found = []
    for length in (1, 3, 100):
        monkeypatch.setattr(_kalman, "SHORT_BLOCKS", length)
        kernel = matern(2.5)
        log_z = kalman_smoother(kernel.state_space(), times, Lam, eta, method="scan").unwrap().log_z
        found.append(torch.autograd.grad(log_z, kernel.log_lengthscale)[0])
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=1e-12)


def test_auto_scans_long_series_only(gen):
    ss = matern(0.5).state_space()
    for n, method in ((_kalman.SCAN_FROM - 1, "sequential"), (_kalman.SCAN_FROM, "scan")):
        result = kalman_smoother(ss, torch.arange(float(n)), *random_messages(gen, n, 1))
        assert result.stats["method"] == method


def test_steps_grow_with_the_logarithm_of_the_length(gen):
    ss = matern(0.5).state_space()
    steps = [
        kalman_smoother(ss, torch.arange(float(n)), *random_messages(gen, n, 1)).convergence.iterations
        for n in (1 << 8, 1 << 12)
    ]
    assert steps[1] - steps[0] == 4


@pytest.mark.parametrize("method", ["sequential", "scan"])
@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_variance_of_nearly_noiseless_data_keeps_its_digits(nu, method, monkeypatch):
    """At a point with noise R much below the spread of its prediction, the variance is R (1 - R/s + ..)."""
    monkeypatch.setattr(_kalman, "SHORT_BLOCKS", 2)
    ss = matern(nu, 1.0).state_space()
    noise = 1e-12
    times = torch.arange(20.0)
    found = messages(torch.sin(times), noise, around_data=True)
    query = torch.cat([times, times + 0.5])
    offset = torch.sin(times)[:, None]
    result = kalman_smoother(ss, times, *found[:2], offset=offset, query=query, method=method)
    out = result.unwrap()
    variance = out.cov[:20, 0, 0]
    # s is at least 1e-3 for steps of one lengthscale, also between neighbours.
    torch.testing.assert_close(variance, torch.full((20,), noise), rtol=3e-9, atol=0)
    assert (out.cov[20:, 0, 0] > 1e-4).all()
    assert not result.stats["negative_variance"].any()
    # Interpolation with no noise at all, dense: the difference is of the order of R.
    K = matern(nu, 1.0).dense(times[:, None]).detach()
    star = matern(nu, 1.0).dense(query[20:, None], times[:, None]).detach()
    torch.testing.assert_close(out.mean[20:, 0], star @ torch.linalg.solve(K, torch.sin(times)), rtol=0, atol=1e-9)
    log_p = -0.5 * torch.sin(times) @ torch.linalg.solve(K, torch.sin(times)) - 0.5 * torch.linalg.slogdet(K)[1]
    log_p = log_p - 10 * math.log(2 * math.pi)
    torch.testing.assert_close(out.log_z + found.constant, log_p, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["sequential", "scan"])
def test_near_ties_with_little_noise_have_positive_variances(method):
    times = torch.linspace(0, 1, 100).repeat_interleave(2)
    times[1::2] += 1e-9
    found = messages(torch.sin(5 * times), 1e-10)
    query = torch.linspace(-1, 2, 301)
    result = kalman_smoother(matern(2.5).state_space(), times, *found[:2], query=query, method=method)
    assert (result.unwrap().cov > 0).all()
    assert result.convergence.residual < 1e-10


@pytest.mark.parametrize("method", ["sequential", "scan"])
def test_a_trend_without_noise_is_a_straight_line_fit(gen, method):
    n = 150
    times = (torch.rand(n, generator=gen) * 4).sort().values
    y = 1 - 2 * times + 0.1 * torch.randn(n, generator=gen)
    found = messages(y, 0.01)
    out = kalman_smoother(Linear(4.0, 9.0).state_space(), times, *found[:2], method=method).unwrap()
    X = torch.stack([torch.ones(n), times], 1)
    cov = torch.linalg.inv(X.T @ X / 0.01 + torch.diag(torch.tensor([1 / 9.0, 1 / 4.0])))
    torch.testing.assert_close(out.mean[:, 0], X @ cov @ X.T @ y / 0.01, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.cov[:, 0, 0], ((X @ cov) * X).sum(1), rtol=0, atol=1e-10)


def test_a_known_start_stays_known(gen):
    walk = StateSpace(*(torch.tensor([[v]]) for v in (0.0, 1.0, 1.0, 1.0, 0.0)), t0=0.0)
    times = torch.arange(100.0)
    out = kalman_smoother(walk, times, *random_messages(gen, 100, 1), method="scan").unwrap()
    assert out.mean[0].item() == out.cov[0].item() == 0.0
    assert (out.cov[1:] > 0).all()


def test_a_million_steps_of_one_length_share_their_transition():
    ss = CountedTransitions(matern(1.5).state_space())
    n = 10_000
    kalman_smoother(ss, torch.arange(float(n)), torch.ones(n, 1, 1), torch.ones(n, 1)).unwrap()
    assert ss.count <= 2


class CountedTransitions:
    """Only what the smoother may use of a state space."""

    def __init__(self, inner):
        self.inner, self.count = inner, 0
        self.H, self.batch_shape, self.prior = inner.H, inner.batch_shape, inner.prior

    def transition(self, dt):
        self.count += dt.numel()
        return self.inner.transition(dt)


@pytest.mark.slow
def test_memory_is_proportional_to_what_is_kept(gen):
    import subprocess
    import sys

    code = """
import pathlib, torch
from stochproc.kernels import Matern
from stochproc.solvers import kalman_smoother
torch.set_default_dtype(torch.float64)
def once(n):
    times = torch.rand(n).sort().values * n / 10
    with torch.no_grad():
        out = kalman_smoother(Matern(nu=1.5).state_space(), times, torch.ones(n, 1, 1), torch.ones(n, 1)).unwrap()
    return out
def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
once(1000)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = peak()
out = once(100_000)
print((peak() - before) / 100_000)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    # Kept: A, Q, two adjoints, states and rows, 40 numbers of 8 bytes a point, and as much again while it runs.
    assert float(run.stdout) < 2 * 8 * 100


def test_status_of_blocks_that_disagree_is_stagnated(gen, monkeypatch):
    # A tolerance of zero stands for rounding that a well-posed model does not reach.
    monkeypatch.setattr(_kalman.math, "sqrt", lambda x: 0.0)
    result = kalman_smoother(matern(1.5).state_space(), torch.rand(100).sort().values, *random_messages(gen, 100, 1))
    assert result.status is Status.STAGNATED
    assert "rounding spoilt" in result.convergence.message
