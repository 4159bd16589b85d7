"""What a regressor says of its data beside the search: targets that do not vary or fit, noise below rounding."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from stochproc._standardise import varies
from stochproc.exceptions import DataWarning, NumericalWarning
from stochproc.gp._hyperparameters import NOISE_FLOOR
from stochproc.gp._independent_posterior import IndependentPosterior

__all__ = ["check_size", "warn_if_coarse", "warn_if_constant"]

# Sums of squares outside are beyond what the integrals over the scale take.
_SIZES = (1e-140, 1e140)


def check_size(targets: Tensor) -> None:
    """Raise ValueError where the squares of targets that are not standardised would overflow or vanish."""
    size = targets.abs().max().item()
    if size and not _SIZES[0] <= size <= _SIZES[1]:
        raise ValueError(
            f"y must be 0 or between {_SIZES[0]:g} and {_SIZES[1]:g} in size where it is not standardised; got values "
            f"up to {size:.3g}. Rescale it, or use normalize_y=True."
        )


def warn_if_coarse(estimator: Any) -> None:
    """Warn where float32 cannot hold the kernel's diagonal and the noise in one number."""
    X, posterior = estimator.posterior_.X, estimator.posterior_
    with torch.no_grad():
        level = NOISE_FLOOR[X.dtype] * estimator.kernel_.diag(X).mean().item()
    share = estimator.noise_ / (posterior.typical_scale if isinstance(posterior, IndependentPosterior) else 1.0)
    if X.dtype == torch.float32 and share < 0.99 * level:
        warnings.warn(
            f"noise is {share:.3g} and the mean of the kernel's diagonal {level / NOISE_FLOOR[X.dtype]:.3g}: "
            'in float32 a factor of their sum keeps few digits. Use dtype="float64" or more noise.',
            NumericalWarning,
            stacklevel=4,
        )


def warn_if_constant(targets: Tensor, single: bool) -> Tensor:
    """Warn of outputs that do not vary; return which they are."""
    flat = ~varies(targets)
    if len(targets) > 1 and bool(flat.any()):
        which = "y" if single else f"{int(flat.sum())} column(s) of y"
        # Through _fit and fit, to the caller.
        warnings.warn(f"{which} does not vary; it is centred and keeps unit scale.", DataWarning, stacklevel=4)
    return flat
