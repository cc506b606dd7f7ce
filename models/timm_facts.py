"""Names and facts of models of timm and torchvision: `timm/NAME[.TAG]` and `torchvision/NAME[.TAG]`.

What anything needs to know of such a model stands in its `pretrained_cfg`, in timm's form; torchvision's get one made from
the transforms of their weights. `foreign_facts` tells it from the name and the arguments alone, without building.
"""

import fnmatch
from collections.abc import Mapping
from typing import Any

import timm
import torchvision
from pydantic import Field, model_validator
from timm.models import get_pretrained_cfg, model_entrypoint

from files.errors import ConfigError, FieldError, nearest
from files.strict_yaml import validate
from models.config import Count, CropShare, ModelFacts, Section, Size, check_channel_stats, spread

LIBRARIES = ("timm", "torchvision")


class ImageFacts(Section):
    """What may be said of any model of timm or torchvision, beside the library's own arguments."""

    num_classes: Count = Field(description="Classes; 0: no classifier.")
    in_chans: Size = Field(description="Channels of the input images.")
    image_size: Size | list[Size] = Field(description="Pixels: one side of a square, or [height, width].")
    crop_pct: CropShare = Field(description="Share of the resized image kept by the centre crop.")
    interpolation: str = Field(description="Of resizing, as torchvision names it.")
    mean: list[float] = Field(description="Mean of the input channels, images in [0, 1].")
    std: list[float] = Field(description="Standard deviation of the input channels.")

    @model_validator(mode="after")
    def _fits_together(self) -> "ImageFacts":
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            raise FieldError("image_size", f"must be one number or [height, width], got {self.image_size}")
        check_channel_stats(self.in_chans, mean=self.mean, std=self.std)
        return self


# Arguments of timm.create_model and torchvision's that would give something else than a classifier, or be overruled
# without a word, and what does it here.
_ELSEWHERE = {
    "features_only": "only classifiers are built here; timm.create_model gives features",
    "out_indices": "only classifiers are built here; timm.create_model gives features",
    "checkpoint_path": "did you mean 'checkpoint'?",
    "pretrained_cfg": "weights are chosen by a tag behind the name, facts by image_size, mean, std, crop_pct, interpolation",
    "pretrained_cfg_overlay": "facts are given by image_size, mean, std, crop_pct, interpolation",
    "stochastic_depth_prob": "the rate of stochastic depth is drop_path_rate of create_model, and drop_path.rate in a config",
    "weights": "weights are chosen by a tag behind the name, and loaded with pretrained=True",
}


# ---- names ----------------------------------------------------------------------------------------------------------


def is_foreign(name: object) -> bool:
    """Whether a model is named as one of timm's or torchvision's."""
    return isinstance(name, str) and name.startswith(tuple(f"{library}/" for library in LIBRARIES))


def list_foreign(pattern: str) -> list[str]:
    """Names that match a pattern such as `timm/conv*`; with a dot, as in `timm/resnet18.*`, those of published weights."""
    library, _, rest = pattern.partition("/")
    names = _names(library)
    if "." in rest:
        bases = fnmatch.filter(names, rest.partition(".")[0])
        names = tuple(f"{base}.{tag}" for base in bases for tag in published_tags(library, base))
    return sorted(f"{library}/{name}" for name in fnmatch.filter(names, rest))


def suggest_foreign(name: str) -> str:
    """For an unknown name without a library before it: that of the library which has it, in words, or ""."""
    base = name.partition(".")[0]
    found = next((library for library in LIBRARIES if base in _names(library)), None)
    return f"; did you mean {f'{found}/{name}'!r}?" if found else ""


def split_name(name: str) -> tuple[str, str, str]:
    """`timm/resnet18.a1_in1k` -> its library, model and tag, which may be "".

    Raises:
        ConfigError: There is no such model, or it has no such weights; with the nearest.
    """
    library, _, rest = name.partition("/")
    base, _, tag = rest.partition(".")
    version = (timm if library == "timm" else torchvision).__version__
    if base not in _names(library):
        hint = nearest(base, _names(library), before=f"{library}/")
        hint = hint or f"; `python -m models '{library}/*'` lists them"
        raise ConfigError(f"unknown model {name!r}{hint} ({library} {version})")
    if tag and tag not in (tags := published_tags(library, base)):
        known = ", ".join(tags) or "none"
        raise ConfigError(
            f"model {library}/{base} has no published weights {tag!r}{nearest(tag, tags)}; it has: {known}"
        )
    return library, base, tag


def _names(library: str) -> tuple[str, ...]:
    """The library's own names and those that somebody registered with it; not ours, which have names of their own here."""
    if library == "timm":
        ours = "models.timm_registry"  # timm knows an entry point by the module it says it is of
        return tuple(name for name in timm.list_models() if model_entrypoint(name).__module__ != ours)
    return tuple(torchvision.models.list_models(module=torchvision.models))


def published_tags(library: str, base: str) -> list[str]:
    if library == "timm":
        return [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
    return [weights.name for weights in torchvision.models.get_model_weights(base)]


# ---- facts ----------------------------------------------------------------------------------------------------------


def foreign_facts(name: str, arguments: Mapping[str, Any]) -> ModelFacts:
    """What such a model will be, without building it.

    Args:
        name: `timm/NAME`, `torchvision/NAME`, perhaps with the tag of published weights.
        arguments: The keys of `ImageFacts`, and the library's own.

    Raises:
        ConfigError: An unknown name, or a wrong value of a key of `ImageFacts`.
    """
    library, base, tag = split_name(name)
    for key, instead in _ELSEWHERE.items():
        if key in arguments:
            raise ConfigError(f"model {name}: {key}: {instead}")
    cfg = _timm_cfg(base, tag) if library == "timm" else _torchvision_cfg(base, tag)
    given = {key: value for key, value in arguments.items() if value is not None}
    own = {key: value for key, value in given.items() if key not in ImageFacts.model_fields}
    size = given.get("img_size")  # timm's word for it
    if size is not None and "image_size" in given and _pair(size) != _pair(given["image_size"]):
        raise ConfigError(
            f"model {name}: img_size is {size}, but image_size is {given['image_size']}; give one of them"
        )
    channels, *sides = cfg["input_size"]
    said: dict[str, Any] = {"num_classes": cfg["num_classes"], "in_chans": channels, "image_size": sides}
    said |= {"crop_pct": min(1.0, cfg["crop_pct"]), "interpolation": cfg["interpolation"]}  # nothing is padded here
    said |= {} if size is None else {"image_size": size}
    said |= {key: value for key, value in given.items() if key in ImageFacts.model_fields}
    count = said["in_chans"] if isinstance(said["in_chans"], int) else channels
    for key in ("mean", "std"):
        said.setdefault(key, spread(cfg[key], count))
    facts = validate(ImageFacts, _lists(said), source=f"model {name}")
    height, width = _pair(facts.image_size)
    cfg |= {
        "num_classes": facts.num_classes,
        "input_size": (facts.in_chans, height, width),
        "mean": tuple(spread(facts.mean, facts.in_chans)),
        "std": tuple(spread(facts.std, facts.in_chans)),
        "crop_pct": facts.crop_pct,
        "interpolation": facts.interpolation,
    }
    if (height, width) != tuple(sides):
        cfg.pop("pool_size", None)
    for key in ("test_input_size", "test_crop_pct", "label_names", "label_descriptions"):
        cfg.pop(key, None)  # of the published weights, not of what is trained
    plain = facts.model_dump(exclude={"num_classes"})
    if height == width:
        plain["image_size"] = height
    return ModelFacts(cfg, {**plain, **{key: value for key, value in own.items() if key != "img_size"}})


def _timm_cfg(base: str, tag: str) -> dict[str, Any]:
    cfg = get_pretrained_cfg(f"{base}.{tag}" if tag else base)
    assert cfg is not None
    facts = cfg.to_dict(remove_null=True)
    return {**facts, "architecture": base, "num_classes": max(0, facts.get("num_classes", 0))}


def _torchvision_cfg(base: str, tag: str) -> dict[str, Any]:
    """timm's form of what torchvision says of a model's weights: the default ones, unless a tag names others."""
    known = torchvision.models.get_model_weights(base)
    weights: Any = known[tag] if tag else getattr(known, "DEFAULT")  # noqa: B009  (an enum's alias)
    preset = weights.transforms()
    side, resized = preset.crop_size[0], preset.resize_size[0]
    return {
        "architecture": f"torchvision/{base}",
        "tag": weights.name,
        "num_classes": len(weights.meta["categories"]),
        "input_size": (3, side, side),
        "fixed_input_size": size_argument(base) is not None,
        "crop_pct": side / resized,
        "crop_mode": "center",
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }


def size_argument(base: str) -> str | None:
    """What torchvision calls the size of images, in models that are built for one."""
    return next((argument for start, argument in (("vit_", "image_size"), ("maxvit", "input_size"))
                 if base.startswith(start)), None)  # fmt: skip


def _pair(size: Any) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def _lists(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
