"""What each mode sees of the others, against sums over all index tuples."""

import pytest
import torch

from stochproc.tensor._dense import dense_moments
from stochproc.tensor._links import CPLink, TuckerLink, khatri_rao
from stochproc.tensor._packed import outer, pack, unpack
from tests.tensor.reference import brute_force_regressors

RANKS = (2, 3, 2)


def moments(ranks, n, gen):
    means, seconds = [], []
    for r in ranks:
        m = torch.randn(n, r, generator=gen)
        root = 0.3 * torch.randn(n, r, r, generator=gen)
        means.append(m)
        seconds.append(pack(root @ root.mT) + outer(m))
    return means, seconds


def tucker(gen, ranks=RANKS, diagonal=False):
    """A core without any symmetry."""
    d = torch.Size(ranks).numel()
    root = 0.3 * torch.randn(d, d, generator=gen)
    cov = root @ root.mT + 0.1 * torch.eye(d)
    return TuckerLink(
        torch.randn(ranks, generator=gen), cov.diagonal().clone() if diagonal else cov, 1.0, False, diagonal
    )


def second_moment_of(link):
    w = link.mean.flatten()
    cov = torch.diag(link.cov) if link.diagonal else link.cov
    return (torch.outer(w, w) + cov).reshape(*link.ranks, *link.ranks)


def superdiagonal(rank, K):
    core = torch.zeros((rank,) * K)
    for r in range(rank):
        core[(r,) * K] = 1.0
    return core


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("diagonal", [False, True])
def test_regressors_of_tucker_are_sums_over_all_index_tuples(k, diagonal, gen):
    link = tucker(gen, diagonal=diagonal)
    means, seconds = moments(RANKS, 4, gen)
    found = link.regressors(k, means, seconds)
    for n in range(4):
        mean, second = brute_force_regressors(
            link.mean,
            second_moment_of(link),
            k,
            [m[n] for m in means],
            [unpack(s[n], r) for s, r in zip(seconds, RANKS, strict=True)],
        )
        torch.testing.assert_close(found.mean[n], mean)
        torch.testing.assert_close(unpack(found.second[n], RANKS[k]), second)


@pytest.mark.parametrize("k", range(3))
def test_regressors_of_cp_are_those_of_a_superdiagonal_core(k, gen):
    means, seconds = moments((2, 2, 2), 4, gen)
    found = CPLink(2, 3).regressors(k, means, seconds)
    core = superdiagonal(2, 3)
    exact = TuckerLink(core, torch.zeros(8, 8), 1.0).regressors(k, means, seconds)
    torch.testing.assert_close(found.mean, exact.mean)
    torch.testing.assert_close(found.second, exact.second)


def test_all_modes_agree_about_the_entry_with_an_asymmetric_core(gen):
    link = tucker(gen)
    means, seconds = moments(RANKS, 5, gen)
    entry = torch.einsum("abc,na,nb,nc->n", link.mean, *means)
    torch.testing.assert_close(link.value(means), entry)
    for k in range(3):
        z = link.regressors(k, means, seconds)
        torch.testing.assert_close((z.mean * means[k]).sum(-1), entry)
        square = torch.einsum("nij,nij->n", unpack(z.second, RANKS[k]), unpack(seconds[k], RANKS[k]))
        torch.testing.assert_close(square, link.moments(means, seconds)[1])


def test_statistics_of_the_core_are_sums_of_outer_products(gen):
    link = tucker(gen)
    means, seconds = moments(RANKS, 6, gen)
    y, w = torch.randn(6, generator=gen), torch.rand(6, generator=gen)
    packed, linear = link.statistics(means, seconds, y, w)
    full = [unpack(s, r) for s, r in zip(seconds, RANKS, strict=True)]
    want = torch.einsum("n,nad,nbe,ncf->abcdef", w, *full).reshape(12, 12)
    torch.testing.assert_close(link.matrix(packed), want)
    torch.testing.assert_close(linear, (w * y) @ khatri_rao(means))
    # And the fold of E[W W'] pairs with them: sum w E f^2.
    torch.testing.assert_close((link.folded * packed).sum(), w @ link.moments(means, seconds)[1])


@pytest.mark.parametrize("ranks", [(3,), (2, 3), (1, 2, 1, 2)])
def test_any_number_of_modes(ranks, gen):
    link = tucker(gen, ranks)
    means, seconds = moments(ranks, 4, gen)
    mean, second = link.moments(means, seconds)
    torch.testing.assert_close(mean, khatri_rao(means) @ link.mean.flatten())
    matrix = khatri_rao([unpack(s, r).flatten(1) for s, r in zip(seconds, ranks, strict=True)])
    K = len(ranks)
    core = second_moment_of(link).permute([a for k in range(K) for a in (k, K + k)])
    torch.testing.assert_close(second, matrix @ core.flatten())
    packed, _ = link.statistics(means, seconds, torch.zeros(4), torch.ones(4))
    torch.testing.assert_close((link.folded * packed).sum(), second.sum())


@pytest.mark.parametrize("diagonal", [False, True])
def test_update_of_the_core_is_bayesian_regression(diagonal, gen):
    link = tucker(gen, (2, 2), diagonal)
    link.prior_variance = 0.5
    root = torch.randn(4, 6, generator=gen)
    precision, linear = root @ root.T, torch.randn(4, generator=gen)
    link.update(precision, linear)
    whole = precision + 2 * torch.eye(4)
    torch.testing.assert_close(link.mean.flatten(), torch.linalg.solve(whole, linear))
    torch.testing.assert_close(link.cov, 1 / whole.diagonal() if diagonal else torch.linalg.inv(whole))
    cov = torch.diag(link.cov) if diagonal else link.cov
    q = torch.distributions.MultivariateNormal(link.mean.flatten(), cov)
    p = torch.distributions.MultivariateNormal(torch.zeros(4), 0.5 * torch.eye(4))
    assert link.divergence() == pytest.approx(torch.distributions.kl_divergence(q, p).item())


def test_learned_core_variance_maximises_the_bound(gen):
    link = tucker(gen, (2, 2))
    link.learn_variance = True
    link.update_variance()
    best = link.divergence()
    for factor in (0.9, 1.1):
        other = TuckerLink(link.mean, link.cov, factor * link.prior_variance)
        assert other.divergence() > best


@pytest.mark.parametrize("kind", ["cp", "tucker"])
def test_dense_moments_are_those_of_rows(kind, gen):
    link = CPLink(2, 3) if kind == "cp" else tucker(gen, (2, 2, 2))
    tables, seconds = moments((2, 2, 2), 3, gen)
    covs = [s - outer(m) for s, m in zip(seconds, tables, strict=True)]
    mean, second = dense_moments(link, tables, covs)
    where = torch.cartesian_prod(*(torch.arange(3),) * 3)
    rows = link.moments([t[where[:, k]] for k, t in enumerate(tables)], [s[where[:, k]] for k, s in enumerate(seconds)])
    torch.testing.assert_close(mean.flatten(), rows[0])
    torch.testing.assert_close(second.flatten(), rows[1])


def test_kept_entries_of_the_core(gen):
    link = tucker(gen)
    mean, cov = link.mean.clone(), link.cov.clone()
    link.keep(1, torch.tensor([0, 2]))
    assert link.ranks == (2, 2, 2)
    torch.testing.assert_close(link.mean, mean[:, [0, 2]])
    want = cov.reshape(2, 3, 2, 2, 3, 2)[:, [0, 2]][:, :, :, :, [0, 2]].reshape(8, 8)
    torch.testing.assert_close(link.cov, want)


@pytest.mark.parametrize("diagonal", [False, True])
def test_what_the_rows_said_of_kept_entries_stays(diagonal, gen):
    link = tucker(gen, (2, 3))
    link.diagonal = diagonal
    root = torch.randn(6, 6, generator=gen)
    precision, linear = root @ root.mT, torch.randn(6, generator=gen)
    link.update(precision, linear)
    link.keep(1, torch.tensor([2, 0]))
    where = torch.tensor([2, 0, 5, 3])
    torch.testing.assert_close(link.precision, precision[where][:, where])
    torch.testing.assert_close(link.linear, linear[where])


def test_a_badly_conditioned_wide_core_is_solved_exactly(gen):
    link = tucker(gen, (4, 5))
    link.diagonal = True
    scale = torch.logspace(-6, 6, 20)
    root = torch.linalg.qr(torch.randn(20, 20, generator=gen))[0]
    precision, linear = (root * scale) @ root.mT, torch.randn(20, generator=gen)
    link.update(precision, linear)
    whole = precision + torch.eye(20) / link.prior_variance
    want = torch.linalg.solve(whole, linear)
    # Rounding times the condition number of 1e6, as the prior has precision 1.
    torch.testing.assert_close(link.mean.flatten(), want, rtol=0, atol=1e-8 * float(want.abs().max()))
