"""Names of classes: those of weights, and how they meet those of data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from files.errors import ConfigError, nearest
from files.words import counted
from models.factory import class_names_of


def published_names(model: Any) -> list[list[str]]:
    """What the classes of published ImageNet weights are called, in the order of the logits: WordNet's ids, then words.

    Empty for any other number of classes. timm goes by the number too: the order is the same in all such weights.
    """
    subset = infer_imagenet_subset(model)
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    words = list(info.label_descriptions())
    return [list(info.label_names()), words, [word.partition(",")[0] for word in words]]


def names_for_people(model: Any, *, published: bool) -> list[str] | None:
    """A name for each logit, as they go into a table; None where the weights do not say."""
    names = class_names_of(model)
    if names is None and published and (known := published_names(model)):
        names = known[1]
    if names is None:
        return None
    return names + [f"unnamed {i}" for i in range(len(names), model.num_classes)]


def match_classes(model: Any, data: Sequence[str], *, published: bool, text: str) -> tuple[list[int] | None, str]:
    """Which logits stand for the classes of some data.

    Args:
        model: With or without names.
        data: Names of the data's classes, in the order of the targets.
        published: The weights are their authors', see `published_names`.
        text: What the user called the model.

    Returns:
        The logits of the data's classes in their order, or None where all logits are taken as they are; and what was
        done, in words, empty where nothing needs to be said.

    Raises:
        ConfigError: The classes are not the model's.
    """
    names = class_names_of(model)
    known = [names] if names else published_names(model) if published else []
    for candidate in known:
        if list(candidate) == list(data):  # logits behind the last name were none's in training either
            return None, ""
        counts = Counter(candidate)  # of ImageNet's words two are given twice
        places = {name: i for i, name in enumerate(candidate) if counts[name] == 1}
        if all(name in places for name in data):
            columns = [places[name] for name in data]
            rest = model.num_classes - len(data)
            if rest == 0:
                return columns, "the data's classes stand in another order than the model's: matched by name"
            return (
                columns,
                f"{len(data)} of the model's {model.num_classes} classes, matched by name; others are left out",
            )
    if names:
        missing = [name for name in data if name not in set(names)]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"{text}: the data has classes that the weights do not know: {missing[0]!r}{more}"
            f"{nearest(missing[0], names)}\nthe weights' classes: {_some(names)}"
        )
    if model.num_classes == len(data):
        return None, "the weights do not name their classes: taken in the order of the data's"
    why = "whose names are not ImageNet's" if known else "and the weights do not name theirs"
    raise ConfigError(
        f"{text}: the model has {counted(model.num_classes, 'class')}, the data {len(data)} ({_some(data)}), {why}, "
        "so that they cannot be matched"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
