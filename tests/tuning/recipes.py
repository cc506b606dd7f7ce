"""What tests of advice share: the facts of a published recipe, found out without building its model."""

from dataclasses import replace
from typing import Any

from training.config import TrainConfig, load_config
from tuning.advice import advice_for
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


def rate(facts: Facts, *overrides: str) -> float:
    return advice_for(config(*overrides), facts).rate
