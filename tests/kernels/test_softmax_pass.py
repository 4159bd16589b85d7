"""The softmax pass against dense float64 formulas: values, dropped pairs, extreme eps, memory."""

import math
import subprocess
import sys

import pytest
import torch

from stochproc.kernels import keops_status, logsumexp, softmax_pass, support
from stochproc.kernels._dispatch import THRESHOLDS
from tests import reference
from tests.kernels.softmax_reference import dense_pass

COSTS = ["sqeuclidean", "euclidean", "cityblock"]
BACKENDS = ["dense", "chunked"]


def problem(gen, n=17, m=13, d=2, batch=(), dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*batch, *shape, generator=gen).to(dtype)

    w = torch.rand(*batch, n, generator=gen).to(dtype)
    return draw(n, d), draw(m, d), draw(m), w, draw(m, 2)


def close(got, want, tol):
    """Entries agree to ``tol`` of the largest one."""
    for a, b in zip(got, want, strict=True):
        scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tol * max(scale, 1e-300))


def precision(z, dtype):
    """An exponent of size z is rounded to z eps, which is the relative error of its exponential; 8 such roundings."""
    return 8 * torch.finfo(dtype).eps * max(1.0, float(z.abs().max()))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cost", COSTS)
def test_all_fields_equal_the_dense_float64_sums(cost, dtype, backend, batch, gen):
    x, y, g, w, v = problem(gen, batch=batch, dtype=dtype)
    eps, c = 0.3, reference.cost(cost, x, y)
    out = softmax_pass(cost, x, y, g, w, eps=eps, v=v, gram=True, backend=backend, block_bytes=100)
    assert {t.dtype for t in out} == {dtype}
    close(out, dense_pass(c, g, w, eps, v), precision(c / eps, dtype))


def test_arguments_broadcast_over_the_batch(gen):
    x, y, g, w, v = problem(gen, batch=(2, 3))
    # Each with other batch axes: all of them together make (2, 3).
    x, y, g, w, v = x[0, 0], y[:, :1], g[0], w[:, :1], v[0, 0]
    c = reference.cost("sqeuclidean", x, y)
    out = softmax_pass("sqeuclidean", x, y, g, w, eps=0.3, v=v, gram=True, block_bytes=1, backend="chunked")
    want = dense_pass(c, g, w.expand(2, 3, 17), 0.3, v)
    assert [t.shape for t in out] == [(2, 3, 17), (2, 3, 13), (2, 3, 17, 2), (2, 3, 13, 2)]
    close(out, want, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_of_the_soft_maxima_gives_the_weights_block_by_block(backend, gen):
    x, y, g, _, v = problem(gen)
    a, f = torch.rand(17, generator=gen), torch.randn(17, generator=gen)
    seen = []

    def weights(lse, rows):
        seen.append(rows)
        return a[rows] * torch.exp(f[rows] + lse)

    # 1 byte a block: blocks of the fewest rows there are, 16 and then 1.
    out = softmax_pass("sqeuclidean", x, y, g, weights, v=v, gram=True, backend=backend, block_bytes=1)
    assert seen == ([slice(0, 17)] if backend == "dense" else [slice(0, 16), slice(16, 17)])
    c = reference.cost("sqeuclidean", x, y)
    close(out, dense_pass(c, g, weights, 1.0, v), 1e-13)
    # P = diag(w) K is then a diag(e^f) e^(g - c).
    plan = a[:, None] * (f[:, None] + g - c).exp()
    torch.testing.assert_close(out.mass, plan.sum(0), rtol=1e-13, atol=0)


def test_only_what_is_asked_for_is_returned(gen):
    x, y, g, w, v = problem(gen)
    out = softmax_pass("euclidean", x, y, g, w)
    assert out.Kv is None
    assert out.PtKv is None
    assert softmax_pass("euclidean", x, y, g, w, v=v).PtKv is None
    torch.testing.assert_close(out.lse, logsumexp("euclidean", x, y, g), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (31, 1), (37, 41)])
def test_any_number_of_rows_and_columns(n, m, backend, gen):
    x, y, g, w, v = problem(gen, n, m, 3)
    out = softmax_pass("sqeuclidean", x, y, g, w, eps=0.5, v=v, gram=True, backend=backend, block_bytes=8 * m)
    close(out, dense_pass(reference.cost("sqeuclidean", x, y), g, w, 0.5, v), 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sets_of_points_give_empty_sums(backend):
    x, y = torch.zeros(0, 2), torch.zeros(3, 2)
    out = softmax_pass("sqeuclidean", x, y, torch.zeros(3), torch.zeros(0), v=torch.ones(3, 1), backend=backend)
    assert out.lse.shape == (0,)
    assert out.Kv.shape == (0, 1)
    assert torch.equal(out.mass, torch.zeros(3))
    out = softmax_pass("sqeuclidean", y, x, torch.zeros(0), torch.ones(3), v=torch.ones(0, 1), backend=backend)
    assert torch.equal(out.lse, torch.full((3,), -math.inf))
    assert torch.equal(out.Kv, torch.zeros(3, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cost", COSTS)
def test_a_dropped_column_has_no_mass_and_a_row_without_columns_is_zero(cost, dtype, backend, gen):
    x, y, g, w, v = problem(gen, dtype=dtype)
    g[3:] = -math.inf
    w[5] = 0
    out = softmax_pass(cost, x, y, g, w, eps=0.3, v=v, gram=True, backend=backend)
    assert torch.equal(out.mass[3:], torch.zeros(10, dtype=dtype))
    assert torch.equal(out.PtKv[3:], torch.zeros(10, 2, dtype=dtype))
    c = reference.cost(cost, x, y)
    close(out, dense_pass(c, g, w, 0.3, v), precision(c / 0.3, dtype))
    nothing = torch.full_like(g, -math.inf)
    # The function gives infinite weights to empty rows, as exp(-lse) would.
    out = softmax_pass(cost, x, y, nothing, lambda lse, rows: torch.exp(-lse), v=v, gram=True, backend=backend)
    assert torch.equal(out.lse, torch.full((17,), -math.inf, dtype=dtype))
    assert not any(t.any() for t in out[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_costs_drop_pairs_exactly(backend, gen):
    x, y, g, w, v = problem(gen)

    def forbidding(a, b):
        c = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
        # The first column and the first row lose all of their pairs.
        first = (b[:, 0] == y[0, 0]) | (a[:, :1] == x[0, 0])
        return torch.where((c > 4) | first, math.inf, c)

    out = softmax_pass(forbidding, x, y, g, w, eps=0.3, v=v, gram=True, backend=backend, block_bytes=100)
    close(out, dense_pass(forbidding(x, y), g, w, 0.3, v), 1e-13)
    assert out.lse[0] == -math.inf
    assert out.mass[0] == 0
    assert not out.PtKv[0].any()


def test_the_tensor_a_cost_returns_is_not_overwritten(gen):
    x, y, g, w, _ = problem(gen)
    c = reference.cost("euclidean", x, y)
    kept = c.clone()
    out = softmax_pass(lambda a, b: c, x, y, g, w, backend="dense")
    assert torch.equal(c, kept)
    torch.testing.assert_close(out.mass, softmax_pass("euclidean", x, y, g, w).mass, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("share", [1e-6, 1e6])
def test_no_exponent_overflows_at_an_extreme_eps(share, cost, dtype, gen):
    x, y, g, w, v = problem(gen, 37, 41, dtype=dtype)
    c = reference.cost(cost, x, y)
    eps = share * float(c.max())
    out = softmax_pass(cost, x, y, g, w, eps=eps, v=v, gram=True, backend="chunked", block_bytes=1)
    assert all(t.isfinite().all() for t in out)
    # Where float32 exponents would be wrong by 0.1 the pass runs in float64: 8 roundings of 1e6, plus those of the
    # float32 results.
    tol = precision((g.double() - c) / eps, torch.float64) + 8 * torch.finfo(dtype).eps
    close(out, dense_pass(c, g, w, eps, v), tol)


def test_a_column_out_of_reach_of_every_row_has_no_mass():
    x, y = torch.zeros(3, 1), torch.tensor([[0.0], [100.0]])
    out = softmax_pass("sqeuclidean", x, y, torch.zeros(2), torch.ones(3), eps=1.0)
    assert torch.equal(out.mass, torch.tensor([3.0, 0.0]))
    # e^-484 is within reach of float64, 2^-1000 = e^-693.
    out = softmax_pass("sqeuclidean", x, y - torch.tensor([[0.0], [78.0]]), torch.zeros(2), torch.ones(3), eps=1.0)
    torch.testing.assert_close(out.mass[1], torch.tensor(3 * math.exp(-484)), rtol=1e-12, atol=0)


def test_potentials_may_be_wider_than_the_points(gen):
    x, y, g, w, v = problem(gen, dtype=torch.float32)
    eps = 0.01
    # A potential close to optimal: its float32 rounding alone would move exponents by |g| / eps 6e-8.
    g, w = 100 + g.double() * 1e-3, w.double()
    out = softmax_pass("sqeuclidean", x, y, g, w, eps=eps, v=v)
    assert {t.dtype for t in out[:3]} == {torch.float64}
    c = reference.cost("sqeuclidean", x, y)
    want = dense_pass(c, g, w, eps, v)
    # Rounded exponents are those of the costs, up to 2e3, not of g: 8 eps 2e3.
    tol = precision(c / eps, torch.float32)
    torch.testing.assert_close(out.lse, want[0], rtol=0, atol=tol)
    close(out[:3], want[:3], tol)


def test_a_shift_of_the_points_changes_nothing(gen):
    x, y, g, w, v = problem(gen)
    near = softmax_pass("sqeuclidean", x, y, g, w, eps=0.3, v=v, gram=True)
    far = softmax_pass("sqeuclidean", x + 1e4, y + 1e4, g, w, eps=0.3, v=v, gram=True)
    # The shifted points are rounded to 1e4 eps, and differences of 5 are squared and divided by 0.3.
    close(far, near, 1e4 * 2.3e-16 * 2 * 5 / 0.3 * 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_taken_piece_by_piece_are_the_same(backend, gen, monkeypatch):
    x, y, g, w, v = problem(gen, 53, 41, dtype=torch.float32)
    monkeypatch.setitem(THRESHOLDS, "float32_max_terms", 7)
    out = softmax_pass("sqeuclidean", x, y, g, w, eps=0.3, v=v, gram=True, backend=backend)
    c = reference.cost("sqeuclidean", x, y)
    close(out, dense_pass(c, g, w, 0.3, v), precision(c / 0.3, torch.float32))


def test_the_result_is_outside_any_graph(gen):
    x, y, g, w, v = (t.requires_grad_() for t in problem(gen))
    eps = torch.tensor(0.3, requires_grad=True)
    out = softmax_pass("sqeuclidean", x, y, g, w, eps=eps, v=v, gram=True)
    assert not any(t.requires_grad for t in out)
    assert not any(t.requires_grad for t in support("sqeuclidean", x, y, w, g, w, eps=eps))


@pytest.mark.slow
def test_long_float32_sums_are_accumulated_in_float64():
    # 40,000 equal terms: float32 partial sums of this length alone would be off by about 1e-5.
    m = 40_000
    x, y, v = torch.zeros(3, 1).float(), torch.zeros(m, 1).float(), torch.full((m, 1), 1.1).float()
    out = softmax_pass("sqeuclidean", x, y, torch.zeros(m).float(), torch.ones(3), v=v)
    torch.testing.assert_close(out.lse, torch.full((3,), math.log(m)), rtol=1e-9, atol=0)
    torch.testing.assert_close(out.Kv, v[0].double().expand(3, 1), rtol=2e-7, atol=0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_matrix():
    # 20,000 x 20,000 float32 entries are 1.6 GB; in a process of its own, since the largest resident size is a
    # property of the process.
    code = """
import resource, torch
from stochproc.kernels import softmax_pass, support
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for n in (400, 20_000):
    x, g = torch.rand(n, 2), torch.zeros(n)
    softmax_pass("sqeuclidean", x, x, g, torch.ones(n), eps=1e-3, v=torch.ones(n, 1), gram=True, backend="chunked")
    print(peak())
x = x[:8000]
rows, _, _ = support("sqeuclidean", x, x, g[:8000], g[:8000], -5.0, eps=1e-3)
print(peak() - 3 * 20 * len(rows) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    small, large, found = map(float, done.stdout.split())
    assert large - small < 60, "extra memory in MB"
    assert found - small < 60, "extra memory in MB, beside three copies of what was found"


@pytest.mark.keops
@pytest.mark.slow
def test_keops_agrees_with_dense(gen):
    reason = keops_status(torch.float64)
    if reason is not None:
        pytest.skip(f"KeOps cannot be used here: {reason}")
    x, y, g, w, v = problem(gen)
    g[4:6] = -math.inf
    for gg in (g, torch.full_like(g, -math.inf)):
        out = softmax_pass("sqeuclidean", x, y, gg, w, eps=0.3, v=v, gram=True, backend="keops", strict=True)
        want = softmax_pass("sqeuclidean", x, y, gg, w, eps=0.3, v=v, gram=True, backend="dense")
        close(out, want, 1e-12)


def _call(**changes):
    arguments = {
        "cost": "euclidean",
        "x": torch.zeros(4, 2),
        "y": torch.zeros(3, 2),
        "g": torch.zeros(3),
        "w": torch.zeros(4),
    }
    return softmax_pass(**{**arguments, **changes})


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (lambda: {"cost": "cosine"}, ValueError, "unknown cost 'cosine'; valid: sqeuclidean"),
        (lambda: {"eps": 0.0}, ValueError, "eps must be positive and finite; got 0.0"),
        (lambda: {"eps": torch.ones(2)}, ValueError, "0-dim tensor"),
        (lambda: {"g": torch.zeros(2)}, ValueError, "g must have one entry a row of y, 3"),
        (lambda: {"g": torch.tensor([0.0, math.nan, 0.0])}, ValueError, "g must be finite or -inf; got 1 entries"),
        (lambda: {"g": torch.zeros(3).float()}, TypeError, "mixed dtypes: x is torch.float64, g is torch.float32"),
        (lambda: {"y": torch.zeros(3, 2).float()}, TypeError, "mixed dtypes"),
        (lambda: {"w": torch.zeros(3)}, ValueError, "w must have one entry a row of x, 4"),
        (lambda: {"w": torch.full((4,), math.inf)}, ValueError, "w must be finite; got 4"),
        (lambda: {"w": 1.0}, TypeError, "w must be a tensor or a function"),
        (lambda: {"w": lambda lse, rows: 1.0}, ValueError, "w must return one weight a row of the block"),
        (lambda: {"w": lambda lse, rows: lse * math.nan}, ValueError, "w must return finite weights"),
        (lambda: {"v": torch.zeros(2, 1)}, ValueError, r"v must have shape \(\*batch, m, p\) with m = 3"),
        (lambda: {"v": torch.full((3, 1), math.nan)}, ValueError, "v must be finite; got 3"),
        (lambda: {"gram": True}, ValueError, "gram must be False without v"),
        (lambda: {"x": torch.full((4, 2), math.nan)}, ValueError, "x must be finite"),
        (lambda: {"x": torch.full((4, 2), 1e200)}, OverflowError, "costs and g must be less than 1e299 eps"),
        (lambda: {"cost": lambda a, b: a @ b.mT + math.nan}, ValueError, "cost must return numbers or \\+inf; got NaN"),
        (
            lambda: {"cost": lambda a, b: a @ b.mT - math.inf},
            ValueError,
            "cost must return numbers or \\+inf; got NaN or -inf",
        ),
        (lambda: {"cost": lambda a, b: a}, ValueError, "cost must return a tensor of shape"),
        (lambda: {"w": torch.zeros(2, 4), "v": torch.zeros(5, 3, 1)}, ValueError, "batch shapes must broadcast"),
        (lambda: {"backend": "keos"}, ValueError, "unknown backend 'keos'"),
    ],
)
def test_bad_input_names_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        _call(**changes())
