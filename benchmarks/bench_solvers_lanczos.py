"""Log-determinants by stochastic Lanczos quadrature against dense Cholesky factors: error and CPU time.

Run ``python benchmarks/bench_solvers_lanczos.py [--device cuda] [--only TABLE ...]``. Errors are in nats; the matrix
is the same for every method of a row's seed. Times include forming the kernel matrix (Cholesky), or building the
preconditioner and every product (Lanczos, matrix-free).
"""

import os

# Before anything loads NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
from typing import Any

import torch
from timing import arguments, interleave, run_tables
from torch import Tensor

from stochproc.kernels import RBF, Kernel, Matern
from stochproc.solvers import LanczosLogdet, PivotedCholesky, Result, safe_cholesky

KERNELS: dict[str, Kernel] = {"RBF(0.2)": RBF(0.2), "Matern(0.2, 5/2)": Matern(0.2, nu=2.5)}
NOISES = (1e-2, 1e-4)
TIMED_NOISE = 1e-2
RANK = 100
SEEDS = {1000: (0, 1, 2), 2000: (0, 1), 5000: (0,)}


def points(n: int, seed: int, device: str) -> Tensor:
    """Uniform points in the unit square."""
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def by_cholesky(kernel: Kernel, x: Tensor, noise: float) -> Tensor:
    K = kernel.operator(x).to_dense()
    K.diagonal().add_(noise)
    return 2 * safe_cholesky(K).unwrap().diagonal().log().sum()


def by_lanczos(kernel: Kernel, x: Tensor, noise: float, rank: int, **options: Any) -> Result:
    K = kernel.operator(x)
    P = PivotedCholesky(rank).build(K, noise) if rank else None
    return LanczosLogdet(**options)(K.add_jitter(noise), P)


@torch.no_grad()
def accuracy(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Errors of the defaults, 16 probes and 50 steps; each seed has its own points and probes."""
    rows = []
    for n, seeds in SEEDS.items():
        for name, kernel in KERNELS.items():
            for noise in NOISES:
                found: dict[int, list[tuple[Result, float]]] = {0: [], RANK: []}
                for seed in seeds:
                    x = points(n, seed, args.device)
                    K = kernel.operator(x).to_dense()
                    A = K + noise * torch.eye(n, dtype=K.dtype, device=K.device)
                    exact = float(2 * safe_cholesky(A).unwrap().diagonal().log().sum())
                    for rank, results in found.items():
                        P = PivotedCholesky(rank).build(K, noise) if rank else None
                        results.append((LanczosLogdet(seed=seed)(A, P), exact))
                for rank, results in found.items():
                    rows.append({"n": n, "kernel": name, "noise": noise, "rank": rank, **_summary(results)})
    return rows


def _summary(results: list[tuple[Result, float]]) -> dict[str, Any]:
    errors = [float(r.value.value) - exact for r, exact in results]
    stderrs = [float(r.value.stderr) for r, _ in results]
    relative = [abs(e / exact) for e, (_, exact) in zip(errors, results, strict=True)]
    ratios = [abs(e) / s for e, s in zip(errors, stderrs, strict=True)]
    return {
        "seeds": len(results),
        "logdet": statistics.median(exact for _, exact in results),
        "error": statistics.median(map(abs, errors)),
        "relative_error": statistics.median(relative),
        "stderr": statistics.median(stderrs),
        "largest_error_in_stderrs": max(ratios),
        "truncation": statistics.median(r.convergence.residual for r, _ in results),
        "converged": sum(r.ok for r, _ in results),
    }


@torch.no_grad()
def cpu_time(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of one log-determinant of a kernel matrix, relative to the Cholesky factor of the dense matrix."""
    rows = []
    for n in SEEDS:
        for name, kernel in list(KERNELS.items())[: 1 if n > 2000 else None]:
            problem = (kernel, points(n, 0, args.device), TIMED_NOISE)
            competitors = {
                "cholesky": lambda p=problem: by_cholesky(*p),
                "no preconditioner": lambda p=problem: by_lanczos(*p, 0),
                "preconditioned": lambda p=problem: by_lanczos(*p, RANK),
                "preconditioned, 10 steps": lambda p=problem: by_lanczos(*p, RANK, steps=10),
            }
            timings = interleave(
                competitors,
                device=args.device,
                repeats=3 if n <= 2000 else 1,
                warmups=1 if n <= 1000 else 0,
                at_least=0,
            )
            for method in list(competitors)[1:]:
                rows.append(
                    {
                        "n": n,
                        "kernel": name,
                        "noise": TIMED_NOISE,
                        "method": method,
                        "over_cholesky": timings.ratio(method, "cholesky"),
                        "spread": timings.spread(method, "cholesky"),
                        "seconds": timings.median(method),
                        "cholesky_seconds": timings.median("cholesky"),
                    }
                )
    return rows


TABLES = {"accuracy": accuracy, "time": cpu_time}

if __name__ == "__main__":
    run_tables("solvers_lanczos", TABLES, arguments(__doc__ or ""))
