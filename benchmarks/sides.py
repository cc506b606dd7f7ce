"""The two sides of a comparison with timm: our model and timm's, with equal weights and drop rates, checked."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath as TimmDropPath
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from files.errors import ConfigError, Failure
from models.config import override_config
from models.factory import create_model
from models.fast_layers import use_fast_layers
from models.layouts import timm_head, to_timm
from models.metaformer import MetaFormer
from models.registry import model_config
from stochastic_depth.blocks import find_blocks
from stochastic_depth.places import find_owners, foreign_rate
from stochastic_depth.proof import randomise_scales
from stochastic_depth.setting import set_drop_path
from training.config import OptimSection
from training.optim import build_optimizer

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CLASSES = 1000
OURS, THEIRS = ("masked", "skipping"), ("timm", "timm channels_last")
OPTIM = OptimSection(name="adamw", lr=1e-5)  # so small that steps on noise cannot diverge; it costs no time
LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


class Setting(NamedTuple):
    """Drop rate and its profile over depth."""

    rate: float
    profile: Literal["linear", "constant"] = "linear"

    def __str__(self) -> str:
        return f"{self.rate:g} {self.profile}" if self.rate else "0"


@dataclass(frozen=True)
class Pair:
    """A model on both sides, with equal weights.

    Attributes:
        name: As `create_model` knows it.
        ours: Without drop rates, float32, on the CPU; sides take copies.
    """

    name: str
    ours: MetaFormer | Any

    @property
    def foreign(self) -> bool:
        """Whether ours is timm's own model."""
        return self.name.startswith("timm/")

    @property
    def size(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.ours.pretrained_cfg["input_size"]
        return channels, height, width

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict, or gradients by the same names, in timm's layout."""
        return dict(tensors) if self.foreign else to_timm(dict(tensors), self.ours.config)

    def theirs(self, rate: float = 0.0) -> nn.Module:
        """timm's model with our weights, its own drop path rising linearly to a rate."""
        model = timm.create_model(self.name.removeprefix("timm/"), num_classes=CLASSES, drop_path_rate=rate)
        model.load_state_dict(self.convert(self.ours.state_dict()))
        return model


@dataclass
class Side:
    """A model ready for training steps."""

    model: nn.Module
    images: Tensor
    targets: Tensor
    optimizer: torch.optim.Optimizer
    autocast: AbstractContextManager[Any]

    def step(self) -> None:
        """One training step, which leaves no gradients."""
        with self.autocast:
            loss = F.cross_entropy(self.model(self.images), self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def check_name(name: str) -> None:
    """Looks a model up on both sides, before anything is built.

    Raises:
        ConfigError: timm or we have no such model.
    """
    if not name.startswith("timm/"):
        model_config(name)
    if not timm.is_model(name.removeprefix("timm/")):
        raise ConfigError(f"{name}: timm has no such model to compare with")


def make_pair(name: str) -> Pair:
    """Our model of that name, with timm's head where that differs, and its weights in timm's layout.

    Raises:
        ConfigError: timm or we have no such model.
        Failure: timm's computes something else from the same weights.
    """
    check_name(name)
    torch.manual_seed(0)
    if name.startswith("timm/"):
        ours = create_model(name, num_classes=CLASSES)
    else:
        config = model_config(name)
        if head := timm_head(config):
            config = override_config(config, {"head": head}, source=f"model {name}")
        ours = create_model(config, num_classes=CLASSES)
    pair = Pair(name, ours)
    check_equal(pair)
    return pair


def check_equal(pair: Pair) -> None:
    """Compares logits in evaluation and gradients in training at rate 0, in float32 and with layer scales near 1.

    Raises:
        Failure: They differ.
    """
    pair = replace(pair, ours=copy.deepcopy(pair.ours))
    randomise_scales(pair.ours)
    ours, theirs = pair.ours, pair.theirs()
    use_fast_layers(ours)
    images = torch.randn(2, *pair.size)
    with torch.no_grad():
        expected, got = theirs.eval()(images), ours.eval()(images)
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error <= LOGITS_TOLERANCE:
        raise Failure(f"{pair.name}: ours and timm's logits differ by {error:.1e} of the largest with equal weights")
    for model in (ours, theirs):
        F.cross_entropy(model.train()(images), torch.arange(2)).backward()
    named = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
    gradients = pair.convert(named)
    reference = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    if gradients.keys() != reference.keys():
        raise Failure(
            f"{pair.name}: other parameters have gradients: {sorted(gradients.keys() ^ reference.keys())[:3]}"
        )
    largest = max(float(g.abs().max()) for g in reference.values())
    for key, gradient in reference.items():
        # some are zero but for rounding, such as that of a key's bias
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        error = float((gradients[key] - gradient).abs().max()) / scale
        if not error <= GRADIENT_TOLERANCE:
            raise Failure(f"{pair.name}: ours and timm's gradients of {key} differ by {error:.1e} of the largest")


def our_rates(model: nn.Module) -> list[float]:
    """The rate of every drop-path module, in order."""
    return [module.drop_prob for block in find_blocks(model) for module in block.drop_paths.values()]


def their_rates(model: nn.Module) -> list[float]:
    """The rate of every drop-path module of timm's, in order; 0 where there is none."""
    return [foreign_rate(slot) for owner in find_owners(model) for slot in owner.slots.values()]


def build_model(pair: Pair, side: str, setting: Setting) -> nn.Module:
    """The model of one side, with its drop rates."""
    if side in OURS:
        model = copy.deepcopy(pair.ours)
        set_drop_path(model, setting.rate, profile=setting.profile, mode="skip" if side == "skipping" else "mask")
        return model
    model = pair.theirs(setting.rate)
    if setting.rate and setting.profile == "constant":
        for owner in find_owners(model):
            for key in owner.slots:
                setattr(owner.module, key, TimmDropPath(setting.rate))
    return model


def build_side(pair: Pair, side: str, setting: Setting, precision: Precision, images: Tensor, targets: Tensor) -> Side:
    """One side, on the images' device."""
    device = images.device
    model = build_model(pair, side, setting).train()
    if pair.foreign and side in OURS:
        use_fast_layers(model)
    channels_last = side == "timm channels_last" or (side in OURS and (pair.foreign or device.type == "cuda"))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)  # type: ignore[call-overload]
    if side in OURS:
        optimizer = build_optimizer(model, OPTIM, device)
    else:
        optimizer = create_optimizer_v2(model, opt=OPTIM.name, lr=OPTIM.lr, weight_decay=OPTIM.weight_decay)
    return Side(model, images.contiguous(memory_format=layout), targets, optimizer, autocast(device, precision))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context of a forward pass; can be entered again and again."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def check_rates(name: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Compares the rates of drop-path modules, in order.

    Raises:
        Failure: They differ.
    """
    if len(ours) != len(theirs) or any(abs(a - b) > 1e-6 for a, b in zip(ours, theirs, strict=True)):
        raise Failure(f"{name}: other drop rates in timm's model: {list(theirs)}, ours are {list(ours)}")
