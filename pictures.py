"""Draws every picture of README and docs, in one palette: `python pictures.py`."""

import argparse
import io
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from files.durable import make_folder, save_text
from files.errors import ConfigError, run_command
from layers.drop_path import DropPath
from layers.rates import ProfileName, drop_path_rates
from layers.schedule import DropPathSchedule
from models.config import MetaFormerConfig
from models.registry import list_models, model_config
from training.report.charts import NO_METADATA, draw_heat_map

# One palette for every picture.
COLOURS = (
    "#2f6db5",
    "#d9661f",
    "#3a8f5d",
    "#8a5fb0",
    "#b8860b",
    "#c0392b",
    "#16808a",
    "#6b7480",
    "#a0527a",
    "#556b2f",
)
BLUE, ORANGE = COLOURS[:2]
INK, GREY, LINE, BAND, PALE = "#1b1f24", "#6b7480", "#e3e7ec", "#e9edf2", "#9cc0e7"
MARKERS = "osD^vPX*<>"


def families(configs: Sequence[MetaFormerConfig]) -> dict[str, list[tuple[float, float]]]:
    """Published (MACs, top-1) by family, the name up to its first `_`: each in order of cost, the best family first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for config in configs:
        facts = config.published
        if facts and facts.macs is not None and facts.top1 is not None:
            found.setdefault(config.name.partition("_")[0], []).append((facts.macs, facts.top1))
    by_top1 = sorted(found.items(), key=lambda item: (-max(top1 for _, top1 in item[1]), item[0]))
    return {family: sorted(points) for family, points in by_top1}


def draw_zoo(configs: Sequence[MetaFormerConfig]) -> str:
    """SVG of published top-1 over multiply-accumulates, a line per family; the same bytes each time."""
    # Text as paths: a README is read on machines with other fonts. The salt and the missing date fix the bytes.
    rc: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "zoo", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(rc):
        figure = Figure(figsize=(9, 5.4))
        axes = figure.add_axes((0.075, 0.11, 0.755, 0.76))
        ends = []
        for number, (family, points) in enumerate(families(configs).items()):
            xs, ys = zip(*points, strict=True)
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.plot(xs, ys, color=colour, marker=marker, markersize=5.5, linewidth=1.6, clip_on=False)
            ends.append((ys[-1], xs[-1], family, colour))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16, 32, 64, 128, 256]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=9, labelcolor=GREY)
        axes.set_xlabel(
            "multiply-accumulates per image in billions, as published (logarithmic)", fontsize=9, color=GREY
        )
        figure.text(0.02, 0.945, "The zoo: published ImageNet-1k top-1 in %", fontsize=13, fontweight="bold", color=INK)
        figure.text(
            0.02, 0.905, "trained on ImageNet-1k alone, at each model's own size; a line is a family, its marks are sizes",
            fontsize=9, color=GREY,
        )  # fmt: skip
        low, high = axes.get_ylim()
        gap, last = (high - low) / 26, high + 1.0
        for y, x, family, colour in sorted(ends, reverse=True):  # labels at the right edge, pushed apart
            place = min(y, last - gap)
            axes.annotate(
                family, (x, y), (1.015, (place - low) / (high - low)), textcoords="axes fraction", va="center",
                fontsize=9.5, color=colour, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5},
            )  # fmt: skip
            last = place
        axes.set_ylim(low, high)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=NO_METADATA, facecolor="white")
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)


_S24_DEPTHS = (4, 4, 12, 4)  # PoolFormer-S24
_RATES_RATE = 0.3
_BATCH_RATE = 0.4
_BATCH_SIZE = 16
_SEED = 0
_STAGE_GAP = 0.8  # in blocks


def write_pictures(folder: Path) -> list[Path]:
    """Writes zoo.svg, depth.svg, tuning.svg and those of drop path (rates, batch, schedules), the same bytes each time.

    Also step.svg, where a training step was measured.

    Returns:
        Their paths.

    Raises:
        ConfigError: The folder is none, or cannot be made.
        CheckpointError: A picture cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder")
    try:
        make_folder(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
    pictures = {
        "drop_path_rates.svg": draw_rates,
        "drop_path_batch.svg": draw_batch,
        "drop_path_schedules.svg": draw_schedules,
        "tuning.svg": lambda: draw_tuning(json.loads(TUNING.read_text(encoding="utf-8"))),
        "depth.svg": lambda: draw_depth(json.loads(DEPTH.read_text(encoding="utf-8"))),
    }
    if STEP.exists():
        pictures["step.svg"] = lambda: draw_speed(json.loads(STEP.read_text(encoding="utf-8")))
    texts = {name: _picture(name, draw) for name, draw in pictures.items()}
    texts["zoo.svg"] = draw_zoo([model_config(name) for name in list_models()])
    for name, text in texts.items():
        save_text(folder / name, text)
    return [folder / name for name in texts]


def _picture(name: str, draw: Callable[[], Figure]) -> str:
    # Text as paths: a README is read on machines with other fonts. The salt and the missing date fix the bytes.
    rc: dict[Any, Any] = {
        "svg.fonttype": "path",
        "svg.hashsalt": name,
        "font.family": "DejaVu Sans",
        "image.composite_image": False,
    }
    with matplotlib.rc_context(rc):
        text = io.StringIO()
        draw().savefig(text, format="svg", metadata=NO_METADATA, facecolor="white")
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)


def _block_positions(depths: Sequence[int]) -> list[list[float]]:
    """Horizontal position of every block, by stage, with a gap between stages."""
    positions: list[list[float]] = []
    start = 0.0
    for depth in depths:
        positions.append([start + i for i in range(depth)])
        start += depth + _STAGE_GAP
    return positions


def draw_rates() -> Figure:
    """The rate per block for every named profile, one panel each, stages set apart."""
    formulas = {
        "linear": "0 in the first block, rising evenly (timm)",
        "linear_from_first": "starts one step higher (Huang et al.)",
        "constant": "every block alike",
        "stagewise": "one rate per stage, rising evenly",
        "cosine": "flat at both ends, steep in the middle",
        "reversed": "0 in the last block, falling evenly",
    }
    figure = Figure(figsize=(10, 6.8), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12, wspace=0.04, hspace=0.04))
    rows = figure.subplots(3, 3, height_ratios=(0.36, 1, 1))
    panels = rows[1:].flat
    for axes in rows[0]:
        axes.axis("off")
    stages = _block_positions(_S24_DEPTHS)
    shades = [(PALE, BLUE)[s % 2] for s, stage in enumerate(stages) for _ in stage]
    for axes, profile in zip(panels, get_args(ProfileName), strict=True):
        rates = drop_path_rates(_RATES_RATE, _S24_DEPTHS, profile)
        axes.bar([x for stage in stages for x in stage], rates, width=0.86, color=shades)
        for number, stage in enumerate(stages, start=1):
            # the line under the bars keeps blocks of rate 0 visible
            axes.plot([stage[0] - 0.43, stage[-1] + 0.43], [0, 0], color=GREY, linewidth=1.2, clip_on=False)
            axes.text(statistics.fmean(stage), -0.012, f"stage {number}", ha="center", va="top", fontsize=8, color=GREY)
        axes.set_title(profile, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
        axes.text(0, 1.04, formulas[profile], transform=axes.transAxes, fontsize=9, color=GREY)
        mean = statistics.fmean(rates)
        axes.plot([-0.8, stages[-1][-1] + 0.8], [mean, mean], color=ORANGE, linewidth=1.2, linestyle="--")
        # where no bar is behind it
        x, side = (stages[-1][-1] + 0.6, "right") if rates[0] > rates[-1] else (-0.6, "left")
        axes.text(x, mean + 0.006, f"mean {mean:.3f}", ha=side, fontsize=9, color=ORANGE)
        axes.set(ylim=(0, 1.15 * _RATES_RATE), xlim=(-0.8, stages[-1][-1] + 0.8), xticks=[])
        axes.set_yticks([0, 0.1, 0.2, 0.3])
        axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=GREY)
        axes.grid(axis="y", color="#e3e7ec", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    depths = ", ".join(map(str, _S24_DEPTHS))
    words = (
        f"One bar is one block of PoolFormer-S24, first to last; stages of {depths} blocks stand apart.\n"
        f"The rate is {_RATES_RATE} in every panel: the largest over blocks (rate_is: max). The means (dashed) differ,\n"
        "and so does the strength; rate_is: mean makes them equal."
    )
    place = rows[0, 0]
    place.text(
        0.0, 0.85, "Drop-path rate per block", transform=place.transAxes, fontsize=12, fontweight="bold", color=INK,
        in_layout=False
    )  # fmt: skip
    place.text(
        0.0, 0.66, words, transform=place.transAxes, fontsize=10, color=INK, va="top", linespacing=1.4, in_layout=False
    )
    return figure


def draw_step(depths: Sequence[int], rate: float, *, batch: int, seed: int) -> Tensor:
    """Which samples each block's branch really ran on in one training step of mode skip.

    Args:
        depths: Blocks per stage.
        rate: Largest rate of the linear profile.
        batch: Samples in the step.
        seed: Seeds the draws; the global random state is left as it was.

    Returns:
        bool, (batch, sum(depths)): true where the branch was called with that sample.
    """
    rates = drop_path_rates(rate, depths)
    computed = torch.zeros(batch, len(rates), dtype=torch.bool)
    samples = torch.arange(batch).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block, drop_prob in enumerate(rates):

            def branch(x: Tensor, block: int = block) -> Tensor:
                computed[x.long(), block] = True
                return torch.zeros_like(x)  # so that x goes on naming its sample

            samples = DropPath(drop_prob, mode="skip").residual(samples, branch)
    return computed


def draw_batch() -> Figure:
    """A batch of digits through the blocks of one training step: what was computed and what was skipped."""
    from sklearn.datasets import load_digits  # only this picture needs it

    images = load_digits(return_X_y=True)[0][:_BATCH_SIZE].reshape(-1, 8, 8)  # (B, 64) -> (B, 8, 8)
    computed = draw_step(_S24_DEPTHS, _BATCH_RATE, batch=_BATCH_SIZE, seed=_SEED)
    rates = drop_path_rates(_BATCH_RATE, _S24_DEPTHS)
    stages = _block_positions(_S24_DEPTHS)
    columns = [x for stage in stages for x in stage]
    left, right, bottom = -2.1, columns[-1] + 1.0, _BATCH_SIZE - 0.45

    figure = Figure(figsize=(11, 8.6))
    grid = figure.add_axes((0.05, 0.215, 0.94, 0.595))
    shares = figure.add_axes((0.05, 0.055, 0.94, 0.13))
    # the width, in columns, that equals the height of a row: digits are square
    square = (0.595 * 8.6 / (bottom + 0.55)) / (0.94 * 11 / (right - left))

    for number, stage in enumerate(stages, start=1):
        corner, width = (stage[0] - 0.5, -0.55), stage[-1] - stage[0] + 1
        grid.add_patch(Rectangle(corner, width, _BATCH_SIZE + 0.1, facecolor=BAND, edgecolor="none"))
        grid.text(statistics.fmean(stage), -0.75, f"stage {number}", ha="center", va="bottom", fontsize=10, color=GREY)
    for row, sample in enumerate(computed.tolist()):
        extent = (-0.95 - 0.84 * square, -0.95, row + 0.42, row - 0.42)
        grid.imshow(images[row], cmap="gray_r", extent=extent, interpolation="none")
        arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 0, "shrinkB": 0}
        grid.annotate("", (right, row), (-0.8, row), arrowprops=arrow, zorder=1)
        boxes = [(column - 0.4, 0.8) for column, kept in zip(columns, sample, strict=True) if kept]
        grid.broken_barh(boxes, (row - 0.36, 0.72), facecolor=BLUE, edgecolor="none", zorder=3)
        gaps = [column for column, kept in zip(columns, sample, strict=True) if not kept]
        grid.hlines([row] * len(gaps), [c - 0.5 for c in gaps], [c + 0.5 for c in gaps], color=ORANGE, linewidth=3)
    grid.set(xlim=(left, right), ylim=(bottom, -0.55), aspect="auto")
    grid.axis("off")

    kept_shares = computed.float().mean(0).tolist()
    shares.bar(columns, 1.0, width=0.8, color=BAND)
    shares.bar(columns, kept_shares, width=0.8, color=BLUE)
    for column, share, rate in zip(columns, kept_shares, rates, strict=True):
        shares.text(column, 0.3, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color="white")
        shares.plot([column - 0.4, column + 0.4], [1 - rate, 1 - rate], color=INK, linewidth=1.6)
    shares.text(-0.95, 0.5, "computed\nin %", ha="right", va="center", fontsize=9, color=GREY)
    shares.text(-0.95, -0.1, "block", ha="right", va="center", fontsize=9, color=GREY)
    shares.set(xlim=(left, right), ylim=(0, 1.03), xticks=columns, xticklabels=range(1, len(columns) + 1), yticks=[])
    shares.tick_params(axis="x", length=0, labelsize=9, labelcolor=GREY)
    shares.spines[:].set_visible(False)

    done, of = int(computed.sum()), computed.numel()
    title = "One training step in mode skip: every sample takes its own path"
    about = (
        f"{_BATCH_SIZE} digits through PoolFormer-S24 (one branch of each block is drawn), linear profile: the rate "
        f"rises from 0 to {_BATCH_RATE},\nso later blocks are dropped more often. "
        f"{of - done} of {of} branch computations ({100 * (of - done) / of:.0f} %) are never done."
    )
    figure.text(0.05, 0.975, title, fontsize=14, fontweight="bold", color=INK, va="top")
    figure.text(0.05, 0.94, about, fontsize=10, color=INK, va="top", linespacing=1.4)
    keys = [
        Patch(color=BLUE, label="computed"),
        Line2D([], [], color=ORANGE, linewidth=3, label="skipped: only the shortcut, the branch never sees the sample"),
        Line2D([], [], color=INK, linewidth=1.6, label="expected share, 1 - rate"),
    ]
    figure.legend(
        handles=keys,
        loc="upper left",
        bbox_to_anchor=(0.05, 0.885),
        ncols=3,
        frameon=False,
        fontsize=10,
        borderpad=0,
        borderaxespad=0,
        labelcolor=INK,
    )
    return figure


def draw_schedules() -> Figure:
    """Rate by block and step for each kind of schedule: linear over depth, half of the run as the cutoff."""
    steps, rates = 1000, drop_path_rates(_RATES_RATE, _S24_DEPTHS)
    half = steps // 2
    kinds = {
        "constant": (DropPathSchedule(), "the whole run alike"),
        "early": (DropPathSchedule(kind="early", cutoff=half), "falls to 0 at the cutoff"),
        "late": (DropPathSchedule(kind="late", cutoff=half), "0 until the cutoff"),
        "ramp": (DropPathSchedule(kind="ramp", cutoff=steps), "rises evenly"),
        "cosine": (DropPathSchedule(kind="cosine", cutoff=steps), "rises along half a cosine"),
        "piecewise": (
            DropPathSchedule(kind="piecewise", points=[(0, 0.0), (300, 1.0), (700, 1.0), (999, 0.2)]),
            "linear between points",
        ),
    }
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    grid = figure.subplots(2, 3)
    image = None
    for axes, (name, (schedule, words)) in zip(grid.flat, kinds.items(), strict=True):
        image = draw_heat_map(axes, rates, schedule, steps)
        axes.set_title(f"{name}: {words}", loc="left", fontsize=10)
    for axes in grid[1]:
        axes.set_xlabel("optimizer step", fontsize=9, color=GREY)
    for axes in grid[:, 0]:
        axes.set_ylabel("block", fontsize=9, color=GREY)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, shrink=0.6, label="drop-path rate")
    bar.outline.set_visible(False)  # type: ignore[operator]
    figure.suptitle("Drop-path rate over depth and training time", x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


DEPTH = Path(__file__).resolve().parent / "benchmarks" / "results" / "depth.json"


def draw_depth(result: Mapping[str, Any]) -> Figure:
    """Top-1 over the number of removed blocks, and calibration with and without MC drop-path: what `depth.json` holds."""
    figure = Figure(figsize=(10, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.06))
    curves, *bars = figure.subplots(1, 3, width_ratios=[3, 1, 1])
    names = {}
    for colour, each in zip((ORANGE, BLUE), result["summary"], strict=True):
        names[each["rate"]] = name = f"rate {each['rate']:g}" + (" (control)" if each["rate"] == 0 else "")
        for row in result["rows"]:
            if row["rate"] == each["rate"]:
                curves.plot(range(len(row["top1"])), row["top1"], color=colour, linewidth=0.8, alpha=0.45)
        curves.plot(range(len(each["top1"])), each["top1"], color=colour, marker="o", markersize=5, label=name)
    curves.set_xlabel("blocks removed greedily, chosen on other images", fontsize=9, color=GREY)
    curves.set_title("top-1 in %", loc="left", fontsize=10, color=INK)
    curves.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
    for axes, (key, words) in zip(bars, {"nll": "NLL", "ece": "ECE in %"}.items(), strict=True):
        for place, (colour, each) in enumerate(zip((ORANGE, BLUE), result["summary"], strict=True)):
            for shift, kind, shade in ((-0.2, "plain", 0.45), (0.2, "mc", 1.0)):
                value = each[kind][key]
                axes.bar(place + shift, value, width=0.36, color=colour, alpha=shade)
                axes.text(place + shift, value, f"{value:.3g}", ha="center", va="bottom", fontsize=8, color=INK)
        axes.set_xticks(range(len(names)), [name.partition(" (")[0] for name in names.values()])
        axes.set_title(words, loc="left", fontsize=10, color=INK)
    bars[0].set_xlabel(f"pale: plain; full: mean of {result['passes']} passes", fontsize=9, color=GREY)
    for axes in (curves, *bars):
        axes.tick_params(length=0, labelsize=9, labelcolor=GREY)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    figure.suptitle(
        "A ConvFormer of 9 blocks after training: blocks removed, and MC drop-path",
        x=0.01, ha="left", fontsize=13, fontweight="bold",
    )  # fmt: skip
    return figure


TUNING = DEPTH.with_name("tuning.json")
_STUDIES = {"mnist5k_few": "augmented, 30 epochs", "mnist5k_few_plain": "not augmented, 60 epochs"}


def draw_tuning(result: Mapping[str, Any]) -> Figure:
    """Top-1 over the drop-path rate, on the whole grid and where the tuner looked: what `tuning.json` holds."""
    figure = Figure(figsize=(10, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.06))
    every = figure.subplots(1, len(result["studies"]), squeeze=False)[0]
    for axes, (name, found) in zip(every, result["studies"].items(), strict=True):
        for colour, profile in ((BLUE, "linear"), (ORANGE, "constant")):
            # at rate 0 the profiles are one configuration
            rows = [row for row in found["grid"]["trials"] if row["profile"] == profile or row["rate"] == 0]
            for row in rows:
                axes.plot(
                    [row["rate"]] * len(row["scores"]), row["scores"], ".", color=colour, markersize=4, alpha=0.45
                )
            axes.plot([r["rate"] for r in rows], [r["mean"] for r in rows], color=colour, label=f"grid, {profile}")
            tried = [row for row in found["tuner"]["trials"] if row["profile"] == profile and row["scores"]]
            axes.scatter(
                [row["rate"] for row in tried], [row["mean"] for row in tried],
                s=[14 * len(row["scores"]) for row in tried], facecolors="none", edgecolors=colour, linewidths=1.3,
                label=f"tuner, {profile}",
            )  # fmt: skip
        axes.set_xlabel("drop-path rate (the largest over blocks)", fontsize=9, color=GREY)
        axes.set_title(f"{_STUDIES.get(name, name)}: validation top-1 in %", loc="left", fontsize=10, color=INK)
        axes.tick_params(length=0, labelsize=9, labelcolor=GREY)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    every[0].legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
    figure.suptitle(
        "500 labels: the whole grid, and where the tuner looked", x=0.01, ha="left", fontsize=13, fontweight="bold"
    )
    return figure


STEP = DEPTH.with_name("step.json")
_SIDES = {"timm channels_last": (ORANGE, "timm, channels_last"), "masked": (PALE, "ours, masked"),
          "skipping": (BLUE, "ours, skipping")}  # fmt: skip


def draw_speed(result: Mapping[str, Any]) -> Figure:
    """Time of a training step over the machine's limit by side, a panel per precision: what `step.json` holds."""
    rows: list[dict[str, Any]] = result["rows"]
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    settings = {(row["model"], row["rate"], row["profile"]) for row in rows}  # in any order: rows are appended
    labels = sorted(settings, key=lambda label: (models.index(label[0]), label[1], label[2] == "constant"))
    places, place = {}, 0.0
    for number, label in enumerate(labels):
        place += (0.55 if number and label[0] != labels[number - 1][0] else 0.0) + 1.0
        places[label] = place
    figure = Figure(
        figsize=(10, 2.0 + 0.36 * place), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03)
    )
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    for axes, precision in zip(panels, precisions, strict=True):
        for row in rows:
            if row["precision"] != precision:
                continue
            for number, (side, (colour, _)) in enumerate(_SIDES.items()):
                if (found := row["over_limit"].get(side)) is not None:
                    y = places[row["model"], row["rate"], row["profile"]] + 0.27 * (number - 1)
                    axes.barh(y, found["median"], height=0.25, color=colour)
                    axes.plot(found["quartiles"], [y, y], color=INK, linewidth=0.8, solid_capstyle="butt")
        for limit, style in ((1.0, "-"), (1.15, "--")):
            axes.axvline(limit, color=INK, linewidth=1.0, linestyle=style)
        axes.set_title(precision, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("time of a step over the limit", fontsize=9, color=GREY)
        axes.set_xlim(0)
        axes.tick_params(length=0, labelsize=9, labelcolor=GREY)
        axes.grid(axis="x", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    names = {label: label[0].removeprefix("timm/").partition("_patch")[0] for label in labels}
    words = [f"{names[m, r, p]}  {r:g}{f' {p}' if r else ''}" for m, r, p in labels]
    panels[0].set_yticks([places[label] for label in labels], words)
    panels[0].set_ylim(place + 0.7, 0.3)
    keys = [Patch(color=colour, label=label) for colour, label in _SIDES.values()]
    keys += [Line2D([], [], color=INK, linewidth=1.0, label="the limit: products and convolutions alone"),
             Line2D([], [], color=INK, linewidth=1.0, linestyle="--", label="1.15 times")]  # fmt: skip
    figure.legend(handles=keys, loc="outside lower left", ncols=5, frameon=False, fontsize=9, labelcolor=INK)
    figure.suptitle(
        f"A training step at drop rates, batch {rows[0]['batch']}: {result['machine']}",
        x=0.01, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 where a picture could not be written, 2 for a mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/pictures"), help="default: docs/pictures")
    given = parser.parse_args(arguments)

    def draw() -> int:
        print(*write_pictures(given.folder), sep="\n")
        return 0

    return run_command(draw)


if __name__ == "__main__":
    sys.exit(main())
