"""Centring and scaling of inputs and targets, and the way back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Standardiser"]


class Standardiser(NamedTuple):
    """An affine map by column, or with one scale for all columns.

    Parameters
    ----------
    shift, scale : Tensor of shape (d,)
    """

    shift: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, data: Tensor, how: bool | str) -> Standardiser:
        """Learn the map: by column (True), one scale for all columns ("global"), or none (False).

        Constant columns keep unit scale. What counts as constant is a spread below rounding of the values.
        """
        d = data.shape[1]
        if how is False:
            return cls(data.new_zeros(d), data.new_ones(d))
        shift = data.mean(0)
        centred = data - shift
        spread = centred.square().mean(0).sqrt()
        rounding = 10 * torch.finfo(data.dtype).eps * data.abs().amax(0)
        if how == "global":
            spread = centred.square().mean().sqrt().expand(d)
            rounding = rounding.amax().expand(d)
        return cls(shift, torch.where(spread > rounding, spread, 1.0))

    def apply(self, data: Tensor) -> Tensor:
        """Standardise rows."""
        return (data - self.shift) / self.scale
