"""The plan as an operator equals the plan written out."""

import numpy as np
import pytest
import torch

from stochproc._base import Given
from stochproc.ot._lazy_plan import LazyPlan


def made(numpy=False, dtype=torch.float64, n=7, m=5):
    gen = torch.Generator().manual_seed(0)
    X, Y = (torch.rand(k, 2, generator=gen).to(dtype) for k in (n, m))
    a, b, f, g = (torch.rand(k, generator=gen) for k in (n, m, n, m))
    a[1] = 0.0
    P = a[:, None] * b * ((f[:, None] + g - torch.cdist(X.double(), Y.double()).square()) / 0.1).exp()
    given = Given.of(X.numpy() if numpy else X)
    return LazyPlan(X, Y, a, b, f, g, 0.1, "sqeuclidean", given), P


def test_products_from_both_sides_equal_those_of_the_matrix(gen):
    plan, P = made()
    v, V, w = torch.rand(5, generator=gen), torch.rand(5, 3, generator=gen), torch.rand(7, generator=gen)
    torch.testing.assert_close(plan @ v, P @ v)
    torch.testing.assert_close(plan @ V, P @ V)
    torch.testing.assert_close(plan.T @ w, P.T @ w)


def test_numpy_gets_numpy(gen):
    plan, P = made(numpy=True)
    v, w = torch.rand(5, generator=gen).numpy(), torch.rand(7, generator=gen).numpy()
    assert isinstance(plan @ v, np.ndarray)
    np.testing.assert_allclose(plan @ v, P.numpy() @ v, rtol=1e-12)
    np.testing.assert_allclose(w @ plan, w @ P.numpy(), rtol=1e-12)
    np.testing.assert_allclose(np.asarray(plan), P.numpy(), rtol=1e-12)
    np.testing.assert_allclose(plan.to_sparse(1e-30).toarray(), P.numpy(), rtol=1e-12)


def test_a_row_and_the_large_entries_are_those_of_the_matrix():
    plan, P = made()
    torch.testing.assert_close(plan.row(2), P[2])
    torch.testing.assert_close(plan.row(-1), P[-1])
    level = 1.01 * float(P.median())  # between two entries
    torch.testing.assert_close(plan.to_sparse(level).to_dense(), torch.where(P > level, P, 0.0))


def test_it_has_the_shape_and_dtype_of_what_it_returns():
    plan, _ = made(dtype=torch.float32)
    assert plan.shape == (7, 5) == plan.T.shape[::-1]
    assert plan.dtype == (plan @ torch.ones(5)).dtype == torch.float32
    assert made(numpy=True, dtype=torch.float32)[0].dtype == np.float32


@pytest.mark.slow
def test_a_large_plan_is_not_written_out():
    plan, _ = made(n=20_000, m=5001)
    with pytest.raises(ValueError, match="at most 1e\\+08 entries"):
        np.asarray(plan)


def test_vectors_that_do_not_fit_and_missing_rows_are_refused():
    plan, _ = made()
    with pytest.raises(ValueError, match="v must have one entry"):
        plan @ torch.ones(6)
    with pytest.raises(IndexError, match="i must lie in"):
        plan.row(7)
    with pytest.raises(ValueError, match="threshold must be"):
        plan.to_sparse(0.0)
