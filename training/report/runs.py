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
from training.rates import RATE_COLUMNS
from training.report.predictions import Evidence, read_evidence
from training.run_folder import COLUMNS, RunFolder

NAN = math.nan


@dataclass(frozen=True)
class Block:
    """One row of drop_path.csv. Rates are NaN where the file holds none yet; `saved` is a share of the model's compute."""

    block: str
    name: str
    nominal: float
    mode: str
    realised: float
    saved: float = NAN

    @property
    def skipped(self) -> float:
        """Share of the branches' samples that was never computed; a mask computes them and multiplies by 0."""
        branches = self.mode.split("/")  # `skip/mask`: one of the block's branches masks
        return self.realised * sum(m in ("skip", "batch") for m in branches) / len(branches)


@dataclass(frozen=True)
class EpochRates:
    """An epoch's drop-path rates, on average over branches; NaN where nothing was drawn."""

    epoch: float
    nominal: float
    realised: float


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
    rates: list[EpochRates] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    evidence: Evidence | None = None

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

    @property
    def val_samples(self) -> int | None:
        """Validation samples, where a file tells."""
        if self.evidence is not None:
            return self.evidence.samples
        samples = self._of_data("val", "samples")
        return samples if isinstance(samples, int) and samples > 0 else None

    @property
    def most_frequent(self) -> float:
        """Top-1 of always naming the class with most validation samples, in percent; NaN where no file tells."""
        counts = self._of_data("val", "samples_per_class")
        if not isinstance(counts, list) or not all(isinstance(c, int) for c in counts) or not sum(counts):
            return NAN
        return 100 * max(counts) / sum(counts)

    @property
    def compute_saved(self) -> float:
        """Share of the forward pass in training that was never computed; NaN where drop_path.csv does not tell."""
        saved = is_known(block.saved for block in self.blocks)
        return math.fsum(saved) if saved else NAN

    @property
    def classes(self) -> int | None:
        """Classes of the head."""
        number = self.setting("model", "num_classes")
        return number if isinstance(number, int) else None

    def _of_data(self, *keys: str) -> Any:
        value: Any = self.data
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

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
        rates=_rates(_read_csv(files.rates, notes)),
        data=_read_json(files.data, notes),
        evidence=read_evidence(files.evaluation, notes),
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
        saved=read_number(row.get("saved_share")),
    )


def _rates(rows: list[dict[str, str]]) -> list[EpochRates]:
    """Rates of each epoch from counts since the start of the run; an epoch written twice counts once."""
    by_epoch = {}
    for row in rows:
        numbers = {column: read_number(row.get(column)) for column in RATE_COLUMNS}
        if not math.isnan(numbers["epoch"]):
            by_epoch[numbers["epoch"]] = numbers
    told, drawn, dropped = [], 0.0, 0.0
    for epoch, now in sorted(by_epoch.items()):
        new = now["drawn"] - drawn
        told.append(EpochRates(epoch, now["nominal_rate"], (now["dropped"] - dropped) / new if new > 0 else NAN))
        drawn, dropped = now["drawn"], now["dropped"]
    return told


def read_number(value: Any) -> float:
    """A finite number, or NaN for anything else: infinities would stretch an axis without end."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return NAN
    return number if math.isfinite(number) else NAN


def is_known(values: Iterable[float]) -> list[float]:
    return [v for v in values if not math.isnan(v)]
