import json
import subprocess
import sys
import time

import pytest

import stochproc


def fresh(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_the_standard_library_alone():
    code = (
        "import sys, json; before = set(sys.modules); import stochproc;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    roots = {name.partition(".")[0] for name in json.loads(fresh(code))}
    assert roots - sys.stdlib_module_names == {"stochproc"}


def test_import_costs_at_most_fifty_milliseconds():
    def best(code):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            fresh(code)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best("import stochproc") - best("pass") <= 0.05


def test_a_part_is_loaded_on_first_use():
    code = (
        "import sys, stochproc; early = 'stochproc.exceptions' in sys.modules;"
        "stochproc.exceptions; print(early, 'stochproc.exceptions' in sys.modules)"
    )
    assert fresh(code).split() == ["False", "True"]


def test_exceptions_need_nothing_but_the_standard_library():
    code = "import sys, stochproc.exceptions; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert fresh(code).split() == ["False", "False"]


@pytest.mark.slow
def test_solvers_do_not_load_what_only_some_models_need():
    late = ("gpytorch", "pykeops", "torchsde", "sklearn", "matplotlib", "pandas")
    code = f"import sys, stochproc.solvers; print(*[m for m in {late} if m in sys.modules])"
    assert fresh(code).split() == []


def test_every_advertised_name_exists():
    assert dir(stochproc) == sorted(stochproc.__all__)
    for name in ("__version__", "exceptions", "solvers"):
        assert getattr(stochproc, name) is not None


@pytest.mark.parametrize("name", [n for n in stochproc.__all__ if n != "__version__"])
def test_every_part_can_be_imported(name):
    assert getattr(stochproc, name).__name__ == f"stochproc.{name}"


def test_an_unknown_attribute_is_named():
    with pytest.raises(AttributeError, match="module 'stochproc' has no attribute 'nonsense'"):
        _ = stochproc.nonsense
