"""The rule that picks a backend, and what happens where KeOps cannot run."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from stochproc.kernels import RBF, Radial, keops_status, select_backend
from stochproc.kernels._dispatch import BACKENDS, THRESHOLDS, choose


def rule(pairs, device_type="cpu", backend="auto", dim=3, columns=1, has_formula=True):
    return choose(backend, pairs=pairs, dim=dim, columns=columns, device_type=device_type, has_formula=has_formula)


def test_the_rule_picks_by_size_device_and_formula():
    assert rule(1_000_000) == "dense"
    assert rule(1_000_001) == "chunked"
    assert rule(4_000_000, "cuda") == "dense"
    assert rule(4_000_001, "cuda") == "keops"
    assert rule(10**8, "cuda", dim=65) == "chunked"
    assert rule(10**8, "cuda", columns=17) == "chunked"
    assert rule(10**8, "cuda", has_formula=False) == "chunked"


def test_the_cpu_never_gets_keops_by_itself():
    assert {rule(10**k) for k in range(13)} == {"dense", "chunked"}


@pytest.mark.parametrize("backend", ["dense", "chunked", "keops"])
def test_an_explicit_backend_wins_over_the_rule(backend):
    assert rule(1, backend=backend) == rule(10**12, "cuda", backend=backend) == backend


@pytest.mark.bad_input
def test_an_unknown_backend_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown backend 'x'; valid: auto, chunked, dense, keops"):
        rule(1, backend="x")


def test_batches_count_as_pairs():
    x = torch.zeros(3, 700, 1)
    assert select_backend(RBF(), x[0]) == "dense"
    assert select_backend(RBF(), x) == "chunked"


def test_every_threshold_is_a_positive_number():
    assert all(v > 0 for v in THRESHOLDS.values())
    assert set(BACKENDS) == {"auto", "dense", "chunked", "keops"}


SCRIPT = """
import json, sys, warnings
import torch
from stochproc.kernels import RBF, matvec
from stochproc.exceptions import BackendError, BackendWarning
x, v = torch.linspace(0, 1, 7)[:, None], torch.ones(7, 1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first = matvec(RBF(), x, x, v, backend="keops")
    second = matvec(RBF(), x, x, v, backend="keops")
    try:
        matvec(RBF(), x, x, v, backend="keops", strict=True)
        strict = ""
    except BackendError as error:
        strict = str(error)
right = bool(torch.allclose(first, matvec(RBF(), x, x, v, backend="dense")) and torch.equal(first, second))
found = [str(w.message) for w in caught if issubclass(w.category, BackendWarning)]
print(json.dumps({"warnings": found, "right": right, "strict": strict}))
"""


def run_without_keops(**environment):
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "KEOPS_CACHE_FOLDER", "PYTEST_XDIST_WORKER")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**env, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def build_folder():
    """Name of the folder below KEOPS_CACHE_FOLDER in which KeOps keeps its index."""
    return "_".join(platform.uname()[:3]) + f"_p{sys.version.split(' ')[0]}"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no compiler", "wrong CXX", "no cache folder", "empty cache index"])
def test_where_keops_cannot_run_chunked_does_and_one_warning_says_why(case, tmp_path):
    if case == "no compiler":
        environment, reason = {"PATH": str(tmp_path)}, r"no C++ compiler was found (g++ or clang++)"
    elif case == "wrong CXX":
        environment, reason = {"CXX": "no-such-compiler"}, "no C++ compiler was found (CXX=no-such-compiler)"
    elif case == "no cache folder":
        (tmp_path / "file").write_text("")
        environment, reason = {"KEOPS_CACHE_FOLDER": str(tmp_path / "file" / "cache")}, "NotADirectoryError"
    else:
        folder = tmp_path / build_folder()
        folder.mkdir()
        for name in ("LoadKeOps_cpp_class", "LoadKeOps_nvrtc_class"):
            (folder / f"{name}_cache.pkl").write_bytes(b"")
        environment, reason = {"KEOPS_CACHE_FOLDER": str(tmp_path)}, "EOFError"
    found = run_without_keops(**environment)
    assert found["right"]
    assert len(found["warnings"]) == 1
    assert reason in found["warnings"][0]
    assert "chunked backend is used instead" in found["warnings"][0]
    assert reason in found["strict"]


def test_kernels_without_a_formula_fall_back_with_a_reason():
    class NoFormula(RBF):
        has_formula = False

    assert not NoFormula().has_formula
    assert issubclass(NoFormula, Radial)
    assert rule(10**8, "cuda", has_formula=NoFormula().has_formula) == "chunked"


@pytest.mark.keops
@pytest.mark.slow
@pytest.mark.parametrize("name", ["rbf", "matern12"])
def test_keops_compiled_here_agrees_with_dense(name, gen):
    from stochproc.kernels import Matern, matvec

    reason = keops_status(torch.float64)
    if reason is not None:
        pytest.skip(f"KeOps cannot be used here: {reason}")
    kernel = RBF(0.8) if name == "rbf" else Matern(0.8, nu=0.5)
    x = torch.randn(23, 2, generator=gen)
    # Coincident points: the gradient there is 0 by definition.
    y, v = torch.cat([x[:5], torch.randn(12, 2, generator=gen)]), torch.randn(17, 1, generator=gen)
    found = []
    for backend in ("keops", "dense"):
        xr = x.clone().requires_grad_()
        value = matvec(kernel, xr, y, v, backend=backend, strict=True)
        value.square().sum().backward()
        found.append((value.detach(), xr.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.keops
@pytest.mark.slow
def test_keops_soft_minimum_agrees_with_dense_where_columns_are_dropped(gen):
    from stochproc.kernels import argmin, logsumexp

    reason = keops_status(torch.float64)
    if reason is not None:
        pytest.skip(f"KeOps cannot be used here: {reason}")
    x, y, g = torch.randn(9, 2, generator=gen), torch.randn(6, 2, generator=gen), torch.randn(6, generator=gen)
    g[2:4] = -torch.inf
    for gg in (g, torch.full_like(g, -torch.inf)):
        got = logsumexp("sqeuclidean", x, y, gg, eps=0.3, backend="keops", strict=True)
        torch.testing.assert_close(got, logsumexp("sqeuclidean", x, y, gg, eps=0.3, backend="dense"))
    values, indices = argmin("sqeuclidean", x, y, backend="keops", strict=True)
    want, at = argmin("sqeuclidean", x, y, backend="dense")
    torch.testing.assert_close(values, want)
    assert torch.equal(indices, at)
