"""Fine-tuning: the shipped recipes take their first steps from local weights; another size, head and layer decay."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import CONFIGS
from models.factory import create_model, saved_config
from models.weights import save_weights
from stochastic_depth.setting import set_drop_path
from tests.training.parts import TINY, WORLD, build_tiny, classifier, first_batches, step
from training.config import OptimSection, load_config
from training.freezing import Freezing
from training.optim import build_optimizer
from training.recipe import FreezeSection
from training.setup import Setup, build, describe

RECIPES = sorted((CONFIGS / "finetune").glob("*.yaml"))
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


def save(folder: Path, name: str, **arguments: Any) -> Path:
    """Weights as a run leaves them, of other classes than those that follow."""
    torch.manual_seed(7)
    model = create_model(name, **arguments)
    save_weights(folder / "best", model.state_dict(), saved_config(model))
    return folder / "best"


def recipe(path: Path, tmp_path: Path, images: list[str], *, small: bool) -> Setup:
    """A recipe built with local weights of its own model, small where that can be said, on generated images."""
    config = load_config(path)
    name, given = config.model.name, config.model.overrides
    overrides = []
    if small:
        given |= SMALL | ({"head_dim": 8} if name.startswith("caformer") else {}) | {"image_size": 64}
        overrides += [f"model.{key}={value}" for key, value in given.items()] + ["data.image_size=64"]
    weights = save(tmp_path, name, **{**given, "num_classes": 7})
    overrides += ["model.pretrained=false", f"model.checkpoint={weights}", "runtime.device=cpu", "data.workers=0"]
    if config.data.dataset == "folder":
        overrides += [f"data.root={tmp_path / 'images'}", "data.batch_size=4"]
    return build(load_config(path, overrides), WORLD)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_takes_its_first_steps(path: Path, tmp_path: Path, images: list[str], caplog) -> None:
    small = load_config(path).data.dataset == "folder"
    setup = recipe(path, tmp_path, images, small=small)
    assert "classifier of 7 classes replaced by a new one of" in caplog.text
    assert not setup.mixer.enabled, "mixing is off"
    before = {key: value.clone() for key, value in setup.model.state_dict().items()}
    for epoch in (0, 10):  # perhaps frozen, and then not
        setup.model.train()
        setup.freezing.set_epoch(epoch)
        assert all(math.isfinite(step(setup, [batch], number=epoch)) for batch in first_batches(setup))
    moved = {key for key, value in setup.model.state_dict().items() if not torch.equal(value, before[key])}
    assert any(key.startswith(setup.model.pretrained_cfg["classifier"]) for key in moved)
    plan = describe(setup)
    assert ("frozen" in plan) == (load_config(path).freeze.epochs != 0)


def test_the_published_recipe_at_384() -> None:
    path = CONFIGS / "finetune" / "imagenet_384_caformer_s18.yaml"
    config = load_config(path)
    assert (config.model.overrides["drop_rate"], config.data.image_size, config.optim.epochs) == (0.4, 384, 30)
    assert (config.augment.mixup, config.augment.cutmix, config.ema.decay) == (0, 0, 0.9999)
    assert (config.optim.name, config.optim.lr, config.optim.layer_decay) == ("lamb", 1e-4, None)
    assert 8 * config.data.batch_size * config.optim.accumulate == 1024, "as the head says"
    head = path.read_text().partition("\nseed:")[0]
    assert all(
        word in head for word in ("2210.13452", "torchrun", "NOT run by us", "tests/training/test_finetuning.py")
    )


@pytest.mark.parametrize("name", ["imagenet_384_caformer_s18", "folder_from_pretrained"])
def test_the_rate_published_for_fine_tuning_is_taken(name: str, tmp_path: Path, images: list[str]) -> None:
    setup = recipe(CONFIGS / "finetune" / f"{name}.yaml", tmp_path, images, small=True)
    assert setup.config.drop_path.rate == 0.3
    assert "0.3 by default: published for fine-tuning it" in describe(setup)
    dropout = [module.p for module in setup.model.head.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropout == [0.4 if name.startswith("imagenet") else 0.0]


def test_another_recipes_model_needs_its_name_alone(tmp_path: Path, images: list[str]) -> None:
    """The command in the head of folder_from_pretrained.yaml, with weights at hand."""
    weights = save(tmp_path, "timm/convnext_atto", num_classes=7, image_size=32)
    overrides = [f"data.root={tmp_path / 'images'}", "data.batch_size=4", "data.workers=0", "data.image_size=32",
                 "model.pretrained=false", f"model.checkpoint={weights}", "model.name=timm/convnext_atto",
                 "drop_path.rate=0.1"]  # fmt: skip
    setup = build(load_config(CONFIGS / "finetune" / "folder_from_pretrained.yaml", overrides), WORLD)
    assert math.isfinite(step(setup, first_batches(setup))) and setup.model.num_classes == 2


# ---- another resolution ---------------------------------------------------------------------------------------------


def test_weights_of_28_pixels_go_on_at_32(tmp_path: Path) -> None:
    small = {"depths": [1, 1], "dims": [16, 32], "in_chans": 1}
    weights = save(tmp_path, "convformer_n4", **small, image_size=28, num_classes=7)
    model = f"model={{name: convformer_n4, depths: [1, 1], dims: [16, 32], in_chans: 1, checkpoint: {weights}}}"
    setup = build_tiny(model, "data.image_size=32")
    (batch,) = first_batches(setup)
    assert batch[0].shape[-1] == 32 and math.isfinite(step(setup, [batch]))


@pytest.mark.parametrize(
    ("name", "small", "key", "said"),
    [
        ("vit_tiny_patch16_224", {"depths": [1]}, "embed.pos_embed",
         "position embedding resampled from 14 x 14 to 24 x 24"),
        ("timm/vit_tiny_patch16_224", {"depth": 1}, "pos_embed",
         "pos_embed resampled from 1 x 197 x 192 to 1 x 577 x 192"),
    ],
)  # fmt: skip
def test_positions_of_224_pixels_go_on_at_384(
    name: str, small: dict, key: str, said: str, tmp_path: Path, caplog
) -> None:
    weights = save(tmp_path, name, **small, in_chans=1, num_classes=7)
    (words,) = (f"{setting}: {value}" for setting, value in small.items())
    setup = build_tiny(
        f"model={{name: {name}, {words}, in_chans: 1, checkpoint: {weights}}}",
        "data={dataset: digits, batch_size: 2, workers: 0, image_size: 384}",
    )
    assert said in caplog.text and "replaced by a new one of 10" in caplog.text
    assert setup.model.get_parameter(key).shape == (1, 577, 192)
    (batch,) = first_batches(setup)
    assert batch[0].shape[-1] == 384 and math.isfinite(step(setup, [batch]))


# ---- layer decay, freezing and the average --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first", "middle"),
    [
        ("convformer_s18", "stem.conv.weight", "stages.2.blocks.4.mlp.fc1.weight"),
        ("vit_tiny_patch16_224", "stem.conv.weight", "stages.0.blocks.6.mlp.fc1.weight"),
        ("timm/resnet18", "conv1.weight", "layer2.0.conv1.weight"),
        ("timm/efficientnet_lite0", "conv_stem.weight", "blocks.3.0.conv_pw.weight"),
        ("timm/swin_tiny_patch4_window7_224", "patch_embed.proj.weight", "layers.2.blocks.2.mlp.fc1.weight"),
        ("torchvision/resnet18", "conv1.weight", "layer2.0.conv1.weight"),
        ("torchvision/efficientnet_b0", "features.0.0.weight", "features.4.0.block.0.0.weight"),
        ("torchvision/vit_b_16", "conv_proj.weight", "encoder.layers.encoder_layer_6.mlp.0.weight"),
    ],
)
def test_layer_decay_rises_from_the_first_layer_to_the_head(name: str, first: str, middle: str) -> None:
    with torch.device("meta"):
        model: Any = create_model(name, num_classes=5)
    optimizer = build_optimizer(model, OptimSection(layer_decay=0.75), torch.device("cpu"))
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales.keys() == {id(p) for p in model.parameters()}, "each once, none left out"
    low, mid = (scales[id(model.get_parameter(key))] for key in (first, middle))
    head = {scales[id(p)] for p in model.get_classifier().parameters()}
    assert low == min(scales.values()) < mid < 1.0 and head == {1.0}


def test_the_average_of_a_probe_is_of_the_new_head_alone(tmp_path: Path) -> None:
    """What is frozen stays in the average what it was, bit for bit; the average of the head moves."""
    weights = save(tmp_path, "caformer_n4", num_classes=7, in_chans=1, image_size=8, depths=[1, 1], dims=[16, 32])
    model = TINY[0].removesuffix("}") + f", checkpoint: {weights}}}"
    setup = build_tiny(model, "ema={enabled: true, decay: 0.5}", "freeze.epochs=1")
    assert setup.ema is not None
    before = {key: value.clone() for key, value in setup.ema.module.state_dict().items()}
    setup.model.train()
    setup.freezing.set_epoch(0)
    for number, batch in enumerate(first_batches(setup, 2), start=5):  # timm's average begins as a copy
        step(setup, [batch], number=number)
    moved = {k for k, value in setup.ema.module.state_dict().items() if not torch.equal(value, before[k])}
    assert moved == {"head.fc.weight", "head.fc.bias"}
    assert not torch.equal(setup.ema.module.head.fc.weight, classifier(setup).weight), "it is an average"


def test_a_model_of_another_library_is_frozen_with_its_new_head_free() -> None:
    model: Any = create_model("timm/efficientnet_lite0", num_classes=5)
    frozen = Freezing(FreezeSection(epochs=1), model.train(), set_drop_path(model, 0.2))
    frozen.set_epoch(0)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
