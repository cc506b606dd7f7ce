"""Data sets, augmentation, sampling and mixing: every draw is a pure function of (seed, epoch, sample index).

A data set is a pair of sources (`training.data.source`), whose kinds are those of `training.data.kinds`; one pipeline
decodes and transforms them all. A training sample is addressed by (epoch, index) and a batch is (images, targets, indices).
Because the draws belong to the sample and not to the process that makes it, the number of workers changes nothing, a
run resumed in mid-epoch sees the images the uninterrupted one would have seen, and the training loop's own random
stream is left alone.

Crop and flip are drawn from a counter-based hash of the address. Libraries draw from global generators (timm's policies from
Python's and NumPy's, torchvision's from torch's), so all three are seeded before each sample that needs them and put back
after each batch. Of digits one affine map transforms the whole batch. Batches of images are in uint8; the loop normalises and
erases them on the device (`training.data.normalise`).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from files.errors import ConfigError
from training.data.dataset import DataBundle, TrainDataset, ValDataset
from training.data.decoding import choose_decoder, describe_decoder
from training.data.identity import data_identity
from training.data.images import ImagePipeline
from training.data.kinds import KINDS, kind_of
from training.data.normalise import Normalise, RandomErase
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
    decoder = choose_decoder(data.decoder)

    def pipeline(source: Source, spec: ImageSpec = spec) -> Pipeline:
        if isinstance(source, Batched):
            return source.pipeline(augment, spec)
        return ImagePipeline(source, augment, spec, decoder=decoder)

    sizes = [
        (epoch, pipeline(train, replace(spec, input_size=(spec.input_size[0], size, size))))
        for epoch, size in data.image_size_schedule or ()
    ]
    return DataBundle(
        train=TrainDataset(
            train,
            pipeline(train),
            seed=seed,
            replace_unreadable=data.on_error == "skip",
            from_epochs=sizes,
        ),
        val=ValDataset(val, pipeline(val)),
        num_classes=len(train.class_names),
        class_names=list(train.class_names),
        identity=data_identity(data.dataset, sources),
        normalise=Normalise(spec),
        erase=RandomErase(0.0 if isinstance(train, Batched) else augment.random_erasing, seed=seed),
        decoder=describe_decoder(decoder) if train.location else None,
        left_out=sources.left_out,
        test=None if sources.test is None else ValDataset(sources.test, pipeline(sources.test)),
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
