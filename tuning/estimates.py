"""What the families of published models say about a config's: rules 1 to 4 of `tuning.advice`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from files.words import counted
from layers.rates import ProfileName
from tuning.facts import Facts
from tuning.published import Published, Purpose, Row

MORE_DATA = 0.5
"""Median over the models of which both rates are published, DeiT-III, Swin and ConvNeXt; a test computes it."""

LONGER = 0.05
"""Of facebookresearch/deit, issue 176. The other way: ResNet strikes back, 0.05 in 300 epochs and 0 in 100."""


@dataclass(frozen=True)
class Estimate:
    """What one family says: a rate in the family's own profile, before the number of steps counts."""

    rate: float
    rows: list[Row]
    reasons: list[str]

    @property
    def profile(self) -> ProfileName:
        """Of the rate."""
        return self.rows[0].profile

    def is_near(self, facts: Facts, published: Published) -> bool:
        """Whether the family is the model's own, or built alike."""
        own, kin = published.families_of(facts.model)
        return self.rows[0].family in (*own, *kin)


def estimates(facts: Facts, published: Published, schedule: str) -> tuple[list[Estimate], list[str]]:
    """The estimate of each family that counts, and why these count.

    Args:
        facts: Of the config.
        published: All rows.
        schedule: Of the rows that count: constant, early or late.
    """
    purpose: Purpose = "finetune" if facts.purpose == "finetune" else "train"
    families, reasons = _families(facts, published, purpose, schedule)
    found: list[tuple[bool, bool, Estimate]] = []
    for name, rows_purpose in families:
        rows, fits = published.of_family(name, rows_purpose, schedule), True
        if rows_purpose == "finetune":
            rows = _nearest_finetuning(rows, facts)
            fits = facts.pretraining is None or rows[0].pretraining == facts.pretraining
            estimate = _of_finetuning(rows, facts, published, fits=fits)
        else:
            estimate = _by_data(rows, facts, published)
        near = min(_distance(row, facts, published) for row in rows) < math.log(2)
        found.append((fits, near, estimate))
    # of several, those with weights and a size like the config's
    for place in (0, 1):
        found = [entry for entry in found if entry[place]] or found
    return [estimate for *_, estimate in found], reasons


def _families(
    facts: Facts, published: Published, purpose: Purpose, schedule: str
) -> tuple[list[tuple[str, Purpose]], list[str]]:
    """Families whose rates count, each with the purpose of its rows that do, and why."""
    own, kin = published.families_of(facts.model)

    def with_rows(names: Sequence[str], wanted: Purpose) -> list[tuple[str, Purpose]]:
        return [(name, wanted) for name in names if published.of_family(name, wanted, schedule)]

    def labels(names: Sequence[tuple[str, Purpose]]) -> str:
        return ", ".join(published.families[name].label for name, _ in names)

    if schedule != "constant":
        found = with_rows([*own, *kin], purpose) or with_rows([*own, *kin], "train")
        return found, [f"schedule {schedule}: the rates of {labels(found)} are the only ones published with it"]
    if found := with_rows(own, purpose):
        return found, []
    if found := with_rows(kin, purpose):
        built = "are built alike" if len(found) > 1 else "is built alike"
        words = "fine-tuning" if purpose == "finetune" else "training"
        return found, [f"no {words} rate is published for {facts.model}; {labels(found)} {built}"]
    if purpose == "finetune" and (found := with_rows(own, "train") or with_rows(kin, "train")):
        return found, [
            f"no fine-tuning rate is published for {facts.model}; the training rate of {labels(found)} stands in"
        ]
    rows = [row for name in published.families for row in published.of_family(name, purpose, schedule)]
    nearest: dict[str, str] = {}  # one family of each repository, whose families share their figures
    for row in sorted(rows, key=lambda row: _distance(row, facts, published)):
        nearest.setdefault(row.source.partition(",")[0], row.family)
    found = with_rows(list(dict.fromkeys(nearest.values()))[:3], purpose)
    return found, [
        f"nothing published is near {facts.model} ({counted(facts.blocks, 'block')}, {facts.params:.3g} M parameters): what "
        f"is nearest in parameters, {labels(found)}, is a weak basis"
    ]


def _distance(row: Row, facts: Facts, published: Published) -> float:
    """How far the size of a row is, in the logarithm of parameters."""
    return abs(math.log(facts.params / published.size_of(row).params))


def _of_finetuning(rows: Sequence[Row], facts: Facts, published: Published, *, fits: bool) -> Estimate:
    """The rate of fine-tuning: by size alone, and in what the published one differs."""
    rate, used, why = _by_size(rows, facts, published)
    if not fits:
        why.append(f"what is published starts from {rows[0].pretraining} weights, these are {facts.pretraining}")
    if rows[0].image_size and abs(math.log(facts.image_size / rows[0].image_size)) > math.log(1.25):
        why.append(f"it was fine-tuned at {rows[0].image_size} px, this is at {facts.image_size}")
    return Estimate(rate, used, why)


def _nearest_finetuning(rows: Sequence[Row], facts: Facts) -> list[Row]:
    """Of a family's fine-tunings that with the config's pretraining, where it is known, and the nearest image size."""

    def far(row: Row) -> tuple[bool, float]:
        size = row.image_size or facts.image_size
        other = facts.pretraining is not None and row.pretraining != facts.pretraining
        return other, abs(math.log(facts.image_size / size))

    best = min(rows, key=far)
    return [r for r in rows if (r.pretraining, r.image_size) == (best.pretraining, best.image_size)]


def _by_data(rows: Sequence[Row], facts: Facts, published: Published) -> Estimate:
    """The rate from scratch: by size for each data set, then between these by the number of images, then by epochs."""
    per_data = {name: [row for row in rows if row.data == name] for name in published.images}
    names = sorted((name for name in per_data if per_data[name]), key=lambda name: published.images[name])
    small, large = names[0], names[-1]
    rate, used, why = _by_size(per_data[small], facts, published)
    epochs = used[-1].epochs
    images = facts.images or published.images[small]
    most = published.images["imagenet-21k"]
    share = min(1.0, max(0.0, math.log(images / published.images[small]) / math.log(most / published.images[small])))
    if share > 0 and small != large:
        more, used_too, why_too = _by_size(per_data[large], facts, published)
        between = rate + share * (more - rate)
        if share < 1:
            why.append(f"{images:,} images lie between {small} ({rate:.2g}) and {large} ({more:.2g}): {between:.2g}")
            used = used + used_too
        else:
            used, why = used_too, why_too
        rate = between
        if epochs is not None and used_too[-1].epochs is not None:
            epochs = round(epochs ** (1 - share) * used_too[-1].epochs ** share)
    elif share > 0:
        why.append(
            f"the same model takes lower rates on more data, about half on {most:,} images: {rate:.2g} on {small}, here "
            f"{rate * (1 - share * (1 - MORE_DATA)):.2g}"
        )
        rate *= 1 - share * (1 - MORE_DATA)
    if (
        facts.purpose == "train"
        and epochs is not None
        and images >= published.images[small] / 2
        and facts.epochs != epochs
    ):
        change = LONGER * min(1.0, max(-1.0, math.log2(facts.epochs / epochs)))
        longer = "longer training takes 0.05 more" if change > 0 else "shorter training takes up to 0.05 less"
        why.append(f"{counted(facts.epochs, 'epoch')} where {epochs} are published: {longer}")
        rate = max(0.0, rate + change)
    return Estimate(rate, used, why)


def _by_size(rows: Sequence[Row], facts: Facts, published: Published) -> tuple[float, list[Row], list[str]]:
    """The rate for the config's model among rows of one family and recipe, the rows it is from, and why."""
    label = published.families[rows[0].family].label
    by_size: dict[str, Row] = {}
    for row in rows:  # of several recipes of one size the one nearest in epochs
        before = by_size.get(row.size)
        if before is None or _epochs_off(row, facts) < _epochs_off(before, facts):
            by_size[row.size] = row
    ordered = sorted(by_size.values(), key=lambda row: published.size_of(row).params)
    same = [row for row in ordered if is_same(row, facts, published)]
    if same:
        row = same[0]
        return row.rate, [row], [f"{label} {row.size}: {row.rate:g} is published ({row.conditions})"]
    sizes = [published.size_of(row).params for row in ordered]
    close = min(ordered, key=lambda row: _distance(row, facts, published))
    if _distance(close, facts, published) < math.log(1.05) and facts.blocks >= published.size_of(close).blocks:
        return close.rate, [close], [f"of the size of {label} {close.size}: {close.rate:g} ({close.conditions})"]
    if facts.params <= sizes[0]:
        row, blocks = ordered[0], published.size_of(ordered[0]).blocks
        rate = row.rate * min(1.0, facts.blocks / blocks)
        why = f"smaller than {label} {row.size}, the smallest that is published ({row.rate:g}, {blocks} blocks): "
        fewer = f"in proportion to its {counted(facts.blocks, 'block')} {rate:.2g}"
        return rate, [row], [why + (fewer if facts.blocks < blocks else f"with as many blocks the same {rate:g}")]
    if facts.params >= sizes[-1]:
        row = ordered[-1]
        return row.rate, [row], [f"larger than {label} {row.size}, the largest that is published: its {row.rate:g}"]
    above = next(i for i, size in enumerate(sizes) if size > facts.params)
    low, high = ordered[above - 1], ordered[above]
    share = math.log(facts.params / sizes[above - 1]) / math.log(sizes[above] / sizes[above - 1])
    rate = low.rate + share * (high.rate - low.rate)
    why = (
        f"{facts.params:.3g} M parameters lie between {label} {low.size} ({sizes[above - 1]:g} M, {low.rate:g}) and "
        f"{high.size} ({sizes[above]:g} M, {high.rate:g}): {rate:.2g}"
    )
    return rate, [low, high], [why]


def _epochs_off(row: Row, facts: Facts) -> float:
    return abs(math.log(facts.epochs / row.epochs)) if row.epochs else math.inf


def is_same(row: Row, facts: Facts, published: Published) -> bool:
    """Whether a row is of this very model: its name, its blocks and, within 15 %, its parameters."""
    size = published.size_of(row)
    near = abs(facts.params / size.params - 1) < 0.15
    return published.is_size(row, facts.model) and facts.blocks == size.blocks and near


def own_row(facts: Facts, published: Published, schedule: str) -> Row | None:
    """What is published for this very model and purpose; of several recipes that nearest to the config's."""
    purpose = "train" if facts.purpose == "train" else "finetune"
    rows = [
        row
        for row in published.rates
        if (row.purpose, row.schedule) == (purpose, schedule) and is_same(row, facts, published)
    ]
    if purpose == "finetune" and rows:
        rows = _nearest_finetuning(rows, facts)
    images = max(facts.images or 0, min(published.images.values()))
    return min(
        rows,
        default=None,
        key=lambda row: (abs(math.log(images / published.images[row.data])), _epochs_off(row, facts)),
    )
