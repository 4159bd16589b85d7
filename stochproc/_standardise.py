"""Centring and scaling of inputs and targets, and the way back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Standardiser", "varies"]


class Standardiser(NamedTuple):
    """An affine map by column, or with one scale for all columns, kept and applied in float64.

    The precision of the computation starts behind the map: in float32 a column with a large offset would be
    constant before it is centred.

    Parameters
    ----------
    shift, scale : Tensor of shape (d,)
    """

    shift: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]

    @classmethod
    def fit(
        cls, data: Float[Tensor, "n d"], how: bool | str, name: str, weight: Float[Tensor, " n"] | None = None
    ) -> Standardiser:
        """Learn the map: by column (True), one scale for all columns ("global"), or none (False).

        Constant columns keep unit scale. What counts as constant is a spread below rounding of the values.

        Parameters
        ----------
        data : Tensor of shape (n, d)
            Float64.
        how : bool or "global"
        name : str
            What errors call the data.
        weight : Tensor of shape (n,) or None, default=None
            How often each row counts, positive; float64.

        Raises
        ------
        ValueError
            If a mean or scale is not finite.
        """
        d = data.shape[1]
        if how is False:
            return cls(data.new_zeros(d), data.new_ones(d))
        largest, centre, centred = _centred(data, together=how == "global", weight=weight)
        # Values are at most 1 in size here, so that no square overflows or vanishes.
        variance = _mean(centred.square(), weight)
        rounding = _rounding(data)
        spread = variance.mean().sqrt().expand(d) if how == "global" else variance.sqrt()
        found = cls(centre * largest, torch.where(spread > rounding, spread * largest, 1.0))
        if not bool((found.shift.isfinite() & found.scale.isfinite() & (found.scale > 0)).all()):
            raise ValueError(f"{name} must have columns of finite mean and positive scale in float64; rescale it.")
        return found

    def apply(self, data: Float[Tensor, "n d"], dtype: torch.dtype, name: str) -> Float[Tensor, "n d"]:
        """Standardise float64 rows and return them in the precision of the computation.

        Raises
        ------
        ValueError
            If a standardised value is beyond the range of ``dtype``.
        """
        return within_range((data - self.shift) / self.scale, dtype, f"{name} after standardising")


def varies(data: Float[Tensor, "n d"]) -> Bool[Tensor, " d"]:
    """Which columns differ from their mean by more than rounding of the values."""
    return _centred(data, together=False)[2].abs().amax(0) > _rounding(data)


def within_range(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Cast, or raise ValueError where the result would be infinite."""
    cast = value.to(dtype)
    if not bool(cast.isfinite().all()):
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} must lie within the range of {kind}, up to {torch.finfo(dtype).max:.2g}; got values up to "
            f"{value.abs().max().item():.3g}. Rescale the data{'' if kind == 'float64' else ', or use float64'}."
        )
    return cast


def _rounding(data: Tensor) -> float:
    return 10 * torch.finfo(data.dtype).eps


def _mean(data: Tensor, weight: Tensor | None) -> Tensor:
    return data.mean(0) if weight is None else weight / weight.sum() @ data


def _centred(data: Tensor, *, together: bool, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Largest size of each column (or of all), and mean of and deviations from it of the columns over that."""
    largest = data.abs().amax(0)
    if together:
        largest = largest.amax().expand_as(largest)
    largest = torch.where(largest > 0, largest, 1.0)
    unit = data / largest
    centre = _mean(unit, weight)
    return largest, centre, unit - centre
