"""What a solved problem between point clouds knows besides: where new points go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochproc.kernels import expsum, logsumexp
from stochproc.ot._dense_form import DenseForm
from stochproc.ot._dist import cost_matrix
from stochproc.ot._inputs import DenseInputs, PointInputs

__all__ = ["LAYER_METRICS", "PointForm", "barycentric_map"]

# Errors of the sums of rows that exponents of some thousand have by rounding.
FAR = {torch.float32: 1e-2, torch.float64: 1e-6}
# Metrics that the kernel layer evaluates without a matrix; others are stored.
LAYER_METRICS = ("sqeuclidean", "euclidean", "cityblock")


class PointForm(DenseForm):
    """A problem between point clouds whose costs are stored."""

    def __init__(self, points: PointInputs, metric: Any, M: Tensor, f: Tensor, g: Tensor, **options: Any) -> None:
        super().__init__(DenseInputs(points.given, M, points.a, points.b, points.reg), f, g, **options)
        self.points, self.metric = points, metric

    def images(self, points: Any, values: Any, *, forward: bool) -> Tensor:
        f, g = self.potentials()
        return barycentric_map(self.points, self.metric, f, g, points, values, forward=forward)


def barycentric_map(
    problem: PointInputs, metric: Any, f: Tensor, g: Tensor, points: Tensor | None, values: Any, *, forward: bool
) -> Tensor:
    """Return means of the partners of points under the plan that potentials stand for, continued to new points."""
    own, other = (problem.X, problem.Y) if forward else (problem.Y, problem.X)
    points = own if points is None else points
    name = "X" if forward else "Y"
    if points.ndim != 2 or points.shape[1] != other.shape[1]:
        raise ValueError(f"{name} must have shape (k, {other.shape[1]}); got {tuple(points.shape)}.")
    values = other if values is None else values
    weights, potential = (problem.b, g) if forward else (problem.a, f)
    eps = problem.reg.to(points)
    # Points without weight are no partners, whatever their potential.
    log_weights = torch.where(weights > 0, weights, 1.0).log()
    height = torch.where(weights > 0, potential + eps * log_weights, -torch.inf)
    if callable(metric) or metric in LAYER_METRICS:
        cost = metric if forward else flipped(metric)
        soft = -eps * logsumexp(cost, points, other, height, eps=eps)
        with torch.no_grad():
            ones = torch.ones_like(values[:, :1])
            total = expsum(cost, points, other, soft, height, ones, eps=eps).squeeze(-1)
            far = ((total - 1).abs() > FAR[points.dtype]).nonzero().squeeze(1)
        out = expsum(cost, points, other, soft, height, values, eps=eps)
        if far.numel() == 0:
            return out
        # So far off that a cost less its soft minimum has no digits left: the rows of these few are written out.
        exact = (
            torch.softmax((height - cost_matrix(points[far], other, metric if forward else cost)) / eps, -1) @ values
        )
        return out.index_copy(0, far, exact)
    return torch.softmax((height - cost_matrix(points, other, metric)) / eps, -1) @ values


def flipped(metric: Any) -> Any:
    """Return a metric of which the second cloud comes first."""
    return (lambda y, x: metric(x, y).mT) if callable(metric) else metric
