"""What a study of removed blocks leaves: lines for people, blocks.json, blocks.csv and blocks.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from files.durable import save_text
from files.errors import Failure
from files.strict_json import json_text
from files.words import counted
from training.evaluating.blocks import FLOOR, BlockStudy, Row
from training.evaluating.results import csv_text
from training.metrics import evaluation_metrics

_POINT = 1.0
"""Top-1 that a reader may give away for speed: what the last line speaks of."""

_MOST_NAMES = 40  # of blocks at the axis of the picture; of more, numbers do


def describe_study(study: BlockStudy) -> str:
    """A study in a table, and in the sentence that a reader decides by."""
    how = {
        "one": "each block removed alone",
        "greedy": f"in each round that block removed which {study.selected_on} misses least",
        "list": "the named blocks removed",
    }[study.wanted.kind]
    fixed = [block for block in study.blocks if not block.removable]
    lines = [
        f"{study.text}: {study.weights}; {how}",
        f"  data      {study.dataset}, {study.split}: {counted(study.samples, 'image')}; {study.precision} on {study.device}",
    ]
    if fixed:
        reasons: dict[str, list[str]] = {}
        for block in fixed:
            reasons.setdefault(block.reason, []).append(f"{block.number} ({block.name})")
        lines += [f"  stays     {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    batches = list(study.rows[0].latency)
    labels = [_label(study, row) for row in study.rows]
    width = max(len("without"), *map(len, labels))
    head = [f"{'without':<{width}}", f"{'top-1':>6}", f"{'NLL':>7}", f"{'ECE':>6}", f"{'params':>8}", f"{'compute':>7}"]
    head += [f"{f'batch {batch}':>16}" for batch in batches]
    lines.append("  " + "  ".join(head))
    for label, row in zip(labels, study.rows, strict=True):
        compute = "-" if row.compute is None else f"{100 * row.compute:.0f} %"
        cells = [
            f"{label:<{width}}",
            f"{row.metrics['top1']:>6.2f}",
            f"{row.metrics['nll']:>7.4f}",
            f"{row.metrics['ece']:>6.2f}",
            f"{row.parameters / 1e6:>6.2f} M",
            f"{compute:>7}",
        ]
        times = [f"{time.milliseconds:.1f} ms {time.ratio:.2f} x" for time in row.latency.values()]
        lines.append("  " + "  ".join([*cells, *(f"{time:>16}" for time in times)]) + ("  *" if row.obstacle else ""))
    lines += [f"  * {reason}: export.py cannot write it" for reason in sorted({r.obstacle for r in study.rows} - {""})]
    lines += [f"  note      {note}" for note in study.notes]
    if warning := optimism(study):
        lines.append(f"  warning   {warning}")
    lines.append(f"  {sentence(study)}")
    return "\n".join(lines)


def _label(study: BlockStudy, row: Row) -> str:
    """What a row is called: the block that went last, or the whole set."""
    if not row.removed:
        return "(whole model)"
    if study.wanted.kind == "greedy":
        return f"{len(row.removed)}: {_numbered(study, row.removed[-1])}"
    return ", ".join(_numbered(study, name) for name in row.removed)


def _numbered(study: BlockStudy, name: str) -> str:
    number = next(block.number for block in study.blocks if block.name == name)
    return f"{number} ({name})"


def optimism(study: BlockStudy) -> str:
    """What is wrong with figures of blocks that were chosen by the same figures."""
    if not study.optimistic:
        return ""
    advice = ": --split test chooses on val and reports test" if study.could_test else ""
    return f"the blocks were chosen on {study.split}, which is what is reported: these figures are optimistic{advice}"


def sentence(study: BlockStudy) -> str:
    """What can be removed at little cost, in one sentence."""
    whole, *rows = study.rows
    top1 = whole.metrics["top1"]
    if study.wanted.kind == "one":
        best = max(rows, key=lambda row: (row.metrics["top1"], -row.metrics["nll"]))
        worst = min(rows, key=lambda row: (row.metrics["top1"], -row.metrics["nll"]))
        return (
            f"missed least: {_numbered(study, best.removed[0])}, top-1 {_points(best, top1)}; "
            f"missed most: {_numbered(study, worst.removed[0])}, {_points(worst, top1)} points"
        )
    if study.wanted.kind == "list":
        (row,) = rows
        return f"without {_count(row)}: top-1 {row.metrics['top1']:.2f} ({_points(row, top1)} points){_speed(row)}"
    # how many is a choice as well: it is made where the blocks were chosen
    chosen_on = [row for row in rows if _lost(whole, row) <= _POINT]
    if not chosen_on:
        return f"no block can go for {_POINT:g} point of top-1 on {study.selected_on} or less"
    row = chosen_on[-1]
    words = ",".join(str(next(b.number for b in study.blocks if b.name == name)) for name in row.removed)
    change = 0.0 - _lost(whole, row)  # and not -0.00
    on = "" if study.optimistic else f" and {_points(row, top1)} on {study.split}"
    return (
        f"{_count(row)} can go for {_POINT:g} point of top-1 or less ({change:+.2f} on {study.selected_on}{on})"
        f"{_speed(row)}: --drop-blocks {words}"
    )


def _lost(whole: Row, row: Row) -> float:
    """Points of top-1 lost where the choice was made."""
    assert whole.selection is not None and row.selection is not None
    return whole.selection["top1"] - row.selection["top1"]


def _count(row: Row) -> str:
    return counted(len(row.removed), "block")


def _points(row: Row, top1: float) -> str:
    return f"{row.metrics['top1'] - top1:+.2f}"


def _speed(row: Row) -> str:
    times = [f"{time.ratio:.2f} of the time at batch {batch}" for batch, time in row.latency.items()]
    return f"; {' and '.join(times)}" if times else ""


# ---- files --------------------------------------------------------------------------------------------------------


STUDY_FILES = ("blocks.json", "blocks.csv", "blocks.png")
"""What `write_study` writes."""


def write_study(study: BlockStudy, folder: Path) -> None:
    """blocks.json, blocks.csv and blocks.png, each replacing the one of before.

    Raises:
        Failure: One could not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"{folder}: cannot be made: {error.strerror}") from None
    rows = [_row(row) for row in study.rows]
    facts = {
        "model": study.text,
        "weights": study.weights,
        "kind": study.wanted.kind,
        "dataset": study.dataset,
        "split": study.split,
        "selected_on": study.selected_on or None,
        "floor": FLOOR if study.wanted == type(study.wanted)("greedy") else None,
        "samples": study.samples,
        "device": study.device,
        "precision": study.precision,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "blocks": [{"number": b.number, "name": b.name, "stays": b.reason or None} for b in study.blocks],
        "rows": rows,
        "sentence": sentence(study),
        "warning": optimism(study) or None,
        "notes": list(study.notes),
    }
    save_text(folder / "blocks.json", json_text(facts))
    flat = [_flat(row) for row in rows]
    save_text(folder / "blocks.csv", csv_text(list(flat[0]), [list(row.values()) for row in flat]))
    draw_study(study, folder / "blocks.png")


def _row(row: Row) -> dict[str, Any]:
    names = {metric.column for metric in evaluation_metrics()[0]}
    return {
        "removed": list(row.removed),
        **{key: round(value, 6) for key, value in row.metrics.items() if key in names},
        "selection": None if row.selection is None else {k: round(v, 6) for k, v in row.selection.items()},
        "compute": None if row.compute is None else round(row.compute, 6),
        "parameters": row.parameters,
        "latency": {
            str(batch): {"milliseconds": round(time.milliseconds, 4), "ratio": round(time.ratio, 4)}
            for batch, time in row.latency.items()
        },
        "cannot_be_written": row.obstacle or None,
    }


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the JSON as a row of the CSV."""
    flat = {"count": len(row["removed"]), "removed": " ".join(row["removed"])}
    for key, value in row.items():
        if key == "latency":
            for batch, time in value.items():
                flat[f"batch_{batch}_ms"], flat[f"batch_{batch}_ratio"] = time["milliseconds"], time["ratio"]
        elif key == "selection":
            flat["selection_top1"] = "" if value is None else value["top1"]
        elif key not in ("removed",):
            flat[key] = "" if value is None else value
    return flat


def draw_study(study: BlockStudy, path: Path) -> None:
    """Draws top-1, and below it latency, over the removed blocks.

    Raises:
        Failure: It could not be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = study.rows
    places = list(range(len(rows)))
    top1 = [row.metrics["top1"] for row in rows]
    few = len(rows) <= _MOST_NAMES
    # the name of a run's folder may hold a $
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(max(5.5, 2.2 + 0.42 * len(rows)) if few else 18.0, 5.6), dpi=130, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        if study.wanted.kind == "greedy":
            above.plot(places, top1, color="#2f6db5", marker="o", markersize=4, label=study.split)
            if not study.optimistic:
                chosen = [row.selection["top1"] for row in rows if row.selection is not None]
                above.plot(places, chosen, color="#9cc0e7", linestyle="--", label=f"{study.selected_on} (chosen on)")
                above.legend(frameon=False)
        else:
            above.axhline(top1[0], color="#6b7480", linewidth=1, linestyle="--")
            above.vlines(places, top1[0], top1, color="#2f6db5", linewidth=2)
            above.scatter(places, top1, color=["#6b7480"] + ["#2f6db5"] * (len(rows) - 1), zorder=3)
        above.set_ylabel("top-1 in %")
        above.set_title(f"{_cut(study.text)}: blocks removed, on {study.split}", loc="left", fontsize=10)
        for colour, marker, batch in zip(("#2f6db5", "#d9661f"), "os", rows[0].latency, strict=False):
            ratios = [row.latency[batch].ratio for row in rows]
            below.plot(places, ratios, color=colour, marker=marker, markersize=4, label=f"batch {batch}")
        below.set_ylim(bottom=0)
        below.set_ylabel("time, of the whole model's")
        if rows[0].latency:
            below.legend(frameon=False)
        if few:
            below.set_xticks(places, [_tick(study, row) for row in rows], rotation=90)
        else:
            below.set_xlabel("row of blocks.csv")
        for axes in (above, below):
            axes.grid(axis="y", color="#e3e7ec", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        try:
            figure.savefig(path, metadata={"Software": None})
        except OSError as error:
            raise Failure(f"{path}: cannot be written: {error.strerror}") from None


def _tick(study: BlockStudy, row: Row) -> str:
    if not row.removed:
        return "whole model"
    if study.wanted.kind == "list":
        return f"without {_count(row)}"
    name = row.removed[len(row.removed) - 1]
    return f"+ {name}" if study.wanted.kind == "greedy" and len(row.removed) > 1 else name


def _cut(text: str, length: int = 50) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"
