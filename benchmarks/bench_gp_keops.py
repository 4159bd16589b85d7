"""Formulas of infinitely wide networks in KeOps: length, first calls, and products against row blocks.

Run ``python benchmarks/bench_gp_keops.py [--device cuda] [--only TABLE ...]``. First calls are made in processes of
their own with an empty KeOps cache, in turn; their seconds are those that the process and its compilers computed.
Products take turns in one process, and every row holds the largest difference of the two results.
"""

import os

# Before anything loads NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from timing import arguments, interleave, run_tables, target_row
from torch import Tensor

from stochproc.gp import arch
from stochproc.kernels import RBF, KeopsPair, Kernel, duals, keops_status, matvec

FIRST_CALL_REPEATS = 2
SIZES = {"cpu": 1000, "cuda": 20_000}
ACTIVATIONS: dict[str, Callable[[], arch.Activation]] = {"relu": arch.Relu, "erf": arch.Erf, "gelu": arch.Gelu}


def network(activation: str, depth: int, kind: str = "nngp") -> Kernel:
    layers = [layer for _ in range(depth) for layer in (arch.Dense(1.4, 0.2), ACTIVATIONS[activation]())]
    return arch.NetworkKernel(arch.serial(*layers, arch.Dense()), kind)


CASES: dict[str, Callable[[], Kernel]] = {
    "rbf": lambda: RBF(torch.ones(1)),
    "relu depth 10": lambda: network("relu", 10),
}


def points(n: int, dtype: torch.dtype, device: str, d: int = 8) -> tuple[Tensor, Tensor]:
    """Standard normal points and one vector."""
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(n, k, generator=generator, dtype=dtype) for k in (d, 1))
    return x.to(device), v.to(device)


def processor_seconds() -> float:
    own, children = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def first_call(case: str, device: str) -> dict[str, float]:
    """Seconds of the first product, and of the gradient in points and hyperparameters behind it."""
    x, v = points(50, torch.float64, device)
    y = x.clone()
    # A product with a stock formula loads everything that is not of one formula.
    probe = keops_status(torch.float64, device)
    if probe is not None:
        raise SystemExit(f"KeOps cannot be used here: {probe}")
    kernel = CASES[case]()
    leaves = (x.requires_grad_(), y.requires_grad_(), *kernel.parameters())
    start = processor_seconds()
    out = matvec(kernel, x, y, v, backend="keops", strict=True)
    middle = processor_seconds()
    torch.autograd.grad(out.sum(), leaves)
    return {"value": middle - start, "gradient": processor_seconds() - middle}


def first_calls(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A network of depth 10 against an RBF kernel, in fresh caches."""
    seconds: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for i in range(FIRST_CALL_REPEATS):
        for case in list(CASES)[:: 1 if i % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    [sys.executable, __file__, "--first-call-of", case, args.device],
                    env={**os.environ, "KEOPS_CACHE_FOLDER": folder},
                    capture_output=True,
                    text=True,
                    check=False,
                )
            if done.returncode:
                return [{"case": case, "note": done.stderr.strip().splitlines()[-1]}]
            seconds[case].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for what in ("value", "gradient"):
        base = [s[what] for s in seconds["rbf"]]
        for case in list(CASES)[1:]:
            mine = [s[what] for s in seconds[case]]
            ratios = [a / b for a, b in zip(mine, base, strict=True)]
            more = {"spread": [min(ratios), max(ratios)], "seconds": statistics.median(mine)}
            more["base_seconds"] = statistics.median(base)
            rows.append(target_row(f"first {what}, {case} / rbf", statistics.median(ratios), 2.0, **more))
    return rows


def lengths(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Letters of the text of a formula, by depth, of chains and of residual networks."""
    rows = []
    for name, dual in {"relu": duals.Relu(), "gelu": duals.Gelu()}.items():
        for shape in ("chain", "residual"):
            row: dict[str, Any] = {"network": f"{name} {shape}"}
            for depth in (5, 10, 20, 40):
                w2, b2 = (torch.tensor(z, dtype=torch.float64) for z in (0.5, 0.04))
                ones = torch.ones(2, 8, dtype=torch.float64)
                pair = KeopsPair.from_points(ones, ones)
                for _ in range(depth):
                    after = pair.affine(w2, b2).through(dual)
                    pair = after if shape == "chain" else pair.plus(after)
                row[f"depth {depth}"] = len(pair.q.lazy().formula)
            rows.append(row)
    return rows


def products(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compiled products and their gradients against row blocks."""
    if keops_status(torch.float64, args.device) is not None:
        return [{"case": "products", "note": "KeOps cannot be used here"}]
    rows = []
    n = SIZES[args.device]
    for activation, depth, kind in (("relu", 4, "nngp"), ("relu", 10, "nngp"), ("gelu", 4, "nngp"), ("relu", 4, "ntk")):
        kernel = network(activation, depth, kind)
        for what in ("value", "gradient") if (activation, depth) == ("relu", 4) else ("value",):
            x, v = points(n, torch.float64, args.device)
            runs = {b: _run(kernel, x, v, b, what) for b in ("keops", "chunked")}
            got, want = (run() for run in runs.values())
            timings = interleave(runs, device=args.device, repeats=3, warmups=0)
            rows.append(
                {
                    "case": f"{kind} {activation} depth {depth}, {what}, n={n}",
                    "keops / chunked": timings.ratio("keops", "chunked"),
                    "spread": timings.spread("keops", "chunked"),
                    "keops ns a pair": 1e9 * timings.median("keops") / n**2,
                    "chunked ns a pair": 1e9 * timings.median("chunked") / n**2,
                    "difference": float((got - want).abs().max() / want.abs().max()),
                }
            )
    return rows


def _run(kernel: Kernel, x: Tensor, v: Tensor, backend: str, what: str) -> Callable[[], Tensor]:
    def value() -> Tensor:
        with torch.no_grad():
            return matvec(kernel, x, None, v, backend=backend)

    def gradient() -> Tensor:
        # In the points of the rows; the hyperparameters stay as they are.
        leaf = x.clone().requires_grad_()
        out = matvec(kernel, leaf, x, v, backend=backend)
        return torch.autograd.grad(out.sum(), leaf)[0]

    kernel.requires_grad_(False)
    return value if what == "value" else gradient


TABLES = {"lengths": lengths, "first_calls": first_calls, "products": products}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--first-call-of"]:
        print(json.dumps(first_call(sys.argv[2], sys.argv[3])))
    else:
        run_tables("bench_gp_keops", TABLES, arguments(__doc__))
