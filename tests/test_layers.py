"""Who may import and call what: every model stands on the two shared layers, and arrows point down."""

import ast
from pathlib import Path

import pytest

import stochproc

ROOT = Path(stochproc.__file__).parent
LAYERS = ("kernels", "solvers")
MODELS = ("distributed", "gp", "ot", "tensor")
FILES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py"))
OUTSIDE = [f for f in FILES if f.split("/")[0] not in LAYERS]


def imports(path):
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module or ""


def attributes(path):
    """Dotted names that a file uses, such as torch.linalg.cholesky."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def part_of(path):
    first = path.split("/")[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_model_has_a_backend_a_factor_or_an_integrator_of_its_own(path):
    roots = {name.split(".")[0] for name in imports(path)}
    if part_of(path) not in ("__main__", "demo"):
        assert not roots & {"pykeops", "torchsde"}
    used = set(attributes(path))
    assert not used & {"torch.linalg.cholesky", "torch.linalg.cholesky_ex", "torch.cholesky", "scipy.sparse.linalg.cg"}


@pytest.mark.parametrize("path", FILES)
def test_arrows_point_down_and_private_files_stay_private(path):
    own = part_of(path)
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] != "stochproc" or len(pieces) < 2:
            continue
        target = pieces[1]
        if own in LAYERS:
            assert target not in (*MODELS, "demo"), f"{path} imports {name}"
        if own == "kernels":
            assert target != "solvers", f"{path} imports {name}"
        # `distributed` evaluates kernels with other parameters, which the layer offers no public way to do.
        private = target != own and any(p.startswith("_") for p in pieces[2:])
        assert not private or (own, name) == ("distributed", "stochproc.kernels._parameters"), f"{path} imports {name}"


def test_the_rules_are_read_from_the_code():
    assert "torch.linalg.cholesky_ex" in {a for f in FILES for a in attributes(f)}
    assert "torchsde" in {name.split(".")[0] for f in FILES for name in imports(f)}
