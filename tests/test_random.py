import numpy as np
import pytest
import torch

from stochproc._random import make_generator


def draw(random_state):
    return torch.rand(4, generator=make_generator(random_state))


@pytest.mark.parametrize("seed", [0, 7, np.int64(7), 2**40])
def test_equal_seeds_give_equal_bits(seed):
    assert torch.equal(draw(seed), draw(int(seed)))


def test_different_seeds_give_different_bits():
    assert not torch.equal(draw(0), draw(1))


def test_none_draws_a_fresh_seed():
    assert make_generator(None).initial_seed() != make_generator(None).initial_seed()


def test_a_torch_generator_is_passed_through():
    gen = torch.Generator().manual_seed(3)
    assert make_generator(gen) is gen


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng])
def test_a_numpy_generator_gives_its_seed_and_moves_on(make):
    one, other = make(5), make(5)
    first, second = draw(one), draw(one)
    assert torch.equal(first, draw(other))
    assert not torch.equal(first, second)


def test_global_states_are_not_touched():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for state in (None, 3, np.random.default_rng(0)):
        draw(state)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="random_state must be a non-negative integer; got -1"):
        make_generator(-1)


def test_a_seed_beyond_64_bits_is_refused():
    with pytest.raises(ValueError, match="random_state must be below 2"):
        make_generator(2**64)


@pytest.mark.parametrize("bad", [1.5, "0", True, [1]])
def test_other_types_are_refused(bad):
    with pytest.raises(TypeError, match=f"random_state must be None, an integer.*got {type(bad).__name__}"):
        make_generator(bad)


def test_generator_lives_where_it_is_asked_to(device):
    assert make_generator(0, device).device.type == device.type
