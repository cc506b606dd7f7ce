"""Advice holds to what is published, and moves as the rule says."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from files.errors import ConfigError
from tests.tuning.recipes import KNOWN, config, facts_of, rate, recipe, row_of
from training.config import load_config
from tuning.advice import BY_HEART, FULL_STEPS, MEASURED, NO_STEPS, Advice, advice_for, advise, at_mean
from tuning.estimates import LONGER
from tuning.facts import Facts
from tuning.published import Row

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "row",
    [row for row in KNOWN.rates if row.purpose != "pretrain"],
    ids=lambda row: f"{row.family}-{row.size}-{row.conditions}-{row.schedule}",
)
def test_a_published_recipe_gets_its_own_rate(row: Row) -> None:
    advice = advice_for(recipe(row), facts_of(row))
    assert (advice.rate, advice.profile) == (row.rate, row.profile)
    assert (advice.published, advice.published_profile) == (row.rate, row.profile)
    assert advice.low <= row.rate <= advice.high and advice.low < advice.high
    assert row in advice.rows and not advice.warnings


@pytest.mark.parametrize("row", [r for r in KNOWN.rates if r.schedule == "constant" and r.purpose != "pretrain"])
def test_without_its_own_row_a_model_is_near_what_is_published(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models between two others the published rate is left out and met within 0.2, and lies in the range."""
    rest = [r for r in KNOWN.rates if (r.family, r.size) != (row.family, row.size)]
    mine = [r for r in rest if r.family == row.family and r.conditions == row.conditions]
    sizes = sorted(KNOWN.size_of(r).params for r in mine)
    if not sizes or not sizes[0] < KNOWN.size_of(row).params < sizes[-1]:
        return
    monkeypatch.setattr("tuning.advice.load_published", lambda: KNOWN.model_copy(update={"rates": rest}))
    advice = advice_for(recipe(row), facts_of(row))
    assert advice.rate == pytest.approx(row.rate, abs=0.2)
    assert advice.low - 0.005 <= row.rate <= advice.high + 0.005
    assert row not in advice.rows


def test_constant_and_linear_are_converted_at_equal_mean() -> None:
    swin = row_of("swin", "base", purpose="train", data="imagenet-1k")
    constant = advice_for(config("drop_path.profile=constant"), facts_of(swin))
    assert (constant.rate, constant.profile) == (0.25, "constant")
    assert any("published with profile linear" in reason for reason in constant.reasons)
    deit3 = row_of("deit3", "base", purpose="train", data="imagenet-1k")
    assert rate(facts_of(deit3), "drop_path.profile=linear") == pytest.approx(0.4)
    unsaid = advice_for(config(), facts_of(deit3))
    assert (unsaid.rate, unsaid.profile) == (0.2, "constant"), "the published profile where the config names none"


def test_a_mean_that_a_profile_cannot_reach_is_said() -> None:
    huge = row_of("deit3", "huge", purpose="train", data="imagenet-1k")
    advice = advice_for(config("drop_path.profile=linear"), facts_of(huge))
    assert (advice.rate, advice.profile) == (0.6, "constant")
    assert any("linear cannot be as strong" in reason for reason in advice.reasons)


@pytest.mark.parametrize("profile", ["linear", "linear_from_first", "constant", "cosine", "stagewise", "reversed"])
def test_at_mean(profile: Any) -> None:
    peak = at_mean(0.1, [3, 3, 9, 3], profile)
    assert at_mean(0.1, [3, 3, 9, 3], profile) == peak and 0.1 <= peak <= 0.25
    assert at_mean(0.0, [4], profile) == 0


def test_few_steps_shrink_the_rate_and_say_that_this_is_our_inference() -> None:
    row = row_of("convformer", "s36", purpose="train")
    found = [advice_for(config(), facts_of(row, steps=steps)) for steps in (450, NO_STEPS, 5_000, FULL_STEPS, 10**6)]
    assert [a.rate for a in found] == [0.0, 0.0, 0.16, 0.3, 0.3]
    assert [a.low for a in found[:3]] == [0, 0, 0] and len({a.high for a in found}) == 1, "the search looks as far"
    told = [any("our inference, not a publication" in reason for reason in a.reasons) for a in found]
    assert told == [True, True, True, False, False]


def test_without_the_number_of_images_the_range_starts_at_0() -> None:
    row = row_of("swin", "base", purpose="train", data="imagenet-1k")
    advice = advice_for(config(), facts_of(row, images=None, steps=None))
    assert (advice.rate, advice.low) == (0.5, 0.0)
    assert any("not known" in reason for reason in advice.reasons)


def test_early_and_late_schedules_have_rates_of_their_own() -> None:
    row = row_of("deit", "tiny", purpose="train")
    early = advice_for(config("drop_path.schedule={kind: early, cutoff_epochs: 4}"), facts_of(row))
    late = advice_for(config("drop_path.schedule={kind: late, cutoff_epochs: 4}"), facts_of(row))
    assert (early.rate, late.rate) == (0.5, 0.4)
    hint = "a model that underfits may gain from an early schedule"
    assert any(hint in reason for reason in advice_for(config(), facts_of(row)).reasons)
    assert (late.published, early.published) == (0.1, 0.1) and any("is constant over time" in r for r in late.reasons)
    other = advice_for(config("drop_path.schedule={kind: ramp}"), facts_of(row))
    assert any("ramp" in reason for reason in other.reasons)


def warnings(facts: Facts, *overrides: str) -> list[str]:
    return advice_for(config(*overrides), facts).warnings


def test_a_rate_far_from_the_range_is_warned_of() -> None:
    row = row_of("poolformer", "s12", purpose="train")
    small = facts_of(row, model="poolformer_n4", depths=[2, 2], params=0.2, steps=450, rate=0.5)
    (warning,) = warnings(small, "drop_path.rate=0.5")
    assert "drop_path.rate 0.5 (linear) is far above the range from 0 to 0.13 for 4 blocks" in warning
    large = facts_of(row_of("convnext", "large", purpose="train"), rate=0.05)
    (warning,) = warnings(large, "drop_path.rate=0.05")
    assert "far below the range from 0.25 to 0.75" in warning
    (warning,) = warnings(replace(small, rate=None), "drop_path.profile=[0.5, 0.5, 0.5, 0.5]")
    assert "drop_path.profile, a list" in warning and "far above" in warning


@pytest.mark.parametrize(
    ("family", "size", "profile", "words"),
    [("convnext", "base", "constant", "twice as strong as the published 0.5"),
     ("deit3", "base", "linear", "half as strong as the published 0.2")],
)  # fmt: skip
def test_the_rate_of_another_profile_is_warned_of(family: str, size: str, profile: str, words: str) -> None:
    row = row_of(family, size, purpose="train", data="imagenet-1k")
    found = warnings(facts_of(row), f"drop_path.rate={row.rate}", f"drop_path.profile={profile}")
    assert words in found[0] and "not the same strength" in found[0]


def test_mixup_in_a_short_fine_tuning_is_warned_of() -> None:
    facts = facts_of(row_of("caformer", "s18", purpose="finetune"))
    (warning,) = warnings(facts, "augment.mixup=0.8")
    assert "augment.mixup=0 augment.cutmix=0" in warning and "30 epochs" in warning
    swin = facts_of(row_of("swin", "base", purpose="finetune"))
    assert not warnings(swin, "augment.mixup=0.8"), "its published fine-tuning keeps it"
    assert not warnings(replace(facts, epochs=100), "augment.mixup=0.8") and not warnings(facts)


def test_what_has_no_effect() -> None:
    advice = advise(load_config(None, ["model={name: timm/vgg11, in_chans: 1, image_size: 32}", "drop_path.rate=0.1"]))
    assert (advice.rate, advice.low, advice.high) == (0, 0, 0) and "no residual block" in advice.warnings[0]
    probe = advise(load_config(None, ["freeze={epochs: all}", "drop_path.rate=0.1"]))
    assert probe.facts.purpose == "probe" and "no rate has an effect" in probe.warnings[0] and probe.high == 0
    assert not advise(load_config(None, ["freeze={epochs: all}", "drop_path.rate=0"])).warnings


def test_parts_that_are_frozen_drop_nothing() -> None:
    advice = advise(load_config(None, ["freeze={epochs: all, stages: 1}"]))
    assert advice.facts.purpose == "train" and advice.high > 0
    assert any("drops nothing" in reason for reason in advice.reasons)


def test_of_a_config_as_it_stands() -> None:
    advice: Advice = advise(load_config("configs/train/imagenet_poolformer_s12.yaml", ["data.root=nowhere"]))
    assert (advice.rate, advice.published, advice.profile) == (0.1, 0.1, "linear")
    tagged = advise(
        config("model.name=timm/convnext_tiny.fb_in22k_ft_in1k", "model.num_classes=1000", "optim.epochs=300")
    )
    assert (tagged.rate, tagged.published) == (0.1, 0.1) and tagged.facts.purpose == "train"


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        advise(load_config(None, ["model.name=poolformer_s13"]))


def test_the_docs_say_the_same() -> None:
    page = " ".join((ROOT / "docs" / "stochastic-depth.md").read_text().split())
    assert MEASURED in page and BY_HEART in page
    told = json.loads((ROOT / "benchmarks" / "results" / "tuning.json").read_text())["studies"]
    for text, study, profile in ((MEASURED, "mnist5k_few", "linear"), (BY_HEART, "mnist5k_few_plain", "constant")):
        rates = [float(rate) for rate in re.findall(r"0(?:\.\d)?\b", text.partition(f"{profile} rates ")[2])]
        means = {
            t["rate"]: t["mean"] for t in told[study]["grid"]["trials"] if t["profile"] == profile or t["rate"] == 0
        }
        assert len(rates) == 4 and all(f"{means[rate]:.1f}" in text for rate in rates), study
    assert f"below {FULL_STEPS:,} optimizer steps, to 0 at {NO_STEPS:,}" in page
    assert f"twice the published epochs take {LONGER} more" in page and f"half of them {LONGER} less" in page
    assert "| ViT-T | 73.9 | 72.6 | 74.4 |" in page
    row = row_of("deit", "tiny", purpose="train")
    assert any(
        "ViT-T 73.9 without, 72.6 constant, 74.4 early" in r for r in advice_for(config(), facts_of(row)).reasons
    )
