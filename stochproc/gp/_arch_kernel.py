"""The covariance or tangent kernel of an infinitely wide network as a kernel of the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice, check_positive
from stochproc.gp._arch_base import Layer
from stochproc.gp._arch_compose import Serial
from stochproc.gp._arch_config import from_config
from stochproc.gp._arch_evaluate import dense_kernels, diagonals, same_points
from stochproc.gp._arch_formula import formula_of, has_formula
from stochproc.gp._arch_layers import Dense
from stochproc.kernels import Kernel, Prepared, register_kernel

__all__ = ["NetworkKernel"]


class NetworkKernel(Kernel):
    """Kernel of an infinitely wide network, for every backend, operator and estimator of the library.

    Parameters
    ----------
    net : Layer
        The network.
    kind : {"nngp", "ntk"}, default="nngp"
        Covariance of the outputs at random weights, or the tangent kernel.
    lengthscale : float or Tensor of shape (*batch_shape, d), default=None
        Positive: columns are divided by it, before the input kernel x . y / d. None leaves them as they are and has no
        parameter.
    batch_shape : tuple of int, default=()
        Batch shape of ``lengthscale``.

    Raises
    ------
    ArchitectureError
        If kind is "ntk" and a layer has no tangent kernel.
    TypeError
        If net is not a layer.
    ValueError
        If kind is unknown, or a lengthscale not positive.

    Notes
    -----
    Networks on images begin with :class:`stochproc.gp.arch.Image`, which takes rows apart. The parameters are shared
    with ``net``, not copied. Called with one set of points the kernel has the diagonal of :meth:`diag` bit for bit.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import arch
    >>> kernel = arch.NetworkKernel(arch.mlp(3), lengthscale=torch.ones(2))
    >>> op = kernel.operator(torch.zeros(5, 2))
    >>> (op @ torch.ones(5, 1)).shape
    torch.Size([5, 1])
    """

    log_lengthscale: Tensor

    def __init__(
        self,
        net: Layer,
        kind: str = "nngp",
        *,
        lengthscale: Any = None,
        batch_shape: tuple[int, ...] = (),
    ) -> None:
        if not isinstance(net, Layer):
            raise TypeError(f"net must be a layer of stochproc.gp.arch; got {type(net).__name__}.")
        check_choice("kind", kind, ("nngp", "ntk"))
        super().__init__(batch_shape=batch_shape)
        self.net, self.kind = net, kind
        self.has_lengthscale = lengthscale is not None
        if kind == "ntk":
            net.check_tangent()
        if lengthscale is not None:
            self._add_positive("lengthscale", lengthscale, per_column=True)

    @property
    def lengthscale(self) -> Tensor | None:
        """What columns are divided by, None where they are not."""
        return self.log_lengthscale.exp() if self.has_lengthscale else None

    @lengthscale.setter
    def lengthscale(self, value: Any) -> None:
        if not self.has_lengthscale:
            raise ValueError("lengthscale was None at construction, so that the kernel has no such parameter.")
        new = torch.as_tensor(value, dtype=torch.float64).detach()
        check_positive("lengthscale", new)
        shape = tuple(self.log_lengthscale.shape)
        if new.ndim and not _expands(tuple(new.shape), shape):
            raise ValueError(f"lengthscale must be one number or have shape {shape}; got shape {tuple(new.shape)}.")
        with torch.no_grad():
            self.log_lengthscale.copy_(new.log().expand_as(self.log_lengthscale))

    def forward(
        self, x: Float[Tensor, "*#batch n d"], y: Float[Tensor, "*#batch m d"] | None = None
    ) -> Float[Tensor, "*batch n m"]:
        """Evaluate the matrix; see :meth:`stochproc.kernels.Kernel.forward`."""
        y = x if y is None or same_points(x, y) else y
        u = self.points(x)
        return dense_kernels(self.net, u, u if y is x else self.points(y), (self.kind,))[0]

    def diag(self, x: Float[Tensor, "*#batch n d"]) -> Float[Tensor, "*batch n"]:
        """Evaluate k(x_i, x_i) in O(n)."""
        return diagonals(self.net, self.points(x), (self.kind,))[0]

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """See :meth:`stochproc.kernels.Kernel.prepare`.

        Where a point paired with itself is special, rows and columns are numbered.
        """
        base = super().prepare(x, y)
        if not (same_points(x, y) and any(getattr(layer, "marks_same", False) for layer in self.net.modules())):
            return base
        number = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device).unsqueeze(-1)

        def block(rows: tuple[Tensor, ...], cols: tuple[Tensor, ...], shared: tuple[Tensor, ...]) -> Tensor:
            value = base.block(rows[:1], cols[:1], shared)
            return torch.where(rows[1] == cols[1].mT, rows[2], value)

        return Prepared((x, number, self.diag(x).unsqueeze(-1)), (y, number), base.shared, block)

    @property
    def has_formula(self) -> bool:
        """Whether the keops backend can run the network: dense layers, LayerNorm, sums, and activations but Numeric."""
        return has_formula(self.net, self.kind)

    def formula(self, x: Tensor, y: Tensor) -> Any:
        """Return the symbolic KeOps matrix, compiled as one operation whatever the depth.

        See :meth:`stochproc.kernels.Kernel.formula`.

        Notes
        -----
        Gradients are exact, second derivatives raise NotImplementedError.
        """
        if not self.has_formula:
            raise NotImplementedError(f"a layer of {self.net.name} has no KeOps formula.")
        return formula_of(self.net, self.kind, self.points(x), self.points(y))

    def points(self, x: Tensor) -> Tensor:
        """Return points with their columns scaled, as the network takes them."""
        return x / self._hyper("lengthscale", x).unsqueeze(-2) if self.has_lengthscale else x

    def freeze_last(self) -> None:
        """Keep the weights of the last dense layer as they are in fits: a free scale is the same degree of freedom."""
        last: Any = self.net
        while isinstance(last, Serial):
            last = last.parts[-1]
        uses = [part for _, part in self.net.named_modules(remove_duplicate=False) if part is last]
        # By type: a convolution is a dense layer too.
        if type(last) is Dense and len(uses) == 1:
            last.log_w_std.requires_grad_(False)

    def config(self) -> dict[str, Any]:
        """Return the kernel as nested names and numbers; see :meth:`stochproc.kernels.Kernel.config`."""
        out = {**super().config(), "net": self.net.config(), "kind": self.kind}
        if self.has_lengthscale:
            # As a list even of one number, which is one number for all columns.
            out["lengthscale"] = self.log_lengthscale.detach().exp().tolist()
        return out

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> NetworkKernel:
        """Rebuild the kernel from its config without the name of the class."""
        return cls(**{**options, "net": from_config(options["net"])})

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


def _expands(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(s in (1, n) for s, n in pairs)


register_kernel(NetworkKernel)
