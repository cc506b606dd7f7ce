"""Hugging Face data sets: local ones of every form, columns, splits and labels, the stored bytes by index, mistakes."""

import io
import multiprocessing
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image as PillowImage

from files.errors import ConfigError
from tests.training.data.parts import COLOUR, EVERYTHING, augment_section, fails, folder, train_loader, write_image
from tests.training.data.resumed import assert_resumed_equals_uninterrupted
from tests.training.data.sharded import picture
from training.config import DataSection
from training.data.build import build_datasets
from training.data.dataset import DataBundle
from training.data.huggingface import class_names, sources
from training.data.images import check_images
from training.data.source import Source

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` converts goes to the test's folder; and nothing asks the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as the environment's HF_HUB_OFFLINE=1
    datasets.disable_progress_bars()
    really = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"the network is asked: {address}"
        really(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


def section(root: Path | None = None, **values: object) -> DataSection:
    given: dict[str, Any] = {
        "dataset": "huggingface",
        "batch_size": 4,
        "workers": 0,
        "root": root and str(root),
        **values,
    }
    return DataSection(**given)


def bundle(root: Path, **values: object) -> DataBundle:
    return build_datasets(section(root, **values), augment_section(**EVERYTHING), COLOUR, seed=0)


def rows(
    labels: Sequence[object],
    *,
    names: Sequence[str] | None = ("cat", "dog"),
    start: int = 0,
    files: bool = False,
    **more: Any,
) -> Any:
    """A split of pictures and labels; with `files`, each picture has the name of a file."""
    images = [{"bytes": picture(start + i), "path": f"{start + i}.png" if files else None} for i in range(len(labels))]
    features: dict[str, Any] = {"image": datasets.Image()}
    if names is not None:
        features["label"] = datasets.ClassLabel(names=list(names))
    columns = {"image": images, "label": list(labels), **{name: values for name, (values, _) in more.items()}}
    found = datasets.Dataset.from_dict({"image": images, "label": list(labels)}) if names is None else None
    if found is not None:
        features["label"] = found.features["label"]
    features |= {name: feature for name, (_, feature) in more.items()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def saved(root: Path, **splits: Any) -> Path:
    datasets.DatasetDict(splits).save_to_disk(str(root))
    return root


def two(root: Path, **more: Any) -> Path:
    return saved(root, train=rows([0, 1] * 6, **more), validation=rows([0, 1] * 2, start=12, **more))


def names(source: Source | None) -> list[str]:
    assert source is not None
    return [source.name(i) for i in range(len(source))]


def contents(source: Source | None) -> list[bytes]:
    found = []
    assert source is not None
    for i in range(len(source)):
        raw = source.open(i)
        assert not isinstance(raw, PillowImage.Image)
        with raw:
            found.append(raw.read())
    return found


def test_rows_are_the_stored_bytes(tmp_path: Path) -> None:
    train, val, left_out, test = sources(section(two(tmp_path / "data")))
    assert contents(train) == [picture(i) for i in range(12)] and contents(val) == [picture(i) for i in range(12, 16)]
    assert train.targets == [0, 1] * 6 and train.class_names == ["cat", "dog"] and left_out == "" and test is None
    assert names(train)[:2] == ["train/0", "train/1"] and names(val)[3] == "validation/3"
    assert train.location == str(tmp_path / "data")


def test_images_are_those_of_a_folder_with_the_same_files(tmp_path: Path) -> None:
    root = tmp_path / "files"
    for number, (part, name) in enumerate((p, n) for p in ("train", "val") for n in ("cat", "dog")):
        for i in range(3):
            write_image(root / part / name / f"{i}.png", seed=10 * number + i)
    theirs = folder(root, **EVERYTHING)
    (tmp_path / "link").symlink_to(root)
    for place in (root, Path(os.path.relpath(root)), tmp_path / "link"):
        ours = bundle(place)  # `datasets` calls this an imagefolder
        assert ours.class_names == theirs.class_names and ours.train.targets == theirs.train.targets
        assert names(ours.train.source) == [f"train/{name}" for name in names(theirs.train.source)]
    for i in range(6):
        assert torch.equal(ours.train[1, i][0], theirs.train[1, i][0]) and torch.equal(ours.val[i][0], theirs.val[i][0])
    check_images(ours)


@pytest.mark.parametrize("form", ["parquet", "parquet of one folder", "arrow", "one split"])
def test_other_forms(form: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    train, val = rows([0, 1] * 3), rows([1, 0], start=6)
    if form == "parquet":
        (root / "data").mkdir()
        train.to_parquet(str(root / "data" / "train-00000-of-00001.parquet"))
        val.to_parquet(str(root / "data" / "validation-00000-of-00001.parquet"))
    elif form == "parquet of one folder":
        train.to_parquet(str(root / "train.parquet"))
        val.to_parquet(str(root / "test.parquet"))
    elif form == "arrow":
        for name, split in (("train", train), ("valid", val)):
            split.save_to_disk(str(tmp_path / "other"))
            (arrow,) = (tmp_path / "other").glob("*.arrow")
            shutil.move(arrow, root / f"{name}.arrow")
    else:
        train.save_to_disk(str(root))
    found = sources(section(root))
    assert contents(found.train) == [picture(i) for i in range(6)] and found.train.class_names == ["cat", "dog"]
    if form == "one split":
        assert found.val is None and found.test is None, "for training.data.split to make one"
    else:
        assert contents(found.test if "one" in form else found.val) == [picture(6), picture(7)]


def test_names_are_those_of_files_where_each_row_has_its_own(tmp_path: Path) -> None:
    assert names(sources(section(two(tmp_path / "a", files=True))).train)[:2] == ["train/0.png", "train/1.png"]
    same = datasets.concatenate_datasets([rows([0, 1], files=True), rows([1, 0], files=True)])
    found = names(sources(section(saved(tmp_path / "b", train=same))).train)
    assert found == ["train/0/0.png", "train/1/1.png", "train/2/0.png", "train/3/1.png"]


def test_the_identity_is_the_same_where_the_data_move(tmp_path: Path) -> None:
    before = bundle(two(tmp_path / "here")).identity
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert bundle(tmp_path / "there").identity == before


@pytest.mark.parametrize(
    ("labels", "expected", "targets"),
    [([10, 3, 7], ["3", "7", "10"], [2, 0, 1]), (["owl", "cat", "dog"], ["cat", "dog", "owl"], [2, 0, 1])],
)
def test_labels_that_are_no_classes(labels: list, expected: list[str], targets: list[int], tmp_path: Path) -> None:
    root = saved(tmp_path / "data", train=rows(labels * 2, names=None), val=rows(labels[:1], names=None))
    found = sources(section(root))
    assert found.train.class_names == class_names(section(root)) == expected
    assert found.train.targets == targets * 2 and found.val is not None and found.val.targets == [2]


def test_splits(tmp_path: Path) -> None:
    parts = {name: rows([0, 1], start=10 * i) for i, name in enumerate(["train", "extra", "validation", "test"])}
    root = saved(tmp_path / "data", **parts)
    found = sources(section(root))
    assert [names(part)[0] for part in found if not isinstance(part, str)] == ["train/0", "validation/0", "test/0"]
    assert found.left_out == "split extra"
    found = sources(section(root, train_split="extra", val_split="test"))
    assert names(found.train) == ["extra/0", "extra/1"] and names(found.val)[0] == "test/0" and found.test is None
    bundle(saved(tmp_path / "b", train=rows([0, 1]), test=rows([0, 1])))  # a lone test part validates


def test_a_test_split_without_labels_is_left_out(tmp_path: Path) -> None:
    root = saved(tmp_path / "data", train=rows([0, 1]), validation=rows([1, 0]), test=rows([-1, -1]))
    found = sources(section(root))
    assert found.test is None and found.left_out == "split test (without labels)"


def test_columns(tmp_path: Path) -> None:
    more = {
        "mask": ([{"bytes": picture(50 + i), "path": None} for i in range(12)], datasets.Image()),
        "colour": ([1, 0] * 6, datasets.ClassLabel(names=["red", "blue"])),
        "raw": ([picture(80 + i) for i in range(12)], datasets.Value("binary")),
    }
    root = saved(tmp_path / "data", train=rows([0, 1] * 6, **more))
    with fails(
        "data.image_column: the data have 2 columns of images", "image (Image), label (ClassLabel), mask (Image)"
    ):
        sources(section(root))
    with fails("data.label_column: the data have 2 columns of classes; say which to use"):
        sources(section(root, image_column="mask"))
    found = sources(section(root, image_column="mask", label_column="colour"))
    assert contents(found.train)[0] == picture(50) and found.train.class_names == ["red", "blue"]
    assert found.train.targets == [1, 0] * 6
    found = sources(section(root, image_column="raw", label_column="label"))
    assert contents(found.train)[11] == picture(91), "encoded images of other tools"


def _many(root: Path) -> Path:
    """A saved data set with a column of each kind of mistake."""
    more = {"text": (["a"] * 4, datasets.Value("string")), "share": ([0.5] * 4, datasets.Value("float32"))}
    return saved(root, train=rows([0, 1] * 2, **more), validation=rows([0, 1] * 2, **more))


def _parquet(root: Path) -> Path:
    root.mkdir()
    (root / "train.parquet").write_bytes(b"no parquet")
    return root


def _empty(root: Path) -> Path:
    root.mkdir()
    rows([0, 1]).to_parquet(str(root / "train.parquet"))
    rows([]).to_parquet(str(root / "validation.parquet"))
    return root


def _made(root: Path) -> Path:
    root.mkdir()
    return root


MISTAKES: dict[str, tuple[Callable[[Path], Path], dict[str, object], tuple[str, ...]]] = {
    "no image": (_many, {"image_column": "text"}, ("data.image_column: 'text' is no column of images", "text (string)")),
    "no such image": (_many, {"image_column": "img"}, ("there is no column 'img'; did you mean 'image'?",)),
    "no label": (_many, {"label_column": "share"}, ("'share' holds neither classes nor text nor whole", "(float32)")),
    "no such label": (_many, {"label_column": "lable"}, ("there is no column 'lable'; did you mean 'label'?", "columns:")),
    "one class": (_many, {"label_column": "text"}, ("data.label_column: 'text' has one class, 'a'",)),
    "no such split": (_many, {"val_split": "validatoin"}, ("has no split 'validatoin'; did you mean 'validation'?",)),
    "no such train": (_many, {"train_split": "trian"}, ("data.train_split", "splits there: 'train', 'validation'")),
    "an empty split": (_empty, {}, ("' cannot be loaded: ", "no data")),
    "an empty split that was saved": (
        lambda root: saved(root, train=rows([0, 1]), val=rows([])), {}, ("cannot be loaded: has a split no rows?",),
    ),
    "the same split": (_many, {"val_split": "train"}, ("data.val_split: 'train' is the split to train on",)),
    "a config": (_many, {"config_name": "x"}, ("data.config_name: 'x' has no effect with a folder of save_to_disk",)),
    "no label in val": (
        lambda root: saved(root, train=rows([0, 1]), val=rows([0, -1, None])), {},
        ("row 1 of split 'val' has no label, label is -1 (and 1 more of 3 rows)",),
    ),
    "no text": (
        lambda root: saved(root, train=rows(["a", "b", None], names=None)), {},
        ("row 2 of split 'train' has no label, label is None",),
    ),
    "text of val alone": (
        lambda root: saved(root, train=rows(["cat", "dog"], names=None), val=rows(["cats"], names=None)), {},
        ("row 0 of split 'val' has the label 'cats', expected one of the 2", "did you mean 'cat'?"),
    ),
    "other classes": (
        lambda root: saved(root, train=rows([0, 1]), val=rows([0, 1], names=["dog", "cat"])), {},
        ("the classes of 'label' differ between the splits",),
    ),
    "no columns of images": (
        lambda root: saved(root, train=datasets.Dataset.from_dict({"x": [1, 2]})), {},
        ("data.image_column: the data have no column of images", "columns: x (int64)"),
    ),
    "no columns of classes": (
        lambda root: saved(root, train=rows([0, 1]).rename_column("label", "kind").cast_column(
            "kind", datasets.Value("int64"))), {}, ("data.label_column: the data have no column of classes",),
    ),
    "damaged": (_parquet, {}, ("data.root: '", "' cannot be loaded: ")),
    "an empty folder": (_made, {}, ("data.root: '", "' cannot be loaded: ", "doesn't contain any data files")),
    "no folder": (lambda root: root.with_name("dta"), {}, ("data.root: '", "dta' does not exist")),
    "a file": (lambda root: write_image(root.with_name("a.png")), {}, ("a.png' is a file, not a folder",)),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, tmp_path: Path) -> None:
    make, values, parts = MISTAKES[name]
    with fails(*parts):
        sources(section(make(tmp_path / "data"), **values))


def test_a_place_is_needed_and_one_is_enough(tmp_path: Path) -> None:
    with fails("data.root: dataset 'huggingface' needs a root, or the name", "huggingface/food101"):
        sources(section())
    with fails("data.root: has no effect with dataset 'huggingface/food101'"):
        sources(section(tmp_path, dataset="huggingface/food101"))


def test_a_name_that_cannot_be_fetched_costs_a_line() -> None:
    for name in ("food101", "somebody/some-images"):
        with pytest.raises(ConfigError) as caught:
            sources(section(dataset=f"huggingface/{name}"))
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"data.dataset: 'huggingface/{name}' cannot be loaded: Couldn't reach")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with fails("'huggingface' needs the package datasets: pip install 'drop-path-zoo[data]'"):
        sources(section(tmp_path))


def test_a_row_that_is_no_picture_is_named(tmp_path: Path) -> None:
    broken = [{"bytes": b"no picture", "path": None}, None]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    bad = datasets.Dataset.from_dict({"image": broken, "label": [0, 1]}, features=features)
    root = saved(tmp_path / "data", train=datasets.concatenate_datasets([rows([0, 1]), bad]), val=rows([0, 1]))
    with fails("2 of 6 images cannot be read", f"the first is '{root}/train/2'", "cannot identify image file"):
        check_images(bundle(root))
    with pytest.raises(ValueError, match="row 3 has no image"):
        bundle(root).train.source.open(3)


def _read(source: Source) -> list[bytes]:
    return contents(source)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_any_process_reads_it(method: str, tmp_path: Path) -> None:
    train = sources(section(two(tmp_path / "data"))).train
    assert names(pickle.loads(pickle.dumps(train))) == names(train)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_read, [train, train]) == [contents(train)] * 2


def test_workers_change_nothing(tmp_path: Path) -> None:
    data = bundle(two(tmp_path / "data"))
    alone, helped = (list(train_loader(data, batch_size=4, workers=workers)) for workers in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_pictures_that_datasets_has_encoded(tmp_path: Path) -> None:
    """`datasets` stores a picture that it is given as PNG: the pixels are the same."""
    whole = PillowImage.open(io.BytesIO(picture(1)))
    given = datasets.Dataset.from_dict({"image": [whole, whole], "label": ["a", "b"]})
    source = sources(section(saved(tmp_path / "data", train=given))).train
    found = source.open(1)
    assert not isinstance(found, PillowImage.Image)
    assert PillowImage.open(found).tobytes() == whole.tobytes()


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = saved(tmp_path / "data", train=rows([0, 1] * 12), validation=rows([0, 1] * 3, start=24))
    assert_resumed_equals_uninterrupted([f"data={{dataset: huggingface, root: {root}}}"], tmp_path)
