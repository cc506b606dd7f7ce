"""Samples that cannot be read in mid-run: named, replaced, listed, counted."""

import csv
import os
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.data.parts import (
    damage,
    data_section,
    digits,
    folder,
    loaders,
    paths,
    skipping,
    train_loader,
)
from training.data import skipping as skipping_module
from training.data.dataset import ReadError, Unreadable
from training.data.skipping import PartialBatch, SkipList, lost_worker


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_that_breaks_during_training_is_named(part: str, workers: int, image_root: Path) -> None:
    bundle = folder(image_root)
    path = damage(getattr(bundle, part), 4)
    with pytest.raises(ReadError) as caught:
        list(SkipList(data_section()).read(loaders(bundle, workers=workers)[part]))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"cannot read image '{path}': ") and lines[1].endswith("data.on_error=skip")
    assert len(lines) == 2
    traceback.clear_frames(caught.tb)  # they hold the loader in a cycle, from which its worker takes 5 s to stop


def test_a_worker_that_dies_is_told_in_words() -> None:
    loader = train_loader(digits(), batch_size=16, workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError) as caught:  # torch's signal handler may raise it anywhere from here on
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        list(batches)
    told = lost_worker(caught.value)
    assert told is not None and told.startswith("DataLoader worker (pid") and len(told.splitlines()) == 2
    assert "data.workers" in told and "--resume" in told
    assert lost_worker(RuntimeError("another error")) is None


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "no socket")])
def test_a_worker_that_dies_in_the_middle_of_a_batch_is_told_in_words(error: Exception) -> None:
    def loader() -> Iterator[list[int]]:
        yield [1]
        raise error  # as when a tensor's shared memory is asked of a process that is gone

    batches = SkipList(data_section()).read(loader())
    assert next(batches) == [1]
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    told = lost_worker(caught.value)
    assert told is not None and type(error).__name__ in told and "--resume" in told and len(told.splitlines()) == 2


@pytest.mark.parametrize("part", ["train", "val"])
def test_what_is_skipped_does_not_depend_on_workers(part: str, image_root: Path, tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        bundle, skips = skipping(image_root)
        damage(getattr(bundle, part), 1, 4)
        skips.path = tmp_path / f"skipped-{workers}.csv"
        loader = loaders(bundle, workers=workers)[part]
        found.append(([part for batch in skips.read(loader) for part in batch], skips.path.read_text()))
    assert found[0][1] == found[1][1] and found[0][1].count("\n") == 3
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


def test_validation_leaves_out_what_it_cannot_read(image_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, skips = skipping(image_root)
    whole = {
        int(i): image for images, _, indices in loaders(bundle)["val"] for image, i in zip(images, indices, strict=True)
    }
    damage(bundle.val, 2, 5)  # 5 is alone in the last batch
    batches = list(skips.read(loaders(bundle)["val"]))
    assert [batch[2].tolist() for batch in batches] == [[0, 1, 3, 4]]
    assert all(torch.equal(image, whole[i]) for image, i in zip(batches[0][0], [0, 1, 3, 4], strict=True))
    assert (skips.count("train"), skips.count("val")) == (0, 2)
    assert capsys.readouterr().err.count("left out of validation") == 2


def test_the_list_of_a_run_counts_a_file_once(image_root: Path, tmp_path: Path) -> None:
    bundle, skips = skipping(image_root)
    damage(bundle.train, 7)
    damage(bundle.val, 0)
    other, later = skipping(image_root)[1], skipping(image_root)[1]
    for number, skip_list in enumerate((skips, other, later)):  # two processes, and one after a resume
        skip_list.path = tmp_path / "skipped.csv"
        for _ in range(2):
            for loader in loaders(bundle, batch_size=15).values():
                list(skip_list.read(loader))
        assert (skip_list.count("train"), skip_list.count("val")) == (1, 1), number
    with (tmp_path / "skipped.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["part", "name", "reason"]
    names = [os.path.relpath(paths(s)[i], image_root) for s, i in ((bundle.train, 7), (bundle.val, 0))]
    assert [row[:2] for row in rows[1:]] == [["train", names[0]], ["val", names[1]]]
    assert all(row[2] for row in rows[1:])


@pytest.mark.parametrize("name", ["a\rb.png", "a\nb\r\nc.png", "\x1b[31m.png", "a  b.png", 'q"uo,te.png', "ends:.png"])
def test_any_name_is_listed_once_and_told_on_one_line(
    name: str, image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(paths(skipping(image_root)[0].val)[0])
    path = before.rename(before.with_name(name))
    bundle, skips = skipping(image_root)
    wanted = "val" if str(path) in paths(bundle.val) else "train"
    path.unlink()
    for skip_list in (skips, skipping(image_root)[1]):  # and after a resume
        skip_list.path = tmp_path / "skipped.csv"
        list(skip_list.read(loaders(bundle)[wanted]))
        assert skip_list.count(wanted) == 1
    with (tmp_path / "skipped.csv").open(newline="") as file:
        _, (part, listed, reason) = csv.reader(file)
    assert (part, listed) == (wanted, os.path.relpath(path, image_root))
    assert reason == "[Errno 2] No such file or directory"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.isprintable() and "No such file or directory; " in line for line in said)


def test_the_ceiling_is_of_the_whole_run(image_root: Path, tmp_path: Path) -> None:
    bundle, skips = skipping(image_root, max_skipped=2)
    damage(bundle.train, 1, 2)
    skips.path = tmp_path / "skipped.csv"
    list(skips.read(loaders(bundle)["train"]))
    damage(bundle.val, 3)
    again = skipping(image_root, max_skipped=2)[1]
    again.path = skips.path
    with pytest.raises(
        ReadError, match=r"has skipped 3 images, data.max_skipped is 2; .*skipped.csv lists them"
    ) as caught:
        list(again.read(loaders(bundle)["val"]))
    assert paths(bundle.val)[3] in str(caught.value) and len(str(caught.value).splitlines()) == 2
    assert "val/" in skips.path.read_text(), "the list names that one as well"


def test_nothing_left_to_replace_with(image_root: Path) -> None:
    bundle, skips = skipping(image_root)
    damage(bundle.train, *range(15))
    with pytest.raises(ReadError, match="nor can any of 100 images drawn to replace it"):
        list(skips.read(loaders(bundle)["train"]))


def test_a_batch_of_nothing() -> None:
    lost = [Unreadable("val", "a.png", "empty"), Unreadable("val", "b.png", "empty")]
    assert skipping_module.collate(lost) == PartialBatch(None, lost)
