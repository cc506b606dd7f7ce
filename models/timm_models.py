"""Models of timm and torchvision as models of the zoo: built, changed and loaded as ours are.

Stochastic depth is none of this: `stochastic_depth.set_drop_path` puts it in.
"""

import inspect
import json
import re
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import timm
import torchvision
from timm.models import adapt_input_conv, model_entrypoint
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.ops import StochasticDepth

from files.errors import ConfigError, is_out_of_memory, nearest
from files.words import counted
from models.config import OTHER_NAMES
from models.published import through_hub
from models.timm_facts import ImageFacts, foreign_facts, published_tags, size_argument, split_name
from models.weights import check_dense, misfits


def build_foreign(name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Builds a model of timm or torchvision without stochastic depth, which `set_drop_path` puts in.

    Args:
        name: See `foreign_facts`.
        arguments: See `foreign_facts`.
        pretrained: Load the published weights through the library's own hub code, adapted to classes, channels and size
            as timm does.

    Returns:
        The model; it carries its facts as `pretrained_cfg`, and as `zoo_config` what `create_model` makes it from again.

    Raises:
        ConfigError: An unknown name or argument, a wrong value, or weights that could not be had.
    """
    facts = foreign_facts(name, arguments)
    library, base, tag = split_name(name)
    own = {key: value for key, value in facts.arguments.items() if key not in ImageFacts.model_fields}
    if pretrained and not published_tags(library, base):
        raise ConfigError(f"model {name} has no published weights; give checkpoint=...")
    build = _build_timm if library == "timm" else _build_torchvision
    make = partial(build, f"{base}.{tag}" if tag else base, facts.pretrained_cfg, own)
    try:
        make_it = partial(make, pretrained=pretrained)
        model = (
            through_hub(f"{library} {base}.{facts.pretrained_cfg.get('tag', '')}", make_it) if pretrained else make_it()
        )
    except ConfigError as error:
        if isinstance(error.__cause__, TypeError):
            raise _argument_error(name, base, library, error.__cause__) from None
        raise
    except Exception as error:  # somebody's constructor may raise anything
        if is_out_of_memory(error):  # no argument's fault
            raise
        raise _argument_error(name, base, library, error) from None
    cfg = facts.pretrained_cfg
    setattr(model, "pretrained_cfg", cfg)  # noqa: B010  (as attributes, pyright takes them for modules)
    setattr(model, "default_cfg", cfg)  # noqa: B010
    setattr(model, "zoo_config", {"name": name, "num_classes": cfg["num_classes"], **facts.arguments})  # noqa: B010
    return model


def _build_timm(name: str, cfg: Mapping[str, Any], own: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    channels, height, width = cfg["input_size"]
    arguments = {**own, "num_classes": cfg["num_classes"], "in_chans": channels, "pretrained": pretrained}
    if cfg.get("fixed_input_size"):
        arguments["img_size"] = (height, width)
    try:
        return timm.create_model(name, drop_path_rate=0.0, **arguments)  # some have a rate of their own by default
    except TypeError as error:
        if "'drop_path_rate'" not in str(error):
            raise
    return timm.create_model(name, **arguments)


def _build_torchvision(name: str, cfg: dict[str, Any], own: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    base, classes, (channels, height, width) = name.partition(".")[0], cfg["num_classes"], cfg["input_size"]
    arguments: dict[str, Any] = dict(own)
    if (argument := size_argument(base)) is not None:
        if argument == "image_size" and height != width:
            raise ValueError(f"takes square images only, got {height} x {width}")
        arguments[argument] = height if argument == "image_size" else (height, width)
    if base in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": False} | ({} if pretrained else {"aux_logits": False})
    weights: Any = torchvision.models.get_model_weights(base)[cfg["tag"]] if pretrained else None
    if not pretrained and classes:
        arguments["num_classes"] = classes
    model = torchvision.models.get_model(base, weights=weights, **arguments)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0  # many have a rate by default, under no argument that all would take
    convs = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    layers = [key for key, module in model.named_modules()
              if isinstance(module, nn.Linear | nn.Conv2d) and not key.startswith("aux")]  # fmt: skip
    cfg |= {"first_conv": convs[0], "classifier": layers[-1]}
    setattr(model, "pretrained_cfg", cfg)  # noqa: B010
    setattr(model, "get_classifier", MethodType(_get_classifier, model))  # noqa: B010  (deepcopy binds it to the copy)
    setattr(model, "reset_classifier", MethodType(_reset_classifier, model))  # noqa: B010
    layer = model.get_submodule(layers[-1])
    trained = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    setattr(model, "num_classes", trained)  # noqa: B010
    if trained != classes:
        _reset_classifier(model, classes)
    _adapt_first_conv(model, convs[0], channels, pretrained=pretrained)
    return model


def _get_classifier(model: Any) -> nn.Module:
    """The layer that gives the logits."""
    return model.get_submodule(model.pretrained_cfg["classifier"])


def _reset_classifier(model: Any, num_classes: int) -> None:
    """Puts a new classifier in place; 0 classes: none, so that the model gives the features before it."""
    key = model.pretrained_cfg["classifier"]
    parent, _, name = key.rpartition(".")
    old = model.get_submodule(key)
    if num_classes == 0:
        new: nn.Module = nn.Identity()
    elif isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1)
    elif isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes)
    else:
        raise ConfigError(f"{type(model).__name__}: its classifier was left out, so its width is not known any more")
    setattr(model.get_submodule(parent), name, new)
    model.num_classes = model.pretrained_cfg["num_classes"] = num_classes
    model.pretrained_cfg.pop("label_names", None)  # the new classifier's classes have no names yet


def _adapt_first_conv(model: nn.Module, key: str, channels: int, *, pretrained: bool) -> None:
    """Gives the first convolution other input channels: its weights summed, or repeated and scaled, as timm does."""
    old = model.get_submodule(key)
    assert isinstance(old, nn.Conv2d)
    if old.in_channels == channels:
        return
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)  # type: ignore[arg-type]
    if pretrained:
        new.weight.data = adapt_input_conv(channels, old.weight.data)
        if old.bias is not None and new.bias is not None:
            new.bias.data = old.bias.data
    parent, _, name = key.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _argument_error(name: str, base: str, library: str, error: BaseException) -> ConfigError:
    """What a constructor raised, as a mistake in what it was given."""
    said = (str(error).strip().splitlines() or [""])[0]
    unknown = re.search(r"(?:(\w+)\.__init__\(\) )?got an unexpected keyword argument '(\w+)'", said)
    if not unknown:
        return ConfigError(f"model {name}: cannot be built so: {type(error).__name__}: {said}")
    known = [*ImageFacts.model_fields, "drop_path_rate", *_arguments_of(unknown[1], _entry(library, base))]
    hint = f"; did you mean {OTHER_NAMES[unknown[2]]!r}?" if unknown[2] in OTHER_NAMES else nearest(unknown[2], known)
    return ConfigError(f"model {name}: unknown argument {unknown[2]!r}{hint}")


def _entry(library: str, base: str) -> Callable[..., Any]:
    return model_entrypoint(base) if library == "timm" else torchvision.models.get_model_builder(base)


def _arguments_of(class_name: str | None, entry: Callable[..., Any]) -> list[str]:
    """Names of the arguments of a class in the module of an entry function."""
    found = getattr(sys.modules[entry.__module__], class_name or "", None)
    return [key for key in inspect.signature(found).parameters if key != "kwargs"] if found is not None else []


# ---- weights --------------------------------------------------------------------------------------------------------


def saved_by_timm(model: nn.Module, label_names: Sequence[str] | None) -> dict[str, Any]:
    """What stands beside the weights of a timm model in config.json, as timm writes and reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        named = {"label_names": list(label_names)} if label_names else None
        save_config_for_hf(model, str(path), model_config=named)
        saved = json.loads(path.read_text(encoding="utf-8"))
    saved.get("model_args", {}).pop("drop_path_rate", None)  # a rate is no part of a model
    for key in ("tag", "license"):  # of published weights, which these are not
        saved["pretrained_cfg"].pop(key, None)
    return saved


def load_foreign(
    model: Any,
    state: Mapping[str, Tensor],
    origin: str,
    *,
    replace_classifier: bool,
    adapt_input: bool = False,
    renamed: str | None = None,
) -> list[str]:
    """Loads weights into a model of timm or torchvision after checking that all of them fit; see `loading.load_into`.

    Raises:
        ConfigError: They do not fit; the model is unchanged.
    """
    check_dense(state, origin)
    name, cfg, own = model.zoo_config["name"], model.pretrained_cfg, model.state_dict()
    lines = [f"weights from {origin}"]
    state = _without_wrappers(state)
    if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in own.items()}:
        given, state = state, dict(_filtered(model, name, state))
        lines += _resized(given, state)
    for conv in _as_names(cfg.get("first_conv")):
        key = f"{conv}.weight"
        if adapt_input and key in state and state[key].ndim == 4 and state[key].shape[1] != own[key].shape[1]:
            before, after = state[key].shape[1], own[key].shape[1]
            state[key] = adapt_input_conv(after, state[key], base_chans=before)
            lines.append(f"first convolution adapted from {before} to {after} input channels")
    heads = tuple(f"{head}." for head in _as_names(cfg.get("classifier")))
    old = next((state[f"{head}weight"] for head in heads if f"{head}weight" in state), None)
    other_classes = old is not None and old.shape[0] != model.num_classes
    if replace_classifier and (old is None or other_classes or renamed):
        state = {key: value for key, value in state.items() if not key.startswith(heads)}
        state |= {key: value for key, value in own.items() if key.startswith(heads)}
        before = "no classifier in the weights" if old is None else f"classifier of {old.shape[0]} classes replaced by"
        lines.append(f"{before}{':' if old is None else ''} a new one of {model.num_classes}")
        if renamed and not other_classes:
            lines[-1] += f", though of as many: {renamed}"
    if faults := misfits(own, state):
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        hint = ""
        if old is not None and other_classes and len(faults) <= 2:
            hint = f"\nthe weights have {counted(old.shape[0], 'class')}: build with "
            hint += f"num_classes={old.shape[0]}, or name another number to replace the classifier"
        raise ConfigError(f"{origin}: weights do not fit {name}: {faults[0]}{more}{hint}")
    model.load_state_dict(state)
    return lines


def adapted_by_library(model: Any) -> list[str]:
    """What timm or torchvision changed of published weights to make them fit, which they do without a word, a line each."""
    name = model.zoo_config["name"]
    before, now = foreign_facts(name, {}).pretrained_cfg, model.pretrained_cfg
    lines = [f"published weights of {name}"]
    (channels, *size), (new_channels, *new_size) = before["input_size"], now["input_size"]
    if channels != new_channels:
        lines.append(f"first convolution adapted from {channels} to {new_channels} input channels")
    if before.get("fixed_input_size") and size != new_size:
        old, new = (" x ".join(map(str, pixels)) for pixels in (size, new_size))
        lines.append(f"what belongs to positions resampled from images of {old} to {new}")
    if before["num_classes"] != model.num_classes:
        lines.append(
            f"classifier of {counted(before['num_classes'], 'class')} replaced by a new one of {model.num_classes}"
        )
    return lines


def check_saved_as(model: Any, saved: Mapping[str, Any], origin: str) -> list[str]:
    """How images were prepared for some weights, where a model says otherwise, a line each.

    Raises:
        ConfigError: The weights say they are of another model.
    """
    now: Mapping[str, Any] = model.zoo_config
    name = now["name"]
    library, base, _ = split_name(name)
    about = saved.get("model")
    before = about if isinstance(about, dict) else saved
    of = before.get("name", before.get("architecture"))
    if isinstance(of, str) and of.partition(".")[0] not in (base, f"{library}/{base}"):
        raise ConfigError(f"{origin}: weights of {of!r}, another architecture than {name!r}")
    keys = ["crop_pct", "interpolation", *(["mean", "std"] if before.get("in_chans") == now["in_chans"] else [])]
    return [f"{key} is {now[key]}, in the model of the weights it was {before[key]}"
            for key in keys if key in before and before[key] != now[key]]  # fmt: skip


def _without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP and torch.compile put before all of them."""
    out = {key: value for key, value in state.items() if key != "n_averaged"}
    for prefix in ("module.", "_orig_mod.", "model."):
        if out and all(key.startswith(prefix) for key in out):
            out = {key.removeprefix(prefix): value for key, value in out.items()}
    return out


def _filtered(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What timm makes of weights in another layout or of another image size, where it knows how."""
    library, base, _ = split_name(name)
    convert = getattr(sys.modules[_entry(library, base).__module__], "checkpoint_filter_fn", None)
    if library == "torchvision" and base.startswith("vit_"):
        convert = _with_positions
    if convert is None:
        return state
    try:
        return convert(dict(state), model)
    except Exception:  # not weights of such a model: what does not fit is said of them as they are
        return state


def _with_positions(state: dict[str, Tensor], model: Any) -> Mapping[str, Tensor]:
    """torchvision's own resampling of its ViT's positions, which it leaves to the user to call."""
    return interpolate_embeddings(model.image_size, model.patch_size, OrderedDict(state))


def _resized(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """What was resampled to another number of positions, in words; a tensor of as many numbers has another layout only."""
    keys = [key for key, value in after.items() if key in before and before[key].numel() != value.numel()]
    if not keys:
        return []
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    old, new = (" x ".join(map(str, side[keys[0]].shape)) for side in (before, after))
    return [f"{keys[0]} resampled from {old} to {new}{more}"]


def _as_names(names: Any) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)
