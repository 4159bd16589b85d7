"""The pairs above a level against the dense matrix."""

import math

import pytest
import torch

from stochproc.kernels import _support as support_module
from stochproc.kernels import support
from tests import reference

COSTS = ["sqeuclidean", "euclidean", "cityblock"]


def problem(gen, n=37, m=29, d=2, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, generator=gen).to(dtype)

    return draw(n, d), draw(m, d), draw(n), draw(m), draw(n) - 3


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cost", COSTS)
def test_pairs_above_the_level_come_in_the_order_of_the_rows_with_their_costs(cost, dtype, by_row, gen):
    x, y, f, g, level = problem(gen, dtype=dtype)
    level = level if by_row else -3.0
    rows, columns, c = support(cost, x, y, f, g, level, eps=0.5, block_bytes=100)
    exact = reference.cost(cost, x, y)
    z = (f.double()[:, None] + g.double() - exact) / 0.5
    limit = level.double()[:, None] if by_row else level
    # No exponent of this seed is within float32 rounding of its level.
    assert float((z - limit).abs().min()) > 1e-5
    assert torch.equal(torch.stack([rows, columns], 1), (z > limit).nonzero())
    assert rows.dtype == columns.dtype == torch.int64
    assert c.dtype == dtype
    # From explicit differences: right to the last digits of the dtype also where the cost is small.
    torch.testing.assert_close(c.double(), exact[rows, columns], rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_costs_of_near_pairs_are_accurate_far_from_the_origin():
    x = torch.tensor([[1e4, 0.0]])
    y = x + torch.tensor([[1e-5, 0.0], [3.0, 4.0]])
    _, columns, c = support("sqeuclidean", x, y, torch.zeros(1), torch.zeros(2), -30.0)
    assert columns.tolist() == [0, 1]
    torch.testing.assert_close(c, (y - x).square().sum(1), rtol=1e-15, atol=0)


def test_dropped_rows_columns_and_pairs_are_never_kept(gen):
    x, y, f, g, _ = problem(gen)
    f[3], g[5] = -math.inf, -math.inf

    def forbidding(a, b):
        c = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
        return torch.where(c > 4, math.inf, c)

    kept = forbidding(x, y) < math.inf
    kept[3], kept[:, 5] = False, False
    rows, columns, c = support(forbidding, x, y, f, g, -math.inf, eps=0.1, block_bytes=100)
    assert torch.equal(torch.stack([rows, columns], 1), kept.nonzero())
    assert torch.equal(c, forbidding(x, y)[rows, columns])
    assert len(support(forbidding, x, y, f, g, math.inf)[0]) == 0
    level = torch.full((37,), math.inf)
    level[7] = -math.inf
    assert torch.equal(support(forbidding, x, y, f, g, level)[0].unique(), torch.tensor([7]))


def test_results_of_many_pieces_are_joined_in_order(gen, monkeypatch):
    x, y, f, g, _ = problem(gen)
    whole = support("sqeuclidean", x, y, f, g, -8.0)
    monkeypatch.setattr(support_module, "PIECE", 7)
    pieces = support("sqeuclidean", x, y, f, g, -8.0, block_bytes=1)
    assert len(whole[0]) > 70
    for a, b in zip(whole, pieces, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_potentials_may_be_wider_than_the_points_and_eps_tiny(dtype, gen):
    x, y, f, g, _ = problem(gen, dtype=dtype)
    c = reference.cost("sqeuclidean", x, y)
    # Hard potentials: the smallest cost of each row has exponent 0, all others are far below.
    f, g, eps = c.min(1).values + 1e-9, torch.zeros(29), 1e-6 * float(c.max())
    rows, columns, _ = support("sqeuclidean", x, y, f, g, -1.0, eps=eps)
    assert torch.equal(rows, torch.arange(37))
    assert torch.equal(columns, c.argmin(1))


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (1, 1)])
def test_few_or_no_points(n, m):
    x, y = torch.zeros(n, 2), torch.zeros(m, 2)
    rows, columns, c = support("sqeuclidean", x, y, torch.zeros(n), torch.zeros(m), -1.0)
    assert len(rows) == len(columns) == len(c) == n * m


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (lambda: {"x": torch.zeros(2, 4, 2)}, ValueError, "x and y must have no batch axes"),
        (lambda: {"f": torch.zeros(2, 4)}, ValueError, "f must have no batch axes"),
        (lambda: {"f": torch.zeros(3)}, ValueError, "f must have one entry a row of x, 4"),
        (lambda: {"f": torch.full((4,), math.nan)}, ValueError, r"f must be finite or -inf; got 4"),
        (lambda: {"g": torch.zeros(4)}, ValueError, "g must have one entry a row of y, 3"),
        (lambda: {"g": torch.zeros(3).float()}, TypeError, "mixed dtypes"),
        (lambda: {"eps": -1.0}, ValueError, "eps must be positive and finite; got -1.0"),
        (lambda: {"level": torch.zeros(3)}, ValueError, "level must be a number or have one entry a row of x, 4"),
        (lambda: {"level": math.nan}, ValueError, "level must not be NaN"),
        (lambda: {"level": "1"}, TypeError, "level must be a number or a tensor"),
        (lambda: {"cost": "cosine"}, ValueError, "unknown cost 'cosine'"),
        (lambda: {"cost": lambda a, b: a @ b.mT + math.nan}, ValueError, r"cost must return numbers or \+inf; got NaN"),
        (lambda: {"cost": lambda a, b: a @ b.mT - math.inf}, ValueError, r"got NaN or -inf"),
        (lambda: {"y": torch.full((3, 2), math.inf)}, ValueError, "y must be finite"),
    ],
)
def test_bad_input_names_the_argument(changes, error, message):
    arguments = {"cost": "euclidean", "x": torch.zeros(4, 2), "y": torch.zeros(3, 2), "level": 0.0}
    arguments |= {"f": torch.zeros(4), "g": torch.zeros(3)}
    with pytest.raises(error, match=message):
        support(**{**arguments, **changes()})
