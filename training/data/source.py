"""What a kind of data gives: labelled samples by index. Decoding and transforms are no business of it, nor is the order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from training.config import AugmentSection
    from training.data.transforms import ImageSpec


class Source(Protocol):
    """Labelled samples by index, the same at every call: one part of a data set, `train` or `val`.

    Attributes:
        targets: Of each sample, its class's place in `class_names`.
        class_names: The same in both parts.
        location: Where the samples lie, as messages say it in front of a name: a folder, a file. Empty for samples in
            memory, which need no check and cannot be damaged.
    """

    targets: list[int]
    class_names: list[str]
    location: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a sample is known by, wherever the data lie; parts are separated by / on every system."""
        ...

    def open(self, index: int) -> IO[bytes] | Image.Image:
        """The raw sample: an image file opened for reading, which the caller closes, or a picture."""
        ...


class Pipeline(Protocol):
    """Images of a source: both methods return (B, C, H, W), in uint8 to be normalised on the device, or in float32, ready."""

    def plain(self, indices: Sequence[int]) -> Tensor:
        """Images as validation sees them."""
        ...

    def augmented(self, indices: Sequence[int], streams: np.ndarray) -> Tensor:
        """Images as training sees them, each by the draws of its stream (B,), uint64."""
        ...


@runtime_checkable
class Batched(Protocol):
    """A source with a pipeline of its own, which makes a batch faster than one by one from `open`, and erases by itself."""

    def pipeline(self, augment: AugmentSection, spec: ImageSpec) -> Pipeline: ...


class Sources(NamedTuple):
    """The parts of a data set.

    Attributes:
        val: None where the data have no such part: `training.data.split` makes one.
        left_out: What lies there and is not used, in words; empty for nothing.
        test: A third part, which no training run looks at: for `validate.py` and for claims after a search.
    """

    train: Source
    val: Source | None
    left_out: str = ""
    test: Source | None = None


def place(source: Source, index: int) -> str:
    """Where a sample lies, for messages: the path of a file in a folder."""
    return os.path.join(source.location, source.name(index))


def name_below(path: str, folder: str | os.PathLike[str]) -> str:
    """A path in a folder as a name relative to it, with / between its parts on every system."""
    prefix = os.path.join(folder, "")
    return path.removeprefix(prefix).replace(os.sep, "/")
