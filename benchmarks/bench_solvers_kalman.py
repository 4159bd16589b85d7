"""Speed, memory and accuracy of the Kalman smoother, and the tables behind its constants.

Run ``python benchmarks/bench_solvers_kalman.py [--device cuda] [--only TABLE ...]``. The competitors of a row took
turns in one process. Times cover everything from the kernel to the smoothed outputs and log Z, but for the case
with cotangents, which starts from given transitions.
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
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import arguments, interleave, run_tables, target_row
from torch import Tensor

from stochproc.kernels import Matern, StateSpace
from stochproc.solvers import _kalman, _kalman_algebra, kalman_smoother, messages

SEEDS = (0, 1, 2)


def filters(n: int, batch: int, nu: float, device: str, seed: int = 0) -> Callable[..., Any]:
    """Smooth ``batch`` series of n scalar observations at irregular times, each under a lengthscale of its own."""
    generator = torch.Generator().manual_seed(seed)
    times = (torch.rand(n, generator=generator, dtype=torch.float64) * n / 50).sort().values.to(device)
    y = torch.randn(batch, n, generator=generator, dtype=torch.float64).to(device)
    Lam, eta, _ = messages(y, 0.1)
    lengthscale = torch.linspace(0.2, 1.0, batch, dtype=torch.float64, device=device).unsqueeze(-1)

    def smooth(method: str = "auto") -> Any:
        with torch.no_grad():
            kernel = Matern(lengthscale, nu=nu, batch_shape=(batch,))
            return kalman_smoother(kernel.state_space(), times, Lam, eta, method=method).value.cov

    return smooth


def coupled(n: int, r: int, nu: float, device: str, seed: int = 0) -> Callable[..., Any]:
    """Smooth r functions under full r x r messages, and take the gradient of log Z in everything."""
    generator = torch.Generator().manual_seed(seed)
    times = (torch.rand(n, generator=generator, dtype=torch.float64) * n / 50).sort().values.to(device)
    root = torch.randn(n, r, r, generator=generator, dtype=torch.float64).to(device)
    Lam = (root @ root.mT).requires_grad_()
    eta = torch.randn(n, r, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    kernels = [Matern(0.3 + 0.1 * k, nu=nu).to(device) for k in range(r)]

    def smooth(method: str = "auto") -> Any:
        ss = StateSpace.stack([kernel.state_space() for kernel in kernels])
        log_z = kalman_smoother(ss, times, Lam, eta, method=method).value.log_z
        return torch.autograd.grad(log_z, [Lam, eta, *(kernel.log_lengthscale for kernel in kernels)])

    return smooth


class Given:
    """A state space whose transitions are there already, with a gradient of their own."""

    def __init__(self, ss: StateSpace, times: Tensor) -> None:
        dt = torch.cat([torch.zeros_like(times[:1]), times.diff()])
        self.A, self.Q = (x.detach().requires_grad_() for x in ss.transition(dt))
        self.P0 = ss.prior(times[0]).detach().requires_grad_()
        self.H, self.batch_shape = ss.H, ss.batch_shape

    def transition(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        return self.A, self.Q

    def prior(self, t: Tensor) -> Tensor:
        return self.P0


def cotangents(n: int, r: int, nu: float, device: str) -> Callable[..., Any]:
    """As ``coupled``, from given transitions to the gradient in them."""
    generator = torch.Generator().manual_seed(0)
    times = (torch.rand(n, generator=generator, dtype=torch.float64) * n / 50).sort().values.to(device)
    root = torch.randn(n, r, r, generator=generator, dtype=torch.float64).to(device)
    Lam = (root @ root.mT).requires_grad_()
    eta = torch.randn(n, r, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    parts = [Matern(0.3 + 0.1 * k, nu=nu).to(device).state_space() for k in range(r)]
    ss = Given(StateSpace.stack(parts), times)

    def smooth(method: str = "auto") -> Any:
        log_z = kalman_smoother(ss, times, Lam, eta, method=method).value.log_z
        return torch.autograd.grad(log_z, [Lam, eta, ss.A, ss.Q, ss.P0])

    return smooth


def targets(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds against the targets of the design, and what the loop over the points would take."""
    if args.device == "cuda":
        cases = [("Matern 3/2, n=1e6, one filter", filters(1_000_000, 1, 1.5, "cuda"), 1.0, False)]
    else:
        cases = [
            ("Matern 3/2, n=1000, 15 filters", filters(1000, 15, 1.5, "cpu"), 0.12, True),
            ("3 coupled Matern 1/2, n=1318, with cotangents", cotangents(1318, 3, 0.5, "cpu"), 0.03, True),
            ("Matern 3/2, n=1e4, 15 filters", filters(10_000, 15, 1.5, "cpu"), 0.8, False),
            ("Matern 3/2, n=1e5, one filter", filters(100_000, 1, 1.5, "cpu"), 0.5, False),
        ]
    rows = []
    for case, smooth, target, loop in cases:
        runs = {"scan": lambda f=smooth: f("scan")}
        if loop:
            runs["sequential"] = lambda f=smooth: f("sequential")
        timings = interleave(runs, device=args.device, repeats=7)
        seconds = timings.seconds["scan"]
        row = target_row(case, timings.median("scan"), target, spread=[min(seconds), max(seconds)])
        rows.append({**row, "sequential": timings.median("sequential") if loop else None})
    return rows


def more_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of further cases, all with ``method="auto"``."""
    cases: dict[str, Callable[..., Any]] = {
        "Matern 1/2, n=1000, 15 filters": filters(1000, 15, 0.5, args.device),
        "Matern 5/2, n=1000, 15 filters": filters(1000, 15, 2.5, args.device),
        "Matern 5/2, n=1e5, one filter": filters(100_000, 1, 2.5, args.device),
        "3 coupled Matern 1/2 (3 states), n=1318, with gradient": coupled(1318, 3, 0.5, args.device),
        "5 coupled Matern 1/2 (5 states), n=1461, with gradient": coupled(1461, 5, 0.5, args.device),
        "3 coupled Matern 3/2 (6 states), n=1461, with gradient": coupled(1461, 3, 1.5, args.device),
        "7 coupled Matern 3/2 (14 states), n=1461, with gradient": coupled(1461, 7, 1.5, args.device),
        "12 coupled Matern 3/2 (24 states), n=5000, with gradient": coupled(5000, 12, 1.5, args.device),
    }
    rows = []
    for case, smooth in cases.items():
        seconds = interleave({"auto": smooth}, device=args.device, repeats=3, at_least=0).seconds["auto"]
        rows.append({"case": case, "seconds": sorted(seconds)[1], "spread": [min(seconds), max(seconds)]})
    return rows


def large(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One filter, Matern 3/2, each size in a process of its own: seconds, and peak memory beyond the data."""
    rows = []
    for n in (100_000, 1_000_000):
        for what in ("values", "gradient"):
            for grid in ("irregular", "regular"):
                command = [sys.executable, __file__, "--large", str(n), what, grid, args.device]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                rows.append({"n": n, "what": what, "times": grid, **found})
                rows[-1]["bytes a point"] = found["peak MiB"] * 2**20 / n
    return rows


def measure_large(n: int, what: str, grid: str, device: str) -> dict[str, float]:
    torch.set_num_threads(1)

    def once(n: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        times = torch.arange(n, dtype=torch.float64) / 50
        if grid == "irregular":
            times = (torch.rand(n, generator=generator, dtype=torch.float64) * n / 50).sort().values
        times = times.to(device)
        Lam, eta, _ = messages(torch.randn(n, generator=generator, dtype=torch.float64).to(device), 0.1)
        kernel = Matern(0.5, nu=1.5).to(device).requires_grad_(what == "gradient")
        before = _memory(device, reset=True)
        start = time.process_time() if device == "cpu" else time.perf_counter()
        value = kalman_smoother(kernel.state_space(), times, Lam, eta).unwrap()
        if what == "gradient":
            value.log_z.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        end = time.process_time() if device == "cpu" else time.perf_counter()
        return end - start, _memory(device) - before

    once(1000)
    seconds, peak = once(n)
    return {"seconds": seconds, "peak MiB": peak / 2**20}


def _memory(device: str, reset: bool = False) -> float:
    """Peak bytes so far; ``reset`` sets the peak back to the present use."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.max_memory_allocated())
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def crossover(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of the scan over that of the loop, by n: where it falls below 1 is ``SCAN_FROM``."""
    cases: dict[str, Callable[[int], Callable[..., Any]]] = {
        "Matern 3/2": lambda n: filters(n, 1, 1.5, args.device),
        "Matern 3/2, 15 filters": lambda n: filters(n, 15, 1.5, args.device),
        "3 coupled Matern 1/2, with gradient": lambda n: coupled(n, 3, 0.5, args.device),
        "3 coupled Matern 3/2, with gradient": lambda n: coupled(n, 3, 1.5, args.device),
    }
    rows = []
    for name, make in cases.items():
        row: dict[str, Any] = {"case": name}
        for n in (16, 24, 32, 48, 64, 96, 128, 256):
            smooth = make(n)
            runs = {m: (lambda f=smooth, m=m: f(m)) for m in ("scan", "sequential")}
            row[f"n={n}"] = interleave(runs, device=args.device).ratio("scan", "sequential")
        rows.append(row)
    return rows


def block_length(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time by length of a block over that at 8; see ``SHORT_BLOCKS``, ``LONG_BLOCKS`` and ``LONG_FROM``."""
    cases: dict[str, Callable[..., Any]] = {
        "Matern 3/2, n=300": filters(300, 1, 1.5, args.device),
        "Matern 3/2, n=1000, 15 filters": filters(1000, 15, 1.5, args.device),
        "3 coupled Matern 1/2, n=1318, with gradient": coupled(1318, 3, 0.5, args.device),
        "5 coupled Matern 3/2, n=1461, with gradient": coupled(1461, 5, 1.5, args.device),
        "Matern 3/2, n=1e4": filters(10_000, 1, 1.5, args.device),
        "Matern 3/2, n=1e4, 15 filters": filters(10_000, 15, 1.5, args.device),
        "Matern 3/2, n=1e5": filters(100_000, 1, 1.5, args.device),
        "Matern 3/2, n=1e6": filters(1_000_000, 1, 1.5, args.device),
    }

    def at(length: int, smooth: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            _kalman.SHORT_BLOCKS = _kalman.LONG_BLOCKS = length
            return smooth("scan")

        return run

    before = _kalman.SHORT_BLOCKS, _kalman.LONG_BLOCKS
    rows = []
    for name, smooth in cases.items():
        lengths = (4, 8, 16, 32, 64)
        timings = interleave({str(k): at(k, smooth) for k in lengths}, device=args.device, repeats=3)
        rows.append({"case": name, "seconds at 8": timings.median("8")})
        rows[-1] |= {f"length {k}": timings.ratio(str(k), "8") for k in lengths}
    _kalman.SHORT_BLOCKS, _kalman.LONG_BLOCKS = before
    return rows


def products(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Products of D x D by D x (D + 1) matrices: a multiply-add a term over one product and sum, and over BLAS.

    Where the first falls below 1 is ``TERMS_IN_CACHE``.
    """
    rows = []
    before = _kalman_algebra.TERMS_IN_CACHE
    for dim in (2, 3, 6, 12):
        for m in (16, 128, 1024, 16_384):
            a, b = (torch.randn(dim, c, m, dtype=torch.float64, device=args.device) for c in (dim, dim + 1))
            last = [x.movedim(-1, 0).contiguous() for x in (a, b)]

            def own(limit: int, a: Tensor = a, b: Tensor = b) -> Tensor:
                _kalman_algebra.TERMS_IN_CACHE = limit
                return _kalman_algebra.product(a, b)

            runs: dict[str, Callable[[], Any]] = {
                "sum": lambda own=own: own(1 << 62),
                "terms": lambda own=own: own(0),
                "BLAS": lambda last=last: torch.bmm(*last),
            }
            timings = interleave(runs, device=args.device, repeats=3)
            rows.append({"D": dim, "m": m, "terms": dim * dim * (dim + 1) * m})
            rows[-1] |= {"microseconds of sum": 1e6 * timings.median("sum")}
            rows[-1] |= {f"{name} / sum": timings.ratio(name, "sum") for name in ("terms", "BLAS")}
    _kalman_algebra.TERMS_IN_CACHE = before
    return rows


def accuracy(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Largest errors against a dense GP on 200 points with gaps, ties and unequal noise, over three seeds."""
    rows = []
    for nu in (0.5, 1.5, 2.5):
        for method in ("sequential", "scan"):
            worst = dict.fromkeys(("mean", "variance", "log p(y), relative"), 0.0)
            for seed in SEEDS:
                generator = torch.Generator().manual_seed(seed)
                times = (torch.rand(200, generator=generator, dtype=torch.float64) * 5).sort().values
                times[100:] += 4
                times[20] = times[21]
                y = torch.randn(200, generator=generator, dtype=torch.float64)
                noise = 0.01 + 0.3 * torch.rand(200, generator=generator, dtype=torch.float64)
                query = torch.rand(100, generator=generator, dtype=torch.float64) * 11 - 1
                times, y, noise, query = (x.to(args.device) for x in (times, y, noise, query))
                with torch.no_grad():
                    for key, error in _errors(Matern(0.4, nu=nu).to(args.device), times, y, noise, query, method):
                        worst[key] = max(worst[key], error)
            rows.append({"nu": nu, "method": method, **worst})
    return rows


def _errors(kernel: Matern, times: Tensor, y: Tensor, noise: Tensor, query: Tensor, method: str) -> Any:
    Lam, eta, constant = messages(y, noise)
    out = kalman_smoother(kernel.state_space(), times, Lam, eta, query=query, method=method).unwrap()
    L = torch.linalg.cholesky(kernel.dense(times[:, None]) + torch.diag(noise))
    white = torch.linalg.solve_triangular(L, kernel.dense(times[:, None], query[:, None]), upper=False)
    z = torch.linalg.solve_triangular(L, y[:, None], upper=False)
    log_p = -0.5 * z.square().sum() - L.diagonal().log().sum() - 0.5 * len(y) * math.log(2 * math.pi)
    yield "mean", float((out.mean - white.mT @ z).abs().max())
    yield "variance", float((out.cov[:, 0, 0] - (1 - white.square().sum(0))).abs().max())
    yield "log p(y), relative", float((out.log_z + constant - log_p).abs() / log_p.abs())


TABLES = {
    "targets": targets,
    "more cases": more_cases,
    "large": large,
    "accuracy": accuracy,
    "crossover": crossover,
    "block length": block_length,
    "products": products,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--large"]:
        print(json.dumps(measure_large(int(sys.argv[2]), *sys.argv[3:])))
    else:
        run_tables("solvers_kalman", TABLES, arguments(__doc__))
