"""Data sets, augmentation, sampling and mixing: every draw is a pure function of (seed, epoch, sample index).

Two data sets: `digits` (scikit-learn's 1,797 handwritten digits, no download) and `folder` (ROOT/train/CLASS/*.jpg and
ROOT/val/CLASS/*.jpg). A training sample is addressed by (epoch, index) and a batch is (images, targets, indices).
Because the draws belong to the sample and not to the process that makes it, the number of workers changes nothing, a
run resumed in mid-epoch sees the images the uninterrupted one would have seen, and the training loop's own random
stream is left alone.

Libraries draw from global generators (timm's policies from Python's and NumPy's, torchvision's from torch's), so all
three are seeded before each sample and put back after each batch. Digits need none of them for crop, rotation, shift,
zoom and flip: those draws come from a counter-based hash and one affine map transforms the whole batch.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from files.errors import ConfigError
from training.data.dataset import DataBundle
from training.data.digits import DIGIT_NAMES, digits_bundle
from training.data.folder import LeftOut, folder_bundle, scan, train_and_val_folders
from training.data.transforms import ImageSpec, check_spec

if TYPE_CHECKING:
    from training.config import AugmentSection, DataSection


logger = logging.getLogger(__name__)


def build_datasets(data: DataSection, augment: AugmentSection, spec: ImageSpec, *, seed: int) -> DataBundle:
    """Builds the training and validation data sets.

    Digits come with the augmentation that `augment` says, flips included: a config for digits sets `hflip: 0`.

    Args:
        data: Which data, and where.
        augment: How training images are changed; validation images never are.
        spec: The model's input.
        seed: The run's seed. The digits' split does not depend on it.

    Raises:
        ConfigError: For a missing, empty or inconsistent folder, an unknown policy, or a spec that cannot be met.
    """
    check_spec(spec)
    if augment.crop_scale is None and not np.allclose(augment.crop_ratio, (3 / 4, 4 / 3)):
        warnings.warn("augment.crop_ratio has no effect without augment.crop_scale", stacklevel=2)
    if data.dataset == "digits":
        bundle = digits_bundle(augment, spec, seed)
    elif data.dataset == "folder":
        bundle = folder_bundle(data, augment, spec, seed)
    else:
        raise ConfigError(f"data.dataset: {data.dataset!r} is not one of 'digits', 'folder'")
    bundle.train.replace_unreadable = data.on_error == "skip"
    return bundle


def class_names_of_data(data: DataSection) -> list[str]:
    """Names of the classes in the order of their targets, without building the data sets.

    Raises:
        ConfigError: For a missing or wrong folder.
    """
    if data.dataset == "digits" or data.root is None:
        return list(DIGIT_NAMES)
    return sorted(scan(train_and_val_folders(Path(data.root).expanduser())[0], LeftOut()))
