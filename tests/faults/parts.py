"""What the tests of faults share: runs as processes of their own, damaged on purpose, and what must be left of them."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TINY = ["model.name=convformer_n4", "model.image_size=8", "model.depths=[1,1]", "model.dims=[8,16]", "ema.enabled=true",
        "ema.decay=0.9", "data.batch_size=256", "optim.epochs=3", "optim.warmup_epochs=1", "drop_path.rate=0.4",
        "checkpoint.every_epochs=1"]  # fmt: skip
TIMING = ("images_per_second", "seconds")
PATIENCE = 120.0


@dataclass
class Done:
    """What came of a run."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> list[str]:
        """The lines of the error, behind bars and warnings."""
        return self.err[self.err.index("error: ") :].splitlines() if "error: " in self.err else []

    def fine(self) -> "Done":
        """The run itself, after checking that it ended well."""
        assert self.code == 0, (self.code, self.out, self.err)
        self.check()
        return self

    def failed(self, code: int, *words: str) -> "Done":
        """The run itself, after checking that it said in one to three lines what was wrong."""
        assert self.code == code, (self.code, self.out, self.err)
        self.check()
        assert 1 <= len(self.told) <= 3, self.err
        for word in words:
            assert word in "\n".join(self.told), (word, self.err)
        return self

    def check(self) -> None:
        assert "Traceback" not in self.err and "Traceback" not in self.out, self.err


class Run:
    """A process that the zygote forked."""

    def __init__(self, zygote: "Zygote", pid: int, out: Path, err: Path) -> None:
        self.zygote, self.pid, self.out, self.err = zygote, pid, out, err

    def poll(self) -> int | None:
        return self.zygote.ask({"what": "wait", "pid": self.pid})

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> Done:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"not done in {timeout} s: {self.texts()}")
            time.sleep(0.01)
        return Done(code, *self.texts())

    def texts(self) -> tuple[str, str]:
        return self.out.read_text(errors="replace"), self.err.read_text(errors="replace")

    def until(self, condition: Callable[[], Any], timeout: float = PATIENCE) -> None:
        """Waits until something is true while the run goes on."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, f"ended early: {self.texts()}"
            assert time.monotonic() < deadline, self.texts()
            time.sleep(0.005)

    def until_said(self, text: str) -> None:
        self.until(lambda: text in self.out.read_text() or text in self.err.read_text())

    def orphans(self) -> list[str]:
        """Processes of the run's session that live on."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = entry.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.pid and fields[0] != "Z":
                    found.append(entry.parent.name)
        return found


class Zygote:
    """The process that forks runs."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", str(Path(__file__).with_name("zygote.py"))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.count = 0

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *arguments: str | Path,
        cwd: Path,
        hook: str = "",
        env: dict[str, str | None] | None = None,
        limits: dict[str, int] | None = None,
        obeys: bool = False,
        report: bool = False,
    ) -> Run:
        """Starts train.py.

        Args:
            arguments: Its command line.
            cwd: Where it runs; its output goes to files beside.
            hook: Python that runs in the process first; a function `main` in it takes train.py's place.
            env: Changes of the environment; None takes a variable away.
            limits: Of `resource`, by name.
            obeys: Whether permissions hold for it though it is root's.
            report: Whether it draws its report, which takes longer than all the rest.
        """
        self.count += 1
        out, err = (cwd.parent / f"{cwd.name}.{self.count}.{name}" for name in ("out", "err"))
        for path in (out, err):
            path.touch()
            path.chmod(0o666)
        request = {
            "what": "start",
            "arguments": [str(a) for a in arguments],
            "cwd": str(cwd),
            "hook": hook,
            "env": env or {},
            "limits": limits or {},
            "obeys": obeys,
            "report": report,
            "out": str(out),
            "err": str(err),
        }
        return Run(self, self.ask(request), out, err)

    def run(self, *arguments: str | Path, cwd: Path, timeout: float = PATIENCE, **options: Any) -> Done:
        return self.start(*arguments, cwd=cwd, **options).wait(timeout)

    def ranks(self, *arguments: str | Path, cwd: Path, size: int = 2, **options: Any) -> list[Run]:
        """Starts processes that meet as torchrun's would; the store is rank 0's."""
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size),
               "LOCAL_WORLD_SIZE": str(size)}  # fmt: skip
        return [
            self.start(*arguments, cwd=cwd, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, **options)
            for r in range(size)
        ]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_images(root: Path, *, train: int = 6, val: int = 3) -> list[str]:
    """Images of two classes, and the settings that train on them."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), 100 * label + 9 * i).save(root / split / name / f"{i}.png")
    return ["data.dataset=folder", f"data.root={root}", "data.batch_size=4", "data.workers=0", "model.in_chans=1"]


def read_metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def same_result(folder: Path, whole: Path) -> None:
    """Weights, average and metrics are those of the run that nothing happened to."""
    for key in ("weights_sha256", "ema_sha256", "best_top1", "final_top1"):
        assert summary(folder)[key] == summary(whole)[key], key
    assert read_metrics(folder) == read_metrics(whole)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints there are."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def tiny_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of that size at a folder, where this user may make one; else the test is skipped."""
    import pytest

    path.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def at_step(number: int, act: str) -> str:
    """A hook that does something as a step begins."""
    return f"""
import os, shutil, signal, time
from pathlib import Path
from training import loop, setup as building
real = loop.train_step
def step(setup, trained, batches, progress, **options):
    if progress.step == {number}:
        {act}
    return real(setup, trained, batches, progress, **options)
loop.train_step = step
"""
