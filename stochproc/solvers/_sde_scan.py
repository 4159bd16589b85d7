"""Steps of the SDE solvers written here, and the loop over them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochproc.solvers._sde_checks import IN_PLACE, version
from stochproc.solvers._sde_grid import TimeGrid
from stochproc.solvers._sde_noise import Draws

__all__ = ["Advance", "State", "scan"]

State = tuple[Tensor, ...]
"""The state of the equation, then what else a method carries from step to step."""

Advance = Callable[[State, int, int, Draws], tuple[State, list[Tensor]]]
"""Carry a state over the steps from start to stop; also the states at the requested times in there."""

Step = Callable[[Tensor, Tensor, Tensor, Any, Tensor], Tensor]


def scan(sde: Any, method: str, noise_type: str, grid: TimeGrid, y0: Tensor) -> Advance:
    """Return the loop of one method on one grid; nothing but an own step is checked inside it."""
    own_times = grid.steps.ndim > 1
    times = grid.times.to(y0.device, y0.dtype).unbind(0)
    # Python floats enter the fused kernels as numbers: no tensor is made of a step size.
    steps: Any = grid.steps.to(y0.device, y0.dtype).unbind(0) if own_times else grid.steps.tolist()
    wanted = [False] * (grid.n_steps + 1)
    for i in grid.output:
        wanted[i] = True
    add_drift = torch.addcmul if own_times else _add_scaled
    if method == "step":
        step = _own_step(sde, y0, times[0])
    else:
        step = (_euler if method == "euler" else _heun)(sde, add_drift, _ADD_NOISE.get(noise_type, _add_product))

    def advance(state: State, start: int, stop: int, draws: Draws) -> tuple[State, list[Tensor]]:
        (y,) = state
        found = []
        for i, noise in enumerate(draws(), start):
            y = step(y, times[i], times[i + 1], steps[i], noise)
            if wanted[i + 1]:
                found.append(y)
        return (y,), found

    return advance


def _add_scaled(y: Tensor, f: Tensor, h: float) -> Tensor:
    return torch.add(y, f, alpha=h)


def _add_single(y: Tensor, g: Tensor, dw: Tensor) -> Tensor:
    """One Brownian motion for all components: g has shape (*batch, d, 1) and dw (*batch, 1)."""
    return torch.addcmul(y, g.squeeze(-1), dw)


def _add_product(y: Tensor, g: Tensor, dw: Tensor) -> Tensor:
    return y + (g @ dw.unsqueeze(-1)).squeeze(-1)


_ADD_NOISE: "dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]" = {
    "diagonal": torch.addcmul,
    "scalar": _add_single,
}


def _euler(sde: Any, add_drift: Any, add_noise: Any) -> Step:
    """Euler-Maruyama, Itô: y + f h + g dW."""
    drift, diffusion = sde.drift, sde.diffusion

    def step(y: Tensor, t: Tensor, after: Tensor, h: Any, dw: Tensor) -> Tensor:
        return add_noise(add_drift(y, drift(t, y), h), diffusion(t, y), dw)

    return step


def _heun(sde: Any, add_drift: Any, add_noise: Any) -> Step:
    """Heun, Stratonovich: the mean of f h + g dW at both ends, the far end predicted by an Euler step."""
    drift, diffusion = sde.drift, sde.diffusion

    def step(y: Tensor, t: Tensor, after: Tensor, h: Any, dw: Tensor) -> Tensor:
        f, g = drift(t, y), diffusion(t, y)
        ahead = add_noise(add_drift(y, f, h), g, dw)
        f, g = f + drift(after, ahead), g + diffusion(after, ahead)
        return add_noise(add_drift(y, f, 0.5 * h), g, 0.5 * dw)

    return step


def _own_step(sde: Any, y0: Tensor, start: Tensor) -> Step:
    """The step of the equation itself; it is checked each time, as it is never probed beforehand."""
    own = sde.step
    shape, dtype = y0.shape, y0.dtype

    def step(y: Tensor, t: Tensor, after: Tensor, h: Any, noise: Tensor) -> Tensor:
        before = version(y)
        after_step = own(t, y, h, noise)
        # Without a count of changes the first step, which is given a copy of y0, stands for all.
        if version(y) != before or (before < 0 and t is start and not torch.equal(y, y0)):
            raise ValueError(IN_PLACE.format("step"))
        if after_step.shape != shape or after_step.dtype != dtype:
            raise ValueError(
                f"sde.step must return a tensor of shape {tuple(shape)} and {dtype}, like y0; got "
                f"{tuple(after_step.shape)} and {after_step.dtype} at t = {t.flatten()[0].item():.6g}."
            )
        return after_step

    return step
