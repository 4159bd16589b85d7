"""From names, functions and GPyTorch kernels to kernels of this library, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochproc.kernels._arc_cosine import ArcCosine
from stochproc.kernels._base import Kernel, check_points
from stochproc.kernels._composite import ActiveDims, Product, Scale, Sum
from stochproc.kernels._dot import Linear, Polynomial
from stochproc.kernels._stationary import RBF, Matern, Periodic, RationalQuadratic

if TYPE_CHECKING:
    import gpytorch

__all__ = ["KERNEL_NAMES", "as_gpytorch", "as_kernel", "kernel_from_config", "register_kernel"]

_BY_NAME: dict[str, Callable[[Any], Kernel]] = {
    "rbf": lambda lengthscale: RBF(lengthscale),
    "matern12": lambda lengthscale: Matern(lengthscale, nu=0.5),
    "matern32": lambda lengthscale: Matern(lengthscale, nu=1.5),
    "matern52": lambda lengthscale: Matern(lengthscale, nu=2.5),
    "rational_quadratic": lambda lengthscale: RationalQuadratic(lengthscale),
    "periodic": lambda lengthscale: Periodic(lengthscale),
    "linear": lambda _: Linear(),
    "quadratic": lambda _: Polynomial(2),
    "cubic": lambda _: Polynomial(3),
    "arc_cosine0": lambda _: ArcCosine(0),
    "arc_cosine1": lambda _: ArcCosine(1),
}

#: Names that :func:`as_kernel` and the estimators take.
KERNEL_NAMES: tuple[str, ...] = tuple(_BY_NAME)

#: Classes that can be written as names and numbers and rebuilt.
LIBRARY_KERNELS: dict[str, type[Kernel]] = {
    c.__name__: c
    for c in (
        RBF,
        Matern,
        RationalQuadratic,
        Periodic,
        Linear,
        Polynomial,
        ArcCosine,
        Sum,
        Product,
        Scale,
        ActiveDims,
    )
}


def register_kernel(cls: type[Kernel]) -> None:
    """Let a kernel class defined elsewhere be written as names and numbers and rebuilt.

    Parameters
    ----------
    cls : type
        Subclass of Kernel whose ``config`` adds to :meth:`Kernel.config` what its ``from_options`` (a classmethod,
        given the config without the name of the class) or, without one, its constructor takes.

    Raises
    ------
    TypeError
        If ``cls`` is not a subclass of Kernel.
    ValueError
        If another class of this name is known.

    Examples
    --------
    >>> from stochproc.kernels import RBF, kernel_from_config, register_kernel
    >>> class Doubled(RBF):
    ...     def profile(self, sq):
    ...         return 2 * super().profile(sq)
    >>> register_kernel(Doubled)
    >>> kernel_from_config(Doubled(0.5).config())
    Doubled(lengthscale=0.5)
    """
    if not (isinstance(cls, type) and issubclass(cls, Kernel)):
        raise TypeError(f"cls must be a subclass of Kernel; got {cls!r}.")
    known = LIBRARY_KERNELS.setdefault(cls.__name__, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"a kernel class named {cls.__name__!r} is known already, of {known.__module__}.")
    LIBRARY_KERNELS[cls.__name__] = cls


class _Function(Kernel):
    """A user's function of two blocks of points."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Evaluate the user's function and check its shape."""
        x, y = check_points(x, y)
        value = self.function(x, y)
        shape = (x.shape[-2], y.shape[-2])
        if not isinstance(value, Tensor) or value.shape[-2:] != shape:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the kernel function must return a tensor of shape (..., {shape[0]}, {shape[1]}); got {came}."
            )
        return value


def as_kernel(obj: Any, *, n_columns: int | None = None) -> Kernel:
    """Return a kernel of this library for whatever describes one.

    Parameters
    ----------
    obj : Kernel, str, gpytorch.kernels.Kernel or callable
        A kernel of this library is returned as it is. A string is one of ``KERNEL_NAMES``. A GPyTorch kernel
        is wrapped, not copied: training the one trains the other. A callable takes two blocks of points,
        (*batch, n, d) and (*batch, m, d), and returns (*batch, n, m); of a ``torch.nn.Module`` the parameters
        are hyperparameters.
    n_columns : int, default=None
        With a string: give the kernel one lengthscale a column. None means one for all.

    Returns
    -------
    Kernel

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If ``obj`` is none of these.

    Examples
    --------
    >>> from stochproc.kernels import as_kernel
    >>> as_kernel("matern52", n_columns=3).lengthscale.shape
    torch.Size([3])
    """
    if isinstance(obj, Kernel):
        return obj
    if isinstance(obj, str):
        if obj not in _BY_NAME:
            raise ValueError(f"unknown kernel {obj!r}; valid: {', '.join(KERNEL_NAMES)}, or a kernel object.")
        return _BY_NAME[obj](1.0 if n_columns is None else torch.ones(n_columns, dtype=torch.float64))
    if _is_gpytorch(obj):
        from stochproc.kernels._gpytorch import WrappedGPyTorch

        return WrappedGPyTorch(obj)
    if callable(obj) and not isinstance(obj, type):
        return _Function(obj)
    raise TypeError(
        f"kernel must be a Kernel, a name, a gpytorch kernel or a function of two blocks; got {type(obj).__name__}."
        + (" It is a class: make an object of it." if isinstance(obj, type) else "")
    )


def _is_gpytorch(obj: Any) -> bool:
    # By name first: importing gpytorch to look at an object that is not its own would cost seconds.
    if not any(c.__module__.split(".")[0] == "gpytorch" for c in type(obj).__mro__):
        return False
    from stochproc.kernels._gpytorch import gpytorch

    return isinstance(obj, gpytorch.kernels.Kernel)


def as_gpytorch(kernel: Any) -> gpytorch.kernels.Kernel:
    """Return a GPyTorch kernel that evaluates ``kernel`` and shares its hyperparameters.

    Parameters
    ----------
    kernel : Kernel, str, gpytorch.kernels.Kernel or callable
        Whatever :func:`as_kernel` takes.

    Returns
    -------
    gpytorch.kernels.Kernel
        Works in ``ExactGP`` and ``ApproximateGP`` models, and in sums and products of GPyTorch kernels. Large
        matrices stay a :class:`KernelOperator`.

    Examples
    --------
    >>> import torch
    >>> from stochproc.kernels import RBF, as_gpytorch
    >>> as_gpytorch(RBF(2.0))(torch.zeros(3, 1)).to_dense().shape
    torch.Size([3, 3])
    """
    from stochproc.kernels._gpytorch import AsGPyTorch, WrappedGPyTorch

    kernel = as_kernel(kernel)
    return kernel.base if isinstance(kernel, WrappedGPyTorch) else AsGPyTorch(kernel)


def kernel_from_config(config: Mapping[str, Any]) -> Kernel:
    """Rebuild a kernel from :meth:`Kernel.config`.

    Parameters
    ----------
    config : mapping
        Nested names and numbers.

    Returns
    -------
    Kernel

    Raises
    ------
    ValueError
        If a class is not one of this library's.
    """
    options = dict(config)
    name = options.pop("class")
    if "batch_shape" in options:
        options["batch_shape"] = tuple(options["batch_shape"])
    if name in ("Sum", "Product"):
        parts = [kernel_from_config(c) for c in options["kernels"]]
        return Sum(*parts) if name == "Sum" else Product(*parts)
    if name in ("Scale", "ActiveDims"):
        options["kernel"] = kernel_from_config(options["kernel"])
        return Scale(**options) if name == "Scale" else ActiveDims(**options)
    if name not in LIBRARY_KERNELS:
        raise ValueError(f"unknown kernel class {name!r}; valid: {', '.join(LIBRARY_KERNELS)}.")
    cls: Any = LIBRARY_KERNELS[name]
    rebuilt: Kernel = cls.from_options(options) if hasattr(cls, "from_options") else cls(**options)
    return rebuilt
