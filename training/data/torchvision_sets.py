"""Data sets of torchvision by name: `data.dataset=torchvision/CIFAR10`, in the folder that torchvision would put them.

What a data set of theirs offers is found by looking, in this order:

- **Parts.** An argument `train`: True trains, False is the test part. An argument `split`: 'train' (or 'trainval',
  'train-standard') trains, 'val' (or 'valid') validates, 'test' is the test part. Neither: one part, to be split.
- **Labels** are its list of them; where it has none, or not one that agrees with its samples, each sample is read once.
- **Names** of the classes are its `classes` or `categories`, else its labels as numbers.
- **Samples** are its image files where it lists them, else the pictures it gives, before any transform.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision import datasets

from files.errors import ConfigError, nearest
from training.data.source import Sources, name_below
from training.data.split import splits

if TYPE_CHECKING:
    from training.config import DataSection

# Those in which a sample is an image and one class, with what else they want to know.
NAMES: dict[str, dict[str, Any]] = {
    "CIFAR10": {}, "CIFAR100": {}, "CLEVRClassification": {}, "Caltech101": {}, "Caltech256": {}, "Country211": {},
    "DTD": {}, "EMNIST": {"split": "balanced"}, "EuroSAT": {}, "FER2013": {}, "FGVCAircraft": {}, "FakeData": {},
    "FashionMNIST": {}, "Flowers102": {}, "Food101": {}, "GTSRB": {}, "ImageNet": {}, "Imagenette": {}, "KMNIST": {},
    "MNIST": {}, "Omniglot": {}, "OxfordIIITPet": {}, "Places365": {}, "QMNIST": {}, "RenderedSST2": {}, "SEMEION": {},
    "STL10": {}, "SUN397": {}, "SVHN": {}, "StanfordCars": {}, "USPS": {},
}  # fmt: skip

SPLITS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid"), "test": ("test",)}


class TorchvisionSource:
    """One part of a data set of torchvision.

    Args:
        dataset: Without transforms.
        targets: Of each sample, a place in `class_names`.
        class_names: The training part's.
        root: Where it lies.
    """

    def __init__(self, dataset: Any, targets: list[int], class_names: list[str], root: str) -> None:
        self.class_names = class_names
        self.targets = targets
        self.paths = _files(dataset)
        if self.paths is not None:  # some are listed as the file system has them
            pairs = sorted(zip(self.paths, self.targets, strict=True))
            self.paths, self.targets = [path for path, _ in pairs], [target for _, target in pairs]
        self.dataset = dataset if self.paths is None else None  # a list of files is all that workers need
        in_memory = self.paths is None and (hasattr(dataset, "data") or not root)
        self.location = "" if in_memory else root

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return str(index) if self.paths is None else name_below(self.paths[index], self.location)

    def open(self, index: int) -> IO[bytes] | Image.Image:
        if self.paths is not None:
            return open(self.paths[index], "rb")
        assert self.dataset is not None
        return self.dataset[index][0]


def class_names(data: DataSection) -> list[str]:
    """The names that the training part has; nothing is downloaded.

    Raises:
        ConfigError: For an unknown name, or data that are not there.
    """
    dataset = _part(data, "train", download=False)
    return list(_names(dataset, _labels(dataset, data)).values())


def sources(data: DataSection) -> Sources:
    """The parts that the data set has.

    Raises:
        ConfigError: For an unknown name, or data that are not there or are no images with one class each.
    """
    root = "" if data.root is None else str(Path(data.root).expanduser())
    download = bool(data.download)
    parts: dict[str, TorchvisionSource | None] = {}
    class_names: list[str] = []
    left_out = ""
    for part in ("train", "val", "test"):
        try:
            dataset = _part(data, part, download=download)
            if dataset is None:
                parts[part] = None
                continue
            labels = _labels(dataset, data)
            names = _names(dataset, labels)  # a part may count its own classes, so they are compared by name
            class_names = class_names or list(names.values())
            places = {name: place for place, name in enumerate(class_names)}
            unknown = [names[label] for label in labels if names[label] not in places]
            if unknown:
                raise ConfigError(
                    f"data.dataset: {part} of {data.dataset!r} has a class that train has not: {unknown[0]!r}"
                )
            parts[part] = TorchvisionSource(dataset, [places[names[label]] for label in labels], class_names, root)
        except ConfigError as error:
            if part != "test" or (parts["val"] is None and not splits(data)):
                raise
            parts[part], left_out = None, f"the test part ({str(error).splitlines()[0].partition(': ')[2]})"
    train = parts["train"]
    assert train is not None, "there is always one, or an error"
    return Sources(train, parts["val"], left_out, parts["test"])


def _class(data: DataSection) -> Any:
    """The class that `data.dataset` names."""
    name = data.dataset.partition("/")[2]
    if name in NAMES:
        return getattr(datasets, name)
    small = {known.lower(): known for known in NAMES}
    meant = nearest(name.lower(), small)
    for lower, known in small.items():
        meant = meant.replace(repr(lower), repr(known))
    if name in ("ImageFolder", "DatasetFolder"):
        raise ConfigError(f"data.dataset: 'torchvision/{name}' is data.dataset=folder here")
    if inspect.isclass(getattr(datasets, name, None)):
        raise ConfigError(
            f"data.dataset: torchvision's {name} is not read: its samples are not images with one class each, or its "
            f"parts cannot be told\nread are {', '.join(NAMES)}"
        )
    raise ConfigError(f"data.dataset: torchvision has no data set {name!r}{meant}\nknown are {', '.join(NAMES)}")


def _part(data: DataSection, part: str, *, download: bool) -> Any:
    """One part of the data set; None where it has no such part."""
    kind = _class(data)
    extra = NAMES[data.dataset.partition("/")[2]]
    taken = {key for base in kind.__mro__ for key in inspect.signature(base.__init__).parameters}  # **kwargs go there
    if "root" in inspect.signature(kind.__init__).parameters:
        if data.root is None:
            raise ConfigError(f"data.root: dataset {data.dataset!r} needs a root, for example data.root=/path/to/data")
        extra = {"root": str(Path(data.root).expanduser()), **extra}
    if "train" in taken:
        return None if part == "val" else _built(data, kind, {**extra, "train": part == "train"}, download)
    if "split" not in taken:
        return _built(data, kind, extra, download) if part == "train" else None
    for value in SPLITS[part]:
        try:
            return _built(data, kind, {**extra, "split": value}, download)
        except _UnknownPart:
            continue
    return None


class _UnknownPart(Exception):
    """Of a value that an argument `split` does not take."""


def _built(data: DataSection, kind: Any, arguments: dict[str, Any], download: bool) -> Any:
    """A data set, downloaded only where it is not there and the config asks for it.

    Raises:
        _UnknownPart: It has no such part.
        ConfigError: It is not there, or cannot be read.
    """
    can = any("download" in inspect.signature(base.__init__).parameters for base in kind.__mro__)
    try:
        return _tried(kind, {**arguments, **({"download": False} if can else {})})
    except _UnknownPart:
        raise
    except Exception as error:  # torchvision raises half a dozen types for what is missing or damaged
        if not (download and can):
            hint = (
                "data.download=true downloads it"
                if can
                else "torchvision cannot download it, its documentation says how"
            )
            _refuse(data, error, hint)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"data.download: {data.dataset!r} is not in '{data.root}', and several processes would download it at once\n"
            "download it by one process first: python train.py ... data.download=true --dry-run"
        )
    try:
        return _tried(kind, {**arguments, "download": True})
    except Exception as error:
        _refuse(data, error, "the download failed; what there is in data.root may be cut short")


def _tried(kind: Any, arguments: dict[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except ValueError as error:
        if str(error).startswith("Unknown value"):
            raise _UnknownPart from None
        raise


def _refuse(data: DataSection, error: Exception, hint: str) -> Any:
    said = " ".join(str(error).replace(" You can use download=True to download it", "").split()) or type(error).__name__
    if isinstance(error, ImportError):
        hint = "install the package that it names"
    raise ConfigError(
        f"data.root: {data.dataset!r} cannot be read from '{data.root}': {said[:300].rstrip('.')}\n{hint}"
    ) from None


def _labels(dataset: Any, data: DataSection) -> list[int]:
    """The label of each sample: the list that the data set has, where it agrees with some samples, else by reading all."""
    count = len(dataset)
    if count == 0:
        raise ConfigError(f"data.root: {data.dataset!r} has no images in '{data.root}'")
    some = {index: _label(dataset[index][1]) for index in {0, count // 3, count // 2, count - 1}}
    for key in ("targets", "labels", "_labels", "y", "samples", "_samples"):
        found = getattr(dataset, key, None)
        if not isinstance(found, list | np.ndarray | Tensor) or len(found) != count:
            continue
        labels = [_label(entry[1] if key.endswith("samples") else entry) for entry in found]
        if None not in labels and all(labels[index] == label for index, label in some.items()):
            return [label for label in labels if label is not None]
    labels = [_label(dataset[index][1]) for index in range(count)]
    if None in labels:
        raise ConfigError(
            f"data.dataset: a label of {data.dataset!r} is no number of a class: {dataset[labels.index(None)][1]!r}"
        )
    return [label for label in labels if label is not None]


def _label(value: Any) -> int | None:
    """A label as a plain number; None for what is none."""
    if isinstance(value, np.ndarray | np.generic | Tensor):
        if value.ndim:
            return None
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _names(dataset: Any, labels: Sequence[int]) -> dict[int, str]:
    """The name of each label, ascending: those of the data set, where it has one for every label."""
    known = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or []
    there = sorted(set(labels))
    if not isinstance(known, list | tuple) or not there or not 0 <= there[0] <= there[-1] < len(known):
        return {label: str(label) for label in there}
    names = [", ".join(map(str, name)) if isinstance(name, list | tuple) else str(name) for name in known]
    shared = Counter(names)  # ImageNet has two kinds of cranes
    return {i: f"{name} ({i})" if shared[name] > 1 else name for i, name in enumerate(names)}


def _files(dataset: Any) -> list[str] | None:
    """Paths of the image files, where the data set lists them and gives just what is in them."""
    count = len(dataset)
    for key in ("samples", "_samples", "imgs", "_image_files", "_images"):
        found = getattr(dataset, key, None)
        if not isinstance(found, list) or len(found) != count:
            continue
        paths = [entry[0] if isinstance(entry, tuple) else entry for entry in found]
        if all(isinstance(path, str | Path) for path in paths) and all(
            _same(str(paths[index]), dataset[index][0]) for index in {0, count - 1}
        ):
            return [str(path) for path in paths]
    return None


def _same(path: str, picture: Any) -> bool:
    try:
        with Image.open(path) as image:
            return (
                isinstance(picture, Image.Image) and image.convert("RGB").tobytes() == picture.convert("RGB").tobytes()
            )
    except OSError:
        return False
