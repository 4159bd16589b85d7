"""Time and memory of the softmax pass: whole and on a pattern of blocks, against the targets of the design.

Run ``python benchmarks/bench_softmax_pass.py [--device cuda] [--only TABLE ...]``. Points are uniform in the unit
square; eps is 1e-3 of the squared diameter where all pairs are visited and shrinks with the blocks elsewhere.
"""

import os

# Before anything loads NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import torch
from timing import arguments, interleave, run_tables, target_row
from torch import Tensor

from stochproc.kernels import _ranges, logsumexp, softmax_pass, support

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Nanoseconds a pair on one core.
TARGETS = {"float32": 2.4, "float64": 7.6}
Pattern = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(n: int, dtype: str, device: str) -> dict[str, Tensor]:
    """Uniform points in the unit square, weights, a potential of the size of the costs and a vector."""
    generator = torch.Generator().manual_seed(0)
    draws = {"x": (n, 2), "y": (n, 2), "g": (n,), "w": (n,), "v": (n, 1)}
    return {
        k: torch.rand(s, generator=generator, dtype=torch.float64).to(device, DTYPES[dtype]) for k, s in draws.items()
    }


def whole(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Nanoseconds a pair of the whole pass, and of what it replaces."""
    rows = []
    for n in (10_000, 30_000):
        for dtype in DTYPES:
            p = problem(n, dtype, args.device)
            points, v, eps = (p["x"], p["y"], p["g"] * 1e-3), p["v"], 2e-3

            def run(points: Any = points, w: Tensor = p["w"], eps: float = eps, **options: Any) -> Any:
                return lambda: softmax_pass("sqeuclidean", *points, w, eps=eps, backend="chunked", **options)

            runs = {"lse, mass": run(), "and Kv": run(v=v), "and PtKv": run(v=v, gram=True)}
            runs["logsumexp alone"] = lambda points=points: logsumexp(
                "sqeuclidean", *points, eps=2e-3, backend="chunked"
            )
            if n == 10_000:
                level, f = math.log(1e-12), torch.zeros_like(p["g"])
                runs["support"] = lambda a=points, f=f, level=level: support(
                    "sqeuclidean", *a[:2], f, a[2], level, eps=2e-3
                )
            repeats = 5 if n == 10_000 else 2
            timings = interleave(runs, device=args.device, repeats=repeats, warmups=0, at_least=0)
            for name in runs:
                best = min(timings.seconds[name])
                row = {"n = m": n, "dtype": dtype, "fields": name, "seconds": best, "ns a pair": 1e9 * best / n**2}
                if name == "lse, mass":
                    row |= target_row("", row["ns a pair"], TARGETS[dtype])
                    row = {k: row[k] for k in row if k not in ("case", "measured")}
                rows.append(row)
    return rows


def pattern(n: int, side: int, density: float, dtype: str, device: str) -> tuple[Tensor, Tensor, Pattern, int]:
    """Points sorted by cells of a grid in Morton order, and the blocks of near cells."""
    generator = torch.Generator().manual_seed(0)
    sets = [_cells(torch.rand(n, 2, generator=generator, dtype=torch.float64), side) for _ in range(2)]
    (x, x_starts, x_centres), (y, y_starts, y_centres) = sets
    # Slightly more than the disk of that area, for what is cut off at the border.
    near = torch.cdist(x_centres, y_centres) < 1.06 * math.sqrt(density / math.pi)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), near.sum(1).cumsum(0)])
    pairs = int((x_starts.diff()[:, None] * y_starts.diff() * near).sum())
    x, y = (t.to(device, DTYPES[dtype]) for t in (x, y))
    return x, y, (x_starts, y_starts, ptr, near.nonzero()[:, 1]), pairs


def _cells(points: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    place = (points * side).long().clamp(max=side - 1)
    key = torch.zeros(len(points), dtype=torch.int64)
    for bit in range(side.bit_length()):
        key |= ((place[:, 0] >> bit) & 1) << (2 * bit + 1) | ((place[:, 1] >> bit) & 1) << (2 * bit)
    order = key.argsort()
    _, counts = torch.unique_consecutive(key[order], return_counts=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return points[order], starts, (place[order][starts[:-1]] + 0.5) / side


def blocks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A pass on a pattern: nanoseconds a pair of the pattern, and how many pairs are visited for one."""
    rows = []
    for n, side, density in ((30_000, 40, 0.03), (30_000, 40, 0.1), (30_000, 80, 0.03), (100_000, 80, 0.03)):
        for dtype in DTYPES:
            p = problem(n, dtype, args.device)
            x, y, ranges, pairs = pattern(n, side, density, dtype, args.device)

            def run(x: Tensor = x, y: Tensor = y, p: Any = p, ranges: Any = ranges, **options: Any) -> Any:
                return lambda: softmax_pass(
                    "sqeuclidean", x, y, p["g"] * 1e-4, p["w"], eps=1e-4, ranges=ranges, backend="chunked", **options
                )

            runs = {"lse, mass": run(), "and PtKv": run(v=p["v"], gram=True)}
            timings = interleave(runs, device=args.device, repeats=2, warmups=0, at_least=0)
            visited = sum((g.stop - g.start) * len(g.columns) for g in _ranges.as_ranges(ranges, x, y).groups(x.device))
            for name in runs:
                best = min(timings.seconds[name])
                rows.append(
                    {
                        "n = m": n,
                        "cells": side**2,
                        "share of pairs": pairs / n**2,
                        "dtype": dtype,
                        "fields": name,
                        "seconds": best,
                        "ns a pair": 1e9 * best / pairs,
                        "visited / pairs": visited / pairs,
                    }
                )
    return rows


def group(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time over that at the default ``GROUP_OVERHEAD_PAIRS``, which is to be where it is least."""
    default, rows = _ranges.GROUP_OVERHEAD_PAIRS, []
    sizes = [0, default // 4, default // 2, default, 2 * default, 4 * default]
    for n, side, density in ((30_000, 40, 0.03), (30_000, 40, 0.1), (30_000, 80, 0.03)):
        p = problem(n, "float32", args.device)
        x, y, ranges, _ = pattern(n, side, density, "float32", args.device)

        def run(size: int, x: Tensor = x, y: Tensor = y, p: Any = p, ranges: Any = ranges) -> Any:
            def once() -> None:
                _ranges.GROUP_OVERHEAD_PAIRS = size
                softmax_pass("sqeuclidean", x, y, p["g"] * 1e-4, p["w"], eps=1e-4, ranges=ranges, backend="chunked")

            return once

        runs = {str(size): run(size) for size in sizes}
        timings = interleave(runs, device=args.device, repeats=3, warmups=0, at_least=0)
        _ranges.GROUP_OVERHEAD_PAIRS = default
        ratios = {k: timings.ratio(k, str(default)) for k in runs}
        rows.append({"n = m": n, "cells": side**2, "density": density, **ratios})
    return rows


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory beyond inputs, each in a process of its own; extra memory depends on n + m and on m alone."""
    rows = []
    for dtype in DTYPES:
        command = [sys.executable, __file__, "--peak-of", dtype, args.device]
        peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        case = f"peak extra memory in MB, n = 20,000, m = 100,000, {dtype}, all fields"
        rows.append(target_row(case, peak / 1e6, 100.0, mb_of_the_matrix=2e9 * DTYPES[dtype].itemsize / 1e6))
    return rows


def peak_of(dtype: str, device: str) -> float:
    """Bytes by which one pass raises the peak of this process (or of the GPU)."""

    def once(p: dict[str, Tensor], rows: int) -> None:
        x, w, v = p["x"][:rows], p["w"][:rows], p["v"]
        softmax_pass("sqeuclidean", x, p["y"], p["g"] * 1e-3, w, eps=2e-3, v=v, gram=True, backend="chunked")

    torch.set_num_threads(1)
    # What is loaded and allocated on first use is no matter of n.
    once(problem(200, dtype, device), 200)
    p = problem(100_000, dtype, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(p, 20_000)
        return float(torch.cuda.max_memory_allocated() - before)
    # Writing 5 sets the peak back to the present size.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _resident_peak()
    once(p, 20_000)
    return float(_resident_peak() - before)


def _resident_peak() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


TABLES = {"whole": whole, "blocks": blocks, "group": group, "memory": memory}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-of"]:
        print(json.dumps(peak_of(sys.argv[2], sys.argv[3])))
    else:
        run_tables("softmax_pass", TABLES, arguments(__doc__))
