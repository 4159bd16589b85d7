"""Kernels of infinitely wide networks: speed against neural-tangents and against the textbook formula in torch.

Run ``python benchmarks/bench_gp_kernels.py [--peer PYTHON] [--only TABLE ...]``. ``--peer`` is an interpreter that has
neural-tangents 0.6.5 and a jax below 0.6, in an environment of its own; its runs take turns with ours, one thread each,
both by CPU time. Without it that table is left out, and nothing is written.
"""

import os

# Before anything loads NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import time
from typing import Any

import numpy as np
import torch
from timing import interleave, run_tables, target_row
from torch import Tensor

from stochproc.gp import arch

N, D, DEPTH = 2000, 8, 4
ROUNDS = 5


def network(depth: int = DEPTH, activation: str = "relu") -> arch.Layer:
    """The same network as the peer's."""
    return arch.mlp(depth, activation, w_std=1.4, b_std=0.2)


def points() -> tuple[Tensor, Tensor]:
    """The same points as the peer's."""
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.standard_normal((N, D))) for _ in range(2))
    return x, y


def ours(kind: str, activation: str = "relu") -> Tensor:
    net, (x, y) = network(activation=activation), points()
    with torch.no_grad():
        return getattr(net, kind.removesuffix("_same"))(x, None if kind.endswith("_same") else y)


def textbook(x: Tensor, y: Tensor, depth: int = DEPTH) -> Tensor:
    """The arccosine recursion on covariances, whole matrices at once."""
    q, q1, q2 = x @ y.mT / D, x.square().mean(-1)[:, None], y.square().mean(-1)
    for _ in range(depth):
        q, q1, q2 = (1.96 * t + 0.04 for t in (q, q1, q2))
        n = (q1 * q2).sqrt()
        cos = (q / n).clamp(-1, 1)
        q = n / (2 * math.pi) * ((1 - cos * cos).sqrt() + (math.pi - cos.acos()) * cos)
        q1, q2 = q1 / 2, q2 / 2
    return q


class Peer:
    """neural-tangents in a process of its own."""

    def __init__(self, python: pathlib.Path) -> None:
        script = pathlib.Path(__file__).with_name("neural_tangents_peer.py")
        self.process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, kind: str, activation: str, how: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{kind} {activation} {how} {N} {D} {DEPTH}\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.process.communicate()


def against_neural_tangents(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios of CPU time, median over rounds of runs in turn."""
    rows: list[dict[str, Any]] = []
    peer = Peer(args.peer)
    cases = [
        ("nngp_same", "relu", "jitted", 0.55),
        ("nngp_same", "relu", "plain", 0.15),
        ("nngp", "relu", "jitted", 0.55),
        ("ntk", "relu", "jitted", 0.55),
        # The targets are those of ReLU: none were set for these.
        ("nngp_same", "erf", "jitted", 0.55),
        ("nngp_same", "gelu", "jitted", 0.55),
        ("nngp", "erf", "plain", 0.15),
        ("ntk", "erf", "jitted", 0.55),
    ]
    for kind, activation, how, target in cases:
        first = peer.ask(kind, activation, how)
        error = float((ours(kind, activation)[:3, :3] - torch.tensor(first["corner"])).abs().max())
        mine, theirs = [], []
        for _ in range(ROUNDS):
            start = time.process_time()
            ours(kind, activation)
            mine.append(time.process_time() - start)
            theirs.append(peer.ask(kind, activation, how)["seconds"])
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        rows.append(
            target_row(
                f"{activation}, {kind}, {how}",
                ratio,
                target,
                seconds=statistics.median(mine),
                peer_seconds=statistics.median(theirs),
                peer_first_call=first["first"],
                difference=error,
            )
        )
    peer.close()
    return rows


def by_layer(_: argparse.Namespace) -> list[dict[str, Any]]:
    """Nanoseconds a pair and layer, and the textbook formula beside them."""
    x, y = points()
    rows = []
    with torch.no_grad():
        for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
            u, v = x.to(dtype), y.to(dtype)
            net = network()
            times = interleave(
                {
                    "ours": lambda net=net, u=u, v=v: net.nngp(u, v),
                    "ours, same": lambda net=net, u=u: net.nngp(u),
                    "ours, ntk": lambda net=net, u=u, v=v: net.ntk(u, v),
                    "textbook": lambda u=u, v=v: textbook(u, v),
                }
            )
            for case in times.seconds:
                nanoseconds = times.median(case) / (N * N * DEPTH) * 1e9
                rows.append(
                    {"case": f"{case}, {name}", "ns": nanoseconds, "of textbook": times.ratio(case, "textbook")}
                )
    return rows


def gradients(_: argparse.Namespace) -> list[dict[str, Any]]:
    """Gradient in points and parameters of a sum over a symmetric matrix, in units of the matrix itself."""
    x = points()[0][: N // 4]
    rows = []
    for activation in ("relu", "erf", "gelu"):
        net, leaf = network(activation=activation), x.clone().requires_grad_()

        def gradient(net: arch.Layer = net, leaf: Tensor = leaf) -> Any:
            return torch.autograd.grad(net.nngp(leaf).sum(), [leaf, *net.parameters()])

        def value(net: arch.Layer = net) -> Tensor:
            with torch.no_grad():
                return net.nngp(x)

        times = interleave({"value": value, "gradient": gradient}, repeats=3)
        seconds = {f"{k} s": times.median(k) for k in times.seconds}
        rows.append({"case": f"{activation}, n = {N // 4}", **seconds, "ratio": times.ratio("gradient", "value")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=pathlib.Path, default=None, help="interpreter that has neural-tangents")
    parser.add_argument("--only", nargs="*", default=None, help="names of the tables to run; nothing is written then")
    args = parser.parse_args()
    args.device = "cpu"
    torch.set_num_threads(1)
    tables = {"neural-tangents": against_neural_tangents, "by layer": by_layer, "gradients": gradients}
    if args.peer is None:
        args.only = [t for t in args.only or tables if t != "neural-tangents"]
    run_tables("gp_kernels", tables, args)


if __name__ == "__main__":
    main()
