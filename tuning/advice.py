"""A drop-path rate to start from, for a training config: what is published of models like it, moved by a stated rule.

The rule, in its order; `Advice.reasons` says which parts were used:

1. What counts are the published rates of the model's family for the config's purpose; without any, those of families that
   are built alike; without these, those of the three families nearest in parameters: it is said then that nothing published
   is near, and the range starts at 0. Of several families each gives a rate, and the median of their means over depth counts.
2. In a family: the rate of this very size; between two sizes linear in the logarithm of parameters; above the largest
   the largest's; below the smallest the smallest's in proportion to the number of residual blocks.
3. The same model takes lower rates on more data: between ImageNet-1k and ImageNet-21k linear in the logarithm of images.
   A family of which only the smaller is known takes `MORE_DATA` of its rate on the larger.
4. Training from scratch, on as much data as published, for twice the epochs takes `LONGER` more; for half of them, less.
5. Below `FULL_STEPS` optimizer steps the rate shrinks, linearly in the logarithm of steps, to 0 at `NO_STEPS`, and the range
   starts at 0. This is our inference from one measurement (`MEASURED`), not a publication, and another one (`BY_HEART`)
   shows where it does not hold.
6. Profiles are converted at equal mean over blocks: a constant rate is as strong as a linear maximum of twice it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from files.words import counted
from layers.rates import ProfileName, drop_path_rates
from training.config import TrainConfig
from tuning.estimates import Estimate, estimates, own_row
from tuning.facts import Facts, config_mean, find_facts, mean_rate
from tuning.published import Row, load_published

NO_STEPS, FULL_STEPS = 1_000, 20_000
MEASURED = (
    "with 500 labels of mnist5k and 30 epochs (450 steps) a ConvFormer of 9 blocks reached 92.6, 92.5, 91.8 and 89.8 % "
    "at linear rates 0, 0.1, 0.3 and 0.5 (4 seeds)"
)
BY_HEART = (
    "without augmentation and for twice as long it learned the labels by heart, and reached 91.9, 92.3, 92.7 and 92.4 % at "
    "constant rates 0, 0.1, 0.3 and 0.4 (4 seeds)"
)
SMALL = 20.0
"""Million parameters up to which Liu et al. 2023 found that a constant rate hurts and an early one helps (Mixer-S)."""

SHORT = 50
"""Epochs of a fine-tuning up to which mixup is doubted."""

WIDEST = 0.95
"""The largest rate that is published."""


@dataclass(frozen=True)
class Advice:
    """A rate to start from, and why.

    Attributes:
        rate: The largest over blocks (`drop_path.rate_is: max`).
        profile: What rate, low and high are meant with.
        low: From where to search.
        high: To where.
        published: What is published for this very model and purpose; None: nothing.
        published_profile: The profile of that rate.
        rows: The published rates that the advice rests on.
        reasons: Why, a sentence each.
        warnings: What in the config is far from that, or has no effect.
        facts: What was found out about the config.
    """

    rate: float
    profile: ProfileName
    low: float
    high: float
    published: float | None
    published_profile: ProfileName | None
    rows: list[Row]
    reasons: list[str]
    warnings: list[str]
    facts: Facts


def advise(config: TrainConfig, *, images: int | None = None) -> Advice:
    """A rate and a range for a config's model, data size, length and purpose, with what they rest on.

    Args:
        config: The run.
        images: Number of training images; None: counted where that is cheap, see `tuning.facts`.

    Raises:
        ConfigError: The model cannot be built as the config says.
    """
    return advice_for(config, find_facts(config, images))


def advice_for(config: TrainConfig, facts: Facts) -> Advice:
    """The advice for a config of which the facts are known."""
    published = load_published()
    kind = config.drop_path.schedule.kind
    schedule = kind if kind in ("early", "late") else "constant"
    own = own_row(facts, published, schedule) or own_row(facts, published, "constant")
    told: tuple[float | None, ProfileName | None] = (own.rate, own.profile) if own else (None, None)
    if own is None and facts.purpose == "train" and facts.default_rate is not None:
        told = (facts.default_rate, "linear")
    if not facts.depths or facts.purpose == "probe":
        why = f"{facts.model} has no residual block whose branch could be dropped"
        if facts.depths:
            why = "all but the classifier is frozen for the whole run, where stochastic depth is off: no rate has an effect"
        warnings = [f"drop_path.rate {facts.rate:g}: {why}"] if facts.rate else []
        return Advice(0.0, "linear", 0.0, 0.0, *told, [], [why], warnings, facts)

    found, reasons = estimates(facts, published, schedule)
    reasons += [reason for estimate in found for reason in estimate.reasons]
    means = [_mean(estimate, facts.depths) for estimate in found]
    near = all(estimate.is_near(facts, published) for estimate in found)
    profile, wanted = _profile(config, found if near else [], max(means), facts.depths)
    if profile != wanted:
        reasons.append(
            f"profile {wanted} cannot be as strong as what is published (mean {max(means):.2f}); constant can"
        )
    full = at_mean(median(means), facts.depths, profile)
    if len(found) == 1 and found[0].profile == profile:
        full = found[0].rate  # as published, to the last digit
    elif full and any(estimate.profile != profile for estimate in found):
        other = " and ".join(sorted({estimate.profile for estimate in found} - {profile}))
        reasons.append(f"published with profile {other}; in the mean over blocks, {profile} {full:.2f} is as strong")
    share = _share_of_steps(facts.steps)
    rate = round(full * share, 2)
    if config.freeze.epochs == "all":
        reasons.append(
            "what is frozen for the whole run (freeze.stages) drops nothing: the rate acts on the other blocks alone"
        )
    if own is not None and own.schedule != schedule:
        reasons.append(f"the {own.rate:g} that is published for this model is constant over time")
    spread = [at_mean(mean, facts.depths, profile) for mean in (min(means), max(means))]
    low, high = min(full / 2, full - 0.1, spread[0]), max(full * 1.5, full + 0.1, spread[1])
    if share < 1:
        low = 0.0
        reasons.append(
            f"{facts.steps:,} optimizer steps are few: below {FULL_STEPS:,} the rate shrinks, to 0 at {NO_STEPS:,}; here "
            f"from {full:.2f} to {rate:.2f}. This is our inference, not a publication: {MEASURED}; but {BY_HEART}. "
            "So where augmentation is weak, let a search look as far as 0.5"
        )
    elif not near:
        low = 0.0
    elif facts.steps is None:
        low = 0.0
        reasons.append(f"the number of training images is not known ({facts.images_from}), so the range starts at 0")
    rows: list[Row] = []
    for row in (row for estimate in found for row in estimate.rows):
        rows += [] if row in rows else [row]
    low, high = max(0.0, round(low, 2)), max(rate, min(WIDEST, round(high, 2)))
    advice = Advice(rate, profile, low, high, *told, rows, reasons, [], facts)
    return replace(advice, reasons=reasons + _about_schedules(config, advice), warnings=_warnings(config, advice))


def _mean(estimate: Estimate, depths: Sequence[int]) -> float:
    return mean_rate(drop_path_rates(estimate.rate, depths, estimate.profile))


def at_mean(mean: float, depths: Sequence[int], profile: ProfileName) -> float:
    """The largest rate over blocks of a profile whose mean is given; at most 1."""
    return min(1.0, mean / mean_rate(drop_path_rates(1.0, depths, profile)))


def _profile(
    config: TrainConfig, found: Sequence[Estimate], mean: float, depths: Sequence[int]
) -> tuple[ProfileName, ProfileName]:
    """The profile to give the rate in, and that which was wanted: the config's, or where it names none the published one."""
    section = config.drop_path
    wanted: ProfileName = "linear" if isinstance(section.profile, list) else section.profile
    if "profile" not in section.model_fields_set and len({estimate.profile for estimate in found}) == 1:
        wanted = found[0].profile
    reached = mean_rate(drop_path_rates(1.0, depths, wanted))
    return ("constant" if mean > reached else wanted), wanted


def _share_of_steps(steps: int | None) -> float:
    """How much of a published rate a run of so many optimizer steps takes."""
    if steps is None:
        return 1.0
    return min(1.0, max(0.0, math.log(max(1, steps) / NO_STEPS) / math.log(FULL_STEPS / NO_STEPS)))


def _about_schedules(config: TrainConfig, advice: Advice) -> list[str]:
    """What there is to know of schedules over time for this model."""
    facts, section = advice.facts, config.drop_path.schedule
    if section.kind in ("early", "late"):
        return []
    if section.kind != "constant":
        return [
            f"the published rates are constant over time; schedule {section.kind} multiplies them, so that the same rate is "
            "weaker"
        ]
    if facts.purpose == "train" and facts.params <= SMALL and advice.rate > 0:
        return [
            "a model that underfits may gain from an early schedule, where a constant rate cost it accuracy (Liu et al. "
            "2023: ViT-T 73.9 without, 72.6 constant, 74.4 early, of 5.7 M parameters on ImageNet-1k): "
            "drop_path.schedule={kind: early, cutoff_epochs: a sixth of the epochs} with rate 0.5"
        ]
    return []


def _warnings(config: TrainConfig, advice: Advice) -> list[str]:
    """What in a config is far from the advice."""
    facts, section = advice.facts, config.drop_path
    found = []
    mean = config_mean(config, facts)
    listed = isinstance(section.profile, list)
    if mean is not None:
        equal = at_mean(mean, facts.depths, advice.profile)
        what = "drop_path.profile, a list," if listed else f"drop_path.rate {facts.rate:g} ({section.profile})"
        if not math.isclose(equal, facts.rate or 0.0, abs_tol=1e-9):
            what += f", as strong as {equal:.2f} {advice.profile},"
        published = [row for row in advice.rows if row.profile != section.profile and row.rate > 0]
        if not listed and facts.rate and published and section.profile in ("constant", "linear"):
            row = min(published, key=lambda row: abs(row.rate - (facts.rate or 0.0)))
            if abs(row.rate / facts.rate - 1) < 0.25:
                stronger = "twice as strong as" if section.profile == "constant" else "half as strong as"
                found.append(
                    f"drop_path.rate {facts.rate:g} with profile {section.profile} is about {stronger} the published "
                    f"{row.rate:g}, which is {row.profile}: constant and linear-maximum rates are not the same strength"
                )
        if equal > advice.high + 0.005:
            found.append(f"{what} is far above the range from {advice.low:g} to {advice.high:g}{_because(facts)}")
        elif equal < advice.low - 0.005:
            found.append(f"{what} is far below the range from {advice.low:g} to {advice.high:g}{_because(facts)}")
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    published_mixes = any(row.mixing for row in advice.rows if row.purpose == "finetune")
    if facts.purpose == "finetune" and mixes and not published_mixes and facts.epochs <= SHORT:
        found.append(
            f"mixup or cutmix is on in a fine-tuning of {counted(facts.epochs, 'epoch')}; MetaFormer's at 384 px and "
            "ConvNeXt's, 30 epochs each, turn both off: augment.mixup=0 augment.cutmix=0"
        )
    return found


def _because(facts: Facts) -> str:
    """The size of a run in words."""
    steps = "" if facts.steps is None else f" and {counted(facts.steps, 'optimizer step')}"
    return f" for {counted(facts.blocks, 'block')}, {facts.params:.3g} M parameters{steps}"
