"""Whole batches on the device: normalising, and random erasing by (seed, epoch, index)."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.random_erasing import RandomErasing
from torch.utils.data import default_collate

from tests.training.data.parts import COLOUR, EVERYTHING, GREY, digits, folder, sampler_of, train_loader
from tests.training.data.test_cropping import chance
from training.data.cropping import stacked
from training.data.draws import hash_words, uniform
from training.data.normalise import Normalise, RandomErase, erased_box
from training.data.transforms import ImageSpec


def raw(count: int = 4, channels: int = 3) -> torch.Tensor:
    """A batch in uint8 as a loader gives it."""
    images = torch.randint(
        0, 256, (count, channels, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return stacked(list(images))


@pytest.mark.parametrize("spec", [COLOUR, GREY], ids=["colour", "grey"])
def test_bytes_become_normalised_numbers(spec: ImageSpec) -> None:
    images = raw(channels=spec.input_size[0])
    before = images.clone()
    found = Normalise(spec)(images)
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (spec.mean, spec.std))
    torch.testing.assert_close(found, (images.float() / 255 - mean) / std)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert torch.equal(images, before), "the loader's batch stays as it is"
    assert torch.equal(Normalise(spec)(images.contiguous()), found)
    assert torch.equal(Normalise(spec)(images[1:2]), found[1:2])


def test_a_ready_batch_passes() -> None:
    images = torch.randn(2, 3, 5, 7)
    assert Normalise(COLOUR)(images) is images


def erase(
    probability: float = 1.0, *, seed: int = 0, epoch: int = 0, indices: tuple[int, ...] = (3, 1, 4)
) -> torch.Tensor:
    """Zeros of (B, 3, 24, 20), erased."""
    images = torch.zeros(len(indices), 3, 24, 20)
    erased = RandomErase(probability, seed=seed)(images, torch.tensor(indices), epoch=epoch)
    assert erased is images
    return erased


def test_erasing_is_a_pure_function_of_seed_epoch_and_index(unmoved_random_states: None) -> None:
    batch = erase()
    assert (batch != 0).flatten(1).any(1).all()
    for row, index in enumerate((3, 1, 4)):
        assert torch.equal(erase(indices=(index,))[0], batch[row]), "the rest of the batch does not matter"
    for other in (erase(seed=1), erase(epoch=1), erase(indices=(5, 6, 7))):
        assert not torch.equal(other, batch)


def test_copies_of_a_sample_are_erased_each_in_its_own_way() -> None:
    once, twice, other = erase(indices=(3, 3, 1))
    assert not torch.equal(once, twice)
    assert torch.equal(once, erase()[0]) and torch.equal(other, erase()[1])
    images = torch.zeros(1, 3, 24, 20)
    later = RandomErase(1.0, seed=0)(images, torch.tensor([3]), epoch=0, batch=7)[0]
    assert not torch.equal(later, once), "in another batch of the same epoch"


def test_erasing_does_not_depend_on_the_memory_format() -> None:
    images = torch.zeros(3, 3, 24, 20).contiguous(memory_format=torch.channels_last)
    assert torch.equal(RandomErase(1.0, seed=0)(images, torch.tensor([3, 1, 4]), epoch=0), erase())


def test_erasing_that_is_off_leaves_batches_alone() -> None:
    assert not erase(0.0).any()


def shapes(images: torch.Tensor) -> np.ndarray:
    """Of each erased image (N, C, H, W): area, log of the aspect, and where the box lies in the room that it has."""
    found = []
    for image in images:
        rows, columns = image[0].any(1).nonzero(), image[0].any(0).nonzero()
        if len(rows):
            top, left = int(rows[0]), int(columns[0])
            h, w = int(rows[-1]) - top + 1, int(columns[-1]) - left + 1
            height, width = image.shape[1:]
            found.append((h * w, np.log(h / w), (top + 0.5) / (height - h + 1), (left + 0.5) / (width - w + 1)))
    return np.array(found)


def test_erasing_is_distributed_as_timm_has_it() -> None:
    count = 3000
    mine = RandomErase(0.6, seed=0)(torch.zeros(count, 1, 48, 40), torch.arange(count), epoch=2)
    random.seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = RandomErasing(0.6, mode="pixel", device="cpu")(torch.zeros(count, 1, 48, 40))
    ours, reference = shapes(mine), shapes(theirs)
    assert len(ours) / count == pytest.approx(0.6, abs=0.03) == len(reference) / count
    for a, b in zip(ours.T, reference.T, strict=True):
        assert chance(a, b) > 0.01
    noise = mine[mine != 0].double()
    assert chance(noise[:20000].numpy(), stats.norm.ppf((np.arange(20000) + 0.5) / 20000)) > 0.01


def test_no_box_fits_a_tiny_image() -> None:
    assert erased_box([0.9] * 40, 1, 2) is None
    draws = uniform(hash_words(np.arange(500)), 40)
    for row in draws:
        box = erased_box(row, 24, 20)
        assert box is not None
        top, left, h, w = box
        assert 0 <= top <= 24 - h and 0 <= left <= 20 - w and h < 24 and w < 20


def test_a_loaders_batches_are_bytes_whose_channels_lie_together(image_root: Path) -> None:
    bundle = folder(image_root, **EVERYTHING)
    assert bundle.erase.probability == EVERYTHING["random_erasing"]
    batches = {}
    for workers in (0, 1):
        loader = train_loader(bundle, batch_size=4, workers=workers)
        sampler_of(loader).set_position(1)
        batches[workers] = images, targets, indices = next(iter(loader))
        assert images.dtype == torch.uint8 and images.is_contiguous(memory_format=torch.channels_last)
        assert targets.dtype == indices.dtype == torch.int64
    assert all(torch.equal(a, b) for a, b in zip(*batches.values(), strict=True))
    ready = digits(**EVERYTHING)
    assert ready.erase.probability == 0, "digits are erased by their own pipeline"
    batch = next(iter(train_loader(ready, batch_size=4)))
    assert batch[0].dtype == torch.float32
    assert torch.equal(batch[0], default_collate([ready.train[0, int(i)] for i in batch[2]])[0])
