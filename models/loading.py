"""Weights in other layouts: timm's, those published by sail-sg/poolformer and sail-sg/metaformer, and other PoolFormers.

Our state-dict keys are those of timm's MetaFormer; what differs are shapes, because 1x1 convolutions are linear layers
here. timm's VisionTransformer and MlpMixer have names of their own. `load_into` recognises a layout by its keys and
shapes and loads all of it or nothing.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor

from files.errors import ConfigError, nearest
from files.strict_yaml import validate
from files.words import counted
from layers.patch_embed import TokenEmbed
from models.config import MetaFormerConfig, idle_keys, override_config
from models.layouts import ORIGINALS, StateDict, from_original, from_timm, is_pointwise, original_layout, timm_head
from models.metaformer import MetaFormer
from models.registry import is_model, list_models, model_config, published_config
from models.timm_facts import is_foreign
from models.weights import check_dense, misfits


def load_into(
    model: MetaFormer,
    state: Mapping[str, Tensor],
    origin: str,
    *,
    replace_classifier: bool,
    adapt_input: bool = False,
    renamed: str | None = None,
) -> list[str]:
    """Loads weights after checking that all of them fit. Learned positions of another image size are resampled first.

    Args:
        model: Receives the weights.
        state: In our layout, timm's, or another that `original_layout` knows, with or without a prefix before all names.
        origin: Where they come from, for messages.
        replace_classifier: Leave the model's own classifier in place where the weights have other classes.
        adapt_input: Fit the first convolution to the model's input channels by timm's rule: for one channel its weights
            are summed, for others repeated and scaled.
        renamed: How the weights' classes differ from the model's by name, if they do: as for other classes.

    Returns:
        What was done, a line each.

    Raises:
        ConfigError: They do not fit; the model is unchanged.
    """
    check_dense(state, origin)
    own, given = model.state_dict(), state
    state, taken_off = _unwrapped(state)
    layout = original_layout(state)
    in_timm_shapes = not layout and any(is_pointwise(k) and v.ndim == 4 for k, v in state.items())
    state = in_our_layout(state)
    lines = [f"weights from {origin}" + (f", in the layout of {layout}" if layout else "")]
    lines[0] += f", {taken_off}" if taken_off else ""
    if in_timm_shapes and (keys := timm_head(model.config)):
        what = "normalises before pooling" if "order" in keys else "has a norm of eps 1e-5"
        lines.append(f"the head {what}, as the original; the same weights with head={keys} give timm's logits")

    misfit = f"{origin}: weights do not fit {model.config.name or 'the model'}: "
    for key, value in own.items():
        if key in state and value.is_floating_point() and not state[key].is_floating_point():
            raise ConfigError(f"{misfit}{key} holds {state[key].dtype}, expected floating-point numbers")
    conv = model.pretrained_cfg["first_conv"] + ".weight"
    if adapt_input and conv in state and _differs_in_channels(state[conv], own[conv]):
        before, after = state[conv].shape[1], own[conv].shape[1]
        state[conv] = adapt_input_conv(after, state[conv], base_chans=before)
        lines.append(f"first convolution adapted from {before} to {after} input channels")
    lines += _adapt_positions(state, model)
    old = state.get(model.pretrained_cfg["classifier"] + ".weight")
    other_classes = old is not None and old.ndim == 2 and old.shape[0] != model.num_classes
    if replace_classifier and (old is None or other_classes or renamed):
        lines += _replace_classifier(state, model, own)
        if renamed and not other_classes:
            lines[-1] += f", though of as many: {renamed}"

    if faults := misfits(own, state):
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        hint = ""
        if len(faults) <= 2 and old is not None and other_classes and "head.fc." in faults[0]:
            hint = f"\nthe weights have {counted(old.shape[0], 'class')}: build with "
            hint += f"num_classes={old.shape[0]}, or name another number to replace the classifier"
        elif len(faults) == 1 and conv in state and _differs_in_channels(state[conv], own[conv]):
            hint = f"\nthe weights have {state[conv].shape[1]} input channels: name in_chans to adapt them"
        elif mixer := re.search(r"\.token_mixer\.(fc1|random_matrix).* has shape", faults[0]):
            kind = "a spatial MLP" if mixer[1] == "fc1" else "random mixing"
            hint = f"\n{kind} takes images of one size: {model.config.image_size} is not that of the weights"
        elif conv not in state:
            hint = _advise_on_names(given, origin)
        raise ConfigError(f"{misfit}{faults[0]}{more}{hint}")
    model.load_state_dict(state)
    return lines


# The first convolution in every layout: what stands before this name stands before all names of a network.
_FIRST_CONVS = (
    "stem.conv.weight",
    "stem.proj.weight",
    "patch_embed.proj.weight",
    "downsample_layers.0.conv.weight",
    "poolformer.encoder.patch_embeddings.0.projection.weight",
)


def in_our_layout(state: Mapping[str, Tensor]) -> StateDict:
    """State dict in any layout that is read, with or without a prefix -> ours."""
    state, _ = _unwrapped(state)
    return from_original(state) if original_layout(state) else from_timm(state)


def _unwrapped(state: Mapping[str, Tensor]) -> tuple[StateDict, str]:
    """The names without what stands in front of all of them, and what that is, in words.

    Such are `module.` and `_orig_mod.` of DDP and torch.compile, `model.` of a Lightning module, `timm_model.` of
    transformers, or any other attribute that held the network; the counter of torch's AveragedModel is left out. mm's
    classifiers have `backbone.` in front of all but the head. Where there are other weights beside a network, or several
    networks, nothing is taken off.
    """
    bare = {key: value for key, value in state.items() if key.rpartition(".")[2] != "n_averaged"}
    prefixes = _prefixes(bare)
    prefix = prefixes[0] if len(prefixes) == 1 else ""
    outer = prefix.removesuffix("backbone.")
    fronts = (prefix,) if outer == prefix else (prefix, f"{outer}head.")
    if not prefix or not all(key.startswith(fronts) for key in bare):
        return bare, ""
    words = f"without {prefix!r} before all names" + (
        "" if all(k.startswith(prefix) for k in bare) else " but the head's"
    )
    return {key.removeprefix(prefix if key.startswith(prefix) else outer): v for key, v in bare.items()}, words


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """What stands before the names of each network in a state dict, "" being nothing."""
    return sorted({key.removesuffix(c) for key in state for c in _FIRST_CONVS if f".{key}".endswith(f".{c}")})


def _advise_on_names(state: Mapping[str, Tensor], origin: str) -> str:
    """What to do with a state dict that holds more than one network, or another layout than those that are read."""
    prefixes = _prefixes(state)
    if prefixes == [""] or not state:
        return ""
    if not prefixes:
        return f"\nlayouts that are read are ours, timm's, and those of {', '.join(ORIGINALS)}"
    if len(prefixes) == 1:
        other = next(key for key in state if not key.startswith(prefixes[0]))
        what = f"its network's names begin with {prefixes[0]!r}, and beside it is {other}"
    else:
        what = f"it holds {len(prefixes)} networks: {', '.join(repr(p) if p else 'no prefix' for p in prefixes)}"
    prefix = json.dumps(prefixes[-1])
    code = (
        f"import torch; from models.weights import load_weights; state, _ = load_weights({json.dumps(origin)}); "
        f'torch.save({{k.removeprefix({prefix}): v for k, v in state.items() if k.startswith({prefix})}}, "weights.pth")'
    )
    return f"\n{what}; to save one alone: python -c {shlex.quote(code)}"


def _adapt_positions(state: StateDict, model: MetaFormer) -> list[str]:
    """Resamples learned positions of a square image to the model's grid; returns what was done."""
    key, embed = "embed.pos_embed", model.embed
    if key not in state or not isinstance(embed, TokenEmbed) or embed.pos_embed is None:
        return []
    if state[key].ndim != 3 or state[key].shape[1] == embed.pos_embed.shape[1]:
        return []
    prefix = embed.num_prefix_tokens if embed.embeds_all else 0
    side = math.isqrt(max(0, state[key].shape[1] - prefix))
    if side == 0 or side * side + prefix != state[key].shape[1]:
        return []  # refused as any other shape that does not fit
    state[key] = resample_abs_pos_embed(state[key], [embed.height, embed.width], [side, side], prefix)
    return [f"position embedding resampled from {side} x {side} to {embed.height} x {embed.width}"]


def _replace_classifier(state: StateDict, model: MetaFormer, own: StateDict) -> list[str]:
    """Puts the model's own classifier into the state dict; returns what was done."""
    classifier = model.pretrained_cfg["classifier"] + "."
    old = state.get(classifier + "weight")
    if model.num_classes == 0:
        for key in [k for k in state if k.startswith("head.fc.")]:
            del state[key]
        return [] if old is None else [f"classifier of {counted(old.shape[0], 'class')} left out"]
    new = f"a new one of {model.num_classes}"
    if old is None:
        state |= {k: v for k, v in own.items() if k.startswith("head.fc.")}
        return [f"no classifier in the weights: {new} classes"]
    state |= {k: v for k, v in own.items() if k.startswith(classifier)}
    return [f"classifier of {counted(old.shape[0], 'class')} replaced by {new}"]


def _differs_in_channels(weight: Tensor, own: Tensor) -> bool:
    a, b = weight.shape, own.shape
    return len(a) == len(b) and a[1] != b[1] and (a[0], *a[2:]) == (b[0], *b[2:])


def trained_config(saved: Mapping[str, Any], origin: str) -> MetaFormerConfig | None:
    """The model that a folder's config.json says its weights are of.

    Args:
        saved: Ours (key `model`), timm's (key `architecture`, also under the prefix of `register_with_timm`) or any other.
        origin: Where it comes from, for messages.

    Returns:
        Its config, with the classes, channels and images of these weights and, where timm's own model was trained, with
        timm's head; `None` where it does not say.

    Raises:
        ConfigError: The model is not in the zoo, or what is said of it is no config.
    """
    if isinstance(saved.get("model"), dict) and not is_foreign(saved["model"].get("name")):
        return validate(MetaFormerConfig, saved["model"], source=f"{origin}: model")
    architecture = saved.get("architecture")
    if not isinstance(architecture, str):
        return None
    names = [n for n in list_models() if n == architecture or architecture.endswith(f"_{n}")]
    if not names:
        hint = nearest(architecture, list_models())
        raise ConfigError(f"{origin}: weights of {architecture!r}, which is not in the zoo{hint}")
    config = model_config(max(names, key=len))
    said, arguments = known_section(saved, "pretrained_cfg"), known_section(saved, "model_args")
    facts: dict[str, Any] = {key: said[key] for key in _IMAGES if said.get(key) not in (None, "random")}
    facts["num_classes"] = saved.get("num_classes", config.num_classes)
    if isinstance(size := said.get("input_size"), list) and len(size) == 3:
        facts |= {"in_chans": size[0], "image_size": size[1] if size[1] == size[2] else size[1:]}
    for theirs, ours in (("in_chans", "in_chans"), ("img_size", "image_size")):
        if theirs in arguments:
            facts[ours] = arguments[theirs]
    if config.name != architecture:  # ours under a prefix, which takes our keys
        facts |= {key: value for key, value in arguments.items() if key in MetaFormerConfig.model_fields}
    else:
        facts["head"] = timm_head(config)
        pool = saved.get("global_pool", config.head.pool)
        if config.class_token and pool in ("avg", "token") and pool != config.head.pool:
            facts["head"] = {"pool": pool, "order": "pool_norm" if pool == "avg" else "norm_pool"}
    return override_config(config, facts, source=f"{origin}: model {architecture}")


def trained_foreign(saved: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The model of timm or torchvision that a run's folder says its weights are of: its name and further arguments."""
    about = known_section(saved, "model")
    name = about.get("name")
    if not isinstance(name, str) or not is_foreign(name):
        return None
    return name, {key: value for key, value in about.items() if key != "name"}


def known_section(saved: Mapping[str, Any], key: str) -> dict[str, Any]:
    return value if isinstance(value := saved.get(key), dict) else {}


def published_facts(config: MetaFormerConfig) -> dict[str, Any]:
    """What a config.json beside the published weights that `load_timm_pretrained` takes would say of them."""
    if not config.pretrained:
        return {}
    shipped = model_config(config.name) if is_model(config.name) else config
    return {"model": published_config(shipped, config.pretrained[0]).model_dump()}


# Keys in which a model and its weights' may differ: what loading adapts or overwrites, what acts in training only, facts.
_FREE = {"name", "num_classes", "in_chans", "image_size", "layer_scale", "res_scale", "drop_rate"}
_FREE |= {"pretrained", "published"}

_IMAGES = ("crop_pct", "interpolation", "mean", "std")  # how images are prepared: said, not refused


def check_trained_as(
    config: MetaFormerConfig, saved: Mapping[str, Any], origin: str, overrides: Mapping[str, Any]
) -> list[str]:
    """Compares a model with the one that its weights are of, in all that is more than a choice of use.

    Args:
        config: The model to load into.
        saved: The weights' config.json, see `trained_config`.
        origin: Where the weights come from, for messages.
        overrides: What the user named; keys of `head` among it may differ.

    Returns:
        Settings that differ from those the weights were trained with, a line each.

    Raises:
        ConfigError: They are of another architecture.
    """
    trained = trained_config(saved, origin)
    if trained is None:
        return []
    before, now = _settings(trained), _settings(config)
    if trained.in_chans != config.in_chans:
        for key in ("mean", "std"):
            before[key] = now[key]
    named = overrides.get("head", {})
    # how ours differs from timm's, load_into says
    told = timm_head(config) if saved.get("architecture") == trained.name else {}
    lines, faults = [], []
    for key, old in before.items():
        new, part = now.get(key, old), key.removeprefix("head.")
        if old == new or (part != key and part in told):
            continue
        if key in _IMAGES or (part != key and part in named):
            lines.append(f"{key} is {new}, in the model of the weights it was {old}")
        else:
            hint = f"\nto load them all the same, name it: head={{{part!r}: {new!r}}}" if part != key else ""
            faults.append((f"{key} was {old}, is {new}", hint))
    if not faults and config.fixed_size:
        faults += _other_positions(config, trained)
    if faults:
        what = f"weights of {trained.name or 'a model'!r}, another architecture than {config.name!r}"
        if trained.name == config.name:
            what = f"weights do not fit {config.name or 'the model'}"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ConfigError(f"{origin}: {what}: {faults[0][0]}{more}{faults[0][1]}")
    return lines


def _settings(config: MetaFormerConfig) -> dict[str, Any]:
    """What a model does with its weights and images, by dotted key; nothing that has no effect in this model."""
    out: dict[str, Any] = {}
    for key in MetaFormerConfig.model_fields:
        value = getattr(config, key)
        if key in _FREE:
            continue
        if isinstance(value, BaseModel):
            out |= {f"{key}.{part}": x for part, x in value.model_dump().items()}
        elif key in ("token_mixer", "norm"):
            stages = config.per_stage(value)
            out[key] = stages[0] if len(set(stages)) == 1 else stages
        else:
            out[key] = value
    idle = idle_keys(config)
    out = {key: value for key, value in out.items() if key not in idle and key.partition(".")[0] not in idle}
    out["mean"], out["std"] = config.channel_stats()
    return out


def _other_positions(config: MetaFormerConfig, trained: MetaFormerConfig) -> list[tuple[str, str]]:
    """The fault of an image size that shapes do not tell from the weights': as many positions in other rows.

    From a grid that is no square nothing can be resampled: its shape does not say its sides.
    """
    for stage in range(len(config.depths)):
        (rows, columns), grid = trained.feature_size(stage), config.feature_size(stage)
        if (rows, columns) != grid and (rows != columns or rows * columns == grid[0] * grid[1]):
            return [(f"image_size was {trained.image_size}, is {config.image_size}", "")]
    return []
