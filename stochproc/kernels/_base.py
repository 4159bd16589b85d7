"""The kernel base class: hyperparameters, the one prepared form that every backend evaluates, and algebra."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_positive, check_same_kind
from stochproc.kernels._parameters import as_hyperparameter, call_with_parameters, with_parameters

if TYPE_CHECKING:
    from stochproc.kernels._operator import KernelOperator
    from stochproc.kernels._state_space import StateSpace

Tensors = tuple[Tensor, ...]

# A kernel without its own diagonal takes it from square blocks of this many rows: O(n) evaluations, few calls.
_DIAG_ROWS = 64


@dataclass(frozen=True)
class Prepared:
    """A function of pairs of points, ready to be evaluated block by block.

    Parameters
    ----------
    rows, cols : tuple of Tensor
        What depends on x alone, shapes (*batch, n, k), and on y alone, shapes (*batch, m, k).
    shared : tuple of Tensor
        What depends on neither: hyperparameters.
    block : callable
        ``block(rows, cols, shared) -> Tensor`` of shape (*batch, n, m): pure in its three arguments, so that
        a backend may call it on slices of the rows and differentiate each call on its own.
    """

    rows: Tensors
    cols: Tensors
    shared: Tensors
    block: Callable[[Tensors, Tensors, Tensors], Tensor]

    def __call__(self) -> Tensor:
        """Evaluate the whole matrix."""
        return self.block(self.rows, self.cols, self.shared)


class Kernel(torch.nn.Module):
    """A covariance function, defined once and evaluated by whichever backend suits.

    Subclass it and write :meth:`forward`; everything else follows from it by autograd. A kernel of distances
    or of inner products needs less: see :class:`Radial` and :class:`Dot`.

    Parameters
    ----------
    batch_shape : tuple of int, default=()
        Batch shape of the hyperparameters, which broadcasts against that of the points: a hyperparameter has
        shape (*batch_shape, 1), a lengthscale by column (*batch_shape, d).

    Notes
    -----
    Calling ``kernel(x, y)`` with x (*batch, n, d) and y (*batch, m, d), float32 or float64, gives the dense
    block (*batch, n, m); ``kernel(x)`` the square one. Positive hyperparameters are stored as float64
    logarithms and cast to the dtype and device of the points at use. Ordinary autograd works to any order; the
    transforms of ``torch.func`` (``grad``, ``vmap``) do not, as some steps look at values.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import RBF, Linear
    >>> kernel = 2.0 * RBF(lengthscale=0.5) + Linear()
    >>> kernel(torch.zeros(3, 2), torch.ones(4, 2)).shape
    torch.Size([3, 4])
    """

    _config_names: tuple[str, ...] = ()
    # Whether the parameters have shapes of their own, not (*batch, k), and cannot be indexed along a batch.
    _opaque = False

    def __init__(self, *, batch_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        if isinstance(batch_shape, (int, str)) or not isinstance(batch_shape, Sequence):
            raise TypeError(f"batch_shape must be a tuple of int; got {batch_shape!r}.")
        self.batch_shape = torch.Size(batch_shape)

    def _add_positive(self, name: str, value: Any, *, per_column: bool = False) -> None:
        """Register ``log_<name>`` from a float, a vector by column (if allowed) or a batched value."""
        value = as_hyperparameter(name, value)
        if value.numel() == 0:
            raise ValueError(f"{name} must have at least one entry; got none.")
        check_positive(name, value)
        if value.ndim == 0 or (value.numel() == 1 and value.ndim == 1):
            value = value.reshape(1)
        elif value.shape[-1] != 1 and not per_column:
            raise ValueError(f"{name} must be one number (or have shape (*batch, 1)); got shape {tuple(value.shape)}.")
        try:
            shape = torch.broadcast_shapes(value.shape, (*self.batch_shape, 1))
        except RuntimeError:
            shape = torch.Size()
        if shape[:-1] != self.batch_shape:
            raise ValueError(
                f"{name} must have batch shape {tuple(self.batch_shape)} as set by batch_shape; got shape "
                f"{tuple(value.shape)}."
            )
        log_value = value.log().expand(shape).clone()
        self.register_parameter(f"log_{name}", torch.nn.Parameter(log_value))

    def _hyper(self, name: str, like: Tensor) -> Tensor:
        """Return the positive hyperparameter in the dtype and on the device of ``like``."""
        return getattr(self, f"log_{name}").exp().to(dtype=like.dtype, device=like.device)

    def _own(self, name: str, like: Any) -> Any:
        """Return a hyperparameter ready to meet a block, or a LazyTensor where ``like`` is one."""
        if isinstance(like, Tensor):
            return self._hyper(name, like).unsqueeze(-1)
        from stochproc.kernels._keops import parameter_of

        return parameter_of(getattr(self, name), like)

    def forward(
        self, x: Float[Tensor, "*#batch n d"], y: Float[Tensor, "*#batch m d"] | None = None
    ) -> Float[Tensor, "*batch n m"]:
        """Evaluate one dense block.

        Parameters
        ----------
        x : Tensor of shape (*batch, n, d)
        y : Tensor of shape (*batch, m, d), default=None
            None means x.

        Returns
        -------
        Tensor of shape (*batch, n, m)
        """
        if type(self).prepare is Kernel.prepare:
            raise NotImplementedError(f"{type(self).__name__} must define forward(x, y).")
        x, y = check_points(x, y)
        return self.prepare(x, y)()

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """Split the kernel matrix of x and y into what a backend needs block by block.

        Notes
        -----
        Cost O((n + m) d). Kernels whose points are transformed before they meet (scaled, centred, embedded)
        override this, so that the transformation is not repeated for every block.
        """
        closed = type(self).block_vjp is not Kernel.block_vjp
        names, values = self._shared()

        def block(rows: Tensors, cols: Tensors, shared: Tensors) -> Tensor:
            if closed:
                return _ClosedFormBlock.apply(self, names, rows[0], cols[0], *shared)
            return with_parameters(self, names[: len(shared)], shared).forward(rows[0], cols[0])

        return Prepared((x,), (y,), values, block)

    def _shared(self, skip: Sequence[str] = ()) -> tuple[list[str], Tensors]:
        """Names and values of the parameters that a block depends on, where it may be differentiated.

        The frozen ones too: autograd then notices if one is changed between forward and backward.
        """
        if not torch.is_grad_enabled():
            return [], ()
        pairs = [(k, p) for k, p in self.named_parameters() if k not in skip]
        return [k for k, _ in pairs], tuple(p for _, p in pairs)

    def diag(self, x: Float[Tensor, "*#batch n d"]) -> Float[Tensor, "*batch n"]:
        """Evaluate k(x_i, x_i) for every row.

        Parameters
        ----------
        x : Tensor of shape (*batch, n, d)

        Returns
        -------
        Tensor of shape (*batch, n)
        """
        blocks = [self(rows, rows) for rows in x.split(_DIAG_ROWS, dim=-2)]
        return torch.cat([b.diagonal(dim1=-2, dim2=-1) for b in blocks], -1)

    def dense(
        self, x: Float[Tensor, "*#batch n d"], y: Float[Tensor, "*#batch m d"] | None = None
    ) -> Float[Tensor, "*batch n m"]:
        """Evaluate the whole matrix; ``y=None`` means x, with the diagonal of :meth:`diag`."""
        if y is not None:
            return self(x, y)
        matrix = self(x, x)
        return torch.diagonal_scatter(matrix, self.diag(x).expand(matrix.shape[:-1]), dim1=-2, dim2=-1)

    def formula(self, x: Tensor, y: Tensor) -> Any:
        """Return the matrix as a symbolic KeOps ``LazyTensor``.

        Raises
        ------
        NotImplementedError
            If this kernel has no formula; reductions then use another backend.
        """
        raise NotImplementedError(f"{type(self).__name__} has no KeOps formula.")

    @property
    def has_formula(self) -> bool:
        """Whether :meth:`formula` exists, so that the keops backend can run this kernel."""
        own = type(self).formula is not Kernel.formula
        return own and all(k.has_formula for k in self.children() if isinstance(k, Kernel))

    def block_vjp(self, x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the gradients of ``(g * kernel(x, y)).sum()`` in x and y in closed form, or None.

        A subclass that overrides it (with differentiable operations) replaces autograd for the inputs.
        """
        return None

    def state_space(self, order: int | None = None) -> StateSpace:
        """Return the state-space form of the process on a line, where one exists.

        Parameters
        ----------
        order : int, default=None
            Order of the approximation where the form is not exact: 2 to 8 for
            :class:`stochproc.kernels.RBF` (None: 6), harmonics for :class:`stochproc.kernels.Periodic` (None: 7).
            Sums, products and scalings hand it to their parts.

        Returns
        -------
        StateSpace
            Its matrices hang in the autograd graph of the hyperparameters: ask again after each optimiser step.

        Raises
        ------
        NotImplementedError
            If this kernel, or a part of it, has none, or acts on several columns.
        ValueError
            If a factor of a product is not stationary, or ``order`` is out of range.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no state-space form; RBF, Matern, Periodic, Linear and their sums, products "
            "and multiples have one."
        )

    def operator(
        self,
        x: Float[Tensor, "*#batch n d"],
        y: Float[Tensor, "*#batch m d"] | None = None,
        *,
        backend: str = "auto",
    ) -> KernelOperator:
        """Return the kernel matrix as a ``LinearOperator`` that is never formed unless asked.

        Parameters
        ----------
        x : Tensor of shape (*batch, n, d)
        y : Tensor of shape (*batch, m, d), default=None
            None means x.
        backend : {"auto", "dense", "chunked", "keops"}, default="auto"

        Returns
        -------
        KernelOperator
            Of shape (*batch, n, m).
        """
        from stochproc.kernels._dispatch import check_backend
        from stochproc.kernels._operator import KernelOperator

        check_backend(backend)
        x, y = check_points(x, y)
        names, values = [k for k, _ in self.named_parameters()], tuple(self.parameters())
        return KernelOperator(x, y, *values, kernel=self, names=tuple(names), backend=backend)

    def config(self) -> dict[str, Any]:
        """Return the kernel as nested names and numbers, from which :func:`kernel_from_config` rebuilds it.

        Raises
        ------
        TypeError
            If the kernel, or one inside it, is not one of this library: code cannot be saved as numbers.
        """
        from stochproc.kernels._convert import LIBRARY_KERNELS

        if LIBRARY_KERNELS.get(type(self).__name__) is not type(self):
            raise TypeError(f"{type(self).__name__} is not a kernel of this library, so it cannot be saved as numbers.")
        out = {"class": type(self).__name__, **{name: plain(getattr(self, name)) for name in self._config_names}}
        return {**out, "batch_shape": list(self.batch_shape)} if self.batch_shape else out

    def __add__(self, other: Any) -> Kernel:
        from stochproc.kernels._composite import Sum

        return Sum(self, other) if isinstance(other, Kernel) else NotImplemented

    def __radd__(self, other: Any) -> Kernel:
        # sum([a, b, c]) starts at 0.
        return self if other == 0 and isinstance(other, int) else NotImplemented

    def __mul__(self, other: Any) -> Kernel:
        from stochproc.kernels._composite import Product, Scale

        if isinstance(other, Kernel):
            return Product(self, other)
        if isinstance(other, numbers.Real) and not isinstance(other, bool):
            return Scale(self, float(other), batch_shape=tuple(self.batch_shape))
        return NotImplemented

    __rmul__ = __mul__

    def extra_repr(self) -> str:
        shown = {name: plain(getattr(self, name)) for name in self._config_names}
        return ", ".join(f"{k}={_rounded(v)}" for k, v in shown.items())


class _ClosedFormBlock(torch.autograd.Function):
    """A block of a kernel with its own ``block_vjp``; where that gives None, and for hyperparameters, autograd."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, names: list[str], x: Tensor, y: Tensor, *values: Tensor) -> Tensor:
        ctx.kernel, ctx.names = kernel, names
        ctx.save_for_backward(x, y, *values)
        return call_with_parameters(kernel, names, values, type(kernel).forward, x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, y, *values = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[2:])
        grads: list[Tensor | None] = [None] * len(needed)
        if any(needed[:2]):
            found = call_with_parameters(ctx.kernel, ctx.names, values, type(ctx.kernel).block_vjp, x, y, grad)
            if found is not None:
                grads[:2] = found
                needed[:2] = False, False
        if any(needed):
            higher = torch.is_grad_enabled()
            with torch.enable_grad():
                leaves = [
                    t if higher or not w else t.detach().requires_grad_()
                    for t, w in zip((x, y, *values), needed, strict=True)
                ]
                k = call_with_parameters(ctx.kernel, ctx.names, leaves[2:], type(ctx.kernel).forward, *leaves[:2])
                wanted = [t for t, w in zip(leaves, needed, strict=True) if w]
                rest = iter(torch.autograd.grad(k, wanted, grad, create_graph=higher, allow_unused=True))
            grads = [next(rest) if w else g for g, w in zip(grads, needed, strict=True)]
        return None, None, *grads


def check_points(x: Tensor, y: Tensor | None, *, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    """Return x and y (x again for None) after checking shapes, dtypes, devices and columns."""
    y = x if y is None else y
    check_same_kind(**{names[0]: x, names[1]: y})
    for name, t in zip(names, (x, y), strict=True):
        if t.ndim < 2:
            raise ValueError(
                f"{name} must have shape (*batch, n, d), one row a point; got {tuple(t.shape)}. "
                f"For points on a line pass {name}.unsqueeze(-1)."
            )
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same number of columns; got {x.shape[-1]} and {y.shape[-1]}."
        )
    try:
        torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"the batch shapes of {names[0]} and {names[1]} must broadcast; got {tuple(x.shape[:-2])} and "
            f"{tuple(y.shape[:-2])}."
        ) from None
    return x, y


def plain(value: Any) -> Any:
    """Return tensors as nested lists (one number as a float) and kernels as their config."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.detach().cpu().tolist()
    if isinstance(value, Kernel):
        return value.config()
    if isinstance(value, (list, tuple, torch.nn.ModuleList)):
        return [plain(v) for v in value]
    return value


def _rounded(value: Any) -> Any:
    """Return numbers to six digits, for people."""
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
