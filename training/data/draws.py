"""Random draws that depend on nothing but their address: (seed, purpose, epoch, index)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

# What a stream is for, so that two purposes with the same numbers never share one.
ORDER, SAMPLE, MIX, ERASE, REPLACE = range(1, 6)
RESEED = 100  # of the global generators, where a run goes on with another number of processes

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_words(*words: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """64 well-mixed bits of a tuple of integers; sequences broadcast. Each word is absorbed by one SplitMix64 step."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        if isinstance(word, int):
            word = [word & 0xFFFFFFFFFFFFFFFF]
        # Arrays, never scalars: unsigned arrays wrap silently, as the algorithm wants, NumPy's scalars warn.
        state = state + np.asarray(word, dtype=np.uint64) + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(streams: np.ndarray, draws: int) -> np.ndarray:
    """`draws` numbers in [0, 1) for each of B streams, (B, draws)."""
    bits = hash_words(streams[:, None], np.arange(draws))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_global_generators(stream: int) -> None:
    """Seeds Python's, NumPy's and torch's CPU generator; call it inside `global_generators_kept`."""
    random.seed(stream)
    np.random.seed([stream & 0xFFFFFFFF, stream >> 32])
    torch.default_generator.manual_seed(stream)  # torch.manual_seed would seed the GPUs as well


@contextmanager
def global_generators_kept() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(cpu)
