import math

import pytest
import torch

from stochproc.solvers import LineSearch, LineStep, Trial

EPS = torch.finfo(torch.float64).eps


def parabola(t):
    """Minimum -1 at t = 1."""
    return t * t - 2 * t


def test_full_step_is_taken_where_it_decreases_enough():
    assert LineSearch()(parabola, 0.0, -2.0) == LineStep(1.0, -1.0, None, 1, True)


def test_armijo_constant_bounds_the_first_accepted_step():
    # (t² - 2t) <= -2 c t exactly when t <= 2 (1 - c).
    for c in (0.1, 0.5, 0.9):
        found = LineSearch(armijo=c)(parabola, 0.0, -2.0, step0=64.0)
        assert found.accepted
        assert found.step <= 2 * (1 - c) < 2 * found.step


@pytest.mark.parametrize("shrink", [0.1, 0.5, 0.8])
def test_steps_are_a_geometric_sequence(shrink):
    seen = []

    def phi(t):
        seen.append(t)
        return 1.0 + t

    found = LineSearch(shrink=shrink, max_steps=5)(phi, 1.0, -1.0, step0=3.0)
    assert found == LineStep(0.0, 1.0, None, 5, False)
    assert seen == pytest.approx([3.0 * shrink**k for k in range(5)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_make_it_back_off(bad):
    found = LineSearch()(lambda t: bad if t > 0.2 else parabola(t), 0.0, -2.0)
    assert found.step == 0.125
    assert found.evaluations == 4


def test_payload_of_the_accepted_step_is_returned():
    found = LineSearch()(lambda t: (parabola(t), f"at {t}"), 0.0, -2.0, step0=4.0)
    assert found.step == 1.0
    assert found.payload == "at 1.0"


def test_tensors_and_numbers_give_the_same_step():
    x, d = torch.tensor([3.0, -1.0]), torch.tensor([-6.0, 2.0])

    def phi(t):
        return (x + t * d).square().sum()

    slope = 2 * x @ d
    found = LineSearch()(phi, phi(0.0), slope)
    assert found == LineSearch()(lambda t: float(phi(t)), float(phi(0.0)), float(slope))
    assert isinstance(found.value, float)
    assert found.step == 0.5


def test_rule_may_veto():
    found = LineSearch()(parabola, 0.0, -2.0, accept=lambda trial: trial.sufficient and trial.step < 0.3)
    assert found.step == 0.25
    assert found.evaluations == 3
    assert not LineSearch()(parabola, 0.0, -2.0, accept=lambda trial: False).accepted


def test_rule_may_let_through_what_armijo_would_not():
    # The clause of a transport solver: the error falls, and the value loses next to nothing.
    found = LineSearch()(
        lambda t: (5.0 + 1e-13 * t, 0.1), 5.0, -1.0, accept=lambda trial: trial.sufficient or trial.payload < 0.5
    )
    assert found.accepted
    assert found.step == 1.0


def test_rule_sees_the_trial_but_never_one_that_is_not_finite():
    seen = []

    def accept(trial):
        seen.append(trial)
        return trial.sufficient

    LineSearch()(lambda t: (math.nan if t == 1.0 else parabola(2 * t), t), 0.0, -4.0, accept=accept)
    assert seen == [Trial(0.5, -1.0, 0.5, True, False)]


def test_decrease_below_rounding_is_accepted_if_the_value_does_not_rise():
    # 1 - 1e-20 is 1: by Armijo's rule alone this would depend on the last bit.
    for noise in (0.0, EPS, -EPS):
        found = LineSearch()(lambda t, noise=noise: 1.0 + noise, 1.0, -1e-20)
        assert found.accepted
        assert found.step == 1.0
    assert not LineSearch(max_steps=3)(lambda t: 1.0 + 1e-13, 1.0, -1e-20).accepted


def test_flat_trials_are_marked():
    flags = []

    def accept(trial):
        flags.append(trial.flat)
        return False

    # 16 eps = 3.6e-15: the promise falls below it at the third step.
    LineSearch(max_steps=4)(lambda t: 1.0, 1.0, -1e-14, accept=accept)
    assert flags == [False, False, True, True]


def test_rounding_follows_the_coarsest_dtype():
    def phi(t):
        return torch.tensor(1.0 + 1e-6, dtype=torch.float32)

    one = torch.tensor(1.0, dtype=torch.float32)
    assert LineSearch()(phi, one, -1e-9).accepted
    assert LineSearch()(phi, 1.0, -1e-9).accepted
    assert not LineSearch()(lambda t: 1.0 + 1e-6, 1.0, -1e-9).accepted


def test_rounding_can_be_given():
    assert LineSearch(rounding=1e-5)(lambda t: 1.0 + 1e-6, 1.0, -1e-9).accepted
    assert not LineSearch(rounding=0.0)(lambda t: 1.0 + EPS, 1.0, -1e-20).accepted


def test_a_wrong_slope_is_not_followed():
    assert not LineSearch()(lambda t: 1.0 + t, 1.0, -1.0).accepted


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("armijo", 0.0, "armijo must be positive"),
        ("armijo", 1.0, r"armijo must lie in \(0, 1\)"),
        ("shrink", 1.5, r"shrink must lie in \(0, 1\)"),
        ("shrink", -0.5, "shrink must be positive"),
        ("max_steps", 0, "max_steps must be at least 1"),
        ("rounding", -1.0, "rounding must be non-negative"),
    ],
)
def test_rejects_options_out_of_range(option, value, match):
    with pytest.raises(ValueError, match=match):
        LineSearch(**{option: value})


@pytest.mark.parametrize(
    ("value0", "slope0", "step0", "match"),
    [
        (math.nan, -1.0, 1.0, "value0 must be finite"),
        (0.0, 1.0, 1.0, "slope0 must be finite and not positive"),
        (0.0, math.nan, 1.0, "slope0 must be finite and not positive"),
        (0.0, -1.0, 0.0, "step0 must be positive"),
    ],
)
def test_rejects_what_is_no_direction_of_descent(value0, slope0, step0, match):
    with pytest.raises(ValueError, match=match):
        LineSearch()(parabola, value0, slope0, step0)


@pytest.mark.bad_input
def test_rejects_values_that_are_no_numbers():
    with pytest.raises(TypeError, match="phi must be a number"):
        LineSearch()(lambda t: "low", 0.0, -1.0)
    with pytest.raises(ValueError, match=r"phi must be .* got shape \(2,\)"):
        LineSearch()(lambda t: torch.zeros(2), 0.0, -1.0)
    with pytest.raises(TypeError, match="value0 must be real"):
        LineSearch()(parabola, torch.tensor(1j), -1.0)
