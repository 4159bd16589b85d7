"""Layers without a nonlinearity: dense, layer normalisation, dropout, scaling, and nothing at all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_positive
from stochproc.gp._arch_base import DiagState, KernelState, Layer
from stochproc.gp._scale_base import plain_number
from stochproc.kernels import Pair

__all__ = ["Dense", "Dropout", "Identity", "LayerNorm", "Scale"]

_STDS = (1e-140, 1e140)


def squared(log_value: Tensor | None, like: Tensor, *, pairs: bool) -> Any:
    """Return exp(2 log_value) ready to meet pairs (*batch, n, m), or points (*batch, n); 0.0 for None.

    One number stays a float64 number, which keeps its digits in a float32 expression.
    """
    if log_value is None:
        return 0.0
    value = (2 * log_value).exp().to(like.device)
    if value.numel() == 1:
        return value.reshape(())
    return (value.unsqueeze(-1) if pairs else value).to(like.dtype)


def _std(name: str, value: Any, *, zero: bool = False) -> float:
    """Return a positive number whose square fits, or raise TypeError or ValueError naming it."""
    number = plain_number(name, value)
    check_positive(name, number, zero=zero)
    if not (_STDS[0] <= number <= _STDS[1] or (zero and number == 0)):
        allowed = f"{'be 0 or ' if zero else ''}lie between {_STDS[0]:g} and {_STDS[1]:g}"
        raise ValueError(f"{name} must {allowed}; got {number:g}.")
    return number


class Dense(Layer):
    r"""Fully connected layer: the kernel becomes :math:`w^2 k + b^2`.

    Parameters
    ----------
    w_std : float, default=1.0
        Standard deviation w of the weights, positive.
    b_std : float, default=0.0
        Standard deviation b of the biases, non-negative; 0 means no bias and no parameter.
    trainable : bool, default=True
        Whether fits learn w_std and b_std.

    Raises
    ------
    ValueError
        If w_std is not positive or b_std negative, or one is not 0 and beyond 1e-140 to 1e140.

    Notes
    -----
    The same object at several places of a network has one w_std and b_std there.

    Examples
    --------
    >>> import torch
    >>> from stochproc.gp import arch
    >>> arch.Dense(w_std=2.0, b_std=1.0).nngp(torch.tensor([[3.0, 4.0]])).item()
    51.0
    """

    def __init__(self, w_std: float | int = 1.0, b_std: float | int = 0.0, *, trainable: bool = True) -> None:
        super().__init__()
        w, b = _std("w_std", w_std), _std("b_std", b_std, zero=True)

        def parameter(value: float) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.tensor([math.log(value)], dtype=torch.float64), requires_grad=trainable)

        self.log_w_std = parameter(w)
        self.log_b_std = parameter(b) if b > 0 else None

    @property
    def w_std(self) -> Tensor:
        """Standard deviation of the weights."""
        return self.log_w_std.exp()

    @property
    def b_std(self) -> Tensor:
        """Standard deviation of the biases, 0 without."""
        return torch.zeros_like(self.log_w_std) if self.log_b_std is None else self.log_b_std.exp()

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        w2, b2 = (squared(p, state.pair.r1, pairs=True) for p in (self.log_w_std, self.log_b_std))
        pair = state.pair.affine(w2, b2)
        return state._replace(pair=pair, ntk=None if state.ntk is None else state.ntk * w2 + pair.q)

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        w2, b2 = (squared(p, state.q, pairs=False) for p in (self.log_w_std, self.log_b_std))
        q = state.q * w2 + b2
        pair = None if state.pair is None else state.pair.affine(w2, b2)
        ntk = None if state.ntk is None else state.ntk * w2 + (q if pair is None else pair.q)
        return state._replace(q=q, ntk=ntk, pair=pair)

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        out = {"w_std": self.w_std.item(), "b_std": self.b_std.item()}
        return out if self.log_w_std.requires_grad else {**out, "trainable": False}

    def extra_repr(self) -> str:
        return f"w_std={self.w_std.item():.6g}, b_std={self.b_std.item():.6g}"


class Identity(Layer):
    """A layer that changes nothing: the short way around a residual block."""

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        return state

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        return state

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        return {}


class Scale(Layer):
    r"""Multiplication by a fixed number s: the kernels become :math:`s^2 k`.

    Parameters
    ----------
    s : float
        Positive, between 1e-140 and 1e140.

    Raises
    ------
    ValueError
        If s is out of range.
    """

    def __init__(self, s: float | int) -> None:
        super().__init__()
        self.s = _std("s", s)

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        s2 = self.s**2
        return state._replace(pair=state.pair.affine(s2, 0.0), ntk=None if state.ntk is None else state.ntk * s2)

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        s2 = self.s**2
        return state._replace(
            q=state.q * s2,
            ntk=None if state.ntk is None else state.ntk * s2,
            pair=None if state.pair is None else state.pair.affine(s2, 0.0),
        )

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        return {"s": self.s}

    def extra_repr(self) -> str:
        return f"s={self.s:.6g}"


class LayerNorm(Layer):
    r"""Layer normalisation: :math:`k(x, y) / \sqrt{(k(x, x) + \varepsilon)(k(y, y) + \varepsilon)}`.

    Parameters
    ----------
    eps : float, default=1e-12
        Positive.

    Raises
    ------
    ValueError
        If eps is not positive.

    Notes
    -----
    Only over channels: on images each pixel is normalised by itself.
    """

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = plain_number("eps", eps)
        check_positive("eps", self.eps)

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        if isinstance(state.pair, Pair):
            pair, per_pair = self._normalised(state.pair)
        else:
            # The pairs of a KeOps formula.
            pair, per_pair = state.pair.normalised(self.eps)
        return state._replace(pair=pair, ntk=None if state.ntk is None else state.ntk * per_pair)

    def _normalised(self, pair: Pair) -> tuple[Pair, Tensor]:
        """Return the pair behind the layer, and what the tangent kernel is multiplied by."""
        i1, i2 = ((r * r + self.eps).rsqrt() for r in (pair.r1, pair.r2))
        r1, r2 = pair.r1 * i1, pair.r2 * i2
        per_pair = i1 * i2
        # r1/s1 - r2/s2 with s^2 = r^2 + eps is eps (r1^2 - r2^2) / (s1 s2 (r1 s2 + r2 s1)), where every s is
        # positive but both r may be 0.
        total = r1 + r2
        safe = torch.where(total > 0, total, 1.0)
        D = pair.difference * self.eps * per_pair * per_pair / safe
        return Pair(r1, r2, D, pair.A * per_pair), per_pair

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        scale = 1 / (state.q + self.eps)
        if state.pair is None:
            return state._replace(q=state.q * scale, ntk=None if state.ntk is None else state.ntk * scale)
        pair, per_pair = self._normalised(state.pair)
        ntk = None if state.ntk is None else state.ntk * per_pair
        return state._replace(q=state.q * scale, ntk=ntk, pair=pair)

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        return {"eps": self.eps}

    def extra_repr(self) -> str:
        return f"eps={self.eps:.6g}"


class Dropout(Layer):
    """Dropout in training: units are kept with probability ``keep`` and then divided by it.

    Variances are divided by ``keep``; covariances of different points, whose units are dropped independently, stay.
    A matrix of two sets of points takes all pairs as different; that of one set has the larger diagonal.

    Parameters
    ----------
    keep : float
        Between 0 (exclusive) and 1.

    Raises
    ------
    ValueError
        If keep is out of range.
    """

    #: The diagonal is not the value at two equal points.
    marks_same = True

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = plain_number("keep", keep)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1]; got {self.keep}.")

    def kernel(self, state: KernelState) -> KernelState:
        """See :meth:`Layer.kernel`."""
        root = self.keep**-0.5
        p = state.pair
        return state._replace(pair=Pair(p.r1 * root, p.r2 * root, p.D * root, p.A + p.n * (1 / self.keep - 1)))

    def diagonal(self, state: DiagState) -> DiagState:
        """See :meth:`Layer.diagonal`."""
        q = state.q / self.keep
        if state.pair is None:
            return state._replace(q=q, ntk=None if state.ntk is None else state.ntk / self.keep)
        # Different pixels are dropped independently, a pixel together with itself.
        same = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        p, root = state.pair, self.keep**-0.5
        more = (p.n * (1 - same) + p.A * same) * (1 / self.keep - 1)
        ntk = None if state.ntk is None else state.ntk * (1 + same * (1 / self.keep - 1))
        return state._replace(q=q, ntk=ntk, pair=Pair(p.r1 * root, p.r2 * root, p.D * root, p.A + more))

    def own_config(self, write: Any) -> dict[str, Any]:
        """See :meth:`Layer.own_config`."""
        return {"keep": self.keep}

    def extra_repr(self) -> str:
        return f"keep={self.keep:.6g}"
