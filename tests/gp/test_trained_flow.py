import math

import mpmath as mp
import pytest
import torch

from stochproc.gp import GradientFlow

INF = math.inf


@pytest.mark.parametrize("time", [0.0, 1e-9, 0.3, 20.0, 1e9, INF])
@pytest.mark.parametrize("ridge", [0.0, 1e-12, 0.5])
def test_weights_are_exact_at_any_eigenvalue(time, ridge):
    flow = GradientFlow(time, 0.7, ridge)
    values = torch.tensor([1e-300, 1e-12, 1e-3, 0.9, 1.0, 1.1, 40.0, 1e8])
    with mp.workdps(40):
        want = []
        for value in values.tolist():
            total = mp.mpf(value) + mp.mpf(ridge)
            done = mp.mpf(1) if time == INF else -mp.expm1(-mp.mpf(0.7) * mp.mpf(time) * total)
            want.append(float(done / total))
    # Three roundings in the exponent are relative to the weight at most once.
    torch.testing.assert_close(flow.weights(values), torch.tensor(want), rtol=2e-15, atol=0)


def test_an_eigenvalue_of_zero_has_the_limit_as_its_weight():
    zero = torch.zeros(1)
    assert GradientFlow(3.0, 2.0).weights(zero).item() == 6.0
    assert GradientFlow(INF).weights(zero).item() == INF
    assert GradientFlow(INF, ridge=0.5).weights(zero).item() == 2.0
    # Even where the product of time and scale overflows.
    assert math.isfinite(GradientFlow(1e200, 1e200, rate="fixed").weights(zero, torch.tensor([1e200])).item())


def test_one_learning_rate_for_all_trains_large_scales_faster():
    values, scales = torch.tensor([0.0, 0.5, 3.0]), torch.tensor([0.2, 1.0, 7.0])
    fixed = GradientFlow(0.4, rate="fixed").weights(values, scales)
    for row, s in zip(fixed, scales.tolist(), strict=True):
        torch.testing.assert_close(row, GradientFlow(0.4 * s).weights(values))
    scaled = GradientFlow(0.4).weights(values, scales)
    torch.testing.assert_close(scaled, GradientFlow(0.4).weights(values).expand(3, 3))


@pytest.mark.parametrize(
    ("time", "rate", "depends"), [(1.0, "fixed", True), (INF, "fixed", False), (1.0, "scaled", False)]
)
def test_only_a_fixed_rate_at_finite_time_depends_on_the_scale(time, rate, depends):
    assert GradientFlow(time, rate=rate).depends_on_scale is depends
    values, scales = torch.tensor([0.5, 3.0]), torch.tensor([0.2, 7.0])
    weights = GradientFlow(time, rate=rate).weights(values, scales)
    assert bool((weights[0] != weights[1]).any()) is depends


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"time": -1.0}, ValueError, "time must be non-negative and finite; got -1.0"),
        ({"time": math.nan}, ValueError, "time must be non-negative"),
        ({"time": "long"}, TypeError, "time must be a number"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive"),
        ({"ridge": -0.1}, ValueError, "ridge must be non-negative"),
        ({"rate": "fast"}, ValueError, "rate must be one of 'scaled', 'fixed'; got 'fast'"),
    ],
)
def test_bad_options_name_themselves(options, error, message):
    with pytest.raises(error, match=message):
        GradientFlow(**options)
