"""What each of two processes does in the tests of ``stochproc.distributed``: ``two_ranks.py TASK FOLDER``."""

import contextlib
import datetime as dt
import faulthandler
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist

from stochproc.distributed import DistributedOperator, RowPartition, abort_on_error
from stochproc.kernels import RBF, Kernel, Matern
from stochproc.solvers import CG

# Whatever goes wrong, no process outlives its test by much.
LIFETIME = 180
# As in all tests; the failures must be noticed long before.
TIMEOUT = dt.timedelta(seconds=60)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n, dtype=torch.float64):
    """Points, vectors and a kernel with a lengthscale by column and an output scale."""
    x = draw(n, 3).to(dtype).requires_grad_()
    v = draw(n, 2, seed=1).to(dtype).requires_grad_()
    noise = (0.5 + draw(n, seed=2).square()).to(dtype).requires_grad_()
    return x, v, noise, 1.5 * Matern(lengthscale=[1.0, 2.0, 3.0], nu=2.5)


def product_and_gradients(n, backend="auto", dtype=torch.float64):
    """A product, all first derivatives of a loss in it, and those of the squared first derivatives."""
    x, v, noise, kernel = problem(n, dtype)
    leaves = [x, v, noise, *kernel.parameters()]
    product = DistributedOperator(kernel, x, noise, backend=backend)(v)
    first = torch.autograd.grad(product.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    names = ["x", "v", "noise", *(name for name, _ in kernel.named_parameters())]
    out = {"product": product.detach()}
    out |= {f"d loss / d {name}": g.detach() for name, g in zip(names, first, strict=True)}
    return out | {f"second derivative in {name}": g for name, g in zip(names, second, strict=True)}


def solve_and_gradients(n):
    """The fit of a Gaussian process, y' A^-1 y, with a term that every rank computes in full."""
    x, _, _, kernel = problem(n)
    x, y = x.detach(), draw(n, seed=3)
    log_noise = torch.zeros((), dtype=torch.float64, requires_grad=True)
    A = DistributedOperator(kernel, x, log_noise.exp())
    result = CG(rtol=1e-13)(A, y)
    parameters = dict(kernel.named_parameters()) | {"log_noise": log_noise}
    loss = y @ result.value + sum(p.square().sum() for p in parameters.values())
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return {"solution": result.value.detach()} | {
        f"d loss / d {name}": g for name, g in zip(parameters, grads, strict=True)
    }


def measured():
    """All numbers that must be the same with one process and with two."""
    return {
        "odd n": product_and_gradients(401),
        "row blocks": product_and_gradients(401, backend="chunked"),
        "one row": product_and_gradients(1),
        "float32": product_and_gradients(101, dtype=torch.float32),
        "solve": solve_and_gradients(401),
    }


def refusals(rank):
    """What is raised where the ranks disagree; every case must leave the group usable."""
    x, v, noise, _ = problem(7)
    x = x.detach()

    def product(kernel, u, grad=True):
        with torch.set_grad_enabled(grad):
            return DistributedOperator(kernel, x, noise)(u)

    def changed_after_construction():
        kernel = RBF()
        A = DistributedOperator(kernel, x, 0.1)
        kernel.lengthscale = 1.0 + rank
        return A(v)

    def loss_of_own_rows():
        A = DistributedOperator(RBF(), x, 0.1)
        A(v)[A.partition.local()].sum().backward()

    cases = {
        "rows": lambda: DistributedOperator(RBF(), x[: 7 - rank], 0.1),
        "columns": lambda: DistributedOperator(RBF(), x[:, : 3 - rank], 0.1),
        "dtype": lambda: DistributedOperator(RBF(), x.to((torch.float64, torch.float32)[rank]), 0.1),
        "points": lambda: DistributedOperator(RBF(), x + rank, 0.1),
        "noise": lambda: DistributedOperator(RBF(), x, 0.1 + rank),
        "hyperparameter": lambda: DistributedOperator(RBF(1.0 + rank), x, 0.1),
        "kernel": lambda: DistributedOperator(Matern(nu=0.5 + rank), x, 0.1),
        "vector": lambda: product(RBF(), v + rank),
        "shape of the vector": lambda: product(RBF(), v[:, : 2 - rank]),
        "gradient wanted": lambda: product(RBF(), v, grad=rank == 0),
        "changed hyperparameter": changed_after_construction,
        "loss of own rows": loss_of_own_rows,
        # The last needs no other rank: bad arguments are refused before anything is sent.
        "NaN noise": lambda: DistributedOperator(RBF(), x, float("nan")) if rank == 0 else None,
    }
    out = {}
    for name, case in cases.items():
        try:
            case()
            out[name] = "nothing was raised"
        except (ValueError, TypeError) as error:
            out[name] = f"{type(error).__name__}: {error}"
    return out


def numbers(folder):
    rank = dist.get_rank()
    alone = [dist.new_group([r]) for r in range(2)]
    x, v, noise, kernel = problem(5)
    found = {
        "measured": measured(),
        "slices": RowPartition(5).slices(),
        "local": RowPartition(5).local(),
        "empty": RowPartition(1).slices(),
        "own group": DistributedOperator(kernel, x, noise, group=alone[rank])(v).detach(),
        "refusals": refusals(rank),
    }
    try:
        RowPartition(5, alone[1 - rank])
    except ValueError as error:
        found["foreign group"] = str(error)
    torch.save(found, folder / f"rank{rank}.pt")


class BrokenOnRankOne(Kernel):
    """Runs out of memory on one rank, in the middle of a solve."""

    calls = 0

    def forward(self, x, y=None):
        self.calls += 1
        if self.calls > 3 and dist.get_rank() == 1:
            raise MemoryError("rank 1 has no memory left")
        return RBF()(x, y)


def failure(folder, in_the_rows):
    """Rank 1 raises and stays alive; rank 0 writes what it sees, and after how many seconds."""
    rank = dist.get_rank()
    A = DistributedOperator(BrokenOnRankOne() if in_the_rows else RBF(), problem(9)[0].detach(), 0.1)
    # The ranks have met by now, however long each took to start.
    start = time.monotonic()
    note = folder / "seen_by_rank_0"
    try:
        with contextlib.nullcontext() if in_the_rows else abort_on_error():
            for i in range(10):
                A(torch.ones(9, dtype=torch.float64))
                if i == 3 and rank == 1:
                    raise MemoryError("rank 1 has no memory left")
    except MemoryError:
        # Its connections must close although the process goes on.
        while not note.exists() and time.monotonic() < start + 30:
            time.sleep(0.05)
        raise
    except RuntimeError as error:
        note.write_text(f"{time.monotonic() - start} {error}")
        raise


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIFETIME, exit=True)
    torch.set_num_threads(1)
    task, where = sys.argv[1], pathlib.Path(sys.argv[2])
    if "MASTER_ADDR" in os.environ:  # torchrun
        dist.init_process_group("gloo", timeout=TIMEOUT)
    else:
        store = f"file://{where / 'store'}"
        dist.init_process_group("gloo", store, TIMEOUT, 2, int(os.environ["RANK"]))
    if task == "numbers":
        numbers(where)
    else:
        failure(where, in_the_rows=task == "fail in the rows")
    dist.destroy_process_group()
