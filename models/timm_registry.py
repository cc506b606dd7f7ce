"""Our models in timm's own registry, under a prefix, so that timm's functions and scripts can build them.

timm's registry works per module: it reads `default_cfgs` of the module that an entry function stands in, and adds the
function's name to that module's `__all__`. So both live here, and the entry functions are attributes of this module.
"""

import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import timm.models
import torch
from timm.models import DefaultCfg, PretrainedCfg, generate_default_cfgs, get_pretrained_cfg
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor

from files.errors import ConfigError
from models.config import MetaFormerConfig, make_pretrained_cfg
from models.factory import create_model
from models.layouts import from_timm
from models.metaformer import MetaFormer
from models.registry import list_models, model_config

__all__ = ["register_with_timm"]

default_cfgs: dict[str, DefaultCfg] = {}
_configs: dict[str, MetaFormerConfig] = {}  # what stands behind each name that we registered


def register_with_timm(prefix: str = "dpz_") -> list[str]:
    """Makes every model of the zoo known to timm as prefix + name.

    Afterwards `timm.create_model("dpz_caformer_s18", num_classes=5, drop_path_rate=0.2, in_chans=1)` builds ours, with
    timm's arguments (`img_size`, `device`, `dtype`, `checkpoint_path`, `features_only`, `pretrained`), our
    `drop_path_mode`, and any key of the model's config. A second call adds what was registered with
    `models.register_model` since the first.

    Args:
        prefix: Letters, digits and underscores.

    Returns:
        The names, sorted.

    Raises:
        ConfigError: timm has another model of one of these names, or cannot have such a name; nothing is registered.
    """
    configs = {prefix + name: model_config(name) for name in list_models()}
    for name in configs:
        if not re.fullmatch(r"\w+", name, flags=re.ASCII):
            raise ConfigError(f"register_with_timm: {name!r} cannot be a name in timm; letters, digits and '_' can")
        if timm.models.is_model(name) and name not in _configs:
            raise ConfigError(f"register_with_timm: timm has a model {name!r} already; choose another prefix")
    for name, config in configs.items():
        if _configs.get(name) != config:
            _register(name, config)
    return sorted(configs)


def _register(name: str, config: MetaFormerConfig) -> None:
    entry = _entry_function(name, config)
    default_cfgs.update(generate_default_cfgs(_pretrained_cfgs(name, config)))
    setattr(sys.modules[__name__], name, entry)
    with warnings.catch_warnings():
        # the one name that may be there is ours, of a model whose config has changed since
        warnings.filterwarnings("ignore", message="Overwriting")
        timm.models.register_model(entry)
    _configs[name] = config


def _pretrained_cfgs(name: str, config: MetaFormerConfig) -> dict[str, dict[str, Any] | PretrainedCfg]:
    """timm's descriptions of a model's weights by `name.tag`: timm's own, with our names of first and last layer."""
    own = make_pretrained_cfg(config)
    layers = {"first_conv": own["first_conv"], "classifier": own["classifier"]}
    facts = {tag: get_pretrained_cfg(f"{config.name}.{tag}") for tag in config.pretrained}
    tagged = {f"{name}.{tag}": replace(cfg, **layers) for tag, cfg in facts.items() if cfg is not None}
    return {**tagged} or {name: own | {"tag": None}}


def _entry_function(name: str, config: MetaFormerConfig) -> Callable[..., nn.Module]:
    stages = len(config.depths)

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        feature_cls = (
            _feature_class(config, kwargs.pop("feature_cls", "getter")) if kwargs.get("features_only") else None
        )
        return timm.models.build_model_with_cfg(
            partial(_build, config.name),
            name,
            pretrained,
            pretrained_filter_fn=lambda state, model: from_timm(state),
            # The default indices are timm's: all stages, or the last three blocks of a model with one stage.
            feature_cfg={"out_indices": tuple(range(stages)) if stages > 1 else 3, "feature_cls": feature_cls},
            **kwargs,
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = __name__
    entry.__doc__ = f"{config.name} of Drop Path Zoo."
    return entry


def _feature_class(config: MetaFormerConfig, asked: str | type[nn.Module]) -> str | type[nn.Module]:
    """What gives features as (B, C, H, W) by the way that `feature_cls` asks for.

    Raises:
        ConfigError: It could not do so in this model.
    """
    if not isinstance(asked, str):
        return asked
    kind = asked.lower()
    if kind == "fx":
        return FeatureGraph
    pyramid = len(config.depths) > 1 and not config.num_prefix_tokens
    if kind == "getter" or (kind == "hook" and pyramid):
        return kind
    allowed = "getter (the default), fx" + (", hook" if pyramid else "")
    why = {
        "hook": "it takes what modules return, and in this model that is (B, N, C) or (B, H, W, C)",
        "list": "it calls a model's children one after another, which is not what our forward does",
    }
    why["dict"] = why["list"]
    reason = f": {why[kind]}" if kind in why else ""
    raise ConfigError(f"model {config.name}: feature_cls {asked!r} is not available{reason}; allowed: {allowed}")


class FeatureGraph(nn.Module):
    """Features by `feature_cls="fx"`: graphs of torch.fx from images to the chosen levels, one for training and one not.

    timm's own takes the outputs of modules, which are (B, N, C) or (B, H, W, C) in a model with one stage; this one traces
    `forward_intermediates`, as the getter calls it.

    Args:
        model: Is pruned.
        out_indices: Levels, as in `forward_intermediates`.
        output_fmt: `NCHW` or `NHWC`.
    """

    def __init__(self, model: MetaFormer, out_indices: int | tuple[int, ...], output_fmt: str = "NCHW") -> None:
        super().__init__()
        getter = FeatureGetterNet(model, out_indices, output_fmt=output_fmt)
        self.feature_info = getter.feature_info
        self.output_fmt = getter.output_fmt
        training = model.training
        nodes = [_output_nodes(getter.train(mode)) for mode in (True, False)]
        self.graph_module = create_feature_extractor(
            getter.train(training), train_return_nodes=nodes[0], eval_return_nodes=nodes[1], suppress_diff_warning=True
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> a list of (B, C, H, W)."""
        return list(self.graph_module(x).values())


def _output_nodes(model: nn.Module) -> dict[str, str]:
    """The nodes that a model's graph returns as a list, by torchvision's names for them, with their numbers."""
    tracer = NodePathTracer()
    (output,) = (node for node in tracer.trace(model).nodes if node.op == "output")
    return {tracer.node_to_qualname[node]: str(i) for i, node in enumerate(output.args[0])}


def _build(model_name: str, **kwargs: Any) -> MetaFormer:
    """create_model, called as timm calls a model class."""
    if "image_size" in kwargs:  # timm would not hear of it: its data config would stay at the published size
        raise ConfigError(f"model {model_name}: in timm, image_size is called img_size")
    if (size := kwargs.pop("img_size", None)) is not None:
        kwargs["image_size"] = size if isinstance(size, int) else list(size)
    global_pool = kwargs.pop("global_pool", None)
    num_classes = kwargs.get("num_classes")
    device = _checked_device(model_name, kwargs.pop("device", None))
    dtype = _checked_dtype(model_name, kwargs.pop("dtype", None))
    with nullcontext() if device is None else device:
        model = create_model(model_name, **kwargs)
        if global_pool is not None:
            model.reset_classifier(model.num_classes if num_classes is None else num_classes, global_pool)
    # Drawn in float32, then rounded: the same weights in every dtype. `None` leaves it.
    model.to(dtype=dtype)
    # where timm looks when it makes a data config
    setattr(model, "in_chans", model.config.in_chans)  # noqa: B010  (as an attribute, pyright takes it for a module)
    return model


def _checked_device(model_name: str, device: Any) -> torch.device | None:
    """What timm's builders take as a device: a `torch.device`, its name or number, or `None` for torch's default."""
    if device is None:
        return None
    try:
        device = torch.device(device)
        torch.empty(0, device=device)  # a GPU that is not there is found out before anything is built
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model {model_name}: device {str(device)!r} cannot be used here: {reason}") from None
    return device


def _checked_dtype(model_name: str, dtype: Any) -> torch.dtype | None:
    """A floating-point `torch.dtype`, or `None` for torch's default."""
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ConfigError(
        f"model {model_name}: dtype must be a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}"
    )
