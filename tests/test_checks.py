import math

import numpy as np
import pytest
import torch

from stochproc._checks import (
    check_choice,
    check_finite,
    check_floating,
    check_integer,
    check_positive,
    check_same_kind,
)


@pytest.mark.parametrize("value", [1, 0.5, 1e-300, np.float64(2), torch.tensor(3.0), torch.ones(2, 2), torch.ones(0)])
def test_positive_values_pass(value):
    check_positive("noise", value)


@pytest.mark.parametrize(
    "value", [0, 0.0, -1, -1e-300, math.nan, math.inf, torch.tensor(0.0), torch.tensor([1.0, -1.0])]
)
def test_other_values_are_not_positive(value):
    with pytest.raises(ValueError, match="noise must be positive and finite; got"):
        check_positive("noise", value)


def test_zero_passes_where_it_is_allowed():
    check_positive("noise", 0, zero=True)
    check_positive("noise", torch.tensor([0.0, 1.0]), zero=True)


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, torch.tensor([0.0, math.nan])])
def test_other_values_are_not_non_negative(value):
    with pytest.raises(ValueError, match="noise must be non-negative and finite"):
        check_positive("noise", value, zero=True)


def test_message_shows_the_number_or_the_smallest_entry():
    with pytest.raises(ValueError, match=r"got -2\.5\."):
        check_positive("noise", -2.5)
    with pytest.raises(ValueError, match=r"got -2\.5\."):
        check_positive("noise", torch.tensor([-2.5]))
    with pytest.raises(ValueError, match=r"got a tensor with entry -2\.5\."):
        check_positive("noise", torch.tensor([1.0, -2.5]))


def test_message_shows_the_offending_entry_and_not_an_innocent_smallest():
    with pytest.raises(ValueError, match="got a tensor with entry inf"):
        check_positive("noise", torch.tensor([1.0, math.inf]))
    with pytest.raises(ValueError, match="got a tensor with entry nan"):
        check_positive("noise", torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize("value", ["1", None, [1.0]])
@pytest.mark.bad_input
def test_what_is_not_a_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="noise must be a number or a tensor; got"):
        check_positive("noise", value)


@pytest.mark.parametrize("value", [1, np.int64(5), 10])
def test_integers_in_range_pass(value):
    check_integer("n", value, 1, 10)


@pytest.mark.parametrize("value", [1.0, "1", None, True])
def test_other_types_are_not_integers(value):
    with pytest.raises(TypeError, match=rf"n must be an integer; got {value!r} of type {type(value).__name__}"):
        check_integer("n", value, 1)


def test_integers_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"n must be at least 1; got 0\."):
        check_integer("n", 0, 1)
    with pytest.raises(ValueError, match=r"n must be between 1 and 10; got 11\."):
        check_integer("n", 11, 1, 10)


@pytest.mark.parametrize("value", ["a", 2.5, None])
def test_a_listed_choice_passes(value):
    check_choice("nu", value, ("a", 2.5, None))


@pytest.mark.parametrize("value", ["b", 2, np.array([1.0, 2.0]), True])
def test_another_value_is_no_choice(value):
    with pytest.raises(ValueError, match=r"nu must be one of 'a', 2\.5, None, 1; got"):
        check_choice("nu", value, ("a", 2.5, None, 1))


def test_float32_float64_and_none_are_floating():
    check_floating(x=torch.ones(1, dtype=torch.float32), y=torch.ones(1, dtype=torch.float64), z=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64, torch.bool])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(TypeError, match=f"y must be float32 or float64; got {dtype}"):
        check_floating(x=torch.ones(1), y=torch.ones(1, dtype=dtype))


@pytest.mark.bad_input
def test_an_array_is_not_a_tensor():
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor; got ndarray"):
        check_floating(x=np.ones(1))


def test_one_dtype_is_the_same_kind():
    check_same_kind(x=torch.ones(1), y=torch.ones(2, 2), z=None)
    check_same_kind()


def test_mixed_dtypes_are_both_named():
    with pytest.raises(TypeError, match=r"mixed dtypes: x is torch\.float32, y is torch\.float64\."):
        check_same_kind(x=torch.ones(1, dtype=torch.float32), y=torch.ones(1, dtype=torch.float64))


def test_mixed_devices_are_both_named():
    with pytest.raises(TypeError, match=r"mixed devices: x is on cpu, y is on meta\."):
        check_same_kind(x=torch.ones(1), y=torch.ones(1, device="meta"))


def test_finite_tensors_pass():
    check_finite("y", torch.tensor([0.0, -1e300]))
    check_finite("y", torch.ones(0))


def test_non_finite_entries_are_counted_and_the_first_is_located():
    y = torch.zeros(2, 3)
    y[0, 2], y[1, 1] = math.nan, math.inf
    with pytest.raises(
        ValueError, match=r"y must be finite; got 2 NaN or infinite entries, the first at index \(0, 2\)\."
    ):
        check_finite("y", y)
