"""What tests share: kills at any operation and disks that fill up, for files written durably; counts of compilations."""

import os

from training.threads import wait_passively

# Before torch loads, for this process and for those that tests start: one thread, because rounding depends on the number
# of threads; and where a test asks for several, they sleep while they wait, so that tests are not starved beside others.
os.environ["OMP_NUM_THREADS"] = "1"
wait_passively()

import errno
import importlib
import importlib.util
import io
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

with pytest.MonkeyPatch.context() as patched:
    # Without a GPU its kernels are tested in Triton's interpreter. Triton decides that when it reads a function, its own
    # library's included, and timm loads that: so here, before timm.
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        patched.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")

from layers.fast import set_fast_paths
from tests.browser import NAMES, Browser, find_chromium

TESTS = Path(__file__).parent
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A run sets the number of threads of its process, and its fast paths; the next test has one again, and all of them."""
    yield
    torch.set_num_threads(1)
    set_fast_paths(True)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A script sets up logging for its process; the next test, in whatever order, has Python's defaults again."""
    logging.getLogger().setLevel(logging.WARNING)  # also after what a fixture of a whole module has run
    logging.disable(logging.NOTSET)
    yield
    logging.getLogger().setLevel(logging.WARNING)
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; `browser.problems(page)` says what is wrong with a page."""
    path = find_chromium()
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is there")
    opened = Browser(path, tmp_path_factory.mktemp("browser"))
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def kill_anywhere(request, tmp_path) -> Callable[[str], list[str]]:
    """Runs kill_script.py on the `Killed` of the test's file; returns the names of the scenarios that passed."""

    def kill(lose: str) -> list[str]:
        if not hasattr(os, "fork"):
            pytest.skip("needs fork")
        if lose == "lose" and not os.path.exists("/proc/self/fd"):
            pytest.skip("needs /proc to know what was fsynced")
        # -P: the folders beside the script have the names of our packages.
        command = [
            sys.executable,
            "-P",
            str(TESTS / "kill_script.py"),
            str(request.path),
            lose,
            str(tmp_path.resolve()),
        ]
        environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.split()[0] for line in done.stdout.splitlines()]

    return kill


class FullDisk(io.FileIO):
    """A file on a disk with room for `room` more bytes."""

    room = 0

    def write(self, data, /) -> int:
        if len(data) > FullDisk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= len(data)
        return super().write(data) or 0


@pytest.fixture
def fill_disk(monkeypatch) -> Callable[[Callable[[], object], Path], int]:
    """Repeats a save with ever more room until it succeeds, checking each failure; returns how often it failed."""
    from files import durable

    def content(folder: Path) -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}

    def fake_open(path, mode):
        return io.BufferedWriter(FullDisk(path, mode), buffer_size=64) if mode == "xb" else open(path, mode)

    def fill(save: Callable[[], object], folder: Path) -> int:
        before = content(folder)
        monkeypatch.setattr(durable, "open", fake_open, raising=False)
        for failures in range(1000):
            FullDisk.room = failures * 97
            try:
                save()
            except durable.CheckpointError as error:
                assert "No space left on device" in str(error) and "untouched" in str(error)
                assert content(folder) == before
            else:
                return failures
        raise AssertionError("the disk never had room enough")

    return fill


@pytest.fixture
def compilations() -> Iterator[Callable[[], tuple[int, int]]]:
    """Counts the graphs that torch.compile made so far, and the graph breaks.

    With what the training run sets for torch.compile: the number of kept samples stays a number in the graph.
    """
    counters = torch._dynamo.utils.counters
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch._dynamo.reset()
        counters.clear()
        yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
        torch._dynamo.reset()
