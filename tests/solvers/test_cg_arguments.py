import dataclasses
import math
import pickle

import pytest
import torch

from stochproc.solvers import CG, Jacobi, Preconditioner


def test_options_are_frozen_and_survive_pickling():
    options = CG(rtol=1e-3, precond=Jacobi())
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.rtol = 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "rtol must be non-negative and finite; got -1"),
        ({"rtol": math.nan}, "rtol must be non-negative"),
        ({"atol": -1.0}, "atol must be non-negative"),
        ({"rtol": 0}, "rtol and atol must not both be zero"),
        ({"max_iter": 0}, "max_iter must be at least 1; got 0"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"flexible": -1}, "flexible must be at least 0"),
        ({"precond": "jacobi"}, "precond must be one of 'auto'; got 'jacobi'"),
    ],
)
def test_rejects_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        CG(**options)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precond": 3}, "precond must be 'auto'.*got int"),
        ({"project": 3}, "project must be a callable or None; got int"),
        ({"max_iter": 2.0}, "max_iter must be an integer"),
        ({"flexible": 2.0}, "flexible must be an integer"),
    ],
)
def test_rejects_options_of_a_wrong_type(options, message):
    with pytest.raises(TypeError, match=message):
        CG(**options)


@pytest.mark.parametrize(
    ("A", "b", "x0", "message"),
    [
        (torch.ones(3, 2), torch.ones(3), None, r"A must be square, \(\*batch, n, n\); got shape \(3, 2\)"),
        (torch.eye(3), torch.ones(4), None, "b must have 3 rows"),
        (torch.eye(3), torch.ones(2, 3, 1), None, "b must have 1 dimensions .* or 2"),
        (torch.eye(3).expand(2, 3, 3), torch.ones(4, 3), None, "batch shapes of A and b must broadcast"),
        (torch.eye(3), torch.ones(3), torch.ones(4), r"x0 must have the shape of the solution, \(3,\); got \(4,\)"),
        (lambda v: v[:1], torch.ones(3), None, r"A must return the shape of its argument, \(3,\); got \(1,\)"),
        (lambda v: v, torch.tensor(1.0), None, "b must have shape"),
    ],
)
def test_rejects_shapes_that_do_not_fit(A, b, x0, message):
    with pytest.raises(ValueError, match=message):
        CG()(A.double() if isinstance(A, torch.Tensor) else A, b.double(), None if x0 is None else x0.double())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("A", "b", "message"),
    [
        (torch.eye(2), torch.ones(2, dtype=torch.int64), "b must be float32 or float64; got torch.int64"),
        (torch.eye(2), torch.ones(2, dtype=torch.complex128), "b must be float32 or float64"),
        (torch.eye(2, dtype=torch.int64), torch.ones(2), "A must be float32 or float64"),
        (torch.eye(2, dtype=torch.float32), torch.ones(2, dtype=torch.float64), "A is torch.float32, b is"),
        (lambda v: v.float(), torch.ones(2, dtype=torch.float64), "the result of A is torch.float32, b is"),
        (lambda v: None, torch.ones(2), "A must return a torch.Tensor; got NoneType"),
        ("matrix", torch.ones(2), "A must be a tensor, a LinearOperator or a callable; got str"),
    ],
)
def test_rejects_other_kinds(A, b, message):
    with pytest.raises(TypeError, match=message):
        CG()(A, b)


def test_rejects_a_sparse_tensor():
    A = torch.eye(2, dtype=torch.float64).to_sparse()
    with pytest.raises(TypeError, match="Pass a sparse matrix to SparseCG"):
        CG()(A, torch.ones(2))


def test_rejects_a_preconditioner_of_another_size():
    P = Preconditioner("mine", torch.zeros(3, 0), torch.ones(3))
    with pytest.raises(ValueError, match="precond must have 2 rows as b does; got 3"):
        CG(precond=P)(torch.eye(2), torch.ones(2))


def test_rejects_an_option_object_without_entries():
    with pytest.raises(TypeError, match=r"precond=Jacobi\(\) needs A as a tensor or LinearOperator"):
        CG(precond=Jacobi())(lambda v: v, torch.ones(2))
