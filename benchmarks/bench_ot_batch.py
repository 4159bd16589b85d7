"""Batched entropic transport against a loop of single solves and, where installed, POT's batched Sinkhorn.

Run ``python benchmarks/bench_ot_batch.py``: 256 problems of 64 x 64, half random assignment, half clouds in the plane
with random weights, costs in [0, 1], float64, default tolerance 1e-9, one thread, CPU seconds of runs made in turn in
one process. Errors are recomputed from the plans. POT's tolerance means something else, so it is given ever more
iterations until its worst err is 1e-9 or the limit of seconds is passed, and then compared with ours at the err it
reached.
"""

import contextlib
import importlib.util
import time
import warnings
from collections.abc import Iterator
from typing import Any

import timing
import torch
from timing import arguments, interleave, run_tables, target_row
from torch import Tensor

from stochproc.ot import solve
from stochproc.ot._batch import solve_batch

timing.LIBRARIES = (*timing.LIBRARIES, "pot")
COUNT, SIDE = 256, 64
ETAS = (1e2, 1e3, 1e4)
GOAL = 1e-9
POT_LIMIT = 20.0
# The loop takes long: it solves every fourth problem, and its time is multiplied by four.
LOOP_EVERY = 4
ROUNDS = 2


def problems(device: str, count: int = COUNT, side: int = SIDE) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    half = count // 2
    M = torch.rand(count, side, side, generator=gen, dtype=torch.float64)
    x, y = torch.rand(2, half, side, 2, generator=gen, dtype=torch.float64)
    M[half:] = torch.cdist(x, y**3).square()
    M /= M.amax((1, 2), keepdim=True)
    weights = torch.ones(2, count, side, dtype=torch.float64)
    weights[:, half:] = torch.rand(2, half, side, generator=gen, dtype=torch.float64) + 0.1
    a, b = weights / weights.sum(-1, keepdim=True)
    return M.to(device), a.to(device), b.to(device)


def worst(plan: Tensor, a: Tensor, b: Tensor) -> float:
    """Largest L1 error of the marginals of an item."""
    return float(((plan.sum(2) - a).abs().sum(1) + (plan.sum(1) - b).abs().sum(1)).max())


def loop(args: Any) -> list[dict[str, Any]]:
    """Compare with one solve after the other; both form the plans."""
    M, a, b = problems(args.device)
    few = range(0, COUNT, LOOP_EVERY)
    rows = []
    for eta in ETAS:
        found: dict[str, Any] = {}

        def batched(eta: float = eta, found: dict[str, Any] = found) -> None:
            found["batch"] = solve_batch(M, a, b, reg=1 / eta)
            found["plan"] = found["batch"].plan

        def single(eta: float = eta, found: dict[str, Any] = found) -> None:
            found["single"] = [solve(M[i], a[i], b[i], reg=1 / eta).plan for i in few]

        timings = interleave(
            {"batch": batched, "loop": single}, device=args.device, repeats=ROUNDS, warmups=0, at_least=0
        )
        result = found["batch"]
        more = {
            "batch s": timings.median("batch"),
            "loop s": LOOP_EVERY * timings.median("loop"),
            "rounds": result.stats["rounds"],
            "mean passes": float(result.n_iter.double().mean()),
            "converged": sum(result.converged),
            "err": worst(found["plan"], a, b),
            "loop err": worst(torch.stack(found["single"]), a[::LOOP_EVERY], b[::LOOP_EVERY]),
        }
        rows.append(target_row(f"eta {eta:g}, batch / loop", timings.ratio("batch", "loop") / LOOP_EVERY, 0.3, **more))
    return rows


def pot(args: Any) -> list[dict[str, Any]]:
    """Compare with POT's batched Sinkhorn at the error that it reaches."""
    if importlib.util.find_spec("ot") is None:
        return [{"case": "POT is not installed"}]
    from ot.batch import solve_batch as pot_batch

    M, a, b = problems(args.device)
    rows = []
    for eta in ETAS:
        with quiet():
            budget, err, seconds = 25, float("inf"), 0.0
            while err > GOAL and seconds < POT_LIMIT / 2:
                budget *= 2
                before = time.process_time()
                plan = pot_batch(M, 1 / eta, a, b, max_iter=budget, tol=0.0, method="log_sinkhorn", grad="detach").plan
                seconds, err = time.process_time() - before, worst(plan, a, b)

            def theirs(eta: float = eta, budget: int = budget) -> None:
                pot_batch(M, 1 / eta, a, b, max_iter=budget, tol=0.0, method="log_sinkhorn", grad="detach")

            def ours(eta: float = eta, err: float = err) -> None:
                _ = solve_batch(M, a, b, reg=1 / eta, tol=max(err, GOAL)).plan

            timings = interleave({"ours": ours, "POT": theirs}, device=args.device, repeats=1, warmups=0, at_least=0)
        rows.append(
            {
                "case": f"eta {eta:g}",
                "POT s": timings.median("POT"),
                "POT iterations": budget,
                "err of both": err,
                "ours s": timings.median("ours"),
                "POT / ours": timings.ratio("POT", "ours"),
            }
        )
    return rows


def shapes(args: Any) -> list[dict[str, Any]]:
    """Time a problem of the batch at other sizes, shared costs and lists."""
    rows = []
    cases = ((2048, 16), (256, 64), (64, 128), (16, 256))
    for count, side in cases:
        M, a, b = problems(args.device, count, side)
        listed = [M[i] for i in range(count)], list(a), list(b)
        timings = interleave(
            {
                "stack": lambda M=M, a=a, b=b: solve_batch(M, a, b, reg=1e-3),
                "list": lambda listed=listed: solve_batch(*listed, reg=1e-3),
                "float32": lambda M=M, a=a, b=b: solve_batch(M.float(), a.float(), b.float(), reg=1e-3),
            },
            device=args.device,
            repeats=ROUNDS,
            at_least=0,
        )
        case = {"case": f"{count} of {side} x {side}, eta 1000"}
        rows.append(case | {f"{name}, ms an item": 1e3 * timings.median(name) / count for name in timings.seconds})
    return rows


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


TABLES = {"loop": loop, "pot": pot, "shapes": shapes}

if __name__ == "__main__":
    run_tables("ot_batch", TABLES, arguments(__doc__))
