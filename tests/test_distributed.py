import contextlib
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist

from stochproc.distributed import DistributedOperator, RowPartition, abort_on_error
from stochproc.kernels import RBF, Linear, Matern
from tests import two_ranks

needs_two = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no distributed gloo"
)
WORKER = pathlib.Path(two_ranks.__file__)
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]


def environment(**more):
    """One thread, the loopback device, and no trace of an enclosing launch."""
    env = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(WORKER.parent.parent), *sys.path[1:]])}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env | more


@contextlib.contextmanager
def started(commands, folder):
    """Processes with their output in ``folder``, none of which outlives the block."""
    with contextlib.ExitStack() as stack:
        processes = []
        for i, (command, env) in enumerate(commands):
            output = stack.enter_context(open(folder / f"output{i}", "w"))
            processes.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
        try:
            yield processes
        finally:
            for process in processes:
                # Not `kill` at once: torchrun ends its own processes when it is terminated.
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes under torchrun found."""
    folder = tmp_path_factory.mktemp("two_ranks")
    command = [sys.executable, *TORCHRUN, "--local-addr", "127.0.0.1", str(WORKER), "numbers", str(folder)]
    with started([(command, environment())], folder) as (torchrun,):
        code = torchrun.wait(two_ranks.LIFETIME)
    assert code == 0, (folder / "output0").read_text()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process():
    return two_ranks.measured()


# Both sides add the same float64 numbers, in blocks of other heights: some hundred roundings of 1e-16. float32 has
# 1e-7 for 1e-16. The solves end at a relative residual of 1e-13, far below which rounding takes them here.
TOLERANCE = {"odd n": 1e-12, "row blocks": 1e-12, "one row": 1e-12, "float32": 2e-5, "solve": 1e-12}


@needs_two
@pytest.mark.slow
@pytest.mark.parametrize("case", TOLERANCE)
def test_two_ranks_agree_with_one_process_in_values_and_derivatives(ranks, one_process, case):
    for name, expected in one_process[case].items():
        difference = (ranks[0]["measured"][case][name] - expected).abs().max()
        assert difference <= TOLERANCE[case] * expected.abs().max(), name


@needs_two
@pytest.mark.slow
def test_both_ranks_end_with_the_same_bits(ranks):
    for case, values in ranks[0]["measured"].items():
        for name, value in values.items():
            assert torch.equal(value, ranks[1]["measured"][case][name]), (case, name)


@needs_two
@pytest.mark.slow
def test_the_first_rank_has_the_remainder_and_the_last_may_have_nothing(ranks):
    for rank in ranks:
        assert rank["slices"] == [slice(0, 3), slice(3, 5)]
        assert rank["empty"] == [slice(0, 1), slice(1, 1)]
    assert [rank["local"] for rank in ranks] == ranks[0]["slices"]


@needs_two
@pytest.mark.slow
def test_a_group_of_one_process_works_alone(ranks):
    x, v, noise, kernel = two_ranks.problem(5)
    for rank in ranks:
        torch.testing.assert_close(rank["own group"], DistributedOperator(kernel, x, noise)(v).detach())
        assert rank["foreign group"].startswith("group must ")


@needs_two
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("rows", r"the number of rows of x must be the same on every rank; got \[7, 6\]"),
        ("columns", r"the number of columns of x must be the same on every rank; got \[3, 2\]"),
        ("dtype", r"the bytes of a number of x must be the same on every rank; got \[8, 4\]"),
        ("points", "x must be the same on every rank; got values with checksums"),
        ("noise", "noise must be the same on every rank"),
        ("hyperparameter", "kernel must be the same on every rank"),
        ("kernel", "kernel must be the same on every rank"),
        ("vector", "v, the noise and the hyperparameters, and which of them require gradients, must be the same"),
        (
            "shape of the vector",
            "v, the noise and the hyperparameters, and which of them require gradients, must be the same",
        ),
        (
            "gradient wanted",
            "v, the noise and the hyperparameters, and which of them require gradients, must be the same",
        ),
        (
            "changed hyperparameter",
            "v, the noise and the hyperparameters, and which of them require gradients, must be the same",
        ),
        ("loss of own rows", "the gradient of the loss .*compute the loss on every rank"),
    ],
)
def test_ranks_that_disagree_raise_together(ranks, case, message):
    for rank in ranks:
        assert re.search("^ValueError: .*" + message, rank["refusals"][case])


@needs_two
@pytest.mark.slow
def test_bad_arguments_are_refused_before_anything_is_sent(ranks):
    assert ranks[0]["refusals"]["NaN noise"] == "ValueError: noise must be non-negative and finite; got nan."
    assert ranks[1]["refusals"]["NaN noise"] == "nothing was raised"


@needs_two
@pytest.mark.slow
@pytest.mark.parametrize("task", ["fail in the rows", "fail in the program"])
def test_a_rank_that_raises_ends_the_other_within_seconds(tmp_path, task):
    commands = [([sys.executable, str(WORKER), task, str(tmp_path)], environment(RANK=str(r))) for r in range(2)]
    with started(commands, tmp_path) as processes:
        codes = [process.wait(two_ranks.LIFETIME) for process in processes]
    assert codes == [1, 1]
    assert "MemoryError: rank 1 has no memory left" in (tmp_path / "output1").read_text()
    seconds, seen = (tmp_path / "seen_by_rank_0").read_text().split(" ", 1)
    assert seen.startswith("another rank failed, ended, or made this one wait")
    # Measured in hundredths; far from the timeout of the group, 60 s, on a busy machine too.
    assert float(seconds) < 10


def dense(kernel, x, noise):
    return kernel(x) + torch.diag_embed(torch.as_tensor(noise).expand(x.shape[0]))


@pytest.mark.parametrize("noise", [0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.linspace(0, 1, 6)])
def test_without_a_group_the_product_is_that_of_the_dense_matrix(gen, noise):
    x, v = torch.randn(6, 2, generator=gen), torch.randn(6, 3, generator=gen)
    kernel = RBF() + Linear()
    A = DistributedOperator(kernel, x, noise)
    torch.testing.assert_close(A(v), dense(kernel, x, noise) @ v)
    torch.testing.assert_close(A(v[:, 0]), dense(kernel, x, noise) @ v[:, 0])
    torch.testing.assert_close(A.diagonal(), dense(kernel, x, noise).diagonal())
    assert (A.shape, A.dtype, A.device) == ((6, 6), x.dtype, x.device)


def test_gradients_without_a_group_are_those_of_the_dense_matrix(gen):
    x, v = (torch.randn(6, 2, generator=gen, requires_grad=True) for _ in range(2))
    noise = torch.tensor(0.3, requires_grad=True)
    kernel = Matern([0.5, 1.5])
    leaves = [x, v, noise, *kernel.parameters()]
    ours = torch.autograd.grad(DistributedOperator(kernel, x, noise)(v).sin().sum(), leaves)
    theirs = torch.autograd.grad((dense(kernel, x, noise) @ v).sin().sum(), leaves)
    torch.testing.assert_close(ours, theirs)


def test_slices_cover_all_rows_and_differ_by_at_most_one():
    for n in range(12):
        for size in range(1, 6):
            partition = RowPartition(n)
            partition.world_size = size
            slices = partition.slices()
            rows = [i for s in slices for i in range(n)[s]]
            counts = [s.stop - s.start for s in slices]
            assert rows == list(range(n))
            assert sorted(counts, reverse=True) == counts
            assert counts[0] - counts[-1] <= 1


def test_abort_on_error_lets_the_exception_through():
    with pytest.raises(KeyboardInterrupt), abort_on_error():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel": "rbf"}, TypeError, "kernel must be a Kernel; got str"),
        ({"kernel": RBF(batch_shape=(2,))}, ValueError, r"kernel must have no batch shape; got \(2,\)"),
        ({"x": torch.zeros(3)}, ValueError, r"x must have shape \(n, d\), one row a point; got \(3,\)"),
        ({"x": torch.zeros(3, 1, dtype=torch.int64)}, TypeError, "x must be float32 or float64; got torch.int64"),
        ({"x": torch.tensor([[0.0], [float("nan")]])}, ValueError, "x must be finite; got 1 NaN"),
        ({"noise": -1.0}, ValueError, "noise must be non-negative and finite; got -1.0"),
        ({"noise": float("nan")}, ValueError, "noise must be non-negative and finite; got nan"),
        ({"noise": torch.tensor([0.1, -0.1, 0.1])}, ValueError, "noise must be non-negative and finite"),
        ({"noise": torch.ones(2)}, ValueError, r"noise must be a number or have shape \(3,\); got shape \(2,\)"),
        ({"noise": "0.1"}, TypeError, "noise must be a number or a tensor; got str"),
        ({"backend": "numpy"}, ValueError, "unknown backend 'numpy'"),
        ({"group": 3}, ValueError, "group must be None or a process group"),
    ],
)
@pytest.mark.bad_input
def test_bad_arguments_are_named(change, error, message):
    arguments = {"kernel": RBF(), "x": torch.zeros(3, 1), "noise": 0.1} | change
    with pytest.raises(error, match=message):
        DistributedOperator(**arguments)


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.float64), ValueError, r"v must have shape \(3,\) or \(3, p\); got \(4,\)"),
        (
            torch.zeros(3, 1, 1, dtype=torch.float64),
            ValueError,
            r"v must have shape \(3,\) or \(3, p\); got \(3, 1, 1\)",
        ),
        (torch.zeros(3, dtype=torch.float32), TypeError, "mixed dtypes: x is torch.float64, v is torch.float32"),
        ([1.0, 2.0, 3.0], TypeError, "v must be a torch.Tensor; got list"),
    ],
)
@pytest.mark.bad_input
def test_bad_vectors_are_named(v, error, message):
    with pytest.raises(error, match=message):
        DistributedOperator(RBF(), torch.zeros(3, 1), 0.1)(v)


@pytest.mark.parametrize("n", [-1, 2.5])
@pytest.mark.bad_input
def test_the_number_of_rows_is_checked(n):
    with pytest.raises((ValueError, TypeError), match="n must be"):
        RowPartition(n)
