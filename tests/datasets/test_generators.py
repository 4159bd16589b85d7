import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from stochproc import datasets


def covariance_errors(paths, expected):
    """Errors of the sample second moments of centred normal paths, in standard errors."""
    sample = paths.mT @ paths / len(paths)
    variances = expected.diagonal()
    return (sample - expected).abs() / ((variances[:, None] * variances + expected**2) / len(paths)).sqrt()


def fbm_covariance(t, hurst):
    power = t ** (2 * hurst)
    return 0.5 * (power[:, None] + power - (t[:, None] - t).abs() ** (2 * hurst))


@pytest.mark.parametrize("hurst", [0.05, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("grid", ["regular", "irregular"])
def test_fractional_brownian_motion_has_its_covariance(hurst, grid):
    times = None if grid == "regular" else torch.tensor([0.0, 0.1, 0.11, 0.5, 1.0, 3.0])
    draw = datasets.make_fractional_brownian(
        40_000, times, hurst=hurst, n_steps=8, horizon=2, scale=1.5, random_state=1
    )
    assert draw.method == ("circulant" if grid == "regular" else "cholesky")
    assert not draw.paths[:, 0].any()
    t = draw.times[1:]
    # At most 36 distinct entries: five standard errors fail by chance with probability 2e-5 at a new seed.
    assert covariance_errors(draw.paths[:, 1:], 1.5**2 * fbm_covariance(t, hurst)).max() < 5


def test_paths_from_one_complex_transform_are_independent():
    paths = datasets.make_fractional_brownian(40_000, hurst=0.8, n_steps=4, random_state=2).paths[:, 1:]
    cross = paths[::2].mT @ paths[1::2] / 20_000
    sd = fbm_covariance(torch.linspace(0, 1, 5)[1:], 0.8).diagonal().sqrt()
    # 16 entries within 5 standard errors: 1e-5 by chance.
    assert (cross.abs() / (sd[:, None] * sd) * math.sqrt(20_000)).max() < 5


@pytest.mark.parametrize("hurst", [0.1, 0.9])
def test_fractional_brownian_motion_is_self_similar(hurst):
    one = datasets.make_fractional_brownian(2, hurst=hurst, n_steps=50, random_state=3)
    many = datasets.make_fractional_brownian(2, hurst=hurst, n_steps=50, horizon=9.0, random_state=3)
    torch.testing.assert_close(many.paths, 9.0**hurst * one.paths, rtol=1e-13, atol=1e-13)


def test_hurst_index_shows_in_the_second_differences_of_a_long_path():
    path = datasets.make_fractional_brownian(1, hurst=0.9, n_steps=2**18, random_state=0).paths[0]
    # Second differences forget the long memory: errors of order n^(-1/2), measured 3e-3 over 16 seeds.
    v1, v2 = ((path[2 * k :] - 2 * path[k:-k] + path[: -2 * k]).square().mean() for k in (1, 2))
    assert math.log2(v2 / v1) / 2 == pytest.approx(0.9, abs=0.01)


def test_grid_that_starts_after_zero_is_not_taken_for_regular():
    draw = datasets.make_fractional_brownian(3, torch.tensor([1.0, 2.0, 3.0]), hurst=0.4, random_state=0)
    assert draw.method == "cholesky"
    assert draw.paths.shape == (3, 3)
    assert draw.paths[:, 0].abs().min() > 0


def test_a_single_time_works():
    assert datasets.make_fractional_brownian(2, torch.tensor([0.0]), random_state=0).paths.tolist() == [[0.0], [0.0]]
    assert datasets.make_fractional_brownian(2, n_steps=1, random_state=0).paths.shape == (2, 2)


@pytest.mark.parametrize("hurst", [0.0, 1.0, -0.5, math.nan])
def test_hurst_outside_its_range_is_refused(hurst):
    with pytest.raises(ValueError, match=r"hurst must lie in \(0, 1\); got"):
        datasets.make_fractional_brownian(hurst=hurst)


@pytest.mark.parametrize("times", [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.5]])
def test_times_that_do_not_increase_are_refused(times):
    with pytest.raises(ValueError, match="times must increase strictly, from 0 on"):
        datasets.make_fractional_brownian(times=torch.tensor(times))


def exponential(x, y):
    return 3.0 * torch.exp(-torch.cdist(x, y) / 0.2)


def test_gp_regression_is_a_draw_of_its_kernel_and_noise():
    n = 400
    problem = datasets.make_gp_regression(n, 2, kernel=exponential, noise=0.5, scale_prior=4.0, random_state=0)
    assert problem.X.shape == (n, 2)
    assert problem.X.min() >= 0
    assert problem.X.max() <= 1
    assert problem.s == 4.0
    assert problem.noise_variance == 2.0
    # Both are chi-square with n degrees of freedom; five standard errors, 1e-6 by chance.
    quadratic = problem.f @ torch.linalg.solve(4.0 * exponential(problem.X, problem.X), problem.f)
    noise = ((problem.y - problem.f) ** 2).sum() / 2.0
    for value in (quadratic, noise):
        assert abs(value.item() - n) < 5 * math.sqrt(2 * n)


def test_gp_regression_without_noise_or_with_independent_noise():
    quiet = datasets.make_gp_regression(20, noise=0, random_state=0)
    assert torch.equal(quiet.y, quiet.f)
    own = datasets.make_gp_regression(20, noise=0.5, scale_prior=9.0, noise_model="independent", random_state=0)
    assert own.noise_variance == 0.5


def test_gp_regression_draws_one_scale_from_its_prior():
    class Prior:
        def sample(self, shape, *, generator):
            return 10 * torch.rand(shape, generator=generator)

    problem = datasets.make_gp_regression(30, scale_prior=Prior(), noise=0.1, random_state=1)
    assert 0 < problem.s < 10
    assert problem.noise_variance == pytest.approx(0.1 * problem.s, rel=1e-15)


def test_smooth_kernel_on_many_close_points_is_drawn_without_a_warning():
    problem = datasets.make_gp_regression(300, 1, lengthscale=1.0, random_state=0)
    assert problem.f.isfinite().all()


def test_student_t_paths_share_one_scale_a_path():
    df, n = 5.0, 10
    draw = datasets.make_student_t_process(
        4000, df=df, kernel=exponential, times=torch.linspace(0, 1, n), random_state=0
    )
    torch.testing.assert_close(draw.shape_matrix, exponential(draw.times[:, None], draw.times[:, None]))
    # x' K^-1 x / n of a multivariate t is F(n, df), and given its scale s chi-square / n times s.
    quadratic = (draw.paths * torch.linalg.solve(draw.shape_matrix, draw.paths.mT).mT).sum(1)
    assert stats.kstest((quadratic / n).numpy(), stats.f(n, df).cdf).pvalue > 0.01
    assert stats.kstest((quadratic / draw.scales).numpy(), stats.chi2(n).cdf).pvalue > 0.01
    assert stats.kstest(draw.scales.numpy(), stats.invgamma(df / 2, scale=df / 2).cdf).pvalue > 0.01


@pytest.mark.parametrize("structure", ["tucker", "cp"])
@pytest.mark.parametrize("grid", ["regular", "random"])
def test_functional_tensor_is_core_times_factors(structure, grid):
    rank = (2, 3, 1) if structure == "tucker" else 2
    data = datasets.make_functional_tensor((12, 9, 7), rank, structure=structure, grid=grid, noise=0.0, random_state=0)
    expected = torch.einsum("abc,ia,jb,kc->ijk", data.core, *data.factors)
    torch.testing.assert_close(data.signal, expected)
    assert torch.equal(data.tensor, data.signal)
    assert data.signal.square().mean().item() == pytest.approx(1.0, rel=1e-12)
    torch.testing.assert_close(data.function(data.X), data.y)
    if structure == "cp":
        assert data.core.count_nonzero() == 2


def test_unfoldings_of_a_functional_tensor_have_its_rank():
    data = datasets.make_functional_tensor((12, 9, 7), (2, 3, 2), noise=0.0, random_state=0)
    ranks = [int(torch.linalg.matrix_rank(data.signal.movedim(k, 0).flatten(1), rtol=1e-10)) for k in range(3)]
    assert ranks == [2, 3, 2]


def test_noise_and_gaps_of_a_functional_tensor_are_as_asked_for():
    data = datasets.make_functional_tensor((40, 40, 10), noise=0.25, missing=0.3, random_state=0)
    n = data.tensor.numel()
    assert torch.equal(data.tensor.isnan(), ~data.mask)
    assert torch.equal(data.tensor[data.mask], data.y)
    # Five standard errors of a proportion, and of a variance.
    assert abs(data.mask.double().mean().item() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / n)
    error = data.y - data.signal[data.mask]
    assert abs(error.var().item() - 0.25) < 5 * 0.25 * math.sqrt(2 / len(error))


def test_factor_functions_resemble_unit_draws_with_an_rbf_kernel():
    # Covariance exp(-(x-y)²/2l²) over 2000 independent functions, five standard errors. A sum of 64 terms is not
    # quite normal: its fourth moment is larger by 3 * 3/64 of the square, within the margin.
    functions = datasets.make_functional_tensor((2,), 2000, lengthscale=0.2, random_state=0).functions[0]
    x = torch.linspace(0, 1, 6)
    expected = torch.exp(-0.5 * ((x[:, None] - x) / 0.2) ** 2)
    assert covariance_errors(functions(x).mT, expected).max() < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": (2, 2)}, "rank must have one number a mode, 3 in all"),
        ({"rank": (2, 2, 3), "structure": "cp"}, "rank must be the same in every mode"),
        ({"missing": 1.0}, r"missing must lie in \[0, 1\)"),
        ({"noise": -1.0}, "noise must be non-negative"),
        ({"shape": ()}, "shape must have at least one mode"),
        ({"grid": "hexagonal"}, "grid must be one of"),
    ],
)
def test_functional_tensor_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        datasets.make_functional_tensor(**options)


def test_map_between_clouds_pushes_one_normal_onto_the_other_at_the_stated_cost():
    clouds = datasets.make_clouds(10, 10, 3, random_state=0)
    matrix = (clouds.transport_map(torch.eye(3)) - clouds.transport_map(torch.zeros(3, 3))).mT
    torch.testing.assert_close(matrix, matrix.mT)
    torch.testing.assert_close(matrix @ clouds.cov_source @ matrix.mT, clouds.cov_target)
    torch.testing.assert_close(clouds.transport_map(clouds.mean_source[None])[0], clouds.mean_target)
    # E|x - T x|² for x ~ N(m, A) is |m - m'|² + tr((I - T) A (I - T)').
    moved = torch.eye(3) - matrix
    cost = 9.0 + (moved @ clouds.cov_source @ moved.mT).trace()
    assert clouds.cost == pytest.approx(cost.item(), rel=1e-12)


def test_clouds_have_the_stated_moments():
    clouds = datasets.make_clouds(40_000, 30_000, 2, separation=1.0, random_state=0)
    assert clouds.a.sum().item() == pytest.approx(1.0)
    for side in ("source", "target"):
        x, mean, cov = clouds[f"X_{side}"], clouds[f"mean_{side}"], clouds[f"cov_{side}"]
        # Five standard errors.
        assert ((x.mean(0) - mean).abs() < 5 * (cov.diagonal() / len(x)).sqrt()).all()
        assert covariance_errors(x - mean, cov).max() < 5


def test_plan_between_histograms_is_optimal():
    n = 12
    pair = datasets.make_histograms(n, n_modes=2, random_state=0)
    torch.testing.assert_close(pair.plan.sum(1), pair.a, rtol=0, atol=1e-15)
    torch.testing.assert_close(pair.plan.sum(0), pair.b, rtol=0, atol=1e-15)
    assert pair.a.min() > 0
    assert pair.a.sum().item() == pytest.approx(1.0, rel=1e-15)
    marginals = np.vstack([np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))])
    exact = optimize.linprog(
        pair.M.numpy().ravel(), A_eq=marginals, b_eq=torch.cat([pair.a, pair.b]).numpy(), method="highs"
    )
    # Feasibility tolerance of HiGHS is 1e-7.
    assert pair.cost == pytest.approx(exact.fun, abs=1e-7)


GENERATORS = [name for name in datasets.__all__ if name.startswith("make_")]


@pytest.mark.parametrize("name", GENERATORS)
def test_equal_seeds_give_equal_bits_in_float64(name):
    make = getattr(datasets, name)
    one, two, other = make(random_state=5), make(random_state=5), make(random_state=6)
    tensors = {k: v for k, v in one.items() if isinstance(v, torch.Tensor)}
    assert tensors
    assert all(v.dtype in (torch.float64, torch.bool) for v in tensors.values())
    assert all(torch.equal(v.nan_to_num(), two[k].nan_to_num()) for k, v in tensors.items())
    assert any(not torch.equal(v, other[k]) for k, v in tensors.items() if v.shape == other[k].shape)
    assert one.DESCR


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_work_in_float32_surroundings(name):
    torch.set_default_dtype(torch.float32)
    out = getattr(datasets, name)(random_state=0)
    assert all(v.dtype != torch.float32 for v in out.values() if isinstance(v, torch.Tensor))
