"""The parts of a decomposition at a start: priors as the settings say, functions, noise, and the core of Tucker."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochproc.tensor._coordinate_ascent import Decomposition, Rows
from stochproc.tensor._factor import Factor
from stochproc.tensor._links import CPLink, TuckerLink
from stochproc.tensor._modes import Mode, kernel_of
from stochproc.tensor._noise import Noise
from stochproc.tensor._packed import pack, unpack
from stochproc.tensor._priors import (
    ARD_LOG_SPREAD,
    LOG_SPREAD,
    VARIANCE_RANGE,
    DiscretePrior,
    FunctionPrior,
    MarkovPrior,
)
from stochproc.tensor._starts import (
    START_VARIANCE,
    Start,
    basis_functions,
    degree_start,
    find_anchor,
    greedy_start,
    perturbed,
    random_start,
)

__all__ = ["CP_SWEEPS", "Grid", "Settings", "make_priors", "start_cp", "start_names", "start_tucker"]

# Sweeps of CP before Tucker.
CP_SWEEPS = 5
# Variance of the entries of the core where Tucker takes over from CP.
START_CORE_VARIANCE = 1e-3


class Grid(NamedTuple):
    """The modes and their distinct points in ascending order; numbers of categories for a discrete one."""

    modes: list[Mode]
    points: list[Tensor]


@dataclass(frozen=True)
class Settings:
    """Options of a fit, checked and resolved; ``ranks`` has one entry a mode, all equal for CP."""

    tucker: bool
    ranks: tuple[int, ...]
    kernel: Any = "matern12"
    lengthscale: tuple[float | None, ...] = ()
    variance: float = 0.3
    noise: float | None = None
    """Known variance in scaled y."""
    learn_hyperparameters: bool = True
    share_lengthscale: bool = True
    learn_variance: bool = False
    ard: bool = False
    damping: float = 0.0
    max_iter: int = 100
    tol: float = 1e-5
    n_init: int = 2
    init: Any = "auto"
    method: str = "auto"
    chunk_size: int = 65_536
    batch_size: int | None = None
    core_variance: float | str = 1.0
    diagonal_core: bool = False


def make_priors(grid: Grid, settings: Settings, ranks: Sequence[int], anchor: int) -> list[FunctionPrior]:
    """Fresh priors with hyperparameters at their starts, marked for learning as the settings say."""
    priors: list[FunctionPrior] = []
    for k, (mode, points) in enumerate(zip(grid.modes, grid.points, strict=True)):
        variance = points.new_full((ranks[k],), settings.variance, dtype=torch.float64)
        names: dict[str, tuple[float, tuple[float, float]]] = {}
        prior: FunctionPrior
        if mode.kind == "discrete":
            prior = DiscretePrior(variance)
        else:
            spread = float(points[-1] - points[0])
            kernel, named = kernel_of(mode, settings.kernel, settings.lengthscale[k], spread)
            prior = MarkovPrior(
                kernel.to(points.device), variance, shared=settings.share_lengthscale, method=settings.method
            )
            if settings.learn_hyperparameters and spread > 0:
                names = _hyperparameters(prior, mode, points, named)
        # Of CP only one factor of a component needs a variance that can vanish; of Tucker any mode may lose one.
        sparse = settings.ard and (k == anchor or settings.tucker)
        if (settings.learn_variance and settings.learn_hyperparameters) or sparse:
            width = ARD_LOG_SPREAD if sparse else LOG_SPREAD
            allowed = (VARIANCE_RANGE[0] * settings.variance, VARIANCE_RANGE[1] * settings.variance)
            names |= {n: (width, allowed) for n, _ in prior.named_parameters() if _is_variance(n)}
        prior.learn_from(names)
        priors.append(prior)
    return priors


def _is_variance(name: str) -> bool:
    return name == "log_variance" or (name.endswith("log_outputscale") and ".kernel." not in name)


def _hyperparameters(
    prior: MarkovPrior, mode: Mode, points: Tensor, named: bool
) -> dict[str, tuple[float, tuple[float, float]]]:
    """What of the kernels is learned: spread of the prior and bounds."""
    names = {}
    for name, parameter in prior.named_parameters():
        if _is_variance(name) or not parameter.requires_grad:
            continue
        if named and mode.kind == "continuous":
            gaps = points.diff()
            allowed = float(gaps.median()) / 3, 10 * float(points[-1] - points[0])
        elif named:
            # Below, the Fourier series of the periodic kernel leaves out too much of it.
            allowed = 0.5, 10.0
        else:
            largest = math.exp(float(parameter.detach().max())), math.exp(float(parameter.detach().min()))
            allowed = 1e-4 * largest[1], 1e4 * largest[0]
        names[name] = (LOG_SPREAD, allowed)
    return names


def start_names(settings: Settings) -> list[str]:
    """Names of the starts, in the order they are tried."""
    if not isinstance(settings.init, str):
        return ["given"]
    first = {"auto": ["degree", "greedy"], "degree": ["degree"], "greedy": ["greedy"], "random": []}[settings.init]
    more = "random" if settings.init == "random" else f"{'greedy' if settings.init == 'greedy' else 'degree'}+"
    return (first + [f"{more}{i}" for i in range(settings.n_init)])[: settings.n_init]


def start_cp(name: str, rows: Rows, grid: Grid, settings: Settings, generator: torch.Generator) -> Decomposition:
    """The decomposition at a start, with the ones of CP; of the least rank of all modes, unless functions are given."""
    K, rank = len(grid.points), min(settings.ranks)
    plain = make_priors(grid, settings, [rank] * K, 0)
    if name == "given":
        start = Start([m.clone() for m in settings.init], find_anchor(rows, plain, grid.points))
    else:
        start = _start(name, rows, grid, plain, rank, generator)
    priors = make_priors(grid, settings, [m.shape[1] for m in start.means], start.anchor)
    factors = [
        Factor.from_means(prior, points, mean, START_VARIANCE)
        for prior, points, mean in zip(priors, grid.points, start.means, strict=True)
    ]
    noise = Noise() if settings.noise is None else Noise(fixed=1 / settings.noise)
    return Decomposition(factors, CPLink(rank, K), noise, start.anchor, settings.chunk_size)


def start_tucker(model: Decomposition, rows: Rows, grid: Grid, settings: Settings) -> None:
    """Go on from CP in place: every mode with its own rank, and a superdiagonal core of small variance."""
    # Pruning may have left fewer than there are to be; what is new has no part in any entry yet.
    have = model.link.ranks[0]
    _widen(model, rows, grid, settings)
    ranks = settings.ranks
    like = model.factors[0].mean
    core = like.new_zeros(ranks)
    for r in range(have):
        core[(r,) * len(ranks)] = 1.0
    variance = like.new_full((core.numel(),), START_CORE_VARIANCE)
    learn = settings.core_variance == "learn"
    model.link = TuckerLink(
        core,
        variance if settings.diagonal_core else torch.diag(variance),
        1.0 if learn else float(settings.core_variance),
        learn,
        settings.diagonal_core,
    )


def _start(
    name: str, rows: Rows, grid: Grid, priors: Sequence[FunctionPrior], rank: int, generator: torch.Generator
) -> Start:
    kind, _, number = name.partition("+")
    if kind.startswith("random"):
        seed = torch.Generator().manual_seed(generator.initial_seed() + int(kind[len("random") :]))
        return random_start(grid.points, rank, find_anchor(rows, priors, grid.points), seed)
    make: Callable[..., Start] = {"degree": degree_start, "greedy": greedy_start}[kind]
    start = make(rows, grid.modes, grid.points, priors, rank)
    if not number:
        return start
    return perturbed(
        start, rows, grid.modes, grid.points, torch.Generator().manual_seed(generator.initial_seed() + int(number))
    )


def _widen(model: Decomposition, rows: Rows, grid: Grid, settings: Settings) -> None:
    """Give every mode its own rank: spare functions start as the next polynomials, without messages."""
    for k, (factor, rank) in enumerate(zip(model.factors, settings.ranks, strict=True)):
        have = factor.rank
        if rank == have:
            continue
        wider = make_priors(grid, settings, settings.ranks, model.anchor)[k]
        _copy_hyperparameters(factor.prior, wider)
        spare = basis_functions(rows, k, grid.modes[k], grid.points[k], rank)[:, have:]
        mean = torch.cat([factor.mean, spare], 1)
        new = Factor.from_means(wider, factor.points, mean, START_VARIANCE)
        for target, source in ((new.cov, factor.cov), (new.Lam, factor.Lam)):
            full = unpack(target, rank).clone()
            full[:, :have, :have] = unpack(source, have)
            target.copy_(pack(full))
        new.eta[:, :have] = factor.eta
        model.factors[k] = new


def _copy_hyperparameters(source: FunctionPrior, target: FunctionPrior) -> None:
    """Copy values; of variances and kernels a component each, as far as there are components."""
    old = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name not in old:
                continue
            value = old[name]
            if value.shape == parameter.shape:
                parameter.copy_(value)
            else:
                parameter[: len(value)] = value
