"""A unit is (configuration, seed): one run folder, trained to its end by `training.run.run`.

What has become of it is read from the folder alone, so that any process knows it: a run goes on where the folder's lock is
held (`files.lock`: the kernel gives it back when its process ends, however it ends); where it is free and the run not at its
end, whoever takes the unit goes on from its last checkpoint, as with `--resume auto`.
"""

import contextlib
import csv
import gc
import json
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from files.durable import make_folder, save_text
from files.errors import ConfigError, Failure, printable
from files.lock import is_locked
from training.config import TrainConfig
from training.non_finite import NonFiniteError
from training.report.runs import read_number
from training.run import run
from training.run_folder import RunFolder

UnitState = Literal["missing", "running", "interrupted", "done", "failed"]

FAILED = "failed.json"
"""In a unit's folder: why its run failed, and whether it would fail again."""
LOG = "train.log"
"""In a unit's folder: what its run printed."""


class Score(NamedTuple):
    """What a unit that is done has cost and brought."""

    value: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Unit:
    """One run of a study.

    Attributes:
        config: Of the candidate.
        seed: Of this run.
        folder: The run folder.
    """

    config: TrainConfig
    seed: int
    folder: Path

    @property
    def run_config(self) -> TrainConfig:
        """What is trained. Validated once, at the end, so that best/ is the final model and nothing is chosen by
        looking; unless the run may stop early, which is a choice the user made."""
        log: dict[str, Any] = {"report": False}
        if self.config.early_stopping.patience is None:
            log["validate_every"] = self.config.optim.epochs
        return self.config.model_copy(update={"seed": self.seed, "log": self.config.log.model_copy(update=log)})

    @property
    def state(self) -> UnitState:
        """What has become of it, now."""
        if not self.folder.is_dir():
            return "missing"
        if is_locked(self.folder):
            return "running"
        if read_failure(self.folder) is not None:
            return "failed"
        summary = _read_json(RunFolder(self.folder).summary)
        if summary is not None:
            whole = summary.get("epochs") == self.config.optim.epochs or summary.get("stopped_early")
            if whole and "final_top1" in summary:
                return "done"
        return "interrupted"

    def score(self, metric: str) -> Score:
        """What it scored; it is done.

        Args:
            metric: A column of metrics.csv.

        Raises:
            Failure: The run did not report it.
        """
        folder = RunFolder(self.folder)
        try:
            with folder.metrics.open(newline="") as file:
                rows = list(csv.DictReader(file))
            value = float(rows[-1][metric])
        except (OSError, IndexError, KeyError, TypeError, ValueError):
            raise Failure(f"{folder.metrics} does not report {metric!r} of the last epoch") from None
        if not math.isfinite(value):
            raise Failure(f"{metric} of the last epoch is {value:g}")
        summary = _read_json(folder.summary) or {}
        steps, seconds = (read_number(summary.get(key)) for key in ("steps", "seconds"))
        return Score(value, 0 if math.isnan(steps) else int(steps), 0.0 if math.isnan(seconds) else seconds)


def read_failure(folder: Path) -> str | None:
    """Why the run in a unit's folder failed; None where it did not."""
    failure = _read_json(folder / FAILED)
    return None if failure is None else str(failure.get("reason", "unknown"))


def forget_failures(folder: Path) -> int:
    """Lets all units below a folder that failed be tried again, but for those that are certain to fail again.

    A disk that was full, or data that were not there, may be mended when a study is started again; a loss that was not finite
    will be so again, after as many steps.

    Returns:
        How many there were.
    """
    count = 0
    for path in folder.glob(f"*/seed-*/{FAILED}"):
        failure = _read_json(path)
        if failure is None or not failure.get("final"):
            with contextlib.suppress(OSError):
                path.unlink()
                count += 1
    return count


def note_failure(folder: Path, reason: str, *, final: bool) -> None:
    """Leaves the reason in a unit's folder."""
    content = {"reason": printable(reason), "final": final}
    save_text(folder / FAILED, json.dumps(content, indent=2) + "\n")


def train_unit(unit: Unit, *, threads: int | None = None) -> str | None:
    """Trains a unit to its end, or until a signal. The caller holds the lock of its folder.

    Args:
        unit: Goes on where its folder says.
        threads: For a config that leaves their number to the machine.

    Returns:
        None, or the signal that stopped it. A run that fails is noted in its folder, and is no error here.
    """
    config = unit.run_config
    if threads is not None and config.runtime.threads == "auto":
        config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"threads": threads})})
    stopped = None
    with _printing_to(unit.folder / LOG):
        try:
            stopped = run(config, unit.folder, resume="auto", claimed=True).get("stopped_by")
        except (ConfigError, Failure) as error:
            print(f"error: {error}")
            note_failure(unit.folder, str(error), final=isinstance(error, NonFiniteError))
        except Exception as error:  # of this candidate; the search can do without it, and what it was is in the log
            traceback.print_exc()
            note_failure(unit.folder, f"{type(error).__name__}: {error}", final=False)
    gc.collect()  # models and loaders hold each other
    return stopped


def make_unit_folder(folder: Path) -> None:
    """Makes the folder of a unit, to be locked.

    Raises:
        Failure: It cannot be written.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise Failure(f"cannot write to {folder}: {error.strerror}; the study is intact, start it again") from None


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Takes what is printed to a file."""
    try:
        file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    except OSError:  # a run that can write nothing says so itself
        yield
        return
    with file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
