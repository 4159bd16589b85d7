"""What a search may move of a prior of the scale, and how far."""

from __future__ import annotations

from typing import Any

import torch

from stochproc._search import bounds_around, is_log
from stochproc.gp._scale_base import ScalePrior

__all__ = ["free_numbers"]


def free_numbers(prior: ScalePrior) -> list[tuple[str, torch.Tensor, Any]]:
    """Return name, parameter and bounds of everything of a prior that is not frozen.

    Shapes are only weakly identified by one data set (spec/gp_scale_mixture 10): the likelihood is flat towards a scale
    that is known, and a search without bounds goes on to where the density is narrower than any quadrature. Scales and
    what priors of users have are not bounded.
    """
    found = []
    for path, part in prior.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            bounds: Any = part.search_ranges.get(name) if isinstance(part, ScalePrior) else None
            if bounds is not None:
                if is_log(name):
                    bounds = bounds_around(parameter, bounds)
                else:
                    value = parameter.detach()
                    bounds = (value.clamp(max=bounds[0]), value.clamp(min=bounds[1]))
            found.append((f"{path}.{name}" if path else name, parameter, bounds))
    return found
