"""Which samples an epoch has, and in which order: pure functions of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from training.data.draws import ORDER, hash_words

Order = Callable[[int], Tensor]
"""Of an epoch its samples, (N, 1) indices; or (N, 2) where a sample may come several times: index and which time."""


class Shuffled:
    """Every sample once.

    Args:
        length: N, the number of samples.
        seed: Of the run.
    """

    def __init__(self, length: int, *, seed: int) -> None:
        self.length, self.seed = length, seed

    def __call__(self, epoch: int) -> Tensor:
        return torch.randperm(self.length, generator=_generator(self.seed, epoch))[:, None]


class Balanced:
    """N samples again, in which each class has a share proportional to its number of samples to the power `1 - power`.

    Power 1 draws every class equally often, 0.5 by the square root of its size, 0 as it is (Kang et al. 2020, arXiv
    1910.09217, whose q is 1 - power). The number of a class is its exact share rounded up or down, at random so that it is
    exact on average. Within a class no sample comes once more before each has come as often; those left out are others in
    each epoch.

    Args:
        targets: Class of each of N samples. Classes without samples have no share.
        power: In [0, 1].
        seed: Of the run.
    """

    def __init__(self, targets: Sequence[int], *, power: float, seed: int) -> None:
        self.targets, self.seed = np.asarray(targets, dtype=np.int64), seed
        self.sizes = np.bincount(self.targets)
        wanted = np.where(self.sizes > 0, np.maximum(self.sizes, 1.0) ** (1 - power), 0.0)
        # of the classes' shares of [0, N], laid end to end
        self.ends = len(self.targets) * np.cumsum(wanted) / wanted.sum()
        self.ends[-1] = len(self.targets)
        self.starts = np.cumsum(self.sizes) - self.sizes

    def counts(self, epoch: int) -> np.ndarray:
        """How often each class comes in an epoch."""
        return self._counts(_generator(self.seed, epoch))

    def _counts(self, generator: torch.Generator) -> np.ndarray:
        # a comb of N teeth, one apart, from a random place: each class gets the teeth within its share
        offset = torch.rand((), generator=generator, dtype=torch.float64).item()
        ends = np.floor(self.ends + offset).astype(np.int64)
        ends[-1] = len(self.targets)
        return np.diff(ends, prepend=0)

    def __call__(self, epoch: int) -> Tensor:
        generator = _generator(self.seed, epoch)
        times, rest = np.divmod(self._counts(generator), np.maximum(self.sizes, 1))
        # in each class the samples that come once more than the others: those at the head of a permutation
        shuffled = torch.randperm(len(self.targets), generator=generator).numpy()
        by_class = shuffled[np.argsort(self.targets[shuffled], kind="stable")]
        place = np.arange(len(self.targets)) - np.repeat(self.starts, self.sizes)  # within its class
        repeats = np.repeat(times, self.sizes) + (place < np.repeat(rest, self.sizes))  # of each of by_class
        index = np.repeat(by_class, repeats)
        which = np.arange(len(index)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        samples = torch.from_numpy(np.stack([index, which], axis=1))  # (N, 2)
        return samples[torch.randperm(len(samples), generator=generator)]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(hash_words(seed, ORDER, epoch)[0]))
