"""Speed and memory of the kernel layer: the targets of the design, and the tables behind ``THRESHOLDS``.

Run ``python benchmarks/bench_kernels.py [--device cuda] [--only TABLE ...]``. Every ratio is between runs that
took turns in one process, and every row holds the largest difference of the two results.
"""

import os

# Before anything loads NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timing import Timings, arguments, interleave, run_tables, target_row
from torch import Tensor

from stochproc.kernels import RBF, ArcCosine, Kernel, Matern, Radial, RationalQuadratic, logsumexp, matvec

SEEDS = (0, 1, 2)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
Reduction = Callable[..., Tensor]
Block = Callable[[Tensor, Tensor], Tensor]


class PlainRBF(Radial):
    """The RBF by its profile alone: our distances, but the gradient left to autograd."""

    def profile(self, sq: Any) -> Any:
        return (-0.5 * sq).exp()


def points(n: int, d: int, dtype: str, device: str, seed: int = 0, *, columns: int = 1) -> tuple[Tensor, Tensor]:
    """Standard normal points and vectors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=DTYPES[dtype])
    v = torch.randn(n, columns, generator=generator, dtype=DTYPES[dtype])
    return x.to(device), v.to(device)


def product(kernel: Kernel) -> Reduction:
    return lambda x, v, **how: matvec(kernel, x, None, v, **how)


def soft(cost: str) -> Reduction:
    return lambda x, v, **how: logsumexp(cost, x, x, v[:, 0], eps=0.5, **how)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two results relative to the largest entry."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@torch.no_grad()
def race(
    reduction: Reduction, x: Tensor, v: Tensor, how: dict[str, dict[str, Any]], **kw: Any
) -> tuple[Timings, float]:
    """Time one reduction on several backends; also the largest difference from the first of them."""
    runs = {name: (lambda options=options: reduction(x, v, **options)) for name, options in how.items()}
    results = [run() for run in runs.values()]
    worst = max(difference(r, results[0]) for r in results)
    del results
    return interleave(runs, device=x.device.type, warmups=0, **kw), worst


def backend_targets(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Chunked against dense and against compiled KeOps."""
    cases: list[tuple[str, Reduction, int, str, str, float]] = [
        ("chunked / dense, RBF matvec n=5000 d=3 float32", product(RBF()), 5000, "chunked", "dense", 0.6),
        ("chunked / dense, logsumexp n=20000 d=3 float32", soft("sqeuclidean"), 20_000, "chunked", "dense", 0.4),
        ("chunked / warm KeOps, RBF matvec n=5000 d=3 float32", product(RBF()), 5000, "chunked", "keops", 0.5),
    ]
    rows = []
    for case, reduction, n, name, base, target in cases:
        if base == "keops" and not keops_works(args.device):
            rows.append({"case": case, "note": "KeOps cannot be used here"})
            continue
        for seed in SEEDS[: 1 if n > 10_000 else None]:
            x, v = points(n, 3, "float32", args.device, seed)
            names = (name, base)
            timings, worst = race(reduction, x, v, {k: {"backend": k} for k in names})
            rows.append(
                target_row(
                    case,
                    timings.ratio(name, base),
                    target,
                    spread=timings.spread(name, base),
                    seed=seed,
                    milliseconds=1e3 * timings.median(name),
                    base_milliseconds=1e3 * timings.median(base),
                    difference=worst,
                )
            )
    return rows


def keops_works(device: str) -> bool:
    from stochproc.kernels import select_backend

    x, _ = points(10, 3, "float32", device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return select_backend(RBF(), x, backend="keops") == "keops"


def explicit_rbf(x: Tensor, y: Tensor) -> Tensor:
    return (-0.5 * (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)).exp()


def cdist_rbf(x: Tensor, y: Tensor) -> Tensor:
    return (-0.5 * torch.cdist(x, y).square()).exp()


def gradient_targets(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Closed-form gradient against autograd, n = 1000, d = 3, with respect to both sets of points.

    The rows (a) and (b) are what a user without this library would write; (c) is the hardest: the same product
    form, from which only the closed form is taken away.
    """
    competitors: dict[str, Block] = {
        "closed form": RBF(),
        "(a) explicit differences": explicit_rbf,
        "(b) torch.cdist": cdist_rbf,
        "(c) our product form": PlainRBF(),
    }
    rows = []
    for dtype in DTYPES:
        for seed in SEEDS:
            rows += _gradient_rows(competitors, dtype, args.device, seed)
    return rows


def _gradient_rows(competitors: dict[str, Block], dtype: str, device: str, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(1000, 3, dtype=DTYPES[dtype], generator=generator).to(device) for _ in range(2))
    upstream = torch.randn(1000, 1000, dtype=DTYPES[dtype], generator=generator).to(device)
    leaves = [x.requires_grad_(), y.requires_grad_()]

    def whole(kernel: Block) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(kernel(x, y), leaves, upstream)

    def reverse(kernel: Block) -> Callable[[], Any]:
        matrix = kernel(x, y)
        return lambda: torch.autograd.grad(matrix, leaves, upstream, retain_graph=True)

    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(explicit_rbf(*wide), wide, upstream.double())
    errors = {name: difference(whole(kernel)()[0], exact[0]) for name, kernel in competitors.items()}
    both, alone = (
        interleave({name: make(kernel) for name, kernel in competitors.items()}, device=device, repeats=7)
        for make in (whole, reverse)
    )
    return [
        target_row(
            f"closed-form / autograd {name}, value and gradient, RBF n=1000 d=3 {dtype}",
            both.ratio("closed form", name),
            0.6,
            spread=both.spread("closed form", name),
            seed=seed,
            reverse_pass_alone=alone.ratio("closed form", name),
            milliseconds=1e3 * both.median("closed form"),
            base_milliseconds=1e3 * both.median(name),
            error=errors["closed form"],
            base_error=errors[name],
        )
        for name in list(competitors)[1:]
    ]


def memory_targets(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory beyond what the process held before, inputs included, each size in a process of its own.

    A block has at least ``min_block_rows`` rows, so that it grows with n from n = 16,384 on, and gradients and
    prepared points are of size n.
    """
    rows = []
    for what in ("matvec", "logsumexp"):
        peaks = {n: _peak_in_subprocess(what, n, args.device) for n in (10_000, 40_000)}
        rows.append(
            target_row(
                f"peak extra memory n=40000 / n=10000, {what} forward and backward",
                peaks[40_000] / peaks[10_000],
                1.3,
                mib_at_10000=peaks[10_000] / 2**20,
                mib_at_40000=peaks[40_000] / 2**20,
                mib_of_the_matrix=40_000**2 * 4 / 2**20,
            )
        )
    return rows


def _peak_in_subprocess(what: str, n: int, device: str) -> float:
    command = [sys.executable, __file__, "--peak-of", what, str(n), device]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_of(what: str, n: int, device: str) -> float:
    """Bytes by which one forward and backward pass raises the peak of this process (or of the GPU)."""

    def once(x: Tensor, v: Tensor) -> None:
        reduction = product(RBF()) if what == "matvec" else soft("sqeuclidean")
        reduction(x, v, backend="chunked").square().mean().backward()

    torch.set_num_threads(1)
    # What is loaded and allocated on first use is no matter of n.
    once(*(t.requires_grad_() for t in points(200, 3, "float32", device)))
    x, v = (t.requires_grad_() for t in points(n, 3, "float32", device))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(x, v)
        return float(torch.cuda.max_memory_allocated() - before)
    # VmHWM and not ru_maxrss: the latter starts at the size of the process that launched this one. Writing 5
    # sets the peak back to the present size.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _resident_peak()
    once(x, v)
    return float(_resident_peak() - before)


def _resident_peak() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


CROSSOVER: dict[str, Reduction] = {
    "RBF": product(RBF()),
    "Matern 3/2": product(Matern(nu=1.5)),
    "ArcCosine": product(ArcCosine()),
    "logsumexp": soft("sqeuclidean"),
}


def crossover(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Chunked over dense by number of pairs: where it falls below 1 is ``cpu_dense_max_pairs``."""
    sizes = (250, 500, 1000, 1400, 2000, 3000, 5000)
    if args.device == "cuda":
        sizes = (500, 1000, 2000, 4000, 8000, 16_000)
    rows = []
    for name, reduction in CROSSOVER.items():
        for dtype in DTYPES:
            for d in (3, 10):
                row: dict[str, Any] = {"reduction": name, "dtype": dtype, "d": d}
                worst = 0.0
                for n in sizes:
                    # 50 to 100 ns a pair: 5000 points would take a minute and say nothing new.
                    if name == "ArcCosine" and n > 1400 and args.device == "cpu":
                        continue
                    x, v = points(n, d, dtype, args.device)
                    timings, error = race(reduction, x, v, {k: {"backend": k} for k in ("dense", "chunked")})
                    row[f"n={n}"] = timings.ratio("chunked", "dense")
                    worst = max(worst, error)
                rows.append({**row, "difference": worst})
    return rows


def block(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time by size of a block over that at the default; ``cpu_block_bytes`` is to be where it is least."""
    default = 1 << (26 if args.device == "cuda" else 20)
    sizes = [default >> 2, default >> 1, default, default << 1, default << 2, default << 3]
    rows = []
    for name in ("RBF", "Matern 3/2", "logsumexp"):
        for dtype in DTYPES:
            for n in (2000, 5000):
                x, v = points(n, 3, dtype, args.device)
                how = {f"{s >> 10} KiB": {"backend": "chunked", "block_bytes": s} for s in sizes}
                timings, worst = race(CROSSOVER[name], x, v, how)
                ratios = {k: timings.ratio(k, f"{default >> 10} KiB") for k in how}
                rows.append({"reduction": name, "dtype": dtype, "n": n, **ratios, "difference": worst})
    return rows


def pair_cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Nanoseconds a pair, forward, with the automatic backend at n = 5000."""
    reductions: dict[str, Reduction] = {
        "matvec RBF": product(RBF()),
        "matvec Matern 1/2": product(Matern(nu=0.5)),
        "matvec Matern 3/2": product(Matern(nu=1.5)),
        "matvec Matern 5/2": product(Matern(nu=2.5)),
        "matvec RationalQuadratic": product(RationalQuadratic()),
        "logsumexp sqeuclidean": soft("sqeuclidean"),
        "logsumexp euclidean": soft("euclidean"),
        "logsumexp cityblock": soft("cityblock"),
    }
    n = 5000
    rows: dict[str, dict[str, Any]] = {name: {"reduction": name} for name in reductions}
    for dtype in DTYPES:
        for d in (3, 10):
            x, v = points(n, d, dtype, args.device)
            runs = {name: (lambda f=f, x=x, v=v: f(x, v)) for name, f in reductions.items()}
            with torch.no_grad():
                timings = interleave(runs, device=args.device, at_least=0)
            for name in reductions:
                rows[name][f"{dtype} d={d}"] = 1e9 * timings.median(name) / n**2
    return list(rows.values())


TABLES = {
    "backend targets": backend_targets,
    "gradient targets": gradient_targets,
    "memory targets": memory_targets,
    "crossover": crossover,
    "block": block,
    "pair cost": pair_cost,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-of"]:
        print(json.dumps(peak_of(sys.argv[2], int(sys.argv[3]), sys.argv[4])))
    else:
        run_tables("bench_kernels", TABLES, arguments(__doc__))
