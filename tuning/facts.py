"""What advice needs to know of a training config: the model's size and blocks, the data's size, length and purpose.

The model is built on the meta device: no weights, no computation. Training images are counted where that reads no image and
fetches nothing.
"""

import math
import os
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
from torch import nn

from files.errors import ConfigError, Failure
from layers.rates import drop_path_rates
from models.counting import count_parameters
from models.factory import create_model, model_facts
from stochastic_depth.blocks import Block, stage_depths
from stochastic_depth.places import block_names, find_owners
from training.config import TrainConfig
from training.data.split import divide
from training.default_rate import with_default_rate
from training.setup import check_model_keys
from tuning.published import Pretraining, load_published

RunPurpose = Literal["train", "finetune", "probe"]


@dataclass(frozen=True)
class Facts:
    """What was found out about a config.

    Attributes:
        model: Its name.
        purpose: train (from scratch), finetune, or probe: all but the classifier is frozen for the whole run.
        pretraining: What a fine-tuning starts from; None: not known, or from scratch.
        depths: Residual blocks per stage; empty: none.
        params: Parameters in millions, with a classifier of 1,000 classes, so that models can be compared.
        images: Training images; None: not known.
        images_from: Where that number is from, or why it is not known.
        epochs: Of the run.
        steps: Optimizer steps of the run; None: not known.
        image_size: Pixels, the longer side.
        rate: The config's rate, and where it has none the one that training would take; None: a list of rates.
        default_rate: The rate in the model's own YAML; None: there is none.
    """

    model: str
    purpose: RunPurpose
    pretraining: Pretraining | None
    depths: list[int]
    params: float
    images: int | None
    images_from: str
    epochs: int
    steps: int | None
    image_size: int
    rate: float | None
    default_rate: float | None

    @property
    def blocks(self) -> int:
        """Residual blocks."""
        return sum(self.depths)


def find_facts(config: TrainConfig, images: int | None = None) -> Facts:
    """All facts of a config.

    Args:
        config: The run.
        images: Number of training images; None: counted where that is cheap.

    Raises:
        ConfigError: The model cannot be built as the config says.
    """
    section = config.model
    check_model_keys(section)
    overrides = config.model_arguments
    known = model_facts(section.name, num_classes=section.num_classes, **overrides)
    model = _built(section.name, overrides)
    names = dict.fromkeys(block_names(find_owners(model)))
    images_from = "as given" if images is not None else ""
    if images is None:
        images, images_from = count_training_images(config)
    tag = str(known.pretrained_cfg.get("tag", "")) if section.pretrained else ""
    return Facts(
        model=section.name,
        purpose=_purpose(config),
        pretraining=_pretraining(tag),
        depths=stage_depths(model, [Block(name, {}) for name in names]),
        params=sum(count_parameters(model)) / 1e6,
        images=images,
        images_from=images_from,
        epochs=config.optim.epochs,
        steps=None if images is None else steps_of(config, images),
        image_size=max(known.pretrained_cfg["input_size"][1:]),
        rate=with_default_rate(config.drop_path, section, known)[0].rate,
        default_rate=known.drop_path_rate,
    )


def count_training_images(config: TrainConfig) -> tuple[int | None, str]:
    """The number of training images, or None, and where it is from, or why it is not known.

    Files are listed, not opened. What would be fetched, or indexed as a whole first, is not counted. Where the data are not
    at hand, 1,000 classes are taken for ImageNet-1k and 10,000 and more for ImageNet-21k.
    """
    data = config.data
    name = data.dataset.partition("/")[0]
    elsewhere = {
        "webdataset": "shards are not read for advice",
        "huggingface": None if data.root else "it may have to be fetched",
        "torchvision": "it may have to be fetched" if data.download else None,
    }
    why = elsewhere.get(name)
    if why is None:
        try:
            sources = divide(import_module(data.kind.module).sources(data), data, seed=config.seed)
            return len(sources.train), f"{data.dataset}, counted"
        except (ConfigError, Failure, OSError, ImportError) as error:
            why = str(error).partition("\n")[0]
    classes = config.model.num_classes or 0
    guess = "imagenet-1k" if classes == 1000 else "imagenet-21k" if classes >= 10_000 else None
    if guess is not None:
        return load_published().images[guess], f"taken for {guess} because of model.num_classes {classes:,} ({why})"
    return None, why


def mean_rate(rates: list[float]) -> float:
    """Mean over blocks: how strong a profile is."""
    return math.fsum(rates) / len(rates)


def config_mean(config: TrainConfig, facts: Facts) -> float | None:
    """Mean over blocks of the rates that a config asks for; None where it says compute, or cannot be met."""
    section = config.drop_path
    if section.rate_is == "expected_macs" or not facts.depths:
        return None
    try:
        return mean_rate(drop_path_rates(facts.rate, facts.depths, section.profile, section.rate_is))
    except ValueError:
        return None


def _built(name: str, overrides: dict[str, object]) -> nn.Module:
    arguments = {**overrides, "num_classes": 1000}
    try:
        with torch.device("meta"):
            return create_model(name, **arguments)  # type: ignore[arg-type]
    except Exception:  # a foreign constructor that computes something
        with torch.random.fork_rng(devices=[]):
            return create_model(name, **arguments)  # type: ignore[arg-type]


def _purpose(config: TrainConfig) -> RunPurpose:
    frozen = config.freeze.epochs == "all" or config.freeze.epochs >= config.optim.epochs
    if frozen and config.freeze.stages == "all":
        return "probe"
    return "finetune" if config.model.pretrained or config.model.checkpoint is not None else "train"


def _pretraining(tag: str) -> Pretraining | None:
    """What published weights were trained on, read off timm's tag of them."""
    if any(word in tag for word in ("in21k", "in22k", "21k", "22k")):
        return "imagenet-21k"
    if any(word in tag for word in ("mae", "mim", "dino", "moco", "ssl", "lvd")) and "ft_" not in tag:
        return "self-supervised"
    return "imagenet-1k" if "1k" in tag.lower() else None


def steps_of(config: TrainConfig, images: int) -> int:
    """Optimizer steps of a whole run on so many training images."""
    batch = config.data.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    return config.optim.epochs * math.ceil(max(1, images // batch) / config.optim.accumulate)
