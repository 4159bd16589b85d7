"""Kernels of the scaled distance: RBF, Matern, rational quadratic, and the periodic one by embedding."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc.kernels._base import Kernel, Prepared, Tensors, check_points
from stochproc.kernels._distance import (
    FLOAT32_MAX_SQNORM,
    RadialProfile,
    augment,
    inverse_or_zero,
    is_lazy,
    radial_block,
    safe_sqrt,
    stable_exp,
    stable_exp_,
)
from stochproc.kernels._pair import Pair
from stochproc.kernels._parameters import one_column, positive, with_parameters
from stochproc.kernels._state_space import StateSpace
from stochproc.kernels._state_space_matern import MaternStateSpace
from stochproc.kernels._state_space_noiseless import PeriodicStateSpace
from stochproc.kernels._state_space_rbf import RBFStateSpace

__all__ = ["RBF", "Matern", "Periodic", "Radial", "RationalQuadratic"]


class Radial(Kernel):
    r"""A kernel of the scaled distance, :math:`k(x, y) = \varphi(\sum_c (x_c - y_c)^2 / \ell_c^2)`.

    A new radial kernel writes :meth:`profile` and nothing else.

    Parameters
    ----------
    lengthscale : float, sequence or Tensor, default=1.0
        Positive, in the unit of the columns: one number, one a column (shape (d,)), or batched
        (*batch_shape, 1) or (*batch_shape, d).
    batch_shape : tuple of int, default=()
        Batch shape of the hyperparameters.

    Raises
    ------
    ValueError
        If a hyperparameter is not positive, or is misshapen.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import Radial
    >>> class Wendland(Radial):
    ...     def profile(self, sq):
    ...         return (1 - sq).clamp(min=0) ** 4
    >>> Wendland(lengthscale=2.0)(torch.zeros(1, 1), torch.ones(1, 1)).item()
    0.31640625
    """

    _config_names: tuple[str, ...] = ("lengthscale",)
    lengthscale = positive("lengthscale", "Lengthscale, in the unit of the columns.")
    log_lengthscale: Tensor
    # Hyperparameters that act on the points, before the profile.
    _embedding: tuple[str, ...] = ("log_lengthscale",)

    #: Whether the profile behaves like the distance, not its square, near 0; distances of nearly coincident
    #: points are then recomputed from explicit differences.
    rough = False

    def __init__(self, lengthscale: Any = 1.0, *, batch_shape: tuple[int, ...] = ()) -> None:
        super().__init__(batch_shape=batch_shape)
        self._add_positive("lengthscale", lengthscale, per_column=True)

    def profile(self, sq: Any) -> Any:
        """Evaluate the kernel at squared scaled distances, a tensor or a LazyTensor; to be overridden."""
        raise NotImplementedError(f"{type(self).__name__} must define profile(sq).")

    # The next four are optional: speed for the kernels of this file. `_profile_` may overwrite its argument and
    # is called outside autograd; `_slope` times `_slope_factor` is d profile / d sq; `_rate` is set where the
    # profile is exp(_rate * sq).
    _slope_factor = 1.0
    _rate: float | None = None

    def _profile_(self, sq: Tensor) -> Tensor:
        return self.profile(sq)

    def _slope(self, sq: Callable[[], Tensor], value: Tensor) -> Tensor:
        raise NotImplementedError

    def _embed(self, x: Tensor) -> Tensor:
        """Return the points whose Euclidean distances the profile takes."""
        lengthscale = self._hyper("lengthscale", x)
        if lengthscale.shape[-1] not in (1, x.shape[-1]):
            raise ValueError(
                f"lengthscale has {lengthscale.shape[-1]} entries, one a column, but the points have "
                f"{x.shape[-1]} columns."
            )
        return x / lengthscale.unsqueeze(-2)

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """Scale, centre and augment the points once; see :meth:`Kernel.prepare`."""
        # Next to a rough profile's kink the gradient is a difference of large sums, so the product is in float64.
        limit = 0.0 if self.rough else FLOAT32_MAX_SQNORM
        a, b, far = augment(x, y, self._embed, max_sqnorm=limit)
        names, values = self._shared(skip=self._embedding)
        # A profile with trainable hyperparameters of its own is differentiated by autograd, one inherited
        # together with its slope in closed form.
        closed = not any(v.requires_grad for v in values) and _defines_both(type(self))
        dtype, refine = x.dtype, self.rough or far

        def block(rows: Tensors, cols: Tensors, shared: Tensors) -> Tensor:
            module = with_parameters(self, names, shared) if shared else self
            slope = module._slope if closed else None
            fast = module._profile_ if closed else module.profile
            rate = module._rate if closed else None
            profile = RadialProfile(module.profile, fast, slope, module._slope_factor, rate)
            return radial_block(rows[0], cols[0], dtype, profile, shared, refine=refine)

        return Prepared((a,), (b,), values, block)

    def diag(self, x: Float[Tensor, "*#batch n d"]) -> Float[Tensor, "*batch n"]:
        """Evaluate k(x_i, x_i): the profile at 0; see :meth:`Kernel.diag`."""
        x, _ = check_points(x, None)
        value = self.profile(x.new_zeros(1, 1))[..., 0]
        # The shape of the parameters in force, which may be a slice of those at construction.
        batch = torch.broadcast_shapes(x.shape[:-2], self.log_lengthscale.shape[:-1], value.shape[:-1])
        return value.expand(*batch, x.shape[-2])

    def block_vjp(self, x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of ``(g * kernel(x, y)).sum()`` in x and y; see :meth:`Kernel.block_vjp`."""
        higher = torch.is_grad_enabled()
        with torch.enable_grad():
            x_, y_ = (t if higher and t.requires_grad else t.detach().requires_grad_() for t in (x, y))
            grads = torch.autograd.grad(self.prepare(x_, y_)(), (x_, y_), g, create_graph=higher)
        return grads[0], grads[1]

    def formula(self, x: Tensor, y: Tensor) -> Any:
        """Return the symbolic KeOps matrix; see :meth:`Kernel.formula`."""
        from stochproc.kernels._keops import pair_of

        centre = y.detach().mean(-2, keepdim=True)
        u, w = pair_of(self._embed(x - centre), self._embed(y - centre))
        return self.profile(((u - w) ** 2).sum(-1))

    def gram(self, pair: Pair) -> Tensor:
        """Evaluate the kernel on Gram blocks: distances :math:`2A + D^2` between unseen features.

        Parameters
        ----------
        pair : Pair
            Pair state of the two sets of features.

        Returns
        -------
        Tensor of shape (*batch, n, m)

        Raises
        ------
        ValueError
            If the lengthscale is not one number: features of a Gram matrix have no columns.
        """
        lengthscale = self._hyper("lengthscale", pair.A)
        if lengthscale.shape[-1] != 1:
            raise ValueError(f"lengthscale must be one number on a Gram matrix; got {lengthscale.shape[-1]} entries.")
        return self.profile((2 * pair.A + pair.D**2) / lengthscale.unsqueeze(-1) ** 2)


def _defines_both(cls: type) -> bool:
    """Whether profile and slope come from the same class, so that a subclass's new profile is not misused."""
    owner = {name: next(c for c in cls.__mro__ if name in vars(c)) for name in ("profile", "_slope")}
    return owner["profile"] is owner["_slope"]


class RBF(Radial):
    r"""Squared-exponential kernel :math:`\exp(-r^2/2)`, r the distance after division by the lengthscale.

    Parameters
    ----------
    lengthscale : float, sequence or Tensor, default=1.0
        Positive, in the unit of the columns: one number, or one a column.
    batch_shape : tuple of int, default=()
        Batch shape of the hyperparameters.

    References
    ----------
    .. [1] C. E. Rasmussen and C. K. I. Williams, "Gaussian Processes for Machine Learning", 2006, eq. 4.9.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import RBF
    >>> RBF(lengthscale=2.0)(torch.tensor([[0.0]]), torch.tensor([[2.0]])).item()  # exp(-1/2)
    0.60653...
    """

    def profile(self, sq: Any) -> Any:
        """Return exp(-sq / 2)."""
        return stable_exp(sq, -0.5)

    def _profile_(self, sq: Tensor) -> Tensor:
        return stable_exp_(sq, -0.5)

    _slope_factor = _rate = -0.5

    def _slope(self, sq: Callable[[], Tensor], value: Tensor) -> Tensor:
        return value

    def state_space(self, order: int | None = None) -> StateSpace:
        """Return an approximation, off by at most 1e-5 for order 6; see :meth:`Kernel.state_space`."""
        return RBFStateSpace(one_column(self, "lengthscale"), order)


class Matern(Radial):
    r"""Matern kernel with smoothness 1/2, 3/2 or 5/2.

    With :math:`a = \sqrt{2\nu}\, r`: :math:`e^{-a}`, :math:`(1 + a) e^{-a}` and
    :math:`(1 + a + a^2/3) e^{-a}`.

    Parameters
    ----------
    lengthscale : float, sequence or Tensor, default=1.0
        Positive, in the unit of the columns: one number, or one a column.
    nu : {0.5, 1.5, 2.5}, default=2.5
        Smoothness: sample paths are continuous, once, or twice differentiable.
    batch_shape : tuple of int, default=()
        Batch shape of the hyperparameters.

    Raises
    ------
    ValueError
        If nu is none of these.

    Notes
    -----
    The input gradient at coincident points is 0, for nu = 1/2 by definition.

    References
    ----------
    .. [1] C. E. Rasmussen and C. K. I. Williams, "Gaussian Processes for Machine Learning", 2006, eq. 4.17.
    """

    _config_names = ("lengthscale", "nu")

    def __init__(self, lengthscale: Any = 1.0, nu: float = 2.5, *, batch_shape: tuple[int, ...] = ()) -> None:
        if nu not in (0.5, 1.5, 2.5):
            raise ValueError(f"nu must be 0.5, 1.5 or 2.5; got {nu!r}. For nu = inf use RBF.")
        super().__init__(lengthscale, batch_shape=batch_shape)
        self.nu = float(nu)
        self.rough = self.nu == 0.5

    def profile(self, sq: Any) -> Any:
        """Return the Matern function of squared scaled distances."""
        a = safe_sqrt(2 * self.nu * sq)
        if self.nu == 0.5:
            return stable_exp(a, -1.0)
        if self.nu == 1.5:
            return (1 + a) * stable_exp(a, -1.0)
        return (1 + a + a * a / 3) * stable_exp(a, -1.0)

    def _profile_(self, sq: Tensor) -> Tensor:
        a = sq.mul_(2 * self.nu).sqrt_()
        if self.nu == 0.5:
            return stable_exp_(a, -1.0)
        decay = stable_exp(a, -1.0)
        if self.nu == 1.5:
            return a.add_(1).mul_(decay)
        # 1 + a + a^2/3 = (a^2 + 3a + 3)/3 by Horner, in place.
        return (a + 3).mul_(a).add_(3).mul_(decay).div_(3)

    @property
    def _slope_factor(self) -> float:  # type: ignore[override]
        return {0.5: -0.5, 1.5: -1.5, 2.5: -5 / 6}[self.nu]

    def _slope(self, sq: Callable[[], Tensor], value: Tensor) -> Tensor:
        a = safe_sqrt(2 * self.nu * sq())
        if self.nu == 0.5:
            return value * inverse_or_zero(a)
        decay = stable_exp(a, -1.0)
        return decay if self.nu == 1.5 else (1 + a) * decay

    def state_space(self, order: int | None = None) -> StateSpace:
        """Return the exact form, whose state has nu + 1/2 entries; see :meth:`Kernel.state_space`."""
        return MaternStateSpace(one_column(self, "lengthscale"), self.nu)


class RationalQuadratic(Radial):
    r"""Rational quadratic kernel :math:`(1 + r^2 / (2\alpha))^{-\alpha}`: a mixture of RBF lengthscales.

    Parameters
    ----------
    lengthscale : float, sequence or Tensor, default=1.0
        Positive, in the unit of the columns: one number, or one a column.
    alpha : float or Tensor, default=1.0
        Positive; small values mix lengthscales widely, infinity is the RBF.
    batch_shape : tuple of int, default=()
        Batch shape of the hyperparameters.

    References
    ----------
    .. [1] C. E. Rasmussen and C. K. I. Williams, "Gaussian Processes for Machine Learning", 2006, eq. 4.19.
    """

    _config_names = ("lengthscale", "alpha")
    alpha = positive("alpha", "Mixing exponent.")

    def __init__(self, lengthscale: Any = 1.0, alpha: Any = 1.0, *, batch_shape: tuple[int, ...] = ()) -> None:
        super().__init__(lengthscale, batch_shape=batch_shape)
        self._add_positive("alpha", alpha)

    def profile(self, sq: Any) -> Any:
        """Return (1 + sq / (2 alpha))^(-alpha), by log1p so that a large alpha keeps its digits."""
        alpha = self._own("alpha", sq)
        scaled = sq / (2 * alpha)
        return (-((1 + scaled).log() if is_lazy(sq) else scaled.log1p()) * alpha).exp()

    _slope_factor = -0.5

    def _slope(self, sq: Callable[[], Tensor], value: Tensor) -> Tensor:
        return value / (1 + sq() / (2 * self._own("alpha", value)))


class Periodic(Radial):
    r"""Periodic kernel :math:`\exp(-2 \sum_c \sin^2(\pi (x_c - y_c) / p_c) / \ell_c^2)`.

    Parameters
    ----------
    lengthscale : float, sequence or Tensor, default=1.0
        Positive, without unit: how fast the function varies within a period.
    period : float, sequence or Tensor, default=1.0
        Positive, in the unit of the columns: one number, or one a column.
    batch_shape : tuple of int, default=()
        Batch shape of the hyperparameters.

    Notes
    -----
    Evaluated as an RBF of the points on circles, (cos, sin)(2 pi x / p) / l, so it costs two columns for one.
    GPyTorch's kernel of this name divides by the lengthscale, not its square.

    References
    ----------
    .. [1] D. J. C. MacKay, "Introduction to Gaussian processes", 1998.
    """

    _config_names = ("lengthscale", "period")
    _embedding = ("log_lengthscale", "log_period")
    period = positive("period", "Period, in the unit of the columns.")

    def __init__(self, lengthscale: Any = 1.0, period: Any = 1.0, *, batch_shape: tuple[int, ...] = ()) -> None:
        super().__init__(lengthscale, batch_shape=batch_shape)
        self._add_positive("period", period, per_column=True)

    def _embed(self, x: Tensor) -> Tensor:
        period = self._hyper("period", x).unsqueeze(-2)
        if period.shape[-1] not in (1, x.shape[-1]):
            raise ValueError(
                f"period has {period.shape[-1]} entries, one a column, but the points have {x.shape[-1]} columns."
            )
        # Whole periods are taken off first, exactly; their number still counts in the gradient of the period.
        turns = (x / period).detach().round()
        angle = 2 * math.pi * (x - turns * period) / period
        return torch.cat([super()._embed(angle.cos()), super()._embed(angle.sin())], -1)

    def gram(self, pair: Pair) -> Tensor:
        """Raise: a Gram matrix has no coordinate that could be periodic."""
        raise NotImplementedError("Periodic needs points; it cannot be evaluated on a Gram matrix.")

    def profile(self, sq: Any) -> Any:
        """Return exp(-sq / 2) of squared distances between the embedded points."""
        return stable_exp(sq, -0.5)

    def _profile_(self, sq: Tensor) -> Tensor:
        return stable_exp_(sq, -0.5)

    _slope_factor = _rate = -0.5

    def _slope(self, sq: Callable[[], Tensor], value: Tensor) -> Tensor:
        return value

    def state_space(self, order: int | None = None) -> StateSpace:
        r"""Return a Fourier series of ``order`` harmonics; see :meth:`Kernel.state_space`.

        It lacks :math:`2 \sum_{j>J} e^{-z} I_j(z)`, :math:`z = 1/\ell^2`, of the variance; for order 7 and
        lengthscales 1, 0.5 and 0.2 that is 8e-8, 5e-4 and 0.13.
        """
        return PeriodicStateSpace(one_column(self, "lengthscale"), one_column(self, "period"), order)
