"""files/durable.py: what is written is whole or not there."""

import os
import shutil
from pathlib import Path

import pytest

from files.durable import CheckpointError, publish, save_text, together, write_durably
from tests.models.parts import make, names


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


def test_leftovers_that_cannot_be_removed_are_a_warning(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    make(tmp_path / "a", "1")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match=r"\.old-a: cannot be removed: Permission denied"):
        publish(make(tmp_path / ".tmp-a", "2"), tmp_path / "a")
    assert (tmp_path / "a" / "mark").read_text() == "2"


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
