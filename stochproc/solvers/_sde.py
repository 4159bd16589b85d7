"""Integration of stochastic differential equations on a fixed grid, with the steps written here or torchsde's."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice, check_finite, check_floating, check_integer
from stochproc._random import make_generator
from stochproc.solvers._recompute import recompute
from stochproc.solvers._result import Callback, Convergence, Result, SolverState, Status
from stochproc.solvers._sde_checks import (
    SDE_TYPES,
    check_adjoint,
    check_method,
    check_noise,
    check_own_times,
    noise_shape,
)
from stochproc.solvers._sde_grid import TimeGrid, time_grid
from stochproc.solvers._sde_noise import DrawnNoise, Draws, GivenNoise, fork
from stochproc.solvers._sde_scan import Advance, State, scan

__all__ = ["integrate"]


def integrate(
    sde: Any,
    y0: Float[Tensor, "*batch d"],
    ts: "Float[Tensor, '*#batch n_times'] | Sequence[float | int]",
    *,
    method: str = "euler",
    dt: "float | int | None" = None,
    noise: "Float[Tensor, 'n_steps ...'] | None" = None,
    backend: str = "scan",
    checkpoint_every: "int | None" = None,
    generator: "torch.Generator | None" = None,
    callback: "Callback | None" = None,
    adjoint: bool = False,
) -> Result[Tensor]:
    r"""Integrate :math:`dy = f(t, y)\,dt + g(t, y)\,dW` from ``y0`` and return the states at ``ts``.

    Parameters
    ----------
    sde : object
        An ``nn.Module`` or anything else with

        - ``drift(t, y)``: the shape of ``y``, (\*batch, d);
        - ``diffusion(t, y)``: (\*batch, d) for diagonal noise, (\*batch, d, 1) for scalar, (\*batch, d, m) for
          additive (the same for all ``y``) and general noise;
        - ``noise_type``: "diagonal", "scalar", "additive" or "general"; ``sde_type``: "ito" or "stratonovich".

        For ``method="step"``, instead: ``step(t, y, h, noise)``, which returns the state after a step of size
        ``h`` (a float), and ``noise_shape``, a tuple: noise is then (\*batch, \*noise_shape). All must depend on
        their arguments alone and leave these as they are. ``t`` is a 0-dim tensor of the dtype of ``y``; where
        each path has its own times, ``t`` and ``h`` are tensors of shape (\*batch, 1).
    y0 : Tensor of shape (\*batch, d)
        State at ``ts[0]``, float32 or float64, finite; not modified.
    ts : Tensor of shape (n_times,) or (\*batch, n_times), or sequence of float
        Strictly increasing times, of any float dtype (float64 places the grid best, whatever the dtype of
        ``y0``) and on any device. A batch of times, which broadcasts to that of ``y0``, needs the backend
        "scan".
    method : str, default="euler"
        "euler" (Euler-Maruyama, Itô, strong order 1/2, 1 for additive noise), "heun" (Stratonovich, strong
        order 1 for diagonal, scalar and additive noise, 1/2 for general) or "step" (the step of the equation
        itself). Additive noise has one reading, so both serve either ``sde_type``. The backend "torchsde" has
        "euler", "heun", "milstein", "srk", "midpoint", "euler_heun", "reversible_heun" and "log_ode".
    dt : float or None, default=None
        Largest step; see ``time_grid``. None takes one step from each time to the next.
    noise : Tensor of shape (n_steps, \*batch, m) or None, default=None
        Brownian increments on the grid (m is d for diagonal and 1 for scalar noise), for instance from
        ``brownian_increments``; for "step" (n_steps, \*batch, \*noise_shape), passed on as they are. Gradients
        flow into it. None draws increments, or standard normals for "step".
    backend : {"scan", "torchsde"}, default="scan"
        Who makes the steps. Grid and noise are the same, so that results of one method agree path by path.
    checkpoint_every : int or None, default=None
        Keep the state only every so many steps for the backward pass, and repeat the steps between with the same
        noise and, for dropout, the same global random state.
    generator : torch.Generator or None, default=None
        Source of the noise; None takes a fresh seed on the device of ``y0``. A step draws its numbers in one
        call: one seed gives one path, whatever ``checkpoint_every``, the backend, or whether
        ``brownian_increments`` drew it before. A generator on the CPU gives the same path on every device. The
        methods "srk" and "log_ode" also need areas, which come from a stream derived from this generator.
    callback : callable or None, default=None
        Called with a ``SolverState`` at each time after the first: ``iteration`` counts steps, ``residual`` is
        the time left and ``value`` the detached state. Returning True stops.
    adjoint : bool, default=False
        Backend "torchsde": gradients by its stochastic adjoint, in memory that does not grow with the steps;
        exact to rounding for "reversible_heun", else to the order of the method. Gradients reach ``y0`` and the
        parameters of ``sde``, which must be an ``nn.Module``.

    Returns
    -------
    Result[Tensor of shape (n_times, \*batch, d)]
        States at ``ts``, the first is ``y0``. ``status`` is ``CONVERGED`` once the last time is reached;
        ``NONFINITE`` if a state at one of ``ts`` holds NaN or infinity: the paths concerned are as the scheme
        left them, the others are right; ``STOPPED`` by the callback: ``value`` then ends with the state it saw.
        ``convergence`` has the steps done and, as residual, the span of time without a finite state. ``stats``
        has ``n_steps``, ``min_step``, ``max_step``, ``method``, ``backend``, ``n_times`` (states returned) and
        ``failed`` (which paths are not finite, of shape \*batch).

    Raises
    ------
    TypeError
        If tensors are not float32 or float64 or differ in dtype or device, or ``sde`` lacks a method or
        attribute.
    ValueError
        If an option is unknown, ``y0`` is not finite, a shape does not fit, the method does not solve equations
        of this type, ``time_grid`` refuses the times or ``dt``, or a function changes ``y`` in place.

    Notes
    -----
    Drift and diffusion are called once more before the first step, to check shapes and that they leave ``y``
    alone; ``step`` is checked for both each time (in inference mode for the second at the first step only).
    There is no other check in the loop, nor any transfer from the device; finiteness is looked at once, at the
    end. Memory is that of the states returned; with gradients also that of the graph of all steps, or, with
    ``checkpoint_every=k``, of n_steps / k states and the graph of k steps, at the price of a second forward pass.
    Noise that is drawn here is not stored, except by the graph.

    Examples
    --------
    >>> import torch
    >>> class OrnsteinUhlenbeck:
    ...     noise_type, sde_type = "diagonal", "ito"
    ...     def drift(self, t, y):
    ...         return -y
    ...     def diffusion(self, t, y):
    ...         return torch.ones_like(y)
    >>> result = integrate(OrnsteinUhlenbeck(), torch.zeros(100, 1), [0.0, 1.0, 2.0], dt=0.01)
    >>> result.ok, result.value.shape, result.stats["n_steps"]
    (True, torch.Size([3, 100, 1]), 200)
    """
    check_choice("backend", backend, ("scan", "torchsde"))
    check_floating(y0=y0)
    if y0.ndim == 0:
        raise ValueError("y0 must have shape (*batch, d); got a tensor without axes.")
    if checkpoint_every is not None:
        check_integer("checkpoint_every", checkpoint_every, 1)
    check_finite("y0", y0)
    check_method(sde, method, backend)
    grid = time_grid(ts, dt)
    check_own_times(grid, y0, backend)
    check_adjoint(sde, backend, adjoint, checkpoint_every, noise)

    shape = noise_shape(sde, method, y0, grid, noise)
    check_noise(noise, (grid.n_steps, *shape), method, y0)
    generator = make_generator(generator, y0.device)
    if noise is None:
        source: Any = DrawnNoise(grid, shape, method != "step", y0.dtype, y0.device, generator)
    else:
        source = GivenNoise(noise)
    if backend == "scan":
        advance = scan(sde, method, "" if method == "step" else sde.noise_type, grid, y0)
    else:
        from stochproc.solvers._sde_torchsde import delegate

        sde_type = SDE_TYPES[method][0] if sde.noise_type == "additive" else sde.sde_type
        areas = fork(generator)
        if noise is not None:
            # Nothing else is drawn: without this a second call would get the same areas.
            torch.randint(2, (), generator=generator, device=generator.device)
        advance = delegate(sde, method, sde_type, sde.noise_type, grid, y0, shape[-1], areas, adjoint)

    value, n_steps, stopped = _run(advance, source, grid, y0, checkpoint_every, callback)
    stats = {
        "n_steps": n_steps,
        "min_step": float(grid.steps.min()),
        "max_step": float(grid.steps.max()),
        "method": method,
        "backend": backend,
    }
    return _finish(value, n_steps, stopped, grid, stats)


def _run(
    advance: Advance,
    source: "DrawnNoise | GivenNoise",
    grid: TimeGrid,
    y0: Tensor,
    checkpoint_every: "int | None",
    callback: "Callback | None",
) -> tuple[Tensor, int, bool]:
    """Go through the segments; the states found, the steps done, and whether the callback stopped it."""
    n = grid.n_steps
    if checkpoint_every is not None:
        cuts = [*range(0, n, checkpoint_every), n]
    else:
        # A callback may stop: nothing beyond the time it sees is computed.
        cuts = list(grid.output) if callback is not None else [0, n]
    bounds = list(pairwise(cuts))
    # A copy: a step that changes it in place is refused, but only after the fact.
    state: State = (y0.clone(),)
    found = [y0]
    for (start, stop), draws in zip(bounds, source.segments(bounds), strict=True):
        if checkpoint_every is None:
            state, new = advance(state, start, stop, draws)
        else:
            state, new = _checkpointed(advance, state, start, stop, draws)
        for y in new:
            found.append(y)
            reached = grid.output[len(found) - 1]
            if callback is not None and callback(SolverState(reached, _time_left(grid, len(found) - 1), y.detach())):
                return torch.stack(found), reached, True
    return torch.stack(found), n, False


def _checkpointed(advance: Advance, state: State, start: int, stop: int, draws: Draws) -> tuple[State, list[Tensor]]:
    """``advance``, of which only the state at the start is kept for the backward pass."""
    length = 0

    def flat(*state: Tensor) -> State:
        nonlocal length
        after, found = advance(state, start, stop, draws)
        length = len(after)
        return (*after, *found)

    out = recompute(flat, *state)
    return out[:length], list(out[length:])


def _finish(value: Tensor, n_steps: int, stopped: bool, grid: TimeGrid, stats: dict[str, Any]) -> Result[Tensor]:
    """Look for states that are not finite, and say how the call ended."""
    states = value.detach()
    batch = states.shape[1:-1]
    last = len(states) - 1
    failed = states.new_zeros(batch, dtype=torch.bool)
    status = Status.STOPPED if stopped else Status.CONVERGED
    message = f"the callback stopped it at t = {_time(grid, last)}" if stopped else f"{n_steps} steps done"
    # One cheap sum settles the usual case; a finite state whose sum overflows is looked at closely.
    if not bool(states.sum().isfinite()):
        bad = ~states.isfinite().all(-1)
        if bool(bad.any()):
            failed = bad.any(0)
            first = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
            status = Status.NONFINITE
            which = f" in {int(failed.sum())} of {failed.numel()} paths" if failed.ndim else ""
            message = (
                f"the state holds NaN or infinity from t = {_time(grid, first)} on{which}; a smaller dt may help, "
                "or a drift and diffusion that grow at most linearly"
            )
            last = first - 1
    residual = _time_left(grid, last)
    stats = {**stats, "n_times": len(states), "failed": failed}
    return Result(value, status, Convergence(n_steps, residual, 0.0, message=message), stats)


def _time_left(grid: TimeGrid, reached: int) -> float:
    """Time from a requested one to the last, the longest of a batch."""
    return float((grid.times[-1] - grid.times[grid.output[reached]]).max())


def _time(grid: TimeGrid, k: int) -> str:
    """Requested time k in words; of a batch the first."""
    t = grid.times[grid.output[k]]
    return f"{t.flatten()[0].item():.6g}" + (" (of the first path)" if t.numel() > 1 else "")
