"""Names of classes: of weights and data, matched or refused."""

from types import SimpleNamespace

import pytest

from files.errors import ConfigError
from training.evaluating.classes import match_classes, names_for_people, published_names


def model(count: int, names: list[str] | None = None) -> SimpleNamespace:
    return SimpleNamespace(num_classes=count, pretrained_cfg={"label_names": names} if names else {})


def match(
    count: int, names: list[str] | None, data: list[str], published: bool = False
) -> tuple[list[int] | None, str]:
    return match_classes(model(count, names), data, published=published, text="m")


def test_the_same_names_take_all_logits() -> None:
    assert match(3, ["a", "b", "c"], ["a", "b", "c"]) == (None, "")
    assert match(5, ["a", "b", "c"], ["a", "b", "c"]) == (None, ""), "as in training with a wider classifier"


def test_another_order_and_a_part_are_matched_by_name() -> None:
    columns, told = match(3, ["a", "b", "c"], ["c", "a", "b"])
    assert columns == [2, 0, 1] and "another order" in told
    columns, told = match(3, ["a", "b", "c"], ["c", "a"])
    assert columns == [2, 0] and "2 of the model's 3 classes" in told


def test_without_names_only_the_number_can_agree() -> None:
    columns, told = match(2, None, ["x", "y"])
    assert columns is None and "do not name" in told
    with pytest.raises(ConfigError, match="has 3 classes, the data 2"):
        match(3, None, ["x", "y"])


def test_imagenet_is_known_by_its_ids_and_words() -> None:
    ids, words, first = published_names(model(1000))
    assert ids[0] == "n01440764" and words[0] == "tench, Tinca tinca" and first[0] == "tench"
    assert match(1000, None, ids, published=True) == (None, "")
    for names in (ids, first):
        assert match(1000, None, [names[7], names[1]], published=True)[0] == [7, 1]
    with pytest.raises(ConfigError, match="not ImageNet's"):
        match(1000, None, ["crane", "tench"], published=True)  # two classes are called crane
    with pytest.raises(ConfigError, match="do not name theirs"):
        match(1000, None, [ids[7], ids[1]])  # weights of somebody who has 1,000 classes too
    assert published_names(model(999)) == []


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        match(3, ["aster", "daisy", "tulip"], ["aster", "dasy", "rose"])
    assert "'dasy' and 1 more; did you mean 'daisy'?" in str(caught.value) and len(str(caught.value).splitlines()) == 2


def test_names_for_tables() -> None:
    assert names_for_people(model(3, ["a", "b"]), published=False) == ["a", "b", "unnamed 2"]
    assert names_for_people(model(1000), published=False) is None
    names = names_for_people(model(1000), published=True)
    assert names is not None and names[0] == "tench, Tinca tinca" and len(names) == 1000
