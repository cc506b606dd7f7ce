"""Data sets, augmentation, sampling and mixing: every draw is a pure function of (seed, epoch, sample index).

A data set is a pair of sources (`training.data.source`), whose kinds are those of `training.data.kinds`; one pipeline
decodes and transforms them all. A training sample is addressed by (epoch, index) and a batch is (images, targets, indices).
Because the draws belong to the sample and not to the process that makes it, the number of workers changes nothing, a
run resumed in mid-epoch sees the images the uninterrupted one would have seen, and the training loop's own random
stream is left alone.

Libraries draw from global generators (timm's policies from Python's and NumPy's, torchvision's from torch's), so all
three are seeded before each sample and put back after each batch. Digits need none of them for crop, rotation, shift,
zoom and flip: those draws come from a counter-based hash and one affine map transforms the whole batch.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from files.errors import ConfigError
from training.data.dataset import DataBundle, TrainDataset, ValDataset
from training.data.identity import data_identity
from training.data.images import ImagePipeline
from training.data.kinds import KINDS, kind_of
from training.data.source import Batched, Pipeline, Source
from training.data.split import divide, kept_classes
from training.data.transforms import ImageSpec, check_spec

if TYPE_CHECKING:
    from training.config import AugmentSection, DataSection


def build_datasets(data: DataSection, augment: AugmentSection, spec: ImageSpec, *, seed: int) -> DataBundle:
    """Builds the training and validation data sets.

    Digits come with the augmentation that `augment` says, flips included: a config for digits sets `hflip: 0`.

    Args:
        data: Which data, and where.
        augment: How training images are changed; validation images never are.
        spec: The model's input.
        seed: The run's seed. Of the data, `data.train_samples` alone depends on it.

    Raises:
        ConfigError: For a missing, empty or inconsistent folder, an unknown policy, or a spec that cannot be met.
    """
    check_spec(spec)
    if augment.crop_scale is None and not np.allclose(augment.crop_ratio, (3 / 4, 4 / 3)):
        warnings.warn("augment.crop_ratio has no effect without augment.crop_scale", stacklevel=2)
    sources = divide(_module(data).sources(data), data, seed=seed)
    train, val = sources.train, sources.val
    assert val is not None
    sizes = [
        (epoch, _pipeline(train, augment, replace(spec, input_size=(spec.input_size[0], size, size))))
        for epoch, size in data.image_size_schedule or ()
    ]
    return DataBundle(
        train=TrainDataset(
            train,
            _pipeline(train, augment, spec),
            seed=seed,
            replace_unreadable=data.on_error == "skip",
            from_epochs=sizes,
        ),
        val=ValDataset(val, _pipeline(val, augment, spec)),
        num_classes=len(train.class_names),
        class_names=list(train.class_names),
        identity=data_identity(data.dataset, sources),
        left_out=sources.left_out,
        test=None if sources.test is None else ValDataset(sources.test, _pipeline(sources.test, augment, spec)),
    )


def class_names_of_data(data: DataSection) -> list[str]:
    """Names of the classes in the order of their targets, without building the data sets.

    Raises:
        ConfigError: For a missing or wrong folder.
    """
    names = _module(data).class_names(data)
    return names if data.classes is None else kept_classes(names, data.classes)


def _module(data: DataSection) -> Any:
    """The module of a kind of data."""
    kind = kind_of(data.dataset)
    if kind is None:
        raise ConfigError(f"data.dataset: {data.dataset!r} is not one of {', '.join(map(repr, KINDS))}")
    return import_module(kind.module)


def _pipeline(source: Source, augment: AugmentSection, spec: ImageSpec) -> Pipeline:
    return source.pipeline(augment, spec) if isinstance(source, Batched) else ImagePipeline(source, augment, spec)
