"""Texts and folders written durably: full disks, failures, leftovers. Kills are tried in the tests of what is saved so."""

import os
import shutil
from pathlib import Path

import pytest

from files.durable import CheckpointError, nearest_beside, publish, save_text, settled, tidy, together, write_durably


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_full_disk_leaves_the_old_text_and_says_so(tmp_path, fill_disk):
    save_text(tmp_path / "a.csv", "old")
    assert fill_disk(lambda: save_text(tmp_path / "a.csv", "new" * 500), tmp_path) > 10
    assert (tmp_path / "a.csv").read_text() == "new" * 500


def test_texts_are_written_as_they_are_and_replaced(tmp_path):
    for text in ("a,b\n1,2\n", "", "\u00e9\r\n \U0001f600"):
        save_text(tmp_path / "a.csv", text)
        assert (tmp_path / "a.csv").read_bytes() == text.encode()
    assert names(tmp_path) == ["a.csv"]


def test_a_text_that_cannot_be_written_leaves_the_old(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    save_text(path, "old")
    with pytest.raises(CheckpointError, match=r"a\.csv was not saved.*untouched: UnicodeEncodeError"):
        save_text(path, "\ud800")
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"untouched: Input/output error$"):

        def broken(descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(os, "fsync", broken)
        save_text(path, "new")
    assert names(tmp_path) == ["a.csv"] and path.read_text() == "old"
    save_text(path, "new")
    assert path.read_text() == "new"


def test_a_text_where_no_file_can_be(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "a.csv", tmp_path / "folder"):
        with pytest.raises(CheckpointError, match=f"{path.name} was not saved"):
            save_text(path, "x")
    assert names(tmp_path) == ["folder"]


def make(folder: Path, mark: str) -> Path:
    folder.mkdir()
    (folder / "mark").write_text(mark)
    return folder


def test_write_durably_syncs_all_of_a_new_file(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    write_durably(tmp_path / "a", lambda file: file.write(b"12345"))
    assert synced == [5]
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "a", lambda file: file.write(b"other"))
    assert (tmp_path / "a").read_bytes() == b"12345"


def test_publish_replaces_a_folder(tmp_path):
    publish(make(tmp_path / ".tmp-a", "1"), tmp_path / "a")
    publish(make(tmp_path / ".tmp-a", "2"), tmp_path / "a")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "mark").read_text() == "2"


def test_a_folder_that_was_set_aside_is_found_and_brought_back(tmp_path):
    old = make(tmp_path / ".old-a", "1")
    make(tmp_path / ".tmp-a", "half")
    assert settled(tmp_path / "a") == old
    tidy(tmp_path, "a")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "mark").read_text() == "1"
    make(old, "0")  # one that was replaced, but not yet removed
    assert settled(tmp_path / "a") == tmp_path / "a"
    tidy(tmp_path, "a")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "mark").read_text() == "1"
    assert settled(tmp_path / "b") == tmp_path / "b"


def test_leftovers_that_cannot_be_removed_are_a_warning(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    make(tmp_path / "a", "1")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match=r"\.old-a: cannot be removed: Permission denied"):
        publish(make(tmp_path / ".tmp-a", "2"), tmp_path / "a")
    assert (tmp_path / "a" / "mark").read_text() == "2"
    for mark in ("3", "4"):  # nor are they in the way of the next ones
        with pytest.warns(UserWarning, match=r"\.old-a: cannot be removed"):
            publish(make(tmp_path / ".tmp-a", mark), tmp_path / "a")
        assert (tmp_path / "a" / "mark").read_text() == mark


def test_a_stage_fails_on_all_ranks_when_it_fails_on_one(tmp_path):
    told: list[bool] = []

    def alone(failed: bool) -> bool:
        told.append(failed)
        return failed

    with together(alone, tmp_path):
        pass
    with pytest.raises(CheckpointError, match=r"was not saved.*ValueError: mine"), together(alone, tmp_path):
        raise ValueError("mine")
    with pytest.raises(CheckpointError, match="another rank failed"), together(lambda failed: True, tmp_path):
        pass
    assert told == [False, True]


def test_what_is_beside_a_path_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert nearest_beside(tmp_path / "weight.pth") == "; did you mean 'weights.pth'?"
    assert nearest_beside(tmp_path / "link") == ", only a link that leads nowhere"
    assert nearest_beside(tmp_path / "no" / "where") == ""
