import math

import pytest
import torch

from stochproc.exceptions import NotPositiveDefiniteError, SolverError
from stochproc.kernels import StateSpace
from stochproc.solvers import Status, kalman_smoother, messages

from .kalman_examples import matern, random_messages


def call(**changes):
    arguments = {
        "ss": matern(1.5).state_space(),
        "times": torch.arange(3.0),
        "Lam": torch.ones(3, 1, 1),
        "eta": torch.ones(3, 1),
    }
    arguments.update(changes)
    return kalman_smoother(*[arguments.pop(name) for name in ("ss", "times", "Lam", "eta")], **arguments)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": double(0.0, 2.0, 1.0)}, r"times must not decrease .* index \(1,\)"),
        ({"times": double(0.0, math.nan, 1.0)}, "times must be finite"),
        ({"query": double(math.inf)}, "query must be finite"),
        ({"times": ones(0), "Lam": ones(0, 1, 1), "eta": ones(0, 1)}, "n at least 1"),
        ({"method": "fast"}, "method must be one of 'auto', 'sequential', 'scan'; got 'fast'"),
        ({"mean": math.nan}, "mean must be finite"),
        ({"ss": StateSpace(*(ones(1, 1) for _ in range(5)), t0=1.0)}, "must not lie before t0 = 1.0"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Lam": ones(3)}, r"Lam must have shape \(\*batch, 3, 1, 1\) for 3 times and 1 outputs; got \(3,\)"),
        ({"Lam": ones(3, 2, 2)}, r"Lam must have shape \(\*batch, 3, 1, 1\)"),
        ({"eta": ones(4, 1)}, r"eta must have shape \(\*batch, 3, 1\)"),
        ({"offset": ones(3)}, r"offset must have shape \(\*batch, 3, 1\)"),
        ({"mean": ones(2)}, r"mean must be a number or have shape \(\*batch, 1\)"),
        ({"times": ones()}, r"times must have shape \(\*batch, n\)"),
        ({"query": ones()}, r"query must have shape \(\*batch, m\)"),
        (
            {"Lam": ones(2, 3, 1, 1), "eta": ones(5, 3, 1)},
            r"batch shapes must broadcast; got .* eta \(5,\)",
        ),
        ({"eta": ones(0, 3, 1)}, "batch must not be empty"),
    ],
)
def test_misshapen_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ss": matern(0.5)}, "ss must be a StateSpace; got Matern"),
        ({"eta": torch.ones(3, 1, dtype=torch.float32)}, "mixed dtypes: .* eta is torch.float32"),
        ({"times": torch.arange(3)}, "times must be float32 or float64"),
        ({"query": [1.0]}, "query must be a .*Tensor; got list"),
        ({"mean": "zero"}, "mean must be a number or a tensor; got str"),
    ],
)
def test_wrong_types_are_named(changes, message):
    with pytest.raises(TypeError, match=message):
        call(**changes)


def test_an_output_matrix_with_a_gradient_is_refused_rather_than_cut_off():
    F, L, Qc, H, P0 = (torch.ones(1, 1) for _ in range(5))
    with pytest.raises(ValueError, match=r"ss\.H must be constant"):
        call(ss=StateSpace(-F, L, Qc, H.requires_grad_(), P0 / 2))


@pytest.mark.parametrize("method", ["sequential", "scan"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["Lam", "eta"])
def test_nonfinite_messages_are_reported_and_spoil_their_own_series_alone(gen, method, bad, where):
    ss = matern(1.5).state_space()
    times = torch.arange(50.0) / 10
    Lam, eta = random_messages(gen, 3, 50, 1)
    good = kalman_smoother(ss, times, Lam[1], eta[1], method=method).unwrap()
    {"Lam": Lam, "eta": eta}[where][2, 17] = bad
    result = kalman_smoother(ss, times, Lam, eta, method=method)
    assert result.status is Status.NONFINITE
    assert result.stats["nonfinite"].tolist() == [False, False, True]
    assert result.convergence.residual == math.inf
    assert "1 of 3 series, the first at (2,)" in result.convergence.message
    torch.testing.assert_close(result.value.mean[1], good.mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(result.value.log_z[1], good.log_z, rtol=0, atol=1e-12)
    with pytest.raises(SolverError, match="nonfinite"):
        result.unwrap()


@pytest.mark.parametrize("method", ["sequential", "scan"])
@pytest.mark.parametrize(
    "precision",
    [[[-1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.5], [0.0, 1.0]]],
)
def test_precisions_that_are_not_positive_semidefinite_break_down(gen, precision, method):
    ss = StateSpace.stack([matern(1.5).state_space(), matern(0.5).state_space()])
    times = torch.arange(50.0) / 10
    Lam, eta = random_messages(gen, 2, 50, 2)
    good = kalman_smoother(ss, times, Lam[0], eta[0], method=method).unwrap()
    Lam[1, 20] = torch.tensor(precision)
    result = kalman_smoother(ss, times, Lam, eta, method=method)
    assert result.status is Status.BREAKDOWN
    assert "Lam is not symmetric positive semidefinite" in result.convergence.message
    assert result.stats["indefinite"].tolist() == [False, True]
    assert result.value.mean[1].isnan().all()
    assert result.value.cov[1].isnan().all()
    torch.testing.assert_close(result.value.mean[0], good.mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", ["sequential", "scan"])
def test_overflow_is_reported(gen, method):
    Lam, eta = random_messages(gen, 60, 1)
    eta[30] = 1e300
    result = kalman_smoother(matern(1.5).state_space(), torch.arange(60.0), Lam * 0 + 1e-300, eta, method=method)
    assert result.status is Status.NONFINITE


def test_messages_of_data_multiply_to_their_density(gen):
    y, f = torch.randn(2, 7, generator=gen), torch.randn(2, 7, generator=gen)
    noise = 0.1 + torch.rand(7, generator=gen)
    expected = torch.distributions.Normal(f, noise.sqrt()).log_prob(y).sum(-1)
    Lam, eta, constant = messages(y, noise)
    got = (eta[..., 0] * f - 0.5 * Lam[..., 0, 0] * f**2).sum(-1) + constant
    torch.testing.assert_close(got, expected)
    around = messages(y, noise, around_data=True)
    got = (-0.5 * around.Lam[..., 0, 0] * (f - y) ** 2).sum(-1) + around.constant
    torch.testing.assert_close(got, expected)
    assert not around.eta.any()


@pytest.mark.parametrize("full", [False, True])
def test_messages_of_several_outputs_leave_out_what_is_missing(gen, full):
    y, f = torch.randn(4, 3, generator=gen), torch.randn(4, 3, generator=gen)
    y[0, 1], y[2] = math.nan, math.nan
    root = torch.randn(3, 3, generator=gen)
    cov = root @ root.mT + torch.eye(3) if full else torch.diag(0.5 + torch.rand(3, generator=gen))
    how = {"noise_cov": cov} if full else {"noise": cov.diagonal()}
    Lam, eta, constant = messages(y, n_outputs=3, **how)
    expected = torch.zeros(())
    for i in range(4):
        seen = (~y[i].isnan()).nonzero()[:, 0]
        if len(seen):
            part = torch.distributions.MultivariateNormal(f[i, seen], cov[seen][:, seen])
            expected = expected + part.log_prob(y[i, seen])
    got = ((eta * f).sum(-1) - 0.5 * torch.einsum("na,nab,nb->n", f, Lam, f)).sum() + constant
    torch.testing.assert_close(got, expected)
    assert not Lam[2].any()
    assert not Lam[0, 1].any()


def test_float64_keeps_its_digits_whatever_the_default_dtype(gen):
    y = torch.randn(5, generator=gen)
    expected = messages(y, 0.1)
    out = kalman_smoother(matern(0.5).state_space(), torch.arange(5.0), *expected[:2], mean=0.1).unwrap()
    times = torch.arange(5.0)
    torch.set_default_dtype(torch.float32)
    got = messages(y, 0.1)
    again = kalman_smoother(matern(0.5).double().state_space(), times, *got[:2], mean=0.1).unwrap()
    torch.testing.assert_close(got.constant, expected.constant, rtol=0, atol=0)
    torch.testing.assert_close(again.log_z, out.log_z, rtol=0, atol=0)
    torch.testing.assert_close(again.mean, out.mean, rtol=0, atol=0)


def test_messages_are_differentiable_in_data_and_noise(gen):
    y, noise = (0.5 + torch.rand(5, 2, generator=gen) for _ in range(2))
    cov = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    leaves = [x.requires_grad_() for x in (y, noise, cov)]
    assert torch.autograd.gradcheck(lambda y, noise: tuple(messages(y, noise, n_outputs=2)), leaves[:2])

    def symmetric(y, cov):
        return tuple(messages(y, noise_cov=(cov + cov.mT) / 2, n_outputs=2))

    assert torch.autograd.gradcheck(symmetric, (leaves[0], leaves[2]))


def test_gradient_of_missing_data_is_zero_and_not_nan():
    y = torch.tensor([1.0, math.nan])
    noise = torch.tensor([0.5, 0.5], requires_grad=True)
    found = messages(y, noise)
    (got,) = torch.autograd.grad(found.constant + found.Lam.sum(), noise)
    assert got[1] == 0.0
    assert got[0].isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": -1.0}, "noise must be positive and finite; got -1.0"),
        ({"noise": double(1.0, 0.0, 1.0)}, "noise must be positive"),
        ({"noise": ones(2)}, "noise must broadcast to the shape of y"),
        ({}, "exactly one of noise and noise_cov"),
        ({"noise": 1.0, "noise_cov": ones(1, 1)}, "exactly one of noise and noise_cov"),
        ({"noise_cov": ones(2, 2)}, "noise_cov must broadcast"),
        ({"noise": 1.0, "n_outputs": 2}, r"y must have shape \(\*batch, n, 2\)"),
        ({"noise": 1.0, "y": double(math.inf)}, "y must be finite"),
    ],
)
def test_bad_arguments_of_messages_are_named(arguments, message):
    arguments = {"y": torch.zeros(3), **arguments}
    with pytest.raises(ValueError, match=message):
        messages(arguments.pop("y"), **arguments)


def test_an_indefinite_noise_covariance_is_refused():
    with pytest.raises(NotPositiveDefiniteError, match="noise_cov"):
        messages(torch.zeros(3, 2), noise_cov=torch.tensor([[1.0, 2.0], [2.0, 1.0]]), n_outputs=2)


@pytest.mark.bad_input
def test_messages_need_floating_tensors_of_one_dtype():
    with pytest.raises(TypeError, match=r"y must be a torch\.Tensor"):
        messages([1.0], 1.0)
    with pytest.raises(TypeError, match="mixed dtypes"):
        messages(torch.zeros(3), torch.ones(3, dtype=torch.float32))
