"""A study on the disk: its folder, what it has tried, and what came of it. Read by the report, written by the search.

A trial is a configuration; a unit is (configuration, seed), one run folder. All that is here can be made again from the
units and Optuna's storage; it is written for people and for the report.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from files.durable import save_text
from files.errors import ConfigError

TrialState = Literal["waiting", "racing", "dropped", "winner", "failed"]


@dataclass(frozen=True)
class Trial:
    """One configuration that a study tries.

    Attributes:
        number: From 0, in the order in which they were proposed.
        digest: Of the training config without its seed; names the folder of its units.
        parameters: Keys of the training config and the values tried, as in {"drop_path.rate": 0.1}.
        origin: Who proposed it: "zero", "published", "advice", "given" or the sampler's name.
        scores: The objective of each seed that is done, in the order of the seeds.
        state: Where it stands.
        reason: In words: why it was dropped, or failed; empty else.
        steps: Optimizer steps trained so far, over all seeds.
        seconds: Training time so far, over all seeds.
    """

    number: int
    digest: str
    parameters: dict[str, Any]
    origin: str
    scores: dict[int, float] = field(default_factory=dict)
    state: TrialState = "waiting"
    reason: str = ""
    steps: int = 0
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Of the scores; NaN where there is none."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else float("nan")


class StudyFolder:
    """Paths and files of one study.

    Args:
        path: The folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "study.yaml"
        self.train = path / "train.yaml"
        self.journal = path / "journal.log"
        self.units = path / "units"
        self.trials = path / "trials.json"
        self.decisions = path / "decisions.jsonl"
        self.verdict = path / "verdict.json"
        self.best = path / "best.yaml"
        self.report = path / "report.html"

    def unit(self, digest: str, seed: int) -> Path:
        """The run folder of a unit."""
        return self.units / digest / f"seed-{seed}"

    def write_trials(self, trials: list[Trial]) -> None:
        """Writes trials.json so that a kill leaves the old or the new one."""
        save_text(self.trials, json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")

    def read_trials(self) -> list[Trial]:
        """The trials as last written; none where there is no file yet.

        Raises:
            ConfigError: The file is damaged.
        """
        try:
            rows = json.loads(self.trials.read_text(encoding="utf-8"))
            return [Trial(**row | {"scores": {int(s): v for s, v in row["scores"].items()}}) for row in rows]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{self.trials} is damaged ({error}); start the study again, its units are kept"
            ) from None

    def read_decisions(self) -> list[dict[str, Any]]:
        """What was decided, oldest first: objects with "time" (ISO 8601), "what" and "why"; lines cut short are left out."""
        decisions = []
        try:
            lines = self.decisions.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                decisions.append(json.loads(line))
            except ValueError:
                continue
        return [decision for decision in decisions if isinstance(decision, dict)]
