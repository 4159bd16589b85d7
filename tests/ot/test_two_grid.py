"""Cells, their widths and the correction that they give to points."""

import math

import numpy as np
import torch

from stochproc.ot._cells import cut
from stochproc.ot._two_grid import build
from stochproc.ot._two_grid_width import kernel_width


def points(n, seed=0):
    return np.random.default_rng(seed).random((n, 2))


def test_cells_partition_the_points_and_keep_mass_and_mean():
    X, w = points(500), np.random.default_rng(1).random(500)
    cells = cut(X, w, 0.1)
    assert sorted(cells.order.tolist()) == list(range(500))
    np.testing.assert_allclose(cells.sums(w[cells.order]), cells.mass)
    np.testing.assert_allclose(cells.mass @ cells.centre.numpy(), w @ X)
    spread = np.abs(X[cells.order] - cells.centre.numpy()[cells.owner()]).max()
    assert spread <= 0.1


def test_a_far_outlier_adds_one_cell():
    X = points(500)
    far = np.vstack([X, [[1e12, 1e12]]])
    assert len(cut(far, np.ones(501), 0.1)) == len(cut(X, np.ones(500), 0.1)) + 1


def test_the_sampled_width_of_the_squared_distance_is_the_known_one():
    X, Y = points(4000), points(4000, 1)
    known, found = kernel_width("sqeuclidean", X, Y), kernel_width(lambda x, y: torch.cdist(x, y).square(), X, Y)
    for eps in (1e-2, 1e-3):
        assert known(eps) == math.sqrt(eps / 2)
        # A sample of 64 cells, and sides that are powers of 2.
        assert 0.5 < found(eps) / known(eps) < 2


def test_the_pattern_holds_nearly_all_of_the_plan():
    X, Y = points(1500), points(1400, 1)
    a, b = np.full(1500, 1 / 1500), np.full(1400, 1 / 1400)
    grid = build(X, Y, a, b, 2e-3, "sqeuclidean", {}, 1e-6)
    (x_starts, y_starts, ptr, cols), _, density = grid.pattern(1e-12)
    assert density < 0.3
    sizes = y_starts.diff()[cols]
    pairs = sum(int((x_starts[i + 1] - x_starts[i]) * sizes[ptr[i] : ptr[i + 1]].sum()) for i in range(len(ptr) - 1))
    assert math.isclose(pairs / (1500 * 1400), density, rel_tol=1e-12)
