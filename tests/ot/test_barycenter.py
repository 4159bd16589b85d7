"""Barycenters against closed forms, a plain iteration in the linear domain and POT."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc.ot._barycenter import barycenter


def histograms(gen, dim=12, n=3):
    A = torch.rand(dim, n, generator=gen) ** 2
    x = torch.linspace(0, 1, dim)
    return A / A.sum(0), (x[:, None] - x) ** 2


def bells(centres, widths, side=100):
    x = np.arange(float(side))
    A = np.stack([np.exp(-((x - c) ** 2) / (2 * s**2)) for c, s in zip(centres, widths, strict=True)], 1)
    return x, A / A.sum(0), (x[:, None] - x) ** 2


def moments(q, x):
    mean = q @ x
    return mean, np.sqrt(q @ (x - mean) ** 2)


def plain(A, M, reg, w, *, debiased=False, sweeps=20_000):
    """Algorithm 1 of Janati, Cuturi and Gramfort, with d = 1 the one of Benamou et al., by powers and products."""
    A, M = A.numpy(), M.numpy()
    K, d = np.exp(-M / reg), np.ones((M.shape[1], 1))
    u = np.ones((M.shape[1], A.shape[1]))
    for _ in range(sweeps):
        seen = K.T @ (A / (K @ u))
        q = d * np.prod(seen**w, axis=1, keepdims=True)
        u = q / seen
        if debiased:
            d = np.sqrt(d * q / (K @ d))
    return torch.from_numpy(q[:, 0])


def test_of_one_histogram_it_is_the_histogram_blurred_by_the_kernel(gen):
    A, M = histograms(gen, n=1)
    expected = (M / -0.05).softmax(1).T @ A[:, 0]
    torch.testing.assert_close(barycenter(A, M, 0.05), expected, rtol=0, atol=1e-13)


def test_debiased_of_one_histogram_it_is_the_histogram(gen):
    A, M = histograms(gen, n=1)
    # Taking back a blur contracts slowly: what is left is a multiple of the last move, tol.
    torch.testing.assert_close(barycenter(A, M, 0.005, debiased=True, tol=1e-11), A[:, 0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("reg", [1.0, 0.05])
def test_equals_the_plain_iteration(gen, reg):
    A, M = histograms(gen)
    w = torch.tensor([0.2, 0.5, 0.3])
    out = barycenter(A, M, reg, w, tol=1e-13)
    # Fixed points found to err 1e-13, times the condition of the problem.
    torch.testing.assert_close(out, plain(A, M, reg, w.numpy()), rtol=0, atol=1e-10)


def test_debiased_equals_the_plain_iteration(gen):
    A, M = histograms(gen)
    w = torch.tensor([0.2, 0.5, 0.3])
    out = barycenter(A, M, 0.01, w, debiased=True, tol=1e-12)
    torch.testing.assert_close(out, plain(A, M, 0.01, w.numpy(), debiased=True), rtol=0, atol=1e-8)


def test_equals_pot(gen):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    A, M = (t.numpy() for t in histograms(gen))
    w, reg = np.array([0.2, 0.5, 0.3]), 0.01
    options = {"stopThr": 1e-13, "numItermax": 20_000}
    for mine, theirs in (
        # POT 0.9.7 starts with scalings whose weighted geometric mean is 1 for equal weights alone; with others it ends
        # at a histogram of larger objective.
        (barycenter(A, M, reg, tol=1e-12), ot.bregman.barycenter(A, M, reg, **options)),
        (barycenter(A, M, reg, w, debiased=True, tol=1e-12), ot.bregman.barycenter_debiased(A, M, reg, w, **options)),
    ):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-8)


def test_a_weight_of_one_leaves_one_histogram(gen):
    A, M = histograms(gen)
    out = barycenter(A, M, 0.05, torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(out, barycenter(A[:, 1:2], M, 0.05), rtol=0, atol=1e-13)


def test_between_two_shifted_bells_lies_the_bell_in_the_middle():
    x, A, M = bells((30, 65), (6, 6))
    eps = 30.0
    mean, width = moments(barycenter(A, M, eps), x)
    # The blur of the kernel, of variance eps / 2. Tails of the bells beyond the grid are below 1e-6.
    assert mean == pytest.approx(47.5, abs=1e-3)
    assert width == pytest.approx(np.sqrt(36 + eps / 2), rel=1e-3)
    mean, width = moments(barycenter(A, M, eps, debiased=True), x)
    assert mean == pytest.approx(47.5, abs=1e-3)
    assert width == pytest.approx(6.0, rel=1e-3)


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.8])
def test_debiased_the_widths_of_bells_are_averaged(weight):
    x, A, M = bells((35, 60), (4, 7))
    q, w = barycenter(A, M, 10.0, [weight, 1 - weight], debiased=True), np.array([weight, 1 - weight])
    mean, width = moments(q, x)
    assert mean == pytest.approx(w @ [35, 60], abs=1e-2)
    # On the line W_2 averages quantiles; the rest of the bias is of second order in eps.
    assert width == pytest.approx(w @ [4, 7], rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("debiased", [False, True])
def test_order_mass_and_constants_do_not_matter(gen, debiased):
    A, M = histograms(gen)
    w = torch.tensor([0.2, 0.5, 0.3])
    options = {"debiased": debiased, "tol": 1e-12}
    base = barycenter(A, M, 0.01, w, **options)
    columns, bins = torch.randperm(3, generator=gen), torch.randperm(12, generator=gen)
    for other in (
        barycenter(A[:, columns], M, 0.01, w[columns], **options),
        barycenter(A, M + 3, 0.01, w, **options),
        barycenter(A, 4 * M, 0.04, 7 * w, **options),
        barycenter(5 * A, M, 0.01, w, **options) / 5,
        barycenter(A[bins], M[bins][:, bins], 0.01, w, **options)[bins.argsort()],
    ):
        torch.testing.assert_close(other, base, rtol=0, atol=1e-8)


def test_products_and_log_sum_exps_agree(gen, monkeypatch):
    A, M = histograms(gen)
    A[3, 0] = 0
    base = barycenter(A / A.sum(0), M, 0.01, debiased=True, tol=1e-12)
    monkeypatch.setattr("stochproc.ot._barycenter.PRODUCT_SPAN", 0.0)
    torch.testing.assert_close(barycenter(A / A.sum(0), M, 0.01, debiased=True, tol=1e-12), base, rtol=0, atol=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
def test_no_regularisation_is_too_small_for_finite_numbers(debiased):
    x, A, M = bells((10, 20), (2, 3), side=32)
    with pytest.warns(ConvergenceWarning, match="stopped at err"):
        q = barycenter(A, M, 1e-6, debiased=debiased, max_iter=150)
    assert np.isfinite(q).all()
    assert q.sum() == pytest.approx(1.0, abs=1e-12)
    # The quantiles in the middle, up to the unit of the grid.
    assert moments(q, x)[0] == pytest.approx(15.0, abs=1.0)


def test_forbidden_pairs_and_a_support_of_its_own(gen):
    A, _ = histograms(gen, n=2)
    M = torch.rand(12, 5, generator=gen)
    M[:4, 0] = torch.inf
    # The second histogram can't reach the first bin.
    A[4:, 1] = 0
    q = barycenter(A / A.sum(0), M, 0.1, tol=1e-11)
    assert q.shape == (5,)
    assert q[0] == 0
    torch.testing.assert_close(q[1:], barycenter(A / A.sum(0), M[:, 1:], 0.1, tol=1e-11), rtol=0, atol=1e-9)


def test_the_log_tells_how_it_ended(gen):
    A, M = histograms(gen)
    _, log = barycenter(A, M, 0.1, log=True)
    assert log["status"] == "converged"
    assert log["err"][-1] <= 1e-7
    assert log["niter"] >= len(log["err"])
    with pytest.warns(ConvergenceWarning, match="after 2 sweeps; raise max_iter"):
        _, log = barycenter(A, M, 0.01, max_iter=2, log=True)
    assert log["status"] == "max_iter"


def test_kinds_of_arrays(gen):
    A, M = histograms(gen)
    out = barycenter(A.numpy(), M.numpy(), 0.1)
    assert isinstance(out, np.ndarray)
    single = barycenter(A.float(), M.float(), 0.1)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, out, rtol=0, atol=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A": np.ones(3)}, ValueError, r"A must be a matrix .* got shape \(3,\)"),
        ({"A": -np.ones((3, 2))}, ValueError, "A must be finite and non-negative"),
        ({"A": np.array([[1.0, 1], [1, 1], [1, 0]])}, ValueError, "A must have columns of equal mass; got 3 and 2"),
        ({"M": np.ones((2, 2))}, ValueError, "M must have 3 rows"),
        ({"M": np.full((3, 3), np.nan)}, ValueError, "M must hold numbers"),
        ({"M": np.full((3, 3), np.inf)}, ValueError, "M must leave every bin"),
        ({"reg": 0}, ValueError, "reg must be positive"),
        ({"weights": np.ones(3)}, ValueError, r"weights must have shape \(2,\)"),
        ({"weights": np.zeros(2)}, ValueError, "weights must have positive total mass"),
        ({"debiased": True, "M": np.arange(9.0).reshape(3, 3)}, ValueError, "M must be square and symmetric"),
        ({"tol": -1.0}, ValueError, "tol must be positive"),
        ({"M": torch.ones(3, 3)}, TypeError, "all NumPy or all torch"),
    ],
)
def test_refuses_what_is_no_problem(change, error, message):
    args = {"A": np.ones((3, 2)), "M": 1 - np.eye(3), "reg": 1.0, **change}
    with pytest.raises(error, match=message):
        barycenter(**args)
