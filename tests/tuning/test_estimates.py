"""What families say of a model: by size, by data, by length, and where there is no family."""

from statistics import median
from typing import Any

import pytest

from tests.tuning.recipes import IMAGENET, KNOWN, config, facts_of, rate, row_of
from tuning.advice import advice_for
from tuning.estimates import LONGER, MORE_DATA


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
    assert len({r.source for r in advice.rows}) == 3 and advice.published is None
    assert (advice.low, advice.profile) == (0.0, "linear") and advice.rate > 0


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
    assert rate(facts_of(row, purpose="finetune", epochs=30)) == 0.2, "its epochs are not to be compared"
    assert any("no fine-tuning rate is published" in reason for reason in advice.reasons)


@pytest.mark.parametrize(
    ("pretraining", "size", "wanted"), [("imagenet-21k", 384, 0.2), ("imagenet-1k", 384, 0.8), (None, 224, 0.2)]
)
def test_fine_tuning_depends_on_where_it_starts(pretraining: Any, size: int, wanted: float) -> None:
    row = row_of("convnext", "base", purpose="finetune")
    assert rate(facts_of(row, pretraining=pretraining, image_size=size)) == wanted


def test_of_kin_those_count_that_have_its_size() -> None:
    """BEiT is published after ImageNet-21k in one size, four times ViT-B: DeiT-III has this size."""
    row = row_of("deit3", "base", purpose="finetune", pretraining="imagenet-21k")
    advice = advice_for(config("drop_path.profile=constant"), facts_of(row, model="timm/vit_base_patch16_224"))
    assert ({r.family for r in advice.rows}, advice.rate) == ({"deit3"}, 0.15)
    assert any("of the size of DeiT-III base" in reason for reason in advice.reasons)
