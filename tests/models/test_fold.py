"""models/fold.py: scales folded into weights leave the logits as they were."""

import pytest
import torch
from torch import nn

from layers.mlp import StarReLU
from layers.norm import Affine, GroupNorm1, LayerNorm
from layers.scale import Scale
from models.export import example_images, relative_error
from models.fold import fold_scales
from models.metaformer import MetaFormerBlock
from models.registry import list_models, model_config
from tests.models.parts import KINDS, SHORT, built, logits


def left(model: nn.Module) -> dict[str, int]:
    """How many scales and norms with weights the blocks still hold."""
    blocks = [m for m in model.modules() if isinstance(m, MetaFormerBlock)]
    kinds = (Scale, StarReLU, GroupNorm1, LayerNorm, Affine)
    found = [type(m).__name__ for block in blocks for m in block.modules() if isinstance(m, kinds)]
    return {name: found.count(name) for name in sorted(set(found))}


@pytest.mark.parametrize("name", KINDS)
def test_folded_is_equal(name: str) -> None:
    model = built(name, **KINDS[name])
    images = example_images(model)(3)
    assert relative_error(logits(model, images), logits(fold_scales(model), images)) < 1e-5


def test_what_is_folded_and_what_stays() -> None:
    assert left(fold_scales(built("poolformer_s12", **SHORT))) == {"GroupNorm1": 4}, "norm1 carries LayerScale"
    assert left(fold_scales(built("caformer_s18", **SHORT))) == {"Scale": 4, "StarReLU": 2}, "ResScale, SepConv's"
    assert left(fold_scales(built("poolformerv2_s12", **SHORT))) == {"GroupNorm1": 4, "Scale": 4}
    assert left(fold_scales(built("deit3_small_patch16_224", depths=[2]))) == {}
    assert left(fold_scales(built("mixer_s16_224", depths=[2]))) == {"LayerNorm": 2}


def test_scales_that_cannot_be_folded_stay_and_count() -> None:
    for overrides in ({"norm": "none", "layer_scale": 0.5}, {"norm": "none", "layer_scale": 0.5, "act": "star_relu"}):
        model = built("poolformer_s12", **SHORT, **overrides)
        folded = fold_scales(model)
        assert left(folded)["Scale"] == 4, "pooling without a norm has nothing to take the scale"
        images = example_images(model)(2)
        assert relative_error(logits(model, images), logits(folded, images)) < 1e-5


def test_folding_leaves_the_model_alone() -> None:
    model = built("poolformer_s12", **SHORT).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold_scales(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())


def test_folding_keeps_the_dtype() -> None:
    folded = fold_scales(built("caformer_n4").to(torch.float64))
    assert {p.dtype for p in folded.parameters()} == {torch.float64}


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_model_folds(name: str) -> None:
    config = model_config(name)
    model = built(name, depths=[1] * len(config.depths))
    images = example_images(model)(1)
    assert relative_error(logits(model, images), logits(fold_scales(model), images)) < 1e-5
