"""Where inducing points start: distinct rows of the data, of each class in proportion to its size."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["choose_inducing_points", "proportional_counts"]


def choose_inducing_points(
    X: Float[Tensor, "n d"], y: Int[Tensor, " n"], m: int, how: str, generator: torch.Generator
) -> Float[Tensor, "m d"]:
    """Return at most m distinct rows of X.

    Parameters
    ----------
    X : Tensor of shape (n, d)
    y : Tensor of shape (n,)
        Classes.
    m : int
        All distinct rows are returned where there are no more.
    how : {"random", "kmeans++"}
        Within each class: uniformly, or spread out, each row with a probability proportional to its squared distance
        from those chosen so far.
    generator : torch.Generator
        Source of randomness, on the CPU.
    """
    rows, labels = X.detach().cpu().numpy(), y.detach().cpu().numpy()
    # A row that occurs twice would make K(Z, Z) singular.
    distinct = np.sort(np.unique(rows, axis=0, return_index=True)[1])
    if len(distinct) <= m:
        return X[torch.as_tensor(distinct, device=X.device)]
    random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    classes, sizes = np.unique(labels[distinct], return_counts=True)
    chosen = []
    for c, count in zip(classes, proportional_counts(sizes, m), strict=True):
        own = distinct[labels[distinct] == c]
        if how == "kmeans++" and count:
            from sklearn.cluster import kmeans_plusplus

            _, index = kmeans_plusplus(rows[own], int(count), random_state=int(random.integers(2**31 - 1)))
            chosen.append(own[np.unique(index)])
        else:
            chosen.append(random.choice(own, int(count), replace=False))
    return X[torch.as_tensor(np.sort(np.concatenate(chosen)), device=X.device)]


def proportional_counts(sizes: np.ndarray, total: int) -> np.ndarray:
    """Integers in proportion to sizes that sum to total; none exceeds its size, none is 0 if total allows.

    Examples
    --------
    >>> proportional_counts(np.array([50, 30, 1]), 8)
    array([4, 3, 1])
    """
    counts = np.zeros(len(sizes), dtype=int)
    if total >= len(sizes):
        counts += 1
    # One at a time to the class that is furthest below its share.
    share = sizes / sizes.sum() * total
    for _ in range(min(total, int(sizes.sum())) - int(counts.sum())):
        lacking = np.where(counts < sizes, share - counts, -np.inf)
        counts[int(lacking.argmax())] += 1
    return counts
