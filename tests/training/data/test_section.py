"""The section `data`: keys that a kind needs, takes, or has no use for."""

from typing import Any

import pytest

from tests.training.data.parts import data_section, refused
from training.data import kinds
from training.data.kinds import DataKind
from training.data.section import DataSection


def test_a_key_that_a_kind_needs() -> None:
    assert "dataset 'folder' needs a root, for example data.root=/path/to/imagenet" in refused(dataset="folder")


def test_a_key_without_effect() -> None:
    assert "has no effect with dataset 'digits'; leave it out" in refused(dataset="digits", root="somewhere")


def test_an_unknown_kind_and_the_nearest() -> None:
    assert "got 'foldr'; did you mean 'folder'?" in refused(dataset="foldr", root="somewhere")


def test_a_kind_with_a_name_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.KINDS, "shop", DataKind("shop", "a shop's", needs=(), named=True))
    assert DataSection(dataset="shop/Shoes").kind is kinds.KINDS["shop"]
    for wrong in ("shop", "shop/", "digits/a"):
        assert f"'shop/NAME', got '{wrong}'" in refused(dataset=wrong)
    assert "did you mean 'shop/NAME'?" in refused(dataset="shop"), "not what was given"


def test_a_kind_with_or_without_a_name_behind_it() -> None:
    for dataset in ("huggingface", "huggingface/food101", "huggingface/user/name"):
        assert DataSection(dataset=dataset).kind is kinds.KINDS["huggingface"]
    assert "'huggingface' or 'huggingface/NAME'" in refused(dataset="huggingface/")
    assert "has no effect with dataset 'huggingface'; leave it out" in refused(dataset="huggingface", label_key="a")


def test_nothing_in_memory_is_skipped() -> None:
    assert "is in memory" in refused(dataset="digits", on_error="skip")


def test_classes_are_names_or_numbers_and_each_once() -> None:
    assert data_section(classes=[3, "1"]).classes == ["3", "1"]
    assert "'3' is listed twice" in refused(dataset="digits", classes=[3, "3"])
    assert "at least 2 items" in refused(dataset="digits", classes=["3"])
    for wrong in ([True, False], [0.5, 1.5], "3"):
        assert "valid string" in (words := refused(dataset="digits", classes=wrong)) or "valid list" in words


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"folds": 5}, "5 folds need data.fold, 0 to 4"),
        ({"fold": 1}, "has no effect without data.folds"),
        ({"folds": 5, "fold": 5}, "5 is not one of 5 folds, 0 to 4"),
        ({"folds": 5, "fold": 0, "val_fraction": 0.1}, "not both"),
        ({"folds": 1, "fold": 0}, "greater than or equal to 2"),
        ({"val_fraction": 1.0}, "less than 1"),
        ({"val_fraction": 0.0}, "greater than 0"),
        ({"train_samples": 0}, "greater than or equal to 1"),
    ],
)
def test_how_data_are_split(values: dict[str, Any], words: str) -> None:
    assert words in refused(dataset="folder", root="somewhere", **values)


def test_balance_power_belongs_to_the_balanced_sampler() -> None:
    assert DataSection(dataset="digits", sampler="balanced").balance_power == 1.0
    assert DataSection(dataset="digits", sampler="balanced", balance_power=0.5).balance_power == 0.5
    assert DataSection(dataset="digits").balance_power is None
    assert "has no effect with sampler 'shuffle'" in refused(dataset="digits", balance_power=0.5)
    assert "less than or equal to 1" in refused(dataset="digits", sampler="balanced", balance_power=1.5)
