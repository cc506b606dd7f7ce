"""Mixup and CutMix: what is mixed, purity, the end of mixing."""

import numpy as np
import pytest
import torch

from tests.training.data.parts import augment_section
from training.data.mixing import BatchMixer


def mixing_batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, 3, 8, 8, generator=generator), torch.arange(size) % 5


def test_a_disabled_mixer_passes_the_batch_through() -> None:
    mixer = BatchMixer(augment_section(label_smoothing=0.1), 5, seed=0)
    images, targets = mixing_batch()
    mixed, same = mixer(images, targets, 3)
    assert not mixer.enabled and mixed is images and same is targets


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_say_what_was_mixed(kind: str, unmoved_random_states: None) -> None:
    mixer = BatchMixer(augment_section(**{kind: 1.0}), 5, seed=0)
    images, targets = mixing_batch()
    for step in range(10):
        mixed, soft = mixer(images.clone(), targets, step)
        assert mixer.enabled and soft.shape == (6, 5)
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        share = soft[0, 0].item()  # image 0 (class 0) is mixed with image 5 (class 0), 1 (class 1) with 4 (class 4)
        assert share == pytest.approx(1)
        share = soft[1, 1].item()
        if kind == "mixup":
            torch.testing.assert_close(mixed[1], share * images[1] + (1 - share) * images[4])
        else:
            kept = (mixed[1] == images[1]).all(0)
            assert kept.float().mean().item() == pytest.approx(share, abs=1e-6)
            assert torch.equal(mixed[1][:, ~kept], images[4][:, ~kept])


def test_mixing_is_a_pure_function_of_seed_rank_and_step() -> None:
    section = augment_section(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    images, targets = mixing_batch()

    def mix(step: int, **address: int) -> tuple[torch.Tensor, torch.Tensor]:
        return BatchMixer(section, 5, **({"seed": 0, "rank": 0} | address))(images.clone(), targets, step)

    np.random.seed(1)
    reference = mix(4)
    np.random.seed(2)
    assert all(torch.equal(a, b) for a, b in zip(mix(4), reference, strict=True))
    for other in (mix(5), mix(4, seed=1), mix(4, rank=1)):
        assert not torch.equal(other[0], reference[0])


@pytest.mark.parametrize("size", [1, 5])
def test_the_last_sample_of_an_odd_batch_is_not_mixed(size: int) -> None:
    mixer = BatchMixer(augment_section(mixup=1.0, label_smoothing=0.1), 5, seed=0)
    images, targets = mixing_batch(size)
    mixed, soft = mixer(images.clone(), targets, 0)
    assert mixed.shape == images.shape and soft.shape == (size, 5)
    assert torch.equal(mixed[-1], images[-1])
    expected = torch.full((5,), 0.02)
    expected[targets[-1]] = 0.92
    torch.testing.assert_close(soft[-1], expected)
    assert size == 1 or not torch.equal(mixed[0], images[0])


def test_mixing_ends_at_its_epoch_with_targets_still_soft() -> None:
    mixer = BatchMixer(augment_section(mixup=1.0, label_smoothing=0.1, mixup_off_epoch=3), 5, seed=0)
    images, targets = mixing_batch()
    assert not torch.equal(mixer(images.clone(), targets, 0, epoch=2)[0], images)
    mixed, soft = mixer(images.clone(), targets, 0, epoch=3)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(soft, 0.9 * torch.nn.functional.one_hot(targets, 5) + 0.02)


def test_a_setting_without_effect_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="mixup_off_epoch has no effect"):
        BatchMixer(augment_section(mixup_off_epoch=3), 10, seed=0)
