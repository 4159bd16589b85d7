"""Large n: memory of a fit and of a product, iterations of conjugate gradients, and agreement with Cholesky.

Run ``python benchmarks/bench_gp_large.py [--only TABLE ...]``. Memory is the peak resident set of a process of its own:
of a fit in all, of a product less what was resident before it. Tables named by --only replace their own rows in the
file of results.
"""

import os

# Before anything loads NumPy or torch; the processes for memory inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from timing import arguments, run_tables, target_row

from stochproc.gp import LargeScaleMixtureGP, ScaleMixtureGPRegressor, arch
from stochproc.kernels import RBF, Kernel, Matern
from stochproc.solvers import CG, LBFGS, LanczosLogdet, PivotedCholesky

NOISES = (1e-1, 1e-2, 1e-3, 1e-4)
# Iterations that spec/gp_scale_mixture.md states for these levels of noise.
STATED = {1e-1: 21, 1e-2: 55, 1e-3: 108, 1e-4: 143}
MIB = 2**20


def relu(depth: int) -> Kernel:
    """The network of the specification: ``depth`` hidden layers of rectified linear units."""
    return arch.NetworkKernel(arch.mlp(depth, "relu"))


def data(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return X, torch.sin(X.sum(1)) + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)


def resident(field: str) -> float:
    """Resident set of this process in MiB: now ("VmRSS") or at its peak ("VmHWM").

    Not ``resource.getrusage``: there a child starts with the peak of its parent.
    """
    with open("/proc/self/status") as lines:
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def forget_peak() -> None:
    """Set the peak to what is resident now, so that what was loaded and freed before does not hide in it."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure_product(n: int, kind: str) -> dict[str, float]:
    """Multiply; of the network the first tenth of the rows, whose blocks are as large as those of the rest."""
    X, y = data(n, 8)
    rows = X if kind == "rbf" else X[: n // 10]
    kernel = RBF(2.0) if kind == "rbf" else relu(4)
    with torch.no_grad():
        # A small product first: what the libraries load is not the product's.
        kernel.operator(X[:1500]) @ y[:1500, None]
        forget_peak()
        before, start = resident("VmRSS"), time.process_time()
        kernel.operator(rows, X) @ y[:, None]
    return {"mib": resident("VmHWM") - before, "seconds": time.process_time() - start}


def measure_fit(n: int, kind: str) -> dict[str, float]:
    """Fit with few iterations of the search, which sees 2000 rows alone and so has no part in the growth with n."""
    X, y = (t.numpy() for t in data(n, 3))
    model = ScaleMixtureGPRegressor(RBF([1.0] * 3), optimizer=LBFGS(max_iter=2), solver="cg", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        model.fit(X, y)
    found = {"mib": resident("VmHWM"), "seconds": time.process_time() - start, "residual": model.posterior_.residual}
    with torch.no_grad():
        start = time.process_time()
        model.predict(X[:1000])
        found["seconds_1000_means"] = time.process_time() - start
    return found


def in_a_process_of_its_own(name: str, n: int, kind: str) -> dict[str, float]:
    code = f"import json, bench_gp_large as b; print(json.dumps(b.{name}({n}, {kind!r})))"
    here = os.path.dirname(os.path.abspath(__file__))
    out = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def table_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for kind in ("rbf", "relu depth 4, a tenth of the rows"):
        found = in_a_process_of_its_own("measure_product", 50_000, kind)
        more = {"seconds": found["seconds"]}
        rows.append(target_row(f"K v, {kind}, n = 50,000: additional MiB", found["mib"], 200 * 1e6 / MIB, **more))
    found = in_a_process_of_its_own("measure_fit", 20_000, "rbf")
    more = {k: found[k] for k in ("seconds", "residual", "seconds_1000_means")}
    rows.append(target_row("fit, rbf, n = 20,000: MiB in all", found["mib"], 1.5e9 / MIB, **more))
    return rows


def table_iterations(args: argparse.Namespace) -> list[dict[str, Any]]:
    X, y = data(2000, 8)
    rows = []
    for name, kernel in (("relu depth 4", relu(4)), ("rbf", RBF(3.0))):
        with torch.no_grad():
            matrix = kernel.dense(X)
            level = matrix.diagonal().mean().item()
            for noise in NOISES:
                A = matrix + noise * level * torch.eye(2000, dtype=torch.float64)
                built = PivotedCholesky(100).build(matrix, noise * level)
                with_it, without = (CG(precond=p, max_iter=2000)(A, y - y.mean()) for p in (built, None))
                rows.append(
                    {
                        "case": f"{name}, noise {noise:g}",
                        "iterations": with_it.convergence.iterations,
                        "without preconditioner": without.convergence.iterations,
                        "stated": STATED[noise] if name.startswith("relu") else None,
                    }
                )
    return rows


def table_agreement(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    X, y = data(1000, 4)
    X_test = data(40, 4, seed=1)[0]
    for name, kernel in (("rbf", RBF(2.0)), ("matern32", Matern(2.0, nu=1.5)), ("relu depth 4", relu(4))):
        level = kernel.diag(X).mean().item()
        for noise in (1e-1, 1e-4):
            large = LargeScaleMixtureGP(kernel, noise=noise * level, logdet=LanczosLogdet(probes=2, steps=2))
            with warnings.catch_warnings(), torch.no_grad():
                # The log determinant is cut short on purpose.
                warnings.simplefilter("ignore")
                exact, found = large.exact().condition(X, y), large.condition(X, y)
                (mean, variance), (mean_cg, variance_cg) = exact.predict(X_test), found.predict(X_test)
            of_mean = ((mean_cg - mean).abs().max() / mean.abs().max()).item()
            of_variance = (variance_cg / variance - 1).abs().max().item()
            case = f"{name}, noise {noise:g}"
            rows.append(target_row(f"{case}: mean", of_mean, 1e-5))
            rows.append(target_row(f"{case}: variance", of_variance, 1e-5))
    return rows


if __name__ == "__main__":
    options = arguments(__doc__ or "")
    # Tables asked for by name take the place of those in the file.
    options.update = True
    tables = {"agreement": table_agreement, "iterations": table_iterations, "memory": table_memory}
    run_tables("gp_large", tables, options)
