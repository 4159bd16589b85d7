"""Measurements that need a process of their own: peak memory of a dense solve, and clouds without a stored cost."""

import math
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import ot_problems
import torch
from timing import target_row

Row = dict[str, Any]
# Points on each side, reg over the squared diameter, and how the second cloud lies.
LARGE: tuple[Row, ...] = (
    {"n": 10_000, "reg / diam^2": 1e-3, "cloud": "uniform"},
    {"n": 10_000, "reg / diam^2": 1e-3, "cloud": "clusters"},
    {"n": 30_000, "reg / diam^2": 1e-3, "cloud": "uniform"},
    {"n": 100_000, "reg / diam^2": 1e-3, "cloud": "uniform"},
    {"n": 100_000, "reg / diam^2": 1e-3, "cloud": "clusters"},
    {"n": 100_000, "reg / diam^2": 1e-4, "cloud": "uniform"},
    {"n": 100_000, "reg / diam^2": 1e-4, "cloud": "clusters"},
)
GOAL, MINUTES = 1e-4, 6.0


def measure_alone(kind: str, *what: str) -> Row:
    """Run the measurement of this name; arguments are words of the command line."""
    return {"dense": dense_peak, "lazy": lazy_run, "symmetric": symmetric_passes}[kind](*what)


def dense_peak(n: str, what: str) -> Row:
    """Bytes of the peak of one solve above what the process holds with its inputs."""
    from stochproc import ot

    def once(p: ot_problems.Transport) -> Any:
        r = ot.solve(p.M, p.a, p.b, reg=1 / 1200)
        return r.plan if what.endswith("plan") else r.value

    # What is loaded and allocated on first use is no matter of n.
    once(ot_problems.cloud(100))
    p = ot_problems.cloud(int(n))
    before = start_peak()
    once(p)
    return {"peak": peak() - before}


def lazy_run(n: str, reg: str, cloud: str) -> Row:
    """Solve between two clouds of float32 points in the unit square, to a certified error of 1e-4."""
    from stochproc import ot

    x, y = points(int(n), cloud)
    small = points(500, cloud)
    eps = 2 * float(reg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ot.solve_sample(*small, reg=eps, lazy=True, tol=GOAL)
        before, clock = start_peak(), time.process_time()
        r = ot.solve_sample(x, y, reg=eps, lazy=True, tol=GOAL)
    seconds = time.process_time() - clock
    row = {"seconds": seconds, "err": float(r.err), "passes": int(r.n_iter), "peak MB": (peak() - before) / 1e6}
    found = independent_err(x, y, r.potentials, eps)
    return {**row, "err recomputed": found, "status": r.status.value}


def points(n: int, cloud: str) -> tuple[np.ndarray, np.ndarray]:
    """Uniform points against uniform ones, or against two clusters with a thin background."""
    rng = np.random.default_rng(0)
    x, y = rng.random((n, 2)), rng.random((n, 2))
    if cloud == "clusters":
        centres = np.array([[0.3, 0.3], [0.7, 0.6]])[rng.integers(2, size=n)]
        near = (centres + 0.08 * rng.standard_normal((n, 2))).clip(0, 1)
        y = np.where(rng.random((n, 1)) < 0.9, near, y)
    return x.astype(np.float32), y.astype(np.float32)


def independent_err(x: np.ndarray, y: np.ndarray, potentials: Any, eps: float) -> float:
    """L1 error of both marginals of the plan that the potentials define, in float64 blocks of plain torch.

    Potentials are float32 here, so that exp((f + g - C) / eps) itself carries an error of about 1e-7 max|f| / eps.
    """
    f, g = (torch.as_tensor(t).double() / eps for t in potentials)
    # Half the squared norms go into f and g, so that a block is one product and one exponential.
    X, Y = (torch.as_tensor(p).double() for p in (x, y))
    scaled = Y.T * (2 / eps)
    n, m = len(X), len(Y)
    u, v = f - X.square().sum(1) / eps, g - Y.square().sum(1) / eps
    rows, columns = torch.zeros_like(u), torch.zeros_like(v)
    for block in torch.arange(n).split(max(1, (1 << 20) // m)):
        part = torch.addmm(v, X[block], scaled).add_(u[block, None] - math.log(n) - math.log(m)).clamp_(-700).exp_()
        rows[block] = part.sum(1)
        columns += part.sum(0)
    return float((rows - 1 / n).abs().sum() + (columns - 1 / m).abs().sum())


def symmetric_passes(n: str, eps_over_range: str) -> Row:
    """Passes of the transport of a cloud to itself."""
    from stochproc.ot._outcome import Tracker
    from stochproc.ot._symmetric import StoredSweeps, symmetric

    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((int(n), 2)))
    cost = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    span, a = float(cost.max()), torch.from_numpy(ot_problems.weights(int(n), rng))
    tracker = Tracker(1e-10, 2000)
    outcome = symmetric(StoredSweeps(cost, span), a, float(eps_over_range) * span, math.inf, tracker)
    return {"passes": tracker.stats["passes"], "err": outcome.err}


def large(args: Any, alone: Callable[..., Row]) -> list[Row]:
    """Targets of what runs without a matrix, and of the symmetric term."""
    found = alone("symmetric", 500, 1e-4)
    rows = [target_row("symmetric term, eps 1e-4 range: passes", found["passes"], 40, err=found["err"])]
    for case in LARGE:
        n, reg, cloud = case.values()
        if n == 10_000 or (args.quick and n > 10_000):
            continue
        found, name = alone("lazy", n, reg, cloud), f"lazy, n = {n:,}, {cloud}, reg {reg:g} diam^2"
        rows.append(target_row(f"{name}: certified err", found["err"], GOAL))
        rows.append(
            target_row(f"{name}: certificate - recomputed", abs(found["err"] - found["err recomputed"]), GOAL / 2)
        )
        if n == 30_000:
            rows.append(target_row(f"{name}: CPU seconds", found["seconds"], 40.0))
        else:
            rows.append(target_row(f"{name}: CPU minutes", found["seconds"] / 60, MINUTES))
            rows.append(target_row(f"{name}: MB beyond input", found["peak MB"], 200.0))
    return rows


def start_peak() -> int:
    """Set the peak of this process back to its present size, and return that."""
    # 5 is the word for it.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Largest resident size so far, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
