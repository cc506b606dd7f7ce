"""A report's sentences and how it writes numbers."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from training.metrics import METRICS, Metric
from training.report.runs import NAN, Block, Run, read_number

UNKNOWN = "\u2013"  # an en dash where a value is not there


def format_percent(value: float, digits: int = 2) -> str:
    """A percentage, 0 to 100; a dash where it is unknown."""
    return UNKNOWN if math.isnan(value) else f"{value:.{digits}f}\u00a0%"


def format_share(value: float) -> str:
    """A share, 0 to 1, as a percentage."""
    return format_percent(100 * value, 1)


def format_rate(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:.3f}"


def format_count(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:,.0f}"


def format_duration(seconds: float) -> str:
    if math.isnan(seconds):
        return UNKNOWN
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _memory(megabytes: float) -> str:
    if math.isnan(megabytes):
        return UNKNOWN
    return f"{megabytes:,.0f} MB" if megabytes < 10_000 else f"{megabytes / 1024:,.1f} GB"


def in_words(value: Any) -> str:
    """A value of a JSON or YAML file on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(in_words(item) for item in value)
    return UNKNOWN if value is None else str(value)


def _epochs(run: Run) -> str:
    """Epochs done, and out of how many where the run has not finished."""
    planned = run.setting("optim", "epochs")
    return str(run.epochs) if run.finished or planned is None else f"{run.epochs} of {in_words(planned)}"


def run_state(run: Run) -> str:
    """How far the run has come."""
    if not run.epochs:
        return "No epoch has been finished yet."
    state, which = ("Finished", "final") if run.finished else ("Not finished,", "latest")
    epochs = _epochs(run) + (" epoch" if _epochs(run) == "1" else " epochs")
    best = f"best {format_percent(run.best_top1)}"
    best += "" if math.isnan(run.best_epoch) else f" at epoch {run.best_epoch:.0f}"
    return (
        f"{state} {epochs} in {format_duration(run.seconds)}: {which} top-1 {format_percent(run.final_top1)}, {best}."
    )


def _measured(metric: Metric, values: Sequence[float]) -> str:
    """The last value of a metric."""
    value = values[-1] if values else NAN
    if metric.percent or math.isnan(value):
        return format_percent(value)
    return f"{value:{metric.form}}".strip()


def many(run: Run) -> bool:
    """Whether there are so many classes that the five likeliest are not all of them."""
    return run.classes is None or run.classes > 5


def run_facts(run: Run) -> list[tuple[str, str]]:
    which = "Final" if run.finished else "Latest"
    others = [m for m in METRICS if m.column not in ("val_loss", "val_top1") and (m.column != "val_top5" or many(run))]
    return [
        (f"{which} top-1", format_percent(run.final_top1)),
        ("Best top-1", format_percent(run.best_top1)),
        *((f"{which} {metric.label}", _measured(metric, run.metrics[metric.column])) for metric in others),
        ("Epochs", _epochs(run)),
        ("Training time", format_duration(run.seconds)),
        ("Images/s", format_count(run.images_per_second)),
        ("Peak memory", _memory(read_number(run.summary.get("peak_memory_mb")))),
        ("Steps", format_count(run.steps)),
        ("Compute saved", format_share(run.compute_saved)),
    ]


class TimePart(NamedTuple):
    """A part of a run's time."""

    name: str
    seconds: float
    share: float


def time_parts(run: Run) -> list[TimePart]:
    """Where the time went: computing, waiting for data, validation; empty where summary.json does not tell."""
    train, waiting = (read_number(run.summary.get(key)) for key in ("train_seconds", "data_share"))
    total = read_number(run.summary.get("seconds"))
    if not total >= train > 0 or not 0 <= waiting <= 1:
        return []
    seconds = {"Training": train * (1 - waiting), "Waiting for data": train * waiting, "Validation": total - train}
    return [TimePart(name, value, value / total) for name, value in seconds.items()]


def time_verdict(parts: Sequence[TimePart]) -> str:
    """What to do about it."""
    share = {part.name: part.share for part in parts}
    if share["Waiting for data"] > 0.2:
        return "The data hold the run up: more data.workers, smaller files or a faster disk would shorten it."
    if share["Validation"] > 0.3:
        return "Validation takes much of the time: log.validate_every makes it rarer."
    return "Neither data nor validation hold the run up: only less or faster compute would shorten it."


_ORIGIN = {
    "Machine": ("device", "processor", "processes", "threads", "cpu_count", "platform"),
    "Versions": ("python", "torch", "torchvision", "timm", "numpy", "cuda", "compiler"),
}


def run_origin(run: Run) -> list[tuple[str, str]]:
    """How the run was made: command, machine and versions, then whatever else environment.json says."""
    rest = {key: value for key, value in run.environment.items() if value is not None}
    rows = [("Command", in_words(rest.pop("command", None)))]
    for title, keys in _ORIGIN.items():
        group = {key.replace("_", " "): rest.pop(key) for key in keys if key in rest}
        rows += [(title, in_words(group))] if group else []
    rows += [(key.replace("_", " ").capitalize(), in_words(value)) for key, value in rest.items()]
    if "weights_sha256" in run.summary:
        rows.append(("Weights sha256", in_words(run.summary["weights_sha256"])))
    return rows


def drop_path_settings(run: Run) -> str:
    section = run.setting("drop_path")
    if not isinstance(section, dict):
        return UNKNOWN
    words = []
    for key, value in section.items():
        if key == "rate" and value is None:
            words.append("rate of the model")
        elif key == "schedule" and isinstance(value, dict):
            rest = in_words({k: v for k, v in value.items() if k != "kind"})
            words.append(f"schedule {value.get('kind')}" + (f" ({rest})" if rest else ""))
        elif isinstance(value, list):
            words.append(f"{key} of {len(value)} rates")
        elif isinstance(value, dict):
            words.append(f"{key} ({in_words(value)})")
        elif value is not None:
            words.append(f"{key} {value}")
    return ", ".join(words)


def drop_path_verdict(blocks: Sequence[Block]) -> str:
    """What the chart of rates shows, and what was saved, in one line."""
    drawn = [b for b in blocks if not math.isnan(b.realised)]
    if not drawn:
        return "No sample has been drawn for yet."
    dropped = statistics.fmean(b.realised for b in drawn)
    skipped = statistics.fmean(b.skipped for b in drawn)
    shows = (
        "Each training sample bypasses a block's branches with the block's own rate: pale bars are the rates asked "
        "for, coloured bars the shares really dropped, lower where a schedule scales the rates down."
    )
    if skipped == 0.0 < dropped:
        saved = f" {format_share(dropped)} of all branch computations were dropped by a mask, none of them skipped."
    elif not math.isclose(skipped, dropped):
        saved = (
            f" {format_share(skipped)} of all branch computations were skipped; {format_share(dropped)} were "
            "dropped in all."
        )
    else:
        saved = f" {format_share(skipped)} of all branch computations were skipped, never computed."
    return shows + saved + compute_saved(blocks)


def compute_saved(blocks: Sequence[Block]) -> str:
    """What that is of the model's compute."""
    known = [b.saved for b in blocks if not math.isnan(b.saved)]
    if not known:
        return ""
    share = math.fsum(known)
    if share < 0.0005:
        return " No compute of the model was saved by it."
    return f" That saved {format_share(share)} of the multiply-adds of a training step's forward pass."
