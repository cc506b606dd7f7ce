"""Reads a study's folder: what its report shows, checked. What is missing or damaged costs its part and a note."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from files.errors import ConfigError, nearest
from files.strict_yaml import load_yaml
from files.words import counted
from training.metrics import METRICS, Metric
from training.report.runs import is_known, read_number
from training.run_folder import RunFolder
from tuning.config import FRESH
from tuning.study import StudyFolder, Trial
from tuning.units import read_failure

RATE = "drop_path.rate"
MOST_GROUPS = 7
"""Of configurations that differ in more than numbers; the rarer ones are drawn together."""
OTHERS = "others"


@dataclass(frozen=True)
class Cost:
    """What was trained; of runs that failed the number alone is known."""

    runs: int = 0
    steps: int = 0
    seconds: float = 0.0
    failed: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        steps, seconds = self.steps + other.steps, self.seconds + other.seconds
        return Cost(self.runs + other.runs, steps, seconds, self.failed + other.failed)


@dataclass(frozen=True)
class Study:
    """What the folder of a study holds.

    Attributes:
        folder: Its files.
        config: study.yaml; empty where it is missing.
        train: train.yaml; empty where it is missing.
        trials: All.
        decisions: Objects with "time", "what" and "why".
        verdict: verdict.json; empty before there is one.
        best_text: best.yaml; empty before there is one.
        final: Cost of the verdict's runs.
        failed: Runs of the search that failed.
        notes: What could not be read.
    """

    folder: StudyFolder
    config: dict[str, Any]
    train: dict[str, Any]
    trials: list[Trial]
    decisions: list[dict[str, Any]]
    verdict: dict[str, Any]
    best_text: str
    final: Cost
    failed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    def setting(self, *keys: str) -> Any:
        """A value of study.yaml, or None."""
        return _at(self.config, keys)

    def train_setting(self, *keys: str) -> Any:
        """A value of train.yaml, or None."""
        return _at(self.train, keys)

    # ---- scores

    @cached_property
    def metric(self) -> Metric:
        """What the search compares."""
        wanted = self.setting("objective", "metric") or "val_top1"
        top1 = next(m for m in METRICS if m.column == "val_top1")
        return next((m for m in METRICS if m.column in (wanted, f"val_{wanted}")), top1)

    @cached_property
    def lower_is_better(self) -> bool:
        return self.metric.sign < 0

    def loss(self, score: float) -> float:
        """A score as the charts show it, the lower the better: the error of a percentage, else the score itself."""
        return 100 - score if self.metric.percent else score

    @cached_property
    def loss_name(self) -> str:
        """What `loss` is."""
        if self.metric.percent:
            return "error in %" if self.metric.column == "val_top1" else f"100 - {self.metric.label}"
        return self.metric.label

    @cached_property
    def scored(self) -> list[Trial]:
        """Trials with a score, the best first: those that came further in the race before the others.

        Of trials of one configuration, which share their runs, the first only.
        """
        first = {t.digest: t for t in reversed(self.trials)}
        known = [t for t in self.trials if t.scores and first[t.digest] is t]
        ahead = {"winner": 0}
        sign = 1 if self.lower_is_better else -1
        return sorted(known, key=lambda t: (ahead.get(t.state, 1), -len(t.scores), sign * t.mean, t.number))

    @cached_property
    def winner(self) -> Trial | None:
        return next((t for t in self.trials if t.state == "winner"), None)

    @cached_property
    def final_seeds(self) -> list[int]:
        """Fresh seeds of which each configuration of the final has a score, those without any left out: means over others
        would compare hard seeds with easy ones."""
        known = [{s for s, v in c["by_seed"].items() if not math.isnan(v)} for c in self.verdict.get("configs", ())]
        return sorted(set.intersection(*filter(None, known))) if any(known) else []

    def final_mean(self, config: Mapping[str, Any]) -> float:
        """Mean score of a configuration of the final over `final_seeds`; NaN without one."""
        values = [v for s in self.final_seeds if not math.isnan(v := config["by_seed"].get(s, math.nan))]
        return math.fsum(values) / len(values) if values else math.nan

    @cached_property
    def search(self) -> Cost:
        """Cost of the search; trials of one configuration share their runs."""
        of = {t.digest or str(t.number): t for t in self.trials}.values()
        runs, steps = sum(len(t.scores) for t in of), sum(t.steps for t in of)
        return Cost(runs, steps, math.fsum(t.seconds for t in of), self.failed)

    # ---- what was varied

    @cached_property
    def parameters(self) -> list[str]:
        """Keys that take more than one value, drop-path's rate first."""
        keys = list(dict.fromkeys(key for t in self.trials for key in t.parameters))
        varied = [key for key in keys if len({_text(t.parameters.get(key)) for t in self.trials}) > 1]
        return sorted(varied or keys, key=lambda key: key != RATE)

    @cached_property
    def numbers(self) -> list[str]:
        """Those of `parameters` that are numbers."""
        return [k for k in self.parameters if all(is_number(t.parameters.get(k)) for t in self.trials)]

    @cached_property
    def axis(self) -> str | None:
        """The parameter to draw scores over."""
        return next(iter(self.numbers), None)

    @cached_property
    def groups(self) -> list[str]:
        """Names of configurations that differ in more than numbers, as in "linear, early 15 epochs"; [""] for one kind.

        The most frequent first, at most `MOST_GROUPS` and `OTHERS`.
        """
        counts: dict[str, int] = {}
        for trial in self.trials:
            name = self._kind(trial)
            counts[name] = counts.get(name, 0) + 1
        ranked = sorted(counts, key=lambda name: -counts[name])
        return ranked if len(ranked) <= MOST_GROUPS + 1 else [*ranked[:MOST_GROUPS], OTHERS]

    def group(self, trial: Trial) -> int:
        """The place of a trial's group in `groups`."""
        name = self._kind(trial)
        return self.groups.index(name) if name in self.groups else len(self.groups) - 1

    def _kind(self, trial: Trial) -> str:
        keys = [key for key in self.parameters if key not in self.numbers]
        return ", ".join(value_in_words(trial.parameters[key]) for key in keys if key in trial.parameters)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def value_in_words(value: Any) -> str:
    """A parameter's value: a schedule as "early 15 epochs", numbers with three digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        words = [
            counted(v, "epoch") if k == "cutoff_epochs" and is_number(v) else value_in_words(v)
            for k, v in value.items()
        ]
        return " ".join(w for v, w in zip(value.values(), words, strict=True) if v is not None)
    if isinstance(value, list):
        if len(value) > 4 and all(map(is_number, value)):
            return f"{len(value)} values of {min(value):.3g} to {max(value):.3g}"
        return f"[{', '.join(value_in_words(v) for v in value)}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def read_study(path: Path) -> Study:
    """Reads a study's folder as far as it was written.

    Raises:
        ConfigError: There is no such folder, or it holds no study.
    """
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise ConfigError(f"study {str(path)!r}: no such folder{nearest(path.name, siblings)}")
    folder = StudyFolder(path)
    if not any(file.exists() for file in (folder.config, folder.trials, folder.journal, folder.verdict)):
        hint = "; a run's report is made by python -m training.report" if RunFolder(path).holds_run() else ""
        raise ConfigError(f"study {str(path)!r}: not a study's folder, it holds no study.yaml{hint}")
    notes: list[str] = []
    config, train = (_read_yaml(file, notes) for file in (folder.config, folder.train))
    try:
        trials = [_checked(trial) for trial in folder.read_trials()]
    except ConfigError:
        trials = []
        notes.append("trials.json is damaged and was left out; start the study again: its runs are kept.")
    verdict = _read_verdict(folder.verdict, notes)
    if verdict and (why := _outdated(verdict, config, trials)):
        verdict = {}
        notes.append(f"verdict.json was left out: {why}.")
    return Study(
        folder=folder,
        config=config,
        train=train,
        trials=trials,
        decisions=folder.read_decisions(),
        verdict=verdict,
        best_text=folder.best.read_text(encoding="utf-8", errors="replace") if folder.best.is_file() else "",
        final=_final_cost(folder, verdict, trials),
        failed=_failed_runs(folder, trials),
        notes=notes,
    )


def _checked(trial: Trial) -> Trial:
    """The trial without scores that are no number."""
    known = {seed: float(score) for seed, score in trial.scores.items() if is_number(score)}
    return trial if known == trial.scores else replace(trial, scores=known)


def _read_yaml(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return load_yaml(path).data
    except ConfigError:
        notes.append(f"{path.name} is damaged and was left out.")
        return {}


def _read_verdict(path: Path, notes: list[str]) -> dict[str, Any]:
    """verdict.json, whole or not at all."""
    if not path.exists():
        return {}
    try:
        verdict = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        assert isinstance(verdict["sentence"], str) and isinstance(verdict["split"], str)
        for config in verdict["configs"]:
            seeds = config.setdefault("seeds", verdict["seeds"][: len(config["scores"])])
            assert isinstance(config["label"], str) and isinstance(config["digest"], str)
            assert len(seeds) == len(config["scores"]) and isinstance(config.setdefault("failed", 0), int)
            config["by_seed"] = {int(s): read_number(v) for s, v in zip(seeds, config["scores"], strict=True)}
        for row in verdict["comparisons"]:
            assert {"better", "worse", "difference", "interval", "p", "seeds", "sentence"} <= row.keys()
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, AssertionError):
        notes.append("verdict.json is damaged and was left out; start the study again: its runs are kept.")
        return {}
    return verdict


def _outdated(verdict: Mapping[str, Any], config: Mapping[str, Any], trials: Iterable[Trial]) -> str:
    """Why a verdict is not that of the study as it stands now, which may have gone on since with more trials or without a
    final; empty where it is."""
    if config.get("verdict", {}) is None:
        return "it is from when the study had a final"
    chosen = {c["digest"] for c in verdict["configs"] if "winner" in (c.get("role"), *c.get("also", ()))}
    winners = {trial.digest for trial in trials if trial.state == "winner"}
    known = any(trial.state != "failed" for trial in trials)
    return "the study has gone on since, and has another winner or none yet" if known and chosen != winners else ""


def _final_cost(folder: StudyFolder, verdict: Mapping[str, Any], trials: Iterable[Trial]) -> Cost:
    """What the verdict's runs cost, as their folders say; those that the search has counted are left out."""
    searched = {(trial.digest, seed) for trial in trials for seed in trial.scores}
    cost = Cost(failed=sum(config["failed"] for config in verdict.get("configs", ())))
    for config in verdict.get("configs", ()):
        for seed in config["by_seed"]:
            if (config["digest"], seed) in searched:
                continue
            try:
                summary = json.loads(RunFolder(folder.unit(config["digest"], seed)).summary.read_bytes())
                steps, seconds = read_number(summary.get("steps")), read_number(summary.get("seconds"))
            except (OSError, ValueError, RecursionError, AttributeError):
                continue  # cleared away since
            if len(is_known([steps, seconds])) == 2:
                cost += Cost(1, int(steps), seconds)
    return cost


def _failed_runs(folder: StudyFolder, trials: Iterable[Trial]) -> int:
    """Runs of the search that came to no score, as their folders say: they broke off, or ended with a score that is none."""
    count = 0
    for trial in {t.digest: t for t in trials if t.digest and t.state == "failed"}.values():
        for path in folder.unit(trial.digest, 0).parent.glob("seed-*"):
            seed = path.name.removeprefix("seed-")
            fresh = not seed.isdecimal() or int(seed) >= FRESH or int(seed) in trial.scores
            count += not fresh and (read_failure(path) is not None or RunFolder(path).summary.exists())
    return count


def _at(value: Any, keys: Iterable[str]) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
