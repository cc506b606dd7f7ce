"""Folders of images: names, links, what is left out, and every mistake in a layout."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.training.data.parts import (
    COLOUR,
    CPU,
    augment_section,
    data_section,
    fails,
    folder,
    link,
    paths,
    write_image,
)
from training.config import DataSection
from training.data.build import build_datasets, class_names_of_data
from training.data.images import check_images
from training.data.loading import build_val_loader


def test_a_folder_is_read(image_root: Path) -> None:
    bundle = folder(image_root)
    assert bundle.class_names == ["aster", "daisy", "tulip"] and bundle.num_classes == 3
    assert bundle.train.targets == [0] * 5 + [1] * 5 + [2] * 5
    assert bundle.val.targets == [0, 0, 1, 1, 2, 2]
    images, targets, indices = next(iter(build_val_loader(bundle, data_section(batch_size=4), device=CPU)))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8
    assert targets.tolist() == [0, 0, 1, 1] and indices.tolist() == [0, 1, 2, 3]
    assert targets.dtype == indices.dtype == torch.int64
    check_images(bundle)


@pytest.mark.parametrize("name", ["valid", "validation", "test", "Val", "VALID", "Test"])
def test_other_names_of_the_two_folders(image_root: Path, name: str) -> None:
    (image_root / "val").rename(image_root / name)
    (image_root / "train").rename(image_root / ("Train" if name == "Val" else "TRAIN"))
    bundle = folder(image_root)
    assert (len(bundle.train), len(bundle.val)) == (15, 6)


def test_val_comes_before_other_names(image_root: Path) -> None:
    write_image(image_root / "test" / "other" / "0.jpg")
    assert len(folder(image_root).val) == 6


def test_one_name_in_two_spellings_is_refused(image_root: Path) -> None:
    (image_root / "Val").mkdir()
    if len(list(image_root.glob("[vV]al"))) == 1:
        pytest.skip("this file system does not tell capitals from small letters")
    with fails("has both 'Val', 'val'; keep one"):
        folder(image_root)


@pytest.mark.parametrize(
    "end", ["gif", "avif", "jfif", "JPE", "webp", "tiff", "bmp", "jp2", "ppm", "ico", "tga", "apng"]
)
def test_what_pillow_reads_is_data(image_root: Path, end: str) -> None:
    image = image_root / "train" / "aster" / f"9.{end}"
    Image.new("RGB", (32, 32), (200, 100, 50)).save(image, Image.registered_extensions()[f".{end.lower()}"])
    bundle = folder(image_root)
    assert len(bundle.train) == 16 and str(image) in paths(bundle.train)
    assert bundle.left_out == "1 file (1 .txt), 1 folder (1 .ipynb_checkpoints)"
    check_images(bundle)


def test_what_is_left_out_is_counted_by_kind(image_root: Path) -> None:
    train = image_root / "train"
    hidden = write_image(train / "daisy" / ".ipynb_checkpoints" / "0-checkpoint.png")
    write_image(train / "daisy" / "__MACOSX" / "._0.jpg.png")
    write_image(train / "__MACOSX" / "daisy" / "0.jpg")
    write_image(image_root / "__MACOSX" / "train" / "daisy" / "0.jpg")
    write_image(image_root / "val" / "tulip" / "@eaDir" / "0.jpg")
    write_image(train / "stray.jpg")
    for name in ("a.HEIC", "b.heic", ".DS_Store", "._0.jpg", "README", "run.eps", "x.jpg.part"):
        (train / "tulip" / name).write_bytes(hidden.read_bytes())
    bundle = folder(image_root)
    assert (len(bundle.train), len(bundle.val)) == (15, 6)
    assert bundle.left_out == (
        "9 files (2 hidden, 2 .heic, 1 .jpg beside the class folders, 1 .txt, 1 without an extension, 1 .eps, 1 .part), "
        "5 folders (2 .ipynb_checkpoints, 2 __MACOSX, 1 @eaDir)"
    )


LINKS = {  # name -> link in the training folder and where it leads, from the root
    "to its own class": ("aster/again", "train/aster"),
    "to a sibling class": ("aster/again", "train/daisy"),
    "to a folder in a sibling class": ("aster/again", "train/tulip/deep"),
    "to a folder in its own class": ("tulip/again", "train/tulip/deep"),
    "to all classes": ("aster/again", "train"),
    "to the root": ("aster/again", ""),
    "above the root": ("aster/again", ".."),
    "up from below": ("tulip/deep/again", "train/tulip"),
}


@pytest.mark.parametrize("name", LINKS)
def test_no_folder_is_read_twice(name: str, image_root: Path) -> None:
    write_image(image_root / "train" / "tulip" / "deep" / "5.png")
    place, target = LINKS[name]
    link(image_root / "train" / place, image_root / target)
    bundle = folder(image_root)
    assert bundle.train.targets == [0] * 5 + [1] * 5 + [2] * 6
    assert not [path for path in paths(bundle.train) if "again" in path]
    assert bundle.left_out.endswith(", 1 link to a folder read already")


def test_links_in_a_circle_through_other_folders_end(image_root: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "pool" / "a" / "6.png")
    write_image(tmp_path / "pool" / "b" / "7.png")
    link(tmp_path / "pool" / "a" / "to_b", tmp_path / "pool" / "b")
    link(tmp_path / "pool" / "b" / "to_a", tmp_path / "pool" / "a")
    link(image_root / "train" / "daisy" / "more", tmp_path / "pool" / "a")
    link(image_root / "train" / "daisy" / "most", tmp_path / "pool")
    bundle = folder(image_root)
    assert bundle.train.targets == [0] * 5 + [1] * 7 + [2] * 5
    assert [Path(path).name for path in paths(bundle.train)[5:12]] == [
        "0-plain.JPEG", "1-plain.JPEG", "2-plain.JPEG", "3-grey.jpg", "4-clear.png", "6.png", "7.png"
    ]  # fmt: skip
    assert bundle.left_out.endswith(", 3 links to folders read already")


def test_images_behind_a_link_stand_where_their_names_do(image_root: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "pool" / "6.png")
    link(image_root / "train" / "aster" / "1-linked", tmp_path / "pool")
    bundle = folder(image_root)
    source = bundle.train.source
    names = [source.name(i) for i in range(len(source))]
    assert names[:4] == ["aster/0-plain.JPEG", "aster/1-linked/6.png", "aster/1-plain.JPEG", "aster/2-plain.JPEG"]
    assert names[6] == "daisy/0-plain.JPEG" and [source.name(i - 16) for i in range(16)] == names
    with pytest.raises(IndexError):
        source.open(16)


def test_links_to_files_and_whole_classes_are_followed(image_root: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (image_root / split / "daisy").rename(tmp_path / split)
        link(image_root / split / "daisy", tmp_path / split)
    (image_root / "train" / "aster" / "9.jpg").symlink_to(tmp_path / "train" / "0-plain.JPEG")
    link(image_root / "train" / "daisy" / "up", tmp_path)  # above a class that lies elsewhere
    bundle = folder(image_root)
    assert bundle.train.targets == [0] * 6 + [1] * 5 + [2] * 5
    assert paths(bundle.train)[5] == str(image_root / "train" / "aster" / "9.jpg")
    assert bundle.left_out.endswith(", 1 link to a folder read already")


def test_images_of_two_classes_are_refused(image_root: Path, tmp_path: Path) -> None:
    train = image_root / "train"
    link(train / "poppy", train / "daisy")
    with fails("class folder", "poppy' is the same folder as class 'daisy'"):
        folder(image_root)
    (train / "poppy").unlink()
    link(train / "all", train)
    with fails("class folder", "all' is the same folder as one above it"):
        folder(image_root)
    (train / "all").unlink()
    write_image(tmp_path / "pool" / "deep" / "0.png")
    link(train / "aster" / "more", tmp_path / "pool" / "deep")
    link(train / "tulip" / "more", tmp_path / "pool")
    with fails("deep' belongs to two classes", "from 'aster' and from 'tulip'"):
        folder(image_root)


def test_links_that_lead_nowhere(image_root: Path) -> None:
    aster = image_root / "train" / "aster"
    link(aster / "gone", image_root / "nowhere")
    link(aster / "circle", aster / "circle")
    bundle = folder(image_root)
    assert "2 broken link, 1 .txt" in bundle.left_out
    check_images(bundle)
    link(aster / "gone.jpg", image_root / "nowhere.jpg")  # a missing image is no other kind of file
    with fails("1 of 22 images cannot be read", "gone.jpg", "No such file"):
        check_images(folder(image_root))


def test_pipes_are_no_images(image_root: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    os.mkfifo(image_root / "train" / "aster" / "pipe.jpg")  # opening it would wait for ever
    bundle = folder(image_root)
    assert len(bundle.train) == 15 and "1 no regular file" in bundle.left_out


def test_a_folder_that_cannot_be_listed_is_named(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = image_root / "train" / "daisy" / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may list any folder
    with fails(f"'{closed}' cannot be listed: Permission denied"):
        folder(image_root)


def test_a_missing_root_is_named_with_its_neighbour(image_root: Path) -> None:
    with fails("data.root: ", "flowrs' does not exist", "did you mean 'flowers'", "ROOT/train/CLASS"):
        folder(image_root.with_name("flowrs"))
    with fails("does not exist"):
        folder(image_root / "nowhere" / "at-all")
    with fails("data.root: is needed"):
        build_datasets(DataSection.model_construct(dataset="folder"), augment_section(), COLOUR, seed=0)
    with fails("is a file, not a folder"):
        folder(image_root / "train" / "aster" / "notes.txt")


def test_a_root_without_train_or_val_is_refused(image_root: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with fails("no folder 'train'", "it has no folders"):
        folder(empty)
    with fails("no folder 'train'", "folders there: 'aster', 'daisy', 'tulip'"):
        folder(image_root / "train")
    (image_root / "val").rename(image_root / "held-out")
    allowed = "allowed names: val, valid, validation, test"
    with fails("no folder for validation", "folders there: 'held-out', 'train'", allowed):
        folder(image_root)


def test_folders_without_classes_or_images_are_refused(image_root: Path, tmp_path: Path) -> None:
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "val").mkdir()
    with fails("train' has no class folders"):
        folder(tmp_path / "bare")
    (image_root / "val" / "poppy").mkdir()
    (image_root / "val" / "poppy" / "notes.txt").write_text("no image")
    with fails(str(image_root / "val" / "poppy"), "has no images; left out: 1 file (1 .txt)", ".jpeg"):
        folder(image_root)
    (image_root / "val" / "rose").mkdir()
    with fails("poppy' has no images (and 1 more such folders)"):
        folder(image_root)


def test_classes_that_differ_are_named(image_root: Path) -> None:
    write_image(image_root / "train" / "poppy" / "0.jpg")
    (image_root / "val" / "aster").rename(image_root / "val" / "Aster")
    with fails("differ", "only in train: 'aster', 'poppy'", "only in val: 'Aster'"):
        folder(image_root)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "all" / "0.jpg")
    write_image(tmp_path / "val" / "all" / "0.jpg")
    with fails("one class folder, 'all'", "at least two"):
        folder(tmp_path)


def part(root: Path, name: str, **data: Any) -> list[str]:
    bundle = build_datasets(
        data_section(dataset="folder", root=str(root), **data), augment_section(), COLOUR, seed=data.get("fold", 0)
    )
    dataset = {"train": bundle.train, "val": bundle.val, "test": bundle.test}[name]
    return [] if dataset is None else [dataset.source.name(i) for i in range(len(dataset))]


@pytest.fixture
def one_folder(tmp_path: Path) -> Path:
    """ROOT/CLASS without parts, 10 images each."""
    for name in ("ant", "bee"):
        for i in range(10):
            write_image(tmp_path / "insects" / name / f"{i}.png", size=(8, 8), seed=i)
    return tmp_path / "insects"


def test_one_folder_of_classes_is_split_wherever_it_lies(one_folder: Path) -> None:
    val, train = (part(one_folder, name, val_fraction=0.2) for name in ("val", "train"))
    assert val == ["ant/4.png", "ant/6.png", "bee/0.png", "bee/6.png"]
    assert len(train) == 16 and not {*train} & {*val}
    section = data_section(dataset="folder", root=str(one_folder), val_fraction=0.2)
    assert class_names_of_data(section) == ["ant", "bee"]
    (one_folder / "train").mkdir()
    for name in ("ant", "bee"):
        (one_folder / name).rename(one_folder / "train" / name)
    assert part(one_folder, "val", val_fraction=0.2) == val, "ROOT/train alone is the same data"
    assert part(one_folder.rename(one_folder.parent / "moved"), "val", val_fraction=0.2) == val


def test_folds_of_a_folder(one_folder: Path) -> None:
    vals = [part(one_folder, "val", folds=5, fold=fold) for fold in range(5)]
    assert sorted(name for val in vals for name in val) == sorted(
        part(one_folder, "train", folds=5, fold=0) + part(one_folder, "val", folds=5, fold=0)
    )
    assert [len(val) for val in vals] == [4] * 5


def test_the_order_of_the_file_system_changes_no_split(one_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = part(one_folder, "val", val_fraction=0.3), part(one_folder, "train", val_fraction=0.3, train_samples=5)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: Any) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> Any:
            return iter(self.entries)

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Backwards)
    after = part(one_folder, "val", val_fraction=0.3), part(one_folder, "train", val_fraction=0.3, train_samples=5)
    assert after == before and len(before[1]) == 5


def test_a_test_folder_beside_the_others_is_the_test_part(image_root: Path) -> None:
    for name in ("aster", "tulip"):  # a class may be missing there
        write_image(image_root / "test" / name / "0.jpg")
    assert part(image_root, "test") == ["aster/0.jpg", "tulip/0.jpg"]
    assert len(part(image_root, "val")) == 6
    bundle = folder(image_root)
    assert bundle.test is not None and bundle.test.targets == [0, 2]
    (image_root / "val").rename(image_root.parent / "elsewhere")
    assert part(image_root, "test", val_fraction=0.2) == ["aster/0.jpg", "tulip/0.jpg"], "no substitute for validation"
    assert len(part(image_root, "val", val_fraction=0.2)) == 3


@pytest.mark.parametrize(
    ("image", "words"),
    [("poppy/0.jpg", "folder 'test' (classes that training has not: 'poppy')"),
     ("0.jpg", "folder 'test' (no classes with images)")],
)  # fmt: skip
def test_a_test_folder_that_is_of_no_use_stops_no_training(image_root: Path, image: str, words: str) -> None:
    write_image(image_root / "test" / image)
    bundle = folder(image_root)
    assert bundle.test is None and bundle.left_out.endswith(f", {words}")


def test_a_split_that_cannot_be_is_refused(image_root: Path, one_folder: Path) -> None:
    with fails("data.val_fraction: has no effect", f"'{image_root / 'val'}'"):
        part(image_root, "val", val_fraction=0.2)
    with fails("no folder 'train'", "folders there: 'ant', 'bee'", "data.val_fraction=0.1 splits them"):
        folder(one_folder)
    with fails("0.01 leaves class 'ant' without samples for validation: 10 of 10 for training, 0 for validation"):
        part(one_folder, "val", val_fraction=0.01)
    write_image(one_folder / "Valid" / "0.png")
    with fails("no folder 'train'", "expected ROOT/train/CLASS/*.jpg or ROOT/CLASS/*.jpg"):
        part(one_folder, "val", val_fraction=0.2)
    (image_root / "val").rename(image_root / "held-out")
    with fails("no folder for validation", "data.val_fraction=0.1"):
        folder(image_root)


def test_images_are_looked_at_a_few_at_a_time(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and the first that is damaged is named, in whichever lot it is."""
    monkeypatch.setattr("training.data.images.CHECKED_AT_ONCE", 4)
    bundle = folder(image_root)
    damaged = [bundle.train.source.name(11), bundle.val.source.name(len(bundle.val) - 1)]
    for part, name in zip(("train", "val"), damaged, strict=True):
        (image_root / part / name).write_bytes(b"")
    with fails(f"2 of 21 images cannot be read; the first is '{image_root / 'train' / damaged[0]}'"):
        check_images(bundle)
