"""The KeOps backend: symbolic matrices, whether they can be used here, and one warning where they cannot."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from typing import Any

import torch
from torch import Tensor

from stochproc.exceptions import BackendError, BackendWarning
from stochproc.kernels._dispatch import THRESHOLDS

__all__ = [
    "column_of",
    "constant_of",
    "keops_status",
    "pair_of",
    "parameter_of",
    "parameters_of",
    "prepare_environment",
    "row_of",
    "total_of",
    "usable_or_warn",
]

_COMPILERS = ("g++", "clang++")
# What the probe of a (dtype, device type) found: None if KeOps works, else the reason why not.
_probed: dict[tuple[torch.dtype, str], str | None] = {}
_warned = False


def prepare_environment() -> None:
    """Set what KeOps reads when it is first imported; nothing the user has set is changed."""
    # The first alone does not silence keopscore.
    for name in ("PYKEOPS_VERBOSE", "KEOPS_VERBOSE"):
        os.environ.setdefault(name, "0")
    # KeOps takes no lock when it compiles or rewrites its cache index, so each worker gets its own folder.
    worker = os.environ.get("PYTEST_XDIST_WORKER") or os.environ.get("LOCAL_RANK")
    if worker and "KEOPS_CACHE_FOLDER" not in os.environ:
        os.environ["KEOPS_CACHE_FOLDER"] = os.path.join(
            os.path.expanduser("~"), ".cache", "stochproc-keops", f"worker-{worker}"
        )


def _lazy_tensor() -> Any:
    prepare_environment()
    # pykeops 2.3 uses torch.jit and CUDA look-ups that warn on import; none of it is for our users.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pykeops.torch import LazyTensor
    return LazyTensor


def pair_of(x: Tensor, y: Tensor) -> tuple[Any, Any]:
    """Return x as rows and y as columns of symbolic matrices."""
    lazy = _lazy_tensor()
    return lazy(x.contiguous().unsqueeze(-2)), lazy(y.contiguous().unsqueeze(-3))


def column_of(v: Tensor) -> Any:
    """Return v (*batch, m, p) as something that depends on the columns alone."""
    return _lazy_tensor()(v.contiguous().unsqueeze(-3))


def row_of(v: Tensor) -> Any:
    """Return v (*batch, n, p) as something that depends on the rows alone."""
    return _lazy_tensor()(v.contiguous().unsqueeze(-2))


def parameter_of(value: Tensor, like: Any) -> Any:
    """Return a hyperparameter (*batch, 1) as a differentiable constant of a formula with ``like`` in it."""
    first = next(iter(like.variables))
    return _lazy_tensor()(value.to(dtype=first.dtype, device=first.device).reshape(*value.shape[:-1], 1, 1, 1))


def parameters_of(values: Tensor) -> Any:
    """Return numbers (p,) as one differentiable vector that depends on neither rows nor columns."""
    return _lazy_tensor()(values.contiguous().reshape(1, 1, -1))


def constant_of(value: Any, x: Tensor) -> Any:
    """Return a number, or a 0-dim tensor that may require a gradient, as a factor of formulas of the points x."""
    if not isinstance(value, Tensor):
        return float(value)
    return _lazy_tensor()(value.reshape(*[1] * (x.ndim + 1)))


def total_of(z: Any, x: Tensor, n_terms: int, *, over_rows: bool = False, ranges: Any = None) -> Tensor:
    """Sum a symbolic matrix over its ``n_terms`` columns (or rows); a long float32 sum is taken in float64."""
    z.ranges = ranges
    long = x.dtype == torch.float32 and n_terms > THRESHOLDS["float32_max_terms"]
    return z.sum(z.nbatchdims + (0 if over_rows else 1), **({"dtype_acc": "float64"} if long else {}))


def keops_status(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> str | None:
    """Probe KeOps once per process, dtype and kind of device.

    Parameters
    ----------
    dtype : torch.dtype, default=torch.float32
    device : torch.device or str, default="cpu"

    Returns
    -------
    str or None
        None if KeOps can be used, else the reason why not.

    Notes
    -----
    The first call compiles a small formula, some 20 seconds, unless it lies in the KeOps cache.
    """
    device = torch.device(device)
    key = (dtype, device.type)
    if key not in _probed:
        _probed[key] = _probe(dtype, device)
    return _probed[key]


def _probe(dtype: torch.dtype, device: torch.device) -> str | None:
    compiler = os.environ.get("CXX")
    found = shutil.which(compiler) if compiler else next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        wanted = f"CXX={compiler}" if compiler else " or ".join(_COMPILERS)
        return f"no C++ compiler was found ({wanted})"
    try:
        x = torch.linspace(0, 1, 4, dtype=dtype, device=device)[:, None]
        rows, cols = pair_of(x, x)
        got = ((-((rows - cols) ** 2)).exp() @ torch.ones_like(x)).squeeze(-1)
        want = (-((x - x.T) ** 2)).exp().sum(-1)
    # KeOps fails in many ways of its own making (ModuleNotFoundError without a compiler, EOFError on a corrupt
    # cache, SystemExit from its checks): whatever it is, the chunked backend gives the same numbers.
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if not torch.allclose(got, want, rtol=math.sqrt(torch.finfo(dtype).eps)):
        return f"a 4-point probe disagreed with the dense result by {float((got - want).abs().max()):.2g}"
    return None


def usable_or_warn(x: Tensor, *, reason: str | None = None, strict: bool = False) -> bool:
    """Return whether KeOps can run for these points; say once per process why not, or raise if ``strict``."""
    global _warned
    if reason is None:
        reason = keops_status(x.dtype, x.device)
    if reason is None:
        return True
    remedy = (
        "Install a C++ compiler, or point CXX at one; if the reason is the cache, set KEOPS_CACHE_FOLDER to a "
        "writable folder or empty it with pykeops.clean_pykeops()."
    )
    if strict:
        raise BackendError(f"the keops backend cannot be used: {reason}. {remedy}")
    if not _warned:
        _warned = True
        warnings.warn(
            f"the keops backend cannot be used: {reason}. The chunked backend is used instead and gives the same "
            f"numbers. {remedy}",
            BackendWarning,
            stacklevel=4,
        )
    return False
