"""What was given is not written over, whatever it is called."""

import os
from pathlib import Path

import pytest

from files.errors import ConfigError
from files.outputs import is_same, refuse_overwriting


@pytest.mark.parametrize("name", ["a", "sub/../a", "link", "hard"])
def test_by_whatever_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for other in ("a", "b"):
        (tmp_path / other).write_text(other)
    (tmp_path / "link").symlink_to("a")
    os.link(tmp_path / "a", tmp_path / "hard")
    kept = [(tmp_path / "gone", "is gone"), (tmp_path / "a", "is what was given")]
    with pytest.raises(ConfigError, match=r"^--output x: is what was given; name another place$"):
        refuse_overwriting("--output x", tmp_path / name, kept)
    refuse_overwriting("--output b", tmp_path / "b", kept)
    refuse_overwriting("--output new", tmp_path / "new", [*kept, (tmp_path / "new", "is not there")])
    assert is_same(tmp_path / name, tmp_path / "a") and not is_same(tmp_path / name, tmp_path / "b")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new")
    assert is_same(tmp_path / "link", tmp_path / "." / "new") and not is_same(tmp_path / "link", tmp_path / "other")
    refuse_overwriting("--output", tmp_path / ("n" * 300), [(tmp_path, "is a folder")])
