"""Parameters and multiply-accumulates of a model, part by part."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.config import MetaFormerConfig
from models.metaformer import MetaFormer


@dataclass(frozen=True)
class Part:
    """One line of a model's list: a stage, or what stands before or behind the stages.

    Attributes:
        name: `stem`, `stage 1`, ..., `head`.
        params: Parameters, frozen ones too.
        frozen: Those that are never trained.
        macs: Multiply-accumulates of one image at the config's size.
        positions: Height and width inside; `None` for the head.
        channels: Of its output.
        mixer: Token mixer, or "".
        norm: Norm of its blocks, or "".
        blocks: Number of blocks.
    """

    name: str
    params: int
    macs: int
    positions: tuple[int, int] | None
    channels: int
    mixer: str = ""
    norm: str = ""
    blocks: int = 0
    frozen: int = 0


def count_parts(config: MetaFormerConfig) -> list[Part]:
    """Size and cost of a model, part by part; they sum to those of the whole."""
    one_each = config.model_copy(update={"depths": [1] * len(config.depths)})
    with torch.device("meta"):
        model = MetaFormer(one_each).eval()
        images = torch.empty(1, config.in_chans, *config.height_width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    counts = counter.get_flop_counts()

    def macs(module: str) -> int:
        return sum(counts.get(f"MetaFormer.{module}", {}).values()) // 2

    def params(module: nn.Module) -> int:
        return sum(count_parameters(module))

    stages = []
    for i, depth in enumerate(config.depths):
        block = model.get_submodule(f"stages.{i}.blocks.0")
        stages.append(
            Part(
                name=f"stage {i + 1}",
                params=params(model.stages[i]) + (depth - 1) * params(block),
                macs=macs(f"stages.{i}") + (depth - 1) * macs(f"stages.{i}.blocks.0"),
                positions=config.feature_size(i),
                channels=config.dims[i],
                mixer=config.per_stage(config.token_mixer)[i],
                norm=config.per_stage(config.norm)[i],
                blocks=depth,
                frozen=depth * count_parameters(block)[1],
            )
        )
    # what belongs to none of them, such as a class token, is counted with the stem
    head = Part("head", params(model.head), macs("head"), None, config.num_classes)
    rest_params = params(model) - params(model.stages) - head.params
    rest_macs = counter.get_total_flops() // 2 - sum(macs(f"stages.{i}") for i in range(len(stages))) - head.macs
    return [Part("stem", rest_params, rest_macs, config.feature_size(0), config.dims[0]), *stages, head]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of frozen parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) - trainable
