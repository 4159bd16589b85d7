"""Speed and memory of the functional decompositions: a sweep, how it grows, and the smoothers under it."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import bench_solvers_kalman
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from tensor_data import pm25
from timing import target_row

from stochproc.tensor import FunctionalCP, FunctionalTucker, StateSpaceGP

Row = dict[str, Any]
ESTIMATORS = {"CP": FunctionalCP, "Tucker": FunctionalTucker}
# Nothing but sweeps, and no rule that ends them.
PLAIN: Row = {"n_init": 1, "init": "degree", "early_stopping": False, "tol": 1e-300}
SWEEP_TARGETS = (("CP", 3, 0.08), ("Tucker", 3, 0.12), ("Tucker", 5, 0.4), ("Tucker", 7, 1.6))
MEMORY_TARGETS = ((5, 0.3), (7, 0.5))


def sweeps(name: str, rank: int, X: np.ndarray, y: np.ndarray, n_sweeps: int = 6) -> list[float]:
    """CPU seconds of single sweeps with fixed kernels, bound included; of Tucker without those of CP before it."""
    stamps: list[float] = []
    model = ESTIMATORS[name](rank, learn_hyperparameters=False, max_iter=n_sweeps, **PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y, callback=lambda state: stamps.append(time.process_time()))
    return np.diff(stamps)[-(n_sweeps - 1) :].tolist()


def speed(args: argparse.Namespace) -> list[Row]:
    """Seconds of a sweep, seconds to a given error, and extra memory, against the targets."""
    data = pm25(0)
    rows = []
    for name, rank, most in SWEEP_TARGETS:
        found = sweeps(name, rank, data.X, data.y)
        case = f"{name}, rank {rank}: CPU s a sweep, fixed kernels"
        rows.append(target_row(case, statistics.median(found), most, spread=[min(found), max(found)]))
    for n_sweeps in range(1, 9):
        before = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = FunctionalCP(max_iter=n_sweeps, **PLAIN).fit(data.X, data.y)
        seconds = time.process_time() - before
        rmse = math.sqrt(np.mean((model.predict(data.X_test) - data.y_test) ** 2))
        if rmse <= 0.355:
            break
    rows.append(target_row("CP, rank 3: CPU s to test RMSE 0.355", seconds, 0.3, rmse=rmse, sweeps=n_sweeps))
    for rank, most in MEMORY_TARGETS:
        found = alone("memory", "Tucker", rank, 1, 1)
        rows.append(target_row(f"Tucker, rank {rank}: extra GB", found["peak"] / 1e9, most))
    return rows


def enlarged(rows: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """The data of fold 0 so many times over, and days refined into so many times the distinct points."""
    data = pm25(0)
    X, y = np.tile(data.X, (rows, 1)), np.tile(data.y, rows)
    if points > 1:
        # Parts of a day: distinct points of the last mode grow and nothing else changes.
        step = 10 / 1461
        X[:, 2] += step * (np.random.default_rng(0).integers(0, points, len(X)) / points - 0.5)
    return X, y


def growth(args: argparse.Namespace) -> list[Row]:
    """A sweep by rows, distinct points and rank; everything else as in the first line."""
    cases = [("CP", 3, 1, 1), *(("CP", 3, k, 1) for k in (2, 4, 8)), *(("CP", 3, 1, k) for k in (2, 4, 8))]
    cases += [("CP", rank, 1, 1) for rank in (1, 6, 12)]
    cases += [("Tucker", 3, k, 1) for k in (1, 2, 4, 8)] + [("Tucker", rank, 1, 1) for rank in (2, 4, 6, 8)]
    rows = []
    for name, rank, times, points in cases:
        X, y = enlarged(times, points)
        row: Row = {"model": name, "rank": rank, "n": len(y), "points": sum(len(np.unique(x)) for x in X.T)}
        row["CPU s a sweep"] = statistics.median(sweeps(name, rank, X, y, 4))
        row["extra MB"] = alone("memory", name, rank, times, points)["peak"] / 1e6
        rows.append(row)
    return rows


def smoother(args: argparse.Namespace) -> list[Row]:
    """The scan against the loop over points, and a million points of a state-space process in a process of its own."""
    rows = bench_solvers_kalman.targets(args)
    for kernel in ("matern12", "matern32", "matern52"):
        found = alone("series", kernel, 1_000_000)
        case = f"StateSpaceGP, {kernel}, n=1e6: fit, given hyperparameters"
        row: Row = {"case": case, "measured": found["fit"], "extra MB": found["peak"] / 1e6}
        rows.append(row | {"predict with std at n": found["predict"]})
    return rows


def alone(*what: Any) -> Row:
    """Run one measurement in a fresh process."""
    script = pathlib.Path(__file__).with_name("bench_tensor.py")
    done = subprocess.run(
        [sys.executable, str(script), "--alone", *map(str, what)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_alone(what: str, *args: str) -> Row:
    warnings.simplefilter("ignore")
    if what == "series":
        return _series(args[0], int(args[1]))
    name, (rank, times, points) = args[0], map(int, args[1:])
    X, y = enlarged(times, points)
    model = ESTIMATORS[name](rank, max_iter=2, **PLAIN)
    before = _peak(reset=True)
    model.fit(X, y)
    return {"peak": _peak() - before}


def _series(kernel: str, n: int) -> Row:
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0, n / 50, n))
    y = np.sin(times) + 0.3 * rng.standard_normal(n)
    model = StateSpaceGP(kernel, optimizer=None)
    model.fit(times[:1000], y[:1000]).predict(times[:10], return_std=True)
    before = _peak(reset=True)
    start = time.process_time()
    model.fit(times, y)
    fitted = time.process_time()
    model.predict(times, return_std=True)
    return {"fit": fitted - start, "predict": time.process_time() - fitted, "peak": _peak() - before}


def _peak(reset: bool = False) -> float:
    """Largest resident bytes so far; ``reset`` starts anew from those of now."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
