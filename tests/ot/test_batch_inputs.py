"""What solve_batch accepts and refuses."""

import math

import numpy as np
import pytest
import torch

from stochproc.ot._batch import solve_batch

pytestmark = pytest.mark.bad_input

M = torch.arange(24.0).reshape(2, 3, 4) / 24
A, B = torch.full((2, 3), 1 / 3), torch.full((2, 4), 0.25)


def changed(tensor, where, value):
    out = tensor.clone()
    out[where] = value
    return out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"M": changed(M, (1, 0, 2), math.nan)}, r"M must hold numbers or \+inf; got nan at index \(1, 0, 2\)"),
        ({"M": changed(M, (1, 0, 2), -math.inf)}, r"M must hold numbers or \+inf; got -inf"),
        ({"M": M[0, 0]}, r"M must have shape \(B, n, m\), or \(n, m\) with weights \(B, n\); got \(4,\)"),
        ({"M": M[0], "a": None, "b": None}, "use solve for a single problem"),
        ({"M": M[:, :, :0]}, "b must have at least one entry"),
        ({"a": A[:, :2]}, r"a must have shape \(3,\) or \(2, 3\) .*got \(2, 2\)"),
        ({"b": B[:1]}, r"b must have shape \(4,\) or \(2, 4\) .*got \(1, 4\)"),
        ({"a": changed(A, (1, 1), -1.0)}, r"a must be finite and non-negative; got -1.0 at index \(1, 1\)"),
        ({"b": changed(B, (0, 1), math.nan)}, r"b must be finite and non-negative; got nan at index \(0, 1\)"),
        ({"a": changed(A, 1, 0.0)}, "a must have positive total mass"),
        ({"a": changed(A, (1, 1), 2.0)}, "a and b must have the same total mass"),
        ({"reg": None}, "reg must be positive; got None.*emd"),
        ({"reg": 0}, "reg must be positive; got 0.*emd"),
        ({"reg": -1.0}, "reg must be positive"),
        ({"reg": torch.tensor([0.1, math.nan])}, "reg must be positive and finite; got a tensor with entry nan"),
        ({"reg": torch.ones(3)}, r"reg must be a number, of shape \(\) or \(2,\); got shape \(3,\)"),
        ({"M": changed(M, (1, 2), math.inf)}, "row 2 of item 1 has weight and no finite cost"),
        ({"M": changed(M, (0, slice(None), 3), math.inf)}, "column 3 of item 0 has weight and no finite cost"),
        ({"reg_type": "l2"}, "reg_type must be one of 'KL', 'entropy'"),
        ({"grad": "unroll"}, "grad must be one of 'implicit', 'envelope'"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"max_iter": 0}, "max_iter must be at least 1"),
        ({"potentials_init": (A, A)}, r"potentials_init must hold g of shape \(2, 4\); got \(2, 3\)"),
        ({"potentials_init": (changed(A, 0, math.inf), B)}, "potentials_init must be finite; got .* in f"),
    ],
)
def test_refuses_values(arguments, message):
    arguments = {"M": M, "a": A, "b": B, "reg": 0.1} | arguments
    with pytest.raises(ValueError, match=message):
        solve_batch(arguments.pop("M"), arguments.pop("a"), arguments.pop("b"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"M": None}, "M must be an array of costs; got None"),
        ({"M": M.numpy()}, "all NumPy or all torch"),
        ({"M": M.half()}, "M must hold integers, float32 or float64; got torch.float16"),
        ({"max_iter": 1.5}, "max_iter must be an integer"),
        ({"potentials_init": A}, "potentials_init must be a pair"),
    ],
)
def test_refuses_types(arguments, message):
    arguments = {"M": M, "a": A, "b": B, "reg": 0.1} | arguments
    with pytest.raises(TypeError, match=message):
        solve_batch(arguments.pop("M"), arguments.pop("a"), arguments.pop("b"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"M": []}, "M must hold at least one matrix of costs; got an empty list"),
        ({"M": [M[0], M]}, r"M\[1\] must have shape \(n, m\) with at least one entry; got \(2, 3, 4\)"),
        ({"M": [M[0], None]}, r"M\[1\] must have shape \(n, m\)"),
        ({"a": A}, "a must be a list of 2 arrays, one for each matrix in M; got Tensor"),
        ({"b": [B[0]]}, "b must be a list of 2 arrays, one for each matrix in M; got 1 entries"),
        ({"a": [A[0], B[0]]}, r"a\[1\] must have shape \(3,\) to fit M\[1\]; got \(4,\)"),
        ({"a": [A[0], -A[0]]}, r"a\[1\] must be finite and non-negative"),
        ({"M": [M[0], changed(M[1], 0, math.nan)]}, r"M\[1\] must hold numbers or \+inf; got nan"),
        ({"reg": torch.ones(3)}, r"reg must be a number, of shape \(\) or \(2,\)"),
        ({"potentials_init": (A, B)}, "potentials_init must hold two lists of 2 arrays"),
        ({"potentials_init": ([A[0], A[0]], [B[0], A[0]])}, r"potentials_init must hold g\[1\] of shape \(4,\)"),
    ],
)
def test_refuses_lists(arguments, message):
    arguments = {"M": [M[0], M[1]], "a": None, "b": None, "reg": 0.1} | arguments
    with pytest.raises(ValueError, match=message):
        solve_batch(arguments.pop("M"), arguments.pop("a"), arguments.pop("b"), **arguments)


def test_lists_of_both_kinds_or_without_one_image_are_refused():
    with pytest.raises(TypeError, match="all NumPy or all torch"):
        solve_batch([M[0], M[1].numpy()], reg=0.1)
    with pytest.raises(ValueError, match="values must be None for a list of problems"):
        solve_batch([M[0]], reg=0.1).a_to_b(values=torch.ones(4, 2))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_numpy_comes_back_as_numpy(dtype):
    result = solve_batch(M.numpy().astype(dtype), reg=np.array([0.1, 0.2]))
    assert isinstance(result.plan, np.ndarray)
    assert result.plan.dtype == dtype
    assert isinstance(result.value, np.ndarray)
    assert result.value.dtype == dtype
    assert isinstance(result.potential_a, np.ndarray)
    assert result.potential_a.shape == (2, 3)
    assert isinstance(result.reg, np.ndarray)
    listed = solve_batch([M[0].numpy().astype(dtype), M[1, :2].numpy().astype(dtype)], reg=0.1)
    assert isinstance(listed.plan, list)
    assert listed.plan[1].dtype == dtype
    assert listed.plan[1].shape == (2, 4)


def test_integers_and_mixed_precision_are_promoted():
    whole = solve_batch((24 * M).round().long(), reg=1.0)
    assert whole.plan.dtype == torch.float64
    mixed = solve_batch(M.float(), A.double(), reg=0.1)
    assert mixed.plan.dtype == torch.float64


def test_inputs_are_left_as_they_were():
    arguments = [t.clone() for t in (M, A, B)]
    solve_batch(*arguments, reg=0.05, round=True)
    for before, after in zip((M, A, B), arguments, strict=True):
        assert torch.equal(before, after)
