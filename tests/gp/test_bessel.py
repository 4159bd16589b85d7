import math

import mpmath as mp
import pytest
import torch

from stochproc.gp._bessel import log_bessel_defect

EPS = torch.finfo(torch.float64).eps
ORDERS = [0.0, 0.3, -1.5, 7.0, 24.9, 25.1, -300.0]


def defect_mp(order, log_x):
    with mp.workdps(40):
        nu, x = abs(mp.mpf(order)), mp.exp(mp.mpf(log_x))
        return float(mp.log(mp.besselk(nu, x)) - nu * mp.asinh(nu / x) + mp.hypot(nu, x))


@pytest.mark.parametrize("order", ORDERS)
def test_the_bessel_function_is_that_of_mpmath(order):
    # The ends of both branches; at 3.2 the argument is 24.5, just below the series.
    log_x = [-200.0, -30.0, -3.0, 0.0, 2.0, 3.2, 3.3, 5.0]
    mine = log_bessel_defect(torch.tensor(order), torch.tensor(log_x))
    exact = torch.tensor([defect_mp(order, v) for v in log_x])
    # Below r = 25 rounding of the order times log x, up to 25 * 200.
    size = max(abs(order) if abs(order) < 25 else 1.0, 1.0) * 200
    torch.testing.assert_close(mine, exact, rtol=0, atol=4 * EPS * size + 1e-13)


@pytest.mark.parametrize("order", [5e4, -5e4, 1e9])
def test_large_orders_with_small_arguments_tend_to_the_gamma_function(order):
    # K ~ Gamma(nu)/2 (2/x)^nu with relative error x²/nu, here 1e-90; Stirling's error is 1/(12 nu).
    mine = log_bessel_defect(torch.tensor(order), torch.tensor(-100.0)).item()
    nu = abs(order)
    assert mine == pytest.approx(math.log(math.pi / 2 / nu) / 2 + 1 / (12 * nu), abs=1e-14)


@pytest.mark.parametrize("log_x", [7.0, 15.0, 100.0, 345.0, 700.0])
def test_large_arguments_tend_to_the_exponential(log_x):
    # Hankel's first term: D = log(pi/2x)/2 - 1/(8x) + O(1/x²) at order 0.
    mine = log_bessel_defect(torch.tensor(0.0), torch.tensor(log_x)).item()
    x = math.exp(log_x)
    assert mine == pytest.approx((math.log(math.pi / 2) - log_x) / 2 - 1 / (8 * x), abs=1e-6 / 7 + 1e-13)


@pytest.mark.parametrize(
    ("orders", "log_xs"),
    [([0.2, 3.0, -24.0], [-5.0, 0.0, 2.0]), ([0.2, 3.0, 54.0], [4.0, 5.0]), ([0.4, 20.0], [-300.0])],
)
def test_gradients_are_those_of_differences(orders, log_xs):
    order = torch.tensor(orders, requires_grad=True)
    log_x = torch.tensor(log_xs, requires_grad=True)
    assert torch.autograd.gradcheck(log_bessel_defect, (order, log_x[:, None]))


def test_the_defect_is_even_in_the_order():
    order, log_x = torch.linspace(0.0, 60.0, 31), torch.linspace(-10.0, 5.0, 11)[:, None]
    assert torch.equal(log_bessel_defect(order, log_x), log_bessel_defect(-order, log_x))
