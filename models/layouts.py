"""State dicts of timm and of the original repositories, translated to ours and back."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.config import MetaFormerConfig

StateDict = dict[str, Tensor]

# Key prefixes in timm -> ours, {} being a block's number; the first that matches counts. Both ways are read from it.
_BLOCK = ("blocks.{}.", "stages.0.blocks.{}.")

_CLASSIFIER = ("head.", "head.fc.")

_TIMM: dict[str, list[tuple[str, str]]] = {
    "VisionTransformer": [
        ("patch_embed.proj.", "stem.conv."),
        ("cls_token", "embed.cls_token"),
        ("reg_token", "embed.reg_token"),
        ("pos_embed", "embed.pos_embed"),
        ("blocks.{}.attn.", "stages.0.blocks.{}.token_mixer."),
        ("blocks.{}.ls1.gamma", "stages.0.blocks.{}.layer_scale1.scale"),
        ("blocks.{}.ls2.gamma", "stages.0.blocks.{}.layer_scale2.scale"),
        _BLOCK,
        ("fc_norm.", "head.norm."),
        ("norm.", "head.norm."),
        _CLASSIFIER,
    ],
    "MlpMixer": [
        ("stem.proj.", "stem.conv."),
        ("blocks.{}.mlp_tokens.", "stages.0.blocks.{}.token_mixer."),
        ("blocks.{}.mlp_channels.", "stages.0.blocks.{}.mlp."),
        _BLOCK,
        ("norm.", "head.norm."),
        _CLASSIFIER,
    ],
    "ResMLP": [
        ("stem.proj.", "stem.conv."),
        ("blocks.{}.ls1", "stages.0.blocks.{}.layer_scale1.scale"),
        ("blocks.{}.ls2", "stages.0.blocks.{}.layer_scale2.scale"),
        *((f"blocks.{{}}.norm{i}.{theirs}", f"stages.0.blocks.{{}}.norm{i}.{ours}")
          for i in (1, 2) for theirs, ours in (("alpha", "weight"), ("beta", "bias"))),
        ("blocks.{}.linear_tokens.", "stages.0.blocks.{}.token_mixer.fc1."),
        ("blocks.{}.mlp_channels.", "stages.0.blocks.{}.mlp."),
        _BLOCK,
        ("norm.alpha", "head.norm.weight"),
        ("norm.beta", "head.norm.bias"),
        _CLASSIFIER,
    ],
}  # fmt: skip

_TIMM_MARKERS = {
    "blocks.0.attn.qkv.weight": "VisionTransformer",
    "blocks.0.mlp_tokens.fc1.weight": "MlpMixer",
    "blocks.0.linear_tokens.weight": "ResMLP",
}


def timm_layout(config: MetaFormerConfig) -> str:
    """The layout in which timm has such a model: `MetaFormer`, `VisionTransformer`, `MlpMixer` or `ResMLP`."""
    mixers = config.per_stage(config.token_mixer)
    if mixers == ["attention"] and config.pos_embed != "none":
        return "VisionTransformer"
    if mixers == ["spatial_mlp"]:
        return "MlpMixer" if config.spatial_hidden else "ResMLP"
    return "MetaFormer"


def from_timm(state: Mapping[str, Tensor]) -> StateDict:
    """State dict of timm's MetaFormer, VisionTransformer or MlpMixer -> ours.

    Shapes that change: MetaFormer's 1x1 convolution weights (O, I, 1, 1) become (O, I), and the affine weights of ResMLP
    (1, 1, C) become (C,). MetaFormer's heads differ, see `timm_head`: compare logits with its overrides.
    """
    layout = next((layout for marker, layout in _TIMM_MARKERS.items() if marker in state), "MetaFormer")
    if layout == "MetaFormer":
        return {k: v.flatten(1) if is_pointwise(k) and v.ndim == 4 else v for k, v in state.items()}
    return {_rename(k, _TIMM[layout]): v.flatten() if _is_affine(k) else v for k, v in state.items()}


def to_timm(state: Mapping[str, Tensor], config: MetaFormerConfig) -> StateDict:
    """State dict of ours -> timm's layout of such a model (`timm_layout`), the inverse of `from_timm`.

    In MetaFormer, linear weights inside stages without attention become 1x1 convolutions.
    """
    layout, out = timm_layout(config), {}
    if layout == "MetaFormer":
        mixers = config.per_stage(config.token_mixer)
        for key, value in state.items():
            in_conv_stage = key.startswith("stages.") and mixers[int(key.split(".")[1])] != "attention"
            out[key] = value[:, :, None, None] if in_conv_stage and is_pointwise(key) else value
        return out
    # timm has two names for the head's norm, by whether it comes before an average or behind it
    behind = config.head.order == "pool_norm" and config.head.pool == "avg"
    names = [(ours, theirs) for theirs, ours in _TIMM[layout] if theirs != "fc_norm." or behind]
    for key, value in state.items():
        name = _rename(key, names)
        out[name] = value.reshape(1, 1, -1) if _is_affine(name) else value
    return out


def timm_head(config: MetaFormerConfig) -> dict[str, Any]:
    """The keys of `head` with which equal weights give timm's logits; empty where they do already.

    PoolFormer normalises before pooling, timm's port after it and by another norm. The norm inside the MLP head of
    ConvFormer and CAFormer has torch's default epsilon in the original, 1e-6 in timm.
    """
    if timm_layout(config) != "MetaFormer":
        return {}
    if config.head.order == "norm_pool":
        return {"order": "pool_norm", "norm": "layer_norm"}
    if config.head.kind == "mlp" and config.head.mlp_norm_eps != 1e-6:
        return {"mlp_norm_eps": 1e-6}
    return {}


def _rename(key: str, names: list[tuple[str, str]]) -> str:
    """The key with its prefix renamed by the first pair (old, new) that matches, {} in both being a number."""
    for old, new in names:
        pattern = re.escape(old).replace(r"\{\}", r"(\d+)")
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", new.replace("{}", r"\1"), key)
    return key


def _is_affine(timm_key: str) -> bool:
    return timm_key.endswith((".alpha", ".beta"))


def is_pointwise(key: str) -> bool:
    return key.startswith("stages.") and key.endswith(
        (".fc1.weight", ".fc2.weight", ".pwconv1.weight", ".pwconv2.weight")
    )


# Key patterns of the published checkpoints -> our keys; the first that matches counts. In PoolFormer's `network`, stages
# stand at even places and the downsampling in front of the next stage at odd ones.
# mmpretrain has sail-sg's PoolFormer with names of its own in the head, transformers has it with other names throughout.
_HEAD = [(r"norm6?\.", "head.norm."), (r"head\.fc\.", "head.fc."), (r"head\.", "head.fc.")]

ORIGINALS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "sail-sg/poolformer": (
        "network.0.0.norm1.weight",
        [
            (r"patch_embed\.proj\.", "stem.conv."),
            *((rf"network\.{2 * i - 1}\.proj\.", f"stages.{i}.downsample.conv.") for i in range(1, 4)),
            *((rf"network\.{2 * i}\.(\d+)\.layer_scale_(\d)$", rf"stages.{i}.blocks.\1.layer_scale\2.scale")
              for i in range(4)),
            *((rf"network\.{2 * i}\.(\d+)\.", rf"stages.{i}.blocks.\1.") for i in range(4)),
            *_HEAD,
        ],
    ),
    "sail-sg/metaformer": (
        "downsample_layers.0.conv.weight",
        [
            (r"downsample_layers\.0\.conv\.", "stem.conv."),
            (r"downsample_layers\.0\.post_norm\.", "stem.norm."),
            (r"downsample_layers\.(\d+)\.conv\.", r"stages.\1.downsample.conv."),
            (r"downsample_layers\.(\d+)\.pre_norm\.", r"stages.\1.downsample.norm."),
            (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            *_HEAD,
        ],
    ),
    "transformers' PoolFormer": (
        "poolformer.encoder.block.0.0.before_norm.weight",
        [
            (r"poolformer\.encoder\.patch_embeddings\.0\.projection\.", "stem.conv."),
            (r"poolformer\.encoder\.patch_embeddings\.(\d+)\.projection\.", r"stages.\1.downsample.conv."),
            *((rf"poolformer\.encoder\.block\.(\d+)\.(\d+)\.{theirs}", rf"stages.\1.blocks.\2.{ours}")
              for theirs, ours in ((r"before_norm\.", "norm1."), (r"after_norm\.", "norm2."),
                                   (r"output\.conv(\d)\.", r"mlp.fc\3."), (r"layer_scale_(\d)$", r"layer_scale\3.scale"))),
            (r"norm\.", "head.norm."),
            (r"classifier\.", "head.fc."),
        ],
    ),
}  # fmt: skip


def original_layout(state: Mapping[str, Tensor]) -> str:
    """The one of `sail-sg/poolformer` (mmpretrain's too), `sail-sg/metaformer` and transformers' a state dict has, or ""."""
    return next((name for name, (marker, _) in ORIGINALS.items() if marker in state), "")


def from_original(state: Mapping[str, Tensor]) -> StateDict:
    """State dict as published by sail-sg/poolformer or sail-sg/metaformer, or of other PoolFormers -> ours.

    Raises:
        ValueError: It has none of these layouts.
    """
    layout = original_layout(state)
    if not layout:
        raise ValueError(f"not in the layout of {' or '.join(ORIGINALS)}: {next(iter(state), 'empty')!r}")
    patterns = ORIGINALS[layout][1]

    def rename(key: str) -> str:
        for pattern, replacement in patterns:
            if re.match(pattern, key):
                return re.sub(f"^{pattern}", replacement, key)
        return key

    return from_timm({rename(key): value for key, value in state.items()})
