"""What a reader of a run decides, and what its numbers say about it: no more than they do."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from training.report.runs import NAN, Run, is_known, read_number
from training.report.words import format_percent, in_words

FEWEST = 4
"""Validations without which nothing is said of a course over epochs."""

RISE = 0.10
"""Of the validation loss over its lowest, from which it counts."""


class Decision(NamedTuple):
    """A question of the reader's, and the answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Course:
    """Where the validated epochs have led.

    Attributes:
        state: "few", "overfits", "worse odds", "unstable" or "fits". Where the validation loss rose while the training
            loss fell, top-1 decides: it fell as well ("overfits"), or it did not ("worse odds").
        lowest: Epoch with the lowest validation loss.
        rise: Of the validation loss from there to the end, as a share of the lowest.
        trend: "rising", "flat", "falling" top-1 over the last quarter; "" where that cannot be said.
        gain: Points of top-1 that a straight line gains over the last quarter.
        noise: Points below which such a gain is none.
    """

    state: str
    lowest: float = NAN
    rise: float = NAN
    trend: str = ""
    gain: float = NAN
    noise: float = NAN


def course_of(run: Run) -> Course:
    """Reads the course of a run off its metrics."""
    columns = ("epoch", "train_loss", "val_loss", "val_top1")
    rows = [row for row in zip(*(run.metrics[c] for c in columns), strict=True) if not any(map(math.isnan, row))]
    if len(rows) < FEWEST:
        return Course("few")
    epochs, train, val, top1 = (list(column) for column in zip(*rows, strict=True))
    best = val.index(min(val))
    rise = val[-1] / val[best] - 1 if val[best] > 0 else 0.0
    steps = [abs(b - a) for a, b in zip(val[len(val) // 2 :], val[len(val) // 2 + 1 :], strict=False)]
    noise = 3 * statistics.median(steps) if steps else 0.0
    state = "fits"
    # one step of noise, or a rise of one epoch, is no course
    if rise > RISE and len(val) - 1 - best >= 2 and statistics.fmean(val[-2:]) - val[best] > min(noise, val[best]):
        fell = statistics.fmean(top1[max(0, best - 1) : best + 2]) - statistics.fmean(top1[-3:])
        state = "unstable" if train[-1] >= train[best] else "overfits" if fell > 2 * _image(run) else "worse odds"
    return Course(state, epochs[best], rise, *_trend(run, epochs, top1))


def _trend(run: Run, epochs: Sequence[float], top1: Sequence[float]) -> tuple[str, float, float]:
    last = [(e, v) for e, v in zip(epochs, top1, strict=True) if e > 0.75 * epochs[-1]]
    last = last if len(last) >= FEWEST else list(zip(epochs, top1, strict=True))[-FEWEST:]
    x, y = [e for e, _ in last], [v for _, v in last]
    span = x[-1] - x[0]
    slope, start = statistics.linear_regression(x, y)
    error = math.sqrt(sum((v - start - slope * e) ** 2 for e, v in last) / (len(last) - 2))
    spread = math.sqrt(sum((e - statistics.fmean(x)) ** 2 for e in x))
    noise = max(2 * error / spread * span, 2 * _image(run))
    gain = slope * span
    return "flat" if abs(gain) <= noise else "rising" if gain > 0 else "falling", gain, noise


def _image(run: Run) -> float:
    """Points of top-1 that an image is worth; 0 where no file tells how many there are."""
    return 100 / run.val_samples if run.val_samples else 0.0


def interval(percent: float, samples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many samples, in percent."""
    z, p = 1.96, percent / 100
    middle = (p + z**2 / (2 * samples)) / (1 + z**2 / samples)
    half = z / (1 + z**2 / samples) * math.sqrt(p * (1 - p) / samples + z**2 / (4 * samples**2))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def verdict(run: Run) -> str:
    """The run in a sentence."""
    if not is_known([run.final_top1]):
        return "Nothing has been validated yet: there is nothing to judge."
    course = course_of(run)
    which = "" if run.finished else f"After {run.epochs} of {in_words(run.setting('optim', 'epochs'))} epochs: "
    if _diverged(run):
        return f"{which}{format_percent(run.final_top1)} top-1{_range(run)}, of a model whose outputs are not finite."
    fit = {
        "few": "too few validations to tell of overfitting",
        "overfits": f"overfitting since epoch {course.lowest:.0f}",
        "worse odds": "no overfitting in top-1",
        "unstable": f"validation loss rising since epoch {course.lowest:.0f}",
        "fits": "no sign of overfitting",
    }[course.state]
    end = {
        "": "",
        "rising": ", still rising at the end",
        "flat": ", flat at the end",
        "falling": ", falling at the end",
    }
    return f"{which}{format_percent(run.final_top1)} top-1{_range(run)}, {fit}{end[course.trend]}."


def _diverged(run: Run) -> bool:
    """Whether the last validation has a top-1, but no finite loss."""
    last = [
        loss for top1, loss in zip(run.metrics["val_top1"], run.metrics["val_loss"], strict=True) if is_known([top1])
    ]
    return bool(last) and not is_known(last[-1:])


def _range(run: Run) -> str:
    if not run.val_samples:
        return ""
    low, high = interval(run.final_top1, run.val_samples)
    return f" on {run.val_samples:,} validation images (95\u00a0%: {low:.1f} to {high:.1f})"


def decisions(run: Run) -> list[Decision]:
    """The questions a reader has, with what the numbers say."""
    if not is_known([run.final_top1]):
        return []
    if _diverged(run):
        answer = (
            "No: its validation loss is no finite number, and images without a finite output count as mistaken. "
            "A lower learning rate, a longer warm-up or optim.clip_grad keeps a run from that."
        )
        return [Decision("Good enough?", answer)]
    course = course_of(run)
    told = [
        ("Good enough?", _good_enough(run)),
        ("Did it overfit?", _overfit(course)),
        ("Would more epochs help?", _more_epochs(run, course)),
        ("Another drop-path rate?", _another_rate(run, course)),
    ]
    return [Decision(question, answer) for question, answer in told if answer]


def _good_enough(run: Run) -> str:
    words = []
    if not math.isnan(run.most_frequent):
        low = interval(run.final_top1, run.val_samples)[0] if run.val_samples else run.final_top1
        beats = "beats it" if low > run.most_frequent else "does not beat it"
        if low <= run.most_frequent < run.final_top1:
            beats = "is above it by no more than chance may give"
        guess = format_percent(run.most_frequent, 1)
        words.append(f"Always naming the most frequent class gives {guess}; the model {beats}.")
    if run.val_samples:
        low, high = interval(run.final_top1, run.val_samples)
        words.append(f"Runs that differ by less than about {(high - low) / 2:.1f} points cannot be told apart here.")
    if run.evidence is not None and len(results := run.evidence.per_class()) > 1:
        worst = min(results, key=lambda result: (result.recall, -result.samples))
        if worst.recall < 100:
            share = format_percent(worst.recall, 1)
            words.append(
                f"The weakest class is {worst.name}: {worst.hits:,} of {worst.samples:,} recognised ({share})."
            )
    return " ".join(words)


def _overfit(course: Course) -> str:
    rose = f"has risen by {100 * course.rise:.0f}\u00a0% since epoch {course.lowest:.0f}, where it was lowest"
    if course.state == "few":
        return f"Fewer than {FEWEST} epochs were validated: nothing can be said."
    if course.state == "overfits":
        return f"Yes: the validation loss {rose}, and top-1 has fallen, while the training loss went on falling."
    if course.state == "worse odds":
        return f"Not in its choices: top-1 has not fallen. But the validation loss {rose}: its probabilities are worse."
    if course.state == "unstable":
        return f"The validation loss {rose}, but the training loss has not fallen either: unstable, not overfitting."
    if course.rise < 0.005:
        return "No sign of it: the validation loss ends at its lowest."
    return (
        f"No sign of it: the validation loss ends within {max(1, math.ceil(100 * course.rise))}\u00a0% of its lowest."
    )


def _more_epochs(run: Run, course: Course) -> str:
    if not course.trend:
        return ""
    rates = is_known(run.metrics["lr"])
    ran_out = bool(rates) and rates[-1] < 0.05 * max(rates)
    longer = (
        "in a new, longer run: the learning rate of this one has run out" if ran_out else "by going on with this run"
    )
    change = f"{course.gain:+.1f} points over the last quarter of the epochs"
    if course.state == "overfits":
        return f"No: they would overfit further; top-1 was best at epoch {run.best_epoch:.0f}."
    if course.trend == "rising":
        return f"Probably: top-1 still changed by {change}; {longer}."
    if course.trend == "falling":
        return f"No: top-1 changed by {change}."
    if ran_out:
        flat = f"top-1 was flat ({change}), as it is wherever the learning rate runs out"
        return f"Not by going on: {flat}. Only a new, longer run can tell."
    return f"Not by these numbers: top-1 was flat ({change}; less than {course.noise:.1f} is noise)."


def _another_rate(run: Run, course: Course) -> str:
    rate: Any = run.setting("drop_path", "rate")
    now = "" if math.isnan(read_number(rate)) else f" than {read_number(rate):g}"
    if course.state == "overfits":
        return f"The overfitting speaks for a higher one{now}, for more augmentation, or for fewer epochs."
    one = "One run cannot tell: that takes other rates, each over several seeds."
    if course.state == "fits" and course.trend == "rising" and read_number(rate) > 0:
        return f"Nothing speaks for a higher one{now}: the model still learns and does not overfit. {one}"
    return one
