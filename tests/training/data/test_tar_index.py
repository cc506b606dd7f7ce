"""The index of a shard: the same samples as WebDataset's own reader finds, made again when it must be, damage named."""

import gzip
import logging
import multiprocessing
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from files.errors import ConfigError
from tests.training.data.parts import fails
from tests.training.data.sharded import picture, samples, write_shard
from training.data import tar_index
from training.data.tar_index import Keys, TarIndex, build_index, index_of

KEYS = Keys()
LONG = "a-folder-with-a-long-name/" * 8


def names(index: TarIndex) -> list[str]:
    blob, starts = index.names.tobytes(), [0, *index.ends[:-1]]
    return [blob[a:b].decode("utf-8", "surrogateescape") for a, b in zip(starts, index.ends, strict=True)]


def labels(index: TarIndex) -> list[str | None]:
    return [None if code < 0 else index.texts[code] for code in index.labels]


def index_file(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.npz")


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_are_those_that_webdataset_reads(kind: int, tmp_path: Path) -> None:
    odd = [("__meta__/about.json", b"{}"), ("._00000.png", b"of a Mac"), ("README", b"no key"),
           ("v1.0/00009.png", picture(9)), ("v1.0/00009.cls", b" 2\n"), ("ümlaut.PNG", picture(10)),
           ("ümlaut.cls", b"1"), ("x.left.note", b"text"), ("x.png", picture(11)), ("x.cls", b"1")]  # fmt: skip
    if kind != tarfile.USTAR_FORMAT:  # which has no names that long
        odd += [(f"{LONG}1.jpg", picture(12, kind="JPEG")), (f"{LONG}1.cls", b"0")]
    shard = write_shard(tmp_path / "a.tar", [*samples([0, 1, 2]), *odd], kind=kind)
    index = build_index(shard, KEYS)
    with open(shard, "rb") as file:
        members = [{**member, "__url__": "a"} for member in tar_file_iterator(file)]  # type: ignore[arg-type]
    theirs = list(group_by_keys(members))
    assert [name.rpartition(".")[0] for name in names(index)] == [sample["__key__"] for sample in theirs]
    assert labels(index) == [sample["cls"].decode().strip() for sample in theirs]
    data = shard.read_bytes()
    for sample, offset, size in zip(theirs, index.offsets, index.sizes, strict=True):
        assert data[offset : offset + size] == (sample.get("png") or sample["jpg"])
    assert index.left_out == {"members without a key": 3} and not index.unlabelled


def test_labels_of_json(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", samples(["cat", 7], json_key="label"))
    assert labels(build_index(shard, KEYS)) == ["cat", "7"]
    shard = write_shard(tmp_path / "b.tar", samples([3], json_key="class"))
    assert labels(build_index(shard, Keys(label="class"))) == ["3"]
    index = build_index(shard, KEYS)
    assert labels(index) == [None] and "'00000' has no 'label' (its keys: 'class', 'width'" in index.unlabelled
    both = [*samples([1]), ("00000.json", b'{"label": 2}')]
    assert labels(build_index(write_shard(tmp_path / "c.tar", both), KEYS)) == ["1"], ".cls comes first"
    assert labels(build_index(tmp_path / "c.tar", Keys(label="label"))) == ["2"], "but for a key that is asked for"


def test_one_of_several_images(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [("1.jpg", b"one"), ("1.depth.png", b"two"), ("1.cls", b"0")])
    with fails(f"shard '{shard}': sample '1' has several images", ".depth.png", "data.image_key=jpg"):
        build_index(shard, KEYS)
    assert names(build_index(shard, Keys(image="depth.png"))) == ["1.depth.png"]
    with fails("'1' has no .jpeg (data.image_key)", "did you mean 'jpg'?"):
        build_index(shard, Keys(image="jpeg"))


IMAGE = picture(0)
BAD_SAMPLES: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no samples": ([], "has no samples (it is empty)"),
    "nothing with a key": ([("README", b"x")], "has no samples (1 members without a key)"),
    "no image": ([("7.cls", b"1"), ("7.txt", b"1")], "sample '7' has no image\nits members: .cls, .txt"),
    "a key twice": ([*samples([0, 1]), *samples([0])], "sample '00000' is there twice"),
    "a member twice": ([("7.png", IMAGE), ("7.PNG", IMAGE)], "sample '7' has two members .png"),
    "an empty label": ([("7.png", IMAGE), ("7.cls", b"\n")], "sample '7' has an empty .cls"),
    "json cut": ([("7.png", IMAGE), ("7.json", b'{"label"')], "sample '7' has a .json that cannot be read"),
    "json of another kind": ([("7.png", IMAGE), ("7.json", b"[1]")], "'7' has a .json that is list, not an object"),
    "a label too large": ([("7.png", IMAGE), ("7.json", b" " * 2**20 + b"{}")], "'7' has a .json of 1,048,578 bytes"),
    "a broken label": (samples([1.5], json_key="label"), "sample '00000' has label: 1.5 in its .json"),
    "a label that is a list": (samples([[1]], json_key="label"), "sample '00000' has label: [1] in its .json"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples_are_named(name: str, tmp_path: Path) -> None:
    members, message = BAD_SAMPLES[name]
    shard = write_shard(tmp_path / "a.tar", members)
    with pytest.raises(ConfigError) as caught:
        index_of(shard, KEYS)
    text = str(caught.value)
    assert message in text and text.startswith(f"shard '{shard}'") and text.count("shard '") == 1, text
    assert len(text.splitlines()) <= 3 and list(tmp_path.iterdir()) == [shard], "no index of a bad shard"


def _flip(data: bytes) -> bytes:
    at = data.index(b"00001.cls")
    return data[:at] + b"X" + data[at + 1 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a member cut": (lambda data: data[: data.index(b"00001.png") + 600], "is cut short, in its member '00001.png'"),
    "padding cut": (
        lambda data: data[: data.index(b"00001.cls") + 520],
        "is cut short, at the end of its member '00001.cls'",
    ),
    "cut between members": (lambda data: data[: data.index(b"00001.png")], "is cut short: it has no end mark at byte"),
    "cut in a header": (lambda data: data[: data.index(b"00001.png") + 100], "is cut short: it has no end mark"),
    "a header damaged": (_flip, "is damaged: at byte"),
    "the first header damaged": (lambda data: b"X" + data[1:], "is no tar file"),
    "no tar file": (lambda data: IMAGE * 9, "is no tar file"),
    "empty": (lambda data: b"", "is no tar file: empty file"),
    "compressed": (gzip.compress, "is compressed: its members cannot be read by their place"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    harm, message = DAMAGE[name]
    shard = write_shard(tmp_path / "a.tar", samples([0, 1, 2]))
    assert len(index_of(shard, KEYS).offsets) == 3
    shard.write_bytes(harm(shard.read_bytes()))
    with pytest.raises(ConfigError) as caught:
        index_of(shard, KEYS)
    assert str(caught.value).startswith(f"shard '{shard}' {message}") and len(str(caught.value).splitlines()) <= 3


def test_an_index_is_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(tmp_path / "a.tar", samples([0, 1, 2]))
    made = index_of(shard, KEYS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.index.npz"]
    with monkeypatch.context() as patch:
        patch.delattr(tar_index, "build_index")
        kept = index_of(shard, KEYS)
    for ours, theirs in zip(made, kept, strict=True):
        assert type(ours) is type(theirs) and np.all(ours == theirs)  # type: ignore[call-overload]
    assert labels(index_of(shard, Keys(label="label"))) == [None] * 3, "other keys need another index"


@pytest.mark.parametrize("change", ["longer", "as long and newer"])
def test_a_stale_index_is_made_again(change: str, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", samples([0, 1]))
    index_of(shard, KEYS)
    before = os.stat(shard)
    write_shard(shard, samples([1, 0] if change != "longer" else [1, 0, 2, 3, 4, 5, 6, 7]))
    assert (shard.stat().st_size == before.st_size) == (change != "longer")
    os.utime(shard, ns=(0, before.st_mtime_ns + (change != "longer")))
    assert labels(index_of(shard, KEYS))[:2] == ["1", "0"]


@pytest.mark.parametrize("harm", ["cut", "flipped", "text", "empty"])
def test_a_damaged_index_is_made_again_and_said(harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write_shard(tmp_path / "a.tar", samples([0, 1, 2]))
    index_of(shard, KEYS)
    whole = index_file(shard).read_bytes()
    at = whole.index(b"00001.png")
    flipped = whole[:at] + b"9" + whole[at + 1 :]
    index_file(shard).write_bytes({"cut": whole[:200], "flipped": flipped, "text": b"text", "empty": b""}[harm])
    with caplog.at_level(logging.WARNING):
        assert names(index_of(shard, KEYS))[1] == "00001.png"
    assert f"'{index_file(shard)}' is damaged" in caplog.text and "made again" in caplog.text
    assert len(index_file(shard).read_bytes()) == len(whole)


def test_where_the_folder_cannot_be_written_the_cache_has_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_shard(tmp_path / "data" / "a.tar", samples([0, 1, 2]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save, refused = tar_index.save, {shard.parent}

    def read_only(path: Path, write: Callable) -> None:
        if path.parent in refused:
            raise PermissionError(13, "Permission denied")
        save(path, write)

    monkeypatch.setattr(tar_index, "save", read_only)
    made = index_of(shard, KEYS)
    (kept,) = (tmp_path / "cache" / "drop-path-zoo" / "indexes").iterdir()
    assert kept.name.endswith("-a.tar.index.npz") and list(shard.parent.iterdir()) == [shard]
    refused.add(kept.parent)
    with monkeypatch.context() as patch:
        patch.delattr(tar_index, "build_index")
        assert names(index_of(shard, KEYS)) == names(made)
    kept.unlink()
    assert names(index_of(shard, KEYS)) == names(made) and "cannot be kept" in caplog.text


def test_several_processes_at_once(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", samples(list(range(40))))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(index_of, [(shard, KEYS)] * 8)
    assert {tuple(names(index)) for index in found} == {tuple(names(build_index(shard, KEYS)))}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.index.npz"]


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    with fails(f"shard '{tmp_path / 'a.tar'}' cannot be read: No such file"):
        index_of(tmp_path / "a.tar", KEYS)
