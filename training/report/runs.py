"""Reads run folders: what a report shows, checked."""

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from files.errors import ConfigError, nearest
from files.strict_yaml import load_yaml
from training.run_folder import COLUMNS, RunFolder

NAN = math.nan


@dataclass(frozen=True)
class Block:
    """One row of drop_path.csv. Rates are NaN where the file holds none yet."""

    block: str
    name: str
    nominal: float
    mode: str
    realised: float

    @property
    def skipped(self) -> float:
        """Share of the branches' samples that was never computed; a mask computes them and multiplies by 0."""
        branches = self.mode.split("/")  # `skip/mask`: one of the block's branches masks
        return self.realised * sum(m in ("skip", "batch") for m in branches) / len(branches)


@dataclass(frozen=True)
class Run:
    """What a run folder holds. Missing files are empty here; what could not be read is named in `notes`."""

    path: Path
    config_text: str
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    metrics: dict[str, list[float]]
    blocks: list[Block]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def finished(self) -> bool:
        """Whether summary.json tells of the whole run: a stopped or resumed one has an earlier summary."""
        return read_number(self.summary.get("epochs")) >= read_number(self.setting("optim", "epochs"))

    @property
    def epochs(self) -> int:
        return len(self.metrics["epoch"])

    @property
    def seconds(self) -> float:
        return self._last("seconds", "seconds")

    @property
    def images_per_second(self) -> float:
        return self._last("images_per_second", "images_per_second")

    @property
    def final_top1(self) -> float:
        return self._last("final_top1", "val_top1")

    @property
    def steps(self) -> float:
        return self._last("steps", "step")

    @property
    def best_top1(self) -> float:
        return max(is_known([*self.metrics["val_top1"], read_number(self.summary.get("best_top1"))]), default=NAN)

    @property
    def best_epoch(self) -> float:
        """The first epoch with the best top-1 of metrics.csv, NaN before the first evaluation."""
        top1 = self.metrics["val_top1"]
        known = is_known(top1)
        return self.metrics["epoch"][top1.index(max(known))] if known else NAN

    def setting(self, *keys: str) -> Any:
        """A value of config.yaml, or None."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def _last(self, key: str, column: str) -> float:
        """The summary's value of a finished run, or metrics.csv's last."""
        value = read_number(self.summary.get(key)) if self.finished else NAN
        return self.metrics[column][-1] if math.isnan(value) and self.epochs else value


def read_run(path: Path) -> Run:
    """Reads a run folder as far as it was written.

    Raises:
        ConfigError: There is no such folder, or it holds no readable config.yaml.
    """
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise ConfigError(f"run {str(path)!r}: no such folder{nearest(path.name, siblings)}")
    files = RunFolder(path)
    if not files.config.is_file():
        raise ConfigError(f"run {str(path)!r}: not a run folder, it holds no config.yaml")
    config = load_yaml(files.config).data
    notes: list[str] = []
    rows = _read_csv(files.metrics, notes)
    # A run that was killed and resumed may have written an epoch twice: the later row holds.
    by_epoch = {row["epoch"]: row for row in (_metrics_row(r) for r in rows) if not math.isnan(row["epoch"])}
    return Run(
        path=path,
        config_text=files.config.read_text(encoding="utf-8"),
        config=config,
        environment=_read_json(files.environment, notes),
        summary=_read_json(files.summary, notes),
        metrics={column: [row[column] for row in by_epoch.values()] for column in COLUMNS},
        blocks=[_block(row) for row in _read_csv(files.drop_path, notes)],
        notes=notes,
    )


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        notes.append(f"{path.name} is damaged and was left out.")
        return {}
    return data


def _read_csv(path: Path, notes: list[str]) -> list[dict[str, str]]:
    """The complete rows of a CSV file; a row cut off in mid-write is left out and noted."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append(f"{path.name} cannot be read and was left out.")
        return []
    whole = text[: text.rfind("\n") + 1]  # a last line without its newline may have lost digits
    header, *rows = list(csv.reader(io.StringIO(whole.replace("\0", "")))) or [[]]
    complete = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    if len(complete) < len(rows) or whole != text:
        notes.append(f"{path.name} holds an incomplete row, which was left out.")
    return complete


def _metrics_row(row: dict[str, str]) -> dict[str, float]:
    return {column: read_number(row.get(column)) for column in COLUMNS}


def _block(row: dict[str, str]) -> Block:
    return Block(
        block=row.get("block", ""),
        name=row.get("name", ""),
        nominal=read_number(row.get("nominal_rate")),
        mode=row.get("mode", ""),
        realised=read_number(row.get("realised_rate")),
    )


def read_number(value: Any) -> float:
    """A finite number, or NaN for anything else: infinities would stretch an axis without end."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return NAN
    return number if math.isfinite(number) else NAN


def is_known(values: Iterable[float]) -> list[float]:
    return [v for v in values if not math.isnan(v)]
