"""One way from a seed of any kind to a ``torch.Generator``; no global state is touched."""

import numbers
from typing import Any

import numpy as np
import torch

__all__ = ["make_generator"]


def make_generator(random_state: Any = None, device: "torch.device | str" = "cpu") -> torch.Generator:
    """Return a generator seeded by ``random_state``.

    Parameters
    ----------
    random_state : None, int, numpy.random.RandomState, numpy.random.Generator or torch.Generator
        None draws a fresh seed from the operating system. A torch generator is returned as it is, so that
        successive calls with it continue one stream; a NumPy one gives the seed and moves on.
    device : torch.device or str, default="cpu"
        Where the generator lives.

    Raises
    ------
    TypeError
        If ``random_state`` is none of these.
    ValueError
        If an integer seed is negative or takes more than 64 bits.
    """
    if isinstance(random_state, torch.Generator):
        return random_state
    gen = torch.Generator(device=device)
    if random_state is None:
        gen.seed()
    elif isinstance(random_state, numbers.Integral) and not isinstance(random_state, bool):
        seed = int(random_state)
        if seed < 0:
            raise ValueError(f"random_state must be a non-negative integer; got {seed}.")
        if seed >= 2**64:
            raise ValueError(f"random_state must be below 2**64; got {seed}.")
        gen.manual_seed(seed)
    elif isinstance(random_state, np.random.RandomState):
        gen.manual_seed(int(random_state.randint(2**31 - 1)))
    elif isinstance(random_state, np.random.Generator):
        gen.manual_seed(int(random_state.integers(2**31 - 1)))
    else:
        raise TypeError(
            "random_state must be None, an integer, a numpy.random.RandomState, a numpy.random.Generator or a "
            f"torch.Generator; got {type(random_state).__name__}."
        )
    return gen
