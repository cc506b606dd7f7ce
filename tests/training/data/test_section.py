"""The section `data`: keys that a kind needs, takes, or has no use for."""

import pytest

from tests.training.data.parts import refused
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


def test_a_kind_with_or_without_a_name_behind_it() -> None:
    for dataset in ("huggingface", "huggingface/food101", "huggingface/user/name"):
        assert DataSection(dataset=dataset).kind is kinds.KINDS["huggingface"]
    assert "'huggingface' or 'huggingface/NAME'" in refused(dataset="huggingface/")
    assert "has no effect with dataset 'huggingface'; leave it out" in refused(dataset="huggingface", label_key="a")


def test_nothing_in_memory_is_skipped() -> None:
    assert "is in memory" in refused(dataset="digits", on_error="skip")
