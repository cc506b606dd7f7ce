"""Samples by address: purity, replacements, samples that cannot be made."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.data.parts import AFFINE, COLOUR, EVERYTHING, GREY, damage, digits, folder, paths, skipping
from training.data.dataset import DataBundle, ReadError, Unreadable
from training.data.transforms import ImageSpec


@pytest.mark.parametrize("augment", [AFFINE, EVERYTHING], ids=["affine", "everything"])
@pytest.mark.parametrize("spec", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("source", ["digits", "folder"])
def test_a_sample_is_a_pure_function_of_seed_epoch_and_index(
    source: str, spec: ImageSpec, augment: dict[str, Any], image_root: Path
) -> None:
    def build(seed: int) -> DataBundle:
        return (
            digits(spec, seed=seed, **augment) if source == "digits" else folder(image_root, spec, seed=seed, **augment)
        )

    train = build(seed=3).train
    positions = [(2, 7), (2, 0), (2, 11), (4, 7), (2, 7)]
    batch: list[Any] = train.__getitems__(positions)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    again = build(seed=3).train
    for position, (image, target, index) in zip(positions, batch, strict=True):
        assert torch.equal(image, again[position][0])
        assert image.shape == spec.input_size and type(image) is torch.Tensor
        assert image.dtype == (torch.float32 if source == "digits" else torch.uint8)
        assert (target, index) == (train.targets[position[1]], position[1])
    assert not torch.equal(batch[0][0], batch[3][0]), "epochs 2 and 4 should differ"
    assert not torch.equal(batch[0][0], build(seed=4).train[2, 7][0]), "seeds 3 and 4 should differ"


def test_a_failing_image_leaves_the_global_random_states_alone(image_root: Path, unmoved_random_states: None) -> None:
    bundle = folder(image_root, **EVERYTHING)
    Path(paths(bundle.train)[1]).write_bytes(b"")
    _, damaged = bundle.train.__getitems__([(0, 0), (0, 1)])
    assert isinstance(damaged, Unreadable)
    with pytest.raises(ReadError):
        bundle.train[0, 1]


def test_an_image_that_a_transform_cannot_take_is_named(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = folder(image_root)
    (target,) = [p for p in paths(bundle.train) if p.endswith("daisy/3-grey.jpg")]

    def transform(pixels: torch.Tensor, *_: Any) -> torch.Tensor:
        if pixels.shape == (3, 25, 29):  # only that one
            raise ZeroDivisionError("division\nby zero")
        return torch.zeros(3, 16, 16)

    monkeypatch.setattr(bundle.train.pipeline, "train_transform", transform)
    index = paths(bundle.train).index(target)
    with pytest.raises(ReadError) as caught:
        bundle.train[0, index]
    assert str(caught.value) == f"cannot read image '{target}': ZeroDivisionError: division by zero"


def test_a_replacement_is_a_pure_function_of_the_address(image_root: Path, unmoved_random_states: None) -> None:
    bundle, _ = skipping(image_root)
    damage(bundle.train, 3, 8)
    positions = [(epoch, index) for epoch in range(4) for index in (3, 5, 8)]
    batch = bundle.train.__getitems__(positions)
    samples, replaced = batch[:12], batch[12:]
    assert all(isinstance(sample, tuple) for sample in samples)
    assert len(replaced) >= 8 and all(isinstance(r, Unreadable) and r.replaced for r in replaced)
    stand_ins = [sample[2] for sample in samples]  # pyright: ignore[reportIndexIssue]
    assert stand_ins[1::3] == [5] * 4 and not {3, 8} & set(stand_ins)
    assert len(set(stand_ins)) > 4, "another one in each epoch"
    again, _ = skipping(image_root)
    for position, sample in zip(positions, samples, strict=True):
        assert isinstance(sample, tuple)
        image, target, index = again.train[position]
        assert torch.equal(image, sample[0]) and (target, index) == sample[1:]
        assert target == bundle.train.targets[index]
    other, _ = skipping(image_root, seed=1)
    assert [other.train[position][2] for position in positions] != stand_ins
