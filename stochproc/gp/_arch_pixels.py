"""Pairs of pixels of two sets of images, and of the images with themselves, as they enter a network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stochproc.gp._arch_base import DiagState, KernelState, PixelLayout
from stochproc.kernels import Pair

__all__ = ["PairsLayout", "diagonal_of_images", "pairs_of_images", "stack_pairs"]


@dataclass(frozen=True)
class PairsLayout(PixelLayout):
    """All pairs of pixels of n by m pairs of images, and of every image with itself.

    The norms behind a pooling layer depend on the pairs of pixels within one image. So that every layer in front
    maps these as well, they are further rows of the same tensors: rows first the n m pairs of images, then the n
    images of the first set with themselves, then the m of the second; shape (n m + n + m, 1, P, P).

    Parameters
    ----------
    n, m : int
        Images in the two sets.
    """

    n: int
    m: int

    def split(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the entries of pairs (n, m, ...), and those within the images of both sets, (n, ...), (m, ...)."""
        n, m = self.n, self.m
        t = t.squeeze(1)
        return t[: n * m].unflatten(0, (n, m)), t[n * m : n * m + n], t[n * m + n :]


def pairs_of_images(x: Tensor, y: Tensor, *, pairs: bool, tangent: bool) -> KernelState:
    """Return the state of images (n, height, width, channels) and (m, ...) under x_p . y_p' / channels.

    With ``pairs`` O(n m P^2) numbers of all pairs of pixels, else O(n m P) of equal ones. All pairs are float64, since
    pooling takes small differences of them.
    """
    x, y = (z.double() if pairs else z for z in (x, y))
    height, width, channels = x.shape[1:]
    u, v = x.flatten(1, 2), y.flatten(1, 2)
    if not pairs:
        # Pixels are a batch in front of (n, m), then go behind.
        pair = Pair(*(t.movedim(0, -1) for t in Pair.from_points(u.movedim(1, 0), v.movedim(1, 0))))
        layout = PixelLayout(height, width, pairs=False)
    else:
        pair = stack_pairs(Pair.from_points(u.unsqueeze(1), v), *(Pair.from_points(z, z) for z in (u, v)))
        layout = PairsLayout(height, width, pairs=True, n=len(x), m=len(y))
    # Scaling the images instead would round close ones differently.
    pair = pair.affine(1 / channels, 0.0)
    return KernelState(pair, torch.zeros_like(pair.A) if tangent else None, layout)


def diagonal_of_images(x: Tensor, *, pairs: bool, tangent: bool) -> DiagState:
    """Return the state of images (n, height, width, channels), each paired with itself."""
    x = x.double() if pairs else x
    height, width, channels = x.shape[1:]
    u = x.flatten(1, 2)
    layout = PixelLayout(height, width, pairs=pairs)
    q = u.square().sum(-1) / channels
    if not pairs:
        return DiagState(q, torch.zeros_like(q) if tangent else None, layout)
    pair = Pair.from_points(u, u).affine(1 / channels, 0.0)
    return DiagState(q, torch.zeros_like(pair.A) if tangent else None, layout, pair)


def stack_pairs(between: Pair, first: Pair, second: Pair) -> Pair:
    """Join pairs of pixels of two sets (n, m, P, P), and within their images, to the rows of :class:`PairsLayout`."""
    n, m = between.A.shape[:2]
    fields = []
    for t, *within in zip(between, first, second, strict=True):
        fields.append(torch.cat([t.expand(n, m, *t.shape[-2:]).flatten(0, 1), *within]).unsqueeze(1))
    return Pair(*fields)
