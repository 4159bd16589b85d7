"""Slopes, curvatures and the parts of sums against closed forms of a dense Gaussian process."""

import math

import numpy as np
import pytest
import torch

from stochproc.kernels import RBF, Linear, Matern, Periodic, Scale
from stochproc.tensor import StateSpaceGP

QUERY = np.array([3.31, 0.4, 7.52, 11.0])
NOISE = 0.05


def series(n=50, seed=0):
    """Unsorted times with ties and a gap, values missing, known variances of several sizes."""
    rng = np.random.default_rng(seed)
    times = rng.uniform(0, 10, n)
    times[times > 6] += 2
    times[:4] = times[4:8]
    y = np.sin(2 * times) + 0.3 * times + 0.1 * rng.normal(size=n)
    y[[3, 17]] = np.nan
    return times, y, rng.uniform(0.01, 0.2, n)


def as_given(kernel, **options):
    """Hyperparameters as they are, data as they are."""
    return StateSpaceGP(kernel, noise=NOISE, mean="zero", normalize_y=False, optimizer=None, **options)


def conditioned(kernel, times, y, known, cross, variance):
    """Mean and sd of linear functionals of the process from their covariances with the data and their own variance."""
    seen = ~np.isnan(y)
    x, target = torch.tensor(times[seen])[:, None], torch.tensor(y[seen])
    with torch.no_grad():
        factor = torch.linalg.cholesky(kernel.dense(x) + torch.diag(torch.tensor(known[seen]) + NOISE))
        white = torch.linalg.solve_triangular(factor, cross(x[:, 0]).mT, upper=False)
        z = torch.linalg.solve_triangular(factor, target[:, None], upper=False)
    return (white.mT @ z)[:, 0].numpy(), (variance - white.square().sum(0)).sqrt().numpy()


def matern52(r, order):
    """Derivative of the covariance of a Matern 5/2 with lengthscale 1 in its lag r >= 0, of order 0, 1, 2 or 4."""
    rate = math.sqrt(5)
    a = rate * r
    polynomial = {
        0: 1 + a + a**2 / 3,
        1: -(a + a**2) / 3,
        2: -(1 + a - a**2) / 3,
        4: 1 - (5 * a - a**2) / 3,
    }[order]
    return rate**order * polynomial * torch.exp(-a)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("l", [1.0, 0.6])
def test_derivatives_of_a_matern_are_those_of_its_closed_form(order, l):
    times, y, known = series()
    kernel = Scale(Matern(l, nu=2.5), 1.7)
    lag = torch.tensor(QUERY)[:, None]

    def cross(x):
        r = (lag - x) / l
        return 1.7 * matern52(r.abs(), order) * (r.sign() if order == 1 else 1.0) / l**order

    # Cov(f', f') is -k'', Cov(f'', f'') the fourth derivative, at lag zero.
    own = {1: -matern52(torch.zeros(()), 2), 2: matern52(torch.zeros(()), 4)}[order] * 1.7 / l ** (2 * order)
    mean, std = conditioned(kernel, times, y, known, cross, own)
    model = as_given(kernel).fit(times, y, noise=known)
    found, spread = model.predict_derivative(QUERY, return_std=True, order=order)
    # 50 points: rounding of the dense factor, cond 1e3.
    np.testing.assert_allclose(found, mean, atol=1e-9)
    np.testing.assert_allclose(spread, std, atol=1e-9)


SMOOTH = {
    "trend": lambda: Linear(0.5, 0.8) + Scale(Matern(1.0, nu=2.5), 0.7),
    "season": lambda: Matern(8.0, nu=2.5) + Periodic(1.5, period=2.0) * Matern(20.0, nu=2.5),
    "product": lambda: Matern(1.0, nu=2.5) * Matern(2.0, nu=2.5),
    "rbf": lambda: RBF(1.5) + Matern(1.0, nu=2.5),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_of_sums_and_products_are_those_of_the_mean(name):
    times, y, known = series()
    y = np.stack([y, np.cos(times)], axis=1)
    model = StateSpaceGP(SMOOTH[name](), noise=NOISE, optimizer=None, normalize_X=True).fit(times, y, noise=known)
    h = 1e-3
    before, at, after = (model.predict(QUERY + step) for step in (-h, 0.0, h))
    # Central differences: truncation by higher derivatives of some 10 h^2 and 100 h, rounding of 1e-13 / h^2. A Matern
    # 5/2 has a third derivative at no datum; the query is off them by more than h.
    np.testing.assert_allclose(model.predict_derivative(QUERY), (after - before) / (2 * h), atol=2e-4)
    np.testing.assert_allclose(
        model.predict_derivative(QUERY, order=2), (after - 2 * at + before) / h**2, rtol=1e-3, atol=2e-3
    )


def test_variances_of_derivatives_of_a_product_follow_from_its_factors():
    # Far from the data: Var f'' of a product of independent stationary factors is k1'''' + 6 k1'' k2'' + k2'''' at 0.
    model = as_given(Matern(1.0, nu=2.5) * Matern(2.0, nu=2.5)).fit([0.0, 1.0], [0.3, 0.2])
    slope, curve = (model.predict_derivative([1e4], return_std=True, order=order)[1][0] for order in (1, 2))
    second, fourth = 5 / 3, 25.0
    assert slope**2 == pytest.approx(second + second / 4, rel=1e-12)
    assert curve**2 == pytest.approx(fourth + 6 * second * second / 4 + fourth / 16, rel=1e-12)


def test_derivatives_are_in_the_units_of_the_data():
    times, y, _ = series()
    base = StateSpaceGP(Matern(1.0, nu=2.5), optimizer=None).fit(times, y)
    other = StateSpaceGP(Matern(60.0, nu=2.5), optimizer=None).fit(60 * times, 10 * y)
    for order in (1, 2):
        for ours, theirs in zip(
            base.predict_derivative(QUERY, return_std=True, order=order),
            other.predict_derivative(60 * QUERY, return_std=True, order=order),
            strict=True,
        ):
            np.testing.assert_allclose(theirs, ours * 10 / 60.0**order, rtol=1e-10)


@pytest.mark.parametrize(
    ("kernel", "last"),
    [
        (Matern(nu=0.5), 0),
        (Matern(nu=1.5), 1),
        (Matern(nu=2.5), 2),
        (RBF(), 3),
        (Matern(nu=2.5) + Matern(nu=1.5), 1),
        (Periodic() * Matern(nu=1.5), 1),
        (Matern(nu=2.5) * Matern(nu=0.5), 0),
        (Linear() + 2.0 * Matern(nu=2.5), 2),
        (Periodic(), 8),
    ],
)
def test_rough_processes_have_no_higher_derivatives(kernel, last):
    model = StateSpaceGP(kernel, optimizer=None).fit([0.0, 1.0, 2.0], [0.0, 1.0, 0.0])
    if last:
        assert np.isfinite(model.predict_derivative([0.5], return_std=True, order=last)).all()
    if not isinstance(kernel, Periodic):
        with pytest.raises(ValueError, match=f"order must be at most {last}" if last else "not mean-square diff"):
            model.predict_derivative([0.5], order=last + 1)


SUMS = {
    "trend and season": lambda: Linear(0.5, 0.8) + Periodic(1.5, period=2.0) * Matern(20.0, nu=0.5) + Matern(nu=1.5),
    "multiple of a sum": lambda: Scale(Matern(3.0, nu=2.5) + Scale(Matern(0.3, nu=0.5), 0.2), 1.3),
    "no sum": lambda: Matern(0.7, nu=1.5),
}


@pytest.mark.parametrize("name", SUMS)
def test_components_are_the_dense_posteriors_of_the_parts(name):
    times, y, known = series()
    kernel = SUMS[name]()
    factor = kernel.outputscale.item() if isinstance(kernel, Scale) else 1.0
    parts = getattr(kernel.kernel if isinstance(kernel, Scale) else kernel, "kernels", [kernel])
    model = as_given(kernel).fit(times, y, noise=known)
    mean, std = model.predict_components(QUERY, return_std=True)
    assert mean.shape == std.shape == (4, len(parts))
    at = torch.tensor(QUERY)[:, None]
    for k, part in enumerate(parts):
        with torch.no_grad():
            own = factor * part.diag(at)
        expected = conditioned(
            kernel, times, y, known, lambda x, part=part: factor * part.dense(at, x[:, None]).detach(), own
        )
        # The series of the periodic kernel leaves out 1e-10 of its variance.
        np.testing.assert_allclose(mean[:, k], expected[0], atol=1e-8)
        np.testing.assert_allclose(std[:, k], expected[1], atol=1e-8)
    np.testing.assert_allclose(mean.sum(1), model.predict(QUERY), rtol=1e-10)


def test_components_of_several_outputs_add_up_to_their_predictions():
    times, y, known = series()
    y = np.stack([y, 100 + 7 * np.cos(times)], axis=1)
    model = StateSpaceGP(Matern(5.0, nu=2.5) + Matern(0.5, nu=0.5), optimizer=None).fit(times, y, noise=known)
    mean, std = model.predict_components(QUERY, return_std=True)
    assert mean.shape == std.shape == (4, 2, 2)
    np.testing.assert_allclose(mean.sum(1) + model.mean_, model.predict(QUERY), rtol=1e-12)
    assert isinstance(model.predict_components(torch.tensor(QUERY)), torch.Tensor)


@pytest.mark.slow
def test_components_take_apart_what_was_added():
    rng = np.random.default_rng(0)
    times = np.arange(0, 8, 1 / 24)
    slow, season = 0.5 * (times - 4) ** 2, 2 * np.sin(2 * np.pi * times)
    y = slow + season + 0.1 * rng.normal(size=len(times))
    year = Periodic(1.0, period=1.0)
    year.log_period.requires_grad_(False)
    model = StateSpaceGP(Scale(Matern(5.0, nu=2.5)) + Scale(year), noise=0.05).fit(times, y)
    (trend, rhythm), (_, rhythm_std) = (part.T for part in model.predict_components(times, return_std=True))
    # The level is shared by trend and mean; the rest is known to a few hundredths, 0.1 / sqrt(24).
    np.testing.assert_allclose(rhythm - rhythm.mean(), season, atol=0.12)
    np.testing.assert_allclose(trend - trend.mean(), slow - slow.mean(), atol=0.2)
    assert (np.abs(rhythm - season) < 5 * rhythm_std).all()


@pytest.mark.bad_input
def test_the_order_of_a_derivative_is_checked():
    model = StateSpaceGP(optimizer=None).fit([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="order must be at least 1; got 0"):
        model.predict_derivative([0.5], order=0)
    with pytest.raises(TypeError, match="order must be an integer"):
        model.predict_derivative([0.5], order=1.5)
