"""The methods of torchsde on the grid and the Brownian path of ``integrate``.

torchsde adds up its step size and interpolates to the requested times. Here each run of equal steps is handed over
in a clock that counts steps, where a step is exactly 1: no sum of decimal steps misses a grid point, and a query
of the Brownian motion is the number of a step. With s = t / h the equation reads dy = h f ds + sqrt(h) g dB,
where B has the increments dW / sqrt(h).
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchsde import BaseBrownian, sdeint, sdeint_adjoint

from stochproc.solvers._sde_grid import TimeGrid
from stochproc.solvers._sde_noise import DrawnNoise, Draws
from stochproc.solvers._sde_scan import Advance, State

__all__ = ["LEVY_AREA", "delegate"]

LEVY_AREA = {"srk": "space-time", "log_ode": "foster"}
"""What a method needs beyond increments."""


def delegate(
    sde: Any,
    method: str,
    sde_type: str,
    noise_type: str,
    grid: TimeGrid,
    y0: Tensor,
    n_brownian: int,
    generator: torch.Generator,
    adjoint: bool,
) -> Advance:
    """Return the counterpart of ``scan`` that leaves the steps to torchsde.

    ``generator`` is for the areas alone; they are drawn like other noise, so that segments may be repeated.
    """
    steps = grid.steps.tolist()
    batch, d = y0.shape[:-1], y0.shape[-1]
    solve = sdeint_adjoint if adjoint else sdeint
    area = LEVY_AREA.get(method)
    per_step = (batch.numel(), n_brownian, {None: 0, "space-time": 1, "foster": 1 + n_brownian}[area])
    areas = DrawnNoise(grid, per_step, False, y0.dtype, y0.device, generator)
    area_draws: dict[int, Draws] = {}

    def advance(state: State, start: int, stop: int, draws: Draws) -> tuple[State, list[Tensor]]:
        y, extra = state[0], state[1:]
        y = y.reshape(-1, d)
        increments = torch.stack(list(draws()))
        increments = increments.reshape(stop - start, -1, n_brownian)
        drawn = None
        if area is not None:
            drawn = torch.stack(list(area_draws.setdefault(start, areas.segment(start, stop))()))
        found = []
        wanted = [i for i in grid.output if start < i <= stop]
        # A run ends where the step changes.
        ends = [start, *(i for i in range(start + 1, stop) if steps[i] != steps[i - 1]), stop]
        for a, b in pairwise(ends):
            h = steps[a]
            if extra and a > 0:
                extra = _rescale(extra, h / steps[a - 1])
            inside = [i for i in wanted if a < i <= b]
            marks = torch.tensor([a, *inside, *([] if b in inside else [b])], dtype=torch.float64) - a
            clock = _StepClock(sde, sde_type, noise_type, grid.times[a : b + 1], h, batch)
            normals = None if drawn is None else drawn[a - start : b - start]
            bm = _StepNoise(increments[a - start : b - start] / math.sqrt(h), area, normals)
            with torch.set_grad_enabled(torch.is_grad_enabled() and _wants_graph(method, clock, y, increments)):
                path, carried = solve(
                    clock, y, marks, bm=bm, method=method, dt=1.0, extra=True, extra_solver_state=extra or None
                )
            y, extra = path[-1], tuple(carried)
            found += [p.reshape(*batch, d) for p in path[1 : 1 + len(inside)].unbind(0)]
        return (y.reshape(*batch, d), *extra), found

    return advance


def _rescale(extra: State, ratio: float) -> State:
    """Carry the drift and diffusion that reversible Heun remembers into the clock of another step."""
    f, g, z = extra
    return f * ratio, g * math.sqrt(ratio), z


def _wants_graph(method: str, clock: "_StepClock", y: Tensor, increments: Tensor) -> bool:
    """Whether a gradient can be asked for; some methods of torchsde otherwise make a graph that leads nowhere."""
    if method not in ("milstein", "log_ode"):
        return True
    s = y.new_zeros(())
    return any(x.requires_grad for x in (y, increments, clock.f(s, y), clock.g(s, y)))


class _StepClock(nn.Module):
    """One run of equal steps, as torchsde wants an equation: (batch, d) states, ``f`` and ``g``."""

    def __init__(self, sde: Any, sde_type: str, noise_type: str, times: Tensor, h: float, batch: torch.Size) -> None:
        super().__init__()
        self.sde = sde
        self.sde_type, self.noise_type = sde_type, noise_type
        self.times, self.h, self.batch = times.tolist(), h, batch

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        return self.h * self.sde.drift(self._time(s, y), self._unflatten(y)).reshape(y.shape)

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        g = self.sde.diffusion(self._time(s, y), self._unflatten(y))
        return math.sqrt(self.h) * g.reshape(*y.shape, *g.shape[len(self.batch) + 1 :])

    def _unflatten(self, y: Tensor) -> Tensor:
        return y.reshape(*self.batch, y.shape[-1])

    def _time(self, s: Tensor, y: Tensor) -> Tensor:
        i = math.floor(s)
        part = float(s) - i
        return y.new_tensor(self.times[i] + part * self.h if part else self.times[i])


class _StepNoise(BaseBrownian):  # type: ignore[misc]
    r"""Brownian motion known at the integers, with the areas that some methods ask for.

    Over a unit step with increment W, the space-time area H is normal with variance 1/12 and independent of W,
    and the Lévy area given both has mean :math:`H_i W_j - W_i H_j` and variance
    :math:`1/20 + (H_i^2 + H_j^2)/5`; it is taken as normal (J. Foster, "Numerical approximations for stochastic
    differential equations", thesis, Oxford, 2020).
    """

    def __init__(self, increments: Tensor, area: "str | None", normals: "Tensor | None") -> None:
        self.increments = increments
        self.area = area
        if normals is not None:
            self.H = normals[..., 0] / math.sqrt(12)
            if area == "foster":
                square, upper = self.H.square(), normals[..., 1:].triu(1)
                spread = (0.05 + 0.2 * (square.unsqueeze(-1) + square.unsqueeze(-2))).sqrt()
                self.rest = spread * (upper - upper.mT)

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        i = round(float(ta))
        w = self.increments[i]
        if not (return_U or return_A):
            return w
        H = self.H[i]
        u = 0.5 * w + H
        if not return_A:
            return w, u
        area = H.unsqueeze(-1) * w.unsqueeze(-2) - w.unsqueeze(-1) * H.unsqueeze(-2) + self.rest[i]
        return (w, u, area) if return_U else (w, area)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape})"

    @property
    def dtype(self) -> torch.dtype:
        return self.increments.dtype

    @property
    def device(self) -> torch.device:
        return self.increments.device

    @property
    def shape(self) -> "tuple[int, ...]":
        return tuple(self.increments.shape[1:])

    @property
    def levy_area_approximation(self) -> str:
        return self.area or "none"
