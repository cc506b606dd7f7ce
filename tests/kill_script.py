"""Runs a save again and again, killing it before its first operation on the disk, before its second, and so on.

Usage: kill_script.py TEST_FILE kill|lose FOLDER. TEST_FILE has a class `Killed` with

    scenarios: dict[str, int]   names, and how many operations at least come before the new state takes over
    prepare(scenario, folder)   makes the folder and the old state in it
    act(scenario, folder)       the save: puts the state 9 in its place
    read(scenario, folder)      the state found (None for none); fails on one that is half written

With `lose`, what had not been fsynced is lost as well, as when the power fails: files are cut in half, folders lose
what was put into them. Prints a line per scenario.
"""

import gc
import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

NEW = 9
REMOVALS = {"os.remove", "os.rmdir", "shutil.rmtree"}
WATCHED = REMOVALS | {"open", "os.mkdir", "os.rename"}


class Killer:
    """Watches the disk operations of this process through audit events and ends it before operation `last`."""

    def __init__(self, work: Path, *, last: int, lose: bool):
        self.work, self.last, self.lose = work, last, lose
        self.count = 0
        self.dying = False
        self.unsynced: list[Path] = []  # files and folders that were made
        self.moved: list[Path] = []  # folders that something was renamed into

    def install(self) -> None:
        os.fsync = self.fsync
        sys.addaudithook(self.hook)

    def operation(self) -> None:
        self.count += 1
        if self.count < self.last:
            return
        self.dying = True
        for lost in self.unsynced if self.lose else ():
            if lost.is_file():
                os.truncate(lost, lost.stat().st_size // 2)
            elif lost.is_dir():
                for entry in lost.iterdir():
                    entry.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, event: str, args: tuple) -> None:
        if event not in WATCHED or self.dying:
            return
        if event in ("os.remove", "os.rmdir") and args[-1] >= 0:  # rmtree names files relative to a descriptor
            self.operation()
            return
        if not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        path = Path(os.fsdecode(args[0]))
        writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wxa"
        if self.work not in path.parents or (event == "open" and not writes):
            return
        if event in REMOVALS:
            assert not (self.lose and self.moved), f"removing {path} before the rename in {self.moved} is durable"
        self.operation()
        if event == "os.mkdir" or writes:
            self.unsynced.append(path)
        if event == "os.rename":
            early = [lost for lost in self.unsynced if lost == path or path in lost.parents]
            assert not (self.lose and early), f"renaming {path} before {early} is durable"
            target = Path(os.fsdecode(args[1]))
            if not target.name.startswith("."):
                self.moved.append(target.parent)

    def fsync(self, descriptor: int) -> None:
        """Stands in for os.fsync and only takes note: the disk itself is not under test."""
        self.operation()
        if os.path.exists("/proc/self/fd"):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            for pending in (self.unsynced, self.moved):
                if path in pending:
                    pending.remove(path)


def run(killed: Any, scenario: str, root: Path, *, lose: bool) -> int:
    """Kills one scenario at its first, second, ... operation; returns the number of operations."""
    base, work = root / scenario, root / "work"
    killed.prepare(scenario, base)
    old = killed.read(scenario, base)
    seen: list[int | None] = []
    while True:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(base, work)
        pid = os.fork()
        if pid == 0:
            try:
                Killer(work, last=len(seen) + 1, lose=lose).install()
                killed.act(scenario, work)
                os._exit(0)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(3)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = killed.read(scenario, work)
        if status == 0:
            assert found == NEW, found
            break
        where = f"{scenario}, operation {len(seen) + 1}"
        assert status == -signal.SIGKILL, (where, status)
        assert found in (old, NEW), (where, found)
        seen.append(found)
        killed.act(scenario, work)  # and the next save works, and leaves no rubbish
        assert killed.read(scenario, work) == NEW, where
        hidden = [entry.name for entry in work.iterdir() if entry.name.startswith(".")]
        assert not hidden, (where, hidden)
    # Enough operations were seen; those before the rename left the old state, those after it the new one.
    assert seen.count(old) >= killed.scenarios[scenario], (scenario, seen)
    assert seen == sorted(seen, key=lambda state: state == NEW), (scenario, seen)
    return len(seen)


def main(test_file: str, lose: str, folder: str) -> None:
    spec = importlib.util.spec_from_file_location("test_file", test_file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.fsync = lambda fd: None
    gc.disable()  # a collection would copy the memory that a fork shares
    for scenario in module.Killed.scenarios:
        print(scenario, run(module.Killed(), scenario, Path(folder), lose=lose == "lose"), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
