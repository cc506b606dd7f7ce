"""Data that change under a run: files removed, replaced, looped; workers that die."""

import time
from pathlib import Path

import pytest

from tests.faults.parts import TINY, Zygote, at_step, same_result, steps, summary, write_images

pytestmark = pytest.mark.slow

SHORT = [*TINY, "optim.epochs=3", "checkpoint.every_epochs=null"]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    return write_images(tmp_path / "images")


CHANGES = {
    "removed": "{path}.unlink()",
    "emptied": "{path}.write_bytes(b'')",
    "garbage": "{path}.write_bytes(os.urandom(500))",
    "cut": "os.truncate({path}, 40)",
    "a folder": "({path}.unlink(), {path}.mkdir())",
    "a loop": "({path}.unlink(), {path}.symlink_to({path}))",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_in_mid_run(change: str, images: list[str], zygote: Zygote, tmp_path: Path) -> None:
    """Named in one line; the run is saved before it, and mended it ends as a run without the fault."""
    path = tmp_path / "images" / "train" / "cat" / "3.png"
    good = path.read_bytes()
    zygote.run(*SHORT, *images, "--output", tmp_path / "whole", cwd=tmp_path).fine()
    hook = at_step(2, CHANGES[change].replace("{path}", f"Path({str(path)!r})"))
    done = zygote.run(*SHORT, *images, "--output", tmp_path / "run", cwd=tmp_path, hook=hook)
    done.failed(1, f"cannot read image '{path}': ", "the run is saved at step ")
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(good)
    zygote.run("--resume", tmp_path / "run", cwd=tmp_path).fine()
    same_result(tmp_path / "run", tmp_path / "whole")


def test_a_file_that_is_removed_is_skipped_where_asked(images: list[str], zygote: Zygote, tmp_path: Path) -> None:
    path = tmp_path / "images" / "train" / "cat" / "3.png"
    hook = at_step(2, f"Path({str(path)!r}).unlink()")
    zygote.run(*SHORT, *images, "data.on_error=skip", "--output", tmp_path / "run", cwd=tmp_path, hook=hook).fine()
    assert "train,train/cat/3.png," in (tmp_path / "run" / "skipped.csv").read_text()
    assert summary(tmp_path / "run")["skipped_images"] == {"train": 1, "val": 0}


def test_a_folder_of_data_that_is_removed(images: list[str], zygote: Zygote, tmp_path: Path) -> None:
    """All of it, with skipping asked for: the ceiling, or nothing left to replace with, ends the run in words."""
    hook = at_step(1, f"shutil.rmtree({str(tmp_path / 'images')!r})")
    done = zygote.run(*SHORT, *images, "data.on_error=skip", "--output", tmp_path / "run", cwd=tmp_path, hook=hook)
    done.failed(1, "nor can any of 100 images drawn to replace it", "the run is saved at step ")


def test_a_folder_that_contains_itself(images: list[str], zygote: Zygote, tmp_path: Path) -> None:
    """A loop of links among the data ends neither the run nor the search."""
    (tmp_path / "images" / "train" / "cat" / "again").symlink_to(tmp_path / "images" / "train" / "cat")
    (tmp_path / "images" / "train" / "dog" / "itself.png").symlink_to(
        tmp_path / "images" / "train" / "dog" / "itself.png"
    )
    done = zygote.run(*SHORT, *images, "--output", tmp_path / "run", cwd=tmp_path)
    assert done.code in (0, 2), done.err
    done.check()
    if done.code == 2:
        done.failed(2, "itself.png")
    (tmp_path / "images" / "train" / "dog" / "itself.png").unlink()
    done = zygote.run(*SHORT, *images, "--output", tmp_path / "run2", cwd=tmp_path).fine()
    assert "images, 2 classes" in done.out


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed(workers: int, images: list[str], zygote: Zygote, tmp_path: Path) -> None:
    """Named, with what may help; the run is saved at the step before, also where torch noticed it in mid-step."""
    zygote.run(*SHORT, *images, "--output", tmp_path / "whole", cwd=tmp_path).fine()
    kill = (
        "\n        import multiprocessing, time"
        "\n        for child in multiprocessing.active_children(): os.kill(child.pid, signal.SIGKILL)"
        "\n        time.sleep(0.3)"
    )
    settings = [*SHORT, *images, f"data.workers={workers}"]
    done = zygote.run(*settings, "--output", tmp_path / "run", cwd=tmp_path, hook=at_step(4, kill))
    done.failed(1, "DataLoader worker", "data.workers", "the run is saved at step ")
    assert steps(tmp_path / "run") and steps(tmp_path / "run")[0] >= 5
    zygote.run("--resume", tmp_path / "run", cwd=tmp_path).fine()
    same_result(tmp_path / "run", tmp_path / "whole")


def test_an_image_that_kills_its_worker(images: list[str], zygote: Zygote, tmp_path: Path) -> None:
    """As a decoder with a fault in its C code would, each time."""
    hook = """
import os
from training.data import images
real = images.read_pixels
parent = os.getpid()
def read(raw, *rest, **others):
    if os.getpid() != parent and raw.name.endswith("cat/3.png") and "train" in raw.name:
        os.kill(os.getpid(), 11)
    return real(raw, *rest, **others)
images.read_pixels = read
"""
    settings = [*SHORT, *images, "data.workers=1"]
    done = zygote.run(*settings, "--output", tmp_path / "run", cwd=tmp_path, hook=hook)
    done.failed(1, "DataLoader worker")


def test_no_child_is_left(images: list[str], zygote: Zygote, tmp_path: Path) -> None:
    """After a run that ended, one that failed and one that was killed."""
    settings = [*SHORT, *images, "data.workers=2"]
    for hook in ("", at_step(4, "raise ValueError('ours')"), at_step(4, "os.kill(os.getpid(), 9)")):
        run = zygote.start(*settings, "--output", tmp_path / f"run{len(hook)}", cwd=tmp_path, hook=hook)
        run.wait()
        deadline = time.monotonic() + 20  # a worker looks for its parent every few seconds
        while run.orphans() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not run.orphans()
