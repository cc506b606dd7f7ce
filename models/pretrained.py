"""Weights: reading files safely, and layouts from and to timm.

Our state-dict keys are those of timm's MetaFormer; what differs are shapes, because 1x1 convolutions are linear layers
here. Only tensors are ever read: safetensors, or torch files with `weights_only=True`.
"""

from collections.abc import Mapping

import timm
from torch import Tensor

from models.config import MetaFormerConfig
from models.metaformer import MetaFormer
from models.strict_yaml import ConfigError

StateDict = dict[str, Tensor]


def from_timm(state: Mapping[str, Tensor]) -> StateDict:
    """State dict of timm's MetaFormer -> ours: 1x1 convolution weights (O, I, 1, 1) become (O, I).

    The head is not the same for PoolFormer v1: timm pools, then normalises; the original normalises first. Compare
    logits with `head={"order": "pool_norm", "norm": "layer_norm"}`.
    """
    return {k: v.flatten(1) if _is_pointwise(k) and v.ndim == 4 else v for k, v in state.items()}


def to_timm(state: Mapping[str, Tensor], config: MetaFormerConfig) -> StateDict:
    """State dict of ours -> timm's MetaFormer: linear weights inside stages without attention become 1x1 convolutions."""
    mixers = config.per_stage(config.token_mixer)
    out = {}
    for key, value in state.items():
        in_conv_stage = key.startswith("stages.") and mixers[int(key.split(".")[1])] != "attention"
        out[key] = value[:, :, None, None] if in_conv_stage and _is_pointwise(key) else value
    return out


def _is_pointwise(key: str) -> bool:
    return key.startswith("stages.") and key.endswith(
        (".fc1.weight", ".fc2.weight", ".pwconv1.weight", ".pwconv2.weight")
    )


def load_into(model: MetaFormer, state: Mapping[str, Tensor], origin: str, *, replace_classifier: bool) -> list[str]:
    """Loads weights after checking that all of them fit.

    Args:
        model: Receives the weights.
        state: In our layout or timm's.
        origin: Where they come from, for messages.
        replace_classifier: Leave the model's own classifier in place where the weights' has other classes.

    Returns:
        What was done, a line each.

    Raises:
        ConfigError: They do not fit; the model is unchanged.
    """
    state, own = from_timm(state), model.state_dict()
    classifier = model.pretrained_cfg["classifier"] + "."
    lines = [f"weights from {origin}"]
    old = state.get(classifier + "weight")
    if replace_classifier and old is not None and old.shape[0] != model.num_classes:
        if model.num_classes == 0:
            state = {k: v for k, v in state.items() if not k.startswith("head.fc.")}
            lines.append(f"classifier of {old.shape[0]} classes left out")
        else:
            state |= {k: v for k, v in own.items() if k.startswith(classifier)}
            lines.append(f"classifier of {old.shape[0]} classes replaced by a new one of {model.num_classes}")
    faults = [f"{k} has shape {_shape(state[k])}, expected {_shape(v)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]  # fmt: skip
    faults += [f"{k} is missing" for k in own if k not in state]
    faults += [f"{k} is not in the model" for k in state if k not in own]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        hint = ""
        if old is not None and len(faults) <= 2 and faults[0].startswith(classifier):
            hint = f"\nthe weights have {old.shape[0]} classes: build with num_classes={old.shape[0]}, or name another "
            hint += "number to replace the classifier"
        raise ConfigError(f"{origin}: weights do not fit {model.config.name or 'the model'}: {faults[0]}{more}{hint}")
    model.load_state_dict(dict(state))
    return lines


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def load_timm_pretrained(config: MetaFormerConfig, tag: str = "") -> tuple[StateDict, str]:
    """Published weights in our layout, through timm's hub code: its cache, its offline behaviour, its conversion.

    Args:
        config: A published model's config.
        tag: One of `config.pretrained`; default the first.

    Returns:
        The weights, with the classes and input channels they were published with, and where they come from.

    Raises:
        ConfigError: There are none, or they could not be had, with the reason.
    """
    if not config.pretrained:
        raise ConfigError(f"model {config.name!r} has no published weights in timm; give checkpoint=...")
    name = f"{config.name}.{tag or config.pretrained[0]}"
    try:
        source = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub raises what its transport raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"published weights {name} could not be loaded: {reason}") from error
    return dict(source.state_dict()), f"timm {name}"
