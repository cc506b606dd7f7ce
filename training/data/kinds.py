"""The kinds of data that `data.dataset` names: a line here, and a module.

The module has two functions of the config's section. `sources(data) -> Sources` finds the samples of both parts
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
        in_root: Whether the samples lie in `data.root`; otherwise they are in memory, and a root has no effect.
    """

    module: str
    description: str
    in_root: bool


KINDS: dict[str, DataKind] = {
    "digits": DataKind("training.data.digits", "scikit-learn's, no download", in_root=False),
    "folder": DataKind("training.data.folder", "images in root/train/CLASS and root/val/CLASS", in_root=True),
}
