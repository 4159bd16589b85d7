"""What the benchmarks share: interleaved timing, the machine in words, tables and JSON."""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
LIBRARIES = (
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "gpytorch",
    "linear_operator",
    "pykeops",
    "torchsde",
    "stochproc",
)


class Timings(NamedTuple):
    """Seconds of each run of each competitor, in the order of the rounds."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over rounds of time / time: what slows a whole round down cancels."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))

    def spread(self, name: str, base: str) -> list[float]:
        """Smallest and largest ratio of a round."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        return [min(ratios), max(ratios)]


class Clock:
    """CPU time of this process, or on CUDA the time between two events, in seconds."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def time(self, function: Callable[[], Any], calls: int) -> float:
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                function()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3 / calls
        before = time.process_time()
        for _ in range(calls):
            function()
        return (time.process_time() - before) / calls


def interleave(
    competitors: dict[str, Callable[[], Any]],
    *,
    device: str = "cpu",
    repeats: int = 5,
    warmups: int = 1,
    at_least: float = 0.02,
) -> Timings:
    """Time all competitors in turn, ``repeats`` rounds; short ones are repeated up to ``at_least`` seconds a run."""
    clock = Clock(device)
    calls = {}
    for name, function in competitors.items():
        for _ in range(warmups):
            function()
        calls[name] = max(1, math.ceil(at_least / max(clock.time(function, 1), 1e-7))) if at_least else 1
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    # A collection in the middle of one run would be charged to it alone.
    gc.collect()
    gc.disable()
    try:
        for i in range(repeats):
            # Every other round backwards, so that none always runs on what another left in the cache.
            names = list(competitors)[:: 1 if i % 2 == 0 else -1]
            for name in names:
                seconds[name].append(clock.time(competitors[name], calls[name]))
    finally:
        gc.enable()
    return Timings(seconds)


def arguments(what: str) -> argparse.Namespace:
    """Parse --device, --threads and --only, and set up torch for a fair run."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--only", nargs="*", default=None, help="names of the tables to run; nothing is written then")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is usable here: nothing was run and nothing written.")
    torch.set_num_threads(args.threads)
    return args


def machine(device: str) -> dict[str, Any]:
    """Describe what this ran on, by model and size alone."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    found: dict[str, Any] = {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {},
        # A loaded machine shares its caches and its memory bus, which CPU time does not take out.
        "load_average": round(os.getloadavg()[0], 1),
        "clock": "CUDA events" if device == "cuda" else "CPU time of the process",
    }
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["libraries"][name] = importlib.metadata.version(name)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    return found


def target_row(case: str, value: float, target: float, *, at_least: bool = False, **more: Any) -> dict[str, Any]:
    """One row of a table of targets: the measured number, the target, and whether it is met."""
    met = value >= target if at_least else value <= target
    return {"case": case, "measured": value, "target": f"{'>=' if at_least else '<='} {target:g}", "met": met, **more}


def show(title: str, rows: Iterable[dict[str, Any]]) -> None:
    """Print a table; columns are the union of the keys in order of appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) if cells else len(c) for i, c in enumerate(columns)]
    print(f"\n{title}")
    print("  ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)).rstrip())
    for line in cells:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip(), flush=True)


def run_tables(name: str, tables: dict[str, Callable[[argparse.Namespace], Any]], args: argparse.Namespace) -> None:
    """Run and print the tables, and write them to ``results/<name>_<device>.json`` unless only some are wanted.

    The file is written after each table: what took hours is not lost with a run that ends early. With ``args.update``
    the tables of ``args.only`` take the place of those in the file, which notes the load they were made under.
    """
    start = time.process_time()
    about = machine(args.device)
    print(f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['threads']} thread(s)")
    path = RESULTS / f"{name}_{args.device}.json"
    update = args.only is not None and getattr(args, "update", False)
    old = json.loads(path.read_text()) if update and path.exists() else None
    found: dict[str, Any] = old["tables"] if old else {}
    for title, make in tables.items():
        if args.only is None or title in args.only:
            before = time.perf_counter()
            found[title] = make(args)
            show(f"{title} ({time.perf_counter() - before:.0f} s)", found[title])
            if args.only is None or update:
                about["cpu_seconds_of_this_script"] = round(time.process_time() - start, 1)
                RESULTS.mkdir(exist_ok=True)
                if old:
                    old["machine"].setdefault("load_average_of_updates", {})[title] = about["load_average"]
                whole = _rounded({"machine": old["machine"] if old else about, "tables": found})
                path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
                print(f"\nwritten: benchmarks/results/{path.name}", flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return "..".join(_cell(v) for v in value)
    return str(value)


def _rounded(value: Any) -> Any:
    """Four digits are more than the timings hold; what is not finite becomes null."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
