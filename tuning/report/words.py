"""The sentences of a study's page, and how it writes what was tried."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from files.words import counted
from training.metrics import evaluation_metrics
from training.report.words import UNKNOWN, format_count, format_duration, in_words
from tuning.report.reading import RATE, Cost, Study, value_in_words
from tuning.statistics import ALIKE, FEWEST_SEEDS, format_p, is_point
from tuning.study import Trial

PERCENT = {metric.column for metric in evaluation_metrics()[0] if metric.percent}
"""Metrics of a verdict that are percentages."""

STATES = {
    "waiting": "not run yet",
    "racing": "in the race",
    "dropped": "dropped",
    "winner": "winner",
    "failed": "failed",
}
ORIGINS = {"zero": "rate 0", "published": "published", "advice": "advisor", "given": "given by you"}
SAMPLERS = {"gp": "Gaussian process", "tpe": "TPE", "random": "random", "grid": "grid"}
ROLES = {"winner": "winner of the search", "zero": "no drop path", "published": "published default",
         "runner-up": "next best of the search"}  # fmt: skip


def axis_name(key: str) -> str:
    """A key of the training config as people say it."""
    return "drop-path rate" if key == RATE else short_name(key)


def short_name(key: str) -> str:
    """A key without its section where that says nothing: `drop_path.rate` is rate, `optim.lr` is lr."""
    for section in ("drop_path.", "optim."):
        key = key.removeprefix(section)
    return key.replace(".", " ").replace("_", " ")


def number(value: float) -> str:
    """A score."""
    return UNKNOWN if math.isnan(value) else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"


def origin(trial: Trial) -> str:
    """Who proposed it."""
    word = trial.origin.lower().removesuffix("sampler")
    return ORIGINS.get(trial.origin) or SAMPLERS.get(word, trial.origin)


def called(trial: Trial, parameters: list[str] | None = None) -> str:
    """A trial by what was varied: "rate 0.12, profile linear"."""
    keys = [key for key in parameters or trial.parameters if key in trial.parameters]
    return ", ".join(f"{short_name(key)} {value_in_words(trial.parameters[key])}" for key in keys) or "as given"


def verdict_sentence(study: Study) -> str:
    """What to use and how sure that is; before the final, where the search stands."""
    if study.verdict:
        return study.verdict["sentence"]
    if not study.trials:
        return "Nothing has been tried yet."
    failed = [t for t in study.trials if t.state == "failed"]
    if len(failed) == len(study.trials):
        count = len(failed)
        first = f"{'All ' if count > 1 else 'The only '}{count if count > 1 else ''}".strip()
        reason = failed[0].reason.splitlines()[0] if failed[0].reason else "no reason was noted"
        return f"{first} trial{'s' if count > 1 else ''} failed, so there is nothing to choose from: {reason}"
    if not study.scored:
        return f"No run is done yet; {_trials(len(study.trials))} wait{'s' if len(study.trials) == 1 else ''} for it."
    best = study.winner or next((t for t in study.scored if t.state != "failed"), study.scored[0])
    seeds = len(best.scores)
    over = f"over {counted(seeds, 'seed')}"
    what = f"{called(best, study.parameters)} ({study.metric.label} {number(best.mean)} {over})"
    if study.winner is not None and study.config.get("verdict", {}) is None:
        return f"No final was asked for: the search chose {what}, and its lead may be luck."
    if study.winner is not None:
        return (
            f"No verdict yet: the search chose {what}. Whether it beats rate 0, runs on fresh seeds will tell; "
            "until then its lead may be luck."
        )
    waiting = sum(t.state in ("waiting", "racing") for t in study.trials)
    return (
        f"No verdict yet: the search is not at its end, {waiting} of {_trials(len(study.trials))} "
        f"{'is' if waiting == 1 else 'are'} still in the race. Best so far: {what}."
    )


def _trials(count: int) -> str:
    return counted(count, "trial")


def subtitle(study: Study) -> str:
    """Which model on which data, and what was tried, which of a range is not all."""
    told = []
    model, data = study.train_setting("model", "name"), study.train_setting("data", "dataset")
    if model is not None and data is not None:
        told.append(f"{in_words(model)} on {in_words(data)}")
        few = study.train_setting("data", "train_samples")
        told[-1] += f" ({format_count(float(few))} training images)" if isinstance(few, int) else ""
        epochs = study.train_setting("optim", "epochs")
        told += [f"{counted(epochs, 'epoch')} a run"] if isinstance(epochs, int) else []
    if study.parameters and study.trials:
        told.append(f"tried: {', '.join(axis_name(key) + _range(study, key) for key in study.parameters)}")
    return "; ".join(told)


def _range(study: Study, key: str) -> str:
    values = [t.parameters[key] for t in study.trials if key in t.parameters]
    if key in study.numbers:
        low, high = value_in_words(min(values)), value_in_words(max(values))
        return f" {low}" if low == high else f" {low} to {high}"
    return ""


def facts(study: Study) -> list[tuple[str, str]]:
    """What to use, what that rests on and what it cost."""
    told: list[tuple[str, str]] = []
    if chosen := recommended(study):
        known = [v for v in chosen["by_seed"].values() if not math.isnan(v)]
        told.append(("Use", chosen["label"]))
        metric, split = study.verdict.get("metric", "score"), study.verdict["split"]
        mean = math.fsum(known) / len(known) if known else math.nan
        told.append((f"Its {metric} ({split})", number(mean) + ("\u00a0%" if metric in PERCENT and known else "")))
        lost = f", {chosen['failed']} more failed" if chosen.get("failed") else ""
        told.append(("Rests on", f"{counted(len(known), 'fresh seed')}{lost}"))
    failed = sum(t.state == "failed" for t in study.trials)
    tried = _trials(len(study.trials)) + (f", {failed} failed" if failed else "")
    told.append(("Tried", tried))
    told.append(("Search", _cost(study.search)))
    if study.final.runs or study.final.failed:
        told.append(("Verdict", _cost(study.final)))
    total = study.search + study.final
    told.append(("Training time", format_duration(total.seconds) if total.runs else UNKNOWN))
    return told


def _cost(cost: Cost) -> str:
    failed = f"; {counted(cost.failed, 'run')} that failed not counted" if cost.failed else ""
    return f"{counted(cost.runs, 'run')}, {counted(cost.steps, 'step')}{failed}"


def recommended(study: Study) -> dict[str, Any]:
    """The verdict's configuration to use; empty before there is one."""
    configs = study.verdict.get("configs", [])
    wanted = study.verdict.get("recommended", "winner")
    return next((c for c in configs if wanted in roles_of(c)), {})


def roles_of(config: Mapping[str, Any]) -> list[str]:
    return [config.get("role", ""), *config.get("also", [])]


def roles(config: Mapping[str, Any]) -> str:
    """Why a configuration is in the final."""
    return ", ".join(ROLES.get(role, role) for role in roles_of(config))


def comparisons(study: Study) -> list[dict[str, str]]:
    """Rows of the table of comparisons."""
    labels = {role: c["label"] for c in study.verdict.get("configs", []) for role in roles_of(c)}
    percent = study.verdict.get("metric") in PERCENT
    rows = []
    for row in study.verdict.get("comparisons", []):
        form = "+.2f" if percent else "+.3g"
        rows.append(
            {
                "better": labels.get(row["better"], row["better"]),
                "worse": labels.get(row["worse"], row["worse"]),
                "difference": UNKNOWN if row["difference"] is None else f"{row['difference']:{form}}",
                "interval": _interval(row["interval"], form),
                "p": _p(row["p"]),
                "holm": _p(row.get("p_holm")),
                "seeds": str(row["seeds"]),
                "says": _says(row),
            }
        )
    return rows


def _interval(found: Sequence[float] | None, form: str) -> str:
    if found is None:
        return UNKNOWN
    low, high = found
    return ALIKE if is_point((low, high)) else f"{low:{form}} to {high:{form}}"


def _p(value: float | None) -> str:
    return UNKNOWN if value is None else format_p(value).removeprefix("p = ").removeprefix("p ")


def _says(row: Mapping[str, Any]) -> str:
    if row["seeds"] < FEWEST_SEEDS:
        return "too few seeds to tell"
    return "a difference" if row.get("found", row["p"] is not None and row["p"] < 0.05) else "no difference found"


def seed_rows(study: Study) -> list[tuple[str, list[str]]]:
    """Rows of the table of the final: a seed and the score of each configuration; then the means."""
    configs = study.verdict.get("configs", [])
    seeds = sorted({seed for config in configs for seed in config["by_seed"]})
    rows = [(str(seed), [number(c["by_seed"].get(seed, math.nan)) for c in configs]) for seed in seeds]
    common = len(study.final_seeds)
    name = "mean" if common == len(seeds) else f"mean of the {common} that all have"
    return [*rows, (name, [number(study.final_mean(c)) for c in configs])]


def importance_sentence(study: Study, shares: Mapping[str, float]) -> str:
    """What the ranking says, or why there is none."""
    if shares:
        first = next(iter(shares))
        return (
            f"Of what was varied, {axis_name(first)} made the most difference: {100 * shares[first]:.0f}\u00a0% of the "
            "variance of the trials' scores that a forest of trees can explain (fANOVA, over the range that was tried)."
        )
    if len(study.parameters) < 2:
        return "Only one thing was varied, so there is nothing to rank."
    return f"{_trials(len(study.scored))} with a score are too few to rank {len(study.parameters)} parameters; 10 are needed."


def curve_sentence(study: Study) -> str:
    """What the curve can tell."""
    told = (
        "Scores here are of the validation part, which the search looked at: good for the shape of the curve, a little "
        "too good for its lowest point."
    )
    others = [axis_name(key) for key in study.numbers[1:]]
    if study.axis is not None and others:
        told += (
            f" {' and '.join(others)} varied as well, which scatters the points; the line is the mean of what was tried "
            "near each value."
        )
    return told


def race_sentence(study: Study, rounds: list[int]) -> str:
    """Who went on, and what that says."""
    if len(rounds) < 2:
        seeds = rounds[0] if rounds else 1
        return f"Every trial has {counted(seeds, 'seed')} at most so far: no round has dropped any."
    counts = [sum(len(t.scores) >= n for t in study.scored) for n in rounds]
    steps = "; ".join(f"{count} had {counted(n, 'seed')}" for count, n in zip(counts, rounds, strict=True))
    return (
        f"More seeds were spent only on trials that may win: {steps}. Those that went on did so on their first seeds, "
        "so that their means flatter them a little; the verdict's fresh seeds do not."
    )


def command(study: Study) -> str:
    """What repeats the study in a folder of its own."""
    return f"python tune.py --config {study.folder.config} --output {study.folder.path}-again"
