"""The command line: ``python -m stochproc demo`` and ``python -m stochproc info``."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import stochproc

_STACK = (
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "gpytorch",
    "linear_operator",
    "torchsde",
    "pykeops",
    "matplotlib",
    "tqdm",
    "safetensors",
    "jaxtyping",
    "statsmodels",
    "arch",
    "tensorly",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 1 if a part of the demo failed, 2 for bad arguments."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command == "demo":
        return _demo(parser, given)
    if given.command == "info":
        _info(given.probe)
        return 0
    parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stochproc", description="Modern stochastic-process models for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"stochproc {stochproc.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="fit every family of models on real data; a table, figures and a page",
        description="Fit every family of models on real data that is already installed, beside simple baselines. "
        "Prints one table and leaves it with figures in a folder: index.html, results.json and PNG files.",
    )
    demo.add_argument("--parts", help="names of parts, separated by commas (default: all)", metavar="NAME,...")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a subset of the data, in seconds")
    demo.add_argument(
        "--readme-figure", type=Path, metavar="PNG", help="write the figure of the README to this file and stop"
    )
    info = commands.add_parser(
        "info",
        help="versions, threads, devices, KeOps, BLAS",
        description="Say what the library runs on, for a bug report or before a long run.",
    )
    info.add_argument("--probe", action="store_true", help="try KeOps out, which may compile for half a minute")
    return parser


def _demo(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    from stochproc.demo import discover, run_demo

    parts = None if given.parts is None else [name.strip() for name in given.parts.split(",") if name.strip()]
    for name in parts or []:
        if name not in discover():
            parser.error(f"argument --parts: no part {name!r}; there are: {', '.join(discover())}")
    if given.readme_figure is not None:
        from stochproc.demo.part_gp import draw_readme_figure
    target = given.output if given.readme_figure is None else given.readme_figure
    try:
        if given.readme_figure is None:
            return run_demo(given.output, parts, quick=given.quick)
        draw_readme_figure(given.readme_figure)
        return 0
    except OSError as error:
        print(f"{parser.prog} demo: cannot write to {target}: {error.strerror or error}", file=sys.stderr)
        return 2


def _info(probe: bool) -> None:
    import torch
    from threadpoolctl import threadpool_info

    lines = [
        ("stochproc", stochproc.__version__),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        *((name, _version(name)) for name in _STACK),
        ("threads", f"{torch.get_num_threads()} in torch, {os.cpu_count()} processors"),
        ("devices", _devices()),
    ]
    # scipy loads the library that NumPy and SciPy call for linear algebra; torch brings its own.
    import scipy.linalg  # noqa: F401

    pools = {
        f"{pool['internal_api']} {pool['version'] or ''}".strip()
        for pool in threadpool_info()
        if pool["user_api"] == "blas"
    }
    lines += [
        ("BLAS, NumPy", ", ".join(sorted(pools)) or "unknown"),
        ("BLAS, torch", _blas_of_torch()),
        ("KeOps", _keops(probe)),
        ("KeOps cache", _keops_cache()),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name.ljust(width)}  {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    import torch

    names = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ", ".join(["cpu", *names])


def _blas_of_torch() -> str:
    import torch

    settings = torch.__config__.show()
    return next((part.partition("=")[2] for part in settings.split(", ") if "BLAS_INFO=" in part), "unknown")


def _keops(probe: bool) -> str:
    """Say whether KeOps can be used; without a probe, from what can be seen without compiling anything."""
    if _version("pykeops") == "not installed":
        return "not usable: pykeops is not installed"
    if probe:
        import torch

        from stochproc.kernels import keops_status

        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        found = {kind: keops_status(device=kind) for kind in kinds}
        return "; ".join(f"{kind}: {'usable' if why is None else 'not usable: ' + why}" for kind, why in found.items())
    wanted = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, wanted)), None)
    if compiler is None:
        return f"not usable: no C++ compiler was found ({' or '.join(wanted)})"
    return f"probably usable, compiler {compiler}; info --probe tries it out"


def _keops_cache() -> str:
    folder = os.environ.get("KEOPS_CACHE_FOLDER")
    if folder is None:
        version = _version("keopscore")
        if version == "not installed":
            return "none"
        folder = os.path.join(os.path.expanduser("~"), ".cache", f"keops{version}")
    if not os.path.isdir(folder):
        return f"{folder} (not there yet)"
    return f"{folder} ({'writable' if os.access(folder, os.W_OK) else 'not writable'})"


if __name__ == "__main__":
    sys.exit(main())
