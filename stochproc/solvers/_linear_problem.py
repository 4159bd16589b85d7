"""A linear system in one form: products with A and vectors as columns, whatever A and b were."""

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_floating, check_same_kind

__all__ = ["LinearProblem", "column_norms", "is_linear_operator"]

Columns = Callable[[Tensor], Tensor]


class LinearProblem:
    """The system A x = b with b as columns of shape (*batch, n, k).

    Parameters
    ----------
    A : Tensor, LinearOperator or callable
    b, x0, project
        As in :meth:`CG.__call__`.

    Attributes
    ----------
    b : Tensor of shape (*batch, n, k)
        Still attached to the graph of the argument.
    x0 : Tensor of shape (*batch, n, k) or None
        Detached.
    products : int
        How often A was applied.
    tracked : bool
        Whether a product with A depends on a tensor that requires a gradient; of a callable this is known
        after its first product only.
    """

    def __init__(
        self, A: Any, b: Tensor, x0: "Tensor | None" = None, project: "Callable[[Tensor], Tensor] | None" = None
    ) -> None:
        self.A, self.grad_wanted = A, torch.is_grad_enabled()
        self.products, self.tracked = 0, False
        self._probed = False
        if isinstance(A, Tensor) or is_linear_operator(A):
            self.vector = _check_against_matrix(A, b, x0)
            batch = torch.broadcast_shapes(A.shape[:-2], b.shape[:-1] if self.vector else b.shape[:-2])
            tensors: Sequence[Tensor] = (A,) if isinstance(A, Tensor) else A.representation()
            self.guard = tuple(t for t in tensors if isinstance(t, Tensor))
            self.tracked = self.grad_wanted and any(t.requires_grad for t in self.guard)
            self._probed = True
            self._apply: Columns = lambda V: A @ V
            self.entries = True
        elif callable(A):
            check_same_kind(b=b, x0=x0)
            if b.ndim == 0:
                raise ValueError("b must have shape (n,) or (*batch, n, k); got a number.")
            self.vector = b.ndim == 1
            batch = b.shape[:-2]
            self.guard = ()
            self._apply = self.by_columns("A", A)
            self.entries = False
        else:
            raise TypeError(f"A must be a tensor, a LinearOperator or a callable; got {type(A).__name__}.")
        columns = b.unsqueeze(-1) if self.vector else b
        self.b = columns.expand(*batch, *columns.shape[-2:])
        self.x0 = None if x0 is None else self._start(x0.detach())
        self.project: Columns | None = None if project is None else self.by_columns("project", project)

    def _start(self, x0: Tensor) -> Tensor:
        columns = x0.unsqueeze(-1) if self.vector else x0
        try:
            return columns.expand(self.b.shape)
        except RuntimeError:
            raise ValueError(
                f"x0 must have the shape of the solution, {tuple(self.shaped(self.b).shape)}; got {tuple(x0.shape)}."
            ) from None

    def shaped(self, V: Tensor) -> Tensor:
        """Columns in the shape of the argument b."""
        return V.squeeze(-1) if self.vector else V

    def by_columns(self, name: str, function: Callable[[Tensor], Tensor]) -> Columns:
        """Return a user's function, which sees the shape of b, as a function of columns."""

        # Not ``self``: a problem that holds itself would keep all that the function captures until the next collection.
        vector = self.vector

        def apply(V: Tensor) -> Tensor:
            v = V.squeeze(-1) if vector else V
            out = function(v)
            if not isinstance(out, Tensor):
                raise TypeError(f"{name} must return a torch.Tensor; got {type(out).__name__}.")
            if out.shape != v.shape:
                raise ValueError(
                    f"{name} must return the shape of its argument, {tuple(v.shape)}; got {tuple(out.shape)}."
                )
            check_same_kind(**{f"the result of {name}": out, "b": v})
            return out.unsqueeze(-1) if vector else out

        return apply

    def with_right_side(self, g: Tensor) -> "LinearProblem":
        """Return the same system with right-hand side g, projected, from zero and without gradients."""
        other = copy.copy(self)
        other.b = g.detach().unsqueeze(-1) if self.vector else g.detach()
        if self.project is not None:
            other.b = self.project(other.b)
        other.x0, other.products, other.grad_wanted, other._probed = None, 0, False, True
        return other

    def product(self, V: Tensor) -> Tensor:
        """Return A V, detached."""
        self.products += 1
        if self._probed:
            with torch.no_grad():
                return self._apply(V)
        # Only the graph of a product tells what a closure captures; the first one is free to ask.
        self._probed = True
        with torch.set_grad_enabled(self.grad_wanted):
            out = self._apply(V)
        self.tracked = out.requires_grad
        return out.detach()

    @property
    def needs_gradient(self) -> bool:
        """Whether the solution is to carry a graph."""
        return self.grad_wanted and (self.tracked or self.b.requires_grad)

    def residual(self, X: Tensor) -> Tensor:
        """Return b - A X, on the graph where the solution is to carry one."""
        self.products += 1
        with torch.set_grad_enabled(self.needs_gradient if self._probed else self.grad_wanted):
            out = self._apply(X)
            if not self._probed:
                self._probed, self.tracked = True, out.requires_grad
            return self.b - out


def is_linear_operator(A: Any) -> bool:
    """Whether ``A`` is one, without importing linear_operator: what is not loaded made no instance."""
    module = sys.modules.get("linear_operator")
    return module is not None and isinstance(A, module.LinearOperator)


def column_norms(V: Tensor) -> Tensor:
    """Euclidean norm of each column, in float64 and safe against overflow and underflow; NaN stays NaN."""
    if V.shape[-2] == 0:
        return V.new_zeros((*V.shape[:-2], V.shape[-1]), dtype=torch.float64)
    largest = V.abs().amax(-2).double()
    safe = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return torch.linalg.vector_norm(V.double() / safe.unsqueeze(-2), dim=-2) * safe


def _check_against_matrix(A: Any, b: Tensor, x0: "Tensor | None") -> bool:
    """Check kinds and shapes of a system with a tensor or operator; return whether b holds vectors."""
    check_floating(b=b, x0=x0)
    if isinstance(A, Tensor):
        check_same_kind(A=A, b=b, x0=x0)
        if A.layout is not torch.strided:
            raise TypeError(f"A must be dense here; got layout {A.layout}. Pass a sparse matrix to SparseCG.")
    else:
        check_same_kind(b=b, x0=x0)
        if A.dtype != b.dtype:
            raise TypeError(f"mixed dtypes: A is {A.dtype}, b is {b.dtype}.")
        if A.device != b.device:
            raise TypeError(f"mixed devices: A is on {A.device}, b is on {b.device}.")
    if len(A.shape) < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be square, (*batch, n, n); got shape {tuple(A.shape)}.")
    n, ndim = A.shape[-1], len(A.shape)
    vector = b.ndim == ndim - 1
    shape = tuple(b.shape)
    if b.ndim not in (ndim - 1, ndim):
        raise ValueError(
            f"b must have {ndim - 1} dimensions (one vector a matrix) or {ndim} (columns) for A of shape "
            f"{tuple(A.shape)}; got shape {shape}."
        )
    if shape[-1 if vector else -2] != n:
        raise ValueError(f"b must have {n} rows for A of shape {tuple(A.shape)}; got shape {shape}.")
    try:
        torch.broadcast_shapes(A.shape[:-2], b.shape[:-1] if vector else b.shape[:-2])
    except RuntimeError:
        raise ValueError(f"the batch shapes of A and b must broadcast; got {tuple(A.shape)} and {shape}.") from None
    return vector
