"""Schema of configs/models/*.yaml: one MetaFormer as data, strictly checked."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from files.errors import ConfigError, FieldError
from files.strict_yaml import load_yaml, validate
from files.words import counted
from layers.mlp import ActName
from layers.norm import NormName
from layers.token_mixers import TOKEN_MIXERS, TokenMixerName

OTHER_NAMES = {"input_size": "image_size", "img_size": "image_size"}
"""Words for our keys that are too far from them to be found as the nearest."""

MOST = 2**20  # channels, positions, classes: above any model, below what overflows
Size = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Depth = Annotated[int, Field(ge=1, le=10_000)]
Rate = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=-1e6, le=1e6)]
LEAST_CROP = 0.01
CropShare = Annotated[float, Field(ge=LEAST_CROP, le=1)]
T = TypeVar("T")


class Section(BaseModel):
    """A mapping in which every key must be known and have the right type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PatchConfig(Section):
    """Strided convolution of the stem, or between stages."""

    kernel_size: Size = Field(description="Kernel size in positions.")
    stride: Size = Field(description="Stride in positions.")
    padding: Count = Field(description="Zero padding in positions.")
    norm: NormName = Field(
        default="none", description="Norm after the stem's convolution, or before a downsampling one."
    )


class HeadConfig(Section):
    """Classifier over the last stage."""

    order: Literal["norm_pool", "pool_norm"] = Field(
        default="pool_norm", description="Normalise, then pool (PoolFormer, ViT), or the reverse."
    )
    pool: Literal["avg", "token"] = Field(
        default="avg", description="Average over positions, or take the class token instead (ViT)."
    )
    norm: NormName = Field(default="layer_norm", description="Norm of the head.")
    norm_eps: float | None = Field(
        default=None, gt=0, description="Epsilon of that norm; null: the norm's published one."
    )
    kind: Literal["linear", "mlp"] = Field(default="linear", description="Linear layer, or ConvFormer's MLP head.")
    mlp_norm_eps: float = Field(
        default=1e-5, gt=0, description="Epsilon of the norm inside the MLP head (timm's port: 1e-6)."
    )


class FineTuned(Section):
    """A published fine-tuning at another resolution."""

    top1: float = Field(description="ImageNet-1k top-1 in percent.")
    macs: float = Field(description="Multiply-accumulates in billions at that resolution.")
    drop_path_rate: Rate = Field(description="Drop-path rate of the fine-tuning.")


class Published(Section):
    """Facts that the model's authors published."""

    params: float = Field(description="Parameters in millions.")
    macs: float | None = Field(None, description="Multiply-accumulates in billions at the model's image size.")
    top1: float | None = Field(None, description="ImageNet-1k top-1 in percent, trained from scratch.")
    drop_path_rate: Rate | None = Field(
        None, description="Maximum drop-path rate of the training; linear over depth unless said."
    )
    frozen_params: float | None = Field(None, description="Never-trained parameters in millions, counted apart.")
    finetune_384: FineTuned | None = Field(
        None, description="Fine-tuning of the default weights at 384 x 384; its tag is theirs with _384 behind it."
    )
    source: str = Field(description="Where these figures stand.")


def check_channel_stats(in_chans: int, *, mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuses a mean or std that has neither one value nor one for each channel, and a std that is not positive.

    Raises:
        FieldError: Naming the key.
    """
    for key, values in {"mean": mean, "std": std}.items():
        if len(values) not in (1, in_chans):
            raise FieldError(key, f"must have one value, or one for each of in_chans {in_chans}, got {values}")
    if any(s <= 0 for s in std):
        raise FieldError("std", f"must be positive, got {std}")


class MetaFormerConfig(Section):
    """One model: everything that its weights and its forward depend on, and what is published about it.

    Keys given per stage are either one value for all stages or a list with one per stage.
    """

    name: str = Field("", description="Default: the file's name.")
    depths: list[Depth] = Field(min_length=1, description="Blocks per stage.")
    dims: list[Size] = Field(min_length=1, description="Channels per stage.")
    token_mixer: TokenMixerName | list[TokenMixerName] = Field(description="Token mixer, per stage.")
    norm: NormName | list[NormName] = Field("layer_norm_no_bias", description="Norm of both branches, per stage.")
    act: ActName = Field("star_relu", description="Activation of the MLP.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden channels of the MLP per channel.")
    mlp_bias: bool = Field(False, description="Whether the MLP's linear layers have a bias.")
    layer_scale: Scale | list[Scale | None] | None = Field(None, description="Initial LayerScale, per stage.")
    res_scale: Scale | list[Scale | None] | None = Field(None, description="Initial ResScale, per stage.")
    pool_size: Size = Field(3, description="Window of pooling, odd.")
    conv_kernel_size: Size = Field(7, description="Depthwise kernel of sep_conv, odd.")
    conv_expansion: float = Field(2.0, gt=0, description="Hidden channels of sep_conv per channel.")
    head_dim: Size = Field(32, description="Channels per attention head.")
    qkv_bias: bool = Field(False, description="Whether query, key and value of attention have a bias.")
    proj_bias: bool = Field(False, description="Whether the output projection of attention has a bias.")
    spatial_hidden: Size | None = Field(
        None, description="Hidden units of spatial_mlp (MLP-Mixer); null: one linear layer over positions (ResMLP)."
    )
    stem: PatchConfig
    downsample: PatchConfig | None = Field(None, description="Between stages of different width; null: there are none.")
    pos_embed: Literal["none", "patches", "all"] = Field(
        "none", description="Learned positions behind the stem: of the patches, or of class and register tokens too."
    )
    class_token: bool = Field(False, description="Whether a learned class token stands in front of the patches.")
    register_tokens: Count = Field(0, description="Learned tokens behind the class token.")
    head: HeadConfig = HeadConfig()
    drop_rate: Rate = Field(0.0, description="Dropout before the classifier.")

    in_chans: Size = Field(3, description="Channels of the input images.")
    num_classes: Count = Field(1000, description="Classes; 0: no classifier.")
    image_size: Size | list[Size] = Field(224, description="Pixels: one side of a square, or [height, width].")
    crop_pct: CropShare = Field(1.0, description="Share of the resized image kept by the centre crop.")
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: list[float] = Field(
        default_factory=lambda data: spread([0.485, 0.456, 0.406], data.get("in_chans", 3)),
        description="Mean of the input channels, images in [0, 1]: one value, or one per channel.",
    )
    std: list[float] = Field(
        default_factory=lambda data: spread([0.229, 0.224, 0.225], data.get("in_chans", 3)),
        description="Standard deviation of the input channels: one value, or one per channel.",
    )
    pretrained: list[str] = Field([], description="Tags of published weights, the default first.")
    published: Published | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_other_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key in OTHER_NAMES:
                raise FieldError(key, f"unknown key; did you mean {OTHER_NAMES[key]!r}?")
            if key.startswith("drop_path"):
                raise FieldError(
                    key,
                    "unknown key; a rate is no part of a model: it is drop_path_rate of create_model, and drop_path.rate "
                    "of a training config",
                )
        return data

    @field_validator("name")
    @classmethod
    def _no_path(cls, value: str) -> str:
        if not value.isprintable() or value != value.strip():
            raise ValueError(f"must be a plain name, without line breaks or spaces around it, got {value!r}")
        if "/" in value or "\\" in value or ".." in value or value.startswith("."):
            raise ValueError(f"must be a plain name, not a path, got {value!r}")
        return value

    @field_validator("pool_size", "conv_kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"must be odd, so that the output keeps its size, got {value}")
        return value

    @field_validator("image_size")
    @classmethod
    def _height_width(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, list) and len(value) != 2:
            raise ValueError(f"must be one number or [height, width], got {value}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "MetaFormerConfig":
        stages = len(self.depths)
        for key in ("dims", "token_mixer", "norm", "layer_scale", "res_scale"):
            value = getattr(self, key)
            if isinstance(value, list) and len(value) != stages:
                raise FieldError(key, f"has {counted(len(value), 'entry')}, depths has {counted(stages, 'stage')}")
        mixers = self.per_stage(self.token_mixer)
        for stage, (mixer, dim) in enumerate(zip(mixers, self.dims, strict=True)):
            if mixer == "attention" and dim % self.head_dim:
                message = f"dims[{stage}] = {dim} is not divisible by head_dim {self.head_dim}"
                raise FieldError(self._given("head_dim", "dims"), message)
            self._check_hidden("mlp_ratio", dim)
            if mixer == "sep_conv":
                self._check_hidden("conv_expansion", dim)
        if self.downsample is None and len(set(self.dims)) > 1:
            raise FieldError("dims", f"change between stages, {self.dims}, but downsample is missing")
        self._check_tokens()
        check_channel_stats(self.in_chans, mean=self.mean, std=self.std)
        if min(self.feature_size(stages - 1)) < 1:
            message = f"image_size {self.image_size} is too small for {counted(stages, 'stage')} of this stem"
            raise FieldError(self._given("image_size", "stem"), message)
        return self

    def _given(self, key: str, other: str) -> str:
        """The key at fault, or the other one where the first was left at its default and has no line."""
        return key if key in self.model_fields_set else other

    def _check_hidden(self, key: str, dim: int) -> None:
        ratio = getattr(self, key)
        if ratio * dim < 1:
            raise FieldError(key, f"{ratio} hidden channels per channel leave none of {dim} channels")
        if ratio * dim > MOST:
            raise FieldError(key, f"{ratio} hidden channels per channel make more than {MOST} of {dim} channels")

    def _check_tokens(self) -> None:
        if not self.num_prefix_tokens and self.pos_embed == "all":
            raise FieldError("pos_embed", "'all' needs a class token or register tokens; without them it is 'patches'")
        if self.head.pool == "token" and not self.class_token:
            raise FieldError("head.pool", "'token' needs class_token: true")
        if self.num_prefix_tokens:
            # tokens in front of the patches have no place in a grid (B, H, W, C)
            takers = sorted(name for name, mixer in TOKEN_MIXERS.items() if mixer.takes_tokens)
            grids = [m for m in self.per_stage(self.token_mixer) if m not in takers]
            if grids:
                message = f"class and register tokens go with {' and '.join(takers)} only, not with {grids[0]}"
                raise FieldError("token_mixer", message)
            if len(set(self.dims)) > 1:
                raise FieldError("dims", f"class and register tokens need stages of one width, got {self.dims}")

    # ---- derived --------------------------------------------------------------------------------------------------

    def per_stage(self, value: T | list[T]) -> list[T]:
        """A value for all stages, or one per stage, as a list with one per stage."""
        return value if isinstance(value, list) else [value] * len(self.depths)

    @property
    def height_width(self) -> tuple[int, int]:
        """Image size in pixels."""
        if isinstance(self.image_size, list):
            return self.image_size[0], self.image_size[1]
        return self.image_size, self.image_size

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens in front of the patches."""
        return int(self.class_token) + self.register_tokens

    @property
    def fixed_size(self) -> bool:
        """Whether weights belong to positions, so that the model takes images of its own size only."""
        mixers = self.per_stage(self.token_mixer)
        return self.pos_embed != "none" or any(TOKEN_MIXERS[mixer].fixed_size for mixer in mixers)

    def feature_size(self, stage: int) -> tuple[int, int]:
        """Positions (H, W) inside a stage at the model's image size. Stages of equal width keep the size."""
        height, width = (_conv_size(n, self.stem) for n in self.height_width)
        for i in range(1, stage + 1):
            if self.dims[i] != self.dims[i - 1] and self.downsample is not None:
                height, width = (_conv_size(n, self.downsample) for n in (height, width))
        return height, width

    def channel_stats(self) -> tuple[list[float], list[float]]:
        """Mean and std per input channel."""
        return spread(self.mean, self.in_chans), spread(self.std, self.in_chans)

    def published_for(self, tag: str) -> Published | None:
        """What was published about the weights with a tag: the default ones, or those fine-tuned from them at 384."""
        default = self.pretrained[0]
        if self.published is None or tag == default:
            return self.published
        tuned = self.published.finetune_384
        if tuned is None or tag != f"{default}_384":
            return None
        return self.published.model_copy(update={**dict(tuned), "finetune_384": None})

    def __str__(self) -> str:
        return self.name


def spread(values: Sequence[float], channels: int) -> list[float]:
    """One value per channel: those given, or where they are of another number, their average."""
    return list(values) if len(values) == channels else [math.fsum(values) / len(values)] * channels


def _conv_size(positions: int, patch: PatchConfig) -> int:
    return (positions + 2 * patch.padding - patch.kernel_size) // patch.stride + 1


def load_model_config(path: Path, overrides: Mapping[str, Any] | None = None) -> MetaFormerConfig:
    """Reads one model's YAML.

    Args:
        path: The file; its stem is the model's name.
        overrides: As in `override_config`.

    Raises:
        ConfigError: Unreadable or wrong, naming file, line, key, and the nearest known key; or a key without effect.
    """
    document = load_yaml(path)
    if document.data.setdefault("name", path.stem) == "":
        raise ConfigError(f"{document.where(('name',))}must not be empty; without this key the file's name is the name")
    config = validate(MetaFormerConfig, document)
    _refuse_idle(config, None, lambda key: document.where(tuple(key.split("."))))
    return override_config(config, overrides, str(path)) if overrides else config


def override_config(config: MetaFormerConfig, overrides: Mapping[str, Any], source: str) -> MetaFormerConfig:
    """The config with some keys replaced, checked as a whole.

    Args:
        config: Is not changed.
        overrides: Keys and values; a mapping is merged into the section it overrides. Where `in_chans` is among them
            and `mean` or `std` is not, each channel gets the average.
        source: What errors begin with.

    Raises:
        ConfigError: An unknown key, a wrong value, or a key that is changed without effect.
    """
    data = config.model_dump()
    overrides = _plain(overrides)
    channels = overrides.get("in_chans", config.in_chans)
    if channels != config.in_chans and isinstance(channels, int) and 1 <= channels <= MOST:
        data |= {key: spread(data[key], channels) for key in ("mean", "std")}
    _merge(data, overrides)
    changed = validate(MetaFormerConfig, data, source=source)
    _refuse_idle(changed, config, lambda key: f"{source}: {key}: ")
    return changed


def _plain(value: Any) -> Any:
    """Tuples as lists and numbers of other libraries as Python's: what a caller has at hand, but YAML never gives."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Real) and type(value) not in (bool, int, float):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def _merge(data: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value


def idle_keys(config: MetaFormerConfig) -> dict[str, str]:
    """Dotted keys that nothing in this model reads, and why."""
    mixers, head = config.per_stage(config.token_mixer), config.head
    idle = {
        key: f"no stage's token_mixer is {name}"
        for name, mixer in TOKEN_MIXERS.items()
        if name not in mixers
        for key in mixer.config_keys
    }
    if len(set(config.dims)) == 1:
        idle["downsample"] = "all stages are of one width"
    if head.kind != "mlp":
        idle["head.mlp_norm_eps"] = f"head.kind is {head.kind}"
    if head.norm in ("none", "affine"):
        idle["head.norm_eps"] = f"head.norm is {head.norm}"
    if head.norm == "none":
        idle["head.order"] = "head.norm is none"
    return idle


def _refuse_idle(config: MetaFormerConfig, before: MetaFormerConfig | None, where: Callable[[str], str]) -> None:
    """Refuses a key without effect that was set: to its default, or to what it was before, is no mistake.

    Not part of the schema's own checks: a saved config holds every key, also those that lost their effect by another's
    change.
    """
    for key, why in idle_keys(config).items():
        *section, name = key.split(".")
        default = (HeadConfig if section else MetaFormerConfig).model_fields[name].default
        value = _get(config, key)
        if value != default and (before is None or value != _get(before, key)):
            raise ConfigError(f"{where(key)}has no effect: {why}")


def _get(config: MetaFormerConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def make_pretrained_cfg(config: MetaFormerConfig) -> dict[str, Any]:
    """timm's description of a model's input and classifier."""
    mean, std = config.channel_stats()
    height, width = config.height_width
    return {
        "architecture": config.name,
        "tag": config.pretrained[0] if config.pretrained else "",
        "num_classes": config.num_classes,
        "input_size": (config.in_chans, height, width),
        "fixed_input_size": config.fixed_size,
        "pool_size": config.feature_size(len(config.depths) - 1),
        "crop_pct": config.crop_pct,
        "crop_mode": "center",
        "interpolation": config.interpolation,
        "mean": tuple(mean),
        "std": tuple(std),
        "first_conv": "stem.conv",
        "classifier": "head.fc.fc2" if config.head.kind == "mlp" else "head.fc",
    }


@dataclass(frozen=True)
class ModelFacts:
    """What a model will be, told from its name and arguments without building it.

    Attributes:
        pretrained_cfg: timm's description of its input and classifier, as the model will carry it.
        arguments: Of `create_model`, all that make the same model again, `num_classes` apart.
        drop_path_rate: That of its authors' training, where it is known.
        finetune_rate: That of their fine-tuning of its weights, where it is known.
    """

    pretrained_cfg: dict[str, Any]
    arguments: dict[str, Any]
    drop_path_rate: float | None = None
    finetune_rate: float | None = None
