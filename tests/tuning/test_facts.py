"""What is found out about a config, without reading an image or fetching anything."""

from pathlib import Path

import pytest

from training.config import load_config
from tuning.facts import config_mean, count_training_images, find_facts, mean_rate

DIGITS = ["optim.epochs=4", "data.batch_size=100"]


def folder(root: Path, count: int) -> str:
    for name in ("cat", "dog"):
        for part in ("train", "val"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                (root / part / name / f"{i}.png").write_bytes(b"no image at all")
    return f"data={{dataset: folder, root: {root}}}"


@pytest.mark.parametrize(
    ("overrides", "purpose"),
    [
        ([], "train"),
        (["model.pretrained=true"], "finetune"),
        (["model.checkpoint=runs/x/best"], "finetune"),
        (["freeze={epochs: all}"], "probe"),
        (["freeze={epochs: 4}", "model.checkpoint=runs/x/best"], "probe"),
        (["freeze={epochs: 2}", "model.checkpoint=runs/x/best"], "finetune"),
        (["freeze={epochs: all, stages: 1}", "model.checkpoint=runs/x/best"], "finetune"),
    ],
)
def test_purpose(overrides: list[str], purpose: str) -> None:
    assert find_facts(load_config(None, [*DIGITS, "optim.warmup_epochs=0", *overrides]), images=9).purpose == purpose


@pytest.mark.parametrize(
    ("name", "pretraining"),
    [
        ("caformer_s18", "imagenet-1k"),
        ("caformer_s18.sail_in22k_ft_in1k", "imagenet-21k"),
        ("timm/vit_base_patch16_224.mae", "self-supervised"),
        ("torchvision/swin_t", "imagenet-1k"),
    ],
)
def test_where_weights_come_from(name: str, pretraining: str) -> None:
    config = load_config(None, [f"model={{name: {name}, pretrained: true}}", "augment={}"])
    assert find_facts(config, images=9).pretraining == pretraining
    scratch = load_config(None, [f"model={{name: {name}}}", "augment={}"])
    assert find_facts(scratch, images=9).pretraining is None


def test_size_of_a_model_with_overrides() -> None:
    facts = find_facts(load_config(None, [*DIGITS, "model.depths=[3, 6]", "data.train_samples=250"]))
    assert (facts.depths, facts.blocks) == ([3, 6], 9)
    assert (facts.images, facts.epochs, facts.steps) == (250, 4, 8)
    assert facts.image_size == 16 and facts.rate == 0.1
    more = find_facts(load_config(None, [*DIGITS, "optim.accumulate=2", "drop_path={profile: [0.1, 0.1, 0, 0]}"]))
    assert (more.images, more.steps, more.rate) == (1437, 28, None)


def test_the_classifier_of_the_data_does_not_count() -> None:
    sizes = {find_facts(load_config(None, [f"model.num_classes={n}"]), images=9).params for n in (10, 5000)}
    assert len(sizes) == 1


def test_images_are_counted_by_their_files(tmp_path: Path) -> None:
    config = load_config(None, [folder(tmp_path, 3), "augment={}"])
    assert count_training_images(config) == (6, "folder, counted")


@pytest.mark.parametrize(
    ("overrides", "images", "words"),
    [
        (["data={dataset: folder, root: nowhere}"], None, "'nowhere' does not exist"),
        (["data={dataset: folder, root: nowhere}", "model.num_classes=1000"], 1_281_167, "taken for imagenet-1k"),
        (["data={dataset: folder, root: nowhere}", "model.num_classes=21843"], 14_197_122, "taken for imagenet-21k"),
        (["data={dataset: huggingface/cifar10}"], None, "may have to be fetched"),
        (["data={dataset: torchvision/CIFAR10, root: nowhere, download: true}"], None, "may have to be fetched"),
        (["data={dataset: webdataset, root: nowhere}"], None, "shards are not read"),
    ],
)
def test_images_that_are_not_at_hand(overrides: list[str], images: int | None, words: str) -> None:
    found, told = count_training_images(load_config(None, ["augment={}", *overrides]))
    assert found == images and words in told and "\n" not in told


def test_how_strong_a_config_is() -> None:
    linear = load_config(None, ["drop_path={rate: 0.4}"])
    facts = find_facts(linear, images=9)
    assert config_mean(linear, facts) == pytest.approx(0.2)
    assert config_mean(load_config(None, ["drop_path={rate: 0.4, rate_is: mean}"]), facts) == pytest.approx(0.4)
    assert config_mean(load_config(None, ["drop_path={rate: 0.4, rate_is: expected_macs}"]), facts) is None
    assert mean_rate([0.0, 0.1, 0.5]) == pytest.approx(0.2)


def test_the_rate_that_training_would_take() -> None:
    config = load_config(None, ["model={name: deit3_base_patch16_224}", "augment={}", "drop_path={}"])
    facts = find_facts(config, images=9)
    assert (facts.rate, facts.default_rate) == (0.2, 0.2)
    tuned = load_config(None, ["model={name: caformer_s18, pretrained: true}", "augment={}", "drop_path={}"])
    assert find_facts(tuned, images=9).rate == 0.3, "published for fine-tuning it"
