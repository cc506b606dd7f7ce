"""What a search found, tried on seeds and data that it never saw: the winner against rate 0 and the published default.

Every contender is trained on the same fresh seeds and scored on a split that no search looked at, so that what made the
winner win by luck in the search does not count for it here. `tuning.statistics` compares.
"""

import datetime
import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from files.durable import save_text, settled
from files.errors import ConfigError, Failure, nearest
from files.words import counted
from layers.schedule import SETTINGS
from models.factory import model_facts
from training.config import DropPathSection, TrainConfig, dump_config
from training.data.build import build_datasets
from training.data.transforms import ImageSpec
from training.evaluating.part import Split, WantedData
from training.evaluating.validation import Request, validate
from training.metrics import evaluation_metrics
from training.run_folder import RunFolder
from tuning.statistics import Comparison, claim, compare, holm
from tuning.study import StudyFolder

Role = Literal["winner", "zero", "published", "runner-up"]

TEST_SCORES = "test.json"
"""In a unit's folder: what its best weights scored, and the hash of those weights."""

SEEN = {"val": "the validation part, which the search has seen", "train": "the training part"}
"""Splits that can be scored and prove little, in words."""


@dataclass(frozen=True)
class Contender:
    """A configuration in the final, and how it did.

    Attributes:
        role: Why it is there.
        parameters: Keys of the training config and the values.
        digest: Of the configuration.
        label: What people call it, see `label_of`.
        seeds: That were trained and scored.
        scores: Of each of them.
        also: Further roles that the same configuration has.
        failed: How many of its runs on fresh seeds have no score.
    """

    role: Role
    parameters: Mapping[str, Any]
    digest: str
    label: str
    seeds: Sequence[int]
    scores: Sequence[float]
    also: Sequence[Role] = ()
    failed: int = 0

    @property
    def by_seed(self) -> dict[int, float]:
        """The score of each seed."""
        return dict(zip(self.seeds, self.scores, strict=True))

    @property
    def roles(self) -> tuple[Role, ...]:
        """All its roles."""
        return (self.role, *self.also)


# ---- scoring ------------------------------------------------------------------------------------------------------


def check_metric(metric: str, *, key: str = "metric") -> str:
    """The name by which an evaluation gives the metric: `val_top1` is `top1` there.

    Raises:
        ConfigError: There is no such metric.
    """
    known = [m.column for m in evaluation_metrics()[0]]
    name = {"loss": "nll"}.get(metric.removeprefix("val_"), metric.removeprefix("val_"))
    if name not in known:
        raise ConfigError(f"{key}: unknown metric {metric!r}{nearest(metric, known)}; known: {', '.join(known)}")
    return name


def check_split(config: TrainConfig, split: str, *, key: str = "verdict.split") -> None:
    """Finds out, before a search begins, whether its verdict will have data to be scored on.

    Args:
        config: Of any unit.
        split: The part of its data to score on.
        key: What the user gave it by.

    Raises:
        ConfigError: The data have no such part, or it is empty; or the data cannot be had at all.
    """
    if split not in ("test", "val"):
        hint = nearest(split, ("test", "val"))
        raise ConfigError(f"{key}: must be 'test', or 'val' where there is none, got {split!r}{hint}")
    facts = model_facts(config.model.name, num_classes=config.model.num_classes, **config.model_arguments)
    spec = ImageSpec.of(facts.pretrained_cfg)
    data = build_datasets(config.data, config.augment, spec, seed=config.seed)
    part = data.test if split == "test" else data.val
    if part is None:
        raise ConfigError(
            f"{key}: dataset {config.data.dataset!r} has no {split} part here, and a claim needs data that no search saw\n"
            "give it one (a folder 'test', data.test_file, a split 'test'), or take 'val' and read the verdict as a hint"
        )
    if not len(part):
        raise ConfigError(f"{key}: the {split} part of dataset {config.data.dataset!r} has no samples")


def score_unit(folder: Path, *, split: str, metric: str) -> float:
    """What a unit's best weights score on a split; measured once and kept in the unit's folder with their hash.

    Args:
        folder: The run folder of a unit that is done.
        split: A part of its run's data, see `check_split`.
        metric: One of `training.metrics`, as in "top1".

    Raises:
        ConfigError: The run is not done, the data have no such part, or there is no such metric.
        ReadError: Of data that cannot be read.
    """
    name = check_metric(metric)
    weights = _hash_of_best(folder)
    kept = _read_scores(folder / TEST_SCORES)
    splits = kept["splits"] if kept.get("weights_sha256") == weights else {}
    values = splits.get(split, {}).get("metrics", {})
    if not isinstance(values.get(name), float):
        (evaluation,) = validate(Request([str(folder.absolute())], data=WantedData(split=cast(Split, split))))
        values = {key: float(value) for key, value in evaluation.metrics.items()}
        splits = splits | {split: {"samples": evaluation.samples, "metrics": values}}
        content = {"weights_sha256": weights, "splits": splits}
        save_text(folder / TEST_SCORES, json.dumps(content, indent=1) + "\n")
    return values[name]


def _hash_of_best(folder: Path) -> str:
    """The hash of a run's best weights, as the folder that holds them says."""
    path = settled(RunFolder(folder).best) / "config.json"
    try:
        return str(json.loads(path.read_bytes())["weights_sha256"])
    except FileNotFoundError:
        raise ConfigError(f"{folder}: holds no best weights yet, so that it cannot be scored") from None
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise Failure(
            f"{path}: cannot be read ({type(error).__name__}: {error}); remove the unit and start again"
        ) from None


def _read_scores(path: Path) -> dict[str, Any]:
    """What was scored before; nothing where the file is missing or damaged: it is measured again then."""
    try:
        content = json.loads(path.read_bytes())
        whole = all(isinstance(part["metrics"], dict) for part in content["splits"].values())
        return content if whole else {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


# ---- concluding ---------------------------------------------------------------------------------------------------


def conclude(
    folder: StudyFolder, configs: Sequence[Contender], *, metric: str = "top1", split: str = "test"
) -> dict[str, Any]:
    """Compares the winner with the others, writes verdict.json and returns what it holds.

    The p values are each comparison's own. With two of them, `p_holm` is what is left after Holm's correction; the
    sentences use the uncorrected ones, since each answers a question that was asked before the search began.

    Args:
        folder: Of the study.
        configs: The winner, and whatever it is compared with. One configuration in several roles may come several times.
        metric: What the scores are.
        split: Where they were measured.

    Raises:
        ConfigError: There is no winner among them, or no such metric.
    """
    name = check_metric(metric)
    of_metric = next(m for m in evaluation_metrics()[0] if m.column == name)
    unit, lower = "points" if of_metric.percent else of_metric.label, of_metric.sign < 0
    merged = _merge(configs)
    winner = next((c for c in merged if "winner" in c.roles), None)
    if winner is None:
        raise ConfigError("a verdict needs a winner, and no trial of the study came to its end")
    others = [c for c in merged if c is not winner]
    # the last word on what to use is a role's: the winner's, unless another one is shown to be better
    best, comparisons, clauses = winner, [], []
    for other in others:
        found = _paired(winner, other, lower=lower)
        ahead, behind = winner, other
        if found.difference < 0:
            ahead, behind = other, winner
            found = _paired(other, winner, lower=lower)
        if found.found and ahead is other and (best is winner or _paired(other, best, lower=lower).difference > 0):
            best = other
        sentence = claim(found, _called(ahead), _called(behind), unit=unit, lower=lower)
        clauses.append((found, ahead, behind))
        comparisons.append(_row(found, ahead, behind, sentence))
    known = [row for row in comparisons if row["p"] is not None]
    for row, p in zip(known, holm([row["p"] for row in known]), strict=True):
        row["p_holm"] = p
    lead = _lead(winner, best, alone=not clauses)
    # what the lead has named is "it" behind it
    names = {id(c): "it" if lead and c is winner else _called(c) for c in merged}
    told = [claim(found, names[id(a)], names[id(b)], unit=unit, lower=lower) for found, a, b in clauses]
    sentence = "; ".join(told) or "nothing else was run to compare it with"
    sentence = f"{lead}: {sentence}" if lead else sentence[0].upper() + sentence[1:]
    sentence += "".join(f"; {_failed(c)}" for c in merged if c.failed)
    sentence += f"; scored on {SEEN[split]}." if split in SEEN else "."
    verdict = {
        "metric": name,
        "split": split,
        "higher_is_better": not lower,
        "seeds": sorted({seed for c in merged for seed in c.seeds}),
        "configs": [
            {
                "role": c.role,
                "also": list(c.also),
                "digest": c.digest,
                "parameters": dict(c.parameters),
                "label": c.label,
                "seeds": list(c.seeds),
                "scores": list(c.scores),
                "failed": c.failed,
            }
            for c in merged
        ],
        "comparisons": comparisons,
        "recommended": best.role,
        "note": _note(len(known), split),
        "sentence": sentence,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    save_text(folder.verdict, json.dumps(verdict, indent=1) + "\n")
    return verdict


def _merge(configs: Sequence[Contender]) -> list[Contender]:
    """One entry for each configuration, its roles together; the winner first."""
    merged: dict[str, Contender] = {}
    for config in sorted(configs, key=lambda c: "winner" not in c.roles):
        before = merged.get(config.digest)
        if before is None:
            merged[config.digest] = config
        else:
            new = tuple(role for role in config.roles if role not in before.roles)
            merged[config.digest] = replace(before, also=(*before.also, *new))
    return _told_apart(list(merged.values()))


def _told_apart(configs: list[Contender]) -> list[Contender]:
    """With labels that differ: rates 0.1 and 0.1003 are both "rate 0.1 (linear)"."""
    labels = [c.label for c in configs]
    told = []
    for config in configs:
        alike = [c for c in configs if c.label == config.label]
        differ = [k for k, v in config.parameters.items() if any(c.parameters.get(k) != v for c in alike)]
        more = ", ".join(f"{key}: {config.parameters[key]}" for key in differ)
        told.append(
            replace(config, label=f"{config.label}, {more}") if labels.count(config.label) > 1 and more else config
        )
    return told


def _paired(first: Contender, second: Contender, *, lower: bool) -> Comparison:
    """How much better the first is."""
    return compare(second.by_seed, first.by_seed) if lower else compare(first.by_seed, second.by_seed)


def _called(contender: Contender) -> str:
    return f"the published {contender.label}" if contender.role == "published" else contender.label


def _failed(contender: Contender) -> str:
    """What the mean over its other seeds does not show: that it diverges now and then."""
    runs = contender.failed + len(contender.seeds)
    count = (
        f"{contender.failed} of {runs} runs" if contender.seeds else f"all {runs} runs" if runs > 1 else "the only run"
    )
    return f"{count} of {_called(contender)} failed and {'is' if contender.failed == 1 else 'are'} not counted"


def _row(found: Comparison, ahead: Contender, behind: Contender, sentence: str) -> dict[str, Any]:
    return {
        "better": ahead.role,
        "worse": behind.role,
        "difference": found.difference if found.seeds else None,
        "interval": None if found.interval is None else list(found.interval),
        "p": found.p,
        "seeds": len(found.seeds),
        "found": found.found,
        "sentence": sentence,
    }


def _lead(winner: Contender, best: Contender, *, alone: bool) -> str:
    """What the search found, where that says more than a comparison of the winner does; empty else."""
    if best is not winner:
        return f"The search's choice, {winner.label}, does not hold on fresh seeds"
    if {"zero", "published"} <= {*winner.roles}:
        return f"The best configuration found is {winner.label}, which is also the published default"
    if "zero" in winner.roles:
        return "The best rate found is 0"
    if "published" in winner.roles:
        return f"The best configuration found is the published default, {winner.label}"
    return f"The best configuration found is {winner.label}" if alone else ""


def _note(comparisons: int, split: str) -> str:
    notes = []
    if comparisons > 1:
        notes.append(
            f"p is each comparison's own, not corrected for there being {comparisons}; p_holm is corrected (Holm 1979)."
        )
    if split in SEEN:
        notes.append(f"The scores are of {SEEN[split]}: a hint, and no proof.")
    return " ".join(notes)


def write_best(folder: StudyFolder, config: TrainConfig, sentence: str) -> Path:
    """Writes best.yaml, a training config that runs as it is, and returns its path.

    Args:
        folder: Of the study.
        config: The configuration to use.
        sentence: The verdict's, or why there is none.
    """
    label = label_of(config)
    prose = [
        f"{label[0].upper()}{label[1:]}: the configuration to use, as the study {folder.path.resolve().name} found it.",
        sentence,
        "How it was found: report.html and trials.json beside this file. It is complete; to train it:",
    ]
    head = [line for text in prose for line in textwrap.wrap(text, 115, break_on_hyphens=False, break_long_words=False)]
    head.append(f"  {shlex.join(['python', 'train.py', '--config', str(folder.best)])}")
    save_text(folder.best, "".join(f"# {line}\n" for line in head) + dump_config(config))
    return folder.best


# ---- what a configuration is called -------------------------------------------------------------------------------


def label_of(config: TrainConfig, parameters: Mapping[str, Any] | None = None) -> str:
    """What people call a configuration: "rate 0.12 (linear)", "rate 0.3 (constant, early 15 epochs)".

    Args:
        config: The training config.
        parameters: What the search varied: keys outside of drop_path are told as well.
    """
    section = config.drop_path
    text = _rate(section, config)
    told = [
        f"{key.removeprefix('optim.').replace('_', ' ')} {_value(value)}"
        for key, value in (parameters or {}).items()
        if not key.startswith("drop_path.")
    ]
    return ", ".join([text, *told])


def _rate(section: DropPathSection, config: TrainConfig) -> str:
    profile = section.profile
    if isinstance(profile, list):
        if not any(profile):
            return "rate 0"
        text = f"{len(profile)} rates of {min(profile):.3g} to {max(profile):.3g}"
        return text if section.schedule.kind == "constant" else f"{text} ({_schedule(section)})"
    rate = section.rate
    if rate is None:  # the model's own, as training takes it
        model = config.model
        rate = model_facts(model.name, num_classes=model.num_classes, **config.model_arguments).drop_path_rate or 0.0
    if rate == 0:
        return "rate 0"
    words = [profile.replace("_", " "), *([_schedule(section)] if section.schedule.kind != "constant" else [])]
    meaning = {"max": "rate", "mean": "mean rate", "expected_macs": "share of compute dropped"}[section.rate_is]
    return f"{meaning} {rate:.3g} ({', '.join(words)})"


def _schedule(section: DropPathSection) -> str:
    """A schedule in two or three words."""
    schedule = section.schedule
    words: list[str] = [schedule.kind]
    if "shape" in SETTINGS[schedule.kind] and schedule.shape == "constant":
        words.append("constant")
    if schedule.cutoff_epochs is not None:
        words.append(counted(schedule.cutoff_epochs, "epoch"))
    return " ".join(words)


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
