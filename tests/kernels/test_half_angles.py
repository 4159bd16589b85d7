import mpmath as mp
import pytest
import torch

from stochproc.kernels import HalfAngles

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}
ALL = slice(None)


def angle(x, y):
    """Of two lists of floats, to 50 digits."""
    with mp.workdps(50):
        u, v = (mp.matrix(z) / mp.norm(mp.matrix(z)) for z in (x, y))
        return 2 * mp.asin(mp.norm(u - v) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [1, 3, 8, 300])
def test_angles_are_right_to_a_few_roundings_near_far_and_opposite(gen, d, dtype):
    x, step = torch.randn(2, 4, d, generator=gen)
    x, y = x.to(dtype), torch.cat([x + 1e-6 * step, x + 0.1 * step, 3 * x, -2 * x, 1e-5 * step - x, step]).to(dtype)
    found = HalfAngles(x, y).tile(ALL, ALL).double()
    for i in range(len(x)):
        for j in range(len(y)):
            exact = angle(x[i].tolist(), y[j].tolist())
            # Next to pi an angle is the square root of what the value lacks to 1.
            tol = 8 * EPS[dtype] * max(1, d**0.5 / 4) / max(mp.cos(exact / 2), EPS[dtype] ** 0.5)
            assert abs(2 * mp.asin(mp.sqrt(found[i, j].item())) - exact) <= tol


@pytest.mark.parametrize("d", [2, 8])
def test_equal_points_have_angle_zero_and_opposite_ones_pi_exactly(gen, d):
    x = torch.randn(50, d, generator=gen)
    assert not HalfAngles(x, x).tile(ALL, ALL).diagonal().any()
    assert not HalfAngles(x, x.clone()).tile(ALL, ALL).diagonal().any()
    assert (HalfAngles(x, -x).tile(ALL, ALL).diagonal() == 1).all()


def test_a_tile_is_a_part_of_the_whole(gen):
    x, y = torch.randn(30, 6, generator=gen), torch.randn(20, 6, generator=gen)
    angles = HalfAngles(x, y)
    torch.testing.assert_close(
        angles.tile(slice(5, 9), slice(3, 20)), angles.tile(ALL, ALL)[5:9, 3:20], rtol=1e-14, atol=0
    )
    own = HalfAngles(x, x)
    torch.testing.assert_close(own.tile(slice(4, 9), slice(4, 30)), own.tile(ALL, ALL)[4:9, 4:30], rtol=1e-14, atol=0)


def test_clusters_and_empty_sets(gen):
    x = torch.randn(20, generator=gen) + 1e-3 * torch.randn(40, 20, generator=gen)
    found = HalfAngles(x, x).tile(ALL, ALL)
    for i, j in [(0, 1), (7, 30)]:
        assert (
            abs(found[i, j].item() - mp.sin(angle(x[i].tolist(), x[j].tolist()) / 2) ** 2) <= 1e-12 * found[i, j].item()
        )
    assert HalfAngles(x[:0], x).tile(ALL, ALL).shape == (0, 40)


@pytest.mark.bad_input
def test_points_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="same number of columns"):
        HalfAngles(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(TypeError, match="dtype"):
        HalfAngles(torch.ones(3, 2), torch.ones(3, 2).float())
