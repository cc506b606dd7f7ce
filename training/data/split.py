"""Parts of a source: some classes, a validation part by fraction or folds, a training subset of N samples.

Who is in which part is a pure function of the samples' names and classes (and for `train_samples` of the run's seed): no
matter in which order a file system lists the files, where the root lies, or which process asks. Names are ranked in
each class by their SHA-256, which keeps close to chance what a name says of its picture, such as the time of day.

A kind of data that has no validation part gives `Sources(train, None)`, and `divide` makes one as the config says.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from files.errors import ConfigError, nearest
from training.data.source import Batched, Pipeline, Source, Sources

if TYPE_CHECKING:
    from training.config import AugmentSection, DataSection
    from training.data.transforms import ImageSpec


class SubsetSource:
    """Some samples of a source, in the order of `indices`. Made by `subset`.

    Args:
        source: Any.
        indices: Places in it.
        class_names: Of the source's, those that remain, in the same order; all samples must be of these. Default: all.
    """

    def __init__(self, source: Source, indices: Sequence[int], class_names: Sequence[str] | None = None) -> None:
        self.source = source
        self.indices = array("q", indices)
        self.location = source.location
        self.class_names = list(source.class_names if class_names is None else class_names)
        places = {name: place for place, name in enumerate(self.class_names)}
        target_of = [places.get(name, -1) for name in source.class_names]
        self.targets = [target_of[source.targets[index]] for index in self.indices]
        assert -1 not in self.targets, "a sample of a class that does not remain"

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def open(self, index: int) -> IO[bytes] | Image.Image:
        return self.source.open(self.indices[index])


class BatchedSubset(SubsetSource):
    """Of a source that makes whole batches by itself: the subset does so as well."""

    def pipeline(self, augment: AugmentSection, spec: ImageSpec) -> Pipeline:
        assert isinstance(self.source, Batched)
        return _SubsetPipeline(self.source.pipeline(augment, spec), self.indices)


class _SubsetPipeline:
    def __init__(self, pipeline: Pipeline, indices: Sequence[int]) -> None:
        self.pipeline = pipeline
        self.indices = indices

    def plain(self, indices: Sequence[int]) -> Tensor:
        return self.pipeline.plain([self.indices[i] for i in indices])

    def augmented(self, indices: Sequence[int], streams: np.ndarray) -> Tensor:
        return self.pipeline.augmented([self.indices[i] for i in indices], streams)


def subset(source: Source, indices: Sequence[int], class_names: Sequence[str] | None = None) -> SubsetSource:
    """Some samples of a source, as a source. Arguments as of SubsetSource."""
    kind = BatchedSubset if isinstance(source, Batched) else SubsetSource
    return kind(source, indices, class_names)


def divide(sources: Sources, data: DataSection, *, seed: int) -> Sources:
    """What the config makes of the parts that a kind of data gives; `val` is there afterwards.

    In this order: `data.classes`; a validation part by `data.val_fraction` or `data.folds`, else a lone test part is the
    one for validation; `data.train_samples`.

    Args:
        sources: As the kind gives them; `val` may be None.
        data: The config's section.
        seed: The run's, on which `data.train_samples` depends and nothing else.

    Raises:
        ConfigError: Naming the key that cannot be met.
    """
    train, val, left_out, test = sources
    if data.classes is not None:
        names = kept_classes(train.class_names, data.classes)
        train, val, test = (None if part is None else of_classes(part, names) for part in (train, val, test))
        assert train is not None
    if splits(data):
        if val is not None:
            where = f", '{val.location}'" if val.location else ""
            key = "val_fraction" if data.val_fraction is not None else "folds"
            raise ConfigError(
                f"data.{key}: has no effect, the data have a part for validation{where}; leave it out or set it to null"
            )
        train, val = (subset(train, part) for part in _parts(train, data))
    elif val is None:
        if test is None:
            raise ConfigError(
                f"data.val_fraction: dataset {data.dataset!r} has no part for validation here; say how to split it\n"
                "data.val_fraction=0.1 holds a tenth of each class back, data.folds=5 data.fold=0 a fifth"
            )
        val, test = test, None
    if data.train_samples is not None:
        train = subset(train, sample(train, data.train_samples, seed=seed))
    return Sources(train, val, left_out, test)


def splits(data: DataSection) -> bool:
    """Whether the config asks for a validation part to be taken from the training part."""
    return data.val_fraction is not None or data.folds is not None


def kept_classes(class_names: Sequence[str], kept: Sequence[str]) -> list[str]:
    """The classes that `data.classes` keeps, in the order of the data.

    Raises:
        ConfigError: For a name that the data do not have.
    """
    for name in kept:
        if name not in class_names:
            raise ConfigError(f"data.classes: the data have no class {name!r}{nearest(name, class_names)}")
    return [name for name in class_names if name in set(kept)]


def of_classes(source: Source, class_names: Sequence[str]) -> SubsetSource:
    """The samples of these classes."""
    kept = {target for target, name in enumerate(source.class_names) if name in set(class_names)}
    return subset(source, [index for index, target in enumerate(source.targets) if target in kept], class_names)


def by_fraction(source: Source, fraction: float) -> tuple[list[int], list[int]]:
    """Indices for training and validation, ascending: of each class, `fraction` to the nearest whole number, halves up.

    Samples of one name (a file that a table lists twice) stay together. A larger fraction only adds to the validation part.

    Raises:
        ConfigError: If a class would have no sample in a part.
    """
    ranks, sizes = _ranks(source)
    held = [int(size * fraction + 0.5) for size in sizes]
    bare = [target for target, size in enumerate(sizes) if not 0 < held[target] < size]
    if bare:
        size, val = sizes[bare[0]], held[bare[0]]
        raise ConfigError(
            f"data.val_fraction: {fraction:g} leaves class {source.class_names[bare[0]]!r} without samples for "
            f"{'validation' if val == 0 else 'training'}: {size - val:,} of {size:,} for training, {val:,} for validation"
            f"{_more(bare)}\nchange the fraction, add samples, or leave the class out (data.classes)"
        )
    return _halves(ranks < np.asarray(held)[_targets(source)])


def by_fold(source: Source, folds: int, fold: int) -> tuple[list[int], list[int]]:
    """Indices for training and validation, ascending: fold number `fold` of `folds` validates.

    The folds are disjoint and together everything; in size, whole and within each class, they differ by 1 at most.
    Samples of one name stay together, which may add to that.

    Raises:
        ConfigError: If a class has fewer samples than there are folds.
    """
    ranks, sizes = _ranks(source)
    small = [target for target, size in enumerate(sizes) if size < folds]
    if small:
        size = sizes[small[0]]
        raise ConfigError(
            f"data.folds: class {source.class_names[small[0]]!r} has {size:,} sample{'s' * (size != 1)}, fewer than "
            f"{folds} folds, so that {folds - size} would have none for validation{_more(small)}\n"
            f"use fewer folds, add samples, or leave the class out (data.classes)"
        )
    # dealt out from class to class without a break, so that what a class has left over does not always go to fold 0
    first = np.concatenate([[0], np.cumsum(sizes)])
    return _halves((first[_targets(source)] + ranks) % folds == fold)


def sample(source: Source, count: int, *, seed: int) -> list[int]:
    """Indices, ascending, of a stratified subset of exactly `count` samples, at least one of each class.

    Classes get their share by the method of Sainte-Laguë after one sample each. So the subsets of a seed are nested: a
    larger one has all of a smaller one. Another seed draws others.

    Raises:
        ConfigError: For more than there are, or fewer than classes.
    """
    targets = _targets(source)
    sizes = np.bincount(targets, minlength=len(source.class_names))
    present = np.count_nonzero(sizes)
    if count > len(source):
        raise ConfigError(f"data.train_samples: {count:,} is more than the {len(source):,} training samples there are")
    if count < present:
        raise ConfigError(f"data.train_samples: {count:,} is fewer than the {present:,} classes; each needs one")
    digests = _digests((f"{seed} {source.name(index)}" for index in range(len(source))), len(source))
    order = np.lexsort((*digests[::-1], targets))
    seen = np.empty_like(order)  # of each sample, how many of its class come before it
    seen[order] = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[targets[order]]
    chosen = np.lexsort((*digests[::-1], (2 * seen + 1) / sizes[targets], seen > 0))[:count]
    return np.sort(chosen).tolist()


def _parts(train: Source, data: DataSection) -> tuple[list[int], list[int]]:
    if data.val_fraction is not None:
        return by_fraction(train, data.val_fraction)
    assert data.folds is not None and data.fold is not None, "checked by the section"
    return by_fold(train, data.folds, data.fold)


def _targets(source: Source) -> np.ndarray:
    return np.asarray(source.targets, dtype=np.int64)  # (N,)


def _digests(names: Iterable[str], count: int) -> np.ndarray:
    """SHA-256 of each of N names, (4, N): numbers of 64 bits, in whose order the digests are."""
    text = bytearray(32 * count)  # a million objects would take three times as much
    for place, name in enumerate(names):
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()  # names may be any bytes
        text[32 * place : 32 * (place + 1)] = digest
    return np.frombuffer(text, dtype=">u8").reshape(count, 4).T


def _ranks(source: Source) -> tuple[np.ndarray, list[int]]:
    """Of each sample (N,) its name's rank by SHA-256 among those of its class, and of each class the number of names."""
    digests = _digests((source.name(index) for index in range(len(source))), len(source))
    targets = _targets(source)
    order = np.lexsort((*digests[::-1], targets))
    new = np.zeros(len(order), dtype=bool)  # in that order, other than the one before
    new[:1] = True
    for key in (targets, *digests):
        ordered = key[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    targets = targets[order]
    sizes = np.bincount(targets[new], minlength=len(source.class_names))
    ranks = np.empty_like(order)
    ranks[order] = np.cumsum(new) - 1 - (np.cumsum(sizes) - sizes)[targets]
    return ranks, sizes.tolist()


def _halves(held: np.ndarray) -> tuple[list[int], list[int]]:
    """Indices of what is not held back, and of what is."""
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


def _more(classes: Sequence[int]) -> str:
    return f" (and so of {len(classes) - 1:,} more classes)" if len(classes) > 1 else ""
