"""Reductions restricted to blocks of pairs against the masked dense matrix."""

import math

import pytest
import torch

from stochproc.kernels import _ranges as ranges_module
from stochproc.kernels import expsum, keops_status, logsumexp, softmax_pass, support
from stochproc.kernels._ranges import as_ranges
from tests import reference
from tests.kernels.softmax_reference import allowed, dense_pass, random_ranges
from tests.kernels.test_softmax_pass import close, precision

COSTS = ["sqeuclidean", "euclidean", "cityblock"]
BACKENDS = ["dense", "chunked"]


@pytest.fixture(params=[0, 40, 10**9])
def overhead(request, monkeypatch):
    """Each row cell by itself, some together, all in groups of up to 20 rows: three ways to the same sums."""
    monkeypatch.setattr(ranges_module, "GROUP_OVERHEAD_PAIRS", request.param)
    monkeypatch.setattr(ranges_module, "MAX_GROUP_ROWS", 20)


def problem(gen, n=53, m=47, d=2, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, generator=gen).to(dtype)

    x, y = draw(n, d), draw(m, d)
    # Sorted by the first coordinate, as cells would be: recentring is then worth something.
    x, y = x[x[:, 0].argsort()], y[y[:, 0].argsort()]
    return x, y, draw(n), draw(m), torch.rand(n, generator=gen).to(dtype), draw(m, 2)


def masked(cost, x, y, ranges):
    return torch.where(allowed(ranges), reference.cost(cost, x, y), math.inf)


@pytest.mark.usefixtures("overhead")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("density", [0.0, 0.2, 0.7, 1.0])
def test_a_restricted_pass_equals_the_masked_matrix(density, cost, dtype, backend, gen):
    x, y, _, g, w, v = problem(gen, dtype=dtype)
    ranges = random_ranges(gen, 53, 47, 9, 7, density)
    c = masked(cost, x, y, ranges)
    g[:4] = -math.inf
    out = softmax_pass(cost, x, y, g, w, eps=0.3, v=v, gram=True, ranges=ranges, backend=backend, block_bytes=300)
    close(out, dense_pass(c, g, w, 0.3, v), precision(reference.cost(cost, x, y) / 0.3, dtype))
    # Columns in no block have no mass at all.
    assert not out.mass[c.isinf().all(0)].any()
    assert torch.equal(out.lse == -math.inf, c[:, 4:].isinf().all(1))


@pytest.mark.usefixtures("overhead")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cost", COSTS)
def test_restricted_soft_minima_and_products_equal_the_masked_matrix(cost, dtype, backend, gen):
    x, y, f, g, _, v = problem(gen, dtype=dtype)
    ranges = random_ranges(gen, 53, 47, 9, 7, 0.3)
    c = masked(cost, x, y, ranges)
    options = {"eps": 0.3, "ranges": ranges, "backend": backend, "block_bytes": 300}
    z = (g.double() - c) / 0.3
    tol = precision(reference.cost(cost, x, y) / 0.3, dtype)
    close([logsumexp(cost, x, y, g, **options)], [z.logsumexp(-1)], tol)
    want = (z + f.double()[:, None] / 0.3).exp() @ v.double()
    close([expsum(cost, x, y, f, g, v, **options)], [want], tol)


@pytest.mark.usefixtures("overhead")
@pytest.mark.parametrize("cost", ["sqeuclidean", "cityblock"])
def test_the_support_is_restricted_too(cost, gen):
    x, y, f, g, _, _ = problem(gen)
    ranges = random_ranges(gen, 53, 47, 9, 7, 0.3)
    c = masked(cost, x, y, ranges)
    rows, columns, costs = support(cost, x, y, f, g, -3.0, ranges=ranges, block_bytes=300)
    want = (f[:, None] + g - c > -3.0).nonzero()
    assert torch.equal(torch.stack([rows, columns], 1), want)
    torch.testing.assert_close(costs, c[rows, columns], rtol=1e-14, atol=0)


def test_a_pattern_of_all_blocks_changes_nothing(gen):
    x, y, _, g, w, v = problem(gen)
    everything = (torch.tensor([0, 53]), torch.tensor([0, 47]), torch.tensor([0, 1]), torch.tensor([0]))
    for backend in BACKENDS:
        out = softmax_pass("sqeuclidean", x, y, g, w, v=v, gram=True, ranges=everything, backend=backend)
        close(out, softmax_pass("sqeuclidean", x, y, g, w, v=v, gram=True, backend=backend), 1e-14)


def test_the_order_of_the_blocks_does_not_matter_and_a_repeated_one_counts_once(gen):
    x, y, _, g, w, _ = problem(gen)
    x_starts, y_starts, ptr, cols = random_ranges(gen, 53, 47, 5, 6, 0.6)
    mixed = [cols[ptr[i] : ptr[i + 1]].flip(0) for i in range(5)]
    mixed[2] = torch.cat([mixed[2], mixed[2][:1]])
    counts = torch.tensor([0] + [len(t) for t in mixed])
    shuffled = (x_starts, y_starts, counts.cumsum(0), torch.cat(mixed))
    out = softmax_pass("sqeuclidean", x, y, g, w, ranges=shuffled)
    want = softmax_pass("sqeuclidean", x, y, g, w, ranges=(x_starts, y_starts, ptr, cols))
    assert torch.equal(out.lse, want.lse)
    assert torch.equal(out.mass, want.mass)


def test_near_pairs_keep_their_float32_digits_however_small_eps_is(gen):
    # Cells of length 1 on a line of length 40, blocks of neighbours. The costs of the whole line, up to 1600, would
    # leave float32 exponents an error of 1600 / eps 6e-8 = 0.1.
    n, m, eps = 400, 500, 1e-3
    x, y = ((40 * torch.rand(k, 1, generator=gen)).sort(0).values.float() for k in (n, m))
    x_starts, y_starts = (torch.searchsorted(t.double().squeeze(-1), torch.arange(41.0)) for t in (x, y))
    blocks = (torch.arange(40)[:, None] - torch.arange(40)).abs() <= 1
    ranges = (x_starts, y_starts, torch.cat([torch.zeros(1).long(), blocks.sum(1).cumsum(0)]), blocks.nonzero()[:, 1])
    # As large as the costs of the whole, and in float64.
    g, w = 1600 + torch.rand(m, generator=gen), torch.rand(n, generator=gen)
    out = softmax_pass("sqeuclidean", x, y, g, w, eps=eps, ranges=ranges, backend="chunked")
    want = dense_pass(masked("sqeuclidean", x, y, ranges), g, w, eps, torch.zeros(m, 1))
    # Seen from the mean of the rows, exponents are at most (2 |u| |w| + |w|^2) / eps log2 e with |u| <= 0.5 and
    # |w| <= 1.5, and potentials differ by 1.
    tol = precision(torch.tensor(4.75 / eps * 1.45), torch.float32)
    close(out[:2], want[:2], tol)
    # The mean error of a rounding is well below its bound, here an eighth of it.
    assert float((out.mass - want[1]).abs().sum() / w.sum()) < tol / 8


@pytest.mark.usefixtures("overhead")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cost", COSTS)
def test_restricted_reductions_pass_gradcheck_in_every_argument(cost, backend, gen):
    x, y, f, g, _, v = (t.requires_grad_() for t in problem(gen, 7, 6))
    eps = torch.tensor(0.7, requires_grad=True)
    starts = (torch.tensor([0, 2, 2, 5, 7]), torch.tensor([0, 3, 6]))
    ranges = (*starts, torch.tensor([0, 1, 2, 4, 4]), torch.tensor([1, 0, 0, 1]))
    options = {"ranges": ranges, "backend": backend, "block_bytes": 1}

    def soft(*a):
        # The last two rows are empty: -inf has no finite differences.
        return logsumexp(cost, *a[:3], eps=a[3], **options)[:5]

    assert torch.autograd.gradcheck(soft, (x, y, g, eps))
    assert torch.autograd.gradcheck(lambda *a: expsum(cost, *a[:5], eps=a[5], **options), (x, y, f, g, v, eps))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_of_a_restricted_soft_minimum(backend, gen):
    x, y, _, g, _, _ = (t.requires_grad_() for t in problem(gen, 4, 3))
    ranges = (torch.tensor([0, 2, 4]), torch.tensor([0, 1, 3]), torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]))
    assert torch.autograd.gradgradcheck(
        lambda *a: logsumexp("sqeuclidean", *a, eps=0.7, ranges=ranges, backend=backend, block_bytes=1), (x, y, g)
    )


def test_the_parameters_of_a_module_cost_get_gradients_on_a_pattern(gen):
    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, a, b):
            return ((a.unsqueeze(-2) - b.unsqueeze(-3)).square() * self.weight).sum(-1)

    x, y, _, g, _, _ = problem(gen)
    ranges = random_ranges(gen, 53, 47, 5, 6, 0.5)
    kept = allowed(ranges).any(1)
    cost = Weighted()
    logsumexp(cost, x, y, g, ranges=ranges, backend="chunked")[kept].sum().backward()
    other = Weighted()
    z = torch.where(allowed(ranges), g - other(x, y), -math.inf)[kept]
    z.logsumexp(-1).sum().backward()
    torch.testing.assert_close(cost.weight.grad, other.weight.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sets_of_points_have_empty_patterns(backend):
    nothing, some = torch.zeros(0, 2), torch.zeros(3, 2)
    none = torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.tensor([], dtype=torch.int64)
    out = softmax_pass("euclidean", nothing, nothing, torch.zeros(0), torch.zeros(0), ranges=none, backend=backend)
    assert out.lse.shape == out.mass.shape == (0,)
    ranges = (torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([0, 0]), none[3])
    lowest = torch.full((3,), -math.inf)
    out = softmax_pass("euclidean", some, nothing, torch.zeros(0), torch.ones(3), ranges=ranges, backend=backend)
    assert torch.equal(out.lse, lowest)
    assert torch.equal(logsumexp("euclidean", some, nothing, torch.zeros(0), ranges=ranges, backend=backend), lowest)


def test_the_pattern_of_keops_lists_the_same_pairs(gen):
    ranges = random_ranges(gen, 53, 47, 9, 7, 0.4)
    x, y = torch.zeros(53, 1), torch.zeros(47, 1)
    spans_i, slices_i, reds_j, spans_j, slices_j, reds_i = as_ranges(ranges, x, y).keops(x.device)
    for spans, slices, reds, shape in ((spans_i, slices_i, reds_j, (53, 47)), (spans_j, slices_j, reds_i, (47, 53))):
        found = torch.zeros(shape, dtype=torch.bool)
        begin = 0
        for (a, b), end in zip(spans.tolist(), slices.tolist(), strict=True):
            for c, d in reds[begin:end].tolist():
                found[a:b, c:d] = True
            begin = end
        assert torch.equal(found if shape == (53, 47) else found.T, allowed(ranges))


@pytest.mark.keops
@pytest.mark.slow
def test_keops_on_a_pattern_agrees_with_dense(gen):
    reason = keops_status(torch.float64)
    if reason is not None:
        pytest.skip(f"KeOps cannot be used here: {reason}")
    x, y, _, g, w, v = problem(gen)
    ranges = random_ranges(gen, 53, 47, 9, 7, 0.3)
    out, want = (
        softmax_pass("sqeuclidean", x, y, g, w, eps=0.3, v=v, gram=True, ranges=ranges, backend=backend)
        for backend in ("keops", "dense")
    )
    close(out, want, 1e-12)
    soft = [logsumexp("sqeuclidean", x, y, g, eps=0.3, ranges=ranges, backend=b) for b in ("keops", "dense")]
    close(soft[:1], soft[1:], 1e-12)


GOOD = ([0, 2, 4], [0, 3], [0, 1, 1], [0])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, [1, 2, 4], ValueError, "ranges: x_starts must start at 0; got 1"),
        (0, [], ValueError, "ranges: x_starts must start at 0; got an empty array"),
        (0, [0, 2, 5], ValueError, "ranges: x_starts must end at the number of rows of x, 4; got 5"),
        (0, [0, 5, 4], ValueError, "ranges: x_starts must not decrease; got 5 before 4 at index 2"),
        (0, [0.0, 2.0, 4.0], TypeError, "ranges: x_starts must hold integers; got float"),
        (1, [0, 2], ValueError, "ranges: y_starts must end at the number of rows of y, 3; got 2"),
        (1, [[0, 3]], ValueError, "ranges: y_starts must be one-dimensional"),
        (2, [0, 1], ValueError, "ranges: block_ptr must have one entry more than there are row cells, 3; got 2"),
        (2, [0, 1, 2], ValueError, "ranges: block_ptr must end at the length of block_cols, 1; got 2"),
        (3, [1], ValueError, "ranges: block_cols must be column cells between 0 and 0; got 1"),
        (3, [-1], ValueError, "ranges: block_cols must be column cells between 0 and 0; got -1"),
    ],
)
def test_a_malformed_pattern_is_named(position, value, error, message):
    ranges = [torch.tensor(t) for t in GOOD]
    ranges[position] = torch.tensor(value)
    with pytest.raises(error, match=message):
        logsumexp("euclidean", torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(3), ranges=tuple(ranges))


@pytest.mark.bad_input
def test_a_pattern_is_four_arrays_and_has_no_batch():
    x, y, g = torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(3)
    ranges = tuple(torch.tensor(t) for t in GOOD)
    with pytest.raises(ValueError, match=r"ranges must be a tuple \(x_starts, y_starts, block_ptr, block_cols\)"):
        logsumexp("euclidean", x, y, g, ranges=ranges[:3])
    with pytest.raises(ValueError, match="ranges must not be given together with batch axes"):
        logsumexp("euclidean", x.expand(2, 4, 2), y, g, ranges=ranges)
    with pytest.raises(ValueError, match="ranges must not be given together with batch axes"):
        softmax_pass("euclidean", x, y, g, torch.zeros(2, 4), ranges=ranges)
