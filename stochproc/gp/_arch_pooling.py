"""Pooling of images in terms of pairs of pixels: means over the pixels of both images, within windows or over all.

With u_p, v_p' the features of the pixels, the mean features have the squared distance

    |mean u - mean v|^2 = mean |u_p - v_p'|^2 - mean |u_p - u_p'|^2 / 2 - mean |v_p - v_p'|^2 / 2,

which needs the pairs of pixels within each image. It is accurate to a few roundings of its largest term, not of
itself: kernels of pairs hold no more. Hence pairs of pixels are float64, whatever the images.
"""

from typing import cast

import torch
from torch import Tensor

from stochproc.gp._arch_base import DiagState, KernelState, PixelLayout
from stochproc.gp._arch_pixels import PairsLayout, stack_pairs
from stochproc.gp._arch_windows import mean_over_blocks
from stochproc.kernels import Pair

__all__ = ["equal_pixels", "equal_pixels_diagonal", "pooled", "pooled_diagonal"]

Size = tuple[int, int]


def pooled(state: KernelState, size: Size) -> KernelState:
    """Return the pairs of pixels behind the mean over blocks of ``size`` pixels."""
    pair, pixels = state.pair, _pairs_layout(state)
    shape = torch.broadcast_shapes(*(t.shape for t in pair))
    pair = pair._replace(D=pair.D.expand(shape), A=pair.A.expand(shape))
    sq = pair.sqdist
    # A pixel and itself: dropout, which sees two different images everywhere, parts them.
    sq[pixels.n * pixels.m :].diagonal(dim1=-2, dim2=-1).zero_()
    cross, *own = pixels.split(mean_over_blocks(sq, pixels, size))
    norms = [pixels.split(pair.r1)[i].squeeze(-1) for i in (1, 2)]
    (q1, half1), (q2, half2) = (_variances(r * r, s, pixels, size) for r, s in zip(norms, own, strict=True))
    apart = cross - half1[:, None, :, None] - half2[:, None, :]
    between = Pair.from_sqdist(apart, q1.unsqueeze(1), q2.unsqueeze(0))
    within = (_within(own[0], q1, half1), _within(own[1], q2, half2))
    ntk = None if state.ntk is None else mean_over_blocks(state.ntk.expand(shape), pixels, size)
    layout = PairsLayout(pixels.height // size[0], pixels.width // size[1], pairs=True, n=pixels.n, m=pixels.m)
    return KernelState(stack_pairs(between, *within), ntk, layout)


def pooled_diagonal(state: DiagState, size: Size) -> DiagState:
    """Return images, each paired with itself, behind the mean over blocks of ``size`` pixels."""
    pixels, pair = cast(PixelLayout, state.pixels), cast(Pair, state.pair)
    own = mean_over_blocks(pair.sqdist, pixels, size)
    q, half = _variances(state.q, own, pixels, size)
    ntk = None if state.ntk is None else mean_over_blocks(state.ntk, pixels, size)
    layout = PixelLayout(pixels.height // size[0], pixels.width // size[1], pairs=True)
    return DiagState(q, ntk, layout, _within(own, q, half))


def equal_pixels(state: KernelState) -> KernelState:
    """Keep the pairs of equal pixels of two images, with the pixels as the last axis."""
    pair, pixels = state.pair, cast(PixelLayout, state.pixels)
    if not pixels.pairs:
        return state
    pixels = _pairs_layout(state)
    r1, r2 = pixels.split(pair.r1)[1].mT, pixels.split(pair.r2)[2].movedim(0, 1)
    D, A = (pixels.split(t.expand_as(pair.A))[0].diagonal(dim1=-2, dim2=-1) for t in (pair.D, pair.A))
    ntk = None if state.ntk is None else pixels.split(state.ntk)[0].diagonal(dim1=-2, dim2=-1)
    return KernelState(Pair(r1, r2, D, A), ntk, PixelLayout(pixels.height, pixels.width, pairs=False))


def equal_pixels_diagonal(state: DiagState) -> DiagState:
    """Keep of the pairs of pixels within each image the equal ones."""
    pixels, ntk = cast(PixelLayout, state.pixels), state.ntk
    if not pixels.pairs:
        return state
    ntk = None if ntk is None else ntk.diagonal(dim1=-2, dim2=-1)
    return DiagState(state.q, ntk, PixelLayout(pixels.height, pixels.width, pairs=False))


def _pairs_layout(state: KernelState) -> PairsLayout:
    return cast(PairsLayout, state.pixels)


def _variances(q: Tensor, own: Tensor, pixels: PixelLayout, size: Size) -> tuple[Tensor, Tensor]:
    """Return the variance of each mean over a block, and half the mean squared distance within the block."""
    half = own.diagonal(dim1=-2, dim2=-1) / 2
    single = PixelLayout(pixels.height, pixels.width, pairs=False)
    # q_pp' = (q_pp + q_p'p' - |u_p - u_p'|^2) / 2.
    return (mean_over_blocks(q, single, size) - half).clamp(min=0), half


def _within(own: Tensor, q: Tensor, half: Tensor) -> Pair:
    return Pair.from_sqdist(own - half.unsqueeze(-1) - half.unsqueeze(-2), q, q)
