"""Kernels of the inner product: linear and polynomial."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_integer
from stochproc.kernels._base import Kernel, Prepared, Tensors, check_points
from stochproc.kernels._pair import Pair
from stochproc.kernels._parameters import one_column, positive, with_parameters
from stochproc.kernels._state_space import StateSpace
from stochproc.kernels._state_space_noiseless import LinearStateSpace

__all__ = ["Dot", "Linear", "Polynomial"]


class Dot(Kernel):
    r"""A kernel of the inner product, :math:`k(x, y) = \varphi(x^\top y)`.

    A new kernel of this kind writes :meth:`profile` and nothing else.

    Parameters
    ----------
    batch_shape : tuple of int, default=()
        Batch shape of the hyperparameters.
    """

    def profile(self, dot: Any) -> Any:
        """Evaluate the kernel at inner products, a tensor or a LazyTensor; to be overridden."""
        raise NotImplementedError(f"{type(self).__name__} must define profile(dot).")

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """See :meth:`Kernel.prepare`."""
        names, values = self._shared()

        def block(rows: Tensors, cols: Tensors, shared: Tensors) -> Tensor:
            return with_parameters(self, names[: len(shared)], shared).profile(rows[0] @ cols[0].mT)

        return Prepared((x,), (y,), values, block)

    def diag(self, x: Float[Tensor, "*#batch n d"]) -> Float[Tensor, "*batch n"]:
        """Evaluate k(x_i, x_i); see :meth:`Kernel.diag`."""
        x, _ = check_points(x, None)
        # One column, so that hyperparameters of shape (*batch, 1, 1) meet a matrix.
        return self.profile((x * x).sum(-1, keepdim=True))[..., 0]

    def block_vjp(self, x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of ``(g * kernel(x, y)).sum()`` in x and y; see :meth:`Kernel.block_vjp`."""
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            dot = x @ y.mT
            dot = dot if higher and dot.requires_grad else dot.detach().requires_grad_()
            (weight,) = torch.autograd.grad(self.profile(dot), dot, g, create_graph=higher)
        return (weight @ y).sum_to_size(x.shape), (weight.mT @ x).sum_to_size(y.shape)

    def formula(self, x: Tensor, y: Tensor) -> Any:
        """Return the symbolic KeOps matrix; see :meth:`Kernel.formula`."""
        from stochproc.kernels._keops import pair_of

        u, w = pair_of(x, y)
        return self.profile(u | w)

    def gram(self, pair: Pair) -> Tensor:
        """Evaluate the kernel on Gram blocks, where the inner product is :math:`r_1 r_2 - A`.

        Parameters
        ----------
        pair : Pair
            Pair state of the two sets of features.

        Returns
        -------
        Tensor of shape (*batch, n, m)
        """
        return self.profile(pair.r1 * pair.r2 - pair.A)


class Linear(Dot):
    r"""Linear kernel: bias + variance times the inner product; Bayesian linear regression as a process.

    Parameters
    ----------
    variance : float or Tensor, default=1.0
        Positive: prior variance of every slope.
    bias : float or Tensor, default=1.0
        Positive: prior variance of the intercept.
    batch_shape : tuple of int, default=()
        Batch shape of the hyperparameters.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import Linear
    >>> Linear(variance=2.0, bias=0.5)(torch.tensor([[3.0]]), torch.tensor([[4.0]])).item()
    24.5
    """

    _config_names = ("variance", "bias")
    variance = positive("variance", "Prior variance of every slope.")
    bias = positive("bias", "Prior variance of the intercept.")

    def __init__(self, variance: Any = 1.0, bias: Any = 1.0, *, batch_shape: tuple[int, ...] = ()) -> None:
        super().__init__(batch_shape=batch_shape)
        self._add_positive("variance", variance)
        self._add_positive("bias", bias)

    def profile(self, dot: Any) -> Any:
        """Return bias + variance * dot."""
        return dot * self._own("variance", dot) + self._own("bias", dot)

    def state_space(self, order: int | None = None) -> StateSpace:
        """Return the exact form on one column, from time 0 on and back; see :meth:`Kernel.state_space`."""
        return LinearStateSpace(one_column(self, "variance"), one_column(self, "bias"))


class Polynomial(Dot):
    r"""Polynomial kernel :math:`(x^\top y + \mathrm{offset})^{\mathrm{degree}}`.

    Parameters
    ----------
    degree : int, default=2
        Between 1 and 8.
    offset : float or Tensor, default=1.0
        Positive; how much the lower degrees weigh.
    batch_shape : tuple of int, default=()
        Batch shape of the hyperparameters.

    Raises
    ------
    TypeError
        If degree is not an integer.
    ValueError
        If degree is not between 1 and 8, or offset is not positive.
    """

    _config_names = ("degree", "offset")
    offset = positive("offset", "Added to the inner product.")

    def __init__(self, degree: int = 2, offset: Any = 1.0, *, batch_shape: tuple[int, ...] = ()) -> None:
        check_integer("degree", degree, 1, 8)
        super().__init__(batch_shape=batch_shape)
        self.degree = int(degree)
        self._add_positive("offset", offset)

    def profile(self, dot: Any) -> Any:
        """Return (dot + offset)^degree."""
        return (dot + self._own("offset", dot)) ** self.degree
