"""Gradient flow of the squared loss: how far training has come in each direction of the tangent kernel."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice, check_positive

__all__ = ["GradientFlow"]


@dataclass(frozen=True)
class GradientFlow:
    r"""Training of an infinitely wide network by gradient flow on the squared loss :math:`|f - y|^2 / 2`.

    Parameters
    ----------
    time : float, default=inf
        How long the flow runs, non-negative; ``inf`` is until convergence, 0 no training at all.
    learning_rate : float, default=1.0
        Speed eta of the flow, positive; only its product with ``time`` matters. Training by steps of size eta follows
        the flow while eta times the largest eigenvalue of the tangent kernel is well below 2.
    ridge : float, default=0.0
        Strength r of the penalty :math:`\tfrac r2 |w - w_0|^2` on the distance of the weights from their start,
        non-negative. The weights w are those that carry the scale: in NTK parameterisation, where the scale s
        multiplies the output by its root, the penalty on the parameters is :math:`\tfrac{r s}2 |\theta - \theta_0|^2`.
        The targets are then not met exactly: with ``Th`` the tangent kernel, as in regression with noise r.
    rate : {"scaled", "fixed"}, default="scaled"
        A network of scale s has the tangent kernel s Th. "scaled" divides its learning rate by s, so that all networks
        learn at one speed and the mean of the trained ones is free of s; "fixed" is one learning rate for all, so
        that networks of large scale learn faster. They agree for ``time=inf``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    .. [1] A. Jacot, F. Gabriel, C. Hongler, "Neural Tangent Kernel", NeurIPS 2018.
    .. [2] J. Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
       2019.

    Examples
    --------
    >>> import torch
    >>> flow = GradientFlow(time=1.0)
    >>> flow.weights(torch.tensor([0.0, 1.0, 100.0]))
    tensor([1.0000, 0.6321, 0.0100])
    """

    time: "float | int" = math.inf
    learning_rate: "float | int" = 1.0
    ridge: "float | int" = 0.0
    rate: str = "scaled"

    def __post_init__(self) -> None:
        # inf is a time like any other, which check_positive would refuse.
        check_positive("time", 0.0 if self.time == math.inf else self.time, zero=True)
        check_positive("learning_rate", self.learning_rate)
        check_positive("ridge", self.ridge, zero=True)
        check_choice("rate", self.rate, ("scaled", "fixed"))

    @property
    def depends_on_scale(self) -> bool:
        """Whether networks of different scale are trained to a different degree."""
        return self.rate == "fixed" and 0 < self.time < math.inf

    def weights(
        self, eigenvalues: Float[Tensor, " n"], scale: "Float[Tensor, ' J'] | None" = None
    ) -> Float[Tensor, "*J n"]:
        r"""Return what training multiplies the residual by, along each eigenvector of the tangent kernel.

        Parameters
        ----------
        eigenvalues : Tensor of shape (n,)
            Eigenvalues l of Th(X, X), non-negative.
        scale : Tensor of shape (J,) or None, default=None
            Scales s, positive; they matter where ``depends_on_scale`` only. None is s = 1.

        Returns
        -------
        Tensor of shape (n,) or (J, n)
            :math:`\phi(l) = (1 - e^{-\eta_s t (l + r)}) / (l + r)`, which is :math:`\eta_s t` at l + r = 0. With
            ``time=inf`` it is 1/(l + r), inf at 0. The error left on the training data is 1 - l phi(l), per direction.
        """
        total = eigenvalues + self.ridge
        speed = total.new_tensor(float(self.learning_rate))
        if scale is not None:
            scale = scale.to(total)[:, None]
            speed = speed * scale if self.depends_on_scale else speed.expand_as(scale)
        if self.time == math.inf:
            return (1 / total).expand(torch.broadcast_shapes(speed.shape, total.shape)).clone()
        # Clamped, since infinity times l + r = 0 would be NaN.
        span = (speed * self.time).clamp(max=torch.finfo(total.dtype).max)
        progress = span * total
        small = progress < 1
        # Written in the progress where it is small: l + r may be 0, or so small that the progress underflows.
        safe = torch.where(small & (progress > 0), progress, 1.0)
        early = torch.where(progress > 0, span * (-torch.expm1(-safe) / safe), span)
        late = -torch.expm1(-progress) / torch.where(small, 1.0, total)
        return torch.where(small, early, late)
