"""models/counting.py: parts sum to the whole, parameters and compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.counting import count_parts
from models.factory import create_model
from models.registry import list_models, model_config

FEW = ["caformer_s18", "poolformer_s12", "randformer_s12", "deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2",
       "mixer_s16_224", "resmlp_12_224"]  # fmt: skip


def whole(name: str) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a model counted all at once."""
    with torch.device("meta"):
        model = create_model(name).eval()
        images = torch.empty(1, model.config.in_chans, *model.config.height_width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in list_models() if n not in FEW)]
)
def test_parts_sum_to_the_whole_model(name: str) -> None:
    parts = count_parts(model_config(name))
    assert (sum(p.params for p in parts), sum(p.macs for p in parts)) == whole(name)
    assert all(p.params >= 0 and p.macs >= 0 for p in parts)


def test_parts() -> None:
    stem, one, two, three, four, head = count_parts(model_config("caformer_s18"))
    assert [p.blocks for p in (one, two, three, four)] == [3, 3, 9, 3]
    assert [p.positions for p in (one, two, three, four)] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [p.channels for p in (stem, one, two, three, four, head)] == [64, 64, 128, 320, 512, 1000]
    assert [p.mixer for p in (one, four)] == ["sep_conv", "attention"]
    with torch.device("meta"):
        model = create_model("caformer_s18")
    assert three.params == sum(p.numel() for p in model.stages[2].parameters())
    assert head.params == sum(p.numel() for p in model.head.parameters()) and head.positions is None
    assert stem.macs == 7 * 7 * 3 * 64 * 56 * 56
