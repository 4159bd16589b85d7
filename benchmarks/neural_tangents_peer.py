"""Times neural-tangents in a process of its own, in turn with the one that asks.

Run by ``bench_gp_kernels.py --peer PYTHON`` with an interpreter that has neural-tangents 0.6.5 and a jax below 0.6.
Reads one case a line from standard input, "kind activation jitted n d depth", and answers with the CPU seconds of one
run as JSON.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import json
import sys
import time

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np
from neural_tangents import stax


@functools.cache
def prepared(kind: str, activation: str, jitted: bool, n: int, d: int, depth: int):
    """A function of no arguments that evaluates the matrix, compiled if it is to be."""
    nonlinearity = {"relu": stax.Relu, "erf": stax.Erf, "gelu": stax.Gelu}[activation]
    layers = [layer for _ in range(depth) for layer in (stax.Dense(1, W_std=1.4, b_std=0.2), nonlinearity())]
    kernel = stax.serial(*layers, stax.Dense(1, W_std=1.0))[2]
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((n, d))) for _ in range(2))
    same = kind.endswith("_same")
    get = kind.removesuffix("_same")
    function = (lambda x, y: kernel(x, None, get)) if same else (lambda x, y: kernel(x, y, get))
    function = jax.jit(function) if jitted else function
    start = time.process_time()
    first = np.asarray(function(x, y).block_until_ready())
    return lambda: function(x, y).block_until_ready(), first, time.process_time() - start


def main() -> None:
    """Answer until standard input ends."""
    for line in sys.stdin:
        kind, activation, jitted, *sizes = line.split()
        run, first, first_seconds = prepared(kind, activation, jitted == "jitted", *map(int, sizes))
        start = time.process_time()
        run()
        seconds = time.process_time() - start
        answer = {"seconds": seconds, "first": first_seconds, "corner": first[:3, :3].tolist()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
