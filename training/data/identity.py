"""What data are known by: class names in order, samples per class, a digest of the names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from files.errors import ConfigError
from files.words import counted
from models.factory import class_difference
from training.data.source import Sources


def data_identity(dataset: str, sources: Sources) -> dict[str, Any]:
    """What a data set is known by, as plain values: equal where every index means the same sample with the same label.

    Samples are known by their names, not by what is in them, and a name does not hold the root, which may move.
    """
    class_names = sources.train.class_names
    identity: dict[str, Any] = {"dataset": dataset, "class_names": list(class_names)}
    for part, source in (("train", sources.train), ("val", sources.val)):
        assert source is not None, "of parts as `divide` leaves them"
        digest = hashlib.sha256()
        for index, target in enumerate(source.targets):
            name = f"{target} {source.name(index)}\0"
            digest.update(name.encode("utf-8", "surrogateescape"))  # names may be any bytes
        counts = np.bincount(np.asarray(source.targets, dtype=np.int64), minlength=len(class_names)).tolist()
        identity[part] = {"samples": len(source), "samples_per_class": counts, "names_sha256": digest.hexdigest()}
    return identity


def data_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing in which two data sets differ, in words; None where they are the same."""
    if before.get("dataset") != now["dataset"]:
        return f"data.dataset was {before.get('dataset')!r}, is {now['dataset']!r}"
    old, new = before.get("class_names") or [], now["class_names"]
    if old != new:
        return class_difference(old, new)
    for part, what in (("train", "training"), ("val", "validation")):
        was, found = before.get(part) or {}, now[part]
        pairs = zip(new, was.get("samples_per_class") or [0] * len(new), found["samples_per_class"], strict=False)
        changed = [(name, a, b) for name, a, b in pairs if a != b]
        if changed:
            name, a, b = changed[0]
            more = f" (and {len(changed) - 1} more classes changed)" if len(changed) > 1 else ""
            return f"class '{name}' had {counted(a, f'{what} image')}, has {b:,}{more}"
        if was != found:
            return f"as many {what} images as before, but files have other names"
    return None


def check_same_data(before: Mapping[str, Any], now: Mapping[str, Any], *, root: str | None) -> None:
    """Refuses to go on with a run on other data than it began with.

    Args:
        before: The identity in the run's checkpoint or data.json.
        now: That of the data as it is.
        root: Where it is.

    Raises:
        ConfigError: Naming what differs.
    """
    difference = data_difference(before, now)
    if difference:
        where = f"the data in '{root}'" if root else "the data"
        raise ConfigError(
            f"--resume: {where} is not what the run began with: {difference}\n"
            "put it back as it was, or start a new run from the run's weights (model.checkpoint)"
        )
