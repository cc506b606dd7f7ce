"""A run as one self-contained HTML page, and runs side by side.

A page is made from files alone (config.yaml, data.json, environment.json, metrics.csv, summary.json, drop_path.csv,
rates.csv, evaluation.json), so it can be made again anywhere, and from what a killed run left behind. Accuracies are
percentages; `seconds` counts from the run's start.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from files.durable import CheckpointError, save_text
from files.errors import ConfigError
from files.words import counted
from training.report.charts import compare_charts, rates_chart, rates_over_time_chart, run_charts, schedule_chart
from training.report.comparison import differing_classes, standing
from training.report.prediction_charts import calibration_chart, confusion_chart
from training.report.runs import read_run
from training.report.settings import between, command_to_repeat, from_defaults
from training.report.verdict import decisions, verdict
from training.report.words import (
    UNKNOWN,
    drop_path_settings,
    drop_path_verdict,
    format_count,
    format_duration,
    format_percent,
    format_rate,
    format_share,
    in_words,
    run_facts,
    run_origin,
    run_state,
    time_parts,
    time_verdict,
)
from training.run_folder import RunFolder


def page_templates(*folders: Path, **filters: Callable[..., Any]) -> jinja2.Environment:
    """Templates of reports: those in folders, and the page, style and figures of a run's report, which all share.

    Args:
        folders: Looked into first.
        filters: By name, beside `count`, `counted` and `duration`.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    templates.filters |= {"count": format_count, "counted": counted, "duration": format_duration, **filters}
    return templates


_TEMPLATES = page_templates(
    rate=format_rate,
    share=format_share,
    percent=format_percent,
    settings=drop_path_settings,
    sure=lambda share: f"{100 * share:.0f}\u00a0%" if math.isfinite(share) else UNKNOWN,
)


MOST_PAIRS = 10
MOST_CLASSES = 20
"""Rows of a table of classes."""


def write_report(run: Path, output: Path | None = None) -> Path:
    """Writes a run's page from the files of its folder and returns the page's path.

    Args:
        run: The folder.
        output: The page; None: report.html in the folder.

    Files that are missing or were cut off cost their part of the page and a note, never the page.

    Raises:
        ConfigError: `run` is not a run folder, or cannot be written to.
    """
    data = read_run(run)
    evidence, parts = data.evidence, time_parts(data)
    model, dataset = data.setting("model", "name"), data.setting("data", "dataset")
    html = _TEMPLATES.get_template("run.html.j2").render(
        title=f"{data.name}: {format_percent(data.final_top1)} top-1",
        run=data,
        subtitle=f"{in_words(model)} on {in_words(dataset)}",
        verdict=verdict(data),
        decisions=decisions(data),
        state=run_state(data),
        facts=run_facts(data),
        origin=run_origin(data),
        curves=run_charts(data) if data.epochs else [],
        settings=drop_path_settings(data),
        depth_verdict=drop_path_verdict(data.blocks),
        rates=rates_chart(data.blocks) if data.blocks else (),
        over_time=rates_over_time_chart(data),
        planned=schedule_chart(data),
        confusion=evidence and confusion_chart(evidence),
        calibration=evidence and calibration_chart(evidence),
        pairs=evidence.worst_pairs(MOST_PAIRS) if evidence else [],
        weakest=evidence.weakest(MOST_CLASSES) if evidence else [],
        times=parts,
        time_verdict=time_verdict(parts) if parts else "",
        differences=from_defaults(data),
        repeat=command_to_repeat(data),
    )
    return save_page(output or RunFolder(run).report, html)


def write_comparison(runs: Sequence[Path], output: Path) -> Path:
    """Writes one page that sets several runs side by side, what differs in their configs first, and returns its path.

    Raises:
        ConfigError: One of `runs` is not a run folder, or `output` cannot be written.
    """
    data = [read_run(run) for run in runs]
    names = [run.name for run in data]
    # folders of one name are told apart by their paths
    labels = [str(run.path) if names.count(run.name) > 1 else run.name for run in data]
    html = _TEMPLATES.get_template("compare.html.j2").render(
        title=f"{len(data)} runs compared" if len(data) != 1 else names[0],
        runs=data,
        labels=labels,
        dashes=("none", "7 3", "2 3", "8 3 2 3"),
        standing=standing(data, labels),
        differences=between(data),
        classes=differing_classes(data, MOST_CLASSES),
        curves=compare_charts(data),
    )
    return save_page(output, html)


def save_page(path: Path, text: str) -> Path:
    """Writes a page so that a reader never meets half of it, and returns its path.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        # a name that is no UTF-8, as file systems may hold, is shown by its bytes
        save_text(path, text.encode(errors="backslashreplace").decode())
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    return path
