"""The run folder: which files a run leaves, what may be written where, and where a run is resumed from."""

import contextlib
import csv
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from files.durable import save_text
from files.errors import ConfigError, nearest
from files.lock import LOCK
from files.outputs import may_write
from files.strict_json import json_text
from layers.cpu_compiler import describe_compiler
from training.distributed import World
from training.metrics import METRICS
from training.rates import RATE_COLUMNS

COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    *(metric.column for metric in METRICS),
    "lr",
    "drop_path_rate",
    "images_per_second",
    "seconds",
)
"""Of metrics.csv."""


class RunFolder:
    """Paths and files of one run.

    Args:
        path: The folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.data = path / "data.json"
        self.skipped = path / "skipped.csv"
        self.non_finite = path / "non_finite.csv"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.csv"
        self.drop_path = path / "drop_path.csv"
        self.rates = path / "rates.csv"
        self.evaluation = path / "evaluation.json"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.tensorboard = path / "tensorboard"
        self.report = path / "report.html"
        self.wandb = path / "wandb.json"

    @property
    def _folders(self) -> tuple[Path, ...]:
        """What of it is a folder; all else is a file."""
        return self.checkpoints, self.best, self.tensorboard

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return os.path.exists(self.config)  # false, no error, behind a folder that may not be entered

    def own_files(self) -> list[Path]:
        """The files that a run is made of, there or not; what else lies in the folder is somebody else's."""
        files = [path for path in vars(self).values() if path != self.path]
        for folder in self._folders:
            files += [Path(place, name) for place, _, names in os.walk(folder) for name in names]
        return files

    def read_data(self) -> dict[str, Any] | None:
        """The identity of the data that the run began with (`training.data.identity`); None where it is not told."""
        try:
            identity = json.loads(self.data.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return identity if isinstance(identity, dict) else None

    def make(self, *, fresh: bool) -> None:
        """Makes the folder and finds out now whether it can be written.

        Args:
            fresh: A new run begins: refuse a folder with anything in it.

        Raises:
            ConfigError: It is not empty, is not a folder, or cannot be written, nor can one of the run's own in it.
        """
        if fresh and self.holds_run():
            raise ConfigError(
                f"{self.path} already holds a run; choose another --output, or continue it: --resume auto"
            )
        try:
            os.fspath(self.path.absolute()).encode()  # TensorBoard writes to no other names
            if fresh and self.path.exists() and any(path.name != LOCK for path in self.path.iterdir()):
                raise ConfigError(f"{self.path} is not empty and holds no run; choose another --output")
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
            self._check_own()
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}; choose another --output") from None
        except UnicodeEncodeError:
            shown = ascii(str(self.path))
            raise ConfigError(f"cannot write to {shown}: the name is not UTF-8; choose another --output") from None

    def _check_own(self) -> None:
        """Refuses what a run going on could not write to.

        Raises:
            ConfigError: One of its folders is a file, or one of its files a folder, or no checkpoint can be written.
        """
        for path in vars(self).values():
            if path == self.path or not os.path.exists(path):
                continue
            wanted = "folder" if path in self._folders else "file"
            if os.path.isdir(path) != (wanted == "folder"):
                raise ConfigError(f"{path} is no {wanted}, as a run needs it; move it away, or choose another --output")
        if self.checkpoints.is_dir() and not may_write(self.checkpoints):
            raise ConfigError(f"cannot write to {self.checkpoints}; choose another --output")

    def probe(self, *, fresh: bool) -> None:
        """Finds out what `make` would, and leaves nothing behind.

        Raises:
            ConfigError: As `make`.
        """
        missing = [folder for folder in (self.path, *self.path.parents) if not os.path.exists(folder)]
        try:
            self.make(fresh=fresh)
        finally:
            for folder in missing:  # the innermost first
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def append_metrics(self, row: dict[str, float]) -> None:
        """Adds one epoch to metrics.csv, on disk when this returns."""
        _append(self.metrics, COLUMNS, row)

    def append_rates(self, row: dict[str, float]) -> None:
        """Adds one epoch to rates.csv, on disk when this returns."""
        _append(self.rates, RATE_COLUMNS, row)

    def check_metrics(self) -> None:
        """Refuses a metrics.csv that a run going on could not keep.

        Raises:
            ConfigError: It has a column that no metric gives.
        """
        header, _ = _read(self.metrics)
        for column in header:
            if column not in COLUMNS:
                hint = nearest(column, COLUMNS)
                raise ConfigError(
                    f"{self.metrics}: unknown column {column!r}{hint}; known: {', '.join(COLUMNS)} (training/metrics.py)"
                )

    def cut_metrics(self, epochs: int) -> None:
        """Keeps the rows of that many epochs, in rates.csv too: a run resumed from there writes the later ones again.

        What a kill left incomplete goes; a column that the file has not yet is empty in its rows.
        """
        for path, columns in ((self.metrics, COLUMNS), (self.rates, RATE_COLUMNS)):
            if path.exists():
                header, rows = _read(path)
                told = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
                kept = [row for row in told if row.get("epoch", "").isdecimal() and int(row["epoch"]) <= epochs]
                lines = [columns, *([row.get(column, "") for column in columns] for row in kept)]
                save_text(path, "".join(",".join(line) + "\n" for line in lines))

    def count_metrics(self, epochs: int) -> int:
        """How many of the first `epochs` epochs have a row."""
        header, rows = _read(self.metrics)
        told = {dict(zip(header, row, strict=False)).get("epoch", "") for row in rows}
        return sum(epoch.isdecimal() and int(epoch) <= epochs for epoch in told)

    def last_noted(self) -> tuple[int, int] | None:
        """The last epoch that has a row in metrics.csv, and its optimizer steps; None where none has."""
        header, rows = _read(self.metrics)
        told = (dict(zip(header, row, strict=False)) for row in rows)
        numbers = [(row.get("epoch", ""), row.get("step", "")) for row in told]
        noted = [(int(epoch), int(step)) for epoch, step in numbers if epoch.isdecimal() and step.isdecimal()]
        return max((pair for pair in noted if min(pair) > 0), default=None)

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        """Writes one JSON file so that a kill leaves the old or the new one; numbers that are not finite are null in it."""
        save_text(path, json_text(content))


def _append(path: Path, columns: Sequence[str], row: dict[str, float]) -> None:
    """Adds a row to a CSV file, on disk when this returns."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(columns)
        writer.writerow([_number(row[key]) for key in columns])
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a CSV file, without a last line that a kill cut short; empty where it is not there."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return [], []
    lines = [line.split(",") for line in text[: text.rfind("\n") + 1].splitlines()]
    return (lines[0], lines[1:]) if lines else ([], [])


def new_run_path(name: str, world: World) -> Path:
    """runs/NAME-TIME, the same on all processes, with a number behind it where two runs start in one second."""
    now = world.sum(torch.tensor(time.time() if world.is_main else 0.0, dtype=torch.float64)).item()
    stem = f"{name}-{datetime.datetime.fromtimestamp(now):%Y%m%d-%H%M%S}"
    names = (stem, *(f"{stem}-{i}" for i in range(2, 1000)))
    path = next(p for p in map(Path("runs").joinpath, names) if not p.exists())
    world.barrier()  # nobody makes the folder while another still looks
    return path


def latest_run(name: str) -> Path | None:
    """The newest of runs/NAME-TIME, for --resume auto without --output."""
    own = re.compile(re.escape(name) + r"-\d{8}-\d{6}(-\d+)?")  # not those of NAME-LARGE
    runs = [p for p in Path("runs").glob("*") if own.fullmatch(p.name) and RunFolder(p).holds_run()]
    return max(runs, key=lambda p: RunFolder(p).config.stat().st_mtime, default=None)


def describe_environment(world: World, *, decoder: str | None = None) -> dict[str, Any]:
    """Machine, versions, commit and command of this process, and what decodes its images, for environment.json."""
    import numpy
    import timm
    import torchvision

    on_cuda = world.device.type == "cuda"
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(world.device) if on_cuda else str(world.device),
        "processor": describe_processor(),
        "compiler": None if on_cuda else describe_compiler(),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "decoder": decoder,
        "cuda": torch.version.cuda if on_cuda else None,
    }


def describe_processor() -> str:
    """The CPU's name and the instructions that torch uses on it, both of which rounding depends on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # only Linux has this file, and only there platform does not know the name
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def changed_environment(folder: RunFolder, world: World, *, decoder: str | None = None) -> list[str]:
    """What differs from where a run was started and may change its rounding or pixels: device, versions, decoder, ..."""
    try:
        before = json.loads(folder.environment.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(before, dict):
        return []
    now = describe_environment(world, decoder=decoder)
    keys = ("device", "processor", "compiler", "threads", "torch", "torchvision", "timm", "numpy", "decoder", "cuda")
    return [f"{key} was {before[key]}, is now {now[key]}" for key in keys if key in before and before[key] != now[key]]


def _commit() -> str | None:
    """The checkout's commit, with a + behind it where files differ from it."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.8g}"
