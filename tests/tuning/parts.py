"""What tests of a study share: a study of which a unit takes no time, and one of real runs of a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from files.durable import save_text
from files.errors import Failure
from training.config import TrainConfig, dump_config
from training.run_folder import COLUMNS, RunFolder
from tuning import units
from tuning.config import StudyConfig, load_study
from tuning.links import Finalist, Links
from tuning.opening import Opened, open_study
from tuning.study import StudyFolder

STUDY = """
train:
  model: {name: convformer_n4, in_chans: 1, image_size: 8, depths: [1, 1], dims: [16, 32]}
  data: {dataset: digits, batch_size: 256, workers: 0}
  augment: {hflip: 0.0}
  optim: {lr: 3e-3, epochs: 2, warmup_epochs: 1}
  runtime: {device: cpu, precision: float32}
space: {drop_path.rate: {low: 0.0, high: 0.5}}
search: {trials: 6, sampler: random}
race: {seeds: [1, 2, 3], keep: [3, 2]}
verdict: null
"""


def study(tmp_path: Path, *overrides: str, text: str = STUDY) -> StudyConfig:
    file = tmp_path / "some.yaml"
    file.write_text(text)
    return load_study(file, overrides)


def peak(config: TrainConfig) -> float:
    """A score that is best at rate 0.2, a little by seed; the seeds agree on the order."""
    rate = config.drop_path.rate or 0.0
    return 90 - 100 * (rate - 0.2) ** 2 + 0.1 * config.seed


def stand_in(monkeypatch: pytest.MonkeyPatch) -> "Trained":
    """Puts a `Trained` in the place of training."""
    made = Trained()
    monkeypatch.setattr(units, "run", made.run)
    return made


class Trained:
    """Stands for training: notes what was trained and writes what a run leaves.

    Attributes:
        runs: The rate and seed of each.
        score: Of a config.
        fails: Of a config, why its run fails; None: it does not.
        stops: Of a config, the signal that stops it before its end.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[float, int]] = []
        self.configs: list[TrainConfig] = []
        self.score: Callable[[TrainConfig], float] = peak
        self.fails: Callable[[TrainConfig], str | None] = lambda config: None
        self.stops: Callable[[TrainConfig], str | None] = lambda config: None
        self.error: type[Exception] = Failure

    def run(self, config: TrainConfig, folder: Path, *, resume: str, claimed: bool) -> dict[str, Any]:
        assert resume == "auto" and claimed and units.is_locked(folder)
        self.runs.append((round(config.drop_path.rate or 0.0, 4), config.seed))
        self.configs.append(config)
        run_folder = RunFolder(folder)
        save_text(run_folder.config, dump_config(config))
        if reason := self.fails(config):
            raise self.error(reason)
        signal = self.stops(config)
        epochs = config.optim.epochs - (signal is not None)
        row = dict.fromkeys(COLUMNS, 0.0) | {"epoch": epochs, "step": 5 * epochs, "val_top1": self.score(config)}
        run_folder.metrics.unlink(missing_ok=True)
        run_folder.append_metrics(row)
        summary = {"final_top1": row["val_top1"], "epochs": epochs, "steps": 5 * epochs, "seconds": 0.5}
        run_folder.write_json(run_folder.summary, summary | {"stopped_early": None})
        return {**summary, "folder": folder} | ({"stopped_by": signal} if signal else {})


def links(**replaced: Any) -> Links:
    """Neighbours that give no advice, score by the rate in the run folder, and write what they are given."""

    def score_unit(folder: Path, split: str, metric: str) -> float:
        text = RunFolder(folder).config.read_text()
        rate = next(line for line in text.splitlines() if line.strip().startswith("rate:"))
        return 80 - 10 * float(rate.split(":")[1])

    def conclude(folder: StudyFolder, finalists: list[Finalist], metric: str, split: str) -> dict[str, Any]:
        content = {
            "metric": metric,
            "split": split,
            "configs": [{"role": f.role, "scores": list(f.scores.values()), "digest": f.digest} for f in finalists],
            "sentence": "it is so",
        }
        save_text(folder.verdict, json.dumps(content))
        return content

    def write_best(folder: StudyFolder, config: TrainConfig, sentence: str) -> None:
        save_text(folder.best, f"# {sentence}\n{dump_config(config)}")

    made: dict[str, Any] = {
        "advise": lambda config: None,
        "score_unit": score_unit,
        "conclude": conclude,
        "write_best": write_best,
        "write_report": lambda folder: None,
    }
    return Links(**made | replaced)


def opened(tmp_path: Path, *overrides: str, text: str = STUDY, **replaced: Any) -> Opened:
    return open_study(study(tmp_path, *overrides, text=text), tmp_path / "out", links(**replaced))
