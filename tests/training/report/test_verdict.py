"""The verdict: what numbers say of overfitting, of more epochs and of another rate, and where they say nothing."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from training.report.runs import Run, read_run
from training.report.verdict import course_of, decisions, interval, verdict
from training.run_folder import COLUMNS

Curve = Callable[[int], float]


@pytest.fixture
def course(tmp_path: Path, make_run, write_csv, config_text: str) -> Callable[..., Run]:
    """A run of some epochs with these curves, its learning rate constant unless told otherwise."""

    def make(
        epochs: int, train: Curve, val: Curve, top1: Curve, *, lr: Curve = lambda e: 1e-3, rate: float = 0.3
    ) -> Run:
        config = config_text.replace("epochs: 4", f"epochs: {epochs}").replace("rate: 0.3", f"rate: {rate}")
        run = make_run(tmp_path / "run", config=config)
        rows = [
            [e, 11 * e, train(e), val(e), top1(e), 100, 90, 90, 3, lr(e), 0.1, 500, 2.5 * e]
            for e in range(1, epochs + 1)
        ]
        write_csv(run / "metrics.csv", COLUMNS, rows)
        (run / "summary.json").unlink()
        return read_run(run)

    return make


def falling(e: int) -> float:
    return 2 / e


def test_overfitting_is_a_rising_loss_and_fewer_hits(course) -> None:
    run = course(20, falling, lambda e: 1 + 0.05 * abs(e - 8), lambda e: 90 - 0.5 * abs(e - 8))
    assert course_of(run).state == "overfits" and course_of(run).lowest == 8
    assert "overfitting since epoch 8, falling at the end" in verdict(run)
    told = dict(decisions(run))
    assert "has risen by 60\u00a0% since epoch 8" in told["Did it overfit?"] and told["Did it overfit?"].startswith(
        "Yes"
    )
    assert told["Would more epochs help?"] == "No: they would overfit further; top-1 was best at epoch 8."
    assert "speaks for a higher one than 0.3" in told["Another drop-path rate?"]


def test_worse_odds_are_not_fewer_hits(course) -> None:
    run = course(20, falling, lambda e: 1 + 0.05 * abs(e - 8), lambda e: min(90, 80 + e))
    assert course_of(run).state == "worse odds"
    assert "no overfitting in top-1, flat at the end" in verdict(run)
    assert "has risen by 60\u00a0%" in dict(decisions(run))["Did it overfit?"]


def test_a_rise_of_both_losses_is_no_overfitting(course) -> None:
    run = course(20, lambda e: 1 + 0.1 * abs(e - 8), lambda e: 1 + 0.1 * abs(e - 8), lambda e: 80 - abs(e - 8))
    assert course_of(run).state == "unstable" and "unstable, not overfitting" in dict(decisions(run))["Did it overfit?"]


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_still_rising(course, noise: float) -> None:
    run = course(40, falling, falling, lambda e: 50 + e + noise * (-1) ** e)
    assert "no sign of overfitting, still rising at the end" in verdict(run)
    told = dict(decisions(run))
    assert told["Would more epochs help?"].startswith("Probably: top-1 still changed by +")
    assert told["Would more epochs help?"].endswith("by going on with this run.")
    assert told["Another drop-path rate?"].startswith("Nothing speaks for a higher one than 0.3")


def test_noise_is_no_trend(course) -> None:
    run = course(40, falling, falling, lambda e: 90 + 2 * (-1) ** e)
    assert verdict(run).endswith("flat at the end.")
    assert "Not by these numbers: top-1 was flat" in dict(decisions(run))["Would more epochs help?"]
    assert dict(decisions(run))["Another drop-path rate?"].startswith("One run cannot tell")


def test_flat_where_the_learning_rate_ran_out_says_nothing_of_a_longer_run(course) -> None:
    run = course(20, falling, falling, lambda e: min(90, 70 + 2 * e), lr=lambda e: 1e-3 * (20 - e) / 20)
    assert "Only a new, longer run can tell." in dict(decisions(run))["Would more epochs help?"]


def test_few_epochs_say_little(course) -> None:
    run = course(3, falling, falling, lambda e: 90 + e)
    assert "too few validations to tell of overfitting." in verdict(run)
    told = dict(decisions(run))
    assert "Would more epochs help?" not in told and "nothing can be said" in told["Did it overfit?"]


def test_epochs_without_validation_are_left_out(course) -> None:
    run = course(
        40, falling, lambda e: falling(e) if e % 4 == 0 else math.nan, lambda e: 90.0 if e % 4 == 0 else math.nan
    )
    assert course_of(run).state == "fits" and course_of(run).trend == "flat"
    nothing = course_of(run.__class__(**{**vars(run), "metrics": {c: [math.nan] for c in COLUMNS}}))
    assert nothing.state == "few"


def test_nothing_validated(run: Path, page_of) -> None:
    (run / "summary.json").unlink()
    (run / "metrics.csv").unlink()
    assert "Nothing has been validated yet" in page_of(run).text and decisions(read_run(run)) == []


def test_how_sure_a_share_is() -> None:
    low, high = interval(50, 100)  # Wilson's, by scipy.stats.binomtest(50, 100).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((40.3830, 59.6170), abs=1e-3)
    assert (
        interval(100, 360)[1] == 100
        and interval(0, 360)[0] == 0
        and interval(100, 360)[0] == pytest.approx(98.944, abs=1e-2)
    )


def test_a_finished_run_says_so_and_names_its_weakest_class(run: Path) -> None:
    data = read_run(run)
    assert verdict(data).startswith("97.25\u00a0% top-1 on 360 validation images (95\u00a0%: 95.")
    told = dict(decisions(data))["Good enough?"]
    assert "Always naming the most frequent class gives 10.0\u00a0%; the model beats it." in told
    assert "The weakest class is 0: 35 of 36 recognised (97.2\u00a0%)." in told


def test_a_model_that_has_diverged_is_not_good(course) -> None:
    run = course(30, falling, lambda e: 0.5 if e < 20 else float("nan"), lambda e: 90.0 if e < 20 else 50.0)
    assert verdict(run).endswith("of a model whose outputs are not finite.")
    (told,) = decisions(run)
    assert told.question == "Good enough?" and told.answer.startswith("No: its validation loss is no finite number")


@pytest.mark.parametrize(
    ("top1", "told"),
    [(9.0, "does not beat it"), (10.0, "does not beat it"), (12.0, "is above it by no more than chance may give"),
     (20.0, "beats it")],
)  # fmt: skip
def test_what_chance_may_give_is_no_success(course, top1: float, told: str) -> None:
    run = course(4, falling, lambda e: 2.0, lambda e: top1)
    assert f"gives 10.0\u00a0%; the model {told}." in dict(decisions(run))["Good enough?"]
