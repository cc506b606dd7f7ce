"""Corruptions: each changes images, more with each severity, by draws that belong to the sample."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from files.errors import ConfigError
from training.data.transforms import ImageSpec
from training.evaluating.corruptions import CORRUPTIONS, Corrupted, Corruption, parse_corruptions, with_effect

SPEC = ImageSpec((3, 96, 96), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
MEAN, STD = (torch.tensor(values).reshape(-1, 1, 1) for values in (SPEC.mean, SPEC.std))


class Given:
    """A pipeline of pictures with soft edges, in 8 bits."""

    def __init__(self, channels: int = 3) -> None:
        generator = torch.Generator().manual_seed(3)
        coarse = torch.rand(6, channels, 32, 32, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic").clamp(0, 1)
        self.eight = smooth.mul(255).round().to(torch.uint8)

    def plain(self, indices) -> Tensor:
        return (self.eight[list(indices)].float() / 255 - MEAN) / STD

    def augmented(self, indices, streams: np.ndarray) -> Tensor:
        return self.plain(indices)


class Raw(Given):
    """The same, not normalised yet."""

    def plain(self, indices) -> Tensor:
        return self.eight[list(indices)]


def distance(corruption: Corruption) -> float:
    given = Given()
    return (Corrupted(given, corruption, SPEC).plain(range(6)) - given.plain(range(6))).abs().mean().item()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_changes_more(name: str) -> None:
    assert len(CORRUPTIONS[name].values) == 5
    found = [distance(Corruption(name, severity)) for severity in range(1, 6)]
    assert found[0] > 0.003 and all(b > a for a, b in pairwise(found)), found


@pytest.mark.parametrize("name", ["gaussian_noise", "jpeg"])
def test_what_a_sample_becomes_depends_on_nothing_else(name: str) -> None:
    pipeline = Corrupted(Given(), Corruption(name, 3), SPEC)
    together = pipeline.plain(range(6))
    torch.rand(5)
    alone = torch.cat([pipeline.plain([i]) for i in (5, 0)])
    assert torch.equal(together[[5, 0]], alone)
    before = torch.get_rng_state()
    pipeline.plain([1])
    assert torch.equal(before, torch.get_rng_state()), "the generators are put back"


def test_noise_has_its_strength() -> None:
    given = Given()
    given.eight.fill_(128)
    noisy = Corrupted(given, Corruption("gaussian_noise", 2), SPEC).plain(range(6))
    assert (noisy * STD).std(dim=(0, 2, 3)) == pytest.approx([0.08] * 3, rel=0.05)


def test_images_that_are_not_normalised_yet_stay_in_8_bits() -> None:
    corruption = Corruption("contrast", 4)
    raw = Corrupted(Raw(), corruption, SPEC).plain(range(6))
    assert raw.dtype == torch.uint8
    assert torch.allclose((raw / 255 - MEAN) / STD, Corrupted(Given(), corruption, SPEC).plain(range(6)), atol=1e-6)


def test_words() -> None:
    assert parse_corruptions(["jpeg", "jpeg:3", "rotate:1"]) == [Corruption("jpeg", 3), Corruption("rotate", 1)]
    assert [c.name for c in parse_corruptions(["all:2"])] == list(CORRUPTIONS)
    assert str(Corruption("jpeg", 3)) == "jpeg:3"


@pytest.mark.parametrize(
    ("word", "parts"),
    [("gausian_noise", ["'gausian_noise'; did you mean 'gaussian_noise'?", "known: "]), ("jpeg:0", ["1 to 5", "'0'"]),
     ("jpeg:6", ["'6'"]), ("jpeg:", ["''"]), ("jpeg:x", ["'x'"]), ("", ["unknown corruption ''"])],
)  # fmt: skip
def test_mistakes(word: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_corruptions([word])
    assert all(part in str(caught.value) for part in parts), caught.value


def test_what_changes_nothing_is_said_or_refused() -> None:
    both = [Corruption("saturation", 3), Corruption("jpeg", 3)]
    assert with_effect(both, 3) == (both, "")
    left, told = with_effect(both, 1)
    assert left == both[1:] and told.startswith("saturation:3 has no effect")
    with pytest.raises(ConfigError, match="saturation:3 has no effect on images of one channel"):
        with_effect(both[:1], 1)
