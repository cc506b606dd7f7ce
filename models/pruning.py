"""Models with fewer residual blocks: which blocks a user means, and the smaller model that computes the same without them."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from files.errors import ConfigError, nearest
from files.words import counted
from layers.patch_embed import PatchEmbed
from layers.scale import Scale
from models.metaformer import MetaFormer, MetaFormerBlock, Stage
from stochastic_depth.blocks import NoBlocksError
from stochastic_depth.removal import ResidualBlock, residual_blocks, take_out

OPTION = "--drop-blocks"


def blocks_of(model: nn.Module) -> list[ResidualBlock]:
    """The residual blocks of a model in order, and which of them can be removed.

    Raises:
        ConfigError: There is none that can be.
    """
    try:
        blocks = residual_blocks(model)
    except NoBlocksError as error:
        raise ConfigError(f"{OPTION}: {error}") from None
    except ValueError as error:  # a place for stochastic depth that is not understood
        raise ConfigError(f"{OPTION}: {error}") from None
    if not any(block.removable for block in blocks):
        reasons = sorted({block.reason for block in blocks})
        raise ConfigError(f"{OPTION}: none of the {len(blocks)} residual blocks can be removed: {'; '.join(reasons)}")
    return blocks


def chosen_blocks(words: Sequence[str], blocks: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    """The blocks that a user means, in the model's order.

    Args:
        words: Names (`stages.1.blocks.0`), or numbers from 1 in the model's order.
        blocks: Of `blocks_of`.

    Raises:
        ConfigError: There is no such block, it is named twice, it cannot be removed, or none would be left.
    """
    names = {block.name: block for block in blocks}
    found: list[ResidualBlock] = []
    for word in words:
        if word.isascii() and word.isdigit():
            if not 1 <= int(word) <= len(blocks):
                raise ConfigError(f"{OPTION}: there is no block {word}: the model's blocks are 1 to {len(blocks)}")
            block = blocks[int(word) - 1]
        elif (known := names.get(word)) is not None:
            block = known
        else:
            hint = nearest(word, list(names)) or f"; blocks are 1 to {len(blocks)}, or {blocks[0].name} and so on"
            raise ConfigError(f"{OPTION}: the model has no block {word!r}{hint}")
        if block in found:
            raise ConfigError(f"{OPTION}: block {block.number} ({block.name}) is named twice")
        if block.reason:
            raise ConfigError(f"{OPTION}: block {block.number} ({block.name}) cannot be removed: {block.reason}")
        found.append(block)
    if len(found) == len(blocks):
        raise ConfigError(f"{OPTION}: these are all blocks of the model; leave one at least")
    return sorted(found, key=lambda block: block.number)


def split_list(text: str) -> list[str]:
    """`1,stages.1.blocks.0` -> its parts.

    Raises:
        ConfigError: One is empty.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"{OPTION} {text!r}: names no block; give numbers or names, such as {OPTION} 4,5")
    return words


def named_blocks(text: str) -> list[str]:
    """What is named in a list (`4,5`), or in the blocks.json that `validate.py --drop-blocks` wrote, FILE or FILE:N.

    Raises:
        ConfigError: It is no such file, or does not say which blocks.
    """
    path, _, count = text.rpartition(":")
    if Path(text).is_file():
        return _read(Path(text), None)
    if path and Path(path).is_file():
        if not (count.isascii() and count.isdigit() and int(count)):
            raise ConfigError(
                f"{OPTION} {text}: behind the file stands how many of its blocks to remove, got {count!r}"
            )
        return _read(Path(path), int(count))
    if "/" in text or text.endswith(".json"):
        raise ConfigError(f"{OPTION} {text}: there is no such file")
    return split_list(text)


def _read(path: Path, count: int | None) -> list[str]:
    """The blocks that a blocks.json names, or the first `count` of a greedy order."""
    origin = f"{OPTION} {path}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kind, rows = data["kind"], [row["removed"] for row in data["rows"]]
        names = [str(name) for name in rows[-1]]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{origin}: is no blocks.json of validate.py {OPTION}") from None
    if kind == "one":
        raise ConfigError(f"{origin}: holds each block removed alone, so it does not say which; name blocks")
    if count is None:
        return names
    if kind != "greedy":
        raise ConfigError(f"{origin}: holds one set, not an order, so that :{count} has no meaning; leave it out")
    if count > len(names):
        raise ConfigError(f"{origin}: holds an order of {counted(len(names), 'block')}, got :{count}")
    return names[:count]


# ---- the smaller model --------------------------------------------------------------------------------------------


def without_blocks(model: MetaFormer | Any, blocks: Sequence[ResidualBlock]) -> MetaFormer | Any:
    """A copy of a model without some of its blocks: the logits are those of the model with their branches switched off.

    Of a foreign model the blocks are replaced by the identity; no argument of its library builds it so, and the list
    `removed_blocks` of the copy says it.

    Raises:
        ConfigError: A stage would be left without a block, or a shortcut cannot be kept.
    """
    if isinstance(model, MetaFormer):
        return smaller_model(model, [block.name for block in blocks])
    small = deepcopy(model)
    take_out(small, blocks)
    small.removed_blocks = [block.name for block in blocks]
    return small


def empty_stage(model: MetaFormer | Any, names: Sequence[str]) -> str:
    """Why a model of ours cannot be written without some blocks: a stage that would be empty; else an empty text."""
    if not isinstance(model, MetaFormer):
        return ""
    for number, stage in enumerate(model.stages):
        own = [f"stages.{number}.blocks.{i}" for i in range(len(_blocks(stage)))]
        if own and set(own) <= set(names):
            return f"stage {number + 1} of {len(model.stages)} would have no block"
    return ""


def smaller_model(model: MetaFormer, names: Sequence[str]) -> MetaFormer:
    """A copy of a model of ours with smaller `depths`; drop-path rates and all other settings of the kept blocks stay.

    The shortcut of a removed block is not always the identity: where blocks have a ResScale, it is multiplied by that.
    Such a factor goes into what stands before it: the last linear layer of the block before, or the convolution.

    Args:
        model: Is left as it was.
        names: Of the blocks to remove.

    Raises:
        ConfigError: A stage would be left without a block, or such a factor has nowhere to go.
    """
    if why := empty_stage(model, names):
        raise ConfigError(
            f"{OPTION}: {why}; a model's config has at least one in each\nkeep one, or measure such a model with "
            "validate.py, which switches blocks off"
        )
    small = deepcopy(model)
    kept_names = []
    for number, stage in enumerate(small.stages):
        kept: list[MetaFormerBlock] = []
        for i, block in enumerate(_blocks(stage)):
            if f"stages.{number}.blocks.{i}" not in names:
                kept.append(block)
                continue
            for scale in (block.res_scale1, block.res_scale2):
                if isinstance(scale, Scale):
                    with torch.no_grad():
                        _multiply(small, number, kept[-1] if kept else None, scale.scale.detach())
        assert isinstance(stage, Stage)
        stage.blocks = nn.Sequential(*kept)
        kept_names += [f"stages.{number}.blocks.{i}" for i in range(len(kept))]
    small.depths = tuple(len(_blocks(stage)) for stage in small.stages)
    # what was published holds of the whole model, and its weights do not fit
    changes = {"depths": list(small.depths), "published": None, "pretrained": []}
    small.config = small.head.config = model.config.model_copy(update=changes)
    small.pretrained_cfg["tag"] = ""
    if small.isotropic:
        small.feature_info = [
            {**level, "module": name} for level, name in zip(small.feature_info, kept_names, strict=False)
        ]
    return small


def _blocks(stage: nn.Module) -> list[MetaFormerBlock]:
    assert isinstance(stage, Stage)
    return [block for block in stage.blocks if isinstance(block, MetaFormerBlock)]


def _multiply(model: MetaFormer, stage: int, before: MetaFormerBlock | None, scale: Tensor) -> None:
    """Multiplies what a block is given by a factor per channel (C,), in the weights of what gives it."""
    if before is not None:
        assert isinstance(before.res_scale2, Scale)  # in all blocks of a stage, or in none
        before.res_scale2.scale.mul_(scale)
        if isinstance(before.layer_scale2, Scale):
            before.layer_scale2.scale.mul_(scale)
        else:
            _multiply_rows(before.mlp.get_submodule("fc2"), scale)
        return
    found = model.stages[stage]
    assert isinstance(found, Stage)
    if isinstance(found.downsample, PatchEmbed):
        _multiply_rows(found.downsample.conv, scale)
    elif stage == 0 and isinstance(model.embed, nn.Identity):
        norm = model.stem.norm
        _multiply_rows(model.stem.conv if isinstance(norm, nn.Identity) else norm, scale)
    else:
        raise ConfigError(
            f"{OPTION}: the first block of stage {stage + 1} multiplies its shortcut (res_scale), and no layer before it "
            "can do so instead; keep it"
        )


def _multiply_rows(module: nn.Module, scale: Tensor) -> None:
    """Multiplies each output channel of a linear layer, convolution or norm."""
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    weight.mul_(scale.to(weight.dtype).reshape(-1, *(1,) * (weight.ndim - 1)))
    if isinstance(bias, Tensor):
        bias.mul_(scale.to(bias.dtype))
