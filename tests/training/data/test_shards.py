"""WebDataset shards as a kind of data: which shards, which classes, the same samples by index anywhere, mistakes."""

import json
import multiprocessing
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.training.data.parts import (
    COLOUR,
    EVERYTHING,
    augment_section,
    fails,
    folder,
    train_loader,
)
from tests.training.data.resumed import assert_resumed_equals_uninterrupted
from tests.training.data.sharded import picture, samples, section, write_shard, write_shards
from training.data import cache, shards
from training.data.build import build_datasets
from training.data.dataset import DataBundle
from training.data.images import check_images
from training.data.shards import class_names, find_shards, sources
from training.data.skipping import SkipList
from training.data.source import Source


def bundle(root: Path | None = None, **values: object) -> DataBundle:
    return build_datasets(section(root, **values), augment_section(**EVERYTHING), COLOUR, seed=0)


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def contents(source: Source) -> list[bytes]:
    found = []
    for i in range(len(source)):
        raw = source.open(i)
        assert not isinstance(raw, Image.Image)
        with raw:
            found.append(raw.read())
    return found


def test_samples_are_read_by_their_place(tmp_path: Path) -> None:
    train, val, left_out, test = sources(section(write_shards(tmp_path)))
    assert val is not None and test is None and left_out == ""
    assert names(train) == [f"{i // 6:03d}.tar/{i:05d}.png" for i in range(12)]
    assert names(val) == [f"000.tar/{i:05d}.png" for i in range(12, 18)]
    assert contents(train) == [picture(i) for i in range(12)] and contents(val) == [picture(i) for i in range(12, 18)]
    assert train.targets == [0, 1, 2] * 4 and train.class_names == val.class_names == ["0", "1", "2"]
    assert train.location == str(tmp_path / "train")


def test_images_are_those_of_a_folder_with_the_same_files(tmp_path: Path) -> None:
    """Decoding, augmentation and order are none of this kind's business."""
    root = write_shards(tmp_path / "shards", ["cat", "dog"])
    ours = bundle(root)
    for part in (ours.train, ours.val):
        for i in range(len(part)):
            name = part.source.class_names[part.targets[i]]
            where = tmp_path / "files" / ("train" if part is ours.train else "val") / name / f"{i:05d}.png"
            where.parent.mkdir(parents=True, exist_ok=True)
            where.write_bytes(contents(part.source)[i])
    theirs = folder(tmp_path / "files", **EVERYTHING)
    assert ours.class_names == theirs.class_names == ["cat", "dog"]
    for i in range(6):
        assert torch.equal(ours.val[2 * (i % 3) + i // 3][0], theirs.val[i][0])
    check_images(ours)


LAYOUTS = {
    "folders": ("train/0.tar", "val/0.tar", "test/0.tar"),
    "capitals": ("Train/0.tar", "Valid/0.tar", "TEST/0.tar"),
    "names": ("train-000.tar", "val-000.tar", "test-000.tar"),
    "timm's names": ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar", "imagenet1k-test-00.tar"),
    "one each": ("train.tar", "validation.tar", "test.tar"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_are_known_by_their_names(name: str, tmp_path: Path) -> None:
    for number, place in enumerate(LAYOUTS[name]):
        write_shard(tmp_path / place, samples([0, 1], seed=10 * number))
    write_shard(tmp_path / "extra.tar", samples([0, 1]))
    train, val, left_out, test = sources(section(tmp_path))
    assert val is not None and test is not None and left_out == "1 other shards"
    assert [part.name(0).partition("/")[2] for part in (train, val, test)] == ["00000.png", "00010.png", "00020.png"]


def test_a_test_part_without_labels_is_left_out(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_shard(tmp_path / "test" / "0.tar", [("1.png", picture(1))])
    found = sources(section(tmp_path))
    assert found.test is None and "the test shards (sample '1' has no .cls and no .json" in found.left_out


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, train=3)
    every = {"train_shards": "train/{000..002}.tar", "val_shards": "val/*.tar"}
    expected = names(sources(section(tmp_path)).train)
    absolute = {key: f"{tmp_path}/{value}" for key, value in every.items()}
    urls = {key: f"file://{tmp_path}/{value}" for key, value in every.items()}
    twice = {**every, "train_shards": "train/00[01].tar::train/002.tar"}
    for root, values in ((tmp_path, every), (None, absolute), (None, urls), (tmp_path, twice)):
        found = sources(section(root, **values))
        assert names(found.train) == expected and found.val is not None and len(found.val) == 6
    monkeypatch.chdir(tmp_path)
    for root in ("", "./", "../" + tmp_path.name + "//"):
        found = sources(section(Path(root) if root else None, **every))
        assert names(found.train) == expected, "however the place is written"
    assert sources(section(tmp_path, train_shards="train/*.tar")).val is None


def test_the_identity_is_the_same_where_the_shards_move(tmp_path: Path) -> None:
    before = bundle(write_shards(tmp_path / "here")).identity
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert bundle(tmp_path / "there").identity == before
    os.remove(tmp_path / "there" / "train" / "001.tar")
    assert bundle(tmp_path / "there").identity != before


@pytest.mark.parametrize(
    ("labels", "expected", "targets"),
    [
        ([3, 10, 7], ["3", "7", "10"], [0, 2, 1]),
        (["tulip", "aster", "daisy"], ["aster", "daisy", "tulip"], [2, 0, 1]),
        (["1", "one", "2"], ["1", "2", "one"], [0, 2, 1]),
        (["007", "1", "7"], ["1", "7"], [1, 0, 1]),
    ],
)
def test_classes_of_the_labels(labels: list[object], expected: list[str], targets: list[int], tmp_path: Path) -> None:
    data = section(write_shards(tmp_path, labels))
    assert sources(data).train.class_names == class_names(data) == expected
    assert sources(data).train.targets == targets * 4


LISTS = {
    "classes.txt": "cat\ndog\n\nowl\n",
    "classnames.txt": "\ufeffcat\ndog\nowl",
    "dataset_info.json": json.dumps({"features": {"image": {}, "cls": {"names": ["cat", "dog", "owl"]}}}),
    "_info.json": json.dumps({"class_names": ["cat", "dog", "owl"], "splits": {}}),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("labels", [[2, 0], ["owl", "cat"]])
def test_classes_of_a_list(name: str, labels: list[object], tmp_path: Path) -> None:
    data = section(write_shards(tmp_path, labels))
    (tmp_path / name).write_text(LISTS[name])
    assert sources(data).train.class_names == class_names(data) == ["cat", "dog", "owl"]
    assert sources(data).train.targets == [2, 0] * 6


def _unlabelled(root: Path) -> None:
    write_shard(root / "train" / "001.tar", [("a.png", picture(0)), ("a.txt", b"1")])


def _unknown(root: Path) -> None:
    (root / "classes.txt").write_text("a\nb")


def _unknown_in_val(root: Path) -> None:
    write_shard(root / "val" / "000.tar", samples([0, 5]))


def _negative(root: Path) -> None:
    write_shard(root / "train" / "001.tar", samples([0, -1]))


def _one_class(root: Path) -> None:
    write_shards(root, [4])


def _compressed(root: Path) -> None:
    (root / "train" / "002.tar.gz").write_bytes(b"")


def _listed_twice(root: Path) -> None:
    (root / "classes.txt").write_text("a\nb\na")


def _bad_list(root: Path) -> None:
    (root / "dataset_info.json").write_text("{")


def _empty_file(root: Path) -> None:
    (root / "train" / "001.tar").write_bytes(b"")


def _no_train(root: Path) -> None:
    shutil.rmtree(root / "train")


def _no_root(root: Path) -> None:
    shutil.rmtree(root)


MISTAKES: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "no label": (_unlabelled, {}, "001.tar': sample 'a' has no .cls and no .json (its members: .png, .txt)"),
    "no such key": (bool, {"label_key": "klass"}, "sample '00000' has no .json (its members: .png, .cls)"),
    "outside the list": (_unknown, {}, "the label of '00002.png' is '2', which is no class\n2 classes: a, b"),
    "unknown in val": (_unknown_in_val, {}, "val/000.tar': the label of '00001.png' is '5', which is no class"),
    "negative": (_negative, {}, "001.tar': the label of '00001.png' is '-1', which is no class"),
    "one class": (_one_class, {}, "the training shards have one class, '4'"),
    "compressed": (_compressed, {}, "002.tar.gz' is compressed"),
    "listed twice": (_listed_twice, {}, "lists the class 'a' twice"),
    "list damaged": (_bad_list, {}, "dataset_info.json', the list of classes, cannot be read"),
    "a shard damaged": (_empty_file, {}, "001.tar' is no tar file"),
    "no training shards": (_no_train, {}, "has no training shards (there: val)"),
    "no root": (_no_root, {}, "does not exist"),
    "val alone": (bool, {"val_shards": "val/*"}, "data.val_shards: needs data.train_shards"),
    "no match": (bool, {"train_shards": "trian/*.tar"}, "matches nothing (no folder"),
    "no match here": (bool, {"train_shards": "train/a*.tar"}, "matches nothing (there: 000.tar, 001.tar)"),
    "missing": (bool, {"train_shards": "train/{000..003}.tar"}, "002.tar' does not exist; did you mean '001.tar'? (2 of 4"),
    "braces": (bool, {"train_shards": "train/{000..001.tar"}, "the braces of 'train/{000..001.tar' do not match"),
    "far too many": (bool, {"train_shards": "{0..9999999}.tar"}, "names more than 1,000,000 shards"),
    "in both parts": (bool, {"train_shards": "*/000.tar", "val_shards": "val/*.tar"}, "is in train and in val"),
    "twice": (bool, {"train_shards": "train/*.tar::train/000.tar"}, "000.tar' is twice in train"),
    "a command": (bool, {"train_shards": "pipe:curl host/a.tar"}, "is read neither from here nor as a stream"),
    "a bucket": (bool, {"train_shards": "s3://bucket/{0..9}.tar"}, "fetch the shards with that service's own tool"),
    "a URL to list": (bool, {"root": "https://host/data"}, "'https://host/data' cannot be listed"),
    "a URL of no file": (bool, {"train_shards": "https://host/"}, "'https://host/' names no file"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, tmp_path: Path) -> None:
    harm, values, message = MISTAKES[name]
    root = write_shards(tmp_path / "data")
    harm(root)
    with fails(message):
        sources(section(**{"root": root, **values}))  # type: ignore[arg-type]


def test_a_place_is_needed() -> None:
    with fails("data.root: dataset 'webdataset' needs a root, or data.train_shards"):
        sources(section())


@pytest.mark.parametrize("change", ["longer", "newer", "gone"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_shard_that_changes_in_mid_run(change: str, on_error: str, tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data", train=3)
    data = bundle(root, on_error=on_error)
    shard = root / "train" / "001.tar"
    if change == "gone":
        shard.unlink()
    elif change == "longer":
        write_shard(shard, samples([0] * 9))
    else:
        os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    skips = SkipList(section(root, on_error=on_error))
    skips.path = tmp_path / "skipped.csv"
    loader = train_loader(data, batch_size=6, workers=2)
    reason = "No such file" if change == "gone" else "has changed since the run began"
    if on_error == "stop":
        with pytest.raises(Exception, match=f"cannot read image '{shard}/0000[0-9]+.png': .*{reason}"):
            list(skips.read(loader))
    else:
        assert [len(batch[0]) for batch in skips.read(loader)] == [6, 6, 6]
        assert skips.count("train") == 6 and "train,train/001.tar/00006.png" in skips.path.read_text()


def _open_all(source: Source) -> list[bytes]:
    return contents(source)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_any_process_reads_it(method: str, tmp_path: Path) -> None:
    train = sources(section(write_shards(tmp_path))).train
    assert names(pickle.loads(pickle.dumps(train))) == names(train)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_open_all, [train, train]) == [contents(train)] * 2


def test_no_object_per_sample_is_kept(tmp_path: Path) -> None:
    train = sources(section(write_shards(tmp_path, train=1, per_shard=600))).train
    grown = [name for name, value in vars(train).items() if isinstance(value, list | tuple | dict) and len(value) > 10]
    assert grown == ["targets"], "small whole numbers, which Python has once each"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Shards at a URL."""
    write_shards(tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("with_root", [False, True])
def test_shards_at_a_url(served: str, tmp_path: Path, with_root: bool) -> None:
    base = "" if with_root else f"{served}/"
    values = {"root": served if with_root else None, "train_shards": f"{base}train/{{000..001}}.tar",
              "val_shards": f"{base}val/000.tar", "cache": str(tmp_path / "cache")}  # fmt: skip
    remote, local = bundle(**values), bundle(tmp_path / "served")  # type: ignore[arg-type]
    assert remote.identity == local.identity, "so that a run may go on with local copies"
    assert contents(remote.train.source) == contents(local.train.source)
    assert remote.train.source.location == f"{served}/train"
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.tar")) == ["000.tar", "000.tar", "001.tar"]
    shutil.rmtree(tmp_path / "served")
    assert bundle(**values).identity == remote.identity, "fetched once"  # type: ignore[arg-type]


def test_a_shard_that_is_not_at_its_url(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with fails(f"data.train_shards: '{served}/train/002.tar' cannot be fetched: 404 File not found"):
        sources(section(train_shards=f"{served}/train/{{000..002}}.tar"))
    assert list((cache.cache_folder() / "shards").rglob("001.tar")), "what was fetched stays"


def test_all_parts_are_looked_for_once(tmp_path: Path) -> None:
    found, left_out = find_shards(section(write_shards(tmp_path)))
    assert {part: len(members) for part, members in found.items()} == {"train": 2, "val": 1} and left_out == []
    assert shards.shard_name(found["val"][0].address, str(tmp_path)) == "val/000.tar"


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data", ["cat", "dog"], train=4)
    assert_resumed_equals_uninterrupted([f"data={{dataset: webdataset, root: {root}}}"], tmp_path)
