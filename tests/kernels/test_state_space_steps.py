"""Transitions of state spaces: accuracy against 50 digits, definiteness, semigroup and stationarity, gradients."""

import mpmath
import pytest
import torch

from stochproc.kernels import RBF, Linear, Matern, Periodic, StateSpace
from stochproc.kernels._parameters import with_parameters
from stochproc.kernels._state_space_matern import lower_gamma
from stochproc.kernels._state_space_noiseless import scaled_bessel
from stochproc.kernels._state_space_series import series_step

STATIONARY = {
    "matern12": lambda: Matern(0.7, nu=0.5),
    "matern32": lambda: Matern(0.7, nu=1.5),
    "matern52": lambda: Matern(0.7, nu=2.5),
    "rbf": lambda: RBF(0.7),
    "rbf2": lambda: RBF(0.7),
    "rbf8": lambda: RBF(0.7),
    "periodic": lambda: Periodic(1.0, period=1.3),
    "sum": lambda: 2.0 * Matern(0.7, nu=1.5) + RBF(3.0),
    "product": lambda: 0.5 * (Matern(0.7, nu=1.5) * Matern(2.0, nu=2.5)),
    "quasi_periodic": lambda: Periodic(1.0, period=1.3) * Matern(4.0, nu=2.5),
}
ALL = {**STATIONARY, "trend": lambda: Linear(0.3, 0.7) + Matern(0.7)}


def make(name):
    order = int(name[-1]) if name in ("rbf2", "rbf8") else None
    return ALL[name]().state_space(order)


def noise_by_mpmath(state_space, dt):
    """P - A P A' with so many digits that the cancellation does not matter."""
    with mpmath.workdps(300):
        F = mpmath.matrix(state_space.F.tolist())
        P = mpmath.matrix(state_space.P0.tolist())
        A = mpmath.expm(F * dt)
        Q = P - A * P * A.T
        D = state_space.state_dim
        return [torch.tensor([[float(m[i, j]) for j in range(D)] for i in range(D)]) for m in (A, Q)]


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_matern_transitions_agree_with_many_digits_for_short_and_long_steps(nu):
    state_space = Matern(1.0, nu=nu).state_space()
    rate = state_space.rate.item()
    dts = [
        1e-12,
        1e-9,
        1e-6,
        1e-4,
        1e-3,
        0.01,
        0.05,
        0.1,
        0.3,
        0.49 / rate,
        0.51 / rate,
        1.0,
        2.0,
        5.0,
        20.0,
        100.0,
        1e3,
    ]
    A, Q = state_space.transition(torch.tensor(dts))
    for i, dt in enumerate(dts):
        want_A, want_Q = matern_by_mpmath(nu, rate, dt)
        # Relative to the entry, except where an entry changes its sign: there to the size of the row and column.
        # At 1e3 A is 1e-430 to 1e-970: 0 in float64, 1e-149 here.
        torch.testing.assert_close(A[i], want_A, rtol=1e-12, atol=1e-15 * min(1.0, 1e2 * dt) if dt < 100 else 1e-70)
        scale = want_Q.diagonal().sqrt()
        error = (Q[i] - want_Q).abs()
        assert bool((error <= 1e-12 * want_Q.abs() + 1e-15 * scale[:, None] * scale).all()), (dt, error, want_Q)
        entrywise = want_Q.abs() > 0.1 * scale[:, None] * scale
        assert bool((error <= 1e-12 * want_Q.abs())[entrywise].all())


def matern_by_mpmath(nu, rate, dt):
    """A and Q from the exponential and a difference of covariances, whose cancellation 400 digits survive."""
    with mpmath.workdps(400):
        drift = {0.5: [[-1]], 1.5: [[0, 1], [-1, -2]], 2.5: [[0, 1, 0], [0, 0, 1], [-1, -3, -3]]}[nu]
        third = mpmath.mpf(1) / 3
        P = {0.5: [[1]], 1.5: [[1, 0], [0, 1]], 2.5: [[1, 0, -third], [0, third, 0], [-third, 0, 1]]}[nu]
        x, N, P = mpmath.mpf(rate) * mpmath.mpf(dt), mpmath.matrix(drift), mpmath.matrix(P)
        # F = -1 + N with N nilpotent: the series ends.
        D = N.rows
        N = N + mpmath.eye(D)
        A = mpmath.exp(-x) * sum((N**k * x**k / mpmath.factorial(k) for k in range(1, D)), mpmath.eye(D))
        Q = P - A * P * A.T
        return [torch.tensor([[float(m[i, j]) for j in range(D)] for i in range(D)]) for m in (A, Q)]


@pytest.mark.parametrize("order", [2, 6, 8])
@pytest.mark.parametrize("dt", [1e-6, 1e-3, 0.03, 0.5, 3.0, 20.0])
def test_rbf_noise_agrees_with_many_digits_entry_by_entry(order, dt):
    state_space = RBF(1.0).state_space(order)
    _, Q = state_space.transition(dt)
    _, want = noise_by_mpmath(state_space, dt)
    scale = want.diagonal().sqrt()
    # Rounding errors of A are doubled as often as A: 2^k eps, with 2^k at most |F| dt, about 1e3.
    bound = 1e-11 * scale[:, None] * scale
    assert bool(((Q - want).abs() <= bound).all()), ((Q - want) / bound).abs().max()


@pytest.mark.parametrize("order", [1, 3, 5])
def test_the_incomplete_gamma_function_keeps_its_relative_accuracy(order):
    y = torch.tensor([1e-40, 1e-12, 1e-3, 0.1, 0.5, 0.999, 1.0, 1.001, 1.7, 5.0, 40.0, 700.0])
    got = lower_gamma(y, order)
    want = [float(mpmath.gammainc(order, 0, v, regularized=True)) for v in y.tolist()]
    torch.testing.assert_close(got, torch.tensor(want), rtol=3e-13, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_the_noise_is_positive_semidefinite_for_all_steps(name):
    state_space = make(name)
    dt = torch.logspace(-12, 3, 61)
    _, Q = state_space.transition(dt)
    eps = torch.finfo(Q.dtype).eps
    largest = torch.linalg.matrix_norm(Q, 2)
    assert bool((torch.linalg.eigvalsh(Q)[..., 0] >= -8 * eps * largest).all())
    # Derivatives of an integrated noise have sizes dt^(k + 1/2): with the sizes taken out nothing hides.
    diagonal = Q.diagonal(dim1=-2, dim2=-1)
    assert bool((diagonal >= 0).all())
    inverse = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    scaled = Q * inverse[..., :, None] * inverse[..., None, :]
    assert bool((torch.linalg.eigvalsh(scaled)[..., 0] >= -8 * state_space.state_dim * eps).all())
    _, Q32 = state_space.transition(dt.float())
    assert Q32.dtype == torch.float32
    eps32 = torch.finfo(torch.float32).eps
    assert bool((torch.linalg.eigvalsh(Q32.double())[..., 0] >= -8 * eps32 * largest).all())


@pytest.mark.parametrize("name", ["matern12", "matern32", "matern52", "rbf2", "rbf", "rbf8", "product"])
def test_a_diagonally_scaled_noise_stays_regular_for_short_steps(name):
    # As dt -> 0 it tends to the correlations of repeatedly integrated white noise, or of their products.
    _, Q = make(name).transition(torch.logspace(-12, -3, 10))
    scale = Q.diagonal(dim1=-2, dim2=-1).rsqrt()
    lowest = torch.linalg.eigvalsh(Q * scale[..., :, None] * scale[..., None, :])[..., 0]
    assert bool((lowest > 0).all())
    # Deviations are of relative order dt |F|, at most 1e-3 * 30 here.
    if name != "product":
        torch.testing.assert_close(lowest, lowest[:1].expand(10), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_two_steps_are_one_step(name, gen):
    state_space = make(name)
    s, t = 0.5 * torch.rand(7, generator=gen), 2 * torch.rand(7, generator=gen)
    (A1, Q1), (A2, Q2), (A, Q) = (state_space.transition(d) for d in (s, t, s + t))
    size = state_space.P0.abs().max().item()
    # Rounding of s + t alone moves A by eps |F| |t|, here up to 1e-13.
    torch.testing.assert_close(A2 @ A1, A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A2 @ Q1 @ A2.mT + Q2, Q, rtol=1e-12, atol=1e-12 * size)


@pytest.mark.parametrize("name", STATIONARY)
def test_the_prior_is_stationary(name):
    state_space = make(name)
    assert state_space.stationary
    A, Q = state_space.transition(torch.logspace(-6, 4, 21))
    P = state_space.P0
    torch.testing.assert_close(A @ P @ A.mT + Q, P.expand_as(Q), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state_space.prior(5.0), P, rtol=0, atol=0)
    balance = state_space.F @ P
    noise = state_space.L @ state_space.Qc @ state_space.L.mT
    scale = state_space.F.abs().max().item() * P.abs().max().item()
    torch.testing.assert_close(balance + balance.mT + noise, torch.zeros_like(P), rtol=0, atol=1e-14 * scale)


@pytest.mark.parametrize("name", ALL)
def test_the_transition_is_the_exponential_of_the_drift(name):
    state_space = make(name)
    dt = torch.tensor([0.02, 0.7])
    A, Q = state_space.transition(dt)
    noise = state_space.L @ state_space.Qc @ state_space.L.mT
    want_A, want_Q = series_step(state_space.F, noise, dt)
    torch.testing.assert_close(A, torch.linalg.matrix_exp(state_space.F * dt[:, None, None]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(A, want_A, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(Q, want_Q, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_no_step_is_the_identity_and_a_huge_one_forgets(name, dtype):
    state_space = make(name)
    A, Q = state_space.transition(torch.zeros(2, dtype=dtype))
    assert torch.equal(A, torch.eye(state_space.state_dim, dtype=dtype).expand_as(A))
    assert not Q.any()
    assert A.dtype == Q.dtype == dtype
    huge = torch.tensor([1e30 if dtype == torch.float32 else 1e300], dtype=dtype, requires_grad=True)
    A, Q = state_space.transition(huge)
    assert bool(A.isfinite().all() and Q.isfinite().all())
    (grad,) = torch.autograd.grad(A.sum() + Q.sum(), huge)
    assert bool(grad.isfinite().all())
    if name not in ("periodic", "trend"):
        # Eleven doublings, each with a few roundings.
        rounding = 64 * torch.finfo(dtype).eps * state_space.P0.max().item()
        torch.testing.assert_close(Q[0], state_space.P0.to(dtype), rtol=0, atol=rounding)
        assert A.abs().max() < 1e-30


@pytest.mark.parametrize("name", ALL)
def test_gradients_in_steps_and_hyperparameters_agree_with_differences(name):
    # Small states, for speed. One harmonic: a lengthscale of 3 leaves out 0.3 % of the variance.
    small = {
        "periodic": Periodic(3.0, 1.3),
        "quasi_periodic": Periodic(3.0, 1.3) * Matern(4.0, nu=0.5),
        "product": 0.5 * (Matern(0.7, nu=1.5) * Matern(2.0, nu=0.5)),
    }
    kernel = small[name] if name in small else ALL[name]()
    order = 1 if name in small else int(name[-1]) if name in ("rbf2", "rbf8") else 2
    parameters = list(kernel.parameters())

    def run(dt, *values):
        names = [k for k, _ in kernel.named_parameters()]
        state_space = with_parameters(kernel, names, values).state_space(order)
        return (*state_space.transition(dt), state_space.P0, state_space.F)

    # Both sides of the switch between series and closed form.
    dt = torch.tensor([0.01, 0.3, 2.0], requires_grad=True)
    assert torch.autograd.gradcheck(run, (dt, *parameters), atol=1e-6, rtol=1e-5)
    # At dt = 0, where differences would need a negative step: dA/dt = F and dQ/dt = L Qc L'.
    state_space = kernel.state_space(order)
    noise = state_space.L @ state_space.Qc @ state_space.L.mT
    slopes = torch.autograd.functional.jacobian(lambda d: torch.stack(state_space.transition(d)), torch.zeros(1))
    torch.testing.assert_close(slopes[0, 0, ..., 0], state_space.F, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes[1, 0, ..., 0], noise, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_an_sde_given_by_matrices_agrees_with_differences(gen):
    F = (-torch.eye(3) + 0.5 * torch.randn(3, 3, generator=gen)).requires_grad_()
    Qc = torch.tensor([[0.7]], requires_grad=True)

    def run(F, Qc, dt):
        L, H = torch.tensor([[0.0], [0.5], [1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        return StateSpace(F, L, Qc, H, torch.eye(3), t0=0.0).transition(dt)

    dt = torch.tensor([0.1, 3.0], requires_grad=True)
    assert torch.autograd.gradcheck(run, (F, Qc, dt))


def test_scaled_bessel_functions_have_the_gradient_of_their_recurrence():
    z = torch.tensor([[0.01], [1.0], [30.0]], requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: scaled_bessel(v, 5), z)
    torch.testing.assert_close(scaled_bessel(z, 1)[:, :1], torch.special.i0e(z), rtol=1e-14, atol=0)
    torch.testing.assert_close(scaled_bessel(z, 1)[:, 1:], torch.special.i1e(z), rtol=1e-14, atol=0)


def test_extreme_lengthscales_stay_finite():
    dt = torch.tensor([1e-300, 1e-12, 1.0, 1e300])
    for lengthscale in (1e-150, 1e150):
        for kernel in (Matern(lengthscale), RBF(lengthscale), 2.0 * Matern(lengthscale) * Matern(1.0)):
            A, Q = kernel.state_space().transition(dt)
            (A.sum() + Q.sum()).backward()
            assert bool(A.isfinite().all() and Q.isfinite().all())
            assert all(bool(p.grad.isfinite().all()) for p in kernel.parameters())


def test_transitions_are_on_the_device_and_in_the_dtype_of_the_steps(device):
    kernel = 2.0 * Matern(1.0) * Periodic(2.0) + RBF(1.0) + Linear()
    want = kernel.state_space().transition(torch.tensor([0.1, 3.0]))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        got = kernel.state_space().transition(torch.tensor([0.1, 3.0], dtype=dtype, device=device))
        for a, b in zip(got, want, strict=True):
            assert a.device.type == device.type
            assert a.dtype == dtype
            torch.testing.assert_close(a.double().cpu(), b, rtol=tolerance, atol=tolerance)
