"""Kernels, defined once and evaluated by any backend, and reductions over all pairs of points."""

from stochproc.kernels import duals
from stochproc.kernels._arc_cosine import ArcCosine
from stochproc.kernels._base import Kernel, Prepared
from stochproc.kernels._composite import ActiveDims, Product, Scale, Sum
from stochproc.kernels._convert import KERNEL_NAMES, as_gpytorch, as_kernel, kernel_from_config, register_kernel
from stochproc.kernels._cost_matrix import cost_matrix
from stochproc.kernels._dispatch import select_backend
from stochproc.kernels._dot import Dot, Linear, Polynomial
from stochproc.kernels._half_angles import HalfAngles
from stochproc.kernels._keops import keops_status
from stochproc.kernels._keops_pair import KeopsPair, KeopsValue
from stochproc.kernels._operator import KernelOperator
from stochproc.kernels._pair import Pair
from stochproc.kernels._pair_plain import PlainPair, Rounding
from stochproc.kernels._reduce import argmin, kmin, matvec
from stochproc.kernels._soft import expsum, logsumexp
from stochproc.kernels._softmax_pass import SoftmaxPass, softmax_pass
from stochproc.kernels._state_space import StateSpace
from stochproc.kernels._stationary import RBF, Matern, Periodic, Radial, RationalQuadratic
from stochproc.kernels._support import support

__all__ = [
    "KERNEL_NAMES",
    "RBF",
    "ActiveDims",
    "ArcCosine",
    "Dot",
    "HalfAngles",
    "KeopsPair",
    "KeopsValue",
    "Kernel",
    "KernelOperator",
    "Linear",
    "Matern",
    "Pair",
    "Periodic",
    "PlainPair",
    "Polynomial",
    "Prepared",
    "Product",
    "Radial",
    "RationalQuadratic",
    "Rounding",
    "Scale",
    "SoftmaxPass",
    "StateSpace",
    "Sum",
    "argmin",
    "as_gpytorch",
    "as_kernel",
    "cost_matrix",
    "duals",
    "expsum",
    "keops_status",
    "kernel_from_config",
    "kmin",
    "logsumexp",
    "matvec",
    "register_kernel",
    "select_backend",
    "softmax_pass",
    "support",
]
