"""Two ranks against one: CPU time a rank and elapsed time of conjugate gradients on a row-divided kernel matrix.

Run ``python benchmarks/bench_distributed.py [--only TABLE ...]``; it starts its two processes itself, over gloo on this
machine. Both ranks solve the same system, in turns together and each alone, so that they always share the machine.
"""

import os

# Before anything loads NumPy or torch; the ranks inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import datetime as dt
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from timing import arguments, interleave, run_tables, target_row

from stochproc.distributed import DistributedOperator, abort_on_error
from stochproc.kernels import RBF
from stochproc.solvers import CG

ITERATIONS = 25
RANKS = 2
NOISE = 0.1
ROUNDS = 5


def cell(n: int, seed: int, alone: Any) -> dict[str, Any]:
    """Time 25 iterations on this rank, divided and alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    # A tolerance out of reach, and no product but those of the iterations.
    solve = CG(rtol=1e-300, max_iter=ITERATIONS, patience=10 * ITERATIONS, precond=None, verify=False)
    elapsed: dict[str, list[float]] = {}
    found = {}

    def run(name: str, A: DistributedOperator) -> None:
        start = time.perf_counter()
        found[name] = solve(A, b)
        elapsed.setdefault(name, []).append(time.perf_counter() - start)

    groups = {"one": alone, "two": None}
    operators = {name: DistributedOperator(RBF(), x, NOISE, group=group) for name, group in groups.items()}
    runs = {name: (lambda name=name, A=A: run(name, A)) for name, A in operators.items()}
    with torch.no_grad():
        # Without `at_least`: each rank has to do as many runs as the other.
        timings = interleave(runs, repeats=ROUNDS, at_least=0)
        # Of a product: iterates far from convergence differ by how rounding is amplified, not by what is divided.
        one, two = (operators[name](b) for name in ("one", "two"))
    return {
        "products": found["two"].stats["products"],
        "cpu": timings.seconds,
        # Without the warm-up.
        "elapsed": {name: values[-ROUNDS:] for name, values in elapsed.items()},
        "difference": float((one - two).abs().max() / one.abs().max()),
    }


def rank_main(rank: int, folder: pathlib.Path, cells: list[list[int]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", dt.timedelta(seconds=600), RANKS, rank)
    with abort_on_error():
        alone = [dist.new_group([r]) for r in range(RANKS)]
        found = [cell(n, seed, alone[rank]) for n, seed in cells]
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(cells: list[list[int]]) -> list[list[dict[str, Any]]]:
    """Return what each rank measured, cell by cell."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank", json.dumps(cells), folder]
        ranks = [subprocess.Popen([*command, str(r)]) for r in range(RANKS)]
        try:
            codes = [rank.wait() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise SystemExit(f"the ranks ended with exit codes {codes}.")
        return [json.loads((pathlib.Path(folder) / f"rank{r}.json").read_text()) for r in range(RANKS)]


def ratios(seconds: dict[str, list[float]]) -> list[float]:
    """Two ranks over one, round by round, in ascending order."""
    return sorted(two / one for two, one in zip(seconds["two"], seconds["one"], strict=True))


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def compared(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of the rank that gains least."""
    worst = max(ranks, key=lambda found: median(ratios(found["cpu"])))
    cpu = ratios(worst["cpu"])
    return {
        "cpu_ratio": median(cpu),
        "spread": [cpu[0], cpu[-1]],
        "milliseconds": 1e3 * median(worst["cpu"]["two"]),
        "base_milliseconds": 1e3 * median(worst["cpu"]["one"]),
        "elapsed_ratio": max(median(ratios(found["elapsed"])) for found in ranks),
        "products": worst["products"],
        "difference": max(found["difference"] for found in ranks),
    }


def targets(_: argparse.Namespace) -> list[dict[str, Any]]:
    """The target of the design, on three data sets."""
    cells = [[4001, seed] for seed in range(3)]
    case = "two ranks / one rank, CPU time per rank, 25 CG iterations, RBF n=4001 d=3 float64"
    rows = []
    for (_n, seed), ranks in zip(cells, zip(*measured(cells), strict=True), strict=True):
        found = compared(list(ranks))
        rows.append(target_row(case, found.pop("cpu_ratio"), 0.6, seed=seed, **found))
    return rows


def sizes(_: argparse.Namespace) -> list[dict[str, Any]]:
    """From which size on dividing pays: the messages cost nearly the same at all of them."""
    cells = [[n, 0] for n in (251, 501, 1001, 2001)]
    found = zip(*measured(cells), strict=True)
    return [{"n": n, **compared(list(ranks))} for (n, _seed), ranks in zip(cells, found, strict=True)]


TABLES = {"targets": targets, "sizes": sizes}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(int(sys.argv[4]), pathlib.Path(sys.argv[3]), json.loads(sys.argv[2]))
    else:
        given = arguments(__doc__)
        if given.device != "cpu":
            raise SystemExit("this benchmark divides a CPU: two ranks on CUDA need two devices.")
        run_tables("distributed", TABLES, given)
