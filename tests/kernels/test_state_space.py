"""State spaces of kernels: covariances against the kernel, algebra of processes, derivatives, bad input."""

import math
import warnings

import pytest
import torch
from scipy.special import ive

from stochproc.exceptions import NumericalWarning
from stochproc.kernels import (
    RBF,
    ActiveDims,
    ArcCosine,
    Linear,
    Matern,
    Periodic,
    Polynomial,
    RationalQuadratic,
    Scale,
    StateSpace,
)

EXACT = {
    "matern12": lambda: Matern(0.7, nu=0.5),
    "matern32": lambda: Matern(0.7, nu=1.5),
    "matern52": lambda: Matern(0.7, nu=2.5),
    "linear": lambda: Linear(0.3, 0.7),
    "scaled": lambda: 2.5 * Matern(0.7, nu=1.5),
    "sum": lambda: Matern(0.7, nu=1.5) + 0.5 * Matern(3.0, nu=0.5) + Linear(0.1, 0.2),
    "product": lambda: Matern(0.7, nu=1.5) * Matern(2.0, nu=2.5) * Matern(9.0, nu=0.5),
    "nested": lambda: 2.0 * ((Matern(0.7) + 3.0 * Matern(0.2, nu=0.5)) * Matern(4.0, nu=1.5)),
    "active_dims": lambda: ActiveDims(Matern(0.7), [0]),
    # A lengthscale of 2 leaves out 2e-12 of the variance.
    "periodic": lambda: Periodic(2.0, period=1.3),
    "quasi_periodic": lambda: 3.0 * (Periodic(2.0, period=1.3) * Matern(4.0, nu=1.5)),
    "reversed": lambda: Matern(4.0, nu=1.5) * Periodic(2.0, period=1.3),
    "two_periods": lambda: Periodic(2.0, period=1.3) * Periodic(3.0, period=0.4),
    "co2": lambda: (
        60.0 * Matern(50.0)
        + 3.0 * (Periodic(2.0) * Matern(90.0, nu=1.5))
        + 0.5 * Matern(1.0, nu=0.5)
        + Linear(2.0, 9.0)
    ),
}
# Largest error of the covariance by order, as documented, in units of the variance; rounded up in the last digit.
RBF_ERROR = {2: 2.77e-2, 3: 6.45e-3, 4: 1.69e-3, 5: 6.2e-5, 6: 9.1e-6, 7: 7.0e-7, 8: 1.3e-7}


def column(t):
    return t.unsqueeze(-1)


@pytest.mark.parametrize("name", EXACT)
def test_the_covariance_of_exact_kernels_is_that_of_the_kernel(name, gen):
    kernel = EXACT[name]()
    # Twenty pairs of times, and of these three that coincide.
    s, t = 4 * torch.randn(20, 1, generator=gen), 4 * torch.randn(20, 1, generator=gen)
    s[:3] = t[:3]
    want = kernel.dense(column(s), column(t))
    got = kernel.state_space().covariance(s, t)
    # spec/kernel_layer section 7: 1e-10, of the variance.
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * want.abs().max().item())


def test_the_covariance_of_many_times_is_a_symmetric_matrix(gen):
    kernel, t = EXACT["sum"](), torch.randn(7, generator=gen)
    got = kernel.state_space().covariance(t, t)
    torch.testing.assert_close(got, kernel.dense(column(t)), rtol=1e-10, atol=1e-10)
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("order", RBF_ERROR)
def test_the_rbf_covariance_is_within_the_documented_error(order):
    kernel, t = RBF(1.7), torch.linspace(0, 15, 3001)
    got = kernel.state_space(order=order).covariance(t[:1], t)
    error = (got - kernel(column(t[:1]), column(t))).abs().max().item()
    assert error <= RBF_ERROR[order]
    assert got[0, 0].item() == pytest.approx(1.0, abs=1e-15)


def test_the_default_rbf_is_of_order_six_and_its_derivatives_are_close(gen):
    state_space, t = RBF(1.0).state_space(), torch.linspace(0, 8, 801)
    assert state_space.state_dim == 6
    A, _ = state_space.transition(t)
    row = state_space.derivative_output()
    first, second = (row @ A @ state_space.H.mT)[:, 0, 0], (row @ A @ row.mT)[:, 0, 0]
    value = torch.exp(-(t**2) / 2)
    # Not optimised: measured 3.1e-5 and 2.4e-4 of the variances of f and f'.
    assert (first + t * value).abs().max() < 1e-4
    assert (second - (1 - t**2) * value).abs().max() < 1e-3


@pytest.mark.parametrize(("lengthscale", "order"), [(1.0, None), (1.0, 4), (0.6, 7), (0.6, 15), (0.2, 30)])
def test_a_periodic_series_lacks_exactly_the_terms_left_out(lengthscale, order, gen):
    kernel, t = Periodic(lengthscale, period=2.0), torch.rand(40, generator=gen)
    got = kernel.state_space(order).covariance(t, t + 6.0)
    j = 7 if order is None else order
    missing = 2 * ive(range(j + 1, j + 400), lengthscale**-2).sum()
    error = kernel(column(t), column(t)) - got
    assert error.abs().max().item() <= missing + 1e-12
    torch.testing.assert_close(error.diagonal(), torch.full((40,), float(missing)), rtol=0, atol=1e-12)


def test_a_series_that_leaves_out_a_percent_of_the_variance_warns():
    with pytest.warns(NumericalWarning, match=r"leaves out 0.13 of the variance"):
        Periodic(0.2).state_space()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Periodic(0.2).state_space(order=20)


def test_huge_steps_of_a_periodic_process_are_reduced_exactly():
    state_space = Periodic(2.0, period=0.75).state_space()
    # Multiples of 3/4 plus 1/4, without rounding.
    A, Q = state_space.transition(torch.tensor([0.25, 3 * 2.0**40 + 0.25, 3 * 2.0**900]))
    eye = torch.eye(15)
    torch.testing.assert_close(A[1], A[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(A[2], eye, rtol=0, atol=0)
    assert not Q.any()


def test_batched_hyperparameters_give_batched_matrices(gen):
    lengthscale = torch.tensor([[0.5], [2.0]])
    period = torch.tensor([[1.0], [0.7]])
    kernel = 2.0 * (Matern(lengthscale, batch_shape=(2,)) * Periodic(2.0, period, batch_shape=(2,))) + Linear()
    state_space = kernel.state_space()
    assert state_space.batch_shape == (2,)
    s, t = torch.randn(5, generator=gen), torch.randn(2, 6, generator=gen)
    want = kernel(column(s), column(t))
    torch.testing.assert_close(state_space.covariance(s, t), want, rtol=1e-10, atol=1e-10)
    A, Q = state_space.transition(torch.rand(3, generator=gen))
    assert A.shape == Q.shape == (2, 3, state_space.state_dim, state_space.state_dim)
    assert state_space.prior(torch.tensor([1.0, 2.0])).shape == (2, *A.shape[-2:])
    assert state_space.derivative_output().shape == (2, 1, state_space.state_dim)
    one, many = (state_space.transition(d) for d in (0.3, torch.tensor([0.3])))
    assert torch.equal(one[0], many[0][:, 0])
    assert torch.equal(one[1], many[1][:, 0])


def test_a_batched_outputscale_makes_a_batch_of_one_kernel():
    state_space = Scale(Matern(0.5, nu=1.5), torch.tensor([[1.0], [4.0]]), batch_shape=(2,)).state_space()
    A, Q = state_space.transition(torch.tensor([0.1, 0.2]))
    assert A.shape == Q.shape == (2, 2, 2, 2)
    torch.testing.assert_close(Q[1], 4 * Q[0], rtol=1e-15, atol=0)
    torch.testing.assert_close(state_space.P0[1], 4 * state_space.P0[0])


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_joining_a_batch_is_stacking_its_elements(nu):
    scales, variances = torch.tensor([0.3, 0.7, 2.0]), torch.tensor([1.0, 0.2, 3.0])
    batch = Scale(Matern(scales[:, None], nu=nu, batch_shape=(3,)), variances[:, None], batch_shape=(3,))
    joined = batch.double().state_space().join()
    stacked = StateSpace.stack(
        [Scale(Matern(s, nu=nu), v).double().state_space() for s, v in zip(scales, variances, strict=True)]
    )
    times = torch.tensor([0.0, 0.1, 5.0])
    pairs = [
        *zip(joined.transition(times), stacked.transition(times), strict=True),
        (joined.prior(times[0]), stacked.prior(times[0])),
        (joined.H, stacked.H),
        (joined.covariance(times, times), stacked.covariance(times, times)),
    ]
    if nu > 0.5:
        pairs.append((joined.derivative_output(), stacked.derivative_output()))
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-15, atol=0)


def test_joining_shares_one_kernel_among_scaled_processes():
    joined = Scale(Matern(0.5, nu=1.5), torch.tensor([[1.0], [2.0]]), batch_shape=(2,)).double().state_space().join()
    t = torch.tensor([0.0, 0.4])
    cov = joined.covariance(t, t)
    assert cov.shape == (2, 2, 2, 2)
    torch.testing.assert_close(cov[..., 1, 1], 2 * cov[..., 0, 0])
    assert not bool(cov[..., 0, 1].any())


def test_joining_needs_a_batch():
    with pytest.raises(ValueError, match="batch axis"):
        Matern(1.0, nu=0.5).state_space().join()


def test_stacked_processes_are_independent_outputs(gen):
    kernels = [Matern(0.7, nu=1.5), 2.0 * Linear(0.3, 0.7), RBF(1.0) + Matern(0.4, nu=0.5)]
    stack = StateSpace.stack([k.state_space() for k in kernels])
    assert stack.n_outputs == 3
    assert stack.H.shape == (3, stack.state_dim)
    s, t = torch.randn(4, generator=gen), torch.randn(5, generator=gen)
    got = stack.covariance(s, t)
    assert got.shape == (4, 5, 3, 3)
    want = torch.stack([k.state_space().covariance(s, t) for k in kernels], -1).diag_embed()
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def brownian(variance=1.0, t0=0.0):
    one = torch.ones(1, 1)
    return StateSpace(0 * one, one, variance * one, one, 0 * one, t0=t0, name="Brownian motion")


def test_any_linear_sde_can_be_given_by_its_matrices():
    s, t = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([1.0, 3.0])
    torch.testing.assert_close(brownian(2.0).covariance(s, t), 2 * torch.minimum(s[:, None], t), rtol=1e-15, atol=0)
    F, L = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    integrated = StateSpace(F, L, torch.ones(1, 1), torch.tensor([[1.0, 0.0]]), torch.zeros(2, 2), t0=0)
    d = 3.0
    A, Q = integrated.transition(d)
    torch.testing.assert_close(A, torch.tensor([[1.0, d], [0.0, 1.0]]), rtol=1e-15, atol=0)
    torch.testing.assert_close(Q, torch.tensor([[d**3 / 3, d**2 / 2], [d**2 / 2, d]]), rtol=1e-14, atol=0)


def test_parts_that_start_at_different_times_keep_their_own_priors():
    parts = [brownian(t0=0.0), brownian(2.0, t0=1.5), Matern(1.0).state_space(), Linear(0.5, 0.2).state_space()]
    for joined in (StateSpace.stack(parts), StateSpace.stack(parts[::-1])):
        assert joined.t0 == 1.5
        want = torch.block_diag(*(p.prior(4.0) for p in joined.parts))
        torch.testing.assert_close(joined.prior(4.0), want, rtol=1e-15, atol=0)
        torch.testing.assert_close(joined.prior(1.5), joined.P0, rtol=1e-15, atol=0)
        with pytest.raises(ValueError, match=r"times must not lie before t0 = 1.5 of Brownian motion; got 1.0"):
            joined.prior(1.0)


def test_a_linear_trend_has_a_past():
    state_space = Linear(0.5, 0.2).state_space()
    assert state_space.t0 == 0
    assert state_space.noiseless
    prior = state_space.prior(torch.tensor(-3.0))
    torch.testing.assert_close(prior, torch.tensor([[0.2 + 0.5 * 9, -1.5], [-1.5, 0.5]]), rtol=1e-15, atol=0)


DIFFERENTIABLE = {
    "matern32": lambda: Matern(0.7, nu=1.5),
    "matern52": lambda: 2.0 * Matern(0.7, nu=2.5),
    "periodic": lambda: Periodic(2.0, period=1.3),
    "linear": lambda: Linear(0.3, 0.7),
    "quasi_periodic": lambda: Periodic(2.0, period=1.3) * Matern(4.0, nu=1.5) + Linear(0.3, 0.7),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_derivative_has_the_covariance_that_autograd_gives(name, gen):
    kernel = DIFFERENTIABLE[name]()
    state_space = kernel.state_space()
    t = torch.randn((), generator=gen)
    s = (t + 0.1 + torch.rand(6, generator=gen)).requires_grad_()
    A, _ = state_space.transition(s.detach() - t)
    P, row = state_space.prior(t), state_space.derivative_output()
    got = (row @ A @ P @ state_space.H.mT)[:, 0, 0]
    x = column(s)
    (want,) = torch.autograd.grad(kernel(x, t.reshape(1, 1)).sum(), s)
    # 1e-10 as for the covariance; a derivative of the seventh harmonic is 34 times as large.
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    # The variance of f' is minus the second derivative of the covariance at 0: 5/3 for the unit Matern 5/2.
    if name == "matern52":
        assert (row @ P @ row.mT).item() == pytest.approx(2 * 5 / 3 / 0.7**2, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "who"),
    [
        (lambda: Matern(1.0, nu=0.5), "Matern"),
        (lambda: 2.0 * Matern(1.0, nu=0.5) + Matern(1.0), "Matern"),
        (lambda: Matern(1.0, nu=0.5) * Periodic(), "Matern"),
    ],
)
def test_a_rough_process_has_no_derivative(make, who):
    with pytest.raises(ValueError, match=rf"{who}.*0\.5.* is not mean-square differentiable"):
        make().state_space().derivative_output()


@pytest.mark.parametrize("kernel", [RationalQuadratic(), Polynomial(), ArcCosine()])
def test_kernels_without_a_state_space_say_so(kernel):
    name = type(kernel).__name__
    with pytest.raises(NotImplementedError, match=f"{name} has no state-space form; RBF, Matern"):
        kernel.state_space()
    for combined in (Matern() + 2.0 * kernel, Matern() * kernel):
        with pytest.raises(NotImplementedError, match=rf"in part 2 of a (Sum|Product): {name} has no state-space form"):
            combined.state_space()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Matern([1.0, 2.0]).state_space(), NotImplementedError, "needs one input column"),
        (lambda: Periodic(1.0, period=[1.0, 2.0]).state_space(), NotImplementedError, "2 entries of period"),
        (lambda: ActiveDims(Matern(), [1]).state_space(), NotImplementedError, r"ActiveDims sees \(1,\)"),
        (lambda: (Linear() * Matern()).state_space(), ValueError, "starts at t0 = 0.0: Linear"),
        (lambda: RBF().state_space(order=9), ValueError, "order must be between 2 and 8; got 9"),
        (lambda: RBF().state_space(order=1), ValueError, "order must be between 2 and 8; got 1"),
        (lambda: Periodic().state_space(order=0), ValueError, "order must be between 1 and 1000; got 0"),
        (lambda: Matern().state_space().transition(-1.0), ValueError, "dt must be non-negative and finite; got -1.0"),
        (lambda: Matern().state_space().transition(math.inf), ValueError, "dt must be non-negative and finite"),
        (lambda: Matern().state_space().transition(torch.tensor([math.nan])), ValueError, "dt must be non-negative"),
        (lambda: Matern().state_space().prior(math.nan), ValueError, "t must be finite"),
        (lambda: brownian().prior(-1.0), ValueError, "times must not lie before t0 = 0.0 of Brownian motion"),
        (lambda: brownian().covariance(torch.tensor([-1.0]), torch.ones(1)), ValueError, "before t0"),
        (lambda: StateSpace.stack([]), ValueError, "at least one state space"),
        (
            lambda: StateSpace(-torch.ones(1, 1), *[torch.ones(1, 1)] * 3, torch.ones(2, 2)),
            ValueError,
            r"F, L, Qc, H, P0 must have shapes .* P0 \(2, 2\)",
        ),
        (
            lambda: StateSpace(torch.ones(1, 1) / 0, *[torch.ones(1, 1)] * 4),
            ValueError,
            "F must be finite",
        ),
        (
            lambda: StateSpace(torch.ones(1, 1), *[torch.ones(1, 1)] * 4).transition(1e4),
            OverflowError,
            r"exp\(F dt\) of this process overflows",
        ),
    ],
)
def test_bad_values_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Matern().state_space().transition(torch.ones(2, dtype=torch.int64)), TypeError, "dt must be float32"),
        (lambda: Matern().state_space().transition("1"), TypeError, "dt must be a tensor or a number; got str"),
        (lambda: Matern().state_space().transition(True), TypeError, "dt must be a tensor or a number; got bool"),
        (lambda: StateSpace.stack([Matern()]), TypeError, "parts must be state spaces; got Matern"),
        (lambda: RBF().state_space(order=2.5), TypeError, "order must be an integer"),
        (
            lambda: Matern([[1.0], [2.0]], batch_shape=(2,)).state_space().transition(torch.ones(3, 4)),
            ValueError,
            r"dt must have shape \(\*batch, n\) with a batch that broadcasts to \(2,\); got shape \(3, 4\)",
        ),
        (
            lambda: Matern([[1.0], [2.0]], batch_shape=(2,)).state_space().prior(torch.ones(3)),
            ValueError,
            r"t must have shape \(\*batch\)",
        ),
        (
            lambda: StateSpace.stack([Matern(torch.ones(n, 1), batch_shape=(n,)).state_space() for n in (2, 3)]),
            ValueError,
            "batch shapes of the parts must broadcast",
        ),
    ],
)
def test_bad_types_and_shapes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
