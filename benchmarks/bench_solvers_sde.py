"""SDE integration: our loop against torchsde, on dyadic and decimal steps, forward and backward; memory.

Run ``python benchmarks/bench_solvers_sde.py [--device cuda] [--only TABLE ...]``. All runs of a row take the same
number of steps of the same scheme, in turns in one process. "torchsde" draws its Brownian motion itself, as
``sdeint`` does by default; "adapter" is our grid and path under torchsde's steps; "scan" draws its noise, "scan,
noise given" does not.
"""

import os

# Before anything loads NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torchsde
from timing import Timings, arguments, interleave, run_tables, target_row
from torch import Tensor, nn

from stochproc.solvers import brownian_increments, integrate

DTYPES = {"float32": torch.float32, "float64": torch.float64}
BATCH, D = 1024, 4


class Geometric(nn.Module):
    """dy = mu y dt + sigma y dW."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.sigma = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.3))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.mu * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.sigma * y

    drift, diffusion = f, g


class OrnsteinUhlenbeck(Geometric):
    """dy = -mu y dt + sigma dW."""

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.mu * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.sigma.expand_as(y)

    drift, diffusion = f, g


class MarkovFractional(nn.Module):
    """X and five Ornstein-Uhlenbeck processes on one Brownian motion: geometric speeds from 1/20 to 20, H = 0.3."""

    noise_type, sde_type = "scalar", "ito"

    def __init__(self) -> None:
        super().__init__()
        speeds = 20.0 ** torch.linspace(-1, 1, 5)
        weights = torch.tensor([0.8044, -0.1115, 0.4874, 0.0845, 1.1873])
        matrix = torch.zeros(6, 6)
        matrix[0, 0] = -1.0
        matrix[0, 1:] = -weights * speeds
        matrix[1:, 1:] = -speeds.diag()
        self.matrix = nn.Parameter(matrix)
        self.column = nn.Parameter(torch.cat([weights.sum()[None], torch.ones(5)])[:, None])

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.matrix.T

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.column.expand(*y.shape, 1)

    drift, diffusion = f, g


def competitors(
    sde: nn.Module, y0: Tensor, ts: Tensor, dt: float, m: int, *, backward: bool
) -> dict[str, Callable[[], Tensor]]:
    """What is timed, each returning the last state or the gradient in the start."""
    noise = brownian_increments(ts, (len(y0), m), dt=dt, dtype=y0.dtype, device=y0.device)
    own = ts.to(y0.dtype)

    def ours(**how: Any) -> Callable[[], Tensor]:
        return lambda: integrate(sde, start(), ts, dt=dt, **how).value

    def start() -> Tensor:
        return y0.detach().requires_grad_(backward)

    runs = {
        "scan": ours(),
        "scan, noise given": ours(noise=noise),
        "adapter": ours(noise=noise, backend="torchsde"),
        "torchsde": lambda: torchsde.sdeint(sde, start(), own, dt=dt, method="euler"),
    }
    if backward:
        runs["scan, checkpoints"] = ours(checkpoint_every=32)
    return {name: differentiate(sde, run) if backward else no_graph(run) for name, run in runs.items()}


def no_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    @torch.no_grad()
    def value() -> Tensor:
        return run()[-1]

    return value


def differentiate(sde: nn.Module, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def gradient() -> Tensor:
        loss = run()[-1].square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(sde.parameters()))])

    return gradient


def race(runs: dict[str, Callable[[], Tensor]], device: str, repeats: int = 3) -> tuple[Timings, float]:
    """Timings, and how far the two backends are apart on one path, relative to the largest entry."""
    ours, theirs = (runs[name]() for name in ("scan, noise given", "adapter"))
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    return interleave(runs, device=device, repeats=repeats, warmups=0, at_least=0), apart


def rows_of(timings: Timings, apart: float, case: str, target: float) -> dict[str, Any]:
    more = {f"{name}, ms": 1e3 * timings.median(name) for name in timings.seconds}
    return target_row(
        case,
        timings.ratio("torchsde", "scan"),
        target,
        at_least=True,
        spread=timings.spread("torchsde", "scan"),
        **more,
        backends_apart=apart,
    )


def equations(args: argparse.Namespace, *, backward: bool) -> list[dict[str, Any]]:
    """Torchsde / scan at 1024 dyadic and 1000 decimal steps over [0, 1], output at the ends."""
    rows = []
    for make in (Geometric, OrnsteinUhlenbeck):
        for dtype in DTYPES.values():
            for n in (1024, 1000):
                sde = make().to(args.device, dtype)
                y0 = torch.ones(BATCH, D, dtype=dtype, device=args.device)
                ts = torch.tensor([0.0, 1.0], dtype=torch.float64)
                runs = competitors(sde, y0, ts, 1 / n, D, backward=backward)
                case = f"{make.__name__} {str(dtype)[6:]} 1/{n}"
                rows.append(rows_of(*race(runs, args.device), case, 1.0))
    return rows


def forward(args: argparse.Namespace) -> list[dict[str, Any]]:
    return equations(args, backward=False)


def gradient(args: argparse.Namespace) -> list[dict[str, Any]]:
    return equations(args, backward=True)


def fractional(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Scalar noise, batch 1024, five speeds, float32, all steps as output: the targets of fractional SDEs."""
    cases = [(128, False, 5.0), (100, False, 50.0), (128, True, 3.0), (100, True, 3.0)]
    rows = []
    for n, backward, target in cases:
        sde = MarkovFractional().to(args.device)
        y0 = torch.zeros(BATCH, 6, device=args.device)
        # As a user of torchsde would write it: times in the dtype of the state.
        ts = torch.linspace(0, 1, n + 1)
        runs = competitors(sde, y0, ts, 1 / n, 1, backward=backward)
        case = f"1/{n}, {'value and gradient' if backward else 'value'}"
        rows.append(rows_of(*race(runs, args.device, repeats=9), case, target))
    return rows


def decimal(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a step on decimal over dyadic grids, all steps as output: ours is to be 1, to within the clock."""
    rows = []
    for dtype in DTYPES.values():
        sde = Geometric().to(args.device, dtype)
        y0 = torch.ones(BATCH, D, dtype=dtype, device=args.device)
        runs = {}
        for n in (1024, 1000):
            ts = torch.linspace(0, 1, n + 1, dtype=dtype)
            for name, run in competitors(sde, y0, ts, 1 / n, D, backward=False).items():
                runs[f"{name} {n}"] = run
        timings = interleave(runs, device=args.device, repeats=3, warmups=0, at_least=0)
        ratios = {
            name: timings.ratio(f"{name} 1000", f"{name} 1024") * 1.024
            for name in ("scan, noise given", "adapter", "torchsde")
        }
        case = f"Geometric {str(dtype)[6:]}, scan, 1/1000 over 1/1024 a step"
        value = timings.ratio("scan 1000", "scan 1024") * 1.024
        rows.append(target_row(case, value, 1.2, spread=timings.spread("scan 1000", "scan 1024"), **ratios))
    return rows


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of one gradient beyond what the process held, each in a process of its own."""
    rows = []
    for n, d in ((1024, 16), (4096, 16), (1024, 64)):
        peaks = {every: _peak_in_subprocess(n, d, every, args.device) for every in (0, 64)}
        rows.append(
            target_row(
                f"checkpoint_every=64 / plain, {n} steps of {BATCH} x {d} float32",
                peaks[64] / peaks[0],
                0.2,
                mib=peaks[64] / 2**20,
                base_mib=peaks[0] / 2**20,
                mib_of_the_states=n * BATCH * d * 4 / 2**20,
            )
        )
    return rows


def _peak_in_subprocess(n: int, d: int, every: int, device: str) -> float:
    command = [sys.executable, __file__, "--peak-of", str(n), str(d), str(every), device]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_of(n: int, d: int, every: int, device: str) -> float:
    """Bytes by which one value and gradient raises the peak of this process (or of the GPU)."""
    torch.set_num_threads(1)
    sde = Geometric().to(device)

    def once(steps: int) -> None:
        y0 = torch.ones(BATCH, d, device=device, requires_grad=True)
        value = integrate(sde, y0, [0.0, 1.0], dt=1 / steps, checkpoint_every=every or None).value
        value[-1].square().mean().backward()

    # What is loaded and allocated on first use is no matter of n.
    once(8)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(n)
        return float(torch.cuda.max_memory_allocated() - before)
    # VmHWM; writing 5 sets the peak back to the present size.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _resident_peak()
    once(n)
    return float(_resident_peak() - before)


def _resident_peak() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


TABLES = {
    "forward": forward,
    "value and gradient": gradient,
    "fractional": fractional,
    "decimal": decimal,
    "memory": memory,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-of"]:
        print(json.dumps(peak_of(*map(int, sys.argv[2:5]), sys.argv[5])))
    else:
        run_tables("solvers_sde", TABLES, arguments(__doc__))
