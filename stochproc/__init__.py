"""Modern stochastic-process models for PyTorch, as scikit-learn estimators and as building blocks.

Importing this package loads the standard library alone. Each part is loaded when it is first used:
``stochproc.gp``, ``stochproc.tensor``, ``stochproc.kernels``, ``stochproc.solvers``,
``stochproc.datasets``, ``stochproc.distributed``.
"""

import importlib as _importlib
from types import ModuleType as _ModuleType

__version__ = "0.1.0.dev0"

_PARTS = ("datasets", "distributed", "exceptions", "gp", "kernels", "ot", "solvers", "tensor")

__all__ = ["__version__", *_PARTS]


def __getattr__(name: str) -> _ModuleType:
    if name in _PARTS:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
