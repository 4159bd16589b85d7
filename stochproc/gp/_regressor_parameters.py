"""Parameters of the regressor: their checks, and the kernel that they describe."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from stochproc._checks import check_choice, check_integer, check_positive
from stochproc._options import DTYPES, check_options, plain_bool
from stochproc._random import make_generator
from stochproc.gp._arch_kernel import NetworkKernel
from stochproc.gp._arch_names import kernel_of_network
from stochproc.gp._large_system import check_cg
from stochproc.gp._scale_importance import LEAST_SAMPLES
from stochproc.kernels import Kernel, Periodic, Radial, Scale, as_kernel
from stochproc.solvers import CG

__all__ = ["check_parameters", "check_random_state", "make_kernel"]


def check_parameters(estimator: Any) -> None:
    """Raise TypeError or ValueError, naming the parameter, unless all are of the right kind and in range."""
    check_options(estimator, automatic_starts=True)
    check_choice("noise_model", estimator.noise_model, ("scaled", "independent"))
    check_choice("inference", estimator.inference, ("auto", "exact", "importance"))
    check_integer("importance_samples", estimator.importance_samples, LEAST_SAMPLES)
    if estimator.inference == "importance" and estimator.noise_model != "scaled":
        raise ValueError(f'inference="importance" needs noise_model="scaled"; got {estimator.noise_model!r}.')
    check_choice("normalize_X", plain_bool(estimator.normalize_X), (True, False, "global"))
    check_choice("dtype", estimator.dtype, tuple(DTYPES))
    _check_solver(estimator)
    check_positive("noise", estimator.noise, zero=True)
    check_random_state(estimator.random_state)


def check_random_state(value: Any) -> None:
    """Raise TypeError or ValueError unless a generator can be made of the value; its own state does not move on."""
    make_generator(value if isinstance(value, torch.Generator) else copy.deepcopy(value))


def _check_solver(estimator: Any) -> None:
    if isinstance(estimator.solver, CG):
        check_cg(estimator.solver)
    else:
        check_choice("solver", estimator.solver, ("auto", "cholesky", "cg"))
    if (isinstance(estimator.solver, CG) or estimator.solver == "cg") and estimator.noise_model != "scaled":
        raise ValueError(f'solver="cg" needs noise_model="scaled"; got {estimator.noise_model!r}.')
    if estimator.hyper_subset is not None:
        check_integer("hyper_subset", estimator.hyper_subset, 2)


def make_kernel(kernel: Any, n_columns: int, searched: bool) -> Kernel:
    """Return a copy of the kernel that a parameter describes, in float64 and ready for a search.

    Raises
    ------
    TypeError
        If it describes none.
    ValueError
        If its name is unknown or its hyperparameters are a batch.
    """
    named = isinstance(kernel, str)
    given = kernel if named else copy.deepcopy(kernel)
    made = kernel_of_network(given, n_columns) or as_kernel(given, n_columns=n_columns)
    batches: list[Any] = [getattr(m, "batch_shape", ()) for m in made.modules()]
    if any(batches):
        batch = tuple(next(filter(None, batches)))
        raise ValueError(f"kernel must be a single one, without batch_shape; got a batch of shape {batch}.")
    if isinstance(made, Scale):
        made.log_outputscale.requires_grad_(False)
    inner: Any = made.kernel if isinstance(made, Scale) else made
    if isinstance(inner, NetworkKernel):
        inner.freeze_last()
    if named and searched and isinstance(made, Radial) and not isinstance(made, Periodic):
        # Standardised points are about sqrt(2 d) apart: from a lengthscale of 1 a search with many columns
        # starts at a kernel matrix that is the identity, with no gradient to follow.
        made.lengthscale = math.sqrt(n_columns)
    # GPyTorch's parameters are float32 unless asked, too coarse for the search.
    return made.double()
