"""Functional CP and Tucker decompositions: accuracy and coverage on real tensors, streams, rank, speed and memory.

Run ``python benchmarks/bench_tensor.py [--only TABLE ...] [--update]``. The sets are read from ``../shared/data``;
without that folder nothing is run. Everything is float64 on one thread, in CPU seconds of the process. All models run
with their defaults, or with what a table says; other options were compared on validation rows alone (table "choices"),
and no number was chosen by a test row. Errors are root mean squares on held-out rows in the units of y.
"""

import os

# Before anything loads NumPy or torch.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import argparse
import functools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensor_data
import tensor_speed
import timing
import torch
from tensor_fields import choices, coads_ocean, irish_wind, us_diseases
from tensor_peers import (
    Model,
    boosting,
    boosting_with_mean,
    constant,
    cp,
    dense_grid,
    exact_gp,
    interpolated_mean,
    markov,
    measured,
    svgp,
    tucker,
)
from timing import interleave, target_row

from stochproc.tensor import FunctionalCP

timing.LIBRARIES = (*timing.LIBRARIES, "tensorly")
DAY = 2
Row = dict[str, Any]
THIRTY_SWEEPS: Row = {"early_stopping": False, "max_iter": 30}
OURS: dict[str, Model] = {"CP": cp(), "Tucker": tucker()}
MORE_OURS: dict[str, Model] = {
    "CP, 30 sweeps, none held out": cp(**THIRTY_SWEEPS),
    "Tucker, 30 sweeps, none held out": tucker(**THIRTY_SWEEPS),
    "CP, rank 5": cp(rank=5),
}
BASELINES: dict[str, Model] = {
    "constant": constant,
    "interpolated daily mean": interpolated_mean(DAY),
    "GP of the day, Matern 1/2": markov(DAY, "matern12"),
    "boosting": boosting,
    "boosting with the daily mean": boosting_with_mean(DAY),
}
# Minutes a fold: on the first one alone.
SLOW_BASELINES: dict[str, Model] = {
    "exact GP on 6000 rows, ARD Matern 1/2": exact_gp("matern12"),
    "SVGP, ARD Matern 1/2": svgp,
    "tensorly CP, rank 1": dense_grid(1),
    "tensorly CP, rank 3": dense_grid(3),
    "tensorly Tucker, rank 3": dense_grid(3, core=True),
}


@functools.cache
def _accuracy() -> list[Row]:
    rows = []
    for fold in tensor_data.FOLDS:
        data = tensor_data.pm25(fold)
        for name, model in (OURS | MORE_OURS | BASELINES | (SLOW_BASELINES if fold == 0 else {})).items():
            rows.append({"fold": fold, "model": name, **measured(model, data)})
            print(rows[-1], flush=True)
    daily = {row["fold"]: row["rmse"] for row in rows if row["model"] == "interpolated daily mean"}
    return [{**row, "rmse / daily mean": row["rmse"] / daily[row["fold"]]} for row in rows]


def accuracy(args: argparse.Namespace) -> list[Row]:
    """PM2.5, every fold, and the mean over the folds."""
    rows = _accuracy()
    means = []
    for name in OURS | MORE_OURS | BASELINES:
        found = [row for row in rows if row["model"] == name]
        mean: Row = {"fold": "mean", "model": name}
        for key in found[0]:
            if key not in mean:
                values = [row[key] for row in found]
                mean[key] = None if None in values else statistics.mean(values)
        means.append(mean)
    return rows + means


def accuracy_targets(args: argparse.Namespace) -> list[Row]:
    """One line for each target on PM2.5."""
    rows = []
    for name, first, mean in (("CP", 0.275, 0.28), ("Tucker", 0.278, 0.282)):
        found = [row for row in _accuracy() if row["model"] == name]
        errors, coverage = ([row[key] for row in found] for key in ("rmse", "coverage"))
        rows += [
            target_row(f"{name}: RMSE, fold 0", errors[0], first),
            target_row(f"{name}: RMSE, mean", statistics.mean(errors), mean, spread=[min(errors), max(errors)]),
            target_row(f"{name}: RMSE / daily mean, worst fold", max(row["rmse / daily mean"] for row in found), 0.85),
            target_row(f"{name}: log loss, mean", statistics.mean(row["log loss"] for row in found), 0.08),
            target_row(f"{name}: lowest coverage", min(coverage), 0.88, at_least=True),
            target_row(f"{name}: highest coverage", max(coverage), 0.93),
            target_row(f"{name}: CPU s of a fit, worst fold", max(row["fit s"] for row in found), 5.0),
        ]
    for name in ("CP, 30 sweeps, none held out", "Tucker, 30 sweeps, none held out"):
        errors = [row["rmse"] for row in _accuracy() if row["model"] == name]
        rows.append(target_row(f"{name}: RMSE, mean", statistics.mean(errors), 0.29))
    return rows


def dense(args: argparse.Namespace) -> list[Row]:
    """Fold 0 against masked CP and Tucker of tensorly on an aggregated grid, in turn in one process.

    Four plain sweeps are the short fit: what every start gets before one of them is chosen.
    """
    data = tensor_data.pm25(0)
    short = cp(n_init=1, init="degree", early_stopping=False, max_iter=4)
    runs = {
        "tensorly CP, rank 1": dense_grid(1),
        "tensorly CP, rank 3": dense_grid(3),
        "tensorly Tucker, rank 3": dense_grid(3, core=True),
        "CP, rank 3, four sweeps": short,
        "CP, rank 3, defaults": cp(),
    }
    timings = interleave({k: functools.partial(m, data) for k, m in runs.items()}, repeats=3, at_least=0)
    found = {name: measured(model, data)["rmse"] for name, model in runs.items()}
    base = "tensorly CP, rank 3"
    rows = []
    for name in runs:
        row: Row = {"case": name, "measured": found[name]}
        if name.startswith("CP"):
            row = target_row(f"{name}: RMSE / {base}", found[name] / found[base], 0.46, rmse=found[name])
        rows.append(row | {"CPU s": timings.median(name), f"CPU s / {base}": timings.ratio(name, base)})
    ratio = timings.ratio("CP, rank 3, four sweeps", base)
    return [*rows, target_row(f"CP, rank 3, four sweeps: CPU s / {base}", ratio, 1.0)]


def days(args: argparse.Namespace) -> list[Row]:
    """Whole days held out, 5 % of them, five draws: between days there is little to gain."""
    rows = []
    for draw in range(5):
        data = tensor_data.pm25_days(draw)
        base = {k: measured(BASELINES[k], data)["rmse"] for k in BASELINES}
        for name, model in OURS.items():
            found = measured(model, data)
            ratio = found["rmse"] / base["interpolated daily mean"]
            more = {"rmse": found["rmse"], "coverage": found["coverage"], "log loss": found["log loss"], **base}
            rows.append(target_row(f"draw {draw}, {name}: RMSE / interpolated daily mean", ratio, 1.03, **more))
            print(rows[-1], flush=True)
    ratios = [row["measured"] for row in rows]
    coverage = [row["coverage"] for row in rows]
    rows.append(target_row("all draws: mean ratio", statistics.mean(ratios), 1.03))
    rows.append(target_row("all draws: lowest coverage", min(coverage), 0.88, at_least=True))
    rows.append(target_row("all draws: highest coverage", max(coverage), 0.97))
    return rows


def streaming(args: argparse.Namespace) -> list[Row]:
    """Ten random chunks one after the other against all rows at once, and ten more sweeps over all rows after that."""
    rows = []
    for fold in tensor_data.FOLDS[:3]:
        data = tensor_data.pm25(fold)

        def score(model: Any, data: Any = data) -> tuple[float, float]:
            low, high = model.predict_interval(data.X_test).T
            rmse = math.sqrt(np.mean((model.predict(data.X_test) - data.y_test) ** 2))
            return rmse, float(np.mean((low <= data.y_test) & (data.y_test <= high)))

        whole, _ = score(FunctionalCP().fit(data.X, data.y))
        model = FunctionalCP()
        start = time.process_time()
        for part in np.array_split(np.random.default_rng(fold).permutation(len(data.y)), 10):
            model.partial_fit(data.X[part], data.y[part])
        streamed = time.process_time()
        first = score(model)
        warm = time.process_time()
        model.set_params(warm_start=True, max_iter=10).fit(data.X, data.y)
        seconds = [streamed - start, time.process_time() - warm]
        cases = (("ten chunks", 1.2, first), ("and ten warm sweeps", 1.1, score(model)))
        for (case, most, (rmse, coverage)), spent in zip(cases, seconds, strict=True):
            more = {"rmse": rmse, "batch rmse": whole, "coverage": coverage, "CPU s": spent}
            rows.append(target_row(f"fold {fold}, {case}: RMSE / batch", rmse / whole, most, **more))
            print(rows[-1], flush=True)
    for i, (case, most) in enumerate((("ten chunks", 1.2), ("and ten warm sweeps", 1.1))):
        ratios = [row["measured"] for row in rows[i:6:2]]
        rows.append(target_row(f"median of three, {case}: RMSE / batch", statistics.median(ratios), most))
    return rows


def smooth_product(rank: int, seed: int, n: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A sum of ``rank`` products of two smooth random functions: unit variance, noise of a twentieth of its spread."""
    rng = np.random.default_rng(1000 * rank + seed)
    X = rng.uniform(0, 1, (n, 2))
    f = np.ones((n, rank))
    for x in X.T:
        K = np.exp(-((x[:, None] - x) ** 2) / (2 * 0.25**2)) + 1e-8 * np.eye(n)
        f *= np.linalg.cholesky(K) @ rng.normal(size=(n, rank))
    truth = f.sum(1) / f.sum(1).std()
    return X, truth, truth + 0.05 * rng.normal(size=n)


def rank(args: argparse.Namespace) -> list[Row]:
    """Started at rank 6 with ARD against the exact rank from the greedy start; RMSE to the truth."""
    rows = []
    options: Row = {"kernel": "matern32", "center": False, "early_stopping": False}
    for true in (1, 2, 3):
        for seed in range(4):
            X, truth, y = smooth_product(true, seed)
            exact = FunctionalCP(true, init="greedy", n_init=1, **options).fit(X, y)
            start = time.process_time()
            pruned = FunctionalCP(6, ard=True, **options).fit(X, y)
            row: Row = {"true rank": true, "seed": seed, "rank_": pruned.rank_, "CPU s": time.process_time() - start}
            errors = [math.sqrt(np.mean((m.predict(X) - truth) ** 2)) for m in (pruned, exact)]
            row |= {"rmse": errors[0], "exact rank: rmse": errors[1], "ratio": errors[0] / errors[1]}
            rows.append(row)
            print(row, flush=True)
    n = len(rows)
    good = sum(row["ratio"] <= 1.15 and row["rmse"] <= 0.04 for row in rows)
    near = sum(abs(row["rank_"] - row["true rank"]) <= 1 for row in rows)
    hits = sum(row["rank_"] == row["true rank"] for row in rows)
    targets = [
        target_row("share with ratio <= 1.15 and RMSE <= 0.04", good / n, 0.9, at_least=True),
        target_row("share with rank_ within one of the truth", near / n, 0.9, at_least=True),
        {"case": "share with rank_ equal to the truth", "measured": hits / n},
    ]
    return rows + targets


TABLES: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "accuracy": accuracy,
    "accuracy targets": accuracy_targets,
    "dense": dense,
    "days": days,
    "streaming": streaming,
    "speed": tensor_speed.speed,
    "growth": tensor_speed.growth,
    "smoother": tensor_speed.smoother,
    "rank": rank,
    "choices": choices,
    "irish_wind": irish_wind,
    "coads_ocean": coads_ocean,
    "us_diseases": us_diseases,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--alone"]:
        print(json.dumps(tensor_speed.measure_alone(*sys.argv[2:])))
        raise SystemExit
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=None, choices=list(TABLES), help="nothing is written then")
    parser.add_argument("--update", action="store_true", help="write the tables of --only into the present file")
    args = parser.parse_args()
    args.device = "cpu"
    if not tensor_data.SHARED.exists():
        raise SystemExit("the folder ../shared/data is not there: nothing was run and nothing written.")
    warnings.simplefilter("ignore")
    # What is imported at the first use is no part of a fit.
    small = tensor_data.pm25(0)
    small = small._replace(X=small.X[::50], y=small.y[::50], X_test=small.X_test[::50], y_test=small.y_test[::50])
    for model in (OURS | BASELINES).values():
        measured(model, small)
    timing.run_tables("tensor", TABLES, args)
