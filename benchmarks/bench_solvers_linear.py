"""Linear solvers: ``CG`` against linear_operator's own conjugate gradients at equal true residual.

Run ``python benchmarks/bench_solvers_linear.py [--device cuda] [--only TABLE ...]``. Both sides multiply with the
same ``KernelOperator``, take turns in one process, and are held to a relative true residual of 1e-6, computed
here. linear_operator stops by the residual of its recursion; where that has drifted it gets a smaller tolerance
until the true one is met. Its guard against division by zero, 1e-10 by default, sets steps to zero from a relative
residual of about 1e-5 on (230 products instead of 103, or never, at n = 2000): it is lowered to 1e-30 here, which
is in its favour.
"""

import os

# Before anything loads NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import linear_operator
import torch
from timing import Clock, arguments, interleave, run_tables, target_row
from torch import Tensor

from stochproc.kernels import RBF
from stochproc.solvers import CG, PivotedCholesky

N, D, RTOL, TARGET = 10_000, 3, 1e-6, 0.8
# Rank of linear_operator's preconditioner when nobody sets it, and ours.
THEIR_RANK, OUR_RANK = 15, 100


def system(seed: int, noise: float, dtype: torch.dtype, device: str, n: int = N) -> tuple[Any, Tensor]:
    """An RBF matrix of standard normal points plus noise, and a smooth function seen through that noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    b = x.sin().sum(-1) + noise**0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    x, b = (t.to(device=device, dtype=dtype) for t in (x, b))
    return RBF().operator(x).add_jitter(noise), b


def true_residual(A: Any, x: Tensor, b: Tensor) -> float:
    return float((b - A @ x).double().norm() / b.double().norm())


class Counted:
    """The operator's products, counted."""

    def __init__(self, A: Any) -> None:
        self.A, self.products = A, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.A._matmul(v)


def by_linear_operator(A: Any, b: Tensor, rank: int, tolerance: float) -> tuple[Tensor, int]:
    """Solve as ``A.solve(b)`` does above the Cholesky size, with its own preconditioner of a rank."""
    # The preconditioner is cached on the operator: a new one each time, as for new hyperparameters.
    A = type(A)(A._linear_op, A._diag_tensor)
    product = Counted(A)
    settings = linear_operator.settings
    with settings.max_preconditioner_size(rank), settings.cg_tolerance(tolerance), settings.max_cg_iterations(2000):
        precondition = A._preconditioner()[0]
        x = linear_operator.utils.linear_cg(
            product, b.unsqueeze(-1), max_iter=2000, preconditioner=precondition, eps=1e-30
        )
    return x.squeeze(-1), product.products


@torch.no_grad()
def against_linear_operator(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of ``CG()`` over that of linear_operator's CG, n = 10000, d = 3, float64, both from scratch.

    A run takes from ten seconds to minutes, so each is done once a seed, and the seeds are the repeats.
    """
    rows = []
    noise = 1e-1
    for seed in (0, 1):
        A, b = system(seed, noise, torch.float64, args.device)
        clock = Clock(args.device)
        ours, seconds = timed(clock, lambda A=A, b=b: CG(rtol=RTOL)(A, b))
        for name, rank in (("its default preconditioner, rank 15", THEIR_RANK), ("rank 100 on both", OUR_RANK)):
            # Its recursion may have drifted: the largest tolerance that brings the true residual to 1e-6 counts.
            for k in range(8):
                tolerance = RTOL / 2**k
                (x, products), base = timed(
                    clock, lambda A=A, b=b, rank=rank, tol=tolerance: by_linear_operator(A, b, rank, tol)
                )
                if true_residual(A, x, b) <= RTOL:
                    break
            rows.append(
                target_row(
                    f"CG / linear_operator, noise {noise:g}, {name}",
                    seconds / base,
                    TARGET,
                    seed=seed,
                    seconds=seconds,
                    base_seconds=base,
                    products=ours.stats["products"],
                    base_products=products,
                    residual=true_residual(A, ours.value, b),
                    base_residual=true_residual(A, x, b),
                    base_tolerance=tolerance,
                )
            )
    return rows


def timed(clock: Clock, function: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the seconds it took."""
    found: list[Any] = []
    seconds = clock.time(lambda: found.append(function()), 1)
    return found[0], seconds


@torch.no_grad()
def where_time_goes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Shares of one ``CG()`` call, n = 10000, noise 1e-1, float64."""
    noise = 1e-1
    A, b = system(0, noise, torch.float64, args.device)
    v = b.unsqueeze(-1)
    P = PivotedCholesky(OUR_RANK).build(A._linear_op, noise)
    result = CG(rtol=RTOL)(A, b)
    runs: dict[str, Callable[[], Any]] = {
        "whole": lambda: CG(rtol=RTOL)(A, b),
        "product": lambda: A @ v,
        "build": lambda: PivotedCholesky(OUR_RANK).build(A._linear_op, noise),
        "apply": lambda: P.apply(v),
    }
    timings = interleave(runs, device=args.device, repeats=2, warmups=0, at_least=0)
    whole, products, its = timings.median("whole"), result.stats["products"], result.convergence.iterations
    counts = {"product": products, "build": 1, "apply": its}
    rows = [
        {"what": f"{k}, {counts[k]} times", "seconds": counts[k] * timings.median(k)}
        for k in ("product", "build", "apply")
    ]
    rows.append({"what": "the rest", "seconds": max(0.0, whole - sum(r["seconds"] for r in rows))})
    return [{**r, "share": r["seconds"] / whole} for r in [*rows, {"what": "whole", "seconds": whole}]]


@torch.no_grad()
def preconditioners(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Iterations and seconds by preconditioner, RBF n = 2000, float64, rtol 1e-6."""
    from stochproc.solvers import Jacobi, Nystrom

    rows = []
    for noise in (1e-1, 1e-2, 1e-3):
        A, b = system(0, noise, torch.float64, args.device, n=2000)
        row: dict[str, Any] = {"noise": noise}
        options = {"none": None, "Jacobi": Jacobi(), "PivotedCholesky": PivotedCholesky(), "Nystrom": Nystrom()}
        for name, precond in options.items():
            solver = CG(rtol=RTOL, precond=precond)
            result, seconds = timed(Clock(args.device), lambda s=solver, A=A, b=b: s(A, b))
            found = f"{result.convergence.iterations} ({seconds:.2g} s)"
            row[name] = found if result.ok else f"{found} {result.status.value}"
        rows.append(row)
    return rows


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the target table, for a script that gathers several."""
    return against_linear_operator(args)


TABLES = {
    "CG targets": against_linear_operator,
    "where the time goes": where_time_goes,
    "preconditioners": preconditioners,
}


def main() -> None:
    # Both libraries say by warnings what the table says in numbers.
    warnings.simplefilter("ignore")
    run_tables("solvers_linear", TABLES, arguments(__doc__))


if __name__ == "__main__":
    main()
