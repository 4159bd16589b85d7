"""Symmetric matrices as rows of their upper triangles: half the memory, and products entry by entry."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["multiplicity", "outer", "pack", "size", "unpack"]


def size(rank: int) -> int:
    """Entries of the upper triangle of a matrix with ``rank`` rows."""
    return rank * (rank + 1) // 2


@lru_cache(maxsize=256)
def _triangle(rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Autograd refuses tensors of inference mode, in which these may first be asked for.
    with torch.inference_mode(False):
        rows, columns = torch.triu_indices(rank, rank, device=device)
    return rows, columns


@lru_cache(maxsize=256)
def _places(rank: int, device: torch.device) -> Tensor:
    rows, columns = _triangle(rank, device)
    with torch.inference_mode(False):
        places = torch.zeros(rank, rank, dtype=torch.int64, device=device)
        places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=device)
    return places


def pack(matrix: Float[Tensor, "*batch r r"]) -> Float[Tensor, "*batch p"]:
    """Return the upper triangles, row by row."""
    rows, columns = _triangle(matrix.shape[-1], matrix.device)
    return matrix[..., rows, columns]


def unpack(triangle: Float[Tensor, "*batch p"], rank: int) -> Float[Tensor, "*batch r r"]:
    """Return the symmetric matrices."""
    return triangle[..., _places(rank, triangle.device)]


def outer(vector: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch p"]:
    """Return the packed v v'."""
    rows, columns = _triangle(vector.shape[-1], vector.device)
    return vector[..., rows] * vector[..., columns]


def multiplicity(rank: int, like: Tensor) -> Float[Tensor, " p"]:
    """How often each packed entry is in the matrix: 1 on the diagonal, 2 beside it."""
    rows, columns = _triangle(rank, like.device)
    return torch.where(rows == columns, 1.0, 2.0).to(like.dtype)
