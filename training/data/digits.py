"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from training.data.small_images import SmallImages
from training.data.source import Sources

if TYPE_CHECKING:
    from training.config import DataSection

# The split is part of the task and not of a run: results at different seeds are compared on the same 360 digits.
DIGITS_SPLIT_SEED = 20240229

DIGITS_VAL_FRACTION = 0.2
DIGITS_MAX_VALUE = 16.0
DIGIT_NAMES = [str(digit) for digit in range(10)]


def digits_split() -> tuple[np.ndarray, np.ndarray]:
    """Indices into scikit-learn's `load_digits()`: 1,437 for training and 360 for validation, stratified, ascending."""
    # Imported here, as it takes a second which only digits need.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    labels = np.asarray(load_digits(return_X_y=True)[1])
    train, val = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_VAL_FRACTION, stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    return np.sort(train), np.sort(val)


def class_names(data: DataSection) -> list[str]:
    """The ten digits."""
    return list(DIGIT_NAMES)


def sources(data: DataSection) -> Sources:
    """The two parts of `digits_split`."""
    from sklearn.datasets import load_digits

    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    images = torch.from_numpy(pixels / DIGITS_MAX_VALUE).float().reshape(-1, 1, 8, 8)  # (N, 1, 8, 8) in [0, 1]
    train, val = (
        SmallImages(images[rows], labels[rows].tolist(), rows.tolist(), list(DIGIT_NAMES)) for rows in digits_split()
    )
    return Sources(train, val)
