"""What a data set is known by."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.data.parts import COLOUR, digits, fails, folder, write_image
from training.data.identity import check_same_data, data_difference


def identity(root: Path) -> dict[str, Any]:
    return folder(root).identity


def test_a_data_set_is_known_wherever_it_lies(image_root: Path, tmp_path: Path) -> None:
    before = identity(image_root)
    assert before["class_names"] == ["aster", "daisy", "tulip"] and before["dataset"] == "folder"
    assert before["train"]["samples_per_class"] == [5, 5, 5] and before["val"]["samples_per_class"] == [2, 2, 2]
    moved = image_root.rename(tmp_path / "moved to")
    (moved / "val").rename(moved / "validation")
    assert identity(moved) == before
    check_same_data(before, identity(moved), root=str(moved))
    write_image(moved / "train" / "aster" / "0-plain.JPEG", seed=99)
    assert identity(moved) == before, "files are known by name"
    assert digits().identity == digits(COLOUR, seed=3).identity
    assert digits().identity["train"]["samples"] == 1437 and sum(digits().identity["val"]["samples_per_class"]) == 360
    assert json.loads(json.dumps(before)) == before


def rename_class(root: Path, old: str, new: str) -> None:
    for part in ("train", "val"):
        (root / part / old).rename(root / part / new)


def add_class(root: Path) -> None:
    for part in ("train", "val"):
        write_image(root / part / "rose" / "0.jpg")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "renamed": (lambda r: rename_class(r, "aster", "zinnia"), "classes gone: 'aster', new: 'zinnia'"),
    "capital": (lambda r: rename_class(r, "tulip", "Tulip"), "classes gone: 'tulip', new: 'Tulip'"),
    "added": (add_class, "classes new: 'rose'"),
    "gone": (lambda r: [shutil.rmtree(r / p / "daisy") for p in ("train", "val")], "classes gone: 'daisy'"),
    "fewer": (lambda r: (r / "train/daisy/0-plain.JPEG").unlink(), "class 'daisy' had 5 training images, has 4"),
    "more": (lambda r: write_image(r / "val/tulip/x.png"), "class 'tulip' had 2 validation images, has 3"),
    "file": (lambda r: (r / "train/aster/0-plain.JPEG").rename(r / "train/aster/9.JPEG"),
             "as many training images as before, but files have other names"),
    "validation file": (lambda r: (r / "val/aster/deeper/0.jpg").rename(r / "val/aster/0.jpg"),
                        "as many validation images as before, but files have other names"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_is_refused_by_what_differs(change: str, image_root: Path) -> None:
    before = identity(image_root)
    act, words = CHANGES[change]
    act(image_root)
    assert data_difference(before, identity(image_root)) == words
    with fails("--resume", str(image_root), words):
        check_same_data(before, identity(image_root), root=str(image_root))


def test_several_changed_classes_are_counted(image_root: Path) -> None:
    before = identity(image_root)
    for name in ("aster", "tulip"):
        write_image(image_root / "train" / name / "new.png")
    assert data_difference(before, identity(image_root)) == (
        "class 'aster' had 5 training images, has 6 (and 1 more classes changed)"
    )
    assert data_difference(digits().identity, before) == "data.dataset was 'digits', is 'folder'"
    assert data_difference({"dataset": "digits"}, digits().identity) is not None, "of an identity that is cut short"
