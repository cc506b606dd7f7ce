"""Advice holds to what is published, and moves as the rule says."""

from dataclasses import replace
from statistics import median
from typing import Any

import pytest

from files.errors import ConfigError
from training.config import TrainConfig, load_config
from tuning.advice import FULL_STEPS, NO_STEPS, Advice, advice_for, advise, at_mean
from tuning.estimates import LONGER, MORE_DATA
from tuning.facts import Facts
from tuning.published import Row, load_published

KNOWN = load_published()
IMAGENET = KNOWN.images["imagenet-1k"]


def config(*overrides: str) -> TrainConfig:
    return load_config(None, ["data={dataset: folder, root: nowhere}", "augment={}", "drop_path={}", *overrides])


def facts_of(row: Row, **changed: Any) -> Facts:
    """What would be found out about the recipe that a row is from."""
    size = KNOWN.size_of(row)
    model = next((name for name in size.models if "*" not in name), size.models[0].replace("*", "x"))
    facts = Facts(
        model=model, purpose="finetune" if row.purpose == "finetune" else "train", pretraining=row.pretraining,
        depths=[size.blocks], params=size.params, images=KNOWN.images[row.data], images_from="published",
        epochs=row.epochs or 300, steps=100_000, image_size=row.image_size or 224, rate=row.rate, default_rate=None,
    )  # fmt: skip
    return replace(facts, **changed)


def row_of(family: str, size: str, **wanted: Any) -> Row:
    rows = (r for r in KNOWN.rates if (r.family, r.size) == (family, size))
    return next(r for r in rows if all(getattr(r, key) == value for key, value in wanted.items()))


def recipe(row: Row) -> TrainConfig:
    schedule = "{kind: constant}" if row.schedule == "constant" else f"{{kind: {row.schedule}, cutoff_epochs: 50}}"
    return config(
        f"optim.epochs={row.epochs or 300}", f"drop_path={{rate: {row.rate}, profile: {row.profile}, schedule: {schedule}}}"
    )  # fmt: skip


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


def rate(facts: Facts, *overrides: str) -> float:
    return advice_for(config(*overrides), facts).rate


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("deit3", "base"),
        ("deit3", "large"),
        ("swin", "tiny"),
        ("convnext", "base"),
        ("poolformer", "m36"),
        ("caformer", "s18"),
    ],
)
def test_more_data_lowers_the_rate(family: str, size: str) -> None:
    row = row_of(family, size, purpose="train", data="imagenet-1k")
    rates = [rate(facts_of(row, images=images, epochs=300)) for images in (IMAGENET, 4_000_000, 14_197_122)]
    assert rates[0] > rates[2] and rates == sorted(rates, reverse=True)


def test_how_much_more_data_lowers_it_is_what_is_published() -> None:
    shares = []
    for row in KNOWN.rates:
        more = [r for r in KNOWN.rates if (r.family, r.size, r.data) == (row.family, row.size, "imagenet-21k")]
        if (row.purpose, row.data) == ("train", "imagenet-1k") and more:
            shares.append(more[0].rate / row.rate)
    assert len(shares) == 9
    assert median(shares) == pytest.approx(MORE_DATA)


@pytest.mark.parametrize(("family", "size"), [("deit3", "base"), ("swin", "small"), ("poolformer", "s24")])
def test_longer_training_raises_the_rate(family: str, size: str) -> None:
    row = row_of(family, size, purpose="train", data="imagenet-1k")
    assert row.epochs
    rates = [rate(facts_of(row, epochs=int(row.epochs * factor))) for factor in (0.5, 1, 2, 4)]
    assert rates == pytest.approx([row.rate - LONGER, row.rate, row.rate + LONGER, row.rate + LONGER])


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


@pytest.mark.parametrize("profile", ["linear", "linear_from_first", "constant", "cosine", "stagewise"])
def test_at_mean(profile: Any) -> None:
    peak = at_mean(0.1, [3, 3, 9, 3], profile)
    assert at_mean(0.1, [3, 3, 9, 3], profile) == peak and 0.1 <= peak <= 0.25
    assert at_mean(0.0, [4], profile) == 0


def test_few_steps_shrink_the_rate_and_say_that_this_is_our_inference() -> None:
    row = row_of("convformer", "s36", purpose="train")
    found = [advice_for(config(), facts_of(row, steps=steps)) for steps in (450, NO_STEPS, 5_000, FULL_STEPS, 10**6)]
    assert [a.rate for a in found] == [0.0, 0.0, 0.16, 0.3, 0.3]
    assert [a.low for a in found[:3]] == [0, 0, 0] and [a.high for a in found[:3]] == [0.3, 0.3, 0.3]
    told = [any("our inference, not a publication" in reason for reason in a.reasons) for a in found]
    assert told == [True, True, True, False, False]


def test_without_the_number_of_images_the_range_starts_at_0() -> None:
    row = row_of("swin", "base", purpose="train", data="imagenet-1k")
    advice = advice_for(config(), facts_of(row, images=None, steps=None))
    assert (advice.rate, advice.low) == (0.5, 0.0)
    assert any("not known" in reason for reason in advice.reasons)


def test_smaller_and_larger_than_all_that_is_published() -> None:
    small = row_of("poolformer", "s12", purpose="train")
    advice = advice_for(config(), facts_of(small, model="poolformer_s6", depths=[1, 1, 3, 1], params=7.0))
    assert (advice.rate, advice.published) == (0.05, None)
    assert any("in proportion to its 6 blocks" in reason for reason in advice.reasons)
    large = row_of("poolformer", "m48", purpose="train")
    assert rate(facts_of(large, model="poolformer_x", depths=[99], params=300.0)) == 0.4


def test_the_same_name_with_other_depths_is_another_model() -> None:
    row = row_of("convformer", "s36", purpose="train")
    assert advice_for(config(), facts_of(row, depths=[18], params=26.0)).published is None


def test_nothing_published_is_near() -> None:
    row = row_of("swin", "tiny", purpose="train", data="imagenet-1k")
    advice = advice_for(config(), facts_of(row, model="timm/nfnet_f0"))
    assert any("nothing published is near timm/nfnet_f0" in reason for reason in advice.reasons)
    assert len({r.family for r in advice.rows}) == 3 and advice.published is None


def test_kin_speak_for_a_model_without_rates() -> None:
    row = row_of("deit", "base", purpose="train")
    advice = advice_for(config("drop_path.profile=linear"), facts_of(row, model="timm/vit_base_patch16_224"))
    assert {r.family for r in advice.rows} == {"deit", "deit3"}
    assert 0.1 < advice.rate < 0.4, "between DeiT's 0.1 and DeiT-III's 0.2 constant, shortened"
    assert any("built alike" in reason for reason in advice.reasons)


def test_a_fine_tuning_of_a_family_without_one_falls_back_on_its_training() -> None:
    row = row_of("poolformer", "s36", purpose="train")
    advice = advice_for(config(), facts_of(row, purpose="finetune"))
    assert (advice.rate, advice.published) == (0.2, None)
    assert any("no fine-tuning rate is published" in reason for reason in advice.reasons)


@pytest.mark.parametrize(
    ("pretraining", "size", "wanted"), [("imagenet-21k", 384, 0.2), ("imagenet-1k", 384, 0.8), (None, 224, 0.2)]
)
def test_fine_tuning_depends_on_where_it_starts(pretraining: Any, size: int, wanted: float) -> None:
    row = row_of("convnext", "base", purpose="finetune")
    assert rate(facts_of(row, pretraining=pretraining, image_size=size)) == wanted


def test_early_and_late_schedules_have_rates_of_their_own() -> None:
    row = row_of("deit", "tiny", purpose="train")
    early = advice_for(config("drop_path.schedule={kind: early, cutoff_epochs: 4}"), facts_of(row))
    late = advice_for(config("drop_path.schedule={kind: late, cutoff_epochs: 4}"), facts_of(row))
    assert (early.rate, late.rate) == (0.5, 0.4)
    hint = "a model that underfits may gain from an early schedule"
    assert any(hint in reason for reason in advice_for(config(), facts_of(row)).reasons)
    other = advice_for(config("drop_path.schedule={kind: ramp}"), facts_of(row))
    assert any("ramp" in reason for reason in other.reasons)


def warnings(facts: Facts, *overrides: str) -> list[str]:
    return advice_for(config(*overrides), facts).warnings


def test_a_rate_far_from_the_range_is_warned_of() -> None:
    row = row_of("poolformer", "s12", purpose="train")
    small = facts_of(row, model="poolformer_n4", depths=[2, 2], params=0.2, steps=450, rate=0.5)
    (warning,) = warnings(small, "drop_path.rate=0.5")
    assert "drop_path.rate 0.5 (linear) is far above the range from 0 to 0.1 for 4 blocks" in warning
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
    assert not warnings(replace(facts, epochs=100), "augment.mixup=0.8") and not warnings(facts)


def test_what_has_no_effect() -> None:
    advice = advise(load_config(None, ["model={name: timm/vgg11, in_chans: 1, image_size: 32}", "drop_path.rate=0.1"]))
    assert (advice.rate, advice.low, advice.high) == (0, 0, 0) and "no residual block" in advice.warnings[0]
    probe = advise(load_config(None, ["freeze={epochs: all}", "drop_path.rate=0.1"]))
    assert probe.facts.purpose == "probe" and "no rate has an effect" in probe.warnings[0] and probe.high == 0
    assert not advise(load_config(None, ["freeze={epochs: all}", "drop_path.rate=0"])).warnings


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
