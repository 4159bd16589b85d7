"""Warnings of the package point at the line of the caller, however deep inside they were found."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]

# What stands between a caller and the code of the package: decorators and wrappers of methods.
PASSED = ("stochproc", "sklearn", "torch", "jaxtyping", "beartype")


def warn_caller(message: str, category: type[Warning]) -> None:
    """Issue a warning that names the line of the user's code that led here."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in PASSED:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
