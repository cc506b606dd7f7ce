"""The residual blocks of a model and their drop-path modules, in order."""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layers.drop_path import DropPath
from stochastic_depth.places import block_names, find_owners


class NoBlocksError(ValueError):
    """A model in which nothing can be dropped."""


@dataclass(frozen=True)
class Block:
    """One residual block: the module that holds its DropPath modules."""

    name: str
    drop_paths: dict[str, DropPath]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile.

    Raises:
        ValueError: It is no model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_blocks(model: nn.Module) -> list[Block]:
    """The residual blocks of a model with their DropPath modules, in order of registration.

    Raises:
        NoBlocksError: There is none.
    """
    owners = find_owners(unwrap(model))
    blocks: dict[str, Block] = {}
    for owner, name in zip(owners, block_names(owners), strict=True):
        block = blocks.setdefault(name, Block(name, {}))
        inner = owner.name.removeprefix(name).lstrip(".")
        for key, child in owner.slots.items():
            if isinstance(child, DropPath):
                block.drop_paths[f"{inner}.{key}" if inner else key] = child
    found = [block for block in blocks.values() if block.drop_paths]
    if not found:
        raise NoBlocksError(
            f"{type(unwrap(model)).__name__} has no residual block with a DropPath, nor a place for one; "
            "build blocks with layers.drop_path.DropPath, or use a model that takes a drop-path rate"
        )
    return found


def stage_depths(model: nn.Module, blocks: Sequence[Block]) -> list[int]:
    """Blocks per stage: neighbours whose names differ in the last part only are one stage."""
    depths: list[int] = []
    previous = None
    for block in blocks:
        parent = block.name.rpartition(".")[0]
        if parent == previous:
            depths[-1] += 1
        else:
            depths.append(1)
        previous = parent
    return depths


def check_input_size(size: Any) -> None:
    """
    Raises:
        ValueError: It is neither `None` nor a list or tuple of numbers of at least 1.
    """
    if size is None:
        return
    if not isinstance(size, (tuple, list)) or not all(isinstance(n, numbers.Integral) and int(n) >= 1 for n in size):
        raise ValueError(f"input_size must be (C, H, W), whole numbers of at least 1, got {size!r}")


def model_input_size(model: nn.Module) -> Sequence[int] | None:
    config = getattr(model, "pretrained_cfg", None)
    return config.get("input_size") if isinstance(config, Mapping) else None
