"""What the public functions refuse, and what comes back for which kind of input."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from stochproc import ot
from stochproc.solvers import Status

# Made at import, before the tests' default dtype is set.
M2 = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)


def vec(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": vec(0.5, -0.5)}, r"a must be finite and non-negative; got -0.5 at index 1"),
        ({"b": vec(math.nan, 0.5)}, r"b must be finite and non-negative; got nan at index 0"),
        ({"a": vec(math.inf, 0.5)}, r"a must be finite and non-negative; got inf at index 0"),
        ({"a": vec(0.0, 0.0)}, r"a must have positive total mass; got 0"),
        ({"b": vec(0.0, 0.0)}, r"b must have positive total mass; got 0"),
        ({"a": torch.ones(0), "M": torch.ones(0, 2)}, r"a must have at least one entry"),
        ({"M": torch.ones(2, 0), "b": None}, r"b must have at least one entry"),
        ({"a": vec(0.5, 0.6)}, r"a and b must have the same total mass; got 1.1 and 1.*unbalanced"),
        ({"M": M2.masked_fill(M2.triu() > 0, math.nan)}, r"M must hold numbers or \+inf; got nan at index \(0, 1\)"),
        ({"M": M2.masked_fill(M2.tril() > 0, -math.inf)}, r"M must hold .* got -inf at index \(1, 0\)"),
        ({"M": torch.stack([vec(math.inf, math.inf), vec(1.0, 0.0)])}, r"row 0 has weight and no finite cost"),
        ({"M": torch.stack([vec(0.0, math.inf), vec(1.0, math.inf)])}, r"column 1 has weight and no finite cost"),
        ({"reg": 0}, r"reg must be positive; got 0.*emd"),
        ({"reg": 0.0}, r"reg must be positive; got 0.*emd"),
        ({"reg": None}, r"reg must be positive; got None.*emd"),
        ({"reg": -1.0}, r"reg must be positive and finite; got -1.0"),
        ({"reg": math.nan}, r"reg must be positive and finite; got nan"),
        ({"reg": vec(0.1, 0.2)}, r"reg must be a number, of shape \(\); got shape \(2,\)"),
        ({"M": torch.ones(3, 2)}, r"a must have shape \(3,\) to fit M of shape \(3, 2\); got \(2,\)"),
        ({"M": torch.ones(2)}, r"M must have shape \(n, m\); got \(2,\)"),
        ({"method": "magic"}, r"method must be one of 'auto', 'newton', 'sns', 'sinkhorn', 'ssns'; got 'magic'"),
        ({"grad": "finite"}, r"grad must be one of 'implicit', 'envelope', 'unroll'; got 'finite'"),
        ({"reg_type": "l2"}, r"reg_type must be one of 'KL', 'entropy'; got 'l2'"),
        ({"storage": "disk"}, r"storage must be one of 'auto', 'dense', 'sparse'; got 'disk'"),
        ({"tol": 0.0}, r"tol must be positive and finite; got 0.0"),
        ({"max_iter": 0}, r"max_iter must be at least 1; got 0"),
        ({"potentials_init": (vec(0.0), vec(0.0, 0.0))}, r"potentials_init must hold f of shape \(2,\); got \(1,\)"),
        ({"potentials_init": (vec(math.nan, 0.0), vec(0.0, 0.0))}, r"potentials_init must be finite"),
    ],
)
def test_values_out_of_range_are_named(arguments, message):
    call = {"M": M2, "a": HALF, "b": HALF, "reg": 0.1} | arguments
    with pytest.raises(ValueError, match=message):
        ot.solve(**call)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": np.array([0.5, 0.5])}, r"all NumPy or all torch; got torch for M, b and ndarray for a"),
        ({"M": M2.half()}, r"M must hold integers, float32 or float64; got torch.float16"),
        ({"M": M2.bfloat16()}, r"M must hold integers, float32 or float64; got torch.bfloat16"),
        ({"a": HALF.to(torch.complex64)}, r"a must hold integers, float32 or float64; got torch.complex64"),
        ({"M": np.ones((2, 2), dtype=complex), "a": None, "b": None}, r"M must hold .* got complex128"),
        ({"M": None, "a": None, "b": None}, r"M must be an array of costs; got None"),
        ({"a": HALF.to("meta")}, r"arguments must be on one device"),
        ({"reg": "0.1"}, r"reg must be a number; got str"),
        ({"potentials_init": 3}, r"potentials_init must be a pair \(f, g\); got int"),
    ],
)
def test_kinds_that_do_not_fit_are_named(arguments, message):
    call = {"M": M2, "a": HALF, "b": HALF, "reg": 0.1} | arguments
    with pytest.raises(TypeError, match=message):
        ot.solve(**call)


def test_masses_that_differ_by_rounding_are_made_equal():
    result = ot.solve(M2, HALF, HALF * (1 + 1e-8), 0.1)
    torch.testing.assert_close(result.marginal_b, HALF, rtol=1e-9, atol=0)
    single = ot.solve(M2.float(), HALF.float(), HALF.float() * (1 + 5e-5), 0.1)
    assert single.converged
    with pytest.raises(ValueError, match="same total mass"):
        ot.solve(M2, HALF, HALF * (1 + 5e-5), 0.1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_numpy_in_gives_numpy_out(dtype):
    result = ot.solve(M2.numpy().astype(dtype), reg=0.1)
    for part in (result.plan, *result.potentials, *result.marginals):
        assert isinstance(part, np.ndarray)
        assert part.dtype == dtype
    for scalar in (result.value, result.value_linear):
        assert type(scalar) is dtype
    assert type(result.err) is type(result.gap) is float
    assert type(result.n_iter) is int


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_in_gives_torch_out(dtype):
    result = ot.solve(M2.to(dtype), reg=0.1)
    for part in (result.plan, *result.potentials, *result.marginals, result.value, result.value_linear):
        assert part.dtype == dtype
        assert not part.requires_grad
    assert result.value.shape == ()


def test_lists_and_integers_are_arrays_of_float64():
    result = ot.solve([[0, 1], [1, 0]], [1, 1], [1, 1], 1)
    assert result.plan.dtype == np.float64
    assert ot.solve(torch.tensor([[0, 1], [1, 0]]), reg=1).plan.dtype == torch.get_default_dtype()
    # Integers beside floats take their precision.
    assert ot.solve(torch.tensor([[0, 1], [1, 0]]), HALF.float(), HALF.float(), 1).plan.dtype == torch.float32


def test_single_and_double_give_double():
    assert ot.solve(M2.float(), HALF, HALF, 0.1).plan.dtype == torch.float64
    assert ot.solve(M2.numpy().astype(np.float32), HALF.numpy(), HALF.numpy(), 0.1).plan.dtype == np.float64


def test_inputs_are_never_written_to(gen):
    M, a, b = torch.rand(6, 9, generator=gen), torch.full((6,), 1 / 6), torch.full((9,), 1 / 9)
    before = [t.clone() for t in (M, a, b)]
    ot.solve(M, a, b, 0.01).plan.mul_(0)
    frozen = M.numpy().copy()
    frozen.flags.writeable = False
    ot.solve(frozen, a.numpy(), b.numpy(), 0.01)
    for t, old in zip((M, a, b), before, strict=True):
        torch.testing.assert_close(t, old, rtol=0, atol=0)


def test_strides_do_not_matter(gen):
    M = torch.rand(8, 12, generator=gen)
    expected = ot.solve(M, reg=0.05, tol=1e-13).plan
    wide = torch.empty(8, 24)
    wide[:, ::2] = M
    torch.testing.assert_close(ot.solve(wide[:, ::2], reg=0.05, tol=1e-13).plan, expected, rtol=0, atol=1e-12)
    flipped = np.ascontiguousarray(M.numpy()[::-1])[::-1]
    np.testing.assert_allclose(ot.solve(flipped, reg=0.05, tol=1e-13).plan, expected.numpy(), rtol=0, atol=1e-12)


def test_running_out_of_passes_warns_once_and_returns_the_best(gen):
    M = torch.rand(30, 30, generator=gen)
    with pytest.warns(ConvergenceWarning, match=r"max_iter.*err .* above tol 1e-09 after 5 passes") as caught:
        result = ot.solve(M, reg=1e-3, max_iter=5)
    assert len(caught) == 1
    assert result.status is Status.MAX_ITER
    assert not result.converged
    assert result.n_iter == 5
    assert bool(result.plan.isfinite().all())
    assert result.convergence.iterations == 5


def test_a_callback_sees_every_pass_and_can_stop(gen):
    M, seen = torch.rand(20, 20, generator=gen), []

    def watch(state):
        seen.append(state)
        return len(seen) == 4

    with pytest.warns(ConvergenceWarning, match="callback asked to stop"):
        result = ot.solve(M, reg=1e-3, callback=watch)
    assert result.status is Status.STOPPED
    assert [s.iteration for s in seen] == [1, 2, 3, 4]
    assert [(s.eps, s.err) for s in seen] == result.log
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ot.solve(M, reg=1e-3, callback=lambda state: None).converged


def test_progress_goes_to_stderr_behind_verbose(capsys):
    ot.solve(M2, reg=0.01)
    assert capsys.readouterr().err == ""
    ot.solve(M2, reg=0.01, verbose=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "transport" in captured.err


def test_results_are_computed_once_and_show_themselves():
    result = ot.solve(M2, reg=0.1)
    assert result.plan is result.plan
    assert result.potential_a is result.potentials[0]
    assert repr(result).startswith("OTResult(method='")
    assert result.stats["passes"] == result.n_iter
    assert result.stats["time_s"] > 0


def test_images_of_rows_are_averages_of_their_partners(gen):
    M, Y = torch.rand(5, 7, generator=gen), torch.rand(7, 2, generator=gen)
    result = ot.solve(M, reg=0.1)
    shares = result.a_to_b()
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    torch.testing.assert_close(result.a_to_b(values=Y), shares @ Y)
    torch.testing.assert_close(result.b_to_a(values=torch.eye(5)), (result.plan / result.plan.sum(0)).T)
    with pytest.raises(ValueError, match="X must be None for a problem given by its costs"):
        result.a_to_b(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"values must have shape \(7, p\); got \(5, 2\)"):
        result.a_to_b(values=torch.ones(5, 2))
    with pytest.raises(TypeError, match="torch tensors like the inputs"):
        result.a_to_b(values=Y.numpy())
