"""Samples by address: (epoch, index) in training, and where it comes several times which time; index in validation."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from files.errors import Failure, one_line
from training.data.draws import REPLACE, SAMPLE, global_generators_kept, hash_words
from training.data.normalise import Normalise, RandomErase
from training.data.source import Pipeline, Source, place

# How many other samples are tried in the place of one that cannot be read.
MAX_REPLACEMENTS = 100

Sample = tuple[Tensor, int, int]
"""Image (C, H, W) as its pipeline makes it (in uint8, or ready in float32), target, index."""

Position = tuple[int, ...]
"""Address of a training sample: (epoch, index), or (epoch, index, n) for the n-th time, from 0, that an epoch has it."""


@dataclass(frozen=True)
class DataBundle:
    """The parts of a data set, and its classes in the order of the targets.

    Attributes:
        identity: What the data are known by, of `data_identity`.
        normalise: From a loader's batch of images, on the device, to the model's input; what is ready passes.
        erase: Random erasing of normalised training images.
        decoder: What decodes images, with versions; None for samples in memory.
        left_out: What lies in the folders and is not used, as words; empty for nothing.
        test: The part that no training run looks at; None where the data have none.
    """

    train: TrainDataset
    val: ValDataset
    num_classes: int
    class_names: list[str]
    identity: dict[str, Any]
    normalise: Normalise
    erase: RandomErase
    decoder: str | None = None
    left_out: str = ""
    test: ValDataset | None = None


@dataclass(frozen=True)
class Unreadable:
    """A sample that could not be made. It stands in a batch in the sample's place, or behind those of the batch.

    Attributes:
        part: `train` or `val`.
        place: Where it lies: a file's path.
        reason: In one line.
        replaced: Whether another sample took its place.
    """

    part: str
    place: str
    reason: str
    replaced: bool = False

    def __str__(self) -> str:
        return f"cannot read image '{one_line(self.place)}': {self.reason}"


class ReadError(Failure):
    """Data that cannot be read while a run goes on; the message names the file."""


class TrainDataset(Dataset[Sample]):
    """Augmented samples, addressed by (epoch, index): the same address always gives the same image.

    Where an epoch has a sample several times, (epoch, index, 1), (epoch, index, 2), ... are augmented each in its own way;
    (epoch, index, 0) is (epoch, index).

    With `replace_unreadable`, a sample that cannot be read is replaced by another, drawn by (seed, epoch, index): so the
    address still decides alone what comes, in any process and after any resume.

    Args:
        from_epochs: Other pipelines than `pipeline`, each with the epoch from which it makes the images.
    """

    def __init__(
        self,
        source: Source,
        pipeline: Pipeline,
        *,
        seed: int,
        replace_unreadable: bool = False,
        from_epochs: Sequence[tuple[int, Pipeline]] = (),
    ) -> None:
        self.source = source
        self.pipeline = pipeline
        self.from_epochs = from_epochs
        self.targets = source.targets
        self.seed = seed
        self.replace_unreadable = replace_unreadable

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, position: Position) -> Sample:
        return _readable(self.__getitems__([position])[0])

    def __getitems__(self, positions: Sequence[Position]) -> list[Sample | Unreadable]:
        """A whole batch at once, so that the global generators are saved and put back once per batch."""
        epochs, indices, *times = zip(*positions, strict=True)
        streams = hash_words(self.seed, SAMPLE, epochs, indices)
        for which in times:
            streams = np.where(np.asarray(which) > 0, hash_words(streams, which), streams)
        with global_generators_kept():
            try:
                images = self._pipeline_of(epochs[0]).augmented(indices, streams)
            except Exception:
                if not self.source.location:
                    raise
                return self._one_by_one(positions, streams)
        return [(image, self.targets[i], i) for image, i in zip(images.unbind(), indices, strict=True)]

    def _one_by_one(self, positions: Sequence[Position], streams: np.ndarray) -> list[Sample | Unreadable]:
        """A batch in which a sample cannot be read: as many samples as addresses, then what had to be replaced."""
        samples, replaced = [], []
        for row, (epoch, index, *_) in enumerate(positions):
            stream, pipeline = streams[row : row + 1], self._pipeline_of(epoch)
            faults: list[Unreadable] = []
            for candidate in self._candidates(epoch, index):
                image = _attempt(lambda c=candidate, s=stream, p=pipeline: p.augmented([c], s)[0], self, candidate)
                if isinstance(image, Tensor):
                    samples.append((image, self.targets[candidate], candidate))
                    replaced += [replace(fault, replaced=True) for fault in faults]
                    break
                faults.append(image)
            else:
                samples.append(faults[0])
        return samples + replaced

    def _pipeline_of(self, epoch: int) -> Pipeline:
        """What makes the images of an epoch, of which a batch has one: the address says it, in any worker."""
        return next((pipeline for start, pipeline in reversed(self.from_epochs) if start <= epoch), self.pipeline)

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """The sample itself, then those that may stand in for it."""
        yield index
        if self.replace_unreadable:
            attempts = np.arange(MAX_REPLACEMENTS)
            yield from (hash_words(self.seed, REPLACE, epoch, index, attempts) % np.uint64(len(self))).tolist()


class ValDataset(Dataset[Sample]):
    """Samples without augmentation, addressed by index."""

    def __init__(self, source: Source, pipeline: Pipeline) -> None:
        self.source = source
        self.pipeline = pipeline
        self.targets = source.targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        return _readable(self.__getitems__([index])[0])

    def __getitems__(self, indices: Sequence[int]) -> list[Sample | Unreadable]:
        try:
            images = self.pipeline.plain(indices)
        except Exception:
            if not self.source.location:
                raise
            made = [(_attempt(lambda i=i: self.pipeline.plain([i])[0], self, i), i) for i in indices]
            return [image if isinstance(image, Unreadable) else (image, self.targets[i], i) for image, i in made]
        return [(image, self.targets[i], i) for image, i in zip(images.unbind(), indices, strict=True)]


def _attempt(make: Callable[[], Tensor], dataset: TrainDataset | ValDataset, index: int) -> Tensor | Unreadable:
    """The image, or why it cannot be had: an image that opens may still be one that a transform cannot take."""
    try:
        return make()
    except Exception as error:  # a worker's exception would reach the loop as the text of a traceback
        kind, text, where = type(error).__name__, str(error), place(dataset.source, index)
        known = f"cannot read image '{where}': "
        reason = text.removeprefix(known) if text.startswith(known) else f"{kind}: {text}"
        reason = (
            reason.replace(f": {where!r}", "").replace(f" {where!r}", "").removeprefix(f"{where!r}: ")
        )  # told already
        part = "train" if isinstance(dataset, TrainDataset) else "val"
        return Unreadable(part, where, one_line(textwrap.shorten(reason, 300)).strip(": ") or kind)


def _readable(sample: Sample | Unreadable) -> Sample:
    if isinstance(sample, Unreadable):
        raise ReadError(str(sample))
    return sample
