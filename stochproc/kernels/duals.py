"""What one activation of an infinitely wide layer does to a kernel, on the state of a pair of points.

A dual maps a :class:`~stochproc.kernels.Pair` to that of the next layer; ``diag`` does the same to squared norms and
``derivative`` gives the factor of the neural tangent kernel. The state is carried in defect form, so that nearby
points keep their digits at any depth.
"""

from stochproc.kernels._dual_base import Dual
from stochproc.kernels._duals import (
    ABRelu,
    Abs,
    Cos,
    Erf,
    Exp,
    Gelu,
    LeakyRelu,
    Numeric,
    Rbf,
    Relu,
    Sign,
    Sin,
)

__all__ = [
    "ABRelu",
    "Abs",
    "Cos",
    "Dual",
    "Erf",
    "Exp",
    "Gelu",
    "LeakyRelu",
    "Numeric",
    "Rbf",
    "Relu",
    "Sign",
    "Sin",
]
