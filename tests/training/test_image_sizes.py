"""Image sizes over epochs: the address says the size, in any worker; sizes that a model refuses are found before."""

import pytest
import torch

from files.errors import ConfigError
from tests.training.parts import build_tiny, weights
from training.image_sizes import check_sizes
from training.setup import describe

SIZES = "data.image_size_schedule=[[0, 6], [1, 12], [3, 10]]"


def shapes(*overrides: str) -> list[int]:
    setup = build_tiny(SIZES, "optim.epochs=5", *overrides)
    found = []
    for epoch in range(5):  # one loader, whose workers stay
        setup.sampler.set_position(epoch, 2)
        found.append(next(iter(setup.train_loader))[0].shape[-1])
    assert next(iter(setup.val_loader))[0].shape[-1] == 8, "validation is at the final size"
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_each_epoch_has_its_size(workers: int) -> None:
    assert shapes(f"data.workers={workers}") == [6, 12, 12, 10, 10]


@pytest.mark.slow
def test_of_folders_too(images: list[str]) -> None:
    setup = build_tiny(*images, "augment.color_jitter=0.5", "data.image_size_schedule=[[0, 6], [1, 12]]")
    train = setup.data.train
    assert [train[(epoch, 3)][0].shape[-1] for epoch in (0, 1, 2)] == [6, 12, 12]
    (image, *_), again = train[(1, 3)], train[(2, 3)][0]
    assert not torch.equal(image, again), "the draws are the epoch's own"


def test_without_a_schedule_nothing_changes() -> None:
    plain, same = build_tiny(), build_tiny("data.image_size_schedule=[[0, 8]]")
    assert weights(plain) == weights(same)
    assert torch.equal(plain.data.train[(1, 3)][0], same.data.train[(1, 3)][0])
    assert "sizes" not in describe(plain) and "sizes     8 from epoch 1" in describe(same)


def test_a_size_that_the_model_refuses() -> None:
    with pytest.raises(ConfigError, match=r"does not take images of 6 x 6 \(.+\); use sizes that it takes") as caught:
        build_tiny(SIZES, "optim.epochs=5", "model.token_mixer=spatial_mlp")
    assert len(str(caught.value).splitlines()) <= 3


def test_a_transformer_of_timm_says_why() -> None:
    vit = ["model={name: timm/vit_tiny_patch16_224, in_chans: 1, depth: 1, embed_dim: 12}", "data.image_size=32",
           "data.batch_size=8"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"16 x 16 \(.*height.*\).*dynamic_img_size=true"):
        build_tiny(*vit, "data.image_size_schedule=[[0, 16]]")
    setup = build_tiny(*vit, "data.image_size_schedule=[[0, 16]]", "model.dynamic_img_size=true")
    assert setup.model.training, "left in its mode"


def test_a_model_is_left_as_it_was() -> None:
    model = build_tiny().model.train()
    check_sizes(model, [[0, 4]])
    assert all(module.training for module in model.modules())
    check_sizes(model.eval(), None)
    assert not model.training


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[[1, 12]]", "epochs must rise strictly from 0, got [1]"),
        ("[[0, 12], [0, 14]]", "epochs must rise strictly from 0"),
        ("[[0, 0]]", "sizes must be at least 1"),
        ("[[0, 6], [2, 8]]", "epoch 2 is none of this run's, 0 to 1"),
        ("[[0, 6.5]]", "expected an integer"),
        ("[[0]]", "at least 2 entries"),
    ],
)
def test_mistakes(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_tiny(f"data.image_size_schedule={given}")
    assert message in str(caught.value)
