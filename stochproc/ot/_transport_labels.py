"""Class labels of sources and targets: which pairs they forbid, and whether that leaves a transport."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochproc._base import as_array

__all__ = ["check_partners", "codes_of", "one_hot", "read_labels"]

UNKNOWN = -1
# Difference of masses that is put down to rounding.
MASS_ATOL = 1e-9


def read_labels(name: str, labels: Any, n: int) -> np.ndarray:
    """Return labels as a vector, or raise ValueError unless there is one for each of n points."""
    out = np.asarray(as_array(labels))
    if out.ndim == 2 and out.shape[1] == 1:
        out = out[:, 0]
    if out.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one label a point; got {out.shape}.")
    if out.dtype.kind == "f" and not np.isfinite(out).all():
        raise ValueError(f"{name} must hold class labels, {UNKNOWN} where unknown; got NaN or infinity.")
    return out


def is_known(labels: np.ndarray) -> np.ndarray:
    """Return which labels are known: not -1."""
    if labels.dtype.kind in "biufO":
        return np.asarray(labels != UNKNOWN, dtype=bool)
    # Among words NumPy turns the number into one.
    return labels != str(UNKNOWN) if labels.dtype.kind == "U" else np.ones(labels.shape, dtype=bool)


def classes_of(*named: tuple[str, np.ndarray]) -> np.ndarray:
    """Return the sorted known labels of several vectors."""
    known = [labels[is_known(labels)] for _, labels in named]
    try:
        # Words beside numbers must not become one kind.
        return np.unique(np.concatenate([k.astype(object) for k in known]))
    except TypeError:
        names = " and ".join(name for name, _ in named)
        raise ValueError(f"{names} must hold labels of one kind, numbers or words; got both.") from None


def codes_of(name: str, labels: np.ndarray, classes: np.ndarray) -> Tensor:
    """Return places among the sorted classes, -1 for unknown; raise ValueError for a label that is none of them."""
    known = is_known(labels)
    codes = np.full(labels.shape, -1, dtype=np.int64)
    place = {label: i for i, label in enumerate(classes.tolist())}
    try:
        codes[known] = [place[label] for label in labels[known].tolist()]
    except KeyError as error:
        raise ValueError(f"{name} must hold labels that fit saw, or {UNKNOWN}; got {error.args[0]!r}.") from None
    return torch.from_numpy(codes)


def one_hot(name: str, labels: np.ndarray) -> Tensor:
    """Return one column of 0 and 1 for each class, in sorted order; unknown labels are rows of 0."""
    classes = classes_of((name, labels))
    if not len(classes):
        raise ValueError(f"{name} must hold at least one known label; got {UNKNOWN} only.")
    codes = codes_of(name, labels, classes)
    return (codes[:, None] == torch.arange(len(classes))).double()


def check_partners(classes: np.ndarray, rows: Tensor, columns: Tensor, a: Tensor, b: Tensor, *, balanced: bool) -> None:
    """Raise ValueError unless labels leave all points with mass a partner and, if balanced, all mass a way.

    With classes and unknown labels alone, Hall's condition is that what a class has too much of fits the other side's
    unlabelled mass.
    """
    mass = [torch.zeros(len(classes) + 1, dtype=torch.float64) for _ in range(2)]
    for total, codes, weights in ((mass[0], rows, a), (mass[1], columns, b)):
        # Unknown ones are counted last.
        total.index_add_(0, torch.where(codes < 0, len(classes), codes).cpu(), weights.cpu())
    sides = (("ys", "source", "targets"), ("yt", "target", "sources"))
    for (name, side, others), (own, theirs) in zip(sides, (mass, mass[::-1]), strict=True):
        alone = (own[:-1] > 0) & (theirs[:-1] + theirs[-1] == 0)
        if bool(alone.any()):
            label = classes[int(alone.nonzero()[0])]
            raise ValueError(
                f"{name} must leave every {side} a partner; no {others} with weight have label {label!r} or none."
            )
    if not balanced:
        return
    for (_, side, others), (own, theirs) in zip(sides, (mass, mass[::-1]), strict=True):
        excess = (own[:-1] - theirs[:-1]).clamp(min=0).sum()
        if float(excess - theirs[-1]) > MASS_ATOL:
            raise ValueError(
                f"ys and yt must leave all mass a way; {float(excess):.4g} of the {side} mass has no room in its own "
                f"class, and the unlabelled {others} take {float(theirs[-1]):.4g}. Mark more labels as unknown "
                f"({UNKNOWN}), weight the points so that classes have equal mass on both sides, or set reg_m."
            )
