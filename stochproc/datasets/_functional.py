"""Tensors whose modes are continuous: samples of a known sum of products of smooth functions."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stochproc._checks import check_choice, check_integer, check_positive
from stochproc._random import make_generator

__all__ = ["FourierFunctions", "TuckerFunction", "make_functional_tensor"]


class FourierFunctions:
    r"""Smooth random functions of one variable, :math:`u_j(x) = \sum_m a_{jm} \cos(w_{jm} x + p_{jm})`.

    Parameters
    ----------
    amplitudes, frequencies, phases : Tensor of shape (rank, n_terms)
        a, w in radians per unit of x, and p.
    """

    def __init__(
        self,
        amplitudes: Float[Tensor, "rank terms"],
        frequencies: Float[Tensor, "rank terms"],
        phases: Float[Tensor, "rank terms"],
    ) -> None:
        self.amplitudes, self.frequencies, self.phases = amplitudes, frequencies, phases

    def __call__(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n rank"]:
        """Values of all functions at the points x."""
        return (self.amplitudes * torch.cos(x[:, None, None] * self.frequencies + self.phases)).sum(-1)


class TuckerFunction:
    """A function of several variables, the core applied to one set of functions a variable.

    Parameters
    ----------
    core : Tensor of shape (rank_1, ..., rank_K)
        Weights of the products.
    functions : sequence of callable
        Each takes (n,) and returns (n, rank_k).
    """

    def __init__(self, core: Float[Tensor, "..."], functions: Sequence[FourierFunctions]) -> None:
        self.core, self.functions = core, list(functions)

    def __call__(self, X: Float[Tensor, "n modes"]) -> Float[Tensor, " n"]:
        """Values at the rows of X, one column a mode."""
        if X.ndim != 2 or X.shape[1] != len(self.functions):
            raise ValueError(f"X must have shape (n, {len(self.functions)}); got {tuple(X.shape)}.")
        out = self.core.expand(len(X), *self.core.shape)
        for k, u in enumerate(self.functions):
            # The first mode left is contracted each time, the rows staying in front.
            out = torch.einsum("nr,nr...->n...", u(X[:, k]), out)
        return out

    def on_grid(self, coordinates: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
        """Values on the grid of the coordinates, one vector a mode."""
        out = self.core
        for u, x in zip(self.functions, coordinates, strict=True):
            # Contracting the first axis and appending the new one returns to the order of the modes at the end.
            out = torch.tensordot(out, u(x), dims=([0], [1]))
        return out


def make_functional_tensor(
    shape: Sequence[int] = (30, 30, 30),
    rank: "int | Sequence[int]" = 2,
    *,
    structure: str = "tucker",
    noise: "float | int" = 0.01,
    missing: "float | int" = 0.0,
    lengthscale: "float | int" = 0.2,
    grid: str = "regular",
    random_state: Any = None,
) -> Any:
    r"""Draw a tensor that samples a function of low functional rank, with noise and gaps.

    .. math:: y_{i_1 \dots i_K} = \sum_{r_1 \dots r_K} W_{r_1 \dots r_K} \prod_k u^k_{r_k}(x^k_{i_k}) + e

    The functions u are random Fourier sums of 64 terms that resemble draws of a Gaussian process with an RBF
    kernel of variance 1. The core is scaled so that the signal has mean square 1 over the tensor.

    Parameters
    ----------
    shape : sequence of int, default=(30, 30, 30)
        Number of coordinates of each mode, all in [0, 1].
    rank : int or sequence of int, default=2
        Number of functions of each mode; one number for all of them.
    structure : {"tucker", "cp"}, default="tucker"
        A full core of normal weights, or equal weights on the superdiagonal alone (``rank`` is then one number).
    noise : float, default=0.01
        Variance of the noise, at least 0; with 0.01 the signal-to-noise ratio is 100.
    missing : float, default=0.0
        Probability of an entry to be missing, independently; in [0, 1).
    lengthscale : float, default=0.2
        Lengthscale of the functions.
    grid : {"regular", "random"}, default="regular"
        Whether coordinates are equidistant with both ends, or uniform draws, sorted.
    random_state : None, int, numpy or torch generator, default=None
        Seed.

    Returns
    -------
    sklearn.utils.Bunch
        ``tensor`` of the shape, NaN where missing, ``mask`` (True where observed), ``coordinates`` (a list of
        vectors), and the observed entries as rows: ``X`` (n, K) of coordinates and ``y`` (n,). The truth:
        ``signal`` (the tensor without noise), ``core``, ``functions`` (callables, (n,) to (n, rank)), ``factors``
        (their values at the coordinates), ``function`` (callable, (n, K) to (n,), for coordinates off the grid),
        ``noise``, ``DESCR``. Tensors are float64.

    Raises
    ------
    ValueError
        If a size or number is out of range, or ``rank`` does not fit ``shape`` or ``structure``.

    Examples
    --------
    >>> data = make_functional_tensor((20, 15), rank=(2, 3), missing=0.5, random_state=0)
    >>> data.tensor.shape, data.core.shape
    (torch.Size([20, 15]), torch.Size([2, 3]))
    """
    ranks = _check_ranks(shape, rank, structure)
    check_positive("noise", noise, zero=True)
    check_positive("lengthscale", lengthscale)
    check_choice("grid", grid, ("regular", "random"))
    if not 0 <= missing < 1:
        raise ValueError(f"missing must lie in [0, 1); got {missing}.")
    gen = make_generator(random_state)

    functions = [_draw_functions(r, float(lengthscale), gen) for r in ranks]
    if grid == "regular":
        coordinates = [torch.linspace(0, 1, n, dtype=torch.float64) for n in shape]
    else:
        coordinates = [torch.rand(n, generator=gen, dtype=torch.float64).sort().values for n in shape]
    if structure == "tucker":
        core = torch.randn(ranks, generator=gen, dtype=torch.float64)
    else:
        core = torch.zeros(ranks, dtype=torch.float64)
        core[(torch.arange(ranks[0]),) * len(ranks)] = 1.0
    core = core / TuckerFunction(core, functions).on_grid(coordinates).square().mean().sqrt()
    function = TuckerFunction(core, functions)
    signal = function.on_grid(coordinates)
    noisy = signal + noise**0.5 * torch.randn(signal.shape, generator=gen, dtype=torch.float64)
    mask = torch.rand(signal.shape, generator=gen, dtype=torch.float64) >= missing
    where = mask.nonzero()
    from sklearn.utils import Bunch

    return Bunch(
        tensor=noisy.masked_fill(~mask, float("nan")),
        mask=mask,
        coordinates=coordinates,
        X=torch.stack([x[where[:, k]] for k, x in enumerate(coordinates)], 1),
        y=noisy[mask],
        signal=signal,
        core=core,
        functions=functions,
        factors=[u(x) for u, x in zip(functions, coordinates, strict=True)],
        function=function,
        noise=float(noise),
        DESCR=f"Functional {structure} tensor of shape {tuple(shape)} and rank {ranks}; noise variance {noise:g}.",
    )


def _check_ranks(shape: Sequence[int], rank: "int | Sequence[int]", structure: str) -> tuple[int, ...]:
    check_choice("structure", structure, ("tucker", "cp"))
    if len(shape) < 1:
        raise ValueError("shape must have at least one mode; got none.")
    for n in shape:
        check_integer("shape", n, 1)
    ranks = tuple(rank) if isinstance(rank, Sequence) else (rank,) * len(shape)
    for r in ranks:
        check_integer("rank", r, 1)
    if len(ranks) != len(shape):
        raise ValueError(f"rank must have one number a mode, {len(shape)} in all; got {ranks}.")
    if structure == "cp" and len(set(ranks)) > 1:
        raise ValueError(f"rank must be the same in every mode of a cp structure; got {ranks}.")
    return ranks


def _draw_functions(rank: int, lengthscale: float, gen: torch.Generator, n_terms: int = 64) -> FourierFunctions:
    """Random Fourier features of the RBF kernel: frequencies N(0, 1/l²), uniform phases, normal amplitudes."""
    amplitudes, frequencies = torch.randn(2, rank, n_terms, generator=gen, dtype=torch.float64)
    phases = 2 * torch.pi * torch.rand(rank, n_terms, generator=gen, dtype=torch.float64)
    return FourierFunctions((2 / n_terms) ** 0.5 * amplitudes, frequencies / lengthscale, phases)
