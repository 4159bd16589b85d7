"""Kernel products divided by rows over the processes of ``torch.distributed``.

The points and the vectors are replicated: every process (rank) holds all of them, computes its own rows of a
product and gets the whole of it. A solver such as CG therefore runs unchanged, and redundantly, on every rank.
"""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_finite, check_integer, check_positive, check_same_kind
from stochproc.kernels import Kernel, matvec, select_backend
from stochproc.kernels._parameters import with_parameters

__all__ = ["DistributedOperator", "RowPartition", "abort_on_error"]


class RowPartition:
    """An even split of rows over the ranks of a process group; the remainder goes to the first ranks.

    Parameters
    ----------
    n : int
        Number of rows, at least 0. With fewer rows than ranks the last ranks have empty slices.
    group : torch.distributed.ProcessGroup, default=None
        None means all processes, or this one alone where ``torch.distributed`` has not been initialised.

    Attributes
    ----------
    n : int
        Number of rows.
    rank, world_size : int
        Position of this process in the group, and the size of the group.
    group : torch.distributed.ProcessGroup or None
        As given.

    Raises
    ------
    ValueError
        If n is negative, or this process is not in the group.
    TypeError
        If n is no integer.

    Examples
    --------
    Without a process group there is one rank, which has all rows:

    >>> RowPartition(5).local(), RowPartition(5).world_size
    (slice(0, 5, None), 1)
    """

    def __init__(self, n: int, group: Any = None) -> None:
        check_integer("n", n, 0)
        self.n, self.group = int(n), group
        self.rank, self.world_size = 0, 1
        if group is not None and not (_running() and isinstance(group, dist.ProcessGroup)):
            raise ValueError(f"group must be None or a process group of which this process is a member; got {group!r}.")
        if _running():
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must hold this process; it does not, so this process has no rows.")

    def slices(self) -> list[slice]:
        """Return the rows of every rank, in the order of the ranks."""
        size, extra = divmod(self.n, self.world_size)
        starts = [rank * size + min(rank, extra) for rank in range(self.world_size + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(starts)]

    def local(self) -> slice:
        """Return the rows of this rank."""
        return self.slices()[self.rank]


class DistributedOperator:
    r"""The map :math:`v \mapsto (K + \mathrm{diag}(\sigma^2))\, v`, of which each rank computes its own rows.

    Pass it to a solver such as :class:`stochproc.solvers.CG` on every rank, in the place of the matrix.

    Parameters
    ----------
    kernel : Kernel
        Without a batch shape.
    x : Tensor of shape (n, d)
        All the points, the same on every rank. Must be finite.
    noise : float or Tensor of shape (), (1,) or (n,)
        Variances added to the diagonal, non-negative, in squared units of the function. A tensor is cast to the
        dtype and device of x, as hyperparameters of kernels are.
    group : torch.distributed.ProcessGroup, default=None
        None means all processes, or this one alone where ``torch.distributed`` has not been initialised.
    backend : {"auto", "dense", "chunked", "keops"}, default="auto"
        How a rank evaluates its rows, see :func:`stochproc.kernels.select_backend`.

    Attributes
    ----------
    kernel, x, noise, backend
        As given; noise as a tensor.
    partition : RowPartition
        Which rows are whose.

    Raises
    ------
    ValueError
        If shapes do not fit, x is not finite, the noise is negative or not finite, the backend is unknown, the
        process group cannot send tensors from the device of x, or the ranks were not given the same kernel, x and
        noise. In the last case every rank raises, whether here or, for v and changed hyperparameters, at the
        product.
    TypeError
        If kernel is not a Kernel, or a dtype is neither float32 nor float64.
    RuntimeError
        At a product, if another rank failed, ended or exceeded the timeout of the process group.

    Notes
    -----
    With R ranks a product of n points with (n, p) takes time O(n² (d + p) / R) a rank and memory O(n (d + p)) plus
    one block. It sends n p numbers and, before, one checksum of v and the hyperparameters. Each rank ends with the
    same bits, so that solvers take the same decisions everywhere. That needs ranks which compute alike: the same
    type of processor, the same versions and the same number of threads. Where they do not, the checksums
    differ, which raises at once; without them a solver would stop on one rank and wait for ever on another.

    v, x, the noise and the hyperparameters may require gradients, to any order. The loss must be computed on every
    rank from the whole product, which the checksums verify too. Each ``backward`` through a product sums all its
    gradients over the ranks, in one message, so that every rank has the complete gradient, as in one process:
    nothing needs to be summed afterwards, and terms of the loss that every rank computes in full, such as a prior,
    count once.

    If the rows of this rank raise, the process group is aborted as in :func:`abort_on_error`.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import RBF
    >>> A = DistributedOperator(RBF(), torch.zeros(3, 1), noise=0.5)
    >>> A(torch.ones(3)).tolist(), A.shape
    ([3.5, 3.5, 3.5], torch.Size([3, 3]))
    """

    def __init__(
        self,
        kernel: Kernel,
        x: Float[Tensor, "n d"],
        noise: float | int | Tensor,
        group: Any = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(f"kernel must be a Kernel; got {type(kernel).__name__}. Pass it through as_kernel first.")
        check_same_kind(x=x)
        if x.ndim != 2:
            raise ValueError(f"x must have shape (n, d), one row a point; got {tuple(x.shape)}.")
        check_finite("x", x)
        check_positive("noise", noise, zero=True)
        if kernel.batch_shape:
            raise ValueError(f"kernel must have no batch shape; got {tuple(kernel.batch_shape)}.")
        noise = torch.as_tensor(noise, dtype=x.dtype, device=x.device)
        if noise.shape not in ((), (1,), x.shape[:1]):
            raise ValueError(f"noise must be a number or have shape ({x.shape[0]},); got shape {tuple(noise.shape)}.")
        select_backend(kernel, x, backend=backend)
        self.kernel, self.x, self.noise, self.backend = kernel, x, noise, backend
        self.partition = RowPartition(x.shape[0], group)
        if self.partition.world_size > 1:
            self._compare_arguments()

    @property
    def shape(self) -> torch.Size:
        """The shape (n, n) of the matrix."""
        return torch.Size((self.partition.n, self.partition.n))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the points, and of all products."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """The device of the points, and of all products."""
        return self.x.device

    def diagonal(self) -> Float[Tensor, " n"]:
        """Return the diagonal of the matrix, noise included; every rank computes all of it, in time O(n d)."""
        return self.kernel.diag(self.x) + self.noise

    def __call__(self, v: Float[Tensor, "n *p"]) -> Float[Tensor, "n *p"]:
        """Multiply.

        Parameters
        ----------
        v : Tensor of shape (n,) or (n, p)
            The same on every rank.

        Returns
        -------
        Tensor of the shape of v
            The whole product, the same on every rank.
        """
        check_same_kind(x=self.x, v=v)
        n = self.partition.n
        if v.ndim not in (1, 2) or v.shape[0] != n:
            raise ValueError(f"v must have shape ({n},) or ({n}, p); got {tuple(v.shape)}.")
        named = dict(self.kernel.named_parameters())
        inputs = (v, self.x, self.noise, *named.values())
        rows, group = self.partition.local(), self.partition.group
        if self.partition.world_size == 1:
            return self._rows(rows, tuple(named), inputs)
        wanted = [torch.is_grad_enabled() and t.requires_grad for t in inputs]
        _require_agreement(
            "v, the noise and the hyperparameters, and which of them require gradients,",
            _checksum(v, self.noise, *named.values(), salt=wanted),
            v.device,
            group,
        )
        with abort_on_error(group):
            found = iter(_replicated([t for t, w in zip(inputs, wanted, strict=True) if w], v.device, group))
            inputs = tuple(next(found) if w else t for t, w in zip(inputs, wanted, strict=True))
            local = self._rows(rows, tuple(named), inputs)
            # Each entry is a number plus zeros, which is exact: the order of the ranks cannot change a bit.
            padding = (0, 0) * (v.ndim - 1) + (rows.start, n - rows.stop)
            padded = torch.nn.functional.pad(local, padding)
        return _SumOverRanks.apply(padded, group)

    def _rows(self, rows: slice, names: Sequence[str], inputs: Sequence[Tensor]) -> Tensor:
        v, x, noise, *parameters = inputs
        kernel = with_parameters(self.kernel, names, parameters)
        columns = v if v.ndim == 2 else v.unsqueeze(-1)
        product = matvec(kernel, x[rows], x, columns, backend=self.backend)
        product = product + noise.expand(self.partition.n)[rows].unsqueeze(-1) * columns[rows]
        return product if v.ndim == 2 else product.squeeze(-1)

    def _compare_arguments(self) -> None:
        """Raise ValueError on every rank unless all were given the same points, noise and kernel."""
        group = self.partition.group
        devices = [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]
        if self.device.type not in devices:
            raise ValueError(
                f"x must be on a device that the process group can send from, {' or '.join(devices)}; got "
                f"{self.device}."
            )
        state = dict(itertools.chain(self.kernel.named_parameters(), self.kernel.named_buffers()))
        mine = {
            "the number of rows of x": self.x.shape[0],
            "the number of columns of x": self.x.shape[1],
            "the bytes of a number of x": self.x.element_size(),
            "x": _checksum(self.x),
            "noise": _checksum(self.noise),
            "kernel": _checksum(*state.values(), salt=(_description(self.kernel), list(state))),
        }
        table = torch.tensor(list(mine.values()), dtype=torch.int64, device=self.device)
        gathered = [torch.empty_like(table) for _ in range(self.partition.world_size)]
        _communicate(dist.all_gather, group, gathered, table)
        for name, values in zip(mine, torch.stack(gathered, 1).tolist(), strict=True):
            if len(set(values)) > 1:
                what = f"values with checksums {values}" if name in ("x", "noise", "kernel") else str(values)
                raise ValueError(f"{name} must be the same on every rank; got {what} on ranks 0 to {len(values) - 1}.")


@contextlib.contextmanager
def abort_on_error(group: Any = None) -> Iterator[None]:
    """End the other ranks at once if this one raises, instead of leaving them to wait for it.

    Put the part of a program that communicates inside, on every rank. Any exception aborts the process group and
    then goes on its way; the other ranks, inside or on their way to a sum over ranks, get a RuntimeError. Without
    process group it does nothing.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, default=None
        What to abort; None means all groups. An aborted group is destroyed: it cannot be used or destroyed again.

    Notes
    -----
    With gloo the others notice when the connections close, which they do as soon as nothing refers to the group; one
    that you made with ``torch.distributed.new_group`` and hold in a variable closes with that or with the process.
    With NCCL the abort ends the work of this rank alone, and the launcher has to end the other processes, as torchrun
    does, or the timeout of the group.

    Examples
    --------
    >>> with abort_on_error():
    ...     total = sum(range(3))
    """
    try:
        yield
    except BaseException:
        _abort(group)
        raise


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _abort(group: Any) -> None:
    if not _running():
        return
    process_group: Any = dist.group.WORLD if group is None else group
    if hasattr(process_group, "abort"):  # not in the oldest versions, where destroying aborts NCCL
        process_group.abort()
    # Aborting gloo leaves its connections open, and the other ranks waiting: they close with the last reference.
    del process_group
    with contextlib.suppress(ValueError):  # destroyed already, by the inner of two contexts
        dist.destroy_process_group(group)


def _communicate(operation: Callable[..., Any], group: Any, *args: Any, **kw: Any) -> None:
    """Run a collective operation; where it fails, pass the failure on to the remaining ranks and say what it means."""
    try:
        operation(*args, **kw, group=group)
        return
    except RuntimeError as error:
        reason = str(error)
    # Not within the handler: the frames of its traceback refer to the group and would keep its connections open.
    _abort(group)
    raise RuntimeError(
        "another rank failed, ended, or made this one wait for longer than the timeout of the process group; its own "
        f"output says why. This rank only saw: {reason}"
    )


def _description(kernel: Kernel) -> Any:
    """Return what a kernel is besides its tensors, as far as it can be told: code cannot be compared."""
    try:
        return kernel.config()
    except TypeError:
        return [type(module).__name__ for module in kernel.modules()]


def _checksum(*tensors: Tensor, salt: Any = ()) -> int:
    """Return a number that differs, but for one case in 2^32, between tensors of other bits, shapes or dtypes."""
    found = zlib.crc32(repr(salt).encode())
    for t in tensors:
        found = zlib.crc32(repr((tuple(t.shape), t.dtype)).encode(), found)
        found = zlib.crc32(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def _require_agreement(what: str, checksum: int, device: torch.device, group: Any) -> None:
    """Raise ValueError on every rank unless the checksum is the same on all."""
    ends = torch.tensor([checksum, -checksum], device=device)
    _communicate(dist.all_reduce, group, ends, op=dist.ReduceOp.MAX)
    high, low = ends.tolist()
    if high != -low:
        raise ValueError(
            f"{what} must be the same, bit for bit, on every rank; they are not. Either the ranks were given different "
            "numbers, or they compute differently: other processors, versions, numbers of threads, or operations "
            "that are not deterministic."
        )


def _replicated(tensors: Sequence[Tensor], device: torch.device, group: Any) -> Sequence[Tensor]:
    return _Replicated.apply(device, group, *tensors) if tensors else ()


class _Replicated(torch.autograd.Function):
    """Pass on tensors that are equal on all ranks to work that is not; sum their gradients over the ranks."""

    @staticmethod
    def forward(ctx: Any, device: torch.device, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.device, ctx.group = device, group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # All in one message, in the widest dtype among them, from the device of the points: the group may be unable
        # to send from that of the hyperparameters.
        flat = torch.cat([g.reshape(-1).to(ctx.device) for g in grads])
        pieces = _SumOverRanks.apply(flat, ctx.group).split([g.numel() for g in grads])
        return None, None, *(p.reshape(g.shape).to(g) for p, g in zip(pieces, grads, strict=True))


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks. The sum is equal on all, and so is its gradient, of which each rank uses its own part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        if total.numel():
            _communicate(dist.all_reduce, group, total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        what = "the gradient of the loss with respect to a product (so compute the loss on every rank, from all of it)"
        _require_agreement(what, _checksum(grad), grad.device, ctx.group)
        return _replicated([grad], grad.device, ctx.group)[0], None
