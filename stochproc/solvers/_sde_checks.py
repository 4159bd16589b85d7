"""What ``integrate`` asks of an equation, a method and a noise tensor before the first step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochproc._checks import check_choice, check_same_kind
from stochproc.solvers._sde_grid import TimeGrid

__all__ = [
    "IN_PLACE",
    "SDE_TYPES",
    "check_adjoint",
    "check_method",
    "check_noise",
    "check_own_times",
    "noise_shape",
    "version",
]

SCAN_METHODS = ("euler", "heun", "step")
# Which equations a method solves. Where the noise is additive both readings agree.
SDE_TYPES = {
    "euler": ("ito",),
    "milstein": ("ito", "stratonovich"),
    "srk": ("ito",),
    "heun": ("stratonovich",),
    "midpoint": ("stratonovich",),
    "euler_heun": ("stratonovich",),
    "reversible_heun": ("stratonovich",),
    "log_ode": ("stratonovich",),
}
NOT_FOR_GENERAL_NOISE = ("milstein", "srk")
IN_PLACE = "sde.{} must not change y in place; got a changed y: write y + dy in place of y += dy or y.add_(dy)."
NOISE_TYPES = ("diagonal", "scalar", "additive", "general")


def check_method(sde: Any, method: str, backend: str) -> None:
    """Unknown method, missing parts of the equation, or a method for other equations."""
    if backend == "scan" and method not in SCAN_METHODS:
        hint = ", which backend='torchsde' has" if method in SDE_TYPES else ""
        raise ValueError(f"method must be one of 'euler', 'heun', 'step' with backend='scan'; got {method!r}{hint}.")
    if backend == "torchsde" and method not in SDE_TYPES:
        hint = ", which needs backend='scan'" if method == "step" else ""
        raise ValueError(
            f"method must be one of {', '.join(map(repr, SDE_TYPES))} with backend='torchsde'; got {method!r}{hint}."
        )
    if method == "step":
        _check_has(sde, "step", "noise_shape")
        return
    if not hasattr(sde, "drift") and hasattr(sde, "step"):
        raise TypeError(f"sde must have drift and diffusion for method={method!r}; its own step is method='step'.")
    _check_has(sde, "drift", "diffusion", "noise_type", "sde_type")
    check_choice("sde.noise_type", sde.noise_type, NOISE_TYPES)
    check_choice("sde.sde_type", sde.sde_type, ("ito", "stratonovich"))
    if sde.noise_type == "general" and method in NOT_FOR_GENERAL_NOISE:
        raise ValueError(f"method {method!r} needs diagonal, scalar or additive noise; got sde.noise_type 'general'.")
    if sde.noise_type != "additive" and sde.sde_type not in SDE_TYPES[method]:
        own = "euler" if sde.sde_type == "ito" else "heun"
        others = [m for m, types in SDE_TYPES.items() if sde.sde_type in types and m != own]
        raise ValueError(
            f"method {method!r} does not solve equations with sde.sde_type {sde.sde_type!r} and noise that is not "
            f"additive: use {own!r}, or with backend='torchsde' one of {', '.join(map(repr, others))}."
        )


def _check_has(sde: Any, *names: str) -> None:
    for name in names:
        if not hasattr(sde, name):
            raise TypeError(f"sde must have {name}; got {type(sde).__name__} without it.")


def check_own_times(grid: TimeGrid, y0: Tensor, backend: str) -> None:
    if grid.steps.ndim == 1:
        return
    if backend == "torchsde":
        raise ValueError("ts must have shape (n_times,) with backend='torchsde'; got a batch of times.")
    batch = tuple(y0.shape[:-1])
    if not grid.fits(batch):
        raise ValueError(f"ts must have a batch that broadcasts to {batch}, that of y0; got {grid.batch}.")


def check_adjoint(sde: Any, backend: str, adjoint: bool, every: "int | None", noise: "Tensor | None") -> None:
    if not adjoint:
        return
    if backend != "torchsde":
        raise ValueError("adjoint must be False with backend='scan', which has checkpoint_every instead; got True.")
    if every is not None:
        raise ValueError(f"checkpoint_every must be None with adjoint=True; got {every}.")
    if not isinstance(sde, torch.nn.Module):
        raise TypeError(f"sde must be a torch.nn.Module with adjoint=True; got {type(sde).__name__}.")
    if noise is not None and noise.requires_grad:
        raise ValueError("noise must not require gradients with adjoint=True; got a tensor that does.")


@torch.no_grad()
def noise_shape(sde: Any, method: str, y0: Tensor, grid: TimeGrid, noise: "Tensor | None") -> tuple[int, ...]:
    """Shape of the noise of one step; evaluates drift and diffusion once to find it and to check theirs."""
    if method == "step":
        own = tuple(sde.noise_shape)
        if not all(isinstance(k, int) and k >= 0 for k in own):
            raise ValueError(f"sde.noise_shape must be a tuple of sizes; got {sde.noise_shape!r}.")
        return (*y0.shape[:-1], *own)
    t = grid.times[0].to(y0.device, y0.dtype)
    f, g = _untouched("drift", sde.drift, t, y0), _untouched("diffusion", sde.diffusion, t, y0)
    state = tuple(y0.shape)
    for name, out in (("drift", f), ("diffusion", g)):
        if not isinstance(out, Tensor):
            raise TypeError(f"sde.{name} must return a torch.Tensor; got {type(out).__name__}.")
        if out.dtype != y0.dtype or out.device != y0.device:
            raise TypeError(
                f"sde.{name} must return {y0.dtype} on {y0.device}, like y0; got {out.dtype} on {out.device}."
            )
    if tuple(f.shape) != state:
        raise ValueError(f"sde.drift must return the shape of y, {state}; got {tuple(f.shape)}.")
    kind = sde.noise_type
    expected = {"diagonal": state, "scalar": (*state, 1)}.get(kind)
    if expected is None:
        good, expected_text = g.ndim == len(state) + 1 and tuple(g.shape[:-1]) == state, f"{state} and one more axis"
    else:
        good, expected_text = tuple(g.shape) == expected, f"{expected}"
    if not good:
        raise ValueError(f"sde.diffusion must return {expected_text} for {kind} noise; got {tuple(g.shape)}.")
    return state if kind == "diagonal" else (*state[:-1], g.shape[-1])


def _untouched(name: str, function: Callable[[Tensor, Tensor], Any], t: Tensor, y0: Tensor) -> Any:
    """Evaluate on a copy of the state, which must still be one afterwards."""
    y = y0.clone()
    before = version(y)
    out = function(t, y)
    if version(y) != before or (before < 0 and not torch.equal(y, y0)):
        raise ValueError(IN_PLACE.format(name))
    return out


def version(y: Tensor) -> int:
    """Count of the changes in place; -1 for inference tensors, which do not keep it."""
    return -1 if y.is_inference() else y._version


def check_noise(noise: "Tensor | None", expected: tuple[int, ...], method: str, y0: Tensor) -> None:
    if noise is None:
        return
    check_same_kind(y0=y0, noise=noise)
    if tuple(noise.shape) != expected:
        axes = "(n_steps, *batch, *noise_shape)" if method == "step" else "(n_steps, *batch, m)"
        raise ValueError(f"noise must have shape {axes} = {expected}; got {tuple(noise.shape)}.")
