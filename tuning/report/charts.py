"""The charts of a study: error over the rate, the race, and the final's seeds."""

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from files.words import counted
from training.report.charts import INK, PALE, SERIES, SOFT, draw_chart, keep_percent
from training.report.runs import is_known
from tuning.report.reading import RATE, Study, is_number
from tuning.report.words import PERCENT, axis_name
from tuning.statistics import half_width, pooled_spread
from tuning.study import Trial

BINS = 25
"""Trials whose rates differ by less than this part of the range make one point of the line."""

MOST_POINTS = 3000
"""Runs that are drawn one by one; of larger studies the means of trials are."""

Figure = tuple[str, Markup]


def error_chart(study: Study) -> Figure | None:
    """Error of each run over the rate, with the mean and its interval; None where fewer than two were scored."""
    axis = study.axis
    trials = [t for t in study.scored if axis is not None and is_number(t.parameters.get(axis))]
    if axis is None or len({t.parameters[axis] for t in trials}) < 2:
        return None
    logarithmic = _is_logarithmic(study, axis)
    bins = {
        i: _bins(study, [t for t in trials if study.group(t) == i], axis, logarithmic=logarithmic)
        for i in _places(study)
    }
    # where other numbers varied too, trials near one another differ by more than their seeds
    samples = [part for parts in bins.values() for part in parts] if len(study.numbers) > 1 else [[t] for t in trials]
    spread, freedom = pooled_spread([_losses(study, sample) for sample in samples])
    means = [study.loss(t.mean) for t in trials]
    losses = _losses(study, trials)
    top = _top(means, losses)
    one_by_one = len(losses) <= MOST_POINTS

    def draw(axes: Axes) -> None:
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # powers as text: no mathematics is set here
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(8))
        reach = list(losses)
        for i, parts in bins.items():
            if not parts:
                continue
            mine, colour = [t for part in parts for t in part], SERIES[i % len(SERIES)]
            x = [_mean([t.parameters[axis] for t in part for _ in t.scores]) for part in parts]
            y = [_mean(_losses(study, part)) for part in parts]
            half = [half_width(spread, freedom, len(_losses(study, part))) for part in parts]
            if freedom and len(parts) > 1:
                low, high = [m - h for m, h in zip(y, half, strict=True)], [m + h for m, h in zip(y, half, strict=True)]
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            reach += is_known([m + sign * h for m, h in zip(y, half, strict=True) for sign in (-1, 1)])
            axes.plot(x, y, color=colour, linewidth=1.6)
            if freedom and len(parts) == 1:
                axes.errorbar(x, y, yerr=half, color=colour, linewidth=1.2, capsize=3)
            if one_by_one:
                runs = [(t.parameters[axis], study.loss(s)) for t in mine for s in t.scores.values()]
                axes.plot(*zip(*runs, strict=True), "o", color=colour, markersize=2.6, alpha=0.55, markeredgewidth=0)
            centres = [(t.parameters[axis], study.loss(t.mean)) for t in mine]
            axes.plot(*zip(*centres, strict=True), "D", color=colour, markersize=4.2, markeredgewidth=0)
        if study.winner is not None and study.winner in trials:
            place = (study.winner.parameters[axis], study.loss(study.winner.mean))
            axes.plot(*([v] for v in place), "o", markersize=11, markerfacecolor="none", markeredgecolor=INK)
        lowest, highest = (pick(t.parameters[axis] for t in trials) for pick in (min, max))
        if not logarithmic:
            axes.set_xlim(lowest - 0.03 * (highest - lowest), highest + 0.04 * (highest - lowest))
        _mark_published(axes, trials, axis, highest)
        low, high = min(reach), max(reach) if top is None else top
        margin = 0.06 * max(high - low, 0.1 * abs(high), 1e-9)
        axes.set_ylim(low - margin, high + margin)
        if study.metric.percent:
            keep_percent(axes)

    name = axis_name(axis)
    what = f"Each trial's mean {study.loss_name} (diamonds)" + (", its runs (dots)" if one_by_one else "")
    told = [f"{what} over {name}"]
    if study.winner is not None and study.winner in trials:
        told.append("ring: the winner of the search")
    told.append("band: 95\u00a0% interval of the mean" if freedom else "one run each, so that no interval can be given")
    if top is not None:
        count = sum(loss > top for loss in losses)
        told.append(f"the axis leaves out the {counted(count, 'worst run')}")
    return draw_chart("; ".join(told), draw, xlabel=name)


def race_chart(study: Study) -> Figure | None:
    """Mean error of each trial after each round of the race; None where all trials had as many seeds."""
    rounds = race_rounds(study)
    if len(rounds) < 2:
        return None
    ends = [(t, [study.loss(_mean_of_first(t, n)) for n in rounds if len(t.scores) >= n]) for t in study.scored]
    ends = [(t, values) for t, values in ends if values]
    every = [v for _, values in ends for v in values]
    further = [v for _, values in ends if len(values) > 1 for v in values]
    low, top = min(every), max(further)
    top = min(max(every), top + 0.5 * (top - low))
    left_out = sum(values[0] > top for _, values in ends)

    def draw(axes: Axes) -> None:
        axes.grid(visible=False, axis="y")
        for trial, values in reversed(ends):  # the best on top
            style = {"color": SOFT, "linewidth": 1.1, "markersize": 3.6, "zorder": 2}
            if trial is study.winner:
                style = {"color": SERIES[0], "linewidth": 2.4, "markersize": 5.0, "zorder": 3}
            axes.plot(range(len(values)), values, marker="o", markeredgewidth=0, **style)
        axes.set_xticks(range(len(rounds)), [counted(n, "seed") for n in rounds])
        axes.set_xlim(-0.25, len(rounds) - 0.75)
        margin = 0.06 * max(top - low, 0.1 * abs(top), 1e-9)
        axes.set_ylim(low - margin, top + margin)
        if study.metric.percent:
            keep_percent(axes)

    told = [f"Mean {study.loss_name} of each trial after each round: a line that ends was dropped there"]
    told += ["blue: the winner"] if study.winner is not None else []
    told += [f"the axis leaves out {left_out} that were dropped at once"] if left_out else []
    return draw_chart("; ".join(told), draw, xlabel="seeds that each trial of the round has")


def race_rounds(study: Study) -> list[int]:
    """Seeds that a trial has after each round: as the study says, else the counts there are; those that were reached."""
    most = max((len(t.scores) for t in study.scored), default=0)
    given = study.setting("race", "seeds")
    if isinstance(given, list) and given and all(isinstance(n, int) and n > 0 for n in given):
        return [n for n in given if n <= most]
    return sorted({len(t.scores) for t in study.scored})


def final_chart(study: Study) -> Figure | None:
    """The final's scores: one line per seed through the configurations, and their means."""
    configs = study.verdict.get("configs", [])
    if len(configs) < 2 or not all(config["by_seed"] for config in configs):
        return None
    percent = study.verdict.get("metric") in PERCENT
    seeds = sorted({seed for config in configs for seed in config["by_seed"]})

    def draw(axes: Axes) -> None:
        for seed in seeds:
            axes.plot(
                range(len(configs)), [c["by_seed"].get(seed, math.nan) for c in configs],
                color=PALE, linewidth=1.1, marker="o", markersize=3.5, markeredgewidth=0,
            )  # fmt: skip
        means = [study.final_mean(config) for config in configs]
        axes.plot(range(len(configs)), means, "D", color=SERIES[0], markersize=7, markeredgewidth=0)
        axes.set_xticks(range(len(configs)), [_short(config["label"]) for config in configs])
        axes.set_xlim(-0.4, len(configs) - 0.6)
        if percent:
            keep_percent(axes)

    what = f"{study.verdict.get('metric', 'score')}{' in %' if percent else ''} on the {study.verdict['split']} part"
    return draw_chart(f"{what}: a line for each seed, diamonds for the means", draw, xlabel="")


# ---- helpers ------------------------------------------------------------------------------------------------------


def _places(study: Study) -> range:
    return range(len(study.groups))


def _losses(study: Study, trials: Sequence[Trial]) -> list[float]:
    return [study.loss(score) for t in trials for score in t.scores.values()]


def _bins(study: Study, trials: Sequence[Trial], axis: str, *, logarithmic: bool) -> list[list[Trial]]:
    """Trials at near values of the parameter together, from low to high."""
    scale: Callable[[float], float] = math.log if logarithmic else float
    every = [scale(t.parameters[axis]) for t in study.scored if is_number(t.parameters.get(axis))]
    width = (max(every) - min(every)) / BINS
    bins: list[list[Trial]] = []
    for trial in sorted(trials, key=lambda t: t.parameters[axis]):
        first = scale(bins[-1][0].parameters[axis]) if bins else -math.inf
        if scale(trial.parameters[axis]) - first < max(width, 1e-12):
            bins[-1].append(trial)
        else:
            bins.append([trial])
    return bins


def _top(means: Sequence[float], values: Sequence[float]) -> float | None:
    """Where the axis ends if a few bad ones would flatten all the rest, else None."""
    best, middle = min(means), sorted(means)[len(means) // 2]
    top = best + 4 * (middle - best)
    return top if middle > best and max(values) > best + 2 * (top - best) else None


def _mark_published(axes: Axes, trials: Sequence[Trial], axis: str, highest: float) -> None:
    published = next((t.parameters[axis] for t in trials if t.origin == "published"), None)
    if published is not None and axis == RATE:
        axes.axvline(published, color=SOFT, linewidth=1, linestyle=":")
        axes.text(
            published, 1.01, "published", transform=axes.get_xaxis_transform(), color=SOFT, fontsize=9,
            ha="right" if published > 0.85 * highest else "left" if published < 0.1 * highest else "center",
        )  # fmt: skip


def _is_logarithmic(study: Study, axis: str) -> bool:
    values = [t.parameters[axis] for t in study.scored if is_number(t.parameters.get(axis))]
    return bool(study.setting("space", axis, "log")) and min(values) > 0


def _mean_of_first(trial: Trial, count: int) -> float:
    return _mean([score for _, score in sorted(trial.scores.items())[:count]])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _short(label: str) -> str:
    """A label in two lines where it is long."""
    head, bracket, rest = label.partition(" (")
    return f"{head}\n({rest}" if bracket and len(label) > 16 else label
